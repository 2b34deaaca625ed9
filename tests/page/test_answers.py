"""Many questions at once are answered as each alone; pictures are found by their content; what visitors send is bounded."""

import io
import threading
from concurrent.futures import CancelledError

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from imagedex.errors import UserError
from imagedex.gallery import catalog
from imagedex.gallery.gallery import Gallery
from imagedex.page import uploads
from imagedex.page.answers import NOTHING_ASKED, Question, answers
from imagedex.page.service import Service
from imagedex.page.together import Together


def titles(answer):
    return [card.title for card in answer.cards]


def scores(answer):
    return [card.score for card in answer.cards]


def test_questions_that_wait_together_are_answered_as_each_alone(knowing):
    service = Service([knowing])
    key = knowing.table["key"][2].as_py().hex()
    questions = [
        Question(["a dog"], fold=False, top_k=9),
        Question(["red grass", "a dog"], without="left", fold=False, top_k=3),
        Question(["the left side is blue and yellow"], where="folder == 'sea'", fold=False, top_k=50),
        Question(["a dog"], like=[key], fold=False, top_k=4),
        Question(["a dog"], top_k=2),
        Question([], like=[key], where="folder == 'wood'"),
    ]
    mistakes = [
        (Question(["a dog"], where="fodler == 1"), "did you mean folder"),
        (Question([" "], without="dog"), NOTHING_ASKED),
        (Question(["a dog"], like=["0" * 32]), "not in the gallery"),
        (Question(["a dog"], keep=0.1, where="folder == 'wood'"), None),
    ]
    asked = [(question, ()) for question in [*questions, *(question for question, _ in mistakes)]]
    together = answers(knowing, 0, asked, service.path)
    for question, answer in zip(questions, together, strict=False):
        alone = answers(knowing, 0, [(question, ())], service.path)[0]
        assert titles(alone) == titles(answer) and scores(alone) == pytest.approx(scores(answer), abs=1e-5)
    for (_, says), answer in zip(mistakes, together[len(questions) :], strict=True):
        assert says is None or (isinstance(answer, UserError) and says in str(answer))
    found = knowing.search("a dog", top_k=9)
    assert titles(together[0]) == [one.image_id for one in found]
    where = knowing.search("the left side is blue and yellow", top_k=50, where="folder == 'sea'")
    assert titles(together[2]) == [one.image_id for one in where]


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8])
def test_the_cut_off_marks_what_the_gallery_would_leave_out(knowing, keep):
    answer = Service([knowing]).ask(0, Question(["a dog"], fold=False, top_k=50, keep=keep)).result()
    kept = {found.image_id for found in knowing.search("a dog", top_k=50, keep=keep)}
    assert {card.title for card in answer.cards if card.probable} == kept
    assert len(answer.cards) == len(knowing)  # the rest is there, to be shown


def test_what_came_in_meanwhile_is_answered_in_one_go():
    started, go, goes = threading.Event(), threading.Event(), []

    def answer(items):
        goes.append(list(items))
        started.set()
        go.wait(30)
        return [ValueError(item) if item == 3 else 10 * item for item in items]

    turns = Together(answer, most=4)
    first = turns.ask(0)
    assert started.wait(30)
    waiting = [turns.ask(number) for number in range(1, 7)]
    waiting[1].cancel()  # who asked 2 has left
    go.set()
    assert first.result(30) == 0 and [waiting[place].result(30) for place in (0, 3, 4, 5)] == [10, 40, 50, 60]
    with pytest.raises(ValueError, match="3"):
        waiting[2].result(30)
    with pytest.raises(CancelledError):
        waiting[1].result(30)
    assert goes == [[0], [1, 3, 4], [5, 6]]
    assert turns.alone(lambda: "alone").result(30) == "alone"


def test_an_error_of_all_is_each_one_s():
    def answer(items):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        Together(answer).ask(1).result(30)


def test_what_one_visitor_sends_spoils_no_other_s_question(gallery):
    """Half a character is no text that a tokenizer reads."""
    service, go = Service([gallery]), threading.Event()
    service._turns.alone(go.wait, 30)  # so that they wait together
    asked = [service.ask(0, Question([text], top_k=2)) for text in ("a dog", "half \ud800", "red grass")]
    go.set()
    with pytest.raises(TypeError):
        asked[1].result(30)
    for future, text in ((asked[0], "a dog"), (asked[2], "red grass")):
        assert titles(future.result(30)) == [one.image_id for one in gallery.search(f"text:{text}", top_k=2)]


def test_a_path_by_its_content_against_a_dictionary():
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 3, (400, 16), dtype=np.uint8)  # many share their first bytes, some end in zeros
    keys[7] = keys[90] = 0
    row = dict.fromkeys(catalog.COLUMNS)
    rows = [row | {"key": key.tobytes(), "path": f"{number}.jpg"} for number, key in enumerate(keys)]
    table = pa.concat_tables([pa.Table.from_pylist(part, schema=catalog.SCHEMA) for part in (rows[:150], rows[150:])])
    expected = {}
    for one in rows:
        expected.setdefault(one["key"], one["path"])
    known = catalog.Keys(table)
    for key, path in expected.items():
        assert known.path(key) == path
    assert known.path(b"\x09" * 16) is None and known.path(b"\x00" * 15 + b"\x09") is None
    assert catalog.Keys(catalog.empty()).path(bytes(16)) is None


