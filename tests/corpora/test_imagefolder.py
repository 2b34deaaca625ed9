"""imagefolder with its three kinds of metadata, flat and in split folders."""

import json

import pytest
from datasets import Dataset, load_dataset

from imagedex.corpora import load_corpus
from imagedex.errors import UserError

ROWS = [
    {"file_name": "a.png", "text": "one"},
    {"file_name": "sub/b.png", "text": "two, with a comma"},
    {"file_name": "a.png", "text": "three"},
]
EXPECTED = {"a.png": ["one", "three"], "sub/b.png": ["two, with a comma"]}


def write_metadata(folder, kind, rows):
    table = Dataset.from_list(rows)
    if kind == "csv":
        table.to_csv(folder / "metadata.csv", index=False)
    elif kind == "jsonl":
        table.to_json(folder / "metadata.jsonl")
    else:
        table.to_parquet(folder / "metadata.parquet")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_flat(tmp_path, paint, colours, rows_of, kind):
    paint(tmp_path, {"a.png": colours["red"], "sub/b.png": colours["blue"]})
    write_metadata(tmp_path, kind, ROWS)
    corpus = load_corpus(str(tmp_path))
    assert corpus.form == f"imagefolder with metadata.{kind}"
    assert rows_of(corpus.splits["train"]) == EXPECTED
    assert corpus.splits["train"][1]["image"].getpixel((0, 0)) == colours["blue"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_lists_of_captions(tmp_path, paint, colours, rows_of, kind):
    paint(tmp_path, {"a.png": colours["red"], "b.png": colours["blue"]})
    write_metadata(
        tmp_path,
        kind,
        [{"file_name": "a.png", "captions": ["1", "2"], "id": 7}, {"file_name": "b.png", "captions": [], "id": 8}],
    )
    train = load_corpus(str(tmp_path)).splits["train"]
    assert rows_of(train) == {"a.png": ["1", "2"], "b.png": []}


def test_csv_text_stays_text(tmp_path, paint, colours, rows_of):
    paint(tmp_path, {"007.png": colours["red"], "None.png": colours["red"]})
    (tmp_path / "metadata.csv").write_text("file_name,caption,img_id\n007.png,0010,0001\nNone.png,None,0002\n")
    train = load_corpus(str(tmp_path)).splits["train"]
    assert rows_of(train) == {"007.png": ["0010"], "None.png": ["None"]} and train["source_id"][:] == ["0001", "0002"]


def test_split_folders_as_datasets_reads_them(tmp_path, paint, colours, rows_of):
    for split, colour in (("train", "red"), ("validation", "green"), ("test", "blue")):
        paint(tmp_path / split, {"0.png": colours[colour]})
        write_metadata(tmp_path / split, "jsonl", [{"file_name": "0.png", "caption": f"a {colour} picture"}])
    splits = load_corpus(str(tmp_path)).splits
    assert {split: rows_of(rows) for split, rows in splits.items()} == {
        "train": {"train/0.png": ["a red picture"]},
        "validation": {"validation/0.png": ["a green picture"]},
        "test": {"test/0.png": ["a blue picture"]},
    }
    oracle = load_dataset("imagefolder", data_dir=str(tmp_path))
    for split, rows in splits.items():
        assert rows[0]["captions"] == [oracle[split][0]["caption"]]
        assert rows[0]["image"].tobytes() == oracle[split][0]["image"].tobytes()


def test_no_train_split(tmp_path, paint, colours):
    paint(tmp_path / "test", {"0.png": colours["red"]})
    write_metadata(tmp_path / "test", "csv", [{"file_name": "0.png", "text": "x"}])
    with pytest.raises(UserError, match="metadata for test but none for train"):
        load_corpus(str(tmp_path))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"file_name": "a.png", "words": "x"}], {}, "no caption column; its columns are file_name, words"),
        ([{"name": "a.png", "text": "x"}], {}, "no image column; its columns are name, text"),
        ([{"file_name": "a.png", "text": "x"}], {"caption_column": "words"}, "no caption column 'words'"),
        ([{"file_name": "a.png", "n": 3}], {"caption_column": "n"}, "column 'n' is no text"),
        ([{"file_name": "gone.png", "text": "x"}, {"file_name": "a.png", "text": "y"}], {}, r"gone\.png"),
        ([{"file_name": "../outside.png", "text": "x"}], {}, "not below .*--image_dir"),
        ([{"file_name": "", "text": "x"}], {}, "row 0 names no picture"),
    ],
)
def test_errors(tmp_path, paint, colours, rows, options, message):
    paint(tmp_path, {"a.png": colours["red"]})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=message):
        load_corpus(str(tmp_path), **options)


def test_malformed_metadata(tmp_path, paint, colours):
    paint(tmp_path, {"a.png": colours["red"]})
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": \n')
    with pytest.raises(UserError, match=r"metadata\.jsonl, line 1 is no valid JSON"):
        load_corpus(str(tmp_path))


def test_two_metadata_files(tmp_path, paint, colours):
    paint(tmp_path, {"a.png": colours["red"]})
    for kind in ("csv", "jsonl"):
        write_metadata(tmp_path, kind, ROWS)
    with pytest.raises(UserError, match="several metadata files"):
        load_corpus(str(tmp_path))
