"""What loads, and what is said about what does not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, CLIPModel, SiglipModel

from imagedex.checkpoints import choose_device, read_model_type
from imagedex.encoding.dual_encoder import load_dual_encoder
from imagedex.errors import UserError


def test_clip_and_siglip_load(tiny_clip, tiny_siglip):
    for folder, model_class in ((tiny_clip, CLIPModel), (tiny_siglip, SiglipModel)):
        encoder = load_dual_encoder(str(folder))
        assert isinstance(encoder.model, model_class) and not encoder.model.training
        assert encoder.tokenizer("a dog").input_ids
        assert encoder.image_processor.size


def test_weights_in_half_precision_become_float32_on_a_cpu(tiny_clip, tmp_path):
    encoder = load_dual_encoder(str(tiny_clip))
    shutil.copytree(tiny_clip, tmp_path, dirs_exist_ok=True)
    encoder.model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load_dual_encoder(str(tmp_path)).model.parameters()} == {torch.float32}


def test_tokenizer_and_image_processor_saved_apart(tiny_clip, tmp_path):
    shutil.copytree(tiny_clip, tmp_path, dirs_exist_ok=True)
    processor = json.loads((tmp_path / "processor_config.json").read_text())
    (tmp_path / "processor_config.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor["image_processor"]))
    encoder = load_dual_encoder(str(tmp_path))
    assert encoder.tokenizer("a dog").input_ids == load_dual_encoder(str(tiny_clip)).tokenizer("a dog").input_ids
    assert encoder.image_processor.crop_size == {"height": 32, "width": 32}


def refusal(name):
    with pytest.raises(UserError) as raised:
        load_dual_encoder(str(name))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_what_is_no_saved_dual_encoder_is_refused(tiny_clip, tiny_siglip, tmp_path):
    assert "is not a folder" in refusal(tmp_path / "nowhere" / "at" / "all")
    assert "has no config.json" in refusal(tmp_path)
    (tmp_path / "file").write_text("x")
    assert "is not a folder" in refusal(tmp_path / "file")

    (tmp_path / "config.json").write_text("{}")
    assert "names no model_type" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json is broken" in refusal(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    assert "unheard_of" in refusal(tmp_path)

    bert = tmp_path / "bert"
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    BertModel(BertConfig(**sizes)).save_pretrained(bert)
    message = refusal(bert)
    assert "bert model (BertModel) without get_text_features and get_image_features" in message

    weightless = tmp_path / "weightless"
    shutil.copytree(tiny_clip, weightless)
    (weightless / "model.safetensors").unlink()
    assert "cannot load" in refusal(weightless)

    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_clip, damaged)
    (damaged / "model.safetensors").write_bytes(b"x" * 100)
    assert "its model.safetensors is broken" in refusal(damaged)

    other = tmp_path / "other"
    shutil.copytree(tiny_clip, other)
    shutil.copy(tiny_siglip / "model.safetensors", other)
    assert "other shapes than its config.json says" in refusal(other)
    weights = load_file(tiny_clip / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 weights of its clip model, the first is visual_projection.weight" in refusal(other)

    mute = tmp_path / "mute"
    shutil.copytree(tiny_clip, mute)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (mute / name).unlink()
    assert "brings no tokenizer" in refusal(mute)

    blind = tmp_path / "blind"
    shutil.copytree(tiny_clip, blind)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (blind / name).unlink()
    assert str(blind) in refusal(blind)


def test_model_type_is_read_without_loading(tiny_siglip, tmp_path):
    shutil.copy(tiny_siglip / "config.json", tmp_path)
    assert read_model_type(str(tmp_path)) == "siglip"


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device(None).type in ("cpu", "cuda", "mps")
    for name in ("toaster", "cuda:99"):
        with pytest.raises(UserError, match=f"--device {name}"):
            choose_device(name)
