"""Towers of text and vision, any that AutoModel knows: built from a config or loaded, and what they give."""

import inspect
from contextlib import contextmanager

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, PreTrainedModel


def tower_class(config):
    """(auto class or model class, keywords) that build a tower: the encoder alone of an encoder-decoder (T5), no unused pooling
    layer. The halves that no auto class knows (SigLIP's text tower) are called as their configs are."""
    found = [
        auto_class for auto_class in (AutoModelForTextEncoding, AutoModel) if type(config) in auto_class._model_mapping
    ]
    if found:
        made = found[0]
        model_class = made._model_mapping[type(config)]
    else:  # AutoModel: a class with code of its own
        made = model_class = getattr(transformers, type(config).__name__.replace("Config", "Model"), AutoModel)
    unused_pooler = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return made, {"add_pooling_layer": False} if unused_pooler else {}


def build_tower(config) -> PreTrainedModel:
    """A tower with random weights."""
    made, kwargs = tower_class(config)
    return (made.from_config if hasattr(made, "from_config") else made._from_config)(config, **kwargs)


def load_tower(name_or_path: str, part: str) -> PreTrainedModel:
    """A pretrained tower; `part` ("text_config" or "vision_config") says which half of a two-tower model (CLIP) to take.

    In float32 even where it was saved in half precision: heads are float32, and small steps are lost on half-precision weights.
    """
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    config = getattr(config, part, config)
    made, own = tower_class(config)
    return made.from_pretrained(name_or_path, config=config, dtype=torch.float32, **own)


def tower_width(tower: PreTrainedModel) -> int:
    """Channels of the tower's last state."""
    if hasattr(tower, "timm_model"):
        return tower.timm_model.num_features
    sizes = getattr(tower.config, "hidden_sizes", None)  # ResNet, ConvNeXt: one width a stage
    return sizes[-1] if sizes else tower.config.hidden_size


def pooler_width(tower: PreTrainedModel) -> int:
    """Channels of a text tower's own pooled output, which SigLIP and AltCLIP project."""
    own = (getattr(tower.config, name, None) for name in ("projection_size", "project_dim"))
    return next(filter(None, own), None) or tower_width(tower)


def unsharded(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter itself; outside of `forward`, FSDP2 leaves each process a part of it."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


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


def trains(module: torch.nn.Module) -> bool:
    """Whether any parameter in it does."""
    return any(parameter.requires_grad for parameter in module.parameters())


def rest_frozen_parts(tower: torch.nn.Module) -> None:
    """Puts into evaluation mode what no step may move: a tower in which nothing trains; of any other, its frozen batch norms."""
    if not trains(tower):
        tower.eval()
    for module in tower.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.affine and not trains(module):
            module.eval()


@contextmanager
def evaluating(model: torch.nn.Module):
    """Evaluation mode meanwhile, put back afterwards: with dropout a vector or a ranking would be a random one."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:  # one by one: a part may have been in another mode than the whole
            module.training = training
