"""What people put into the cells of a table: lists of captions as text, pictures in base64, the name of a split."""

import ast
import base64
import binascii
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from imagedex.corpora.schema import cut, listed
from imagedex.errors import UserError

# The names that datasets understands in its folders, and what it calls them.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
_BASE64_PICTURES = {"/9j/": ".jpg", "iVBORw0KGgo": ".png", "R0lGOD": ".gif", "UklGR": ".webp"}
_SHORTEST_PICTURE = 100  # characters of base64: no file name is as long and begins like one


def lists_in_cells(values: Sequence[str | None], where: str) -> tuple[list, int]:
    """Texts, with those that are written as a list of texts, in JSON or Python's way, as that list; and how many are.

    Raises:
        UserError: every cell is in brackets and some are no such list, so that nobody meant the brackets as text.
    """
    inside = [value.strip() if value else "" for value in values]
    bracketed = [bool(value) and value[0] == "[" and value[-1] == "]" for value in inside]
    if not any(bracketed):
        return list(values), 0
    lists = [_as_list(value) if candidate else None for value, candidate in zip(inside, bracketed, strict=True)]
    if all(candidate or not value for value, candidate in zip(inside, bracketed, strict=True)):
        odd = [
            row for row, (one, candidate) in enumerate(zip(lists, bracketed, strict=True)) if candidate and one is None
        ]
        if odd:
            raise UserError(
                f'{where}: row {odd[0]} is no list of captions: {cut(inside[odd[0]], 80)}; write ["one", "two"]'
            )
    read = [value if one is None else one for value, one in zip(values, lists, strict=True)]
    return read, sum(one is not None for one in lists)


def _as_list(text: str) -> list[str] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if re.search(r"""['"]\s+['"]""", text):  # numpy's way, without commas: Python would join the texts
            return None
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
    return value if isinstance(value, list) and all(isinstance(one, str) for one in value) else None


def is_base64_picture(value: str) -> bool:
    return len(value) >= _SHORTEST_PICTURE and _ending(_without_prefix(value)) is not None


def decode_pictures(values: Sequence[str | None], where: str) -> list[dict]:
    """Pictures in base64 (or as data URIs), each with a name from its content: the same picture has the same name.

    Raises:
        UserError: a value that is no such picture; names the row.
    """
    pictures = []
    for row, value in enumerate(values):
        code = _without_prefix(value or "")
        try:
            content = base64.b64decode(
                code + "=" * (-len(code) % 4), altchars=b"-_" if "-" in code or "_" in code else None, validate=True
            )
        except (binascii.Error, ValueError) as error:
            raise UserError(f"{where}: row {row} is no picture in base64: {cut(code, 40)} ({error})") from error
        name = hashlib.blake2b(content, digest_size=12).hexdigest()
        pictures.append({"bytes": content, "path": f"{name}{_ending(code) or '.png'}"})
    return pictures


def _without_prefix(value: str) -> str:
    start = value[:100]
    return value[start.index(",") + 1 :].strip() if start.startswith("data:") and "," in start else value.strip()


def _ending(code: str) -> str | None:
    return next((ending for start, ending in _BASE64_PICTURES.items() if code.startswith(start)), None)


def split_of(word: str) -> str | None:
    """``train``, ``validation`` or ``test`` for the names that mean one; Karpathy's ``restval`` is trained."""
    word = word.strip().lower()
    return "train" if word == "restval" else SPLIT_NAMES.get(word)


def splits_in_column(values: Sequence[str | None], where: str) -> list[str]:
    """The split of each row. Raises `UserError`: a value that names none."""
    found = [split_of(value or "") for value in values]
    odd = sorted({value or "" for value, split in zip(values, found, strict=True) if split is None})
    if odd:
        raise UserError(
            f"{where} names splits that are not known: {listed([repr(value) for value in odd], 5)}; known are "
            f"{', '.join(SPLIT_NAMES)}; if it does not say what is trained, give the column another name"
        )
    return found


def splits_in_names(names: Sequence[str]) -> list[str] | None:
    """The split of each picture by a folder in its path (``train/a.jpg``), where every path has one; else None."""
    found = []
    for name in names:
        folders = PurePosixPath(name.replace("\\", "/")).parts[:-1]
        splits = [SPLIT_NAMES[folder.lower()] for folder in folders if folder.lower() in SPLIT_NAMES]
        if len(splits) != 1:
            return None
        found.append(splits[0])
    return found
