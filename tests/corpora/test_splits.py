"""Membership against digests computed by hand, its stability, and the three roles."""

import hashlib
import random

import pytest
from datasets import DatasetDict

from imagedex.corpora import Corpus, flatten_captions, split_corpus
from imagedex.corpora.schema import COLUMNS, Picture, build_dataset
from imagedex.corpora.splits import hash_fraction, held_out_positions
from imagedex.errors import UserError


def pictures(numbers, n_captions=4):
    return build_dataset(
        [Picture(f"{n}.jpg", f"/x/{n}.jpg", [f"caption {n} {c}" for c in range(n_captions)], str(n)) for n in numbers],
        "train",
    )


def corpus(numbers=range(40), **splits):
    return Corpus("test", DatasetDict({"train": pictures(numbers), **splits}))


def oracle(*parts):
    """The hash as documented, by other means: the first 53 of 64 bits of blake2b, as a fraction."""
    text = "/".join(map(str, parts)).encode()
    bits = bin(int(hashlib.blake2b(text, digest_size=8).hexdigest(), 16))[2:].zfill(64)[:53]
    return sum(int(bit) / 2 ** (place + 1) for place, bit in enumerate(bits))


def ids(dataset):
    return dataset["image_id"][:]


def test_hash_is_what_it_was():
    assert hash_fraction(0, "a.jpg") == oracle(0, "a.jpg") and 0 <= hash_fraction(0, "a.jpg") < 1
    # Fixed for ever: another value would move pictures between training and evaluation.
    assert hash_fraction(0, "1000268201_693b08cb0e.jpg") == float.fromhex("0x1.17850fcbdbca4p-3")
    assert held_out_positions("1000268201_693b08cb0e.jpg", 4, 1, 0) == [3]


def test_hash_is_even():
    values = [hash_fraction(3, f"{n}.jpg") for n in range(4000)]
    assert abs(sum(value < 0.2 for value in values) / 4000 - 0.2) < 0.03


def test_held_out_captions():
    splits = split_corpus(corpus(), held_out_captions_per_image=1, split_seed=5)
    expected = {n: min(range(4), key=lambda c, n=n: oracle(5, f"{n}.jpg", c)) for n in range(40)}
    assert ids(splits.train) == ids(splits.gallery) == ids(splits.evaluation) == [f"{n}.jpg" for n in range(40)]
    assert splits.evaluation["captions"][:] == [[f"caption {n} {c}"] for n, c in expected.items()]
    trained = [[f"caption {n} {c}" for c in range(4) if c != expected[n]] for n in range(40)]
    assert splits.train["captions"][:] == trained
    assert splits.gallery["captions"][:] == trained  # never a query
    assert len(set(expected.values())) == 4
    for rows in (splits.train, splits.gallery, splits.evaluation):
        assert tuple(rows.column_names) == COLUMNS


def test_at_least_one_caption_stays_trained(caplog):
    rows = [
        Picture(letter, letter, list("12345"[:number])) for number, letter in ((1, "a"), (2, "b"), (3, "c"), (0, "d"))
    ]
    few = Corpus("test", DatasetDict({"train": build_dataset(rows, "train")}))
    splits = split_corpus(few, held_out_captions_per_image=2)
    assert [len(captions) for captions in splits.train["captions"]] == [1, 1, 1]
    assert dict(zip(ids(splits.evaluation), map(len, splits.evaluation["captions"]), strict=True)) == {"b": 1, "c": 2}
    assert ids(splits.gallery) == ["a", "b", "c", "d"] and ids(splits.train) == ["a", "b", "c"]
    assert "3 pictures with too few captions" in caplog.text


def test_repeated_captions_are_said(caplog):
    twice = Corpus("test", DatasetDict({"train": build_dataset([Picture("a", "a", ["same", "same"])], "train")}))
    split_corpus(twice, held_out_captions_per_image=1)
    assert "1 held-out caption also trained, word for word" in caplog.text


@pytest.mark.parametrize("eval_gallery", ["all", "held_out"])
def test_held_out_images(eval_gallery):
    splits = split_corpus(corpus(), held_out_images=0.3, split_seed=1, eval_gallery=eval_gallery)
    out = [f"{n}.jpg" for n in range(40) if oracle(1, f"{n}.jpg") < 0.3]
    inside = [f"{n}.jpg" for n in range(40) if f"{n}.jpg" not in out]
    assert 0 < len(out) < 40
    assert ids(splits.train) == inside and ids(splits.evaluation) == out
    assert ids(splits.gallery) == (out if eval_gallery == "held_out" else [f"{n}.jpg" for n in range(40)])
    for image_id, captions in zip(ids(splits.gallery), splits.gallery["captions"], strict=True):
        assert captions == ([] if image_id in out else [f"caption {image_id[:-4]} {c}" for c in range(4)])
    assert all(len(captions) == 4 for captions in splits.evaluation["captions"])


