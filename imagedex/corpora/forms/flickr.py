"""Flickr8k ``captions.txt`` and Flickr30k ``results.csv``, as they unpack.

Flickr8k: comma-separated, header ``image,caption``, one row a caption, captions with commas quoted.
Flickr30k: header ``image_name| comment_number| comment``, fields separated by ``|`` with blanks around. The file that
goes round has one row whose second ``|`` is missing (``2199200615.jpg| 4   A dog runs across the grass .``); it is read
all the same.
"""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from imagedex.corpora.paths import corpus_image_root, picture_at
from imagedex.corpora.schema import FormContents, merge_by_picture
from imagedex.errors import UserError

FILES = ("captions.txt", "results.csv", "captions.csv")
IMAGE_NAMES = ("image", "image_name", "filename", "file_name")
CAPTION_NAMES = ("caption", "comment", "captions", "text")

_NUMBER_THEN_TEXT = re.compile(r"\s*\d+\s+(?P<text>\S.*)")


def find(folder: Path) -> Path | None:
    """The caption file of this form in ``folder``; Flickr30k's mirror keeps it beside the pictures."""
    for place in (folder, folder / "flickr30k_images"):
        for name in FILES:
            if (place / name).is_file():
                return place / name
    return None


def read(
    file: Path, *, image_dir: str | None = None, image_column: str | None = None, caption_column: str | None = None
) -> FormContents:
    """Reads the caption file; the pictures may lie in ``images/``, ``Images/``, ``flickr30k_images/`` or beside it.

    Raises:
        UserError: a column or the pictures cannot be found, or a row cannot be read.
    """
    rows = list(read_rows(file, image_column, caption_column))
    if not rows:
        raise UserError(f"{file} holds no caption")
    root = corpus_image_root([name for name, _ in rows], file.parent, image_dir, str(file))
    pictures = merge_by_picture(picture_at(root, name, [caption], asked_by=str(file)) for name, caption in rows)
    dialect = "Flickr30k" if _separator(_lines(file)[0]) == "|" else "Flickr8k"
    return FormContents(f"{dialect} {file.name}", {"train": pictures})


def read_rows(file: Path, image_column: str | None = None, caption_column: str | None = None) -> Iterator[tuple]:
    """Yields (picture name, caption) for each row of the file, in its order."""
    lines = _lines(file)
    separator = _separator(lines[0])
    reader = csv.reader(lines) if separator == "," else (line.split("|") for line in lines)
    header = [name.strip() for name in next(reader)]
    image = _position(header, image_column, IMAGE_NAMES, "image", file)
    caption = _position(header, caption_column, CAPTION_NAMES, "caption", file)
    last = len(header) - 1
    for number, fields in enumerate(reader, start=2):
        if not "".join(fields).strip():
            continue
        if len(fields) > len(header):  # an unquoted separator inside the last field, the caption
            fields = [*fields[:last], separator.join(fields[last:])]
        if len(fields) < len(header) and separator == "|":
            broken = _NUMBER_THEN_TEXT.fullmatch(fields[-1].rstrip())
            fields = [*fields[:-1], "", broken["text"]] if broken else fields
        if len(fields) != len(header) or not fields[image].strip():
            raise UserError(f"{file}, row {number}: {len(header)} fields expected ({', '.join(header)}), got {fields}")
        yield fields[image].strip(), fields[caption].strip()


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not lines:
        raise UserError(f"{file} is empty")
    return lines


def _separator(header: str) -> str:
    return "|" if "|" in header else ","


def _position(header: list[str], wanted: str | None, known: tuple[str, ...], what: str, file: Path) -> int:
    names = [wanted] if wanted else known
    for name in names:
        if name in header:
            return header.index(name)
    raise UserError(
        f"{file} has no {what} column{f' {wanted!r}' if wanted else ''}; its columns are {', '.join(header)}; "
        f"name one with --{what}_column"
    )
