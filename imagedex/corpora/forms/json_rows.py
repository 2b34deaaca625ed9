"""Tables in JSON: a row a line, or a list of rows. Values of one column may be of several kinds, as people write them."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow
from datasets import Dataset, Features, List, Value
from datasets.features.features import generate_from_arrow_type

from imagedex.corpora.reading import parse_json, read_json, read_lines, read_text
from imagedex.corpora.schema import listed
from imagedex.errors import UserError

Row = tuple[int, dict]  # (line, or place in the list; from 1), the row


def read_json_table(file: Path) -> Dataset:
    """The rows as a table. A column of texts and lists of texts becomes one of lists; what has no common kind, one of nulls.

    Raises:
        UserError: no JSON, or no rows; names the line.
    """
    rows = read_rows(file)
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    columns, features = {}, {}
    for name in names:
        values = [row.get(name) for _, row in rows]
        columns[name], features[name] = _column(values)
        _check_unicode(columns[name], [number for number, _ in rows], f"{file}, line", name)
    return Dataset.from_dict(columns, features=Features(features))


def read_rows(file: Path) -> list[Row]:
    """The rows of a file, each a mapping. Raises `UserError`."""
    text = read_text(file)
    if not text.strip():
        raise UserError(f"{file} is empty")
    if text.lstrip().startswith("["):
        rows = list(enumerate(read_json(file), start=1))
    elif text.lstrip().splitlines()[0].rstrip().endswith(("{", "[", ",")):  # written over several lines
        raise _one_object(read_json(file), file)
    else:
        lines = enumerate(read_lines(file), start=1)
        rows = [(number, parse_json(line, f"{file}, line {number}")) for number, line in lines if line.strip()]
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number}: a JSON object is expected, got {str(row)[:40]}")
    if len(rows) == 1 and any(_is_table(value) for value in rows[0][1].values()):
        raise _one_object(rows[0][1], file)
    return rows


def _one_object(content: object, file: Path) -> UserError:
    keys = f"the keys {listed(list(content), 6)}" if isinstance(content, dict) else "no row"
    return UserError(
        f"{file} is one JSON object with {keys}, no list of rows; COCO's and Karpathy's files are given as --dataset_name {file}"
    )


def _column(values: Sequence) -> tuple[list, object]:
    kinds = {type(value) for value in values if value is not None}
    if not kinds:
        return list(values), Value("string")
    if kinds <= {str, int, float} and str in kinds:
        return [None if value is None else str(value) for value in values], Value("string")
    if kinds <= {str, list} and all(_is_texts(value) for value in values if isinstance(value, list)):
        return [value if isinstance(value, list) else [value] for value in values], List(Value("string"))
    try:
        return list(values), generate_from_arrow_type(pyarrow.array(list(values)).type)
    except (pyarrow.ArrowException, OverflowError, ValueError, TypeError):
        return [None] * len(values), Value("null")


def _is_table(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _is_texts(values: list) -> bool:
    return all(value is None or isinstance(value, str) for value in values)


def _check_unicode(values: list, numbers: list[int], where: str, name: str) -> None:
    """JSON can write half of a character ("\\ud83d"), which no file, and no table, can hold."""
    for value, number in zip(values, numbers, strict=True):
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise UserError(f"{where} {number}: {name} holds half of a character (a lone surrogate)") from error
