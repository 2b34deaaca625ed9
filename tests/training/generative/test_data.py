"""Rows and batches of the generative models: texts as T5 takes them, mixtures, and what stands where in a batch."""

from collections import Counter

import pytest
import torch
from datasets import Dataset

from imagedex.bounds import check_bounds
from imagedex.corpora.arguments import CorpusArguments
from imagedex.corpora.indexed import IndexedSplits, load_indexed_splits
from imagedex.errors import UserError
from imagedex.modeling.processing_retrieval import SentenceProcessor, clean
from imagedex.training.generative.arguments import DSITrainingArguments
from imagedex.training.generative.caption_augmentation import CaptionAugmentationArguments
from imagedex.training.generative.data import (
    DSICollator,
    Items,
    ItemsFromIdentifiers,
    Mixture,
    Sentences,
    evenly,
)
from imagedex.training.tokenizer import train_tokenizer

CAPTIONS = {"a.jpg": ["A red dog, running.", "the dog"], "b.jpg": ["two cats"]}
LABELS = {"a.jpg": [7, 1], "b.jpg": [8, 9, 1]}


@pytest.fixture(scope="module")
def tokenizer():
    texts = [caption for own in CAPTIONS.values() for caption in own]
    return train_tokenizer([*texts, "question: identifier:"], 200)


@pytest.fixture
def split():
    return Dataset.from_dict({"image_id": list(CAPTIONS), "captions": list(CAPTIONS.values())})


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("Two young guys with shaggy hair look at their hands .", "two young guys with shaggy hair look at their hands"),
        ("a man/woman", "a man/woman"),
        ("A red-haired Dog's  bone , isn't it ?", "a red-haired dog's bone , isn't it ?"),
        ('The sign says "STOP!" (twice).', "the sign says stop twice"),
        ("one:two;three~four*five#six", "one two three four five six"),
        ("ends.Begins", "ends begins"),
        ("3.5 metres & 50% [left] {right} a_b <c> $1 @d ^e |f \\g +h =i `j`",
         "3 5 metres & 50% [left] {right} a_b <c> $1 @d ^e |f \\g +h =i `j`"),
        ("  a dog \n", "a dog"),
        ("a  dog\n\nruns", "a dog runs"),
        ("...", ""),
        ("\u00c9t\u00e9 \u2013 CAF\u00c9", "\u00e9t\u00e9 \u2013 caf\u00e9"),
    ],
)  # fmt: skip
def test_captions_are_cleaned_as_blip_does(caption, cleaned):
    """By its rules: lower case; a blank for each of .!"()*#:;~; white space of any length one blank; none at the ends."""
    assert clean(caption) == cleaned


@pytest.mark.parametrize("prompt", ["", "question: "])
@pytest.mark.parametrize("cleans", [False, True])
def test_sentences_are_prompt_and_caption_as_the_tokenizer_writes_them(split, tokenizer, prompt, cleans):
    rows = Sentences(split, LABELS, SentenceProcessor(tokenizer, prompt, cleans))
    text = "a red dog, running" if cleans else "A red dog, running."
    assert rows[0]["input_ids"] == tokenizer(prompt + text)["input_ids"]
    assert rows[0]["input_ids"][-1] == tokenizer.eos_token_id
    assert [row["labels"] for row in rows] == [[7, 1], [7, 1], [8, 9, 1]]
    assert rows.image_ids == ["a.jpg", "a.jpg", "b.jpg"]


def test_long_texts_are_cut_and_counted(split, tokenizer, caplog):
    with caplog.at_level("WARNING"):
        rows = Sentences(split, LABELS, SentenceProcessor(tokenizer, max_text_length=4))
    assert [len(row["input_ids"]) for row in rows] == [4, 3, 3]
    assert all(row["input_ids"][-1] == tokenizer.eos_token_id for row in rows)
    assert "1 of 3 texts are longer than 4 tokens and were cut" in caplog.text


def test_augmented_sentences_are_drawn_each_time_from_the_pictures_own_captions(split, tokenizer):
    torch.manual_seed(0)
    rows = Sentences(split, LABELS, SentenceProcessor(tokenizer), CaptionAugmentationArguments(caption_mixing=1.0))
    drawn = {tokenizer.decode(rows[0]["input_ids"], skip_special_tokens=True) for _ in range(50)}
    assert len(drawn) > 5
    assert {word for text in drawn for word in text.split()} == {"a", "red", "dog", ",", "running", ".", "the"}
    assert rows[0]["labels"] == [7, 1]
    # nothing to draw from but its own words
    assert tokenizer.decode(rows[2]["input_ids"], skip_special_tokens=True) == "two cats"


