"""What is asked of a gallery: parts that are added and taken off, each a sentence or a picture.

"two dogs on a beach"            a sentence
a.jpg                            a picture, where a file of that name is there
s.tar::512+99  t.parquet::5:jpg  one within an archive or a table, as `search` prints it
text:a.jpg  image:a.jpg          one or the other, whatever is there
"2:dog"                          counts twice
- leash                          the next part is taken off; + is the default
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from imagedex.errors import UserError

if TYPE_CHECKING:  # a mistake is said before torch is loaded
    import torch

LARGEST_WEIGHT = 1e6
_WITHIN = re.compile(r"(.+)::(?:\d+\+\d+|\d+:.+)")  # see `imagedex.gallery.pictures`
_WEIGHT = re.compile(r"(\d+(?:\.\d+)?):(?=\S)")


@dataclass
class Part:
    """A sentence or a picture (its path, or itself), and how much it counts; a negative weight takes it off. vector: (D,) of
    length 1, where it is known already."""

    text: str = ""
    path: str = ""
    weight: float = 1.0
    picture: Image.Image | None = None
    vector: "torch.Tensor | None" = None


def read_part(word: str, weight: float = 1.0) -> Part:
    """One part. Raises `UserError`: nothing in it, or a picture that is not there."""
    weighted = _WEIGHT.match(word)
    if weighted and not is_file(word):
        weight, word = weight * float(weighted[1]), word[weighted.end() :]
        if not abs(weight) < LARGEST_WEIGHT:
            raise UserError(f"{weighted[1][:20]}: weights are below {LARGEST_WEIGHT:.0f}")
    kind, _, rest = word.partition(":")
    if kind == "image":
        if not is_file(rest):
            raise UserError(f"image:{rest}: there is no such file")
        return Part(path=str(Path(rest).expanduser()), weight=weight)
    if kind == "text":
        word = rest
    elif is_file(word):
        return Part(path=str(Path(word).expanduser()), weight=weight)
    if not word.strip():
        raise UserError("a part of the query is empty")
    return Part(text=word, weight=weight)


def is_file(word: str) -> bool:
    """Whether a file is there, or one with such a place within."""
    within = _WITHIN.fullmatch(word)
    try:
        return Path(word).expanduser().is_file() or (within is not None and Path(within[1]).expanduser().is_file())
    except (OSError, ValueError, RuntimeError):  # longer than a name can be, ...
        return False


def read_parts(words: Sequence[str | Part]) -> list[Part]:
    """Parts as they are typed, where `+` and `-` are words of their own, or made already. Raises `UserError`."""
    parts, sign = [], 1.0
    for word in words:
        if isinstance(word, Part):
            parts.append(word)
        elif word in ("+", "-"):
            sign = 1.0 if word == "+" else -1.0
        else:
            parts.append(read_part(word, sign))
            sign = 1.0
    if words and words[-1] in ("+", "-"):
        raise UserError(f"nothing follows the last {words[-1]}")
    if not any(part.weight > 0 for part in parts):
        raise UserError("nothing is asked for: give a sentence or a picture, not only what is to be taken off")
    return parts
