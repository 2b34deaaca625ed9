"""What was read of files by an update that has not happened yet: one that was stopped does not read them again.

Parts of a catalog's rows lie beside it, `.looked-<number>.parquet`, until the update happens.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from imagedex.files import whole_file, writing_to
from imagedex.gallery.scanning import AT_ONCE, NOT_READ, Place, as_table, describe_all

PARTS = ".looked-*.parquet"
LEAST = 512  # fewer are read again in no time
OF_A_PLACE = ("image_id", "path", "root", "bytes", "changed", "captions")


def described(folder: Path, places: Sequence[Place], threads: int, progress: bool) -> list[dict]:
    """Rows of the catalog for these places, in their order; kept in the gallery's folder as they are read."""
    known = {row["image_id"]: row for row in rows_in(folder)}
    rows = [known.get(place.image_id) for place in places]
    new = [number for number, row in enumerate(rows) if row is None or not is_of(row, places[number])]
    read = describe_all([places[number] for number in new], threads, progress)
    for start in range(0, len(new), AT_ONCE):
        part = [next(read) for _ in new[start : start + AT_ONCE]]
        for number, row in zip(new[start:], part, strict=False):
            rows[number] = row
        if len(part) >= LEAST:
            keep(folder, part)
    for _ in read:  # lets it end
        pass
    return rows


def is_of(row: dict, place: Place) -> bool:
    return row["key"] != NOT_READ and all(row[name] == getattr(place, name) for name in OF_A_PLACE)


def rows_in(folder: Path) -> Iterator[dict]:
    for path in sorted(folder.glob(PARTS)):
        try:
            with pq.ParquetFile(path) as file:
                yield from file.read().to_pylist()
        except (OSError, pa.ArrowException):  # damaged: these files are read again
            continue


def keep(folder: Path, rows: Sequence[dict]) -> None:
    number = len(list(folder.glob(PARTS)))
    with writing_to(folder), whole_file(folder / PARTS.replace("*", f"{number:06d}")) as file:
        pq.write_table(as_table(rows), file, compression="zstd")


def clear(folder: Path) -> None:
    """Once the update has happened."""
    for path in folder.glob(PARTS):
        path.unlink(missing_ok=True)
