"""``shape_scenes``: the built-in corpus of small compositional pictures, drawn here, the same on every machine.

A scene has two to four shapes on a 3 x 3 grid, each with a shape, a colour, a size and a cell; no two of one scene
share both shape and colour, and no two scenes are the same. Five captions a scene are true of it and usually of no
other; :func:`imagedex.corpora.shape_captions.perfect_reader` says exactly what remains for a reader who makes no mistake.
Scene ``i`` depends on the seed and the scenes before it, so a smaller corpus is the beginning of a larger one.
"""

import hashlib
import io
import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import datasets
from tqdm.auto import tqdm

from imagedex.cli import write_atomically
from imagedex.corpora.schema import FormContents, Picture
from imagedex.errors import UserError

logger = logging.getLogger(__name__)

DEFAULT_SCENES = 600
MAX_SCENES = 100_000
GRID = 3  # rows and columns
CELL = 32  # units; a picture is GRID * CELL = 96 units wide, one pixel each by default
RADIUS = {"small": 8, "large": 14}  # units
_JITTER = {"small": 5, "large": 1}  # units: what keeps a shape inside its cell
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
SIZES = ("small", "large")
N_BACKGROUNDS = 4

# Part of the folder's name: raise it when pictures or captions change, so that no old drawing is taken for a new one.
VERSION = 1

Option = TypeVar("Option")


class Dice:
    """Random choices from blake2b: unlike ``random``, the same in every Python version and on every platform."""

    def __init__(self, *key: object):
        self._key = "/".join(map(str, key)).encode()
        self._thrown = 0

    def below(self, n: int) -> int:
        """A whole number in [0, n)."""
        digest = hashlib.blake2b(b"%s#%d" % (self._key, self._thrown), digest_size=8).digest()
        self._thrown += 1
        return int.from_bytes(digest, "big") % n

    def choice(self, options: tuple[Option, ...] | list[Option]) -> Option:
        return options[self.below(len(options))]

    def sample(self, options: tuple[Option, ...] | list[Option] | range, k: int) -> list[Option]:
        """``k`` different ones, in random order."""
        pool = list(options)
        return [pool.pop(self.below(len(pool))) for _ in range(k)]


@dataclass(frozen=True)
class Item:
    """One shape of a scene. ``dx``, ``dy``: units by which its centre lies off the middle of its cell."""

    shape: str
    colour: str
    size: str
    row: int
    column: int
    dx: int
    dy: int

    @property
    def centre(self) -> tuple[int, int]:
        """(x, y) in units, y downwards."""
        return (CELL // 2 + CELL * self.column + self.dx, CELL // 2 + CELL * self.row + self.dy)


@dataclass(frozen=True)
class Scene:
    """A scene graph: what captions speak about. The background and the exact centres are never spoken about."""

    items: tuple[Item, ...]
    background: int

    @property
    def signature(self) -> str:
        """What is in the scene and in which cell, in a fixed order; equal signatures would be equal scenes."""
        return "; ".join(
            sorted(f"{item.size} {item.colour} {item.shape} {item.row},{item.column}" for item in self.items)
        )


@lru_cache(maxsize=4)
def make_scenes(n_scenes: int = DEFAULT_SCENES, seed: int = 0) -> tuple[Scene, ...]:
    """``n_scenes`` different scenes."""
    scenes: list[Scene] = []
    seen: set[str] = set()
    attempt = 0
    while len(scenes) < n_scenes:
        scene = _throw_scene(Dice("scene", VERSION, seed, attempt))
        attempt += 1
        if scene.signature not in seen:
            seen.add(scene.signature)
            scenes.append(scene)
    return tuple(scenes)


def _throw_scene(dice: Dice) -> Scene:
    n_items = 2 + dice.below(3)
    kinds = dice.sample([(shape, colour) for shape in SHAPES for colour in COLOURS], n_items)
    cells = dice.sample(range(GRID * GRID), n_items)
    items = []
    for (shape, colour), cell in zip(kinds, cells, strict=True):
        size = dice.choice(SIZES)
        reach = _JITTER[size]
        dx, dy = (dice.below(2 * reach + 1) - reach for _ in range(2))
        items.append(Item(shape, colour, size, *divmod(cell, GRID), dx, dy))
    return Scene(tuple(items), dice.below(N_BACKGROUNDS))


def scene_id(number: int) -> str:
    """The ``image_id`` of scene ``number``."""
    return f"scene_{number:05d}.png"


def scene_number(image_id: str) -> int:
    return int(image_id.removeprefix("scene_").removesuffix(".png"))


def read(
    config_name: str | None = None, *, folder: str | os.PathLike | None = None, seed: int = 0, image_size: int = 96
) -> FormContents:
    """The corpus, its pictures drawn where they are not there yet.

    Args:
        config_name: the number of scenes, as text; :data:`DEFAULT_SCENES` when not given.
        folder: where the pictures are kept; below the datasets cache when not given.
        seed: another seed, other scenes.
        image_size: pixels, both ways.

    Raises:
        UserError: ``config_name`` is no number of scenes, or the folder cannot be written.
    """
    from imagedex.corpora.shape_captions import describe

    n_scenes = _number_of_scenes(config_name)
    if folder is None:
        name = f"v{VERSION}-seed{seed}-{image_size}px"
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "imagedex_shape_scenes" / name
    folder = Path(os.path.abspath(os.path.expanduser(folder)))
    scenes = make_scenes(n_scenes, seed)
    try:
        draw_missing(scenes, folder, image_size)
    except OSError as error:
        raise UserError(f"shape_scenes cannot be drawn into {folder}: {error.strerror or error}") from error
    pictures = [
        Picture(
            scene_id(number),
            str(folder / scene_id(number)),
            [caption.text for caption in describe(scene, number, seed)],
            scene.signature,
        )
        for number, scene in enumerate(scenes)
    ]
    return FormContents(f"built-in shape_scenes ({n_scenes} scenes, seed {seed})", {"train": pictures})


def draw_missing(scenes: tuple[Scene, ...], folder: Path, image_size: int = 96) -> int:
    """Draws those scenes whose file is not in ``folder``; each appears whole or not at all. Returns how many."""
    from imagedex.corpora.shape_drawing import draw_scene

    folder.mkdir(parents=True, exist_ok=True)
    there = set(os.listdir(folder))
    missing = [number for number in range(len(scenes)) if scene_id(number) not in there]
    for number in tqdm(missing, desc="Drawing shape_scenes", unit="scenes", disable=not missing):
        png = io.BytesIO()
        draw_scene(scenes[number], image_size).save(png, format="PNG")
        write_atomically(folder / scene_id(number), png.getvalue())
    return len(missing)


def _number_of_scenes(config_name: str | None) -> int:
    if config_name is None:
        return DEFAULT_SCENES
    text = str(config_name)
    if not text.isdecimal() or not 2 <= int(text) <= MAX_SCENES:
        raise UserError(f"--dataset_config_name {config_name}: shape_scenes takes a number of scenes, 2 to {MAX_SCENES}")
    return int(text)
