"""Folders as they are: links, names in two forms of Unicode or in none, files that are no pictures."""

import os
import unicodedata

import pytest

from imagedex.corpora import load_corpus
from imagedex.corpora.paths import list_pictures
from imagedex.errors import UserError


@pytest.mark.parametrize(("on_disk", "written"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_the_two_forms_of_an_accent_are_one_name(tmp_path, paint, colours, rows_of, on_disk, written):
    name = unicodedata.normalize(on_disk, "caf\xe9/\xfcber.png")
    paint(tmp_path / "images", {name: colours["red"]})
    (tmp_path / "captions.txt").write_text(
        "image,caption\n" + unicodedata.normalize(written, name) + ",one\n", encoding="utf-8"
    )
    assert rows_of(load_corpus(str(tmp_path)).splits["train"]) == {name: ["one"]}


def test_links_that_lead_back_up(tmp_path, paint, colours):
    paint(tmp_path / "g", {"a/x.png": colours["red"], "b/y.png": colours["red"]})
    paint(tmp_path / "elsewhere", {"z.png": colours["blue"]})
    for link, target in (
        ("a/up", ".."),
        ("a/here", "."),
        ("b/side", "../a"),
        ("a/side", "../b"),
        ("0", "a"),
        ("far", "../elsewhere"),
    ):
        os.symlink(target, tmp_path / "g" / link)
    assert list_pictures(tmp_path / "g") == ["a/x.png", "b/y.png", "far/z.png"]


def test_a_file_name_that_is_not_utf8(tmp_path, paint, colours):
    paint(tmp_path / "g", {"a.png": colours["red"]})
    try:
        os.rename(tmp_path / "g" / "a.png", os.fsencode(tmp_path / "g") + b"/caf\xe9.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    with pytest.raises(UserError, match=r"a file name that is not UTF-8: caf\\udce9.png; rename"):
        load_corpus(image_dir=str(tmp_path / "g"))


def test_files_that_are_no_pictures_by_their_ending_are_named(tmp_path, paint, colours, caplog):
    paint(tmp_path, {"a.png": colours["red"]})
    (tmp_path / "b.heic").write_text("x")
    with caplog.at_level("INFO"):
        load_corpus(image_dir=str(tmp_path))
    assert "1 file passed over, no pictures by their ending: b.heic" in caplog.text
