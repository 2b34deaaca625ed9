"""Tables with a separator: csv, tsv and their relatives, as people really write them.

The separator is taken from the header. A row is one line, unless a quoted field goes on over several. A quotation mark that
does not pair (``a.jpg,"No parking reads the sign``) is a sign of the text like any other: it never swallows the next rows.
"""

import csv
import logging
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from imagedex.corpora.paths import is_picture
from imagedex.corpora.reading import read_lines
from imagedex.corpora.schema import counted, listed
from imagedex.errors import UserError

logger = logging.getLogger(__name__)

SEPARATORS = (",", "\t", ";", "|")
_LONGEST_FIELD = 1 << 30  # a picture in base64 may stand in a cell; the csv module stops at 128 kB by default
_MOST_LINES = 1000  # of one quoted field
_NUMBER_THEN_TEXT = re.compile(r"\s*\d+\s+(?P<text>\S.*)")


class Delimited(NamedTuple):
    """The columns of a table, every value text, and the separator they stood between."""

    columns: dict[str, list[str]]
    separator: str


def read_delimited(file: Path, free_text: Collection[str] = ()) -> Delimited:
    """Reads a table with a header. Columns without a name (pandas' index) are passed over, and said.

    Args:
        free_text: names of columns that hold sentences: in the last one, a separator may stand unquoted.

    Raises:
        UserError: no header, a name used twice, or a row with another number of fields; names the line.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    lines = read_lines(file)
    if not any(line.strip() for line in lines):
        raise UserError(f"{file} is empty")
    separator = _separator(lines[0], file.suffix.lower())
    header, start = [name.strip() for name in _fields(lines[0], separator)], 1
    if separator == "\t" and sorted("://" in field for field in header) == [False, True]:
        header = ["url" if "://" in field else "caption" for field in header]  # Conceptual Captions' form
        start = 0
    _check_header(header, lines[0], file)
    open_ended = header[-1].lower() in free_text
    rows, joined = [], []
    for number, fields, text in _rows(lines, start, separator, len(header), file):
        if open_ended and "".join(fields[len(header) :]).strip():
            fields = _joined(fields, text, separator, len(header))
            joined.append(number)
        rows.append(_fitted(fields, header, separator, f"{file}, line {number}"))
    if joined:
        what = f"{counted(len(joined), 'row')} with {separator!r} unquoted in {header[-1]}"
        logger.info("%s: %s, read as a part of it: line %s", file, what, listed(joined, 5))
    kept = [place for place, name in enumerate(header) if name]
    if len(kept) < len(header):
        logger.info("%s: %s without a name passed over", file, counted(len(header) - len(kept), "column"))
    return Delimited({header[place]: [row[place] for row in rows] for place in kept}, separator)


def _separator(header: str, suffix: str) -> str:
    """The one that gives the header most fields; where several do, the one that the file's name promises."""
    usual = "\t" if suffix == ".tsv" else ","
    order = [usual, *(separator for separator in SEPARATORS if separator != usual)]
    return max(order, key=lambda separator: len(_fields(header, separator)))


def _check_header(header: list[str], line: str, file: Path) -> None:
    if any(is_picture(name) or "://" in name for name in header):
        raise UserError(
            f"{file} begins with a row ({line[:80]}) where a header is expected: put the names of the columns in its first "
            "line, for example image,caption"
        )
    named = [name for name in header if name]
    if not named:
        raise UserError(f"{file}: no column has a name; put image,caption in its first line")
    if len(set(named)) != len(named):
        raise UserError(f"{file} names a column twice: {listed(named)}")


def _rows(lines: list[str], start: int, separator: str, width: int, file: Path) -> Iterator[tuple[int, list[str], str]]:
    """(line number, fields, text) of each row that is not blank."""
    at, unpaired = start, []
    while at < len(lines):
        fields, used = _row_at(lines, at, separator, width)
        if fields is None:
            fields, used = lines[at].split(separator), 1
            unpaired.append(at + 1)
        if "".join(fields).strip():
            yield at + 1, fields, "\n".join(lines[at : at + used])
        at += used
    if unpaired:
        logger.warning(
            "%s: %s with a quotation mark that does not pair, read as written: line %s",
            file, counted(len(unpaired), "row"), listed(unpaired, 20),
        )  # fmt: skip


def _row_at(lines: list[str], at: int, separator: str, width: int) -> tuple[list[str] | None, int]:
    """The fields of the row that begins at a line, and how many lines it takes; None where its quotation marks do not pair."""
    text = lines[at]
    fields, unfinished = _parsed(text, separator)
    for end in range(at + 1, min(at + _MOST_LINES, len(lines))):
        if not unfinished or _looks_like_a_row(lines[end], separator, width):
            break
        text += "\n" + lines[end]
        if '"' in lines[end]:
            fields, unfinished = _parsed(text, separator)
    return fields, text.count("\n") + 1 if fields else 1


def _fields(text: str, separator: str) -> list[str]:
    """The fields of a header."""
    return _parsed(text, separator)[0] or []


def _parsed(text: str, separator: str) -> tuple[list[str] | None, bool]:
    """The fields of a row, None where a quoted one goes on after its end or does not end; and whether it may end later."""
    if '"' not in text or separator == "|":  # Flickr30k's tables know no quoting
        return text.split(separator), False
    try:
        return next(csv.reader([text], delimiter=separator, skipinitialspace=True, strict=True)), False
    except (csv.Error, StopIteration) as error:
        return None, "unexpected end" in str(error)


def _looks_like_a_row(line: str, separator: str, width: int) -> bool:
    fields = line.split(separator)
    return len(fields) >= width and any(is_picture(field.strip().strip('"')) for field in fields)


def _joined(fields: list[str], text: str, separator: str, width: int) -> list[str]:
    """The row of an unquoted separator inside the sentence, which comes last; with the sentence's own quotation marks."""
    *first, sentence = text.split(separator, width - 1)
    if '"' in "".join(first) or len(first) < width - 1:
        return [*fields[: width - 1], separator.join(fields[width - 1 :])]
    return [*first, sentence]


def _fitted(fields: list[str], header: list[str], separator: str, where: str) -> list[str]:
    """As many fields as the header has, without blanks around."""
    width = len(header)
    while len(fields) > width and not fields[-1].strip():
        fields = fields[:-1]
    if len(fields) == width - 1 and separator == "|" and (broken := _NUMBER_THEN_TEXT.fullmatch(fields[-1].rstrip())):
        fields = [*fields[:-1], "", broken["text"]]  # the row of Flickr30k's file whose second | is missing
    if len(fields) != width:
        got = f"{len(fields)}: {separator.join(fields)[:80]}"
        raise UserError(f"{where}: {counted(width, 'field')} expected ({listed(header)}), got {got}")
    return [field.strip() for field in fields]
