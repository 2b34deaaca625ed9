"""Tables of pictures and captions: csv, tsv, json, jsonl and parquet files, through the builders of ``datasets``.

Shared by the imagefolder form, by ``--train_file`` / ``--validation_file`` and by Hub datasets.
"""

import csv
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, Features, Image, LargeList, List, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from imagedex.corpora.paths import picture_at
from imagedex.corpora.schema import Picture, merge_by_picture
from imagedex.errors import UserError

logger = logging.getLogger(__name__)

SUFFIXES = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
IMAGE_NAMES = (
    "image",
    "file_name",
    "image_path",
    "image_file",
    "filename",
    "filepath",
    "path",
    "img",
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
    "description",
    "txt",
)
SOURCE_NAMES = ("source_id", "image_id", "img_id", "cocoid", "imgid")

_TEXT_TYPES = ("string", "large_string")


def read_table(file: str | Path, flag: str) -> Dataset:
    """A table file as a Dataset; in csv and tsv every column is text, so that ``007`` and ``None`` stay what they are.

    Raises:
        UserError: the file is missing, of another kind, empty or malformed.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise UserError(f"{flag} {file}: there is no such file")
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(f"{flag} {file}: a table in {', '.join(SUFFIXES)} is needed")
    options = {}
    if SUFFIXES[file.suffix.lower()] == "csv":
        separator = "\t" if file.suffix.lower() == ".tsv" else ","
        columns = Features({name: Value("string") for name in _header(file, separator)})
        options = {"sep": separator, "features": columns, "keep_default_na": False, "encoding": "utf-8-sig"}
    try:
        table = load_dataset(SUFFIXES[file.suffix.lower()], data_files=str(file.resolve()), split="train", **options)
    except (DatasetGenerationError, ValueError, OSError) as error:
        if "corresponds to no data" in str(error):  # how datasets says that a table has a header and nothing else
            raise UserError(f"{flag} {file} holds no row") from error
        raise UserError(f"{flag} {file} cannot be read as {file.suffix[1:]}: {first_line(error)}") from error
    if not len(table):
        raise UserError(f"{flag} {file} holds no row")
    return table


def first_line(error: BaseException) -> str:
    """The first line of the innermost cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def _header(file: Path, separator: str) -> list[str]:
    with open(file, encoding="utf-8-sig", newline="", errors="replace") as lines:
        header = next(csv.reader(lines, delimiter=separator), [])
    if not header:
        raise UserError(f"{file} is empty")
    if len(set(header)) != len(header):
        raise UserError(f"{file} names a column twice: {', '.join(header)}")
    return header


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
    for name in IMAGE_NAMES:
        if name in features and holds_pictures(features[name]):
            return name
    raise UserError(f"{where} has no image column; its columns are {', '.join(features)}; name one with --image_column")


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
    for name in CAPTION_NAMES:
        if name in features and is_text(features[name]):
            return [name]
    numbered = [name for name in features if re.fullmatch(r"(caption|sentence|text)_?\d+", name)]
    numbered = [name for name in numbered if is_text(features[name])]
    if numbered:
        return numbered
    raise UserError(
        f"{where} has no caption column; its columns are {', '.join(features)}; name one with --caption_column"
    )


def _require(features: Features, name: str, what: str, where: str) -> str:
    if name not in features:
        raise UserError(f"{where} has no {what} column {name!r}; its columns are {', '.join(features)}")
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


def captions_of(table: Dataset, columns: Sequence[str]) -> list[list[str | None]]:
    """The captions of each row, text columns and list columns alike; None stays None and counts as empty later."""
    rows: list[list[str | None]] = [[] for _ in range(len(table))]
    for name in columns:
        for row, value in zip(rows, table[name], strict=True):
            row.extend([value] if value is None or isinstance(value, str) else value)
    return rows


def sources_of(table: Dataset, skip: Sequence[str]) -> list[str]:
    """The corpus's own id of each row, where a column of text or whole numbers with a known name holds one."""
    for name in SOURCE_NAMES:
        feature = table.features.get(name)
        if name not in skip and isinstance(feature, Value) and ("int" in feature.dtype or is_path(feature)):
            return ["" if value is None else str(value) for value in table[name]]
    return [""] * len(table)


def pictures_of(
    table: Dataset, image_column: str, caption_columns: Sequence[str], folder: Path, root: Path, where: str
) -> list[Picture]:
    """The records of a table whose image column holds paths relative to ``folder``; ids are relative to ``root``."""
    names = list(table[image_column])
    if not all(names):
        raise UserError(f"{where}: row {next(row for row, name in enumerate(names) if not name)} names no picture")
    skip = [image_column, *caption_columns]
    return merge_by_picture(
        picture_at(root, os.path.abspath(folder / name), captions, source, asked_by=where)
        for name, captions, source in zip(
            names, captions_of(table, caption_columns), sources_of(table, skip), strict=True
        )
    )
