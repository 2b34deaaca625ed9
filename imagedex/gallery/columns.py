"""Columns of the user's in the catalog: what a table, a metadata file or an archive says of its pictures beside our own columns.

They are columns for filters, so each has a name that a filter can hold, and a type that it can compare: numbers, truth, text,
time, or a list of texts. What has another type is left out, and said.
"""

import keyword
import logging
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imagedex.gallery.catalog import COLUMNS

logger = logging.getLogger(__name__)

RESERVED = {*COLUMNS, "vector", "bias"}  # `export` adds the last two
TIME = pa.timestamp("ms")
TEXTS = pa.list_(pa.string())
_WHOLE, _NUMBER = re.compile(r"[+-]?(0|[1-9]\d{0,17})"), re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def of_user(table: pa.Table, where: str) -> pa.Table:
    """The columns that filters can use, under the names that they have there; says what was renamed or left out."""
    kept, renamed, left_out = {}, [], []
    for name, column in zip(table.column_names, table.columns, strict=True):
        kind = kept_type(column.type)
        if kind is None:
            left_out.append(pa.field(name, column.type))
            continue
        own = usable_name(name, {*RESERVED, *kept})
        if own != name:
            renamed.append(f"{name} is called {own}")
        kept[own] = converted(column, kind)
    if renamed:
        logger.warning("%s: in filters the column %s", where, ", ".join(renamed))
    say_left_out(where, left_out)
    return pa.table(kept)


def say_left_out(where: str, fields: Sequence[pa.Field]) -> None:
    if fields:
        shown = ", ".join(f"{one.name} ({str(one.type)[:40]})" for one in fields)
        logger.warning("%s: filters know no columns of this type, left out: %s", where, shown)


def kept_type(kind: pa.DataType) -> pa.DataType | None:
    """What it becomes in the catalog; None for what filters cannot compare."""
    if pa.types.is_dictionary(kind):
        return kept_type(kind.value_type)
    if pa.types.is_boolean(kind) or pa.types.is_signed_integer(kind):
        return kind
    if pa.types.is_unsigned_integer(kind):
        return pa.int64() if kind.bit_width < 64 else pa.float64()
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return pa.float64()
    if is_text(kind):
        return pa.string()
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return TIME
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and is_text(kind.value_type):
        return TEXTS
    return None


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()


def converted(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(kind, safe=False)


def usable_name(name: str, taken: set[str]) -> str:
    """One that Python's parser reads as a name, and that nobody else has: `my col` -> my_col, path -> path_."""
    own = re.sub(r"\W", "_", unicodedata.normalize("NFKC", name)) or "_"
    own = own if own.isidentifier() else f"_{own}"
    if keyword.iskeyword(own) or own in RESERVED:
        own += "_"
    number, wanted = 1, own
    while own in taken:
        number += 1
        own = f"{wanted}_{number}"
    return own


def with_types(values: Sequence[str | None]) -> pa.Array:
    """A column of text from a file that knows nothing else: whole numbers, numbers and truth where each cell is one, and text
    (`007`, too) where one is not. Empty cells are missing values."""
    cells = [value.strip() if value and value.strip() else None for value in values]
    said = [cell for cell in cells if cell is not None]
    if said and all(map(_WHOLE.fullmatch, said)):
        return pa.array([None if cell is None else int(cell) for cell in cells], pa.int64())
    if said and all(map(_NUMBER.fullmatch, said)) and not any(re.match(r"[+-]?0\d", cell) for cell in said):
        return pa.array([None if cell is None else float(cell) for cell in cells], pa.float64())
    if said and all(cell.lower() in ("true", "false") for cell in said):
        return pa.array([None if cell is None else cell.lower() == "true" for cell in cells], pa.bool_())
    return pa.array(cells, pa.string())


def of_rows(rows: Sequence[dict]) -> pa.Table:
    """JSON objects as a table. A key whose values are of several kinds becomes text."""
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, OverflowError):
            columns[name] = pa.array([None if value is None else str(value) for value in values], pa.string())
    return pa.table(columns)


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """One below the other; a column that one of them lacks is missing there, one of several kinds becomes text, and is said."""
    kinds: dict[str, pa.DataType] = {}
    for table in tables:
        for field in table.schema:
            known = kinds.setdefault(field.name, field.type)
            if known != field.type:
                kinds[field.name] = common_type(known, field.type, field.name)
    cast = []
    for table in tables:
        for place, field in enumerate(table.schema):
            if field.type != kinds[field.name]:
                column = as_text(table[field.name]) if kinds[field.name] == pa.string() else table[field.name]
                table = table.set_column(place, field.name, column.cast(kinds[field.name]))
        cast.append(table)
    return pa.concat_tables(cast, promote_options="default")


