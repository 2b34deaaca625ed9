"""The built-in scenes: the same everywhere, all different, captions true as read by another parser."""

import hashlib
import itertools
import re
import time

import numpy as np
import pytest

from imagedex.corpora import load_corpus, split_corpus
from imagedex.corpora.shape_scenes.captions import MAX_WORDS, captions_of, perfect_reader
from imagedex.corpora.shape_scenes.corpus import draw_missing
from imagedex.corpora.shape_scenes.drawing import BACKGROUNDS, PALETTE, draw_scene
from imagedex.corpora.shape_scenes.graph import COLOURS, SHAPES, SIZES, Dice, make_scenes, scene_id, scene_number
from imagedex.errors import UserError

# ---------------------------------------------------------------- a reader of its own, from the text alone

COLOUR_OF = {"red": "red", "crimson": "red", "orange": "orange", "yellow": "yellow", "golden": "yellow",
             "green": "green", "emerald": "green", "blue": "blue", "azure": "blue", "purple": "purple",
             "violet": "purple", "pink": "pink", "rosy": "pink", "black": "black", "dark": "black"}  # fmt: skip
SHAPE_OF = {"circle": "circle", "disc": "circle", "square": "square", "box": "square", "triangle": "triangle",
            "wedge": "triangle", "star": "star", "ring": "ring", "hoop": "ring", "cross": "cross", "plus": "cross",
            "diamond": "diamond", "rhombus": "diamond", "heart": "heart"}  # fmt: skip
