"""Files of queries: sentences, and where it is known the right pictures of each. Read as a stream, as often as they are asked."""

import csv
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet

from imagedex.corpora.provenance import names_in
from imagedex.errors import UserError
from imagedex.retrieval.turns import Turns

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
        turns: how a dialogue is asked; None: a row is a sentence.
    """

    path: Path
    query_column: str
    count: int
    has_targets: bool
    fingerprint: str
    turns: Turns | None = None

    def __len__(self) -> int:
        return self.count

    def rows(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(sentence, the right pictures' image_ids). Raises `UserError`: the file has changed."""
        for place, value, image in rows_of(self.path, self.query_column):
            targets = _targets(image, place, self.path) if self.has_targets else ()
            for sentence in _asked(value, self.turns):
                yield _sentence(sentence, place, self.path, self.query_column), targets

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


def read_queries(path: str | Path, query_column: str = "caption", turns: Turns | None = None) -> Queries:
    """What `open_queries` opens, in memory."""
    return open_queries(path, query_column, turns).read()


def open_queries(path: str | Path, query_column: str = "caption", turns: Turns | None = None) -> QueryFile:
    """Reads .txt (one sentence a line, empty lines skipped), .csv, .jsonl or .parquet through once, and counts.

    Args:
        query_column: the column of the sentences (not for .txt). A column `image` beside it gives the right picture, or a list
            of those that are right.
        turns: a row is a dialogue, its turns on one line or, in .jsonl and .parquet, in a list.

    Raises:
        UserError: no such file, another extension, not UTF-8 or not the form that the extension says, no such column,
            no queries, an empty sentence, something else than names of pictures, or for some rows only.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"the queries file {path} does not exist")
    seen = _Seen(path, query_column, turns)
    for row in rows_of(path, query_column, seen.columns):
        seen.look_at(*row)
    seen.check()
    with path.open("rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
    return QueryFile(path, query_column, seen.count, bool(seen.named), fingerprint, turns)


@dataclass
class _Seen:
    """What reading a file through has shown of it."""

    path: Path
    query_column: str
    turns: Turns | None
    columns: dict[str, None] = field(default_factory=dict)
    rows: int = 0
    count: int = 0  # queries: of dialogues, there may be several a row, or none
    named: int = 0  # rows that name a right picture
    long: int = 0
    blank: int = 0  # turns
    wrong: UserError | None = None  # of the first row that says something else
    nameless: str = ""  # the first row without a right picture
    gap: str = ""  # the first line after a blank one
    last: int = 0

    def look_at(self, place: str, value: object, image: object) -> None:
        self.rows += 1
        number = int(place.split()[-1])
        self.gap, self.last = self.gap or (place if number != self.rows else ""), number
        targets = ()
        try:
            asked = _asked(value, self.turns)
            self.blank += sum(not turn.strip() for turn in self.turns.of(value) or ()) if self.turns else 0
            for sentence in asked:
                _sentence(sentence, place, self.path, self.query_column)
                self.long += len(sentence) > LONGEST
            self.count += len(asked)
            targets = _targets(image, place, self.path) if self.query_column != IMAGE_COLUMN else ()
        except UserError as error:
            self.wrong = self.wrong or error
        self.named += bool(targets)
        self.nameless = self.nameless or ("" if targets else place)

    def check(self) -> None:
        """Raises `UserError` for what is wrong; says what is left out."""
        path, columns = self.path, ", ".join(map(repr, self.columns))
        if self.query_column not in self.columns and (self.columns or self.rows):
            raise UserError(
                f"the queries file {path} has no column {self.query_column!r}; it has {columns}; "
                "name the column of the sentences with --query_column"
            )
        if not self.rows:
            raise UserError(f"the queries file {path} holds no queries")
        if self.wrong is not None:
            raise self.wrong
        if self.named and self.named < self.rows:
            raise UserError(
                f"the queries file {path} names the right picture in column {IMAGE_COLUMN!r} for some rows only; "
                f"{self.rows - self.named} of {self.rows} have none, the first is {self.nameless}"
            )
        self.say(columns)

    def say(self, columns: str) -> None:
        path = self.path
        if self.long:
            logger.warning(
                "%s: %d of %d sentences have more than %d characters and are cut", path, self.long, self.count, LONGEST
            )
        if self.turns:
            logger.info("%s: %d queries from %d dialogues (--turns %s)", path, self.count, self.rows, self.turns.ask)
        if self.blank:
            logger.warning("%s: %d blank turns are left out", path, self.blank)
        if self.gap and path.suffix.lower() == ".txt":
            blank = f"{self.last - self.rows} blank lines are left out, the first before {self.gap}"
            logger.warning("%s: %s: from there on the numbers of lines and of rankings differ", path, blank)
        if not self.named and len(self.columns) > 1:
            has = "is empty" if IMAGE_COLUMN in self.columns else f"is not there (but {columns})"
            logger.warning(
                "%s: the column %r of the right pictures %s, so no figures are made", path, IMAGE_COLUMN, has
            )


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


def _asked(value: object, turns: Turns | None) -> list:
    """What is asked of a cell: itself, or of a dialogue what `turns` says; the cell itself where it is none, to be refused."""
    dialogue = turns.of(value) if turns else None
    return [value] if dialogue is None else turns.queries(dialogue) or [""]


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
