"""Datasets with an image and a caption column: embedded parquet, saved folders, table files, and a Hub id."""

import io
import json

import datasets
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as Pillow

from imagedex.corpora import load_corpus
from imagedex.corpora.forms.contents import FOUND, Place, read_split
from imagedex.errors import UserError


def png(colour):
    content = io.BytesIO()
    Pillow.new("RGB", (8, 6), colour).save(content, format="PNG")
    return content.getvalue()


def embedded(rows, image="image", caption="caption", captions_are_lists=False):
    """rows: (path, colour, caption). A table with the picture inside, as datasets on the Hub keep it."""
    text = List(Value("string")) if captions_are_lists else Value("string")
    return Dataset.from_dict(
        {
            image: [{"bytes": png(colour), "path": path} for path, colour, _ in rows],
            caption: [text for *_, text in rows],
            "cocoid": list(range(100, 100 + len(rows))),
        },
        features=Features({image: Image(), caption: text, "cocoid": Value("int64")}),
    )


def pixel(row):
    return row["image"].getpixel((0, 0))


def test_local_parquet_with_embedded_pictures(tmp_path, colours, rows_of):
    (tmp_path / "data").mkdir()
    for split in ("train", "validation", "test"):
        rows = [(f"{split}_0.png", colours["red"], [f"{split} red", "x"]), (f"{split}_1.png", colours["blue"], ["y"])]
        embedded(rows, captions_are_lists=True).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    corpus = load_corpus(str(tmp_path))
    assert corpus.form == f"dataset {tmp_path}"
    assert {split: rows_of(rows) for split, rows in corpus.splits.items()} == {
        split: {f"{split}_0.png": [f"{split} red", "x"], f"{split}_1.png": ["y"]}
        for split in ("train", "validation", "test")
    }
    assert corpus.splits["test"]["source_id"][:] == ["100", "101"]
    assert pixel(corpus.splits["test"][1]) == colours["blue"]


def test_rows_of_the_same_picture_are_merged(tmp_path, colours, rows_of):
    rows = [
        ("b.png", colours["red"], "1"),
        ("a.png", colours["blue"], "2"),
        ("b.png", colours["red"], "3"),
        ("c.png", colours["green"], " "),
        ("b.png", colours["red"], None),
    ]
    embedded(rows).to_parquet(tmp_path / "train.parquet")
    train = load_corpus(str(tmp_path)).splits["train"]
    assert rows_of(train) == {"b.png": ["1", "3"], "a.png": ["2"], "c.png": []}
    assert [pixel(row) for row in train] == [colours["red"], colours["blue"], colours["green"]]
    assert train["source_id"][:] == ["100", "101", "103"]


def test_one_name_for_different_pictures_is_no_name(tmp_path, colours, rows_of, caplog):
    embedded([("image.png", colours["red"], "1"), ("image.png", colours["blue"], "2")]).to_parquet(
        tmp_path / "train.parquet"
    )
    train = load_corpus(str(tmp_path)).splits["train"]
    assert rows_of(train) == {"train/00000000": ["1"], "train/00000001": ["2"]}
    assert [pixel(row) for row in train] == [colours["red"], colours["blue"]]
    assert "one file name stands for different pictures" in caplog.text


@pytest.mark.parametrize("paths", [(None, None), ("/mnt/x/a.png", "/mnt/y/a.png"), ("noextension", "another")])
def test_rows_without_telling_names(tmp_path, colours, rows_of, paths):
    rows = [(path, colours[colour], colour) for path, colour in zip(paths, ("red", "blue"), strict=True)]
    embedded(rows).to_parquet(tmp_path / "train.parquet")
    assert rows_of(load_corpus(str(tmp_path)).splits["train"]) == {
        "train/00000000": ["red"],
        "train/00000001": ["blue"],
    }


def test_absolute_paths_leave_their_folder_behind(tmp_path, colours, rows_of):
    embedded([("/mnt/x/a.png", colours["red"], "1"), ("sub/b.png", colours["blue"], "2")]).to_parquet(
        tmp_path / "train.parquet"
    )
    assert list(rows_of(load_corpus(str(tmp_path)).splits["train"])) == ["a.png", "sub/b.png"]


