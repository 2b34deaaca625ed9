"""Pictures that lie in the rows of a table file, Parquet or Arrow: `table.parquet::000000012:image`, the row and the column.

Such files are large, so they are read forwards, a page of the column at a time (and its dictionary): one picture after the
other costs one pass, and a picture alone costs the part of its row group before it. Arrow files are mapped into memory.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = (".parquet", ".arrow")
ROWS_AT_ONCE = 32  # pictures of a Parquet file that are in memory
READ_AT_ONCE = 2**20
OPEN_AT_ONCE = 4


def place_of(row: int, column: str) -> str:
    """Sorted as text these stand in the file's order."""
    return f"{row:09d}:{quote(column, safe='')}"


def content_at(file: str, place: str) -> bytes:
    """The bytes of a picture. Raises `OSError`: the file is not there or damaged, or has no picture there."""
    row, _, column = place.partition(":")
    try:
        return _readers.content(file, unquote(column), int(row))
    except (pa.ArrowException, KeyError, IndexError) as error:
        raise OSError(f"{file} is damaged, or another one by now: {' '.join(str(error).split())[:160]}") from error


def arrow_table(file: str | Path) -> pa.Table:
    """Of an Arrow file, a stream (as `datasets` writes it) or not; mapped, not read."""
    with pa.memory_map(str(file)) as source:
        try:
            return pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            return pa.ipc.open_file(source).read_all()


def bytes_of(column: pa.Array) -> pa.Array:
    """(N,) binary, of a column of bytes or of {bytes, path}."""
    return column.field("bytes") if pa.types.is_struct(column.type) else column


class ParquetReader:
    """One column of a file, row by row. Going back begins a row group anew."""

    def __init__(self, file: str, column: str):
        self.file = pq.ParquetFile(file, pre_buffer=False, buffer_size=READ_AT_ONCE)
        kind = self.file.schema_arrow.field(column).type
        self.column = f"{column}.bytes" if pa.types.is_struct(kind) else column
        self.ends = []
        for group in range(self.file.num_row_groups):
            self.ends.append((self.ends[-1] if self.ends else 0) + self.file.metadata.row_group(group).num_rows)
        self.group, self.start, self.held = -1, 0, pa.array([], pa.binary())
        self.batches: Iterator = iter(())

    def content(self, row: int) -> bytes | None:
        group = next((group for group, end in enumerate(self.ends) if row < end), None)
        if group is None:
            raise IndexError(f"it has no row {row}")
        if group != self.group or row < self.start:
            self.group, self.start, self.held = group, self.ends[group - 1] if group else 0, self.held[:0]
            self.batches = self.file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[self.column])
        while row >= self.start + len(self.held):
            self.start += len(self.held)
            self.held = bytes_of(next(self.batches).column(0))
        return self.held[row - self.start].as_py()


class ArrowReader:
    def __init__(self, file: str, column: str):
        self.column = arrow_table(file)[column]

    def content(self, row: int) -> bytes | None:
        return bytes_of(self.column.slice(row, 1).combine_chunks())[0].as_py()


class _Readers:
    """Those that were used last. One at a time reads: what is read is then worked on by many."""

    def __init__(self):
        self.open: OrderedDict[tuple, ParquetReader | ArrowReader] = OrderedDict()
        self.lock = threading.Lock()

    def content(self, file: str, column: str, row: int) -> bytes:
        status = os.stat(file)
        key = os.getpid(), file, column, status.st_mtime_ns, status.st_size  # a forked process opens its own
        with self.lock:
            if key not in self.open:
                self.open[key] = (ParquetReader if file.endswith(".parquet") else ArrowReader)(file, column)
            self.open.move_to_end(key)
            while len(self.open) > OPEN_AT_ONCE:
                self.open.popitem(last=False)
            content = self.open[key].content(row)
        if content is None:
            raise FileNotFoundError("the row holds no picture")
        return content


_readers = _Readers()
