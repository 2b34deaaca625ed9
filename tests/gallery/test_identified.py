"""A gallery asked with a model that writes identifiers, against the exhaustive scores of what it may find."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from imagedex import cli
from imagedex.errors import UserError
from imagedex.gallery.gallery import Gallery
from imagedex.identifiers.generative_model import load_generative
from imagedex.modeling.constrained_decoding import score_identifiers

SENTENCE = "a red dog beside the grass"
GONE = ["sea/gone.png", "wood/gone.png"]  # learned, and not in the folder


def paint(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (16, 24 + number, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Nine pictures, the last of them unknown to the models, and a file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(8):
        paint(folder / ("sea" if number % 2 else "wood") / f"{number}.png", number)
    paint(folder / "sea" / "new.png", 8)
    (folder / "wood" / "broken.png").write_bytes(b"no picture")
    return folder


KNOWN = sorted(f"{'sea' if number % 2 else 'wood'}/{number}.png" for number in range(8))


@pytest.fixture(scope="module")
def models(save_generative, tmp_path_factory):
    folder, image_ids = tmp_path_factory.mktemp("models"), [*GONE, *KNOWN]
    schemes = {"codebook_t5": "naive", "vision_grounded_t5": "atomic", "t5": "naive"}
    return {kind: str(save_generative(folder / kind, kind, scheme, image_ids)) for kind, scheme in schemes.items()}


def expected(folder, image_ids, **asked):
    """(image_id, score) of these pictures, best first. Args: asked, for the processor."""
    parts = load_generative(folder)
    scores = score_identifiers(parts.model, parts.identifiers, dict(parts.processor(**asked, return_tensors="pt")))[0]
    own = [(image_id, scores[parts.identifiers.row(image_id)].item()) for image_id in image_ids]
    return sorted(own, key=lambda pair: -pair[1])


def check(found, wanted):
    assert [one.image_id for one in found] == [image_id for image_id, _ in wanted]
    assert [one.score for one in found] == pytest.approx([score for _, score in wanted], abs=1e-4)


@pytest.mark.parametrize("kind", ["codebook_t5", "vision_grounded_t5"])
def test_it_answers_sentences_and_pictures_under_filters(kind, models, photos, tmp_path, caplog):
    gallery = Gallery.open(tmp_path / "g", models[kind], device="cpu")
    changes = gallery.add(photos)
    assert (len(changes.added), list(changes.unreadable), len(gallery)) == (10, ["wood/broken.png"], 8)
    assert "1 of 9 pictures have no identifier" in caplog.text and "the first is sea/new.png" in caplog.text
    assert caplog.text.count("--add_new_images") == 1 and not (tmp_path / "g" / "vectors").exists()
    gallery = Gallery.open(tmp_path / "g", device="cpu")  # the model is the gallery's own
    check(gallery.search(SENTENCE, top_k=20), expected(models[kind], KNOWN, text=[SENTENCE]))
    sea = [image_id for image_id in KNOWN if image_id.startswith("sea/")]
    wanted = expected(models[kind], sea, text=[SENTENCE])
    check(gallery.search(SENTENCE, where="folder == 'sea'"), wanted)
    check(gallery.search(SENTENCE, where="folder == 'sea'", top_k=1), wanted[:1])
    assert (
        gallery.search(SENTENCE, where="width > 1000")
        == gallery.search(SENTENCE, where="image_id == 'sea/new.png'")
        == []
    )
    shown = photos / "sea" / "new.png"
    check(gallery.search(str(shown)), expected(models[kind], KNOWN, images=[shown]))
    assert gallery.search(SENTENCE)[0].picture.size == Image.open(gallery.search(SENTENCE)[0].path).size


def test_pictures_come_and_go(models, photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    gallery = Gallery.open(tmp_path / "g", models["codebook_t5"], device="cpu")
    gallery.add(folder)
    (folder / "sea" / "1.png").unlink()
    paint(folder / "sea" / "gone.png", 9)
    changes = gallery.add(folder)
    assert (changes.added, changes.removed) == (["sea/gone.png"], ["sea/1.png"])
    assert gallery.remove(where="folder == 'wood'") == [f"wood/{name}.png" for name in (0, 2, 4, 6, "broken")]
    left = ["sea/3.png", "sea/5.png", "sea/7.png", "sea/gone.png"]
    for one in (gallery, Gallery.open(tmp_path / "g", device="cpu")):
        check(one.search(SENTENCE), expected(models["codebook_t5"], left, text=[SENTENCE]))


def test_a_dual_encoders_gallery_is_asked_with_it_and_not_changed(models, photos, tiny_xmatching, tmp_path):
    dual = Gallery.open(tmp_path / "g", str(tiny_xmatching), device="cpu")
    dual.add(photos)
    before = dual.search(SENTENCE)
    gallery = Gallery.open(tmp_path / "g", models["vision_grounded_t5"], device="cpu")
    check(gallery.search(SENTENCE), expected(models["vision_grounded_t5"], KNOWN, text=[SENTENCE]))
    for change in (lambda: gallery.add(photos), lambda: gallery.remove(["sea/1.png"])):
        with pytest.raises(UserError, match="holds vectors of .*; change its pictures with that model"):
            change()
    again = Gallery.open(tmp_path / "g", device="cpu").search(SENTENCE)
    assert [(one.image_id, one.score) for one in again] == [(one.image_id, one.score) for one in before]


def test_a_dual_encoder_does_not_open_a_gallery_without_vectors(models, photos, tiny_xmatching, tmp_path):
    Gallery.open(tmp_path / "g", models["codebook_t5"], device="cpu").add(photos)
    with pytest.raises(UserError, match="make another"):
        Gallery.open(tmp_path / "g", str(tiny_xmatching), device="cpu")
    other = Gallery.open(tmp_path / "g", models["t5"], device="cpu")
    check(other.search(SENTENCE), expected(models["t5"], KNOWN, text=[SENTENCE]))


def test_what_it_cannot_do_is_one_line(models, photos, tmp_path):
    gallery = Gallery.open(tmp_path / "g", models["codebook_t5"], device="cpu")
    gallery.add(photos)
    for says, ask in {
        "one sentence or one picture, not with several": lambda: gallery.search("a dog", "-", "a leash"),
        "keeps no cut-off": lambda: gallery.search("a dog", keep=0.9),
        "must be 1 or more": lambda: gallery.search("a dog", top_k=0),
        "is no filter|unknown|no column": lambda: gallery.search("a dog", where="colour == 'red'"),
        "cannot read the picture": lambda: gallery.search(f"image:{photos / 'wood' / 'broken.png'}"),
        "has no vectors": lambda: gallery.export(tmp_path / "v.parquet"),
        "has no vectors ": lambda: gallery.query_vector(["a dog"]),
        "has no vectors;": lambda: gallery.search_vectors(np.eye(1, 16, dtype=np.float32)),
        "reads sentences alone": lambda: Gallery.open(tmp_path / "g", models["t5"]).search(
            str(photos / "sea" / "1.png")
        ),
    }.items():
        with pytest.raises(UserError, match=says.strip(" ;")) as raised:
            ask()
        assert "\n" not in str(raised.value)


def test_a_folder_of_which_it_knows_nothing_is_refused_and_nothing_written(models, photos, tmp_path):
    gallery = Gallery.open(tmp_path / "g", models["codebook_t5"], device="cpu")
    with pytest.raises(UserError, match="not one of the 5 in the gallery.*from the same root"):
        gallery.add(photos / "sea")
    assert not (tmp_path / "g" / "catalog.parquet").exists()


def test_by_command(models, photos, tmp_path, capsys):
    there = ["--gallery", str(tmp_path / "g"), "--device", "cpu"]
    cli.main(["index", str(photos), *there, "--model", models["codebook_t5"]])
    assert capsys.readouterr().out.startswith("10 added, 0 unchanged, 1 unreadable; 8 pictures in")
    cli.main(["search", SENTENCE, *there, "--top_k", "3", "--json", "--where", "folder == 'sea'"])
    answer = json.loads(capsys.readouterr().out)
    sea = [image_id for image_id in KNOWN if image_id.startswith("sea/")]
    wanted = expected(models["codebook_t5"], sea, text=[SENTENCE])[:3]
    assert answer["images"] == [image_id for image_id, _ in wanted]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["search", SENTENCE, "+", "a leash", *there])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_pictures_are_removed_though_the_model_knows_none_of_those_that_stay(photos, models, tmp_path, capsys):
    there = ["--gallery", str(tmp_path / "g"), "--device", "cpu"]
    cli.main(["index", str(photos), *there, "--model", models["vision_grounded_t5"]])
    capsys.readouterr()
    cli.main(["remove", *KNOWN, *there, "--json"])
    assert json.loads(capsys.readouterr().out) == {"removed": KNOWN, "pictures": 1}