def test_names_shared_by_splits(tmp_path, colours, caplog):
    for split, colour in (("train", "red"), ("validation", "blue")):
        embedded([("0.png", colours[colour], colour)]).to_parquet(tmp_path / f"{split}.parquet")
    splits = load_corpus(str(tmp_path)).splits
    assert splits["train"]["image_id"][:] == ["train/0.png"]
    assert splits["validation"]["image_id"][:] == ["validation/0.png"]
    assert pixel(splits["validation"][0]) == colours["blue"]


def test_saved_to_disk_with_other_column_names(tmp_path, colours, rows_of):
    table = embedded([("a.png", colours["red"], "1"), ("b.png", colours["blue"], "2")], "picture", "words")
    DatasetDict({"train": table, "val": table.select([1])}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="no caption column; its columns are picture, words, cocoid"):
        load_corpus(str(tmp_path / "saved"))
    splits = load_corpus(str(tmp_path / "saved"), caption_column="words").splits
    assert rows_of(splits["train"]) == {"train/a.png": ["1"], "train/b.png": ["2"]}
    assert rows_of(splits["validation"]) == {"validation/b.png": ["2"]}


def test_numbered_caption_columns(tmp_path, colours, rows_of):
    table = embedded([("a.png", colours["red"], "0"), ("b.png", colours["blue"], "1")], caption="caption_0")
    table.add_column("caption_1", ["2", "3"]).to_parquet(tmp_path / "train.parquet")
    assert rows_of(load_corpus(str(tmp_path)).splits["train"]) == {"a.png": ["0", "2"], "b.png": ["1", "3"]}


def test_a_hub_id(monkeypatch, colours, rows_of, caplog):
    asked = []
    tables = DatasetDict(
        {
            "train": embedded([("a.png", colours["red"], "1")]),
            "test": embedded([("b.png", colours["blue"], "2")]),
            "restval": embedded([("c.png", colours["blue"], "3")]),
        }
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **_: asked.append(names) or tables)
    corpus = load_corpus("owner/pictures", "small")
    assert asked == [("owner/pictures", "small")] and corpus.form == "dataset owner/pictures (small)"
    assert {split: rows_of(rows) for split, rows in corpus.splits.items()} == {
        "train": {"a.png": ["1"]},
        "test": {"b.png": ["2"]},
    }
    assert "splits not used: restval" in caplog.text


def test_a_hub_dataset_with_one_split_only(monkeypatch, colours, caplog):
    tables = DatasetDict({"test": embedded([("a.png", colours["red"], "1")])})
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **_: tables)
    assert list(load_corpus("owner/pictures").splits) == ["train"]
    assert "only a test split" in caplog.text
    tables["extra"] = tables["test"]
    with pytest.raises(UserError, match="no train split; its splits are test, extra"):
        load_corpus("owner/pictures")