class Numbered(torch.utils.data.Dataset):
    """Row i is {name: i}."""

    def __init__(self, name, length):
        self.name, self.length = name, length

    def __len__(self):
        return self.length

    def __getitem__(self, row):
        return {self.name: row}


@pytest.mark.parametrize(
    "ratio, each, drawn", [(None, 1, 0), (1.0, 2, 1), (0.0, 0, 0), (0.43, 1, 0), (0.5, 1, 1), (1.5, 3, 1)]
)
def test_a_mixture_has_every_sentence_once_and_items_by_ratio(ratio, each, drawn):
    mixture = Mixture(Numbered("sentence", 7), [Numbered("forward", 3), Numbered("backward", 3)], ratio)
    assert len(mixture) == 7 + 2 * (3 * each + drawn)
    counts = Counter(next(iter(mixture[row].items())) for row in range(len(mixture)))
    assert [counts["sentence", row] for row in range(7)] == [1] * 7
    for name in ("forward", "backward"):
        found = [counts[name, row] for row in range(3)]
        assert sum(found) == 3 * each + drawn and min(found) >= each


def items_of_epochs(mixture, epochs, **options):
    """[epoch] -> the items it shows, through a DataLoader."""
    loader = torch.utils.data.DataLoader(mixture, batch_size=None, **options)
    found = []
    for epoch in epochs:
        mixture.set_epoch(epoch)
        found.append([row["item"] for row in loader if "item" in row])
    return found


@pytest.mark.parametrize("ratio, epochs", [(0.5, 2), (1 / 3, 3), (1.25, 4), (1.25, 3), (0.5, 3), (0.3, 7)])
def test_over_several_epochs_all_items_are_shown_equally_often(ratio, epochs):
    mixture = Mixture(Numbered("sentence", 12), [Numbered("item", 12)], ratio)
    found = items_of_epochs(mixture, range(epochs + 1))
    assert all(len(shown) == round(ratio * 12) for shown in found)
    for window in (found[:-1], found[1:]):  # from the first epoch on, and from a later one
        counts = Counter(item for shown in window for item in shown)
        often = [counts[item] for item in range(12)]
        assert sum(often) == epochs * round(ratio * 12) and max(often) - min(often) <= 1
    if (epochs * round(ratio * 12)) % 12 == 0:
        assert max(often) == min(often)


def test_what_an_epoch_shows_is_told_by_seed_and_epoch():
    """Again, in another order of epochs, by workers that stay, and with another seed."""

    def mixture(seed=0):
        return Mixture(Numbered("sentence", 12), [Numbered("item", 12)], 0.5, seed)

    found = items_of_epochs(mixture(), range(3))
    assert items_of_epochs(mixture(), range(3)) == found != items_of_epochs(mixture(1), range(3))
    assert items_of_epochs(mixture(), [2, 0]) == [found[2], found[0]]
    for options in ({"persistent_workers": True}, {"persistent_workers": True, "multiprocessing_context": "spawn"}, {}):
        assert items_of_epochs(mixture(), range(3), num_workers=2, **options) == found


def test_without_items_a_mixture_is_the_sentences():
    assert len(Mixture(Numbered("sentence", 5), [], 1.0)) == 5


def test_evenly():
    assert evenly(3, 10) == [0, 1, 2]
    assert evenly(10, 4) == [0, 2, 5, 7]
    assert evenly(2000, -1) == list(range(2000))
    check_bounds(DSITrainingArguments, {"max_memorised_samples": -1})
    with pytest.raises(ValueError, match="--max_memorised_samples -2: give -1 or more"):
        check_bounds(DSITrainingArguments, {"max_memorised_samples": -2})


def picture(value):
    return {"pixel_values": torch.full((3, 2, 2), float(value))}