def test_both_galleries_of_held_out_images():
    """One is embedded, the other is rows of it, whichever --eval_gallery names."""
    for eval_gallery, prefix in (("all", "new_"), ("held_out", "whole_")):
        splits = split_corpus(corpus(), held_out_images=0.3, split_seed=1, eval_gallery=eval_gallery)
        pictures, galleries = splits.galleries()
        assert ids(pictures) == [f"{n}.jpg" for n in range(40)] and list(galleries) == ["", prefix]
        new, whole = sorted(galleries.values(), key=len)
        assert whole.tolist() == list(range(40))
        assert ids(pictures.select(new)) == ids(splits.evaluation)
        assert ids(pictures.select(galleries[""])) == ids(splits.gallery)
    assert list(split_corpus(corpus(), held_out_captions_per_image=1).galleries()[1]) == [""]


@pytest.mark.parametrize("flags", [{"held_out_captions_per_image": 2}, {"held_out_images": 0.25}])
def test_membership_depends_on_neither_order_nor_company(flags):
    def membership(numbers, **more):
        splits = split_corpus(corpus(numbers), **flags, **more)
        return dict(zip(ids(splits.evaluation), splits.evaluation["captions"], strict=True))

    shuffled = list(range(60))
    random.Random(0).shuffle(shuffled)
    small, large = membership(range(40)), membership(shuffled)
    assert small == {image_id: captions for image_id, captions in large.items() if int(image_id[:-4]) < 40}
    assert small != membership(range(40), split_seed=1)


def test_nothing_held_out():
    splits = split_corpus(corpus())
    assert splits.evaluation is None and ids(splits.gallery) == ids(splits.train)
    assert splits.gallery["captions"][:] == splits.train["captions"][:]


def test_own_splits():
    own = corpus(range(10), validation=pictures(range(100, 103)), test=pictures(range(200, 205)))
    splits = split_corpus(own)
    assert ids(splits.evaluation) == ids(splits.gallery) == ["100.jpg", "101.jpg", "102.jpg"]
    assert splits.gallery["captions"][:] == [[], [], []] and len(splits.evaluation["captions"][0]) == 4
    assert len(split_corpus(own, eval_split="test").evaluation) == 5
    assert len(split_corpus(corpus(test=pictures([7]))).evaluation) == 1
    for flags in ({"held_out_captions_per_image": 1}, {"held_out_images": 0.1}):
        with pytest.raises(UserError, match=r"brings its own split to evaluate on \(validation, test\)"):
            split_corpus(own, **flags)


def test_pictures_without_captions_are_found_but_neither_trained_nor_asked():
    rows = [Picture("a", "a", ["1", "2"]), Picture("b", "b", [])]
    bare = Corpus("test", DatasetDict({"train": build_dataset(rows, "train"), "validation": build_dataset(rows, "v")}))
    splits = split_corpus(bare)
    assert ids(splits.train) == ids(splits.evaluation) == ["a"] and ids(splits.gallery) == ["a", "b"]


def test_sample_limits_leave_the_gallery_whole():
    splits = split_corpus(corpus(), held_out_captions_per_image=1, max_train_samples=7, max_eval_samples=3)
    assert ids(splits.train) == [f"{n}.jpg" for n in range(7)] and ids(splits.evaluation) == ["0.jpg", "1.jpg", "2.jpg"]
    assert len(splits.gallery) == 40
    assert len(split_corpus(corpus(), max_train_samples=1000).train) == 40


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"held_out_captions_per_image": 1, "held_out_images": 0.1}, "one of the two, not both"),
        ({"held_out_captions_per_image": -1}, "give 0 or more"),
        ({"held_out_images": 1.0}, "give a fraction"),
        ({"held_out_images": -0.5}, "give a fraction"),
        ({"held_out_images": 1e-9}, "holds out 0 of 40 pictures"),
        ({"held_out_images": 0.999999}, "holds out 40 of 40 pictures"),
        ({"eval_gallery": "some"}, "choose one of all, held_out"),
        ({"eval_split": "test"}, "has none besides train"),
        ({"max_train_samples": 0}, "--max_train_samples 0: give 1 or more"),
    ],
)
def test_wrong_flags(flags, message):
    with pytest.raises(UserError, match=message):
        split_corpus(corpus(), **flags)


def test_one_caption_each_cannot_be_split_by_captions():
    one = Corpus("test", DatasetDict({"train": pictures(range(5), n_captions=1)}))
    with pytest.raises(UserError, match="no picture has two captions"):
        split_corpus(one, held_out_captions_per_image=1)


def test_flatten():
    rows = [Picture("a", "/a", ["1", "2"]), Picture("b", "/b", []), Picture("c", "/c", ["3"])]
    flat = flatten_captions(build_dataset(rows, "train"))
    assert flat.to_list() == [
        {"image_row": 0, "image_id": "a", "caption": "1"},
        {"image_row": 0, "image_id": "a", "caption": "2"},
        {"image_row": 2, "image_id": "c", "caption": "3"},
    ]
    assert str(flat.features["image_row"].dtype) == "int64"


def test_flatten_after_a_selection_counts_rows_of_the_selection():
    flat = flatten_captions(pictures(range(5), n_captions=1).select([4, 2]))
    assert flat["image_row"][:] == [0, 1] and ids(flat) == ["4.jpg", "2.jpg"]
