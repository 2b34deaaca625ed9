"""Rows of numbers on disk, found by a key: what was encoded once is not encoded again, and memory maps serve every process.

folder/
  store.json                       the format, and what made the rows (fingerprints of weights and preprocessing)
  shard-<16 digits>.safetensors    "keys" (rows, 16) uint8, and the fields, for example "vectors" (rows, D) float32

A shard is written aside and renamed, so a killed run loses at most the shards it was writing, and two runs may fill one folder:
both write the same. Its name comes from its keys, and its metadata hold the maker's fingerprint and a checksum: a shard that is
damaged or of another maker is made anew, and so is what somebody deletes meanwhile.
"""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch

from imagedex.errors import UserError
from imagedex.files import A_DAY, CannotWrite, clear_leftovers, write_atomically, writing

logger = logging.getLogger(__name__)

RECORD = "store.json"
FORMAT = 2
KEY_BYTES = 16
ROWS_PER_SHARD = 2048
_ORIGIN = {"_name_or_path", "_commit_hash", "transformers_version", "architectures", "auto_map", "custom_pipelines", "dtype",
           "torch_dtype"}  # fmt: skip
_ATTEMPTS = 3  # at making the rows of a folder that somebody deletes
BROKEN = (ValueError, KeyError, TypeError, AttributeError)  # what reading a damaged file raises
_TYPES = {"F32": np.float32, "F16": np.float16, "I32": np.int32, "U8": np.uint8}


@dataclass
class Shard:
    """One file: keys (rows, 16) uint8 and the fields (rows, ...), both mapped, not read. Another process maps it again.
    Without a path: rows that are in memory alone."""

    path: Path | None
    keys: np.ndarray
    fields: dict[str, np.ndarray]

    def __getstate__(self):
        return self.path or (self.keys, self.fields)

    def __setstate__(self, state: Path | tuple):
        if isinstance(state, Path):
            _, fields = mapped(state)
            self.path, self.keys, self.fields = state, fields.pop("keys"), fields
        else:
            self.path, (self.keys, self.fields) = None, state


