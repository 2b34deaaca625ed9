"""Building generative models: from pretrained parts, from a config, and the words that identifiers add."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import T5Config, T5ForConditionalGeneration, ViTConfig, ViTImageProcessorPil, ViTModel

from imagedex.configuration.configuration_codebook_t5 import CodebookT5Config
from imagedex.corpora.arguments import CorpusArguments
from imagedex.corpora.indexed import IndexedSplits
from imagedex.errors import UserError
from imagedex.modeling.identifiers import Identifiers
from imagedex.modeling.modeling_codebook_t5 import CodebookT5
from imagedex.training.arguments import ModelArguments
from imagedex.training.generative.arguments import DSITrainingArguments, IdentifierArguments, T5Arguments, TextArguments
from imagedex.training.generative.checks import check_model
from imagedex.training.generative.identify import brought_identifiers, check_rows, check_wanted
from imagedex.training.generative.model import build_model, build_parts
from imagedex.training.processors import build_processor
from imagedex.training.tokenizer import train_tokenizer

CAPTIONS = [["a red dog"], ["two cats"], ["the sea"]]
NAMES = ["a.jpg", "b.jpg", "c.jpg"]
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 8,
       "image_size": 16}  # fmt: skip
SCRATCH = {"t5_config": T5 | {"model_type": "t5"}}
VISION = {"vision_config": VIT | {"model_type": "vit"}}


@pytest.fixture
def pretrained(tmp_path):
    """Folders of a T5 with its tokenizer, whose embeddings have spare rows as T5's do, and of a ViT."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([caption for own in CAPTIONS for caption in own], 100)
    tokenizer.save_pretrained(tmp_path / "t5")
    config = T5Config(**T5, vocab_size=len(tokenizer) + 2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    ViTModel(ViTConfig(**VIT)).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    return str(tmp_path / "t5"), str(tmp_path / "vit"), tokenizer


def parts_of(kind, model_args, t5_args, tmp_path):
    """As run_dsi.py builds them, over three captioned items."""
    split = Dataset.from_dict({"image_id": NAMES, "captions": CAPTIONS})
    args = DSITrainingArguments(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True)
    splits, texts = IndexedSplits(split, split, None), TextArguments()
    return build_parts(kind, splits, None, args, CorpusArguments(), model_args, t5_args, texts, IdentifierArguments())


def processor_of(model_args, t5_args, image_size=None, texts=()):
    return build_processor(
        model_args, ("model_name_or_path", None), t5_args.text_model_name_or_path, image_size, texts, {}
    )


def test_pretrained_parts_keep_their_weights_and_grow_by_the_identifiers(pretrained, tmp_path):
    t5_folder, vit_folder, tokenizer = pretrained
    model_args = ModelArguments(vision_model_name_or_path=vit_folder)
    t5_args = T5Arguments(model_type="codebook_t5", text_model_name_or_path=t5_folder, num_visual_tokens=3)
    assert check_model(model_args, t5_args) == "codebook_t5"
    parts = parts_of("codebook_t5", model_args, t5_args, tmp_path)
    processor, model, identifiers = parts.processor, parts.model, parts.identifiers

    words = len(tokenizer)
    assert isinstance(model, CodebookT5) and model.config.num_visual_tokens == 3
    assert [identifiers.sequence(name) for name in NAMES] == [[words], [words + 1], [words + 2]]
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == words + 3
    assert len(processor.tokenizer) == words + 3
    assert model.config.num_codebook_words <= words, "no picture is ever read as an identifier"
    t5 = T5ForConditionalGeneration.from_pretrained(t5_folder).state_dict()
    vit = ViTModel.from_pretrained(vit_folder, add_pooling_layer=False).state_dict()
    found = model.state_dict()
    torch.testing.assert_close(found["shared.weight"][:words], t5["shared.weight"][:words])
    name = "decoder.block.0.layer.0.SelfAttention.q.weight"
    torch.testing.assert_close(found[name], t5[name])
    for name, value in vit.items():
        torch.testing.assert_close(found[f"vision_model.{name}"], value, msg=name)


def test_a_config_gives_the_sizes_and_the_tokenizer_the_words(tmp_path):
    config = CodebookT5Config(**T5, vocab_size=999, vision_config=VIT | {"model_type": "vit"}, num_visual_tokens=4)
    config.save_pretrained(tmp_path / "config")
    model_args, t5_args = ModelArguments(config_name=str(tmp_path / "config")), T5Arguments()
    assert check_model(model_args, t5_args, 16) == "codebook_t5"
    processor = processor_of(model_args, t5_args, 16, ["a red dog"])
    model = build_model(model_args, t5_args, "codebook_t5", processor)
    assert model.config.vocab_size == model.config.num_codebook_words == len(processor.tokenizer) < 999
    assert model.config.num_visual_tokens == 4


def test_rows_beside_words_are_for_a_pretrained_t5():
    check_rows(IdentifierArguments(), knows_words=False)
    check_rows(IdentifierArguments(identifier_rows="random"), knows_words=True)
    with pytest.raises(UserError, match="--identifier_rows random is for a pretrained T5"):
        check_rows(IdentifierArguments(identifier_rows="random"), knows_words=False)
    brought = Identifiers.from_sequences("atomic", NAMES, [[5], [6], [7]], 1)
    with pytest.raises(UserError, match="brings its identifiers; leave --identifier_rows out"):
        check_wanted(brought, IdentifierArguments(identifier_rows="random"))


def test_broken_identifiers_are_said(tmp_path):
    Identifiers.from_sequences("atomic", NAMES, [[5], [6], [7]], 1).save_pretrained(tmp_path)
    assert brought_identifiers(str(tmp_path)).image_ids == NAMES
    facts = json.loads((tmp_path / "identifiers.json").read_text())
    (tmp_path / "identifiers.json").write_text(json.dumps(facts | {"tensors_sha256": "0"}))
    with pytest.raises(UserError, match="--model_name_or_path .*are not of one another"):
        brought_identifiers(str(tmp_path))
    assert brought_identifiers(None) is None


def test_a_first_step_without_identifiers_is_none(tmp_path, pretrained):
    """A captioning run of run_image_indexing.py leaves a vision_grounded_t5, but has indexed nothing."""
    model_args = ModelArguments(vision_model_name_or_path=pretrained[1])
    t5_args = T5Arguments(model_type="vision_grounded_t5", text_model_name_or_path=pretrained[0])
    with pytest.raises(UserError, match="this is the second step"):
        check_model(model_args, t5_args)
    assert check_model(model_args, t5_args, indexing=True) == "vision_grounded_t5"
    processor = processor_of(model_args, t5_args)
    build_model(model_args, t5_args, "vision_grounded_t5", processor).save_pretrained(tmp_path / "captioned")
    with pytest.raises(UserError, match="captioned brings no identifiers"):
        check_model(ModelArguments(model_name_or_path=str(tmp_path / "captioned")), T5Arguments())


WRONG = {
    "both T5s": (dict(SCRATCH, model_type="t5", text_model_name_or_path="{t5}"), {}, "both given for the T5"),
    "no tower": (dict(SCRATCH, model_type="codebook_t5"), {}, "no vision tower: give --vision_model_name_or_path"),
    "a ViT for a T5": ({"model_type": "t5", "text_model_name_or_path": "{vit}"}, {}, "is a vit model; a t5 is needed"),
    "a tower for a t5": (dict(SCRATCH, model_type="t5"), VISION, "a t5 reads no pictures"),
    "parts beside a model": (SCRATCH, {"model_name_or_path": "{t5}"}, "brings its T5, so --t5_config cannot be given"),
    "nothing": ({}, {}, "no model: give --model_type"),
}


@pytest.mark.parametrize("name", WRONG)
def test_parts_come_from_one_place_each(pretrained, name):
    def filled(values):
        folders = {"t5": pretrained[0], "vit": pretrained[1]}
        return {k: v.format(**folders) if isinstance(v, str) else v for k, v in values.items()}

    t5, model, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        check_model(ModelArguments(**filled(model)), T5Arguments(**filled(t5)))


def test_towers_of_other_widths_say_how_they_meet():
    for kind, message in (
        ("codebook_t5", "--codebook_projection_dim"),
        ("vision_grounded_t5", "--vision_projection true"),
    ):
        model_args = ModelArguments(vision_config=VIT | {"model_type": "vit", "hidden_size": 32})
        fields = {"vision_projection": False} if kind == "vision_grounded_t5" else {}
        t5_args = T5Arguments(model_type=kind, **SCRATCH, **fields)
        processor = processor_of(model_args, t5_args, 16, ["a red dog"])
        with pytest.raises(UserError, match=message):
            build_model(model_args, t5_args, kind, processor)
