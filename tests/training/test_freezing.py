"""A tower from scratch is trained unless it is said otherwise, and what is frozen at random weights is said aloud."""

import logging

import pytest
import torch
from transformers import AutoConfig, BertConfig, BertModel, ViTImageProcessorPil

from imagedex.configuration.configuration_xmatching import XMatchingConfig
from imagedex.modeling.processing_retrieval import RetrievalProcessor
from imagedex.training.arguments import ModelArguments
from imagedex.training.dual_encoder.arguments import XMatchingArguments
from imagedex.training.generative import model as generative
from imagedex.training.generative.arguments import T5Arguments
from imagedex.training.tokenizer import train_tokenizer
from imagedex.training.towers import build_model

BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
VIT = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
       "patch_size": 8}  # fmt: skip
T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}


@pytest.fixture
def processor():
    size = {"height": 16, "width": 16}
    return RetrievalProcessor(ViTImageProcessorPil(size=size), train_tokenizer(["a red half"], 40))


def trains(tower) -> bool:
    flags = {parameter.requires_grad for parameter in tower.parameters()}
    assert len(flags) == 1
    return flags.pop()


def lines(caplog) -> list[tuple[str, str]]:
    """(level, message) of what was said of towers."""
    return [
        (record.levelname, record.getMessage()) for record in caplog.records if "from scratch" in record.getMessage()
    ]


# what is said of freezing -> (whether the tower trains, how it is said)
DUAL = {
    None: (True, "INFO", "so it is trained"),
    False: (True, None, ""),
    True: (False, "WARNING", "stays at random weights"),
}


@pytest.mark.parametrize("freeze", DUAL)
def test_towers_of_the_dual_encoder(processor, caplog, freeze):
    trained, level, message = DUAL[freeze]
    with caplog.at_level(logging.INFO, logger="imagedex"):
        model = build_model(
            ModelArguments(vision_config=dict(VIT)),
            XMatchingArguments(text_config=dict(BERT), freeze_text_tower=freeze, freeze_vision_tower=freeze),
            processor,
        )
    assert trains(model.text_model) == trains(model.vision_model) == trained
    assert (model.config.freeze_text_tower, model.config.freeze_vision_tower) == (not trained, not trained)
    said = lines(caplog)
    assert [found for found, _ in said] == ([level] * 2 if level else [])
    assert all(message in text for _, text in said)


def test_a_pretrained_tower_stays_frozen_and_nothing_is_said_of_it(processor, tmp_path, caplog):
    torch.manual_seed(0)
    fields = {name: value for name, value in BERT.items() if name != "model_type"}
    BertModel(BertConfig(**fields, vocab_size=len(processor.tokenizer))).save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="imagedex"):
        model = build_model(
            ModelArguments(vision_config=dict(VIT)),
            XMatchingArguments(text_model_name_or_path=str(tmp_path)),
            processor,
        )
    assert not trains(model.text_model) and trains(model.vision_model)
    assert [("vision" in text, "text tower" in text) for _, text in lines(caplog)] == [(True, False)]


def test_a_config_that_freezes_random_towers_is_obeyed_aloud(processor, tmp_path, caplog):
    config = {name: AutoConfig.for_model(**value).to_dict() for name, value in
              {"text_config": BERT, "vision_config": VIT | {"image_size": 16}}.items()}  # fmt: skip
    XMatchingConfig(**config, freeze_text_tower=False).save_pretrained(tmp_path)
    model = build_model(ModelArguments(config_name=str(tmp_path)), XMatchingArguments(), processor)
    assert trains(model.text_model) and not trains(model.vision_model)
    ((level, text),) = lines(caplog)
    assert level == "WARNING" and "the vision tower" in text and "as the config says" in text


# (kind, quantization, what is said of freezing) -> (whether the tower trains, level, what is said)
GENERATIVE = {
    ("vision_grounded_t5", None, None): (True, "INFO", "so it is trained"),
    ("vision_grounded_t5", None, True): (False, "WARNING", "stays at random weights"),
    ("vision_grounded_t5", None, False): (True, None, ""),
    ("codebook_t5", "learned", None): (True, "INFO", "so it is trained"),
    ("codebook_t5", "learned", True): (False, "WARNING", "stays at random weights"),
    ("codebook_t5", "fixed", None): (False, "WARNING", "random words"),
    ("codebook_t5", "fixed", True): (False, "WARNING", "random words"),
    ("codebook_t5", None, None): (False, "WARNING", "random words"),
}


@pytest.mark.parametrize("case", GENERATIVE, ids=str)
def test_the_vision_tower_of_a_generative_model(processor, caplog, case):
    kind, quantization, freeze = case
    trained, level, message = GENERATIVE[case]
    t5 = T5Arguments(model_type=kind, t5_config=dict(T5), quantization=quantization, freeze_vision_tower=freeze)
    with caplog.at_level(logging.INFO, logger="imagedex"):
        model = generative.build_model(ModelArguments(vision_config=dict(VIT)), t5, kind, processor)
    assert trains(model.vision_model) == trained
    said = lines(caplog)
    assert [found for found, _ in said] == ([level] if level else [])
    assert all(message in text for _, text in said)
