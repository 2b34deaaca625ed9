"""A caption file beside each picture: ``x.jpg`` with ``x.txt`` or ``x.caption``, a caption a line, in any sub folder.

That is what img2dataset writes with ``--output_format files`` (folders ``00000/``, tables ``00000.parquet``), and what
trainers of diffusion models read.
"""

import logging
import os
from pathlib import Path

import pyarrow.parquet

from imagedex.corpora.paths import is_picture, list_files, picture_at
from imagedex.corpora.reading import read_lines
from imagedex.corpora.schema import FormContents, counted, listed
from imagedex.errors import UserError

logger = logging.getLogger(__name__)

SUFFIXES = (".txt", ".caption")


def find(folder: Path) -> Path | None:
    """``folder``, when at least half of the pictures in it and below have a caption file."""
    names = list_files(folder)
    pictures = [name for name in names if is_picture(name)]
    with_captions = _captions_of(names, pictures)
    return folder if with_captions and 2 * len(with_captions) >= len(pictures) else None


def read(folder: Path, *, image_dir: str | None = None) -> FormContents:
    """Raises `UserError`: a caption file that cannot be read, two pictures or two caption files of one name."""
    if image_dir:
        raise UserError(f"{folder} has its captions beside the pictures: leave --image_dir out")
    names = list_files(folder)
    captions = _captions_of(names, [name for name in names if is_picture(name)])
    twice = (
        [name for name in captions.values() if list(captions.values()).count(name) > 1]
        if len(set(captions.values())) < len(captions)
        else []
    )
    if twice:
        raise UserError(
            f"{folder}: two pictures share the caption file {listed(sorted(set(twice)), 3)}; rename one of them"
        )
    single = [name for name in names if name.endswith(SUFFIXES) and name not in set(captions.values())]
    if single:
        logger.warning("%s: %s without a picture: %s", folder, counted(len(single), "caption file"), listed(single))
    tables = [folder / name for name in names if (folder / name).with_name(f"{Path(name).stem}_stats.json").is_file()]
    tables = [table for table in tables if table.suffix == ".parquet"]
    for table in tables:
        _report_failures(table)
    pictures = [picture_at(folder, picture, read_lines(folder / text)) for picture, text in captions.items()]
    return FormContents(
        "img2dataset's folders" if tables else "pictures with a caption file beside each", {"train": pictures}
    )


def _captions_of(names: list[str], pictures: list[str]) -> dict[str, str]:
    """Picture -> its caption file."""
    there, found = set(names), {}
    for picture in pictures:
        stem = os.path.splitext(picture)[0]
        text = next((stem + suffix for suffix in SUFFIXES if stem + suffix in there), None)
        if text:
            found[picture] = text
    return found


def _report_failures(table: Path) -> None:
    """Says how many pictures img2dataset could not download; its table lists them."""
    try:
        status = pyarrow.parquet.read_table(table, columns=["status"])["status"].to_pylist()
    except (pyarrow.ArrowException, KeyError, OSError):
        return
    failed = sum(one != "success" for one in status)
    if failed:
        logger.warning("%s lists %s, %d of them not downloaded", table, counted(len(status), "picture"), failed)
