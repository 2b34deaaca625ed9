"""From a table to what is trained and what is asked: the split of each row, then pictures or their paths with captions."""

import logging
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, Features, Value, concatenate_datasets

from imagedex.corpora.forms.addresses import is_address, local_names
from imagedex.corpora.forms.cells import is_base64_picture, splits_in_column, splits_in_names
from imagedex.corpora.forms.embedded import embedded_pictures, paths_instead, with_decoded_base64
from imagedex.corpora.forms.tables import (
    choose_caption_columns,
    choose_image_column,
    holds_pictures,
    is_path,
    known_column,
    pictures_of,
)
from imagedex.corpora.schema import Picture, counted
from imagedex.errors import UserError

logger = logging.getLogger(__name__)


class Columns(NamedTuple):
    """What the user said about a table's columns.

    Attributes:
        put_aside: what says of the split in place of the table itself, such as --held_out_images; "": nothing.
    """

    image: str | None = None
    caption: str | None = None
    put_aside: str = ""


FOUND = Columns()  # nothing was said: columns are found by their names, and a table's own split is kept


class Place(NamedTuple):
    """Where a table's pictures are, when it names them.

    Attributes:
        folder: what paths are relative to; None: there is no such folder.
        root: what ``image_id`` is relative to, and what no path may leave.
        remote: a data set of the Hub, whose files `datasets` keeps by its own rules.
    """

    folder: Path | None
    root: Path | None
    remote: bool = False


def read_splits(
    table: Dataset, where: str, place: Place, columns: Columns, split: str = "train"
) -> dict[str, list[Picture] | Dataset]:
    """The rows of one table by split: its own where it says one of each row and was not told otherwise, else ``split``."""
    image = choose_image_column(table.features, columns.image, where)
    own = _own_splits(table, image, where) if split == "train" else None
    if own and columns.put_aside:
        logger.warning("%s: its own split is put aside, %s says what is held out", where, columns.put_aside)
    if not own or columns.put_aside:
        return {split: read_split(table, split, where, place, columns)}
    sizes = ", ".join(f"{name} {counted(len(rows), 'row')}" for name, rows in own.items())
    logger.info("%s: its own split is kept: %s", where, sizes)
    return {
        name: read_split(table.select(rows), name, f"{where} ({name})", place, columns) for name, rows in own.items()
    }


def read_split(table: Dataset, split: str, where: str, place: Place, columns: Columns) -> list[Picture] | Dataset:
    """One split to records (the image column holds paths) or to a dataset (it holds pictures)."""
    image = choose_image_column(table.features, columns.image, where)
    captions = choose_caption_columns(table.features, columns.caption, where)
    logger.info("%s: pictures from column %s, captions from %s", where, image, ", ".join(captions))
    feature = table.features[image]
    if not holds_pictures(feature):
        raise UserError(f"{where}: column {image!r} holds no pictures but {feature}")
    if is_path(feature) and is_base64_picture(table[0][image] or ""):
        return embedded_pictures(with_decoded_base64(table, image, where), split, image, captions, where)
    names = None
    if not is_path(feature):
        names = None if place.remote else paths_instead(table, image, where)
        if names is None:
            return embedded_pictures(table, split, image, captions, where)
    elif place.root and all(map(is_address, table[image])):
        names = local_names(table[image][:], place.root, where)
    if names is not None:
        column = Dataset.from_dict({image: names}, features=Features({image: Value("string")}))
        table = concatenate_datasets([column, table.remove_columns(image)], axis=1)
    if place.root is None and not is_address(table[0][image]):
        raise UserError(f"{where}: column {image!r} holds file names; give their folder with --image_dir")
    return pictures_of(table, image, captions, place.folder, place.root, where)


def _own_splits(table: Dataset, image: str, where: str) -> dict[str, list[int]] | None:
    """Split -> rows, from a column ``split`` or from folders in the pictures' paths; None where all rows are of one split."""
    column = known_column(table.features, ("split",), lambda name: is_path(table.features[name]))
    if column:
        found = splits_in_column(table[column][:], f"{where}: column {column}")
    elif is_path(table.features[image]):
        found = splits_in_names([name or "" for name in table[image]])
    else:
        return None
    rows: dict[str, list[int]] = {}
    for row, split in enumerate(found or []):
        rows.setdefault(split, []).append(row)
    if "train" not in rows or len(rows) == 1:
        return None
    return {split: rows[split] for split in ("train", "validation", "test") if split in rows}
