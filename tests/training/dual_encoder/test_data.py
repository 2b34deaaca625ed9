"""Batches against the processor's own output and hand counts."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil

from imagedex.configuration.configuration_xmatching import XMatchingConfig
from imagedex.corpora import load_corpus
from imagedex.corpora.splits import gallery_rows
from imagedex.modeling.modeling_xmatching import XMatchingModel
from imagedex.modeling.processing_retrieval import RetrievalProcessor, SentenceProcessor
from imagedex.training.dual_encoder.data import (
    CaptionPairs,
    Collator,
    keep_frozen_states,
    token_rows,
    tokenize_captions,
)
from imagedex.training.pictures import Pictures
from imagedex.training.tokenizer import train_tokenizer

PROCESSORS = {
    "squashed": lambda: ViTImageProcessorPil(size={"height": 16, "width": 16}),
    "cropped": lambda: CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}),
}


@pytest.fixture
def corpus(flickr_folder):
    return load_corpus(str(flickr_folder)).splits["train"]


@pytest.fixture
def tokenizer(corpus):
    return train_tokenizer([caption for captions in corpus["captions"] for caption in captions], 200)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("make", PROCESSORS.values(), ids=PROCESSORS)
def test_a_batch_is_what_the_processor_gives(corpus, tokenizer, make, keep):
    image_processor = make()
    processor = RetrievalProcessor(image_processor=image_processor, tokenizer=tokenizer)
    tokens = tokenize_captions(corpus, processor)
    pairs = CaptionPairs(token_rows(tokens), Pictures(corpus, image_processor, keep=keep), tokens["image_row"])
    rows = [0, 5, 47, 20]
    batch = Collator(tokenizer)([pairs[row] for row in rows])
    # four captions a picture, in the corpus's order
    captions = [corpus[row // 4]["captions"][row % 4] for row in rows]
    images = [corpus[row // 4]["image"].convert("RGB") for row in rows]
    expected = processor(text=captions, images=images, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], atol=1e-5, rtol=1e-5)
    assert batch["image_ids"].tolist() == [0, 1, 11, 5]


def test_captions_that_are_cut_are_counted_aloud(corpus, tokenizer, caplog):
    lengths = [len(tokenizer(caption)["input_ids"]) for captions in corpus["captions"] for caption in captions]
    limit = max(lengths) - 1
    too_long = sum(length > limit for length in lengths)
    with caplog.at_level(logging.WARNING, logger="imagedex"):
        rows = tokenize_captions(corpus, SentenceProcessor(tokenizer, max_text_length=limit))
    assert f"{too_long} of 48 texts are longer than {limit} tokens" in caplog.text
    assert [len(ids) for ids in rows["input_ids"]] == [min(length, limit) for length in lengths]
    caplog.clear()
    tokenize_captions(corpus, SentenceProcessor(tokenizer, max_text_length=max(lengths)))
    assert not caplog.text


def test_one_side_alone_is_a_batch(corpus, tokenizer):
    image_processor = PROCESSORS["squashed"]()
    collate, pictures = Collator(tokenizer), Pictures(corpus, image_processor)
    assert set(collate([pictures[0], pictures[1]])) == {"pixel_values"}
    tokens = token_rows(tokenize_captions(corpus, SentenceProcessor(tokenizer)))
    assert set(collate([tokens[0], tokens[9]])) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(("freeze_text", "freeze_vision"), [(True, True), (True, False), (False, True)])
def test_kept_states_change_no_embedding(
    corpus, tokenizer, text_config, vision_config, freeze_text, freeze_vision, tmp_path
):
    image_processor = PROCESSORS["squashed"]()
    model = XMatchingModel(
        XMatchingConfig(
            text_config=text_config | {"vocab_size": len(tokenizer)},
            vision_config=vision_config,
            text_pooling="mean",
            text_pooling_layers=2,
            text_head="mlp",
            vision_head="mlp",
            freeze_text_tower=freeze_text,
            freeze_vision_tower=freeze_vision,
        )
    )
    collate, tokens = Collator(tokenizer), tokenize_captions(corpus, SentenceProcessor(tokenizer))
    rows = token_rows(tokens), Pictures(corpus, image_processor)
    args = SimpleNamespace(
        device="cpu", per_device_eval_batch_size=5, dataloader_num_workers=0, keep_dir=str(tmp_path), kept_views=0
    )
    kept = keep_frozen_states(model, *rows, collate, args)
    fresh, stored = (CaptionPairs(*pair, tokens["image_row"]) for pair in (rows, kept))
    picked = [3, 17, 40, 8]
    with torch.no_grad():
        expected = model.eval()(**collate([fresh[i] for i in picked]))
        batch = collate([stored[i] for i in picked])
        found = model(**batch)
    assert ("text_states" in batch) == freeze_text and ("input_ids" in batch) != freeze_text
    assert ("image_states" in batch) == freeze_vision and ("pixel_values" in batch) != freeze_vision
    torch.testing.assert_close(found.text_embeds, expected.text_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.image_embeds, expected.image_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss)


def test_gallery_rows(corpus):
    names = corpus["image_id"]
    asked = [names[7], names[0], names[7]]
    assert np.array_equal(gallery_rows(corpus, asked), [7, 0, 7])
