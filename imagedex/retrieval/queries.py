"""Files of queries: sentences, and where it is known the right pictures of each. Read as a stream, as often as they are asked."""

import csv
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet

from imagedex.corpora.provenance import names_in
from imagedex.errors import UserError

logger = logging.getLogger(__name__)

IMAGE_COLUMN = "image"
EXTENSIONS = (".txt", ".csv", ".jsonl", ".parquet")
BLOCK = 4096  # rows held at once where nobody says how many
LONGEST = 10_000  # characters of a sentence, which is cut behind them; models read some hundred
SEPARATORS = ",;\t|"


@dataclass
class Queries:
    """`sentences`, and in `targets` the image_ids of the right pictures of each, or None when the file does not say."""

    sentences: list[str]
    targets: list[tuple[str, ...]] | None = None

    def __len__(self) -> int:
        return len(self.sentences)

    @property
    def has_targets(self) -> bool:
        return self.targets is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self.sentences)

    def read(self) -> "Queries":
        return self

    def blocks(self, size: int = BLOCK, start: int = 0) -> Iterator["Queries"]:
        """The queries from number `start` on, at most `size` at a time."""
        for at in range(start, len(self), size):
            yield Queries(self.sentences[at : at + size], self.targets and self.targets[at : at + size])


@dataclass
class QueryFile:
    """A file of queries that was found to be good (`open_queries`); like `Queries`, but never held as a whole.

    Attributes:
        has_targets: whether it names the right pictures.
        fingerprint: of every byte.
    """

    path: Path
    query_column: str
    count: int
    has_targets: bool
    fingerprint: str

    def __len__(self) -> int:
        return self.count

    def rows(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(sentence, the right pictures' image_ids). Raises `UserError`: the file has changed."""
        for place, value, image in rows_of(self.path, self.query_column):
            targets = _targets(image, place, self.path) if self.has_targets else ()
            yield _sentence(value, place, self.path, self.query_column), targets

    def __iter__(self) -> Iterator[str]:
        return (sentence for sentence, _ in self.rows())

    def read(self) -> Queries:
        """All of them, in memory."""
        return next(self.blocks(self.count))

    def blocks(self, size: int = BLOCK, start: int = 0) -> Iterator[Queries]:
        """The queries from number `start` on, at most `size` at a time."""
        rows = islice(self.rows(), start, None)
        while block := list(islice(rows, size)):
            sentences, targets = map(list, zip(*block, strict=True))
            yield Queries(sentences, targets if self.has_targets else None)


def read_queries(path: str | Path, query_column: str = "caption") -> Queries:
    """What `open_queries` opens, in memory."""
    return open_queries(path, query_column).read()


def open_queries(path: str | Path, query_column: str = "caption") -> QueryFile:
    """Reads .txt (one sentence a line, empty lines skipped), .csv, .jsonl or .parquet through once, and counts.

    Args:
        query_column: the column of the sentences (not for .txt). A column `image` beside it gives the right picture, or a list
            of those that are right.

    Raises:
        UserError: no such file, another extension, not UTF-8 or not the form that the extension says, no such column,
            no queries, an empty sentence, something else than names of pictures, or for some rows only.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"the queries file {path} does not exist")
    columns: dict[str, None] = {}
    count = named = long = 0
    wrong, nameless = None, ""  # the first row that says something else; the first row without a right picture
    for place, value, image in rows_of(path, query_column, columns):
        count += 1
        targets = ()
        try:
            _sentence(value, place, path, query_column)
            targets = _targets(image, place, path) if query_column != IMAGE_COLUMN else ()
        except UserError as error:
            wrong = wrong or error
        named += bool(targets)
        long += isinstance(value, str) and len(value) > LONGEST
        nameless = nameless or ("" if targets else place)
    if query_column not in columns and (columns or count):
        raise UserError(
            f"the queries file {path} has no column {query_column!r}; it has {', '.join(map(repr, columns))}; "
            "name the column of the sentences with --query_column"
        )
    if not count:
        raise UserError(f"the queries file {path} holds no queries")
    if wrong is not None:
        raise wrong
    if named and named < count:
        raise UserError(
            f"the queries file {path} names the right picture in column {IMAGE_COLUMN!r} for some rows only; "
            f"{count - named} of {count} have none, the first is {nameless}"
        )
    if long:
        logger.warning("%s: %d of %d sentences have more than %d characters and are cut", path, long, count, LONGEST)
    if not named and len(columns) > 1:
        has = "is empty" if IMAGE_COLUMN in columns else f"is not there (but {', '.join(map(repr, columns))})"
        logger.warning("%s: the column %r of the right pictures %s, so no figures are made", path, IMAGE_COLUMN, has)
    with path.open("rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
    return QueryFile(path, query_column, count, bool(named), fingerprint)


def check_targets(queries: Queries | QueryFile, image_ids: Iterable[str], path: str | Path) -> None:
    """Raises `UserError` when right pictures are not in the gallery; says how many and names the first."""
    if not queries.has_targets:
        return
    known, strangers, asked = set(image_ids), set(), 0
    for block in queries.blocks():
        outside = [set(targets) - known for targets in block.targets]
        asked += sum(map(bool, outside))
        strangers.update(*outside)
    if strangers:
        shown = ", ".join(sorted(strangers)[:3]) + (", ..." if len(strangers) > 3 else "")
        raise UserError(
            f"{asked} of {len(queries)} queries in {path} name {len(strangers)} pictures that are not in the "
            f"gallery of {len(known)} ({shown}); an image is named by its path relative to the gallery's folder, "
            "extension included"
        )


def _sentence(value, place: str, path: Path, column: str) -> str:
    where = f"the queries file {path}, {place}"
    if not isinstance(value, str):
        raise UserError(f"{where}: column {column!r} holds {_short(value)}, not a sentence")
    if not value.strip():
        raise UserError(f"{where}: the sentence is empty")
    _check_unicode(value, where)
    return " ".join(value.split())[:LONGEST]  # a line break inside a sentence would break .tsv and the contact sheet


def _targets(value, place: str, path: Path) -> tuple[str, ...]:
    """The right pictures that a cell names, each once: one, or a list of them (in a .csv as JSON); () where it is empty."""
    names = names_in(value)
    where = f"the queries file {path}, {place}"
    if not all(isinstance(name, str) and name for name in names):
        raise UserError(
            f"{where}: column {IMAGE_COLUMN!r} holds {_short(value)}, not the name of the right picture or a list of such names"
        )
    for name in names:
        _check_unicode(name, where)
    return tuple(dict.fromkeys(names))


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {_short(text)} holds half of a surrogate pair, which is no character") from error


def _short(value) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 80 else shown[:80] + " …"


# Each reader gives (place in the file, sentence, image) of one row after another, and adds the columns' names that it meets.
Row = tuple[str, object, object]
Reader = Callable[[Path, str, dict[str, None]], Iterator[Row]]


def rows_of(path: Path, query_column: str, columns: dict[str, None] | None = None) -> Iterator[Row]:
    """Raises `UserError` for what is wrong with the file as such."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"the queries file {path} must end in {', '.join(EXTENSIONS[:-1])} or {EXTENSIONS[-1]}")
    try:
        yield from reader(path, query_column, {} if columns is None else columns)
    except UnicodeDecodeError as error:
        raise UserError(f"the queries file {path} is not UTF-8 text ({_first_other_line(path)})") from error


def _first_other_line(path: Path) -> str:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return f"line {number}"
    return "at its end"


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, line) of those that are not blank. Lines end at line feeds alone: sentences may hold other separators."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {number}", line


def _read_txt(path: Path, query_column: str, columns: dict[str, None]) -> Iterator[Row]:
    columns[query_column] = None
    for place, line in _lines(path):
        yield place, line, None


def _read_csv(path: Path, query_column: str, columns: dict[str, None]) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # what is too long is said as of any other file
    with path.open(encoding="utf-8-sig", newline="") as file:
        separator = _separator(file.readline(), query_column)
        file.seek(0)
        reader = csv.DictReader(file, strict=True, delimiter=separator, skipinitialspace=True)
        try:
            names = [name.strip() for name in reader.fieldnames or ()]
            for name in (query_column, IMAGE_COLUMN):
                if names.count(name) > 1:
                    raise UserError(f"the queries file {path} has several columns {name!r}; keep one")
            reader.fieldnames = names
            columns |= dict.fromkeys(names)
            for row in reader:
                place = f"line {reader.line_num}"
                if None in row:
                    raise UserError(
                        f"the queries file {path}, {place}: more fields than the header has; "
                        "a sentence with a comma needs double quotes around it"
                    )
                yield place, row.get(query_column), row.get(IMAGE_COLUMN)
        except csv.Error as error:
            raise UserError(f"the queries file {path}, line {reader.line_num}: {error}") from error


def _separator(header: str, query_column: str) -> str:
    """The first that sets the column of the sentences apart in the header; a comma where none does."""
    for separator in SEPARATORS:
        names = next(csv.reader([header], delimiter=separator, skipinitialspace=True), [])
        if len(names) > 1 and query_column in map(str.strip, names):
            return separator
    return ","


def _read_jsonl(path: Path, query_column: str, columns: dict[str, None]) -> Iterator[Row]:
    for place, line in _lines(path):
        try:
            row = json.loads(line)
        except (
            ValueError,
            RecursionError,
        ) as error:  # malformed; a number of thousands of digits; thousands of brackets
            raise UserError(f"the queries file {path}, {place} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"the queries file {path}, {place} is not a JSON object")
        columns |= dict.fromkeys(row)
        yield place, row.get(query_column), row.get(IMAGE_COLUMN)


def _read_parquet(path: Path, query_column: str, columns: dict[str, None]) -> Iterator[Row]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns |= dict.fromkeys(file.schema_arrow.names)
            wanted = [name for name in (query_column, IMAGE_COLUMN) if name in columns]
            batches = file.iter_batches(BLOCK, columns=wanted)
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield f"row {number}", row.get(query_column), row.get(IMAGE_COLUMN)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"the queries file {path} is not a Parquet file that can be read: {error}") from error


READERS: dict[str, Reader] = dict(zip(EXTENSIONS, (_read_txt, _read_csv, _read_jsonl, _read_parquet), strict=True))
