"""Milvus: a file of its own within the gallery (milvus-lite), or a cluster by its URI.

The gallery stays the truth: Milvus holds a vector for each content, with the first eight bytes of its key as the id, and proposes
candidates. Filters are those of the catalog: Milvus is given the ids that pass, or those that do not, whichever are fewer.

    folder/milvus.db       the embedded file
    folder/milvus.json     the collections' token, and what the collection held when it was last in step
"""

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from imagedex.encoding.store import BROKEN, read_checked, with_checksum
from imagedex.errors import UserError
from imagedex.files import write_atomically, writing
from imagedex.gallery.engines.index import Index, Pictures

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 1000  # in a message: with 1,152 numbers 5 MB
MOST_FOUND = 16_384  # Milvus' own limit
MOST_LISTED = 100_000  # ids in a filter's message
CELLS, VISITED = 1024, 128  # of the IVF index
VECTOR = "vector"
PATIENCE = 10  # seconds until a cluster has to answer


def library():
    """pymilvus. Raises `UserError` where it is not installed."""
    try:
        import pymilvus
    except ImportError as error:
        raise UserError(
            f"Milvus is not installed ({error.name} is missing): pip install 'imagedex[milvus]', or give --engine exact"
        ) from error
    for name in ("pymilvus", "milvus_lite", "grpc._server"):  # what fails is said in one line, by us
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return pymilvus


def absolute(uri: str) -> str:
    """URI, or file, or either with #COLLECTION; a file's whole path. Raises `UserError` for what is none."""
    place, sign, name = uri.partition("#")
    if "@" in place:
        raise UserError("a password within milvus:URI would be kept in files; put user:password into MILVUS_TOKEN")
    if not place or sign and not (name.isidentifier() and name.isascii()):
        raise UserError(
            f"milvus:{uri}: give milvus:http://HOST:19530 or milvus:FILE.db, and after # a collection's name"
        )
    if "://" not in place:
        if not place.endswith(".db"):
            raise UserError(f"milvus:{uri}: an embedded file's name ends in .db; a cluster's begins with http://")
        place = os.path.abspath(os.path.expanduser(place))
    return place + sign + name


@contextmanager
def speaking_to(place: str) -> Iterator[None]:
    """What goes wrong with Milvus, as one line. Raises `UserError`."""
    pymilvus = library()
    import grpc

    try:
        yield
    except (pymilvus.MilvusException, grpc.RpcError) as error:
        reason = " ".join(str(getattr(error, "message", error)).split())[:200]
        if "://" not in place:
            reason = f"another process has it open, or it is damaged; stop that one, or delete the file ({reason})"
        raise UserError(f"Milvus at {place}: {reason}") from error


def connected(place: str):
    """A client. MILVUS_TOKEN: user:password, or a token. Raises `UserError`."""
    pymilvus = library()
    if "://" not in place:
        with writing(place):
            Path(place).parent.mkdir(parents=True, exist_ok=True)
        try:
            import milvus_lite  # noqa: F401
        except ImportError as error:
            raise UserError("Milvus' embedded file needs milvus-lite: pip install 'imagedex[milvus]'") from error
    with speaking_to(place):
        return pymilvus.MilvusClient(uri=place, token=os.environ.get("MILVUS_TOKEN", ""), timeout=PATIENCE)


def index_parameters(client):
    parameters = client.prepare_index_params()
    parameters.add_index(VECTOR, index_type="IVF_FLAT", metric_type="IP", params={"nlist": CELLS})
    return parameters


def all_ids(client, collection: str, field: str) -> list:
    """Of a collection, whatever its size."""
    pages, found = client.query_iterator(collection, batch_size=5000, output_fields=[field]), []
    while page := pages.next():
        found += [row[field] for row in page]
    pages.close()
    return found


