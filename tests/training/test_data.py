"""Batches against the processor's own output and hand counts."""

import logging

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil

from imagedex.corpora import load_corpus
from imagedex.training.data import CaptionPairs, Collator, Pictures, gallery_rows, tokenize_captions
from imagedex.training.tokenizer import train_tokenizer
from modeling.processing_xmatching import XMatchingProcessor

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
    processor = XMatchingProcessor(image_processor=image_processor, tokenizer=tokenizer)
    pairs = CaptionPairs(tokenize_captions(corpus, tokenizer, 75), Pictures(corpus, image_processor, keep=keep))
    rows = [0, 5, 47, 20]
    batch = Collator(tokenizer, image_processor)([pairs[row] for row in rows])
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
    limit = sorted(lengths)[-5]
    too_long = sum(length > limit for length in lengths)
    with caplog.at_level(logging.WARNING, logger="imagedex"):
        rows = tokenize_captions(corpus, tokenizer, limit)
    assert f"{too_long} of 48 captions are longer than {limit} tokens" in caplog.text
    assert [len(ids) for ids in rows["input_ids"]] == [min(length, limit) for length in lengths]
    caplog.clear()
    tokenize_captions(corpus, tokenizer, max(lengths))
    assert not caplog.text


def test_one_side_alone_is_a_batch(corpus, tokenizer):
    image_processor = PROCESSORS["squashed"]()
    collate, pictures = Collator(tokenizer, image_processor), Pictures(corpus, image_processor)
    assert set(collate([pictures[0], pictures[1]])) == {"pixel_values"}
    tokens = tokenize_captions(corpus, tokenizer, 75).select_columns(["input_ids", "attention_mask"])
    assert set(collate([tokens[0], tokens[9]])) == {"input_ids", "attention_mask"}


def test_gallery_rows(corpus):
    names = corpus["image_id"]
    asked = [names[7], names[0], names[7]]
    assert np.array_equal(gallery_rows(corpus, asked), [7, 0, 7])
