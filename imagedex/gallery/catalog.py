"""What is in a gallery: a table, one row a picture, in one file that is replaced as a whole. Its renaming is the one moment in
which a change happens; vectors are written before it, and what it does not name is not there. Behind the columns of ours are the
user's, see `imagedex.gallery.columns`."""

import json
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imagedex.encoding.store import as_scalars
from imagedex.errors import UserError
from imagedex.files import write_atomically

FILE = "catalog.parquet"
FORMAT = 1

SCHEMA = pa.schema(
    {
        "image_id": pa.string(),  # POSIX path relative to its root, after the root's prefix
        "path": pa.string(),  # absolute; of a picture within a table or an archive that file, then "::" and its place
        "root": pa.string(),
        "folder": pa.string(),  # of the image_id; "" at the root
        "bytes": pa.int64(),
        "changed": pa.int64(),  # the file's time, in nanoseconds
        "key": pa.binary(16),  # hash of the content
        "width": pa.int32(),  # pixels, as it is shown
        "height": pa.int32(),
        "date": pa.timestamp("ms"),  # when it was taken; where the picture does not say, its file's time
        "captions": pa.list_(pa.string()),
        "unreadable": pa.string(),  # the reason; "" of a picture that can be found
    }
)
COLUMNS = tuple(SCHEMA.names)


@dataclass
class Roots:
    """Where pictures come from: folder (or file) -> prefix of its image_ids; that of the first is empty."""

    prefixes: dict[str, str] = field(default_factory=dict)

    def prefix(self, root: str, others: Collection[str] = ()) -> str:
        """The root's own, made from its name where it is new: `holiday/`, `holiday-2/`, ... Args: others, image_ids of other
        roots, none of which may begin so."""
        if root not in self.prefixes:
            taken, name, number = set(self.prefixes.values()), Path(root).name or "root", 1
            wanted = f"{name}/" if taken else ""
            while wanted in taken or (wanted and any(image_id.startswith(wanted) for image_id in others)):
                number += 1
                wanted = f"{name}-{number}/"
            self.prefixes[root] = wanted
        return self.prefixes[root]


@dataclass
class Header:
    """What the catalog says of the whole gallery.

    Attributes:
        model: as it was named. maker: its fingerprints, see `imagedex.encoding.store`. files: of the model's files names, sizes
            and times, by which it is known again without a look at its weights.
        vector_type: "float32" or "float16".
        engine: which searches it, see `imagedex.gallery.engines.searcher`.
    """

    model: str
    maker: dict[str, str]
    files: list
    vector_type: str = "float32"
    roots: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT
    engine: str = "auto"


def read(folder: Path) -> tuple[Header, pa.Table] | None:
    """The catalog of a gallery; None where there is none yet. Raises `UserError` for a broken one."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with pq.ParquetFile(path, memory_map=True) as file:  # without pandas, see `readable`
            table = file.read()
        record = json.loads(table.schema.metadata[b"imagedex"])
        if record.get("format") != FORMAT:
            raise UserError(f"{folder} is a gallery of another format ({record.get('format')}); make it anew")
        ours = pa.schema([*SCHEMA, *(field for field in table.schema if field.name not in COLUMNS)])
        return Header(**record), table.replace_schema_metadata(None).select(ours.names).cast(ours)
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is broken ({' '.join(str(error).split())[:120]}); delete it and index again"
        ) from error


def write(folder: Path, header: Header, table: pa.Table) -> None:
    """Whole or not at all: this is the moment in which a change of the gallery happens."""
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"imagedex": json.dumps(asdict(header))}), sink, compression="zstd")
    write_atomically(folder / FILE, sink.getvalue().to_pybytes())


def empty() -> pa.Table:
    return SCHEMA.empty_table()


def readable(table: pa.Table) -> pa.ChunkedArray:
    """Booleans: rows that can be found, those without a reason against it. Not by a comparison with "": constants of pyarrow, and
    its arrays of numpy, import pandas, for which a search would wait."""
    return pc.invert(pc.binary_length(table["unreadable"]).cast(pa.bool_()))


def mask_of(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """(N,) of a column of booleans; a missing one is False."""
    column = column.fill_null(False) if column.null_count else column
    numbers = column.cast(pa.uint8())
    numbers = numbers.combine_chunks() if isinstance(numbers, pa.ChunkedArray) else numbers
    return np.from_dlpack(numbers).astype(bool)


def keys_of(table: pa.Table) -> np.ndarray:
    """(N, 16) uint8."""
    column = table["key"].combine_chunks()
    return np.frombuffer(column.buffers()[1], np.uint8)[
        column.offset * 16 : (column.offset + len(column)) * 16
    ].reshape(-1, 16)


class Names:
    """The image_ids by their rows, made when they are asked for: a list of a million takes 100 MB."""

    def __init__(self, table: pa.Table):
        self._column = table["image_id"]

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, row: int) -> str:
        return self._column[int(row)].as_py()


class Keys:
    """Finds a picture by the hash of its content, in 24 bytes a picture."""

    def __init__(self, table: pa.Table):
        self.table, keys = table, as_scalars(keys_of(table))
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    def path(self, key: bytes) -> str | None:
        """Of the first picture with this content; None where there is none."""
        wanted = np.frombuffer(key, self._sorted.dtype)
        place = int(np.searchsorted(self._sorted, wanted)[0])
        if place == len(self._sorted) or self._sorted[place] != wanted[0]:
            return None
        return self.table["path"][int(self._order[place])].as_py()


def files_of(source: str) -> list:
    """Name, size and time of each file of a model's folder (of a Hub model: of its snapshot)."""
    folder = Path(source)
    names = sorted(
        name for name in os.listdir(folder) if name.endswith((".safetensors", ".json", ".bin", ".txt", ".model"))
    )
    stats = [(name, os.stat(folder / name)) for name in names]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
