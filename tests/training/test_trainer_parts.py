"""Weights that transformers saves under older names than the modules have (ViT's) come back from a checkpoint all the same."""

import pytest
import torch
from transformers import ViTConfig

from imagedex.modeling.modeling_vision_grounded_t5 import VisionGroundedT5
from imagedex.training.generative.arguments import DSITrainingArguments
from imagedex.training.generative.trainer import DSITrainer
from imagedex.training.trainer_parts import load_weights

T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 8,
       "image_size": 16}  # fmt: skip


def build(seed):
    torch.manual_seed(seed)
    return VisionGroundedT5.from_t5_vision_pretrained(t5_config=T5, vision_config=ViTConfig(**VIT))


def trainer_of(model, folder):
    args = DSITrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True)
    return DSITrainer(model=model, args=args)


@pytest.mark.parametrize("way", ["resume", "best", "alone"])
def test_every_weight_comes_back(tmp_path, way):
    saved, other = build(0), build(1)
    saved.save_pretrained(tmp_path)
    expected = saved.state_dict()
    assert any(not torch.equal(value, expected[name]) for name, value in other.state_dict().items() if "vision" in name)
    if way == "resume":
        trainer_of(other, tmp_path)._load_from_checkpoint(str(tmp_path))
    elif way == "best":
        trainer = trainer_of(other, tmp_path)
        trainer.state.best_model_checkpoint = str(tmp_path)
        trainer._load_best_model()
    else:
        load_weights(other, tmp_path)
    found = other.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name, atol=0, rtol=0)


def test_towers_have_their_own_rate(tmp_path):
    model = build(0)
    model.config.freeze_vision_tower = False
    model.requires_grad_(True)
    trainer = trainer_of(model, tmp_path)
    trainer.args.vision_learning_rate, trainer.args.learning_rate = 1e-5, 1e-3
    optimizer = trainer.create_optimizer()
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    names = dict(model.named_parameters())
    assert len(rate_of) == len(names)
    for name, parameter in names.items():
        sees = name.startswith(("vision_model.", "vision_projection."))
        assert rate_of[id(parameter)] == (1e-5 if sees else 1e-3), name
