"""Galleries from folders and corpora."""

import datasets
import pytest
from PIL import Image

from imagedex.errors import UserError
from imagedex.retrieval.gallery import read_gallery


def test_a_folder_is_read_with_everything_below(picture_folder):
    gallery = read_gallery(str(picture_folder))
    expected = sorted(
        path.relative_to(picture_folder).as_posix()
        for path in picture_folder.rglob("*")
        if path.suffix in (".png", ".jpg")
    )
    assert list(gallery["image_id"]) == expected and len(expected) == 23
    assert any(image_id.startswith("dogs/running/") for image_id in expected)
    for image_id, picture in zip(expected[:3], gallery["image"][:3], strict=True):
        assert picture.size == Image.open(picture_folder / image_id).size


def test_a_corpus_is_read_with_its_pictures(flickr_folder):
    gallery = read_gallery(dataset_name=str(flickr_folder))
    assert len(gallery) == 12 and "red_blue.jpg" in list(gallery["image_id"])
    assert read_gallery(dataset_name=str(flickr_folder), split="train")["image_id"][:] == gallery["image_id"][:]
    with pytest.raises(UserError, match="--dataset_split test: the corpus has train"):
        read_gallery(dataset_name=str(flickr_folder), split="test")


def test_splits_are_joined(tmp_path):
    for split, count in (("train", 3), ("validation", 2)):
        (tmp_path / split).mkdir()
        rows = []
        for number in range(count):
            name = f"{split}_{number}.png"
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / split / name)
            rows.append({"file_name": name, "text": f"picture {number}"})
        datasets.Dataset.from_list(rows).to_json(tmp_path / split / "metadata.jsonl")
    assert len(read_gallery(dataset_name=str(tmp_path))) == 5
    assert len(read_gallery(dataset_name=str(tmp_path), split="validation")) == 2


def test_unreadable_pictures(picture_folder, tmp_path):
    (tmp_path / "good.png").write_bytes((picture_folder / "copy.png").read_bytes())
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match="bad.jpg"):
        read_gallery(str(tmp_path))
    assert list(read_gallery(str(tmp_path), unreadable_images="skip")["image_id"]) == ["good.png"]


@pytest.mark.parametrize("name", ["missing", "empty", "textual"])
def test_folders_without_pictures(tmp_path, name):
    if name != "missing":
        (tmp_path / name).mkdir()
    if name == "textual":
        (tmp_path / name / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=name):
        read_gallery(str(tmp_path / name))