def test_a_hub_dataset_of_paths(monkeypatch, tmp_path, paint, colours, rows_of):
    paint(tmp_path, {"x/a.png": colours["red"]})
    table = Dataset.from_dict({"filename": ["x/a.png", "x/a.png"], "caption": ["1", "2"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **_: DatasetDict({"train": table}))
    with pytest.raises(UserError, match="column 'filename' holds file names; give their folder with --image_dir"):
        load_corpus("owner/pictures")
    train = load_corpus("owner/pictures", image_dir=str(tmp_path)).splits["train"]
    assert rows_of(train) == {"x/a.png": ["1", "2"]} and pixel(train[0]) == colours["red"]


def test_the_hub_cannot_be_reached(monkeypatch):
    def fail(*names, **_):
        raise ConnectionError("Couldn't reach 'owner/pictures' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match="owner/pictures cannot be loaded: no such folder here, .* cannot be reached$"):
        load_corpus("owner/pictures")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_table_files(tmp_path, paint, colours, rows_of, kind):
    paint(tmp_path / "pictures", {"a.png": colours["red"], "b.png": colours["blue"], "c.png": colours["green"]})
    rows = {"train": [("a", "1, 2"), ("b", "3"), ("a", "4")], "validation": [("c", "5")]}
    for split, pairs in rows.items():
        table = Dataset.from_list([{"image": f"pictures/{name}.png", "caption": text} for name, text in pairs])
        file = tmp_path / f"{split}.{kind}"
        if kind in ("csv", "tsv"):
            table.to_csv(file, index=False, sep="," if kind == "csv" else "\t")
        elif kind == "json":
            file.write_text(json.dumps(table.to_list()))
        else:
            (table.to_json if kind == "jsonl" else table.to_parquet)(file)
    corpus = load_corpus(
        train_file=str(tmp_path / f"train.{kind}"), validation_file=str(tmp_path / f"validation.{kind}")
    )
    assert corpus.form == f"table train.{kind}"
    assert rows_of(corpus.splits["train"]) == {"pictures/a.png": ["1, 2", "4"], "pictures/b.png": ["3"]}
    assert rows_of(corpus.splits["validation"]) == {"pictures/c.png": ["5"]}


def test_table_file_with_pictures_elsewhere(tmp_path, paint, colours, rows_of):
    paint(tmp_path / "pictures", {"sub/a.png": colours["red"]})
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.jsonl").write_text(
        json.dumps({"image": "sub/a.png", "caption": ["1", "2"]})
        + "\n"
        + json.dumps({"image": str(tmp_path / "pictures" / "sub" / "a.png"), "caption": ["3"]})
    )
    options = {"train_file": str(tmp_path / "texts" / "train.jsonl")}
    train = load_corpus(**options, image_dir=str(tmp_path / "pictures")).splits["train"]
    assert rows_of(train) == {"sub/a.png": ["1", "2", "3"]}
    with pytest.raises(UserError, match="which is not below .*texts; .*--image_dir"):
        load_corpus(**options)


def test_table_file_with_embedded_pictures(tmp_path, colours, rows_of):
    embedded([("a.png", colours["red"], "1")]).to_parquet(tmp_path / "rows.parquet")
    train = load_corpus(train_file=str(tmp_path / "rows.parquet")).splits["train"]
    assert rows_of(train) == {"a.png": ["1"]} and pixel(train[0]) == colours["red"]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("train.csv", "image,words\na.png,x\n", {}, "no caption column; its columns are image, words"),
        ("train.csv", "pic,caption\na.png,x\n", {}, "no image column; its columns are pic, caption"),
        ("train.csv", "image,caption\na.png,x\n", {"image_column": "file"}, "no image column 'file'"),
        ("train.csv", "image,caption\n", {}, "holds no row"),
        ("train.csv", "", {}, "is empty"),
        ("train.csv", "image,image\na,b\n", {}, "names a column twice"),
        ("train.csv", "caption,image\nx,a.png,y,z\n", {}, "line 2: 2 fields expected"),
        ("train.txt", "x", {}, r"a table in \.csv"),
        ("train.jsonl", '{"image": 3, "caption": "x"}', {"image_column": "image"}, "holds no pictures but"),
        ("train.jsonl", '{"image": "a.png", "caption": 3}', {"caption_column": "caption"}, "is no text"),
        ("train.csv", "image,caption\na.png,x\ngone.png,y\n", {}, r"1 picture .*gone\.png"),
        ("other.csv", "image,caption\na.png,x\n", {}, "no such file"),
    ],
)
def test_bad_table_files(tmp_path, paint, colours, name, content, options, message):
    paint(tmp_path, {"a.png": colours["red"]})
    (tmp_path / name).write_text(content)
    file = tmp_path / ("train.csv" if name == "other.csv" else name)
    with pytest.raises(UserError, match=message):
        load_corpus(train_file=str(file), **options)


def test_hub_rows_do_not_copy_pictures(tmp_path, colours):
    table = embedded([("a.png", colours["red"], "1"), ("b.png", colours["blue"], "2"), ("a.png", colours["red"], "3")])
    table.to_parquet(tmp_path / "train.parquet")
    loaded = datasets.load_dataset("parquet", data_files=str(tmp_path / "train.parquet"), split="train")
    written = read_split(loaded, "train", "here", Place(None, None), FOUND)
    assert [file["filename"] for file in written.cache_files] == [file["filename"] for file in loaded.cache_files]


def test_no_picture_is_decoded_while_the_table_is_built(tmp_path, colours):
    table = embedded([("a.png", colours["red"], "1"), ("b.png", colours["blue"], "2"), ("a.png", colours["red"], "3")])
    spoilt = table.cast_column("image", Image(decode=False)).map(
        lambda row: {"image": {"bytes": row["image"]["bytes"][:20], "path": row["image"]["path"]}}
    )
    built = read_split(spoilt.cast_column("image", Image()), "train", "here", Place(None, None), FOUND)
    assert built["captions"][:] == [["1", "3"], ["2"]]
