"""Both halves of one CLIP or SigLIP: the model starts as transformers' own, reads as it reads, and trains from there."""

import logging

import pytest
import torch
import transformers
from PIL import Image
from tiny_models import TOWER, tiny_tokenizer
from transformers import AutoModel, CLIPImageProcessorPil, Siglip2ImageProcessorPil, SiglipImageProcessorPil

from imagedex.modeling.modeling_xmatching import XMatchingModel
from imagedex.training.arguments import ModelArguments
from imagedex.training.dual_encoder.arguments import XMatchingArguments
from imagedex.training.dual_encoder.data import Collator
from imagedex.training.processors import build_processor
from imagedex.training.towers import build_model

SENTENCES = ["a dog runs in the grass", "red beside green", "the left side is blue , the right side is yellow"]
SIZE = {"height": 32, "width": 32}
VISION = TOWER | {"image_size": 32, "patch_size": 8}
ROBERTA = {"max_position_embeddings": 30, "pad_token_id": 1}


def squashed():
    return SiglipImageProcessorPil(size=SIZE)


def cropped():
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIZE)


# name of the classes -> (fields of the text config, of the vision config, of both, image processor)
KINDS = {
    "CLIP": ({}, VISION, {"projection_dim": 24}, cropped),
    "MetaClip2": ({}, VISION, {"projection_dim": 24}, cropped),
    "ChineseCLIP": ({}, VISION, {"projection_dim": 24}, cropped),
    "AltCLIP": (ROBERTA | {"project_dim": 20}, VISION, {"projection_dim": 24}, cropped),
    "Siglip": ({"projection_size": 32}, VISION, {}, squashed),
    "Siglip2": (
        {"projection_size": 32},
        TOWER | {"patch_size": 8, "num_patches": 16},
        {},
        lambda: Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16),
    ),
}


@pytest.fixture(params=KINDS)
def checkpoint(request, tmp_path):
    """(folder, transformers' model): random weights, tokenizer and image processor as they are on the Hub."""
    text, vision, whole, image_processor = KINDS[request.param]
    tokenizer = tiny_tokenizer(max_length=24)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = TOWER | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 24} | text
    config = getattr(transformers, f"{request.param}Config")(text_config=text, vision_config=vision, **whole)
    torch.manual_seed(0)
    model = getattr(transformers, f"{request.param}Model")(config).eval()
    with torch.no_grad():  # random towers map everything to nearly one vector; spread them
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
            elif name == "logit_scale":
                parameter.fill_(4.6 if request.param.endswith(("CLIP", "Clip2")) else 4.77)
            elif name == "logit_bias":
                parameter.fill_(-16.5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    image_processor().save_pretrained(tmp_path)
    return str(tmp_path), model


def build(folder, **fields):
    """(model, processor) as run_xmatching.py makes them."""
    arguments = ModelArguments(vision_model_name_or_path=folder)
    xmatching = XMatchingArguments(text_model_name_or_path=folder, **fields)
    whole, style = ("model_name_or_path", None), {"max_text_length": None}
    processor = build_processor(arguments, whole, folder, None, [], style)
    return build_model(arguments, xmatching, processor).eval(), processor


def pictures():
    colours = ("red", "green", "blue", "yellow")
    pairs = [Image.new("RGB", (48, 32), colour) for colour in colours]
    for picture, other in zip(pairs, colours[1:], strict=False):
        picture.paste(Image.new("RGB", (24, 32), other), (24, 0))
    return pairs


def test_before_the_first_step_the_logits_are_the_checkpoints(checkpoint, tmp_path, caplog):
    folder, original = checkpoint
    with caplog.at_level(logging.INFO, logger="imagedex"):
        model, processor = build(folder)
    assert [r.getMessage().split(": ")[1] for r in caplog.records if "halves" in r.getMessage()] == [
        "the model starts as that is"
    ]
    inputs = processor(text=SENTENCES, images=pictures(), return_tensors="pt")
    assert ("attention_mask" in inputs) != (original.config.model_type in ("siglip", "siglip2"))
    with torch.no_grad():
        expected = original(**inputs).logits_per_text
        found = model(**inputs).logits_per_text
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6)

    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again = XMatchingModel.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits_per_text, expected, atol=1e-5, rtol=1e-6)


def test_training_reads_sentences_as_the_processor_does(checkpoint):
    _, processor = build(checkpoint[0])
    tokens, cut = processor.tokens(SENTENCES)
    rows = [{name: values[row] for name, values in tokens.items()} for row in range(len(SENTENCES))]
    batch = Collator(processor.tokenizer, processor.padded)(rows)
    expected = processor(text=SENTENCES, return_tensors="pt")
    assert set(batch) == set(expected) and not any(cut)
    for name, value in expected.items():
        assert torch.equal(batch[name], value), name
    for padding in (True, "longest"):
        width = processor(text=SENTENCES, padding=padding, return_tensors="pt")["input_ids"].shape[1]
        longest = max(map(len, tokens["input_ids"]))
        assert width == (24 if padding is True and processor.padding == "max_length" else longest)


def test_what_the_user_says_goes_before_the_checkpoint(checkpoint, caplog):
    folder, original = checkpoint
    given = {
        "text_pooling": "mean",
        "projection_dim": 10,
        "loss_type": "hinge",
        "text_head": "mlp",
        "head_dropout": 0.3,
    }
    with caplog.at_level(logging.INFO, logger="imagedex"):
        model, _ = build(folder, **given)
    assert {name: getattr(model.config, name) for name in given} == given
    assert (
        "but for text_pooling mean, text_head mlp, head_dropout 0.3, projection_dim 10, loss_type hinge" in caplog.text
    )
    for name, value in original.vision_model.state_dict().items():
        assert torch.equal(model.vision_model.state_dict()[name], value)


def test_a_scale_of_ones_own_stays(checkpoint):
    model, _ = build(checkpoint[0], logit_scale_init=7.0)
    assert model.scale().item() == pytest.approx(7.0)


@pytest.mark.parametrize("kind", ["tiny_clip", "tiny_siglip"])
def test_one_half_alone_starts_as_any_tower_does(request, kind):
    folder = str(request.getfixturevalue(kind))
    model = XMatchingModel.from_text_vision_pretrained(
        folder, vision_config=transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    )
    assert (model.config.text_pooling, model.config.projection_dim, model.config.loss_type) == ("mean", 512, "info_nce")
    whole = AutoModel.from_pretrained(folder)
    for name, value in whole.text_model.state_dict().items():
        assert torch.equal(model.text_model.state_dict()[name], value)
