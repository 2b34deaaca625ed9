"""Which form is recognised, and one clear line for everything that cannot be loaded."""

import pytest

from imagedex.corpora import load_corpus
from imagedex.errors import UserError


def test_bare_folder_is_a_gallery_without_captions(tmp_path, paint, colours, rows_of):
    paint(tmp_path, {"b.png": colours["red"], "sub/a.JPG": colours["blue"], ".hidden/c.png": colours["blue"]})
    (tmp_path / "notes.txt").write_text("x")
    corpus = load_corpus(image_dir=str(tmp_path))
    assert rows_of(corpus.splits["train"]) == {"b.png": [], "sub/a.JPG": []}
    assert corpus.form == "folder of pictures without captions"


def test_bare_folder_with_an_unreadable_picture(tmp_path, paint, colours):
    paint(tmp_path, {"b.png": colours["red"]})
    (tmp_path / "bad.png").write_text("x")
    with pytest.raises(UserError, match=r"bad\.png"):
        load_corpus(image_dir=str(tmp_path))
    assert load_corpus(image_dir=str(tmp_path), unreadable_images="skip").left_out == [str(tmp_path / "bad.png")]


@pytest.mark.parametrize("name", ["{}/gone", "./gone", "gone", "~/gone-from-here", "a/b/c", "{}/gone/further"])
def test_missing_folder(tmp_path, name):
    with pytest.raises(UserError, match="there is no such folder"):
        load_corpus(name.format(tmp_path))


def test_missing_folder_beside_others_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--dataset_name data/flickr8k: there is no such folder"):
        load_corpus("data/flickr8k")


def test_empty_folder(tmp_path):
    with pytest.raises(UserError, match="the folder is empty"):
        load_corpus(str(tmp_path))
    with pytest.raises(UserError, match="--image_dir .*the folder is empty"):
        load_corpus(image_dir=str(tmp_path))


def test_folder_of_pictures_only(tmp_path, paint, colours):
    paint(tmp_path, {"b.png": colours["red"]})
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "hidden.json").write_text("[]")
    with pytest.raises(UserError, match="holds 1 picture but no captions; put beside them one of: .*metadata.csv"):
        load_corpus(str(tmp_path))


def test_unknown_form(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(
        UserError,
        match=r"has no known form \(it holds notes\.md\); known are: Karpathy.*LXMERT.*captions\.txt.*imagefolder",
    ):
        load_corpus(str(tmp_path))
    with pytest.raises(UserError, match=r"notes\.md is a file of no known form; .*--train_file"):
        load_corpus(str(tmp_path / "notes.md"))
    with pytest.raises(UserError, match="--image_dir .*no pictures"):
        load_corpus(image_dir=str(tmp_path))


def test_a_dataset_without_captions(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="has no image column; its columns are a, b"):
        load_corpus(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no corpus given"),
        ({"dataset_name": "x", "train_file": "y.csv"}, "give one or the other"),
        ({"validation_file": "y.csv"}, "--validation_file needs --train_file"),
        ({"dataset_name": "x", "unreadable_images": "ignore"}, "choose one of error, skip"),
        ({"train_file": "gone.csv"}, "--train_file gone.csv: there is no such file"),
    ],
)
def test_wrong_requests(options, message):
    with pytest.raises(UserError, match=message):
        load_corpus(**options)


def test_image_dir_that_is_a_file_or_missing(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="this is a file"):
        load_corpus(image_dir=str(tmp_path / "file"))
    with pytest.raises(UserError, match="no such folder"):
        load_corpus(image_dir=str(tmp_path / "gone"))


def test_the_form_and_the_counts_are_said(tmp_path, paint, colours, caplog):
    paint(tmp_path / "images", {"a.png": colours["red"], "b.png": colours["red"]})
    (tmp_path / "captions.txt").write_text("image,caption\na.png,x\na.png,y\nb.png,\n")
    with caplog.at_level("INFO"):
        load_corpus(str(tmp_path))
    assert "recognised as Flickr8k captions.txt: train 2 pictures with 2 captions" in caplog.text
    assert "left out 1 empty caption" in caplog.text