def test_what_is_indexed_while_the_page_is_up_is_found_and_what_is_gone_is_not(tiny_xmatching, paint, tmp_path):
    for number in range(3):
        paint(tmp_path / "photos" / f"{number}.png", number)
    model = str(tiny_xmatching)
    Gallery.open(tmp_path / "g", model, device="cpu").add(tmp_path / "photos")
    service = Service([Gallery.open(tmp_path / "g", device="cpu")])
    gone = service.galleries[0].table["key"][0].as_py().hex()
    assert service.thumbnail(0, gone).result() is not None
    paint(tmp_path / "photos" / "3.png", 3)
    (tmp_path / "photos" / "0.png").unlink()
    Gallery.open(tmp_path / "g", device="cpu").add(tmp_path / "photos")
    answer = service.ask(0, Question(["a dog"], fold=False)).result()
    assert sorted(card.title for card in answer.cards) == ["1.png", "2.png", "3.png"]
    assert service.path(0, gone) is None and service.path(0, answer.cards[0].key)
    assert service.thumbnail(0, gone).result() is None
    paint(tmp_path / "photos" / "0.png", 0)
    Gallery.open(tmp_path / "g", device="cpu").add(tmp_path / "photos")
    service.ask(0, Question(["a dog"])).result()
    assert service.thumbnail(0, gone).result() is not None  # it came back
    for wrong in (
        "",
        "x" * 32,
        "0" * 31,
        "../" * 10 + "ab",
        "é" * 32,
        " " * 32,
        "00 " * 10 + "00",
        7,
        None,
        ["0"] * 32,
    ):
        assert service.path(0, wrong) is None and service.path(-1, gone) is None and service.path(1, gone) is None


def test_a_picture_is_drawn_upright_and_small(tiny_xmatching, tmp_path):
    (tmp_path / "photos").mkdir()
    picture, exif = Image.new("RGB", (1600, 800), "red"), Image.Exif()
    picture.paste("blue", (0, 0, 800, 800))
    exif[0x0112] = 6  # to be turned by a quarter, clockwise: what was left is above
    picture.save(tmp_path / "photos" / "a.jpg", exif=exif)
    gallery = Gallery.open(tmp_path / "g", str(tiny_xmatching), device="cpu")
    gallery.add(tmp_path / "photos")
    service, key = Service([gallery]), gallery.table["key"][0].as_py().hex()
    for content, longest in ((service.thumbnail(0, key), 360), (service.picture(0, key, 500), 500)):
        drawn = Image.open(io.BytesIO(content.result()))
        assert drawn.size == (longest // 2, longest)
        assert drawn.getpixel((90, 20))[2] > 200 and drawn.getpixel((90, longest - 20))[0] > 200


def test_what_visitors_send_is_bounded_read_once_and_deleted(gallery, paint, tmp_path, monkeypatch):
    service, said = Service([gallery]), []
    monkeypatch.setattr(uploads, "MOST_UPLOADS", 4)
    monkeypatch.setattr(uploads, "MOST_PIXELS", 10_000)
    files = [paint(tmp_path / "good.png", 900), tmp_path / "program.eps", paint(tmp_path / "huge.png", 2, (101, 100))]
    files[1].write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    files.append(tmp_path / "broken.png")
    files[3].write_bytes(files[0].read_bytes()[:300])
    files.append(paint(tmp_path / "fifth.png", 3))
    seen = uploads.read_uploads(service, [str(file) for file in files], said.append)
    assert [one.name for one in seen] == ["good.png"] and not any(file.exists() for file in files)
    assert said == ["program.eps cannot be read", "huge.png has more than 0 million pixels", "broken.png cannot be read",
                    "1 pictures beyond 4 are left out"]  # fmt: skip
    answer = service.ask(0, Question(picture=seen[0], top_k=3), seen).result()
    assert answer.cards[0].upload is seen[0] and answer.cards[0].score == pytest.approx(1, abs=1e-5)


def test_a_model_that_writes_identifiers_is_asked_with_pictures_that_are_there(save_generative, gallery, tmp_path):
    names = [name for name in gallery.table["image_id"].to_pylist() if "/" in name]
    model = str(save_generative(tmp_path / "model", "vision_grounded_t5", "atomic", names))
    service = Service([gallery, Gallery.open(gallery.folder, model, device="cpu")])
    key, path = gallery.table["key"][0].as_py().hex(), gallery.table["path"][0].as_py()
    answer = service.ask(1, Question(like=[key], top_k=3)).result()
    assert titles(answer) == [one.image_id for one in service.galleries[1].search(f"image:{path}", top_k=3)]
    for number in (0, 1):
        with pytest.raises(UserError, match="not in the gallery any more"):
            service.ask(number, Question(like=["0" * 32])).result()
        with pytest.raises(UserError, match="not in the gallery any more"):
            service.ask(number, Question(like=[7])).result()
