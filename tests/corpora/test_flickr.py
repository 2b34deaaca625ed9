"""Flickr8k and Flickr30k caption files, in the layouts in which they unpack."""

import os
from pathlib import Path

import pytest

from imagedex.corpora import load_corpus
from imagedex.errors import UserError

BESIDE = Path(__file__).resolve().parents[3] / "shared" / "photos-900"
PHOTOS = Path(os.environ.get("PHOTOS_900", BESIDE))  # 900 captioned photographs of Flickr8k
FLICKR8K = 'image,caption\na.png,"A dog , brown , runs ."\na.png,Two dogs .\nb.png,"A ""big"" cat ."\n'
FLICKR30K = (
    "image_name| comment_number| comment\n"
    "a.jpg| 0| Two young guys with shaggy hair .\n"
    "a.jpg| 1| Two men | outside .\n"
    "b.jpg| 4   A dog runs across the grass .\n"
)


@pytest.mark.parametrize("below", ["images", "Images", "."])
def test_flickr8k(tmp_path, paint, colours, rows_of, below):
    paint(tmp_path / below, {"a.png": colours["red"], "b.png": colours["green"]})
    (tmp_path / "captions.txt").write_text(FLICKR8K)
    corpus = load_corpus(str(tmp_path))
    assert corpus.form == "Flickr8k captions.txt" and list(corpus.splits) == ["train"]
    train = corpus.splits["train"]
    assert rows_of(train) == {"a.png": ["A dog , brown , runs .", "Two dogs ."], "b.png": ['A "big" cat .']}
    assert train["source_id"][:] == ["", ""]
    assert (
        train[0]["image"].getpixel((0, 0)) == colours["red"] and train[1]["image"].getpixel((0, 0)) == colours["green"]
    )


def test_pictures_stay_paths(tmp_path, paint, colours):
    paint(tmp_path / "images", {"a.png": colours["red"], "b.png": colours["green"]})
    (tmp_path / "captions.txt").write_text(FLICKR8K)
    stored = load_corpus(str(tmp_path)).splits["train"].with_format("arrow")[:]["image"].to_pylist()
    assert stored[0] == {"bytes": None, "path": str(tmp_path / "images" / "a.png")}


@pytest.mark.parametrize("below", ["flickr30k_images", "images", "flickr30k_images/flickr30k_images"])
def test_flickr30k_with_its_broken_row(tmp_path, paint, colours, rows_of, below):
    paint(tmp_path / below, {"a.jpg": colours["red"], "b.jpg": colours["green"]})
    (tmp_path / "results.csv").write_text(FLICKR30K)
    corpus = load_corpus(str(tmp_path))
    assert corpus.form == "Flickr30k results.csv"
    assert rows_of(corpus.splits["train"]) == {
        "a.jpg": ["Two young guys with shaggy hair .", "Two men | outside ."],
        "b.jpg": ["A dog runs across the grass ."],
    }


def test_flickr30k_as_the_mirror_unpacks(tmp_path, paint, colours, rows_of):
    paint(tmp_path / "flickr30k_images/flickr30k_images", {"a.jpg": colours["red"], "b.jpg": colours["green"]})
    (tmp_path / "flickr30k_images" / "results.csv").write_text(FLICKR30K)
    assert list(rows_of(load_corpus(str(tmp_path)).splits["train"])) == ["a.jpg", "b.jpg"]


def test_the_caption_file_itself_and_pictures_elsewhere(tmp_path, paint, colours, rows_of):
    paint(tmp_path / "pictures", {"sub/a.png": colours["red"], "b.png": colours["green"]})
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "captions.txt").write_text("\ufefffile,words\nsub/a.png,one\nb.png,two\n", encoding="utf-8")
    corpus = load_corpus(
        str(tmp_path / "texts" / "captions.txt"),
        image_dir=str(tmp_path / "pictures"),
        image_column="file",
        caption_column="words",
    )
    assert rows_of(corpus.splits["train"]) == {"sub/a.png": ["one"], "b.png": ["two"]}


def test_relative_folder(tmp_path, paint, colours, rows_of, monkeypatch):
    paint(tmp_path / "corpus" / "images", {"a.png": colours["red"], "b.png": colours["green"]})
    (tmp_path / "corpus" / "captions.txt").write_text(FLICKR8K)
    monkeypatch.chdir(tmp_path)
    train = load_corpus("corpus").splits["train"]
    monkeypatch.chdir("/")
    assert train[0]["image"].size == (8, 6)


def test_missing_pictures(tmp_path, paint, colours, caplog):
    paint(tmp_path / "images", {"a.png": colours["red"]})
    (tmp_path / "captions.txt").write_text(FLICKR8K)
    with pytest.raises(UserError, match=r"1 picture .*not there: .*b\.png; .*--unreadable_images skip"):
        load_corpus(str(tmp_path))
    corpus = load_corpus(str(tmp_path), unreadable_images="skip")
    assert corpus.splits["train"]["image_id"][:] == ["a.png"]
    assert corpus.left_out == [str(tmp_path / "images" / "b.png")] and "b.png" in caplog.text


def test_no_picture_at_all_is_there(tmp_path):
    (tmp_path / "captions.txt").write_text(FLICKR8K)
    for choice in ("error", "skip"):
        with pytest.raises(UserError, match=r"pictures that are not there \(a\.png, b\.png\).*--image_dir"):
            load_corpus(str(tmp_path), unreadable_images=choice)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "image,words\na.png,one\n",
            r"no caption column; its columns are image, words; name one with --caption_column",
        ),
        ("photo,caption\na.png,one\n", r"no image column; its columns are photo, caption"),
        ("image,caption\n", "holds no caption"),
        ("", "is empty"),
        ("image,caption\na.png\n", r"line 2: 2 fields expected \(image, caption\)"),
        ("image_name| comment_number| comment\na.png| no number\n", "line 2: 3 fields expected"),
    ],
)
def test_bad_caption_files(tmp_path, paint, colours, content, message):
    paint(tmp_path, {"a.png": colours["red"]})
    (tmp_path / "captions.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        load_corpus(str(tmp_path))


def test_named_column_that_is_not_there(tmp_path, paint, colours):
    paint(tmp_path, {"a.png": colours["red"], "b.png": colours["red"]})
    (tmp_path / "captions.txt").write_text(FLICKR8K)
    with pytest.raises(UserError, match="no caption column 'text'; its columns are image, caption"):
        load_corpus(str(tmp_path), caption_column="text")


def test_not_utf8(tmp_path, paint, colours):
    paint(tmp_path, {"a.png": colours["red"]})
    (tmp_path / "captions.txt").write_bytes(b"image,caption\na.png,caf\xe9\n")
    with pytest.raises(UserError, match="not UTF-8"):
        load_corpus(str(tmp_path))


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="PHOTOS_900 does not name the folder of the photographs")
def test_photos_900():
    train = load_corpus(str(PHOTOS)).splits["train"]
    names = [line.split(",", 1)[0] for line in (PHOTOS / "captions.txt").read_text().splitlines()[1:]]
    assert train["image_id"][:] == list(dict.fromkeys(names)) and len(train) == 900
    assert {len(captions) for captions in train["captions"]} == {4}
    assert train[0]["captions"][1] == "A girl going into a wooden building ."
    assert all(size > 50 for size in train[899]["image"].size)
