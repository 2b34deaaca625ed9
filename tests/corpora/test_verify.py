"""A picture that cannot be read is named, and left out only on request."""

import os

import pytest
from datasets import Dataset, Image

from imagedex.corpora import verify
from imagedex.corpora.schema import Picture, build_dataset
from imagedex.corpora.verify import drop_missing, verify_images
from imagedex.errors import UserError


@pytest.fixture
def pictures(tmp_path, paint, colours):
    names = [f"{number}.jpg" for number in range(12)]
    paint(tmp_path, dict.fromkeys(names, colours["blue"]))
    return build_dataset([Picture(name, str(tmp_path / name), ["text"]) for name in names], "train")


def spoil(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def test_all_readable(pictures):
    kept, left_out = verify_images(pictures)
    assert kept is pictures and left_out == []


def test_truncated_picture_is_named(tmp_path, pictures):
    spoil(tmp_path / "3.jpg")
    with pytest.raises(UserError, match=r"1 picture of the train split unreadable: \S*/3\.jpg \(OSError.*skip"):
        verify_images(pictures)


def test_left_out_on_request(tmp_path, pictures, caplog):
    spoil(tmp_path / "3.jpg")
    (tmp_path / "5.jpg").write_text("no picture")
    kept, left_out = verify_images(pictures, unreadable_images="skip")
    assert kept["image_id"][:] == [f"{number}.jpg" for number in range(12) if number not in (3, 5)]
    assert left_out == [str(tmp_path / "3.jpg"), str(tmp_path / "5.jpg")]
    assert "left out 2 pictures" in caplog.text and "3.jpg" in caplog.text and "5.jpg" in caplog.text


def test_ten_are_listed_and_the_rest_counted(tmp_path, pictures):
    for number in range(11):
        spoil(tmp_path / f"{number}.jpg")
    with pytest.raises(UserError, match=r"11 pictures .*9\.jpg \([^)]*\) and 1 more; ") as caught:
        verify_images(pictures)
    assert "10.jpg" not in str(caught.value)


def test_nothing_left(tmp_path, pictures):
    for number in range(12):
        spoil(tmp_path / f"{number}.jpg")
    with pytest.raises(UserError, match="all 12 pictures"):
        verify_images(pictures, unreadable_images="skip")


def test_outcome_is_cached_until_a_file_changes(tmp_path, pictures, monkeypatch):
    verify_images(pictures)
    monkeypatch.setattr(verify, "_problem", lambda stored: pytest.fail("decoded again"))
    assert verify_images(pictures)[1] == []
    monkeypatch.undo()
    spoil(tmp_path / "7.jpg")
    with pytest.raises(UserError, match=r"7\.jpg"):
        verify_images(pictures)


def test_a_mended_file_is_taken_up_even_with_its_old_time_and_size(tmp_path, pictures):
    path = tmp_path / "7.jpg"
    whole, status = path.read_bytes(), path.stat()
    path.write_bytes(b"\0" * len(whole))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError):
        verify_images(pictures)
    path.write_bytes(whole)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert verify_images(pictures)[1] == []


def test_embedded_pictures(tmp_path, pictures):
    files = [(tmp_path / f"{number}.jpg").read_bytes() for number in range(3)]
    files[1] = files[1][:100]
    stored = [{"bytes": content, "path": f"{number}.jpg"} for number, content in enumerate(files)]
    columns = {"image_id": ["a", "b", "c"], "image": stored, "captions": [["x"]] * 3, "source_id": [""] * 3}
    embedded = Dataset.from_dict(columns, features=pictures.features)
    assert embedded.features["image"] == Image()
    with pytest.raises(UserError, match=r"unreadable: b \("):
        verify_images(embedded)
    kept, left_out = verify_images(embedded, unreadable_images="skip", num_proc=2)
    assert kept["image_id"][:] == ["a", "c"] and left_out == ["b"]


def test_missing(tmp_path, pictures):
    rows = [Picture("0.jpg", str(tmp_path / "0.jpg"), ["x"]), Picture("gone.jpg", str(tmp_path / "gone.jpg"), ["y"])]
    with pytest.raises(UserError, match=r"gone\.jpg"):
        drop_missing(rows, unreadable_images="error", split="train")
    assert drop_missing(rows, unreadable_images="skip", split="train") == (rows[:1], [str(tmp_path / "gone.jpg")])
    with pytest.raises(UserError, match="all 1 picture "):
        drop_missing(rows[1:], unreadable_images="skip", split="train")


def test_unknown_choice(pictures):
    with pytest.raises(UserError, match="--unreadable_images replace: choose one of error, skip"):
        verify_images(pictures, unreadable_images="replace")
