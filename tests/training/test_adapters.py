"""LoRA in frozen towers: what trains, what is saved, and that a run goes on with the very numbers it stopped at."""

import copy
import json
import logging
import os
import shutil

import peft
import pytest
import safetensors.torch
import torch
from test_every_tower import save_text_tower, save_vision_tower
from test_one_way_to_read import FAMILIES
from tiny_models import TOWER

import run_xmatching
from imagedex import command_line
from imagedex.configuration.configuration_xmatching import XMatchingConfig
from imagedex.errors import UserError
from imagedex.modeling.modeling_xmatching import XMatchingModel
from imagedex.training import adapters
from imagedex.training.dual_encoder import arguments as dual_encoder_arguments
from imagedex.training.dual_encoder.arguments import XMatchingTrainingArguments


def arguments(folder, **fields):
    return XMatchingTrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, do_train=True, lora_rank=2, **fields
    )


TEXT = {
    "bert": TOWER | {"vocab_size": 40},
    "mpnet": TOWER | {"vocab_size": 40},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 40},
    "siglip_text_model": TOWER | {"vocab_size": 40, "projection_size": 32, "max_position_embeddings": 8},
    "clip_text_model": TOWER | {"vocab_size": 40, "eos_token_id": 39},
}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}


def tiny(text="bert", vision=FAMILIES["vit"][0], **fields):
    torch.manual_seed(0)
    fields = {"text_pooling": "pooler" if "siglip" in text else "mean", "projection_dim": 8} | fields
    return XMatchingModel(
        XMatchingConfig(text_config={"model_type": text, **TEXT[text]}, vision_config=vision, **fields)
    )


def batch(model):
    generator = torch.Generator().manual_seed(1)
    inputs = {"input_ids": torch.randint(3, 39, (4, 8), generator=generator), "image_ids": torch.arange(4)}
    if model.config.vision_config.model_type == "siglip2_vision_model":
        patches = torch.randn(4, 16, 8 * 8 * 3, generator=generator)
        return inputs | {"pixel_values": patches, "pixel_attention_mask": torch.ones(4, 16, dtype=torch.long),
                         "spatial_shapes": torch.tensor([[4, 4]] * 4)}  # fmt: skip
    return inputs | {"pixel_values": torch.randn(4, 3, 32, 32, generator=generator)}


def take_steps(model, count=3):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(count):
        model.train()
        optimizer.zero_grad()
        model(**batch(model)).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    ("text", "vision"),
    [("bert", "vit"), ("mpnet", "dinov2"), ("t5", "convnext"), ("clip_text_model", "clip"), ("siglip_text_model", "siglip"),
     ("bert", "siglip2")],
)  # fmt: skip
def test_every_adapter_learns_the_rest_of_the_towers_does_not_and_the_merged_model_is_the_same(
    text, vision, tmp_path, caplog
):
    model = tiny(text, FAMILIES[vision][0])
    with torch.no_grad():
        start = model.eval()(**batch(model))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level(logging.INFO, logger="imagedex"):
        adapters.add_adapters(model, arguments(tmp_path / "run"))
    assert "LoRA of rank 2 beside" in caplog.text and "of the text tower and" in caplog.text
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch(model)).logits_per_text, start.logits_per_text)  # nothing is felt yet
    loras = {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}
    take_steps(model)
    after = model.state_dict()
    assert loras and [name for name, value in loras.items() if torch.equal(after[name], value)] == []
    towers = {name: value for name, value in before.items() if name.startswith(("text_model", "vision_model"))}
    for name, value in after.items():
        plain = name.replace(".base_layer.", ".")
        assert plain not in towers or torch.equal(value, towers[plain]), name

    model.save_pretrained(tmp_path / "saved", state_dict=adapters.merged_weights(model))
    loaded, report = XMatchingModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values()) and loaded.state_dict().keys() == before.keys()
    with torch.no_grad():
        expected, found = model(**batch(model)), loaded(**batch(model))
    torch.testing.assert_close(found.logits_per_text, expected.logits_per_text, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found.logits_per_text, start.logits_per_text, atol=1e-2)


def test_merged_weights_are_those_of_peft():
    model = tiny()
    adapters.add_adapters(model, arguments("unused", lora_alpha=3.0, lora_target_modules=["query", "q_proj"]))
    take_steps(model)
    merged = adapters.merged_weights(model)
    wrapped = copy.deepcopy(model)
    for layer in [module for module in wrapped.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]:
        assert layer.scaling == {"default": 1.5}
        layer.merge()
    theirs = {name.replace(".base_layer.", "."): v for name, v in wrapped.state_dict().items() if "lora_" not in name}
    assert merged.keys() == theirs.keys()
    for name, value in merged.items():
        torch.testing.assert_close(value, theirs[name], msg=name)
    assert {n.split(".")[-2] for n, v in model.named_parameters() if "base_layer" in n} == {"base_layer"}
    adapted = {name.partition(".lora_")[0].rpartition(".")[2] for name in model.state_dict() if "lora_" in name}
    assert adapted == {"query", "q_proj"}