def short(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()


class MilvusIndex(Index):
    """Args: uri, as from `absolute`; "": the embedded file."""

    def __init__(self, folder: Path, uri: str = ""):
        self.folder = Path(folder)
        place, _, self.name = uri.partition("#")
        self.place = place or str(self.folder / "milvus.db")
        self.client, self.collection, self.held = connected(self.place), None, np.empty(0, np.int64)
        self.record = self._record()

    @property
    def record_path(self) -> Path:
        return self.folder / "milvus.json"

    def _record(self) -> dict:
        try:
            return read_checked(self.record_path)
        except (FileNotFoundError, *BROKEN):
            return {"token": secrets.token_hex(6)}

    def _write_record(self, held: str) -> None:
        self.record = {"token": self.record["token"], "place": self.place, "collection": self.collection, "held": held}
        with writing(self.folder):
            write_atomically(self.record_path, json.dumps(with_checksum(self.record)) + "\n")

    def _prefix(self) -> str:
        """Of this gallery's collections: a copy of it, or another one on a cluster, has another."""
        if self.name:
            return f"{self.name}_"
        return (
            f"imagedex_{short(self.record['token'], str(self.folder.resolve()))}_"
            if "://" in self.place
            else "imagedex_"
        )

    def prepare(self, pictures: Pictures, rows: np.ndarray) -> bool:
        prefix, size = self._prefix(), pictures.widened(rows[:1]).shape[1]
        self.collection = prefix + short(pictures.maker, str(size))
        with speaking_to(self.place):
            for name in self.client.list_collections():
                if name.startswith(prefix) and name != self.collection and len(name) == len(self.collection):
                    logger.warning("Milvus: %s is of another model; it is made anew", name)
                    self.client.drop_collection(name)
            new = not self.client.has_collection(self.collection)
            if new:
                self._create(size)
            self.client.load_collection(self.collection)
            self.held = self._ids_held(self.ids_of(pictures.keys[rows]))
        return new

    def _create(self, size: int) -> None:
        kinds = library().DataType
        schema = self.client.create_schema(auto_id=False)
        schema.add_field("id", kinds.INT64, is_primary=True)
        schema.add_field(VECTOR, kinds.FLOAT_VECTOR, dim=size)
        parameters = index_parameters(self.client)
        self.client.create_collection(
            self.collection, schema=schema, index_params=parameters, consistency_level="Strong"
        )

    def _ids_held(self, wanted: np.ndarray) -> np.ndarray:
        """What the collection holds: those that it was left with, if it still has as many, or else what it says itself."""
        before = self.record.get("place"), self.record.get("collection"), self.record.get("held")
        if before == (self.place, self.collection, fingerprint(wanted)):
            counted = self.client.query(self.collection, filter="", output_fields=["count(*)"])[0]["count(*)"]
            if counted == len(wanted):
                return np.sort(wanted)
        return np.sort(np.array(all_ids(self.client, self.collection, "id"), np.int64))

    def ids_of(self, keys: np.ndarray) -> np.ndarray:
        ids = np.ascontiguousarray(keys[:, :8]).view(np.int64).reshape(-1)
        if len(np.unique(ids)) != len(np.unique(keys, axis=0)):  # one gallery of ten million in 300,000
            raise UserError("two pictures' hashes begin alike, which Milvus could not tell apart; give --engine faiss")
        return ids

    def lacking(self, keys: np.ndarray) -> np.ndarray:
        return ~np.isin(self.ids_of(keys), self.held)

    def add(self, keys: np.ndarray, vectors: np.ndarray) -> None:
        self._begin()
        ids = self.ids_of(keys)
        with speaking_to(self.place):
            for at in range(0, len(ids), ROWS_AT_ONCE):
                part = slice(at, at + ROWS_AT_ONCE)
                rows = zip(ids[part].tolist(), vectors[part], strict=True)
                self.client.upsert(self.collection, [{"id": number, VECTOR: vector} for number, vector in rows])
        self.held = np.union1d(self.held, ids)

    def delete_others(self, keys: np.ndarray) -> int:
        gone = np.setdiff1d(self.held, self.ids_of(keys))
        if len(gone):
            self._begin()
            with speaking_to(self.place):
                for at in range(0, len(gone), ROWS_AT_ONCE):
                    self.client.delete(self.collection, ids=gone[at : at + ROWS_AT_ONCE].tolist())
            self.held = np.setdiff1d(self.held, gone)
        return len(gone)

    def _begin(self) -> None:
        """From here to `save` the collection is in no known state: a kill is noticed."""
        if self.record.get("held") != "":
            self._write_record("")

    def save(self) -> None:
        with speaking_to(self.place):
            self.client.flush(self.collection)
        self._write_record(fingerprint(self.held))

    def nearest(self, asked: np.ndarray, count: int, allowed: np.ndarray | None, depth: float) -> list | None:
        limit = ""
        if allowed is not None:
            others = np.setdiff1d(self.held, allowed)
            sign, listed = ("in", allowed) if len(allowed) <= len(others) else ("not in", others)
            limit = f"id {sign} {listed.tolist()}" if len(listed) else ""
            if len(listed) > MOST_LISTED:
                logger.info("the filter is too long for Milvus; exact search answers")
                return None
        if count > MOST_FOUND:
            return None
        deeper = max(1.0, depth / 100)  # a filter that few pass reaches into more cells
        options = {"params": {"nprobe": int(min(CELLS, VISITED * deeper))}}
        with speaking_to(self.place):
            answers = self.client.search(
                self.collection, data=list(asked), limit=count, filter=limit, search_params=options,
                output_fields=["id"], consistency_level="Strong",
            )  # fmt: skip
        return [np.array([hit["id"] for hit in hits], np.int64) for hits in answers]


def fingerprint(ids: np.ndarray) -> str:
    return hashlib.blake2b(np.sort(ids).tobytes(), digest_size=16).hexdigest()
