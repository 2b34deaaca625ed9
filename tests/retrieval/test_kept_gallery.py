"""run_retrieval.py over a gallery on disk, against itself over the folder of the same pictures."""

import json
import shutil
import tarfile

import pytest

import run_retrieval
from imagedex.encoding import vectors
from imagedex.errors import UserError
from imagedex.evaluation.rankings import read_rankings
from imagedex.gallery.gallery import Gallery
from imagedex.modeling.picture_reading import as_rgb
from imagedex.retrieval.kept_gallery import KeptGallery

QUERIES = [
    ("a red dog", "picture 0.png"),
    ("yellow", "dogs/picture 1.jpg"),
    ("the blue half is on the left", "copy.png"),
]


@pytest.fixture
def queries(tmp_path):
    lines = [json.dumps({"caption": caption, "image": image}) for caption, image in QUERIES]
    (tmp_path / "queries.jsonl").write_text("\n".join(lines))
    return tmp_path / "queries.jsonl"


@pytest.fixture
def gallery(tiny_xmatching, picture_folder, tmp_path):
    opened = Gallery.open(tmp_path / "gallery", str(tiny_xmatching), device="cpu")
    opened.add(picture_folder)
    return tmp_path / "gallery"


@pytest.fixture
def ask(queries, tmp_path):
    """ask(model, where, output, *flags) -> (rankings, metrics)"""

    def run(models, where, output, *flags):
        command = ["--model_name_or_path", *models, *where, "--queries", queries, "--output_dir", tmp_path / output]
        run_retrieval.main([str(part) for part in [*command, "--device", "cpu", *flags]])
        folder = tmp_path / output
        metrics = json.loads((folder / "metrics.json").read_text())
        metrics.pop("ms_per_query", None)
        return (folder / "rankings.jsonl").read_bytes(), metrics

    return run


def encodes_nothing(monkeypatch):
    def refuse(*_):
        raise AssertionError("a picture was encoded")

    monkeypatch.setattr(vectors, "picture_batches", refuse)


def test_its_vectors_answer_and_nothing_is_encoded(ask, gallery, tiny_xmatching, picture_folder, tmp_path, monkeypatch):
    expected = ask([tiny_xmatching], ["--image_dir", picture_folder], "folder")
    encodes_nothing(monkeypatch)
    assert ask([tiny_xmatching], ["--gallery", gallery], "kept") == expected
    assert not (tmp_path / "kept" / "index").exists() and (tmp_path / "kept" / "contact_sheet.jpg").is_file()
    assert ask([tiny_xmatching], ["--gallery", gallery], "kept") == expected  # the same command again


def test_a_model_that_the_gallery_is_not_of_encodes_its_pictures(
    ask, gallery, tiny_clip, picture_folder, tmp_path, capsys
):
    expected = ask([tiny_clip], ["--image_dir", picture_folder], "folder")
    assert ask([tiny_clip], ["--gallery", gallery], "kept") == expected
    assert f"has no vectors of {tiny_clip}" in capsys.readouterr().err and (tmp_path / "kept" / "index").is_dir()


def test_models_that_write_identifiers_find_what_is_in_it(
    ask, gallery, gallery_ids, save_generative, tiny_xmatching, picture_folder, tmp_path, monkeypatch
):
    writer = save_generative(tmp_path / "writer", "codebook_t5", "naive", gallery_ids)
    flags = ["--rerank_with", tiny_xmatching, "--contact_sheet_queries", 0]
    expected = ask([writer], ["--image_dir", picture_folder], "folder", *flags)
    encodes_nothing(monkeypatch)
    assert ask([writer], ["--gallery", gallery], "kept", *flags) == expected


def test_pictures_within_an_archive_are_drawn(ask, tiny_xmatching, picture_folder, tmp_path, monkeypatch, queries):
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for path in sorted(path for path in picture_folder.rglob("*") if path.suffix in (".png", ".jpg")):
            archive.add(path, path.relative_to(picture_folder).as_posix())
    Gallery.open(tmp_path / "gallery", str(tiny_xmatching), device="cpu").add(tmp_path / "shard.tar")
    first = KeptGallery(str(tmp_path / "gallery")).rows()[0]
    image_id, drawn = first["image_id"], as_rgb(picture_folder / first["image_id"])
    assert first["image"].tobytes() == drawn.tobytes() and first["image"].size == drawn.size
    queries.write_text(json.dumps({"caption": "a red dog", "image": image_id}))
    encodes_nothing(monkeypatch)
    ask([tiny_xmatching], ["--gallery", tmp_path / "gallery"], "kept")
    assert len(read_rankings(tmp_path / "kept" / "rankings.jsonl")[0].images) == 10
    assert (tmp_path / "kept" / "contact_sheet.jpg").is_file()


def test_what_is_wrong_is_one_line(ask, gallery, tiny_xmatching, picture_folder, tmp_path):
    def refused(says, where, output="never"):
        with pytest.raises(UserError, match=says) as raised:
            ask([tiny_xmatching], where, output)
        assert "\n" not in str(raised.value) and not (tmp_path / "never").exists()

    refused("there is no gallery; make one with: imagedex index", ["--gallery", tmp_path / "nowhere"])
    refused("--gallery and --image_dir: give one", ["--gallery", gallery, "--image_dir", picture_folder])
    refused("lies inside --gallery", ["--gallery", gallery], "gallery/answers")
    shutil.rmtree(gallery / "vectors")
    refused("lacks vectors of its pictures; give the index command again", ["--gallery", gallery], "begun")