SIZE_OF = {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large", "huge": "large"}
THING = re.compile(
    rf"\ban? (?:(?P<size>{'|'.join(SIZE_OF)}) )?(?P<colour>{'|'.join(COLOUR_OF)}) (?P<shape>{'|'.join(SHAPE_OF)})\b"
)
NUMBERS = {"two": 2, "three": 3, "four": 4}


def third(units):
    """0, 1, 2: in which third of the 96 units a centre lies."""
    return int(units // 32)


def beside(words, first, second):
    (x, y), (u, v) = first.centre, second.centre
    if words in ("left of", "to the left of"):
        return third(x) < third(u)
    if words in ("right of", "to the right of"):
        return third(x) > third(u)
    if words in ("above", "over"):
        return third(y) < third(v)
    assert words in ("below", "under", "beneath"), words
    return third(y) > third(v)


def lies(words, item):
    x, y = item.centre
    if words in ("in the middle", "in the centre"):
        return third(x) == third(y) == 1
    for word in words.removeprefix("at the ").removeprefix("on the ").split():
        line, wanted = {
            "top": (y, 0),
            "upper": (y, 0),
            "bottom": (y, 2),
            "lower": (y, 2),
            "left": (x, 0),
            "right": (x, 2),
        }[word]
        if third(line) != wanted:
            return False
    return True


def read(text):
    """A sentence to (things, what follows each thing, number of shapes said)."""
    number = re.match(r"(two|three|four) shapes: ", text)
    things = list(THING.finditer(text))
    ends = [thing.start() for thing in things[1:]] + [len(text)]
    after = [text[thing.end() : end].strip() for thing, end in zip(things, ends, strict=True)]
    after = [re.sub(r"(^|\s*)(, with|,|and)$", "", words).strip() for words in after]
    return things, after, NUMBERS[number[1]] if number else None


def true_of(text, scene):
    """Tries every way in which the things could be items of the scene."""
    things, after, number = read(text)
    if number is not None and number != len(scene.items):
        return False
    for items in itertools.permutations(scene.items, len(things)):
        fits = all(
            SHAPE_OF[thing["shape"]] == item.shape
            and COLOUR_OF[thing["colour"]] == item.colour
            and (thing["size"] is None or SIZE_OF[thing["size"]] == item.size)
            for thing, item in zip(things, items, strict=True)
        )
        for place, words in enumerate(after):
            if fits and words:
                if words.startswith(("at ", "on ", "in ")):
                    fits = lies(words, items[place])
                else:
                    fits = beside(words, items[place], items[place + 1])
        if fits:
            return True
    return False


# ---------------------------------------------------------------- scenes


def test_scenes_are_different_and_well_formed():
    scenes = make_scenes(600, 0)
    assert len({scene.signature for scene in scenes}) == 600
    for scene in scenes:
        assert 2 <= len(scene.items) <= 4
        assert len({(item.row, item.column) for item in scene.items}) == len(scene.items)
        assert len({(item.shape, item.colour) for item in scene.items}) == len(scene.items)
        for item in scene.items:
            assert (third(item.centre[0]), third(item.centre[1])) == (item.column, item.row)
    every = [item for scene in scenes for item in scene.items]
    assert {item.shape for item in every} == set(SHAPES) and {item.colour for item in every} == set(COLOURS)
    assert {item.size for item in every} == set(SIZES) and {len(scene.items) for scene in scenes} == {2, 3, 4}


def test_a_smaller_corpus_is_the_beginning_of_a_larger_one():
    assert make_scenes(50, 0) == make_scenes(80, 0)[:50]
    assert captions_of(50, 0) == captions_of(80, 0)[:50]
    assert make_scenes(50, 0) != make_scenes(50, 1)


def test_same_scenes_captions_and_pixels_as_ever():
    """Digests written down once. If one changes, VERSION has to be raised (or Pillow's drawing has changed)."""
    text = "\n".join(caption.text for captions in captions_of(600, 0) for caption in captions)
    graphs = "\n".join(f"{scene.signature} {[item.centre for item in scene.items]}" for scene in make_scenes(600, 0))
    pixels = b"".join(draw_scene(scene).tobytes() for scene in make_scenes(600, 0)[:100])
    assert hashlib.blake2b(text.encode(), digest_size=8).hexdigest() == "2276ebf27857bfbf"
    assert hashlib.blake2b(graphs.encode(), digest_size=8).hexdigest() == "8504200b49f976b4"
    assert hashlib.blake2b(pixels, digest_size=8).hexdigest() == "d54b90d2e65b730f"


def test_dice():
    dice = Dice("a", 1)
    throws = [dice.below(6) for _ in range(6000)]
    assert throws[:50] == [Dice.below(again, 6) for again in [Dice("a", 1)] for _ in range(50)]
    assert min(np.bincount(throws, minlength=6)) > 900 and set(throws) == set(range(6))
    assert sorted(dice.sample(range(9), 9)) == list(range(9))


# ---------------------------------------------------------------- captions


def test_captions_are_true_short_and_different():
    scenes, words = make_scenes(600, 0), set()
    for scene, captions in zip(scenes, captions_of(600, 0), strict=True):
        assert len({caption.text for caption in captions}) == 5
        for caption in captions:
            assert len(caption.text.split()) <= MAX_WORDS == 20
            assert true_of(caption.text, scene), caption.text
            words.update(re.findall(r"\w+", caption.text))
    assert len(words) < 150
    assert "a orange" not in " ".join(c.text for captions in captions_of(600, 0) for c in captions)


def test_the_reader_of_this_test_tells_right_from_wrong():
    scene = make_scenes(600, 0)[1]  # large blue diamond 1,2; large purple cross 1,1
    assert scene.signature == "large blue diamond 1,2; large purple cross 1,1"
    assert true_of("a big violet plus left of a rhombus".replace("a rhombus", "a blue rhombus"), scene)
    for wrong in (
        "a big violet plus right of a blue rhombus",
        "a small violet plus left of a blue rhombus",
        "a violet plus above a blue rhombus",
        "three shapes: a violet plus and a blue rhombus",
        "a violet plus in the middle and a blue rhombus on the left",
        "a violet plus, a blue rhombus and a red star",
    ):
        assert not true_of(wrong, scene), wrong


def test_ceiling_against_brute_force():
    scenes = make_scenes(120, 3)
    texts = [caption.text for captions in captions_of(120, 3) for caption in captions]
    matching = [sum(true_of(text, scene) for scene in scenes) for text in texts]
    assert max(matching) > 1  # otherwise this test would show little
    expected = {f"hits@{k}": np.mean([min(1.0, k / n) for n in matching]) for k in (1, 2, 10)}
    expected["mrr"] = np.mean([np.mean([1 / rank for rank in range(1, n + 1)]) for n in matching])
    assert perfect_reader(n_scenes=120, seed=3, ks=(1, 2, 10)) == pytest.approx(expected, abs=1e-12)


def test_ceiling_of_some_queries_in_a_part_of_the_gallery():
    corpus = load_corpus("shape_scenes", "80")
    splits = split_corpus(corpus, held_out_images=0.5, eval_gallery="held_out")
    queries = [text for captions in splits.evaluation["captions"] for text in captions]
    scenes = [make_scenes(80, 0)[scene_number(image_id)] for image_id in splits.gallery["image_id"]]
    expected = np.mean([1 / sum(true_of(text, scene) for scene in scenes) for text in queries])
    found = perfect_reader(queries, splits.gallery["image_id"], n_scenes=80)
    assert found["hits@1"] == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="own scene is not in the gallery"):
        perfect_reader(queries, splits.gallery["image_id"][1:], n_scenes=80)


def test_ceiling_of_the_default_corpus():
    ceiling = perfect_reader()
    assert ceiling["hits@1"] == pytest.approx(0.9891, abs=5e-4) and ceiling["hits@10"] == 1.0


# ---------------------------------------------------------------- pictures


def test_pictures_show_what_the_graph_says():
    for scene in make_scenes(100, 0):
        pixels = np.asarray(draw_scene(scene)).astype(int)
        assert pixels.shape == (96, 96, 3)
        for item in scene.items:
            # Count the pixels of exactly this colour in the item's cell: there, enough, and more when large.
            cell = pixels[32 * item.row : 32 * item.row + 32, 32 * item.column : 32 * item.column + 32]
            covered = int((cell == PALETTE[item.colour]).all(-1).sum())
            assert covered > 150 if item.size == "large" else 40 < covered < 230, (item, covered)
        cells = {(item.row, item.column) for item in scene.items}
        for row, column in set(itertools.product(range(3), repeat=2)) - cells:
            middle = pixels[32 * row + 8 : 32 * row + 24, 32 * column + 8 : 32 * column + 24]
            assert (middle == BACKGROUNDS[scene.background]).all()


def test_pictures_of_another_size():
    scene = make_scenes(10, 0)[0]
    small, large = draw_scene(scene, 96), draw_scene(scene, 192)
    assert large.size == (192, 192)
    difference = np.abs(np.asarray(large.reduce(2)).astype(int) - np.asarray(small))
    assert difference.mean() < 2


# ---------------------------------------------------------------- the corpus


def test_corpus(tmp_path, own_cache):
    corpus = load_corpus("shape_scenes", "30", image_dir=str(tmp_path / "scenes"))
    train = corpus.splits["train"]
    assert corpus.form == "built-in shape_scenes (30 scenes, seed 0)" and list(corpus.splits) == ["train"]
    assert train["image_id"][:] == [scene_id(number) for number in range(30)]
    assert train["captions"][:] == [[caption.text for caption in captions] for captions in captions_of(30, 0)]
    assert train[3]["image"].tobytes() == draw_scene(make_scenes(30, 0)[3]).tobytes()
    assert sorted(path.name for path in (tmp_path / "scenes").iterdir()) == train["image_id"][:]
    inside = load_corpus("shape_scenes", "30").splits["train"].with_format("arrow")[:]["image"].to_pylist()
    assert all(stored["path"].startswith(str(own_cache)) for stored in inside)


def test_default_number_and_seed():
    assert len(load_corpus("shape_scenes").splits["train"]) == 600
    first, second = (load_corpus("shape_scenes", "5", seed=seed).splits["train"] for seed in (0, 1))
    assert first["captions"][:] != second["captions"][:]
    assert first[0]["image"].tobytes() != second[0]["image"].tobytes()


def test_drawn_once_and_mended(tmp_path):
    scenes = make_scenes(8, 0)
    assert draw_missing(scenes, tmp_path) == 8
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / scene_id(5)).unlink()
    time.sleep(0.01)
    assert draw_missing(scenes, tmp_path) == 1 and draw_missing(scenes, tmp_path) == 0
    again = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert [name for name in times if times[name] != again[name]] == [scene_id(5)] and len(again) == 8


@pytest.mark.parametrize("number", ["many", "1", "-3", "0", "1e3", "100001", "²"])
def test_wrong_number_of_scenes(number):
    with pytest.raises(UserError, match="shape_scenes takes a number of scenes, 2 to 100000"):
        load_corpus("shape_scenes", number)


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be drawn into"):
        load_corpus("shape_scenes", "5", image_dir=str(tmp_path / "file"))
