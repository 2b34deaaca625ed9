"""What was read of files by an update that has not happened yet: one that was stopped does not read them again.

Parts of a catalog's rows lie beside it, `.looked-<number>.parquet`, until the update happens.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from imagedex.files import whole_file, writing
from imagedex.gallery.scanning import AT_ONCE, NOT_READ, Place, as_table, describe_all

PARTS = ".looked-*.parquet"
LEAST = 512  # fewer are read again in no time


def described(folder: Path, places: Sequence[Place], threads: int, progress: bool) -> list[dict]:
    """Rows of the catalog for these places, in their order; kept in the gallery's folder as they are read."""
    kept = {row["image_id"]: row for row in rows_in(folder)}
    rows = {place.image_id: kept[place.image_id] for place in places if is_of(kept.get(place.image_id), place)}
    new = [place for place in places if place.image_id not in rows]
    read = describe_all(new, threads, progress)
    for part in iter(lambda: list(itertools.islice(read, AT_ONCE)), []):
        rows |= {row["image_id"]: row for row in part}
        if len(part) >= LEAST:
            keep(folder, part)
    return [rows[place.image_id] for place in places]


def is_of(row: dict | None, place: Place) -> bool:
    return row is not None and row["key"] != NOT_READ and row["root"] == place.root and place.is_as(row)


def rows_in(folder: Path) -> Iterator[dict]:
    for path in sorted(folder.glob(PARTS)):
        try:
            with pq.ParquetFile(path) as file:
                yield from file.read().to_pylist()
        except (OSError, pa.ArrowException):  # damaged: these files are read again
            continue


def keep(folder: Path, rows: Sequence[dict]) -> None:
    number = len(list(folder.glob(PARTS)))
    with writing(folder), whole_file(folder / PARTS.replace("*", f"{number:06d}")) as file:
        pq.write_table(as_table(rows), file, compression="zstd")


def clear(folder: Path) -> None:
    """Once the update has happened."""
    for path in folder.glob(PARTS):
        path.unlink(missing_ok=True)
