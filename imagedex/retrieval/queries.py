"""Files of queries: sentences, and where it is known the right picture of each."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from imagedex.errors import UserError

IMAGE_COLUMN = "image"
EXTENSIONS = (".txt", ".csv", ".jsonl", ".parquet")


@dataclass
class Queries:
    """`sentences`, and in `targets` the image_id of the right picture of each, or None when the file does not say."""

    sentences: list[str]
    targets: list[str] | None = None


def read_queries(path: str | Path, query_column: str = "caption") -> Queries:
    """Reads .txt (one sentence a line, empty lines skipped), .csv, .jsonl or .parquet.

    Args:
        query_column: the column of the sentences (not for .txt). A column `image` beside it gives the right pictures.

    Raises:
        UserError: no such file, another extension, not UTF-8 or not the form that the extension says, no such column,
            no queries, an empty sentence, or right pictures given for some rows only.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"the queries file {path} does not exist")
    readers = {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise UserError(f"the queries file {path} must end in {', '.join(EXTENSIONS[:-1])} or {EXTENSIONS[-1]}")
    try:
        columns, rows = readers[path.suffix.lower()](path, query_column)
    except UnicodeDecodeError as error:
        raise UserError(f"the queries file {path} is not UTF-8 text (byte {error.start})") from error
    if query_column not in columns and (columns or rows):
        raise UserError(
            f"the queries file {path} has no column {query_column!r}; it has {', '.join(map(repr, columns))}; "
            "name the column of the sentences with --query_column"
        )
    if not rows:
        raise UserError(f"the queries file {path} holds no queries")
    sentences = [_sentence(value, place, path, query_column) for place, value, _ in rows]
    if IMAGE_COLUMN not in columns or query_column == IMAGE_COLUMN:
        return Queries(sentences)
    without = [place for place, _, image in rows if not isinstance(image, str) or not image]
    if len(without) == len(rows):
        return Queries(sentences)
    if without:
        raise UserError(
            f"the queries file {path} names the right picture in column {IMAGE_COLUMN!r} for some rows only; "
            f"{len(without)} of {len(rows)} have none, the first is {without[0]}"
        )
    return Queries(sentences, [image for _, _, image in rows])


def check_targets(queries: Queries, image_ids: Iterable[str], path: str | Path) -> None:
    """Raises `UserError` when right pictures are not in the gallery; says how many and names the first."""
    if queries.targets is None:
        return
    known = set(image_ids)
    strangers = sorted({target for target in queries.targets if target not in known})
    if strangers:
        asked = sum(target not in known for target in queries.targets)
        shown = ", ".join(strangers[:3]) + (", ..." if len(strangers) > 3 else "")
        raise UserError(
            f"{asked} of {len(queries.targets)} queries in {path} name {len(strangers)} pictures that are not in the "
            f"gallery of {len(known)} ({shown}); an image is named by its path relative to the gallery's folder, "
            "extension included"
        )


def _sentence(value, place: str, path: Path, column: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"the queries file {path}, {place}: column {column!r} holds {value!r}, not a sentence")
    if not value.strip():
        raise UserError(f"the queries file {path}, {place}: the sentence is empty")
    return " ".join(value.split())  # a line break inside a sentence would break .tsv and the contact sheet


# Each reader gives the column names and rows of (place in the file, sentence, image).
Table = tuple[Sequence[str], list[tuple[str, object, object]]]


def _read_txt(path: Path, query_column: str) -> Table:
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [query_column], [(f"line {n}", line, None) for n, line in enumerate(lines, start=1) if line.strip()]


def _read_csv(path: Path, query_column: str) -> Table:
    rows = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                place = f"line {reader.line_num}"
                if None in row:
                    raise UserError(
                        f"the queries file {path}, {place}: more fields than the header has; "
                        "a sentence with a comma needs double quotes around it"
                    )
                rows.append((place, row.get(query_column), row.get(IMAGE_COLUMN)))
        except csv.Error as error:
            raise UserError(f"the queries file {path}, line {reader.line_num}: {error}") from error
        return list(reader.fieldnames or ()), rows


def _read_jsonl(path: Path, query_column: str) -> Table:
    columns, rows = {}, []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"the queries file {path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"the queries file {path}, line {number} is not a JSON object")
        columns |= dict.fromkeys(row)
        rows.append((f"line {number}", row.get(query_column), row.get(IMAGE_COLUMN)))
    return list(columns), rows


def _read_parquet(path: Path, query_column: str) -> Table:
    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = file.schema_arrow.names
        wanted = [name for name in (query_column, IMAGE_COLUMN) if name in columns]
        table = file.read(columns=wanted).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"the queries file {path} is not a Parquet file that can be read: {error}") from error
    rows = [(f"row {n}", row.get(query_column), row.get(IMAGE_COLUMN)) for n, row in enumerate(table, start=1)]
    return columns, rows
