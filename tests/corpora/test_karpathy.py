"""Karpathy's files: COCO with its folders and restval, Flickr without, several files in one folder."""

import json

import pytest

from imagedex.corpora import load_corpus
from imagedex.errors import UserError


def image(number, split, name, filepath=None, sentences=("one .", "two .")):
    """An entry with the fields and in the order of the real files."""
    entry = {"filepath": filepath} if filepath else {}
    entry |= {"sentids": [2 * number, 2 * number + 1], "filename": name, "imgid": number, "split": split}
    entry["sentences"] = [
        {"tokens": text.split()[:-1], "raw": text, "imgid": number, "sentid": 2 * number + place}
        for place, text in enumerate(sentences)
    ]
    return entry | ({"cocoid": 391895 + number} if filepath else {})


COCO = [
    image(0, "test", "COCO_val2014_000000391895.jpg", "val2014", ["A man .", "A dog .", ""]),
    image(1, "restval", "COCO_val2014_000000391896.jpg", "val2014"),
    image(2, "train", "COCO_train2014_000000391897.jpg", "train2014"),
    image(3, "val", "COCO_val2014_000000391898.jpg", "val2014"),
]
FLICKR = [image(0, "train", "a.jpg"), image(1, "test", "b.jpg"), image(2, "val", "c.jpg")]


def write(folder, name, images):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / f"dataset_{name}.json").write_text(json.dumps({"images": images, "dataset": name}))


def paint_coco(paint, folder):
    paint(folder, {f"{entry['filepath']}/{entry['filename']}": (10 * entry["imgid"], 0, 0) for entry in COCO})


@pytest.mark.parametrize("pictures", [".", "images", ".."])
def test_coco(tmp_path, paint, rows_of, pictures, caplog):
    folder = tmp_path / "captions"
    write(folder, "coco", COCO)
    paint_coco(paint, folder / pictures)
    with caplog.at_level("INFO"):
        corpus = load_corpus(str(folder))
    assert corpus.form == "Karpathy dataset_coco.json"
    assert {split: rows_of(rows) for split, rows in corpus.splits.items()} == {
        "train": {
            "val2014/COCO_val2014_000000391896.jpg": ["one .", "two ."],
            "train2014/COCO_train2014_000000391897.jpg": ["one .", "two ."],
        },
        "validation": {"val2014/COCO_val2014_000000391898.jpg": ["one .", "two ."]},
        "test": {"val2014/COCO_val2014_000000391895.jpg": ["A man .", "A dog ."]},
    }
    assert corpus.splits["train"]["source_id"][:] == ["391896", "391897"]
    assert abs(corpus.splits["validation"][0]["image"].getpixel((0, 0))[0] - 30) < 4
    assert "1 restval pictures joined to train" in caplog.text and "left out 1 empty caption" in caplog.text


def test_coco_pictures_given(tmp_path, paint):
    write(tmp_path / "captions", "coco", COCO)
    paint_coco(paint, tmp_path / "elsewhere" / "coco")
    with pytest.raises(UserError, match=r"not there \(val2014/COCO_val2014_000000391895\.jpg.*--image_dir"):
        load_corpus(str(tmp_path / "captions"))
    corpus = load_corpus(str(tmp_path / "captions"), image_dir=str(tmp_path / "elsewhere" / "coco"))
    assert len(corpus.splits["train"]) == 2


@pytest.mark.parametrize("below", ["images", "Flicker8k_Dataset", "."])
def test_flickr(tmp_path, paint, colours, rows_of, below):
    write(tmp_path, "flickr8k", FLICKR)
    paint(tmp_path / below, dict.fromkeys(["a.jpg", "b.jpg", "c.jpg"], colours["red"]))
    splits = load_corpus(str(tmp_path)).splits
    assert {split: list(rows_of(rows)) for split, rows in splits.items()} == {
        "train": ["a.jpg"],
        "validation": ["c.jpg"],
        "test": ["b.jpg"],
    }
    assert splits["test"]["source_id"][:] == ["1"]


def test_one_of_several_files(tmp_path, paint, colours):
    write(tmp_path, "coco", COCO)
    write(tmp_path, "flickr8k", FLICKR)
    (tmp_path / "dataset_info.json").write_text('{"features": {}}')
    paint(tmp_path / "images", dict.fromkeys(["a.jpg", "b.jpg", "c.jpg"], colours["red"]))
    with pytest.raises(UserError, match="choose one with --dataset_config_name: coco, flickr8k"):
        load_corpus(str(tmp_path))
    assert load_corpus(str(tmp_path), "flickr8k").splits["train"]["image_id"][:] == ["a.jpg"]
    assert load_corpus(str(tmp_path / "dataset_flickr8k.json")).splits["train"]["image_id"][:] == ["a.jpg"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": [image(0, "training", "a.jpg")]}, "unknown splits training; known are train, restval, val, test"),
        ({"images": [image(0, "test", "a.jpg")]}, "no train split; its splits are test"),
        ({"images": [{"split": "train", "filename": "a.jpg"}]}, "a picture without 'sentences'"),
        ({"images": []}, "lists no images"),
        ({"images": [image(0, "train", "a.jpg"), image(1, "train", "gone.jpg")]}, r"1 picture .*gone\.jpg"),
        ({"images": [image(0, "train", "a.jpg"), image(1, "train", "a.jpg")]}, r"1 image_id more than once: a\.jpg"),
    ],
)
def test_errors(tmp_path, paint, colours, content, message):
    paint(tmp_path / "images", {"a.jpg": colours["red"]})
    (tmp_path / "dataset_x.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load_corpus(str(tmp_path))


def test_malformed_json(tmp_path):
    (tmp_path / "dataset_x.json").write_text('{"images": [')
    with pytest.raises(UserError, match=r"dataset_x\.json is no valid JSON"):
        load_corpus(str(tmp_path))
