"""The processor of a run: from the towers, from a trained model, and what of its style holds."""

import pytest
from transformers import ViTImageProcessorPil

from imagedex.errors import UserError
from imagedex.modeling.processing_retrieval import RetrievalProcessor, SentenceProcessor
from imagedex.training.arguments import ModelArguments
from imagedex.training.processors import build_processor
from imagedex.training.tokenizer import train_tokenizer

NONE = {"prompt": None, "clean_text": None, "max_text_length": None}
FLAG = "model_name_or_path"


def style_of(processor):
    return processor.prompt, processor.clean_text, processor.max_text_length


@pytest.fixture
def trained(tmp_path):
    """The folder of a model that reads in a style of its own."""
    tokenizer = train_tokenizer(["a red dog", "two cats"], 60)
    image_processor = ViTImageProcessorPil(size={"height": 16, "width": 24})
    RetrievalProcessor(image_processor, tokenizer, "q ", True, 9).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_models_own_style_holds_unless_another_is_given(trained):
    new = build_processor(ModelArguments(), (FLAG, None), None, 16, ["a red dog"], NONE, new_prompt="question: ")
    assert style_of(new) == ("question: ", False, 75)
    assert new.image_processor.size == {"height": 16, "width": 16}
    kept = build_processor(ModelArguments(), (FLAG, trained), None, None, [], NONE, new_prompt="question: ")
    assert style_of(kept) == ("q ", True, 9)
    assert kept.image_processor.size == {"height": 16, "width": 24}
    given = {"prompt": "", "clean_text": False, "max_text_length": 30}
    assert style_of(build_processor(ModelArguments(), (FLAG, trained), None, None, [], given)) == ("", False, 30)


def test_a_processor_whose_library_is_missing_is_one_line(trained, monkeypatch):
    def needs_timm(*args, **kwargs):
        raise ImportError("TimmWrapperImageProcessor requires the timm library\nbut it was not found")

    monkeypatch.setattr(RetrievalProcessor, "from_pretrained", needs_timm)
    with pytest.raises(UserError, match="cannot load --model_name_or_path .*: .* requires the timm library but it"):
        build_processor(ModelArguments(), (FLAG, trained), None, None, [], NONE)


def test_a_t5_of_somebody_else_brings_a_tokenizer_and_no_style(tmp_path):
    train_tokenizer(["a red dog", "two cats"], 60).save_pretrained(tmp_path / "t5")
    whole = FLAG, str(tmp_path / "t5")
    found = build_processor(ModelArguments(), whole, None, None, [], NONE, with_pictures=False, new_prompt="question: ")
    assert type(found) is SentenceProcessor and style_of(found) == ("question: ", False, 75)


def test_a_named_tokenizer_goes_before_the_models(trained, tmp_path):
    train_tokenizer(["green birds fly"], 50).save_pretrained(tmp_path / "words")
    arguments = ModelArguments(tokenizer_name=str(tmp_path / "words"))
    found = build_processor(arguments, (FLAG, trained), None, None, [], NONE)
    assert found.tokenizer.tokenize("green") and "▁dog" not in found.tokenizer.get_vocab()
    with pytest.raises(UserError, match="--tokenizer_name ./none"):
        build_processor(ModelArguments(tokenizer_name="./none"), (FLAG, None), None, None, [], NONE)
