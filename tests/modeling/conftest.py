"""Tiny models that take sentences and pictures."""

import pytest
import torch

from imagedex.modeling.modeling_codebook_t5 import CodebookT5
from imagedex.modeling.modeling_vision_grounded_t5 import VisionGroundedT5

T5 = {
    "vocab_size": 60,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "initializer_factor": 0.5,
}
VIT = {
    "model_type": "vit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8, "initializer_range": 0.2,
}  # fmt: skip
CLASSES = {"codebook_t5": CodebookT5, "vision_grounded_t5": VisionGroundedT5}


@pytest.fixture
def t5_fields():
    return dict(T5)


@pytest.fixture
def vit_fields():
    return dict(VIT)


@pytest.fixture
def tiny_picture_t5():
    """tiny_picture_t5("codebook_t5", **config fields) -> a model with random weights: 16 patches and a class token."""

    def build(model_type, t5=None, vit=None, **fields):
        torch.manual_seed(0)
        model_class = CLASSES[model_type]
        if model_class is CodebookT5:
            fields = {"num_visual_tokens": 9, "visual_token_selection": "even"} | fields
        return model_class.from_t5_vision_pretrained(
            t5_config=T5 | (t5 or {}), vision_config=VIT | (vit or {}), **fields
        )

    return build


@pytest.fixture
def picture_batch():
    """Three sentences of five tokens at most, two pictures."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    return {
        "input_ids": torch.randint(3, 60, (3, 5), generator=generator) * mask,
        "attention_mask": mask,
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
    }
