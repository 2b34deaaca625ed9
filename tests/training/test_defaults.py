"""What a training without a recipe does, and that nothing else depends on it: saved models and Maria's recipe say their own."""

import dataclasses
import json

import pytest
import yaml
from transformers import PreTrainedConfig

from imagedex import DATA
from imagedex.configuration.configuration_xmatching import XMatchingConfig
from imagedex.training.dual_encoder import convert_maria
from imagedex.training.dual_encoder.arguments import XMatchingArguments

OURS = {field.name for field in dataclasses.fields(XMatchingConfig)} - {
    field.name for field in dataclasses.fields(PreTrainedConfig)
}
TOWERS = {"text_config", "vision_config"}
# fields that came later; without them a config means what it meant before
LATER = {"text_head_power": 1.0, "vision_head_power": 1.0}
# of losses that she does not use, and of towers from scratch
NOT_MARIAS = {"logit_scale_init", "logit_bias_init", "initializer_range", *LATER}
# what the defaults were when models were saved whose config.json is as below
SAVED = {
    "model_type": "xmatching", "text_pooling": "first", "text_pooling_layers": 4, "vision_pooling": "pooler",
    "text_head": "mlp", "vision_head": "mlp", "head_hidden_sizes": [1024, 1024], "head_dropout": 0.2, "projection_dim": 512,
    "freeze_text_tower": True, "freeze_vision_tower": True, "loss_type": "paired_hinge", "loss_margin": 0.5,
    "loss_reduction": "mean", "mask_same_image": True, "negatives": "gathered", "logit_scale_init": 14.285714285714285,
    "logit_bias_init": -10.0, "initializer_range": 0.02,
}  # fmt: skip


def test_a_model_without_a_recipe_is_the_one_we_would_train():
    config = XMatchingConfig()
    found = {name: getattr(config, name) for name in ("text_pooling", "text_pooling_layers", "vision_pooling", "text_head",
             "vision_head", "loss_type", "negatives", "mask_same_image", "projection_dim")}  # fmt: skip
    assert found == {
        "text_pooling": "mean", "text_pooling_layers": 1, "vision_pooling": "pooler", "text_head": "linear",
        "vision_head": "linear", "loss_type": "info_nce", "negatives": "gathered", "mask_same_image": True, "projection_dim": 512,
    }  # fmt: skip
    assert config.freeze_text_tower and config.freeze_vision_tower
    # the command line gives no value of its own
    assert XMatchingArguments().config_fields() == {}


def test_a_saved_config_says_every_value(tmp_path):
    XMatchingConfig().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).keys() >= OURS


def test_a_config_saved_with_other_defaults_keeps_them(tmp_path):
    assert SAVED.keys() >= OURS - TOWERS - LATER.keys()
    (tmp_path / "config.json").write_text(json.dumps(SAVED))
    config = XMatchingConfig.from_pretrained(tmp_path)
    assert {name: getattr(config, name) for name in SAVED} == SAVED
    assert {name: getattr(config, name) for name in LATER} == LATER


def test_marias_recipe_says_all_of_maria():
    recipe = yaml.safe_load((DATA / "recipes" / "coco" / "xmatching_maria.yaml").read_text())
    assert recipe.keys() >= OURS - TOWERS - NOT_MARIAS


@pytest.mark.parametrize("name", sorted(OURS - TOWERS - NOT_MARIAS))
def test_a_converted_maria_is_as_her_recipe(name):
    recipe = yaml.safe_load((DATA / "recipes" / "coco" / "xmatching_maria.yaml").read_text())
    from_the_file = {"text_pooling_layers", "head_hidden_sizes", "projection_dim"}
    assert (name in convert_maria.MARIA) != (name in from_the_file)
    if name in convert_maria.MARIA:
        assert convert_maria.MARIA[name] == recipe[name]
