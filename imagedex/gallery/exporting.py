"""A gallery for other software: one Parquet file, or a collection of Milvus."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from imagedex.encoding.store import ROWS_PER_SHARD
from imagedex.errors import UserError
from imagedex.files import whole_file, writing
from imagedex.gallery import columns
from imagedex.gallery.engines import milvus
from imagedex.gallery.engines.index import Pictures

logger = logging.getLogger(__name__)

LONGEST_ID = 65_535  # bytes, Milvus' own limit
FIELDS = ("id", "gallery")  # of a collection, beside those of the catalog and of the Parquet file


def export(table: pa.Table, pictures: Pictures, folder: Path, to: str | Path, progress: bool = False) -> int:
    """Writes the catalog with each picture's vector (and its bias, which is taken off scores, where the model has one).

    Args: table, the catalog's rows of `pictures`; to, the name of a .parquet file, or milvus:URI.

    Returns: how many pictures.
    """
    if str(to).startswith("milvus:"):
        return to_milvus(table, pictures, folder, milvus.absolute(str(to).removeprefix("milvus:")), progress)
    path = Path(to).expanduser()
    if path.suffix != ".parquet" or path.is_dir():
        raise UserError(f"{path}: give the name of a .parquet file, or milvus:URI")
    with writing(path.parent), whole_file(path) as file:
        size = pictures.rows.row("vectors", 0).shape[0] if len(pictures) else 0
        schema = table.schema.append(pa.field("vector", pa.list_(pa.float32(), size)))
        if pictures.bias is not None:
            schema = schema.append(pa.field("bias", pa.float32()))
        with pq.ParquetWriter(file, schema) as writer:
            for part, vectors, bias in blocks(table, pictures, ROWS_PER_SHARD):
                added = [pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), size)]
                added += [pa.array(bias)] if bias is not None else []
                writer.write_table(pa.Table.from_arrays([*part.columns, *added], schema=schema))
    return len(pictures)


def blocks(table: pa.Table, pictures: Pictures, size: int) -> Iterator[tuple]:
    """Rows of the catalog with their vectors (rows, D) float32 and biases (rows,) float32 or None."""
    for start in range(0, len(table), size):
        rows = slice(start, start + size)
        bias = None if pictures.bias is None else pictures.rows.array(pictures.bias, rows).astype(np.float32)
        yield table.slice(start, size), pictures.rows.array("vectors", rows).astype(np.float32), bias


def to_milvus(table: pa.Table, pictures: Pictures, folder: Path, uri: str, progress: bool) -> int:
    """A collection with a row a picture: id, vector, and what the catalog says as dynamic fields. A second time the same rows are
    written over, and those of pictures that are gone leave: so a run that was stopped is given again."""
    from tqdm.auto import tqdm

    place, _, name = uri.partition("#")
    name = name or "pictures_" + re.sub(r"\W", "_", folder.resolve().name, flags=re.ASCII)
    longest = max(map(len, (one.encode("utf-8", "surrogatepass") for one in pictures.names)), default=0)
    if not len(pictures) or longest > LONGEST_ID:
        raise UserError(f"{folder} holds no picture" if not len(pictures) else f"an image_id is {longest} bytes long")
    owner = f"{pictures.maker} {folder.resolve()}"
    table = renamed(table)
    client = milvus.connected(place)
    with milvus.speaking_to(place):
        open_collection(client, name, owner, pictures.rows.row("vectors", 0).shape[0])
        with tqdm(total=len(table), desc="export", unit="pictures", disable=not progress) as bar:
            for part, vectors, bias in blocks(table, pictures, milvus.ROWS_AT_ONCE):
                client.upsert(name, described(part, vectors, bias, owner))
                bar.update(len(part))
        gone = sorted(set(milvus.all_ids(client, name, "id")) - set(pictures.names))
        for at in range(0, len(gone), milvus.ROWS_AT_ONCE):
            client.delete(name, ids=gone[at : at + milvus.ROWS_AT_ONCE])
        client.flush(name)
    logger.info("Milvus at %s: the collection is %s", place, name)
    return len(pictures)


def open_collection(client, name: str, owner: str, size: int) -> None:
    """Raises `UserError` for a collection of another gallery, of another model, or of somebody else."""
    if client.has_collection(name):
        fields = {field["name"]: field for field in client.describe_collection(name)["fields"]}
        client.load_collection(name)
        ours = {"id", milvus.VECTOR} <= set(fields) and fields[milvus.VECTOR]["params"].get("dim") == size
        if not ours or client.query(name, filter=f"gallery != {quoted(owner)}", limit=1, output_fields=["id"]):
            raise UserError(f"Milvus' collection {name} is of another gallery or model; name another: milvus:URI#NAME")
        return
    from pymilvus import DataType

    schema = client.create_schema(auto_id=False, enable_dynamic_field=True)
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=LONGEST_ID)
    schema.add_field(milvus.VECTOR, DataType.FLOAT_VECTOR, dim=size)
    parameters = milvus.index_parameters(client)
    client.create_collection(name, schema=schema, index_params=parameters, consistency_level="Strong")


def renamed(table: pa.Table) -> pa.Table:
    """The user's columns that would be written over have another name; says so."""
    names = list(table.column_names)
    for name in [name for name in FIELDS if name in names]:
        own = columns.usable_name(f"{name}_", set(names))
        logger.warning("Milvus: the column %s is called %s there", name, own)
        names[names.index(name)] = own
    return table.rename_columns(names)


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def described(part: pa.Table, vectors: np.ndarray, bias: np.ndarray | None, owner: str) -> list[dict]:
    """Rows of the catalog in the types of JSON, with their vectors; what is missing is left out."""
    rows = []
    for at, row in enumerate(part.to_pylist()):
        plain = {name: as_json(value) for name, value in row.items() if value is not None and name != "unreadable"}
        plain |= {} if bias is None else {"bias": float(bias[at])}
        rows.append(plain | {"id": plain.pop("image_id"), milvus.VECTOR: vectors[at], "gallery": owner})
    return rows


def as_json(value):
    """Dates and times as ISO 8601, bytes in hexadecimal digits."""
    if isinstance(value, bytes):
        return value.hex()
    return value.isoformat() if hasattr(value, "isoformat") else value