def common_type(one: pa.DataType, other: pa.DataType, name: str) -> pa.DataType:
    if pa.types.is_null(one) or pa.types.is_null(other):
        return other if pa.types.is_null(one) else one
    if all(pa.types.is_integer(kind) for kind in (one, other)):
        return pa.int64()
    if all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in (one, other)):
        return pa.float64()
    logger.warning("column %s is %s in one source and %s in another; it is text in the gallery", name, one, other)
    return pa.string()


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_list(column.type):
        return column.cast(pa.string())
    return pa.chunked_array([pc.binary_join(chunk, "; ") for chunk in column.chunks], pa.string())


def brought_up_to_date(
    before: pa.Table, table: pa.Table, roots: set[str], captions: dict[str, list[str]], said: pa.Table
) -> tuple[pa.Table, list[str]]:
    """The catalog, in which the pictures of these roots have the captions and columns that their sources say now, and the
    image_ids of those for which they say something new.

    Args:
        before: the catalog as it was. table: the catalog with the pictures that are there now.
        captions: of every picture of the roots.
        said: `image_id` and the user's columns (`of_user`), of some of them.
    """
    own = pc.is_in(table["root"], pa.array(sorted(roots), pa.string()))
    ours, others = table.filter(own), without_bare(table.filter(pc.invert(own)))
    ids = ours["image_id"].to_pylist()
    place = COLUMNS.index("captions")
    ours = ours.select(COLUMNS).set_column(place, "captions", pa.array([captions[name] for name in ids], TEXTS))
    rows = pc.index_in(ours["image_id"], said["image_id"].combine_chunks())
    for name in said.column_names:
        if name != "image_id":
            ours = ours.append_column(name, said[name].take(rows))
    whole = without_bare(joined([part for part in (others, ours) if len(part)] or [ours])).sort_by("image_id")
    return whole, said_anew(before, whole, ids)


def without_bare(table: pa.Table) -> pa.Table:
    """Without the user's columns that hold nothing: their type is nobody's."""
    return table.drop_columns(
        [name for name in table.column_names[len(COLUMNS) :] if table[name].null_count == len(table)]
    )


def said_anew(before: pa.Table, after: pa.Table, image_ids: list[str]) -> list[str]:
    """Those of the pictures whose captions or columns are others than they were; a column that became text for the sake of
    another source is the same, and a missing value is like a column that is not there."""
    wanted, new = pa.array(image_ids, pa.string()), np.zeros(len(image_ids), bool)
    rows = [pc.index_in(wanted, table["image_id"].combine_chunks()) for table in (before, after)]
    users = dict.fromkeys(before.column_names[len(COLUMNS) :] + after.column_names[len(COLUMNS) :])
    for name in ["captions", *users]:
        pair = [
            table[name].take(own) if name in table.column_names else pa.nulls(len(wanted))
            for table, own in zip((before, after), rows, strict=True)
        ]
        if pair[0].type != pair[1].type and pa.string() in (pair[0].type, pair[1].type):
            pair = [as_text(column) for column in pair]
        values = zip(*(column.to_pylist() for column in pair), strict=True)
        new |= np.fromiter((not same(one, two) for one, two in values), bool, len(wanted))
    return [name for name, other in zip(image_ids, new.tolist(), strict=True) if other]


def same(one, two) -> bool:
    """Missing values are, and so are those that are no number."""
    return one == two or (one in (None, []) and two in (None, [])) or (one != one and two != two)
