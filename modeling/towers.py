"""Vision towers: built from a config or loaded, any that AutoModel knows."""

import inspect

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel


def without_pooler(config) -> dict:
    """Keywords that leave out a pooling layer nobody reads."""
    model_class = AutoModel._model_mapping.get(type(config), None)
    has_pooler = model_class is not None and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if has_pooler else {}


def build_vision_tower(config) -> PreTrainedModel:
    """A vision tower with random weights."""
    return AutoModel.from_config(config, **without_pooler(config))


def load_vision_tower(name_or_path: str, **kwargs) -> PreTrainedModel:
    """A pretrained vision tower; of a two-tower model (CLIP, SigLIP) its vision half."""
    config = AutoConfig.from_pretrained(name_or_path)
    config = getattr(config, "vision_config", config)
    return AutoModel.from_pretrained(name_or_path, config=config, **without_pooler(config), **kwargs)


def vision_width(tower: PreTrainedModel) -> int:
    """Channels of the tower's last state."""
    if hasattr(tower, "timm_model"):
        return tower.timm_model.num_features
    sizes = getattr(tower.config, "hidden_sizes", None)  # ResNet, ConvNeXt: one width a stage
    return sizes[-1] if sizes else tower.config.hidden_size


def prefix_tokens(tower: PreTrainedModel) -> int:
    """How many of the tower's states come before the patches: class token (ViT, CLIP), distillation token (DeiT),
    registers (DINOv2). 0 for towers without them (SigLIP, Swin, ResNet)."""
    if hasattr(tower, "timm_model"):
        return getattr(tower.timm_model, "num_prefix_tokens", 0)
    count = 0
    for name, parameter in tower.named_parameters():
        last = name.split(".")[-1]
        if last in ("cls_token", "class_embedding", "distillation_token"):
            count += 1
        elif last == "register_tokens":
            count += parameter.shape[1]
    return count


def as_sequence(states: torch.Tensor) -> torch.Tensor:
    """(B, S, width) as it is; a feature map (B, channels, height, width) as (B, height * width, channels), row by row."""
    return states if states.ndim == 3 else states.flatten(2).transpose(1, 2)