def test_what_trains_comes_back_to_the_bit(tmp_path):
    """A tower trained as a whole beside one with adapters, its batch statistics too."""
    models = [tiny(vision=RESNET, freeze_vision_tower=False) for _ in range(2)]
    for model in models:
        adapters.add_adapters(model, arguments(tmp_path / "run"))
    expected = take_steps(models[0]).state_dict()
    adapters.save_adapters(models[0], tmp_path)
    adapters.load_adapters(models[1], tmp_path)
    assert all(torch.equal(value, expected[name]) for name, value in models[1].state_dict().items())
    with pytest.raises(UserError, match="holds other adapters"):
        adapters.load_adapters(tiny(), tmp_path)
    with pytest.raises(UserError, match="was not saved by a training with --lora_rank"):
        adapters.load_adapters(models[1], tmp_path / "run")


def test_a_tower_without_linear_layers_stays_aloud(tmp_path, caplog):
    model = tiny(vision=RESNET)
    adapters.add_adapters(model, arguments(tmp_path))
    assert "the vision tower has no linear layer for --lora_rank: it stays as it is" in caplog.text
    assert model.is_frozen("vision") and not model.is_frozen("text")


@pytest.fixture
def towers(tmp_path):
    torch.manual_seed(0)
    save_text_tower(tmp_path / "text", "bert")
    save_vision_tower(tmp_path / "vision", "vit")
    return tmp_path


@pytest.fixture
def run(towers, flickr_folder, monkeypatch):
    """run("--flag", value, ...): two epochs of four steps, a checkpoint after each."""
    monkeypatch.chdir(towers)

    def launch(*flags):
        own = [
            "--dataset_name", flickr_folder, "--held_out_captions_per_image", 1, "--text_model_name_or_path", "text",
            "--vision_model_name_or_path", "vision", "--do_train", "--do_eval", "--num_train_epochs", 2, "--save_strategy",
            "epoch", "--eval_strategy", "epoch", "--per_device_train_batch_size", 9, "--use_cpu", "--report_to", "none",
            "--disable_tqdm", "true", "--projection_dim", 16, "--lora_rank", 2, "--learning_rate", 1e-2, *flags,
        ]  # fmt: skip
        run_xmatching.main(list(map(str, own)))

    return launch


def weights(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def test_a_run_that_was_stopped_ends_in_the_same_numbers(run, towers):
    run("--output_dir", "whole", "--lora_dropout", 0.2)
    expected = weights(towers / "whole")
    assert not [name for name in expected if "lora" in name] and not (towers / "whole" / adapters.ADAPTERS).exists()
    assert "LoRA of rank 2" in (towers / "whole" / "README.md").read_text()
    (towers / "broken").mkdir()
    shutil.copytree(towers / "whole" / "checkpoint-4", towers / "broken" / "checkpoint-4")
    shutil.copy(towers / "whole" / "run_arguments.json", towers / "broken")
    run("--output_dir", "broken", "--lora_dropout", 0.2)
    found = weights(towers / "broken")
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
    middle = weights(towers / "whole" / "checkpoint-4")
    assert not torch.equal(middle["text_head.layers.0.weight"], expected["text_head.layers.0.weight"])
    assert XMatchingModel.from_pretrained(towers / "whole" / "checkpoint-4").is_frozen("vision")

    os.remove(towers / "whole" / "README.md")  # what is missing after the training is made again
    run("--output_dir", "whole", "--lora_dropout", 0.2)
    assert "LoRA of rank 2" in (towers / "whole" / "README.md").read_text()


def test_the_best_checkpoint_is_what_is_saved(run, towers):
    flags = ["--load_best_model_at_end", "true", "--metric_for_best_model", "loss", "--greater_is_better", "true"]
    run("--output_dir", "best", *flags)
    state = json.loads((towers / "best" / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best, other = sorted((4, 8), key=losses.get, reverse=True)
    assert state["best_model_checkpoint"].endswith(f"checkpoint-{best}")
    saved, best, other = (weights(towers / "best" / name) for name in ("", f"checkpoint-{best}", f"checkpoint-{other}"))
    assert all(torch.equal(saved[name], value) for name, value in best.items())
    assert not all(torch.equal(saved[name], value) for name, value in other.items())


WRONG = {
    "kept states": (["--keep_states", "true"], "leave one of them out"),
    "no such layer": (["--lora_target_modules", "nothing"], "its linear ones are"),
    "nothing frozen": (
        ["--freeze_text_tower", "false", "--freeze_vision_tower", "false"],
        "both are trained as a whole",
    ),
    "no rank": (["--lora_rank", 0], "give 1 to 10000"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_one_line_and_status_2(run, name, capfd, towers):
    flags, message = WRONG[name]
    with pytest.raises(SystemExit) as stopped:
        command_line.run(lambda: run("--output_dir", "out", *flags))
    lines = capfd.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and message in lines[-1] and lines[-1].startswith("error: ")
    assert not (towers / "out").exists()


def test_without_peft_it_is_said_what_to_install(run, monkeypatch):
    monkeypatch.setattr(dual_encoder_arguments, "is_peft_available", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'imagedex\[peft\]'"):
        run("--output_dir", "out")


def test_lora_of_no_rank_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give it too"):
        XMatchingTrainingArguments(output_dir=str(tmp_path), use_cpu=True, lora_alpha=4.0)


def test_how_much_trains_is_said(tmp_path, caplog):
    """A layer of BERT has four linear ones of 32 to 32, one of 32 to 64 and one back; the ViT's one layer six of 16 to 16."""
    model = tiny()
    heads = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with caplog.at_level(logging.INFO, logger="imagedex"):
        adapters.add_adapters(model, arguments(tmp_path))
    text, vision = 2 * 2 * (4 * 64 + 2 * 96), 2 * 6 * 32
    assert f": {text + vision + heads:,} of" in caplog.text
