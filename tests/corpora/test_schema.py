"""Records to a dataset: the columns, empty captions, repeated ids, the cache."""

import pytest
from datasets import Image, List, Value

from imagedex.corpora.schema import Picture, build_dataset, listed, merge_by_picture, validate
from imagedex.errors import UserError


def test_columns():
    dataset = build_dataset([Picture("a/b.jpg", "/x/a/b.jpg", [" two  words\n", "x"], "17")], "train")
    assert dict(dataset.features) == {
        "image_id": Value("string"),
        "image": Image(),
        "captions": List(Value("string")),
        "source_id": Value("string"),
    }
    assert dataset.with_format("arrow")[:].to_pylist() == [
        {
            "image_id": "a/b.jpg",
            "image": {"bytes": None, "path": "/x/a/b.jpg"},
            "captions": ["two  words", "x"],
            "source_id": "17",
        }
    ]


def test_empty_captions_are_counted_and_bare_pictures_named(caplog):
    rows = [Picture("a.jpg", "a.jpg", ["", "x", None, " \t"]), Picture("b.jpg", "b.jpg", [""])]
    dataset = build_dataset(rows, "train")
    assert dataset["captions"][:] == [["x"], []] and dataset["image_id"][:] == ["a.jpg", "b.jpg"]
    assert "left out 4 empty captions" in caplog.text and "1 picture without any caption" in caplog.text
    assert "b.jpg" in caplog.text


def test_same_id_twice():
    rows = [Picture("a.jpg", "/x/a.jpg", ["x"]), Picture("a.jpg", "/y/a.jpg", ["y"])]
    with pytest.raises(UserError, match=r"1 image_id more than once: a\.jpg"):
        build_dataset(rows, "validation")
    dataset = build_dataset(rows[:1], "train")
    with pytest.raises(ValueError, match="columns"):
        validate(dataset.remove_columns("source_id"), "train")


def test_no_row():
    with pytest.raises(UserError, match="test split holds no picture"):
        build_dataset([], "test")


def test_the_table_is_kept_and_maps_on_it_are_cached():
    def table(text):
        return build_dataset([Picture("a.jpg", "/x/a.jpg", [text])], "train")

    assert table("x").cache_files == table("x").cache_files != table("y").cache_files
    assert table("y")["captions"][:] == [["y"]]


def test_merge_keeps_the_order_of_first_sight_and_the_input():
    rows = [Picture("b", "/b", ["1"], "s"), Picture("a", "/a", ["2"]), Picture("b", "/b", ["3"])]
    assert merge_by_picture(rows) == [Picture("b", "/b", ["1", "3"], "s"), Picture("a", "/a", ["2"])]
    assert rows[0].captions == ["1"]


def test_listed():
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(number) for number in range(13)], 10) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 3 more"
