"""Tables that hold the pictures themselves (parquet, arrow, base64), in the schema. No picture is copied."""

import hashlib
import logging
import os
import posixpath

from datasets import Dataset, Features, Image, List, Value, concatenate_datasets

from imagedex.corpora.forms.cells import decode_pictures
from imagedex.corpora.forms.tables import captions_of, sources_of
from imagedex.corpora.paths import image_extensions
from imagedex.corpora.schema import COLUMNS, clean_captions, counted, cut, report_empty
from imagedex.errors import UserError

logger = logging.getLogger(__name__)


def embedded_pictures(table: Dataset, split: str, image_column: str, caption_columns: list[str], where: str) -> Dataset:
    """A table whose image column holds pictures, in the schema. The pictures themselves are not copied."""
    stored = table.select_columns([image_column])
    if image_column != "image":
        stored = stored.rename_column(image_column, "image")
    stored = stored.cast_column("image", Image(decode=False))
    groups, image_ids = _group_rows(stored, split)
    captions = captions_of(table, caption_columns, where)
    sources = sources_of(table, [image_column, *caption_columns])
    columns = {"image_id": [""] * len(table), "captions": [[]] * len(table), "source_id": sources}
    empty, bare = 0, []
    for rows, image_id in zip(groups, image_ids, strict=True):
        kept, dropped = clean_captions(caption for row in rows for caption in captions[row])
        empty += dropped
        if not kept:
            bare.append(image_id)
        columns["image_id"][rows[0]] = image_id
        columns["captions"][rows[0]] = kept
    report_empty(empty, bare, split)
    text = Dataset.from_dict(
        columns,
        features=Features(
            {"image_id": Value("string"), "captions": List(Value("string")), "source_id": Value("string")}
        ),
    )
    # Beside each other, not row by row: columns are joined without reading a picture, and only then rows are chosen.
    joined = concatenate_datasets([stored.cast_column("image", Image()), text], axis=1).select_columns(list(COLUMNS))
    return joined if len(groups) == len(joined) else joined.select([rows[0] for rows in groups])


def paths_instead(table: Dataset, image_column: str, where: str) -> list[str] | None:
    """The paths, where rows of ``{"bytes": None, "path": ...}`` name pictures in place of holding them; else None.

    Raises:
        UserError: rows of both kinds.
    """
    stored = table.select_columns([image_column]).cast_column(image_column, Image(decode=False))
    paths, outside = [], 0
    for part in stored.with_format("arrow").iter(batch_size=1000):
        column = part[image_column].combine_chunks()
        for path, held in zip(
            column.field("path").to_pylist(), column.field("bytes").is_valid().to_pylist(), strict=True
        ):
            outside += bool(path and not held)
            paths.append("" if held else path or "")
    if not outside:
        return None
    if outside < len(paths):
        first = next(row for row, path in enumerate(paths) if path)
        raise UserError(
            f"{where}: {counted(outside, 'row')} of {len(paths)} hold the path of a picture in place of the picture "
            f"(row {first}: {cut(paths[first], 100)}); a table holds either pictures or paths"
        )
    return paths


def with_decoded_base64(table: Dataset, image_column: str, where: str) -> Dataset:
    """The same table, its pictures in base64 decoded to bytes."""
    pictures = decode_pictures(table[image_column][:], where)
    column = Dataset.from_dict({image_column: pictures}, features=Features({image_column: Image()}))
    logger.info("%s: column %s holds pictures in base64", where, image_column)
    return concatenate_datasets([column, table.remove_columns(image_column)], axis=1)


def _group_rows(stored: Dataset, split: str) -> tuple[list[list[int]], list[str]]:
    """Rows of the same picture, in the order of their first row, and the ``image_id`` of each group."""
    paths: list[str | None] = []
    for table in stored.with_format("arrow").iter(batch_size=1000):
        paths += table["image"].combine_chunks().field("path").to_pylist()
    by_path: dict[object, list[int]] = {}
    for row, path in enumerate(paths):
        by_path.setdefault(path or row, []).append(row)
    repeated = [rows for rows in by_path.values() if len(rows) > 1]
    if not all(_same_picture(stored, rows) for rows in repeated):
        logger.warning("%s split: one file name stands for different pictures; every row is its own picture", split)
        by_path = {row: [row] for row in range(len(paths))}
    groups = list(by_path.values())
    names = [stored_name(paths[rows[0]]) for rows in groups]
    if not all(names) or len(set(names)) < len(names):
        names = [f"{split}/{rows[0]:08d}" for rows in groups]
        logger.info(
            "%s split: pictures have no file names that tell them apart; image_ids are %s, ...", split, names[0]
        )
    return groups, names


def _same_picture(stored: Dataset, rows: list[int]) -> bool:
    """Whether rows with the same path really hold the same bytes (some datasets call every picture ``image.jpg``)."""
    contents = (stored[row]["image"]["bytes"] for row in rows)
    return len({hashlib.blake2b(value or b"").digest() for value in contents}) == 1


def stored_name(path: str | None) -> str:
    """The part of a stored path that is the same on every machine: a relative path as it is, else the file name."""
    if not path:
        return ""
    path = path.replace(os.sep, "/")
    if "://" in path or posixpath.isabs(path) or path.startswith(".."):
        path = posixpath.basename(path.split("::")[0])
    name = posixpath.normpath(path)
    return name if posixpath.splitext(name)[1].lower() in image_extensions() else ""
