"""Tables of pictures and captions: csv, tsv, json, jsonl and parquet files, and which of their columns says what.

Shared by the imagefolder form, by ``--train_file`` / ``--validation_file`` and by Hub datasets.
"""

import logging
import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from datasets import Dataset, Features, Image, LargeList, List, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from imagedex.corpora.forms.addresses import FETCH_THEM, is_address
from imagedex.corpora.forms.cells import lists_in_cells
from imagedex.corpora.forms.delimited import read_delimited
from imagedex.corpora.forms.json_rows import read_json_table
from imagedex.corpora.paths import picture_at
from imagedex.corpora.schema import Picture, counted, cut, listed, merge_by_picture
from imagedex.errors import UserError

logger = logging.getLogger(__name__)

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
# Upper and lower case are the same; `filepath` and `title` are open_clip's, `image_name` and `comment` Flickr30k's.
IMAGE_NAMES = (
    "image",
    "file_name",
    "image_path",
    "image_file",
    "image_name",
    "filename",
    "filepath",
    "file",
    "path",
    "img",
    "img_path",
    "picture",
    "jpg",
)
CAPTION_NAMES = (
    "caption",
    "captions",
    "text",
    "texts",
    "sentence",
    "sentences",
    "sentences_raw",
    "raw",
    "comment",
    "title",
    "description",
    "txt",
)
ADDRESS_NAMES = ("url", "image_url", "img_url", "link")
SOURCE_NAMES = ("source_id", "image_id", "img_id", "cocoid", "imgid")

_TEXT_TYPES = ("string", "large_string")


def read_table(file: str | Path, flag: str, caption_column: str | None = None) -> Dataset:
    """A table file as a Dataset; in csv and tsv every column is text, so that ``007`` and ``None`` stay what they are.

    Raises:
        UserError: the file is missing, of another kind, empty or malformed.
    """
    file = Path(file).expanduser()
    suffix = file.suffix.lower()
    if not file.is_file():
        raise UserError(f"{flag} {file}: there is no such file")
    if suffix not in SUFFIXES:
        raise UserError(f"{flag} {file}: a table in {', '.join(SUFFIXES)} is needed")
    if suffix == ".parquet":
        table = _read_parquet(file, flag)
    elif suffix in (".json", ".jsonl"):
        table = read_json_table(file)
    else:
        columns = read_delimited(file, {*CAPTION_NAMES, (caption_column or "").lower()}).columns
        table = Dataset.from_dict(columns, features=Features({name: Value("string") for name in columns}))
    if not len(table):
        raise UserError(f"{flag} {file} holds no row")
    return table


