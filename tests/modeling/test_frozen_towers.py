"""Towers are frozen when the model is made: what is unfrozen or added afterwards trains, what stays frozen rests."""

import copy

import peft
import pytest
import torch

from imagedex.configuration.configuration_xmatching import XMatchingConfig
from imagedex.modeling.modeling_xmatching import XMatchingModel

BERT = {"model_type": "bert", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32}  # fmt: skip
VIT = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
       "image_size": 32, "patch_size": 16}  # fmt: skip
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


def tiny(vision=VIT, **fields):
    torch.manual_seed(0)
    return XMatchingModel(XMatchingConfig(text_config=BERT, vision_config=vision, projection_dim=8, **fields))


def batch():
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(3, 40, (4, 6), generator=generator),
        "attention_mask": torch.ones(4, 6, dtype=torch.long),
        "pixel_values": torch.randn(4, 3, 32, 32, generator=generator),
        "image_ids": torch.arange(4),
    }


def moved(model, steps=2) -> set[str]:
    """Names of what changes in as many steps, `train()` before each as in a Trainer."""
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.fixture(params=["made", "loaded"])
def model(request, tmp_path):
    made = tiny()
    if request.param == "made":
        return made
    made.save_pretrained(tmp_path)
    return XMatchingModel.from_pretrained(tmp_path)


def test_wholly_frozen_towers_neither_move_nor_leave_evaluation_mode(model):
    assert model.is_frozen("text") and model.is_frozen("vision")
    assert {name.split(".")[0] for name in moved(model)} == {"text_head", "vision_head", "logit_scale"}
    towers = [*model.text_model.modules(), *model.vision_model.modules()]
    assert model.training and not any(module.training for module in towers)


def test_adapters_injected_into_a_frozen_tower_train(model):
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"])
    peft.inject_adapter_in_model(config, model.text_model)
    assert not model.is_frozen("text") and model.is_frozen("vision")
    names = moved(model)  # B starts at zero, so A moves from the second step on
    adapters = {name for name, p in model.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * 2 * 2 and adapters <= names
    assert not {name for name in names - adapters if name.startswith(("text_model", "vision_model"))}
    assert model.text_model.training and not model.vision_model.training


def test_a_layer_unfrozen_by_hand_trains(model):
    last = model.vision_model.layers[-1]
    last.requires_grad_(True)
    own = {name for name, p in model.named_parameters() if p.requires_grad and name.startswith("vision_model")}
    assert own and {name for name in moved(model) if name.startswith(("text_model", "vision_model"))} == own


def test_frozen_batch_norms_of_a_tower_in_training_keep_their_statistics():
    model = tiny(RESNET)
    norms = [n for n, m in model.vision_model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    unfrozen = norms[-1]
    model.vision_model.get_submodule(unfrozen).requires_grad_(True)
    names = {name for name in moved(model) if name.startswith("vision_model")}
    assert names == {f"vision_model.{unfrozen}.{part}" for part in
                     ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}  # fmt: skip
    assert [name for name in norms if model.vision_model.get_submodule(name).training] == [unfrozen]


def test_loading_with_its_report_freezes_too(tmp_path):
    tiny(freeze_vision_tower=False).save_pretrained(tmp_path)
    model, report = XMatchingModel.from_pretrained(tmp_path, output_loading_info=True)
    assert model.is_frozen("text") and not model.is_frozen("vision") and not report["missing_keys"]