class Store:
    """A folder of shards.

    Args:
        folder: made at the first write.
        maker: fingerprints of what made the rows. A folder of another maker is refused.
        what: in messages, what the folder is ("index").
        in_memory: where the folder cannot be written, at most so many bytes of rows are held for this run instead.

    Raises `UserError`: a folder of another maker or format, or one that cannot be read.
    """

    def __init__(self, folder: str | Path, maker: dict[str, str], what: str = "store", in_memory: int = 0):
        self.folder, self.maker, self.what = Path(folder), maker, what
        self._known: dict[tuple, Shard] = {}  # path, time and size of files that were found whole
        self.in_memory, self._held, self._keeps = in_memory, [], True
        self._record_is_damaged = False
        self._check_record()
        self.reload()

    def _check_record(self) -> None:
        path = self.folder / RECORD
        if not path.exists():
            if (self.folder / "index.json").exists():
                raise UserError(f"{self.folder} is an index of an older format; delete it or give another folder")
            return
        try:
            record = read_checked(path)
            found, made = record["format"], dict(record["maker"])
        except BROKEN:  # each shard knows its maker, too
            logger.warning("%s is damaged; it is written anew", path)
            self._record_is_damaged = True
            return
        other = [name for name in self.maker if found == FORMAT and made.get(name) != self.maker[name]]
        if found != FORMAT or other:
            kind = f"{other[0]} (other weights or another preprocessing)" if other else "format"
            raise UserError(f"{self.folder} is the {self.what} of another {kind}; delete it or give another folder")

    def _write_record(self) -> None:
        record = with_checksum({"format": FORMAT, "maker": self.maker})
        with writing(self.folder):
            write_atomically(self.folder / RECORD, json.dumps(record, indent=2) + "\n")
        self._record_is_damaged = False

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(json.dumps(self.maker, sort_keys=True).encode(), digest_size=16).hexdigest()

    def reload(self) -> None:
        """Looks at the folder again, for what other processes have written since."""
        paths = sorted(self.folder.glob("shard-*.safetensors")) if self.folder.is_dir() else []
        self.shards = [shard for path in paths if (shard := self._open(path)) is not None] + self._held
        keys = np.concatenate([np.empty(0, f"V{KEY_BYTES}"), *(as_scalars(shard.keys) for shard in self.shards)])
        sizes = [len(shard.keys) for shard in self.shards]
        self._shard_of = np.repeat(np.arange(len(sizes)), sizes)
        self._place_of = np.concatenate([np.arange(size) for size in sizes]) if sizes else np.empty(0, np.int64)
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    def _open(self, path: Path) -> Shard | None:
        """None, and a line in the log, for a file that is damaged or of another maker."""
        try:
            stat = path.stat()
            known = path, stat.st_mtime_ns, stat.st_size
            if known in self._known:
                return self._known[known]
            metadata, fields = mapped(path)
            maker, whole = metadata["maker"], metadata["checksum"] == checksum(fields)
        except BROKEN as error:
            logger.debug("%s: %s", path, error)
            whole = False
        except FileNotFoundError:  # deleted since the folder was listed
            return None
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if not whole:
            logger.warning("%s is damaged; its rows are made anew", path)
            return None
        if maker != self.fingerprint:
            logger.warning("%s is of another %s; its rows are made anew", path, self.what)
            return None
        self._known[known] = Shard(path, fields.pop("keys"), fields)
        return self._known[known]

    def __len__(self) -> int:
        return len(self._sorted)

    def _find(self, keys: np.ndarray) -> np.ndarray:
        """(N,) place of each key among all rows, -1 where it is not there. Args: keys (N, 16) uint8."""
        wanted = as_scalars(keys)
        if not len(self._sorted):
            return np.full(len(wanted), -1)
        at = np.minimum(np.searchsorted(self._sorted, wanted), len(self._sorted) - 1)
        return np.where(self._sorted[at] == wanted, self._order[at], -1)

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """Rows of `keys` that are not there, ascending; of equal keys the first."""
        first = np.zeros(len(keys), bool)
        first[np.unique(as_scalars(keys), return_index=True)[1]] = True
        return np.flatnonzero(first & (self._find(keys) < 0))

    def rows(self, keys: np.ndarray) -> "StoredRows":
        """The rows of these keys, in their order. Raises a `KeyError` when some are not there."""
        found = self._find(keys)
        if (found < 0).any():
            raise KeyError(f"{(found < 0).sum()} of {len(keys)} rows are not in {self.folder}")
        return StoredRows(self.shards, self._shard_of[found], self._place_of[found])

    def write(self, keys: np.ndarray, **fields: np.ndarray) -> Path:
        """A new shard's file, whole or not at all. Args: keys (rows, 16) uint8; fields (rows, ...). `reload` finds it. Raises
        `CannotWrite`."""
        if not (self.folder / RECORD).exists():
            self._write_record()
        arrays = {name: np.ascontiguousarray(value) for name, value in {"keys": keys, **fields}.items()}
        # one entry: safetensors writes several in any order, and the same rows are to be the same bytes
        metadata = {"shard": json.dumps({"maker": self.fingerprint, "checksum": checksum(arrays)})}
        name = hashlib.blake2b(arrays["keys"].tobytes(), digest_size=8).hexdigest()
        path = self.folder / f"shard-{name}.safetensors"
        with writing(self.folder):
            write_atomically(path, safetensors.numpy.save(arrays, metadata))
        return path

    def hold(self, why: object) -> None:
        """From here on nothing is written: rows are held in memory. Raises `UserError` where that is not allowed."""
        if not self.in_memory:
            raise UserError(str(why))
        self._keeps = False
        logger.warning("%s: what it lacks is kept in memory, for this run alone", why)

    def _keep(self, keys: np.ndarray, fields: dict[str, np.ndarray]) -> None:
        """On disk, or else in memory."""
        if self._keeps:
            try:
                self.write(keys, **fields)
                return
            except CannotWrite as error:
                if not self.in_memory:
                    raise
                self.hold(error)
        self._held.append(Shard(None, keys, fields))
        size = sum(field.nbytes for shard in self._held for field in shard.fields.values())
        if size > self.in_memory:
            raise UserError(
                f"{self.folder} cannot be written, and what it lacks takes more than {self.in_memory / 1e6:,.0f} MB of memory; "
                "name another folder"
            )

    def fill(
        self,
        keys: np.ndarray,
        encode: Callable[[list[Sequence[int]]], Iterator[dict[str, np.ndarray]]],
        batch_size: int,
        share: tuple[int, int] = (0, 1),
        rows_per_shard: int = ROWS_PER_SHARD,
    ) -> None:
        """Encodes and writes what is missing of `keys`, and looks at the folder again.

        Shards are cut by the rows' places in `keys`, and no batch crosses their borders: a run that was stopped and went on, or
        was shared by several processes, has the batches, and so the bits, of one that was not.

        Args:
            encode: batches of rows -> the fields of each batch, one batch after the other.
            share: this process's number, and how many processes share the work.

        Raises `UserError`: the folder cannot be written, or loses what is written there.
        """
        clear_leftovers(self.folder, older_than=A_DAY)
        if self._record_is_damaged:
            with suppress(CannotWrite):
                self._write_record()
        for _ in range(_ATTEMPTS):
            self._fill(keys, encode, batch_size, share, rows_per_shard)
            self.reload()
            if share[1] > 1 or not len(self.missing(keys)):  # others may be at work on their shares
                return
            logger.warning("%s has lost rows while others were made (deleted?); they are made anew", self.folder)
        raise UserError(f"{self.folder} loses what is written there: something deletes it; give another folder")

    def _fill(self, keys, encode, batch_size: int, share: tuple[int, int], rows_per_shard: int) -> None:
        shards = np.split(rows := self.missing(keys), np.flatnonzero(np.diff(rows // rows_per_shard)) + 1)
        shards = [shard for shard in shards if len(shard)][share[0] :: share[1]]
        batches = [shard[at : at + batch_size] for shard in shards for at in range(0, len(shard), batch_size)]
        made = iter(encode([batch.tolist() for batch in batches]))
        for shard in shards:
            parts = [next(made) for _ in range(0, len(shard), batch_size)]
            self._keep(keys[shard], {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
        for _ in made:  # lets what encodes end in its own time
            pass


@dataclass
class StoredRows:
    """Rows of a store in an order of their own. shard_of, place_of (N,): where each lies. kept: what a search makes of them."""

    shards: list[Shard]
    shard_of: np.ndarray
    place_of: np.ndarray
    kept: dict = field(default_factory=dict, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.shard_of)

    def row(self, name: str, row: int) -> np.ndarray:
        """One row of a field; a view of the mapped file."""
        return self.shards[self.shard_of[row]].fields[name][self.place_of[row]]

    def array(self, name: str, rows: Sequence[int] | slice = slice(None)) -> np.ndarray:
        """(rows, ...): some rows of a field, copied into memory."""
        shard_of, place_of = self.shard_of[rows], self.place_of[rows]
        if not len(shard_of):
            return np.empty((0, 0), np.float32)
        field = self.shards[shard_of[0]].fields[name]
        found = np.empty((len(shard_of), *field.shape[1:]), field.dtype)
        order = np.argsort(shard_of, kind="stable")
        for own in np.split(order, np.flatnonzero(np.diff(shard_of[order])) + 1):
            found[own] = self.shards[shard_of[own[0]]].fields[name][place_of[own]]
        return found


def as_scalars(keys: np.ndarray) -> np.ndarray:
    """(N, 16) uint8 -> (N,) items that numpy sorts and compares as one."""
    return np.ascontiguousarray(keys, np.uint8).view(f"V{KEY_BYTES}").reshape(-1)


def mapped(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and arrays of a safetensors file, mapped into memory. Raises `ValueError` and `KeyError` for a broken one."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= path.stat().st_size - 8:
            raise ValueError("no header")
        header = json.loads(file.read(length))
    # mapped by torch: numpy's maps keep a file descriptor each, of which a process has few
    size = path.stat().st_size
    content = torch.tensor([], dtype=torch.uint8).set_(torch.UntypedStorage.from_file(str(path), False, size)).numpy()
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            kind, shape = np.dtype(_TYPES[entry["dtype"]]), tuple(entry["shape"])
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            if math.prod(shape) * kind.itemsize != end - start or end > size:
                raise ValueError(f"{name} has another size than its header says")
            arrays[name] = content[start:end].view(kind).reshape(shape)
    return json.loads(header["__metadata__"]["shard"]), arrays


def checksum(arrays: dict[str, np.ndarray]) -> str:
    """Of names, types, shapes and every byte."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(arrays.items()):
        digest.update(f"{name} {value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def with_checksum(record: dict) -> dict:
    """A record of JSON values, and the checksum of it."""
    content = json.dumps(record, sort_keys=True).encode()
    return record | {"checksum": hashlib.blake2b(content, digest_size=16).hexdigest()}


def read_checked(path: Path) -> dict:
    """A record that was written `with_checksum`; older ones have none. Raises a `ValueError` for a damaged one, `OSError` for
    none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = record.pop("checksum", None)
    except BROKEN as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error
    if found not in (None, with_checksum(record)["checksum"]):
        raise ValueError(f"{path.name} has another checksum than its content")
    return record


def check_room(folder: Path, size: int) -> None:
    """Raises `CannotWrite` when the disk of `folder`, which may not exist yet, has fewer than `size` bytes left."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{existing} is a file; give a folder")
    free = shutil.disk_usage(existing).free
    if free < size:
        raise CannotWrite(
            f"{folder} needs {size / 1e6:,.0f} MB and its disk has {free / 1e6:,.0f} MB left; name another"
        )


def weights_fingerprint(model: torch.nn.Module, *settings: object) -> str:
    """Hash of every weight, its type and its name, and of what else decides what the model makes of an input: its class, its
    configuration, and settings (JSON values and tensors)."""
    digest = hashlib.blake2b(digest_size=16)
    config = without_origin(model.config.to_dict()) if hasattr(model, "config") else {}
    settings = (*settings, type(model).__name__, config)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    digest.update(json.dumps(settings, sort_keys=True, default=fingerprint_of).encode())
    return digest.hexdigest()


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def fingerprint_of(value: object) -> str:
    """Of a setting that is no JSON value: a tensor's is of every number in it."""
    return hashlib.blake2b(bytes_of(value), digest_size=16).hexdigest() if torch.is_tensor(value) else str(value)


def without_origin(config):
    """A configuration's mapping, without what says where it came from or which version wrote it; of its parts, too."""
    if not isinstance(config, dict):
        return config
    return {name: without_origin(value) for name, value in config.items() if name not in _ORIGIN and value is not None}


def key_of(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def picture_keys(dataset) -> np.ndarray:
    """(N, 16) uint8, a key a picture: of its image_id and of its file's place, size and time, or of the bytes that the row itself
    holds."""
    keys = []
    for table in dataset.select_columns(["image_id", "image"]).with_format("arrow").iter(batch_size=1000):
        image = table["image"].combine_chunks()
        stored, paths = image.field("bytes"), image.field("path").to_pylist()
        for row, (image_id, path) in enumerate(zip(table["image_id"].to_pylist(), paths, strict=True)):
            if stored[row].is_valid:
                state = memoryview(stored[row].as_buffer())
            else:
                stat = Path(path).stat() if path and Path(path).is_file() else None
                state = f"{stat.st_size} {stat.st_mtime_ns} {Path(path).resolve()}" if stat else path or ""
                state = state.encode("utf-8", "surrogatepass")
            keys.append(key_of(image_id.encode("utf-8", "surrogatepass"), state))
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
