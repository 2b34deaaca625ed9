"""BLIP's caption files: train rows with one caption, val and test rows with five."""

import json

import pytest

from imagedex.corpora import load_corpus
from imagedex.errors import UserError

TRAIN = [
    {"image": f"flickr30k-images/{name}.jpg", "caption": f"{name} {number} .", "image_id": name}
    for number in range(3)
    for name in ("10002456", "1000268201")
]
VAL = [{"image": "flickr30k-images/1018148011.jpg", "caption": [f"val {number} ." for number in range(5)]}]
TEST = [{"image": "flickr30k-images/1007129816.jpg", "caption": [f"test {number} ." for number in range(5)]}]
NAMES = [f"{name}.jpg" for name in ("10002456", "1000268201", "1018148011", "1007129816")]


def write(folder, stem="flickr30k", **parts):
    folder.mkdir(exist_ok=True)
    for ending, rows in (parts or {"train": TRAIN, "val": VAL, "test": TEST}).items():
        (folder / f"{stem}_{ending}.json").write_text(json.dumps(rows))


@pytest.mark.parametrize("root", [".", ".."])
def test_flickr30k(tmp_path, paint, colours, rows_of, root):
    folder = tmp_path / "annotation"
    write(folder)
    paint(folder / root / "flickr30k-images", dict.fromkeys(NAMES, colours["red"]))
    corpus = load_corpus(str(folder))
    assert corpus.form == "BLIP flickr30k_train.json"
    assert {split: rows_of(rows) for split, rows in corpus.splits.items()} == {
        "train": {
            f"flickr30k-images/{name}.jpg": [f"{name} {number} ." for number in range(3)]
            for name in ("10002456", "1000268201")
        },
        "validation": {"flickr30k-images/1018148011.jpg": VAL[0]["caption"]},
        "test": {"flickr30k-images/1007129816.jpg": TEST[0]["caption"]},
    }
    assert corpus.splits["train"]["source_id"][:] == ["10002456", "1000268201"]


def test_pictures_in_a_folder_of_another_name(tmp_path, paint, colours, rows_of):
    write(tmp_path)
    paint(tmp_path / "images", dict.fromkeys(NAMES, colours["red"]))
    assert list(rows_of(load_corpus(str(tmp_path)).splits["train"])) == ["10002456.jpg", "1000268201.jpg"]


def test_pictures_given(tmp_path, paint, colours, rows_of):
    write(tmp_path / "annotation", train=TRAIN)
    paint(tmp_path / "far" / "off" / "flickr30k-images", dict.fromkeys(NAMES, colours["red"]))
    with pytest.raises(UserError, match="pictures that are not there"):
        load_corpus(str(tmp_path / "annotation"))
    splits = load_corpus(str(tmp_path / "annotation"), image_dir=str(tmp_path / "far" / "off")).splits
    assert list(splits) == ["train"] and splits["train"]["image_id"][0] == "flickr30k-images/10002456.jpg"
    splits = load_corpus(str(tmp_path / "annotation"), image_dir=str(tmp_path / "far/off/flickr30k-images")).splits
    assert splits["train"]["image_id"][0] == "10002456.jpg"


def test_coco_and_flickr_in_one_folder(tmp_path, paint, colours, rows_of):
    row = {"image": "val2014/COCO_val2014_000000522418.jpg", "caption": "A woman .", "image_id": "coco_522418"}
    write(tmp_path)
    write(tmp_path, "coco_karpathy", train=[row])
    paint(tmp_path / "val2014", {"COCO_val2014_000000522418.jpg": colours["blue"]})
    with pytest.raises(UserError, match="choose with --dataset_config_name: flickr30k, coco_karpathy"):
        load_corpus(str(tmp_path))
    for arguments in (["", "coco_karpathy"], ["coco_karpathy_train.json"]):
        train = load_corpus(str(tmp_path / arguments[0]), *arguments[1:]).splits["train"]
        assert rows_of(train) == {"val2014/COCO_val2014_000000522418.jpg": ["A woman ."]}
        assert train["source_id"][:] == ["coco_522418"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"images": []}, "a list of rows with image and caption is expected"),
        ([], "a list of rows"),
        ([{"image": "a.jpg", "text": "x"}], "a row without 'caption'"),
        ([{"image": "a.jpg", "caption": None}], "not BLIP's form"),
        ([{"image": "a.jpg", "caption": "x"}, {"image": "gone.jpg", "caption": "x"}], r"1 picture .*gone\.jpg"),
    ],
)
def test_errors(tmp_path, paint, colours, rows, message):
    paint(tmp_path, {"a.jpg": colours["red"]})
    write(tmp_path, train=rows)
    with pytest.raises(UserError, match=message):
        load_corpus(str(tmp_path))
