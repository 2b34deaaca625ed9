"""Flickr8k's and Flickr30k's captions, as they unpack.

``captions.txt`` (Flickr8k): comma-separated, header ``image,caption``, one row a caption, captions with commas quoted.
``results.csv`` (Flickr30k): header ``image_name| comment_number| comment``, fields separated by ``|`` with blanks around.
``Flickr8k.token.txt``, ``results_20130124.token``: the originals, no header, ``a.jpg#0<TAB>caption``. Beside Flickr8k's lie
its splits, ``Flickr_8k.trainImages.txt``, ``.devImages.txt`` and ``.testImages.txt``, a file name a line.
"""

import logging
import re
from pathlib import Path

from datasets import Dataset, Features, Value

from imagedex.corpora.forms.contents import FOUND, Columns, Place, read_splits
from imagedex.corpora.forms.delimited import read_delimited
from imagedex.corpora.forms.tables import CAPTION_NAMES, choose_image_column, names_of
from imagedex.corpora.paths import corpus_image_root, picture_at
from imagedex.corpora.reading import read_lines
from imagedex.corpora.schema import FormContents, Picture, counted, listed, merge_by_picture
from imagedex.errors import UserError

logger = logging.getLogger(__name__)

TOKEN_FILES = ("Flickr8k.token.txt", "results_20130124.token")
FILES = ("captions.txt", "results.csv", "captions.csv", *TOKEN_FILES)
SPLIT_LISTS = {
    "train": "Flickr_8k.trainImages.txt",
    "validation": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
_TOKEN_LINE = re.compile(r"(?P<name>[^\t]+)#\d+\t(?P<caption>.*)")


def find(folder: Path) -> Path | None:
    """The caption file of this form in ``folder``; Flickr30k's mirror keeps it beside the pictures, Flickr8k's archive apart."""
    for place in (folder, folder / "flickr30k_images", folder / "Flickr8k_text"):
        for name in FILES:
            if (place / name).is_file():
                return place / name
    return None


def read(file: Path, *, image_dir: str | None = None, columns: Columns = FOUND) -> FormContents:
    """Reads the caption file; the pictures may lie in ``images/``, ``Images/``, ``flickr30k_images/`` or beside it.

    Raises:
        UserError: a column or the pictures cannot be found, or a row cannot be read.
    """
    lines = read_lines(file)
    if lines and _TOKEN_LINE.fullmatch(lines[0]):
        return _read_tokens(file, lines, image_dir)
    found, separator = read_delimited(file, {*CAPTION_NAMES, (columns.caption or "").lower()})
    table = Dataset.from_dict(found, features=Features({name: Value("string") for name in found}))
    names = names_of(table, choose_image_column(table.features, columns.image, str(file)), str(file))
    if not names:
        raise UserError(f"{file} holds no caption")
    root = corpus_image_root(names, file.parent, image_dir, str(file))
    splits = read_splits(table, str(file), Place(root, root), columns)
    return FormContents(f"{'Flickr30k' if separator == '|' else 'Flickr8k'} {file.name}", splits)


def _read_tokens(file: Path, lines: list[str], image_dir: str | None) -> FormContents:
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        found = _TOKEN_LINE.fullmatch(line)
        if not found:
            raise UserError(f"{file}, line {number}: a.jpg#0<TAB>caption is expected, got {line[:80]}")
        rows.append((found["name"], found["caption"]))
    root = corpus_image_root([name for name, _ in rows], file.parent, image_dir, str(file))
    pictures = merge_by_picture(picture_at(root, name, [caption], asked_by=str(file)) for name, caption in rows)
    return FormContents(f"Flickr {file.name}", _by_lists(pictures, file.parent))


def _by_lists(pictures: list[Picture], folder: Path) -> dict[str, list[Picture]]:
    """Flickr8k's own splits, where its lists lie beside the captions."""
    files = {split: folder / name for split, name in SPLIT_LISTS.items() if (folder / name).is_file()}
    if "train" not in files or len(files) == 1:
        return {"train": pictures}
    split_of = {name.strip(): split for split, file in files.items() for name in read_lines(file)}
    splits: dict[str, list[Picture]] = {split: [] for split in files}
    others = []
    for picture in pictures:
        split = split_of.get(picture.image_id)
        (splits[split] if split else others).append(picture)
    logger.info("%s: its own split is kept: %s", folder, ", ".join(file.name for file in files.values()))
    if others:
        what = counted(len(others), "picture")
        logger.warning(
            "%s: %s in none of the lists, left out: %s", folder, what, listed([one.image_id for one in others])
        )
    return splits