def test_a_batch_has_text_rows_then_rows_to_pictures_then_pictures(tokenizer, split):
    collator = DSICollator(tokenizer)
    sentences = Sentences(split, LABELS, SentenceProcessor(tokenizer))
    forward = Items([picture(0), picture(255)], list(LABELS), LABELS)
    backward = ItemsFromIdentifiers([picture(0), picture(255)], list(LABELS), LABELS, tokenizer)
    batch = collator([forward[1], backward[1], sentences[0], sentences[2], forward[0], backward[0]])
    texts = [sentences[0]["input_ids"], sentences[2]["input_ids"]]
    prompt = tokenizer("identifier: ", add_special_tokens=False)["input_ids"]
    texts += [prompt + LABELS["b.jpg"], prompt + LABELS["a.jpg"]]
    for row, text in enumerate(texts):
        length = len(text)
        assert batch["input_ids"][row, :length].tolist() == text
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
    assert batch["labels"].tolist() == [[7, 1, -100], [8, 9, 1], [8, 9, 1], [7, 1, -100]]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [255.0, 0.0]
    assert batch["target_pixel_values"][:, 0, 0, 0].tolist() == [255.0, 0.0]


def test_batches_of_one_kind_have_nothing_of_the_others(tokenizer, split):
    collator = DSICollator(tokenizer)
    sentences = Sentences(split, LABELS, SentenceProcessor(tokenizer))
    assert set(collator([sentences[0]])) == {"input_ids", "attention_mask", "labels"}
    states = [{"image_states": torch.ones(4, 5)}, {"image_states": torch.zeros(4, 5)}]
    batch = collator([Items(states, list(LABELS), LABELS)[row] for row in range(2)])
    assert set(batch) == {"image_states", "labels"} and batch["image_states"].shape == (2, 4, 5)
    assert set(collator(states)) == {"image_states"}
    assert collator([ItemsFromIdentifiers(states, list(LABELS), LABELS, tokenizer)[0]]).keys() == {
        "input_ids", "attention_mask", "target_image_states",
    }  # fmt: skip


def test_a_document_read_backwards_writes_its_text(tokenizer):
    inputs = [dict(tokenizer("document: two cats"))]
    row = ItemsFromIdentifiers(inputs, ["a.jpg"], LABELS, tokenizer)[0]
    assert row["labels"] == inputs[0]["input_ids"]
    assert row["input_ids"][-2:] == [7, 1]


def test_pictures_that_are_evaluated_alone_are_indexed_with_the_trained_ones(flickr_folder, tmp_path):
    rows = (flickr_folder / "captions.txt").read_text().splitlines()
    for name, part in (("train", rows[1:25]), ("valid", rows[25:])):
        (tmp_path / f"{name}.csv").write_text("\n".join(["image,caption", *part]))
    data = CorpusArguments(
        train_file=str(tmp_path / "train.csv"),
        validation_file=str(tmp_path / "valid.csv"),
        image_dir=str(flickr_folder / "images"),
    )
    splits = load_indexed_splits(data)
    assert (len(splits.train), len(splits.gallery), len(splits.evaluation)) == (6, 12, 6)
    assert set(splits.item_ids) == set(splits.train["image_id"]) | set(splits.evaluation["image_id"])
    texts = dict(zip(splits.item_ids, splits.item_texts(), strict=True))
    assert all(bool(texts[image_id]) for image_id in splits.train["image_id"])
    assert not any(texts[image_id] for image_id in splits.evaluation["image_id"]), (
        "held-out captions are not for vectors"
    )


def test_each_trained_caption_is_known_with_the_others_of_its_picture():
    gallery = Dataset.from_dict({"image_id": ["a", "b", "c", "d"]})
    train = Dataset.from_dict({"image_id": ["c", "a"], "captions": [["one", "two", "three"], ["alone"]]})
    splits = IndexedSplits(train, gallery, None)
    assert splits.known_pairs() == [("one", "two three"), ("two", "one three"), ("three", "one two")]
    gallery, train = gallery.add_column("text", ["A", "B", "C", "D"]), train.add_column("text", ["C", "A"])
    assert IndexedSplits(train, gallery, None, documents=True).known_pairs() == [
        ("one", "C"), ("two", "C"), ("three", "C"), ("alone", "A"),
    ]  # fmt: skip


def test_pseudo_queries_are_for_documents(flickr_folder):
    with pytest.raises(UserError, match="--pseudo_queries_file is for documents"):
        load_indexed_splits(CorpusArguments(dataset_name=str(flickr_folder)), pseudo_queries_file="x")
