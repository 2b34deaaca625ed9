"""What a number given as an argument may be: found before anything is read, and said in one line."""

import math
import os
from typing import NamedTuple

from imagedex.errors import UserError

INTEGERS = 2**63 - 1  # what torch and numpy can hold
WORKERS = max(32, 4 * (os.cpu_count() or 1))  # helper processes; more of them only wait for each other
PIXELS = 4096  # the longest side of a picture that enters a model
TOKENS = 100_000  # the longest text that enters a model
BATCH = 2**20
MOST_BEAMS = 10_000


class Bounds(NamedTuple):
    """From least to most, both allowed; None: no bound. above: least itself is not allowed."""

    least: float | None = None
    most: float | None = None
    above: bool = False

    def admit(self, value: float) -> bool:
        if isinstance(value, float) and math.isinf(value):  # only where it is meant
            return value == self.most
        least = -INTEGERS if self.least is None else self.least
        most = INTEGERS if self.most is None else self.most
        return (value > least if self.above else value >= least) and value <= most  # no NaN is

    def __str__(self):
        if self.least is None and self.most is None:
            return "a finite number"
        if self.most is None:
            return f"more than {self.least}" if self.above else f"{self.least} or more"
        return f"more than {self.least}, up to {self.most}" if self.above else f"{self.least} to {self.most}"


SEED = Bounds(0, 2**32 - 1)
RATE = Bounds(0, 1000)
SHARE = Bounds(0, 1)
COUNT = Bounds(1)
SOME_OR_NONE = Bounds(0)


def bounds_of(dataclass_type) -> dict[str, Bounds]:
    """What the class and those it extends say in `_bounds`."""
    found = {}
    for base in reversed(dataclass_type.__mro__):
        found |= base.__dict__.get("_bounds", {})
    return found


def check_bounds(dataclass_type, values: dict) -> None:
    """Raises a `ValueError` for the first number that is not within its bounds; without bounds, that is not finite."""
    bounds = bounds_of(dataclass_type)
    for name, value in values.items():
        allowed = bounds.get(name, Bounds())
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool) and not allowed.admit(number):
                shown = str(number) if isinstance(number, float) or abs(number) <= INTEGERS else "so large"
                raise ValueError(f"--{name} {shown}: give {allowed}")


def check_pixels(image_processor, where: str) -> None:
    """Raises `UserError` for an image processor that would make pictures of no size or of a huge one.

    Args: image_processor, with `size` and `crop_size` (a SizeDict, a number or None); where, how it was named.
    """
    for field in ("size", "crop_size"):
        sides = getattr(image_processor, field, None)
        names = ("height", "width", "shortest_edge")
        sides = {name: getattr(sides, name, None) for name in names} if hasattr(sides, "height") else {"side": sides}
        for name, side in sides.items():
            if isinstance(side, int | float) and not Bounds(1, PIXELS).admit(side):
                raise UserError(f"{where}: {field} says {name} {side}; give {Bounds(1, PIXELS)}")