def _read_parquet(file: Path, flag: str) -> Dataset:
    try:
        return load_dataset("parquet", data_files=str(file.resolve()), split="train")
    except (DatasetGenerationError, ValueError, OSError) as error:
        if "corresponds to no data" in str(error):  # how datasets says that a table has a header and nothing else
            raise UserError(f"{flag} {file} holds no row") from error
        raise UserError(f"{flag} {file} cannot be read as parquet: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of the innermost cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {cut(str(error).strip().splitlines()[0]) if str(error).strip() else 'no message'}"


def known_column(features: Iterable[str], known: Sequence[str], usable=lambda name: True) -> str | None:
    """The first column with a name among ``known``, in their order, whatever its case."""
    for wanted in known:
        for name in features:
            if name.strip().lower() == wanted and usable(name):
                return name
    return None


def choose_image_column(features: Features, wanted: str | None, where: str) -> str:
    """``wanted``, or the first column of pictures, or the first with a name that says so.

    Raises:
        UserError: there is none; lists the columns present.
    """
    if wanted:
        return _require(features, wanted, "image", where)
    for name, feature in features.items():
        if isinstance(feature, Image):
            return name
    found = known_column(features, (*IMAGE_NAMES, *ADDRESS_NAMES), lambda name: holds_pictures(features[name]))
    if found:
        return found
    raise UserError(
        f"{where} has no image column; its columns are {listed(list(features), 30)}; name one with --image_column"
    )


def choose_caption_columns(features: Features, wanted: str | None, where: str) -> list[str]:
    """``wanted``, or the first column of text with a known name, or all of ``caption_0``, ``caption_1``, ...

    Raises:
        UserError: there is none, or it holds no text; lists the columns present.
    """
    if wanted:
        _require(features, wanted, "caption", where)
        if not is_text(features[wanted]):
            raise UserError(f"{where}: column {wanted!r} is no text or list of texts but {features[wanted]}")
        return [wanted]
    found = known_column(features, CAPTION_NAMES, lambda name: is_text(features[name]))
    if found:
        return [found]
    numbered = [name for name in features if re.fullmatch(r"(caption|sentence|text)_?\d+", name.lower())]
    numbered = [name for name in numbered if is_text(features[name])]
    if numbered:
        return numbered
    odd = known_column(features, CAPTION_NAMES)
    seen = f" ({odd} is no text or list of texts in every row)" if odd else ""
    raise UserError(
        f"{where} has no caption column{seen}; its columns are {listed(list(features), 30)}; name one with --caption_column"
    )


def _require(features: Features, name: str, what: str, where: str) -> str:
    if name not in features:
        raise UserError(f"{where} has no {what} column {name!r}; its columns are {listed(list(features), 30)}")
    return name


def is_text(feature: object) -> bool:
    """Whether a column holds text or lists of text."""
    if isinstance(feature, List | LargeList):
        feature = feature.feature
    return isinstance(feature, Value) and feature.dtype in _TEXT_TYPES


def is_path(feature: object) -> bool:
    return isinstance(feature, Value) and feature.dtype in _TEXT_TYPES


def holds_pictures(feature: object) -> bool:
    """Whether a column can be read as pictures: an Image, a path, raw bytes or a struct of bytes and path."""
    if isinstance(feature, Image) or is_path(feature):
        return True
    if isinstance(feature, dict):
        return "bytes" in feature
    return isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")


def captions_of(table: Dataset, columns: Sequence[str], where: str) -> list[list[str | None]]:
    """The captions of each row, text columns and list columns alike; None stays None and counts as empty later."""
    rows: list[list[str | None]] = [[] for _ in range(len(table))]
    for name in columns:
        values = table[name][:]
        if is_path(table.features[name]):
            values, number = lists_in_cells(values, f"{where}: column {name}")
            if number:
                logger.info("%s: column %s holds lists of captions in %s", where, name, counted(number, "cell"))
        for row, value in zip(rows, values, strict=True):
            row.extend(value if isinstance(value, list) else [value])
    return rows


def sources_of(table: Dataset, skip: Collection[str]) -> list[str]:
    """The corpus's own id of each row, where a column of text or whole numbers with a known name holds one."""
    for name in SOURCE_NAMES:
        feature = table.features.get(name)
        if name not in skip and isinstance(feature, Value) and ("int" in feature.dtype or is_path(feature)):
            return ["" if value is None else str(value) for value in table[name]]
    return [""] * len(table)


def names_of(table: Dataset, image_column: str, where: str) -> list[str]:
    """The file names in a column. Raises `UserError`: a row without one, or an address in place of one."""
    names = list(table[image_column])
    if not all(names):
        raise UserError(f"{where}: row {next(row for row, name in enumerate(names) if not name)} names no picture")
    addresses = [name for name in names if is_address(name)]
    if addresses:
        what = counted(len(addresses), "picture")
        raise UserError(f"{where} names {what} by address ({cut(addresses[0], 100)}); {FETCH_THEM}")
    return names


def pictures_of(
    table: Dataset, image_column: str, caption_columns: Sequence[str], folder: Path, root: Path, where: str
) -> list[Picture]:
    """The records of a table whose image column holds paths relative to ``folder``; ids are relative to ``root``."""
    names = names_of(table, image_column, where)
    skip = [image_column, *caption_columns]
    return merge_by_picture(
        picture_at(root, os.path.abspath(folder / name), captions, source, asked_by=where)
        for name, captions, source in zip(
            names, captions_of(table, caption_columns, where), sources_of(table, skip), strict=True
        )
    )
