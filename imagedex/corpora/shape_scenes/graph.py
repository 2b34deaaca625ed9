"""The scene graphs of ``shape_scenes``: what is in each picture, thrown by dice that fall alike on every machine.

A scene has two to four shapes on a 3 x 3 grid, each with a shape, a colour, a size and a cell; no two of one scene
share both shape and colour, and no two scenes are the same.
Scene ``i`` depends on the seed and the scenes before it, so a smaller corpus is the beginning of a larger one.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

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
def make_scenes(n_scenes: int, seed: int = 0) -> tuple[Scene, ...]:
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
