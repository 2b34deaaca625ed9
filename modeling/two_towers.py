"""Both halves of one CLIP or SigLIP: what of the whole checkpoint XMatchingModel takes over, so that it starts as that one is."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

from .towers import tower_width

# Two-tower models that can be started from as they are -> which text pooling is theirs.
TWO_TOWERS = {
    "clip": "pooler", "metaclip_2": "pooler", "siglip": "pooler", "siglip2": "pooler", "altclip": "pooler",
    "chinese_clip": "first",
}  # fmt: skip


def is_two_towers(text_name_or_path: str | None, vision_name_or_path: str | None) -> bool:
    """Whether both towers are the halves of one checkpoint (CLIP, SigLIP) that can be started from as it is."""
    if not text_name_or_path or not vision_name_or_path or Path(text_name_or_path) != Path(vision_name_or_path):
        return False
    return AutoConfig.from_pretrained(text_name_or_path, trust_remote_code=False).model_type in TWO_TOWERS


def load_two_towers(name_or_path: str) -> PreTrainedModel:
    """The whole model in float32, its towers named as if each had been loaded by itself."""
    whole = AutoModel.from_pretrained(name_or_path, dtype=torch.float32, trust_remote_code=False)
    for tower in (whole.text_model, whole.vision_model):
        tower.config._name_or_path = str(name_or_path)
    return whole


def own_fields(whole: PreTrainedModel) -> dict:
    """The fields of XMatchingConfig with which a two-tower model's vectors, scale and loss are its own. Its towers' pooled
    states are projected (CLIP), or are the vectors already (SigLIP): a linear head then starts as the identity."""
    bias = getattr(whole, "logit_bias", None)
    projection = getattr(whole, "visual_projection", None)
    fields = {
        "text_pooling": TWO_TOWERS[whole.config.model_type],
        "text_pooling_layers": 1,
        "vision_pooling": "pooler",
        "text_head": "linear",
        "vision_head": "linear",
        "head_dropout": 0.0,
        "text_head_power": 1.0,
        "vision_head_power": 1.0,
        "projection_dim": tower_width(whole.vision_model) if projection is None else projection.out_features,
        "loss_type": "info_nce" if bias is None else "sigmoid",
        "logit_scale_init": whole.logit_scale.double().exp().item(),
    }
    return fields if bias is None else fields | {"logit_bias_init": bias.item()}


@torch.no_grad()
def fill_head(head: torch.nn.Module, projection: torch.nn.Linear | None) -> None:
    """The weights of the whole model's projection, which has no bias, for a linear head of that shape."""
    if projection is not None and head.kind == "linear" and projection.weight.shape == head.layers[0].weight.shape:
        head.layers[0].weight.copy_(projection.weight)
        head.layers[0].bias.zero_()
