"""A gallery: pictures on disk, their vectors, and the search over them.

folder/
  catalog.parquet     what is in it, see `imagedex.gallery.catalog`: readable with pandas, DuckDB, ...
  vectors/            the vectors by the hash of a picture's content, see `imagedex.encoding.store`

A picture that is renamed, or lies there twice, is encoded once. What is removed leaves the catalog at once and the disk when a
fifth of it would be such rows.
"""

import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image

from imagedex.encoding.store import ROWS_PER_SHARD, Store
from imagedex.encoding.vectors import encode_texts, image_vector_batches
from imagedex.errors import UserError
from imagedex.files import alone_in, whole_file
from imagedex.gallery import catalog, compaction, exact, filters, scanning
from imagedex.gallery.model import DEFAULT_MODEL, GalleryModel
from imagedex.gallery.pictures import IndexedPictures, PlacedPictures, open_picture
from imagedex.gallery.processes import Processes
from imagedex.gallery.query import Part, read_parts

logger = logging.getLogger(__name__)

VECTORS = "vectors"
QUERIES_AT_ONCE = 256
NOT_READ = bytes(16)  # the key of a file that could not be opened
VECTOR_TYPES = {"float32": np.float32, "float16": np.float16}


@dataclass
class Found:
    """A picture that was found. score: a cosine, less the picture's bias where the model has kept a bank against hubs."""

    image_id: str
    path: str
    score: float
    row: dict = field(repr=False)  # all that the catalog says of it

    @property
    def picture(self) -> Image.Image:
        """Opened now, as a viewer shows it."""
        return open_picture(self.path)


class Gallery:
    """Opened by `Gallery.open`. hidden: columns that filters do not see, where strangers ask."""

    hidden: tuple[str, ...] = ()

    def __init__(
        self, folder: Path, model: GalleryModel, header: catalog.Header | None, table: pa.Table, vector_type: str
    ):
        self.folder, self.model, self.header, self.table, self.vector_type = folder, model, header, table, vector_type
        self._store: Store | None = None
        self._searched: tuple | None = None

    @classmethod
    def open(
        cls, folder: str | Path, model: str | None = None, *, device: str | None = None, vector_type: str | None = None,
        trust_remote_code: bool = False,
    ) -> "Gallery":  # fmt: skip
        """Opens a gallery, or begins one where there is none: its folder is made when the first picture is added.

        Args:
            model: a dual encoder's folder or Hub id; by default the gallery's own, and of a new one SigLIP 2.
            vector_type: "float32" or "float16", which takes half the room; of a new gallery.

        Raises:
            UserError: a broken gallery, or one of another model.
        """
        folder = Path(folder).expanduser()
        if folder.exists() and not folder.is_dir():
            raise UserError(f"the gallery {folder} is a file; give a folder")
        known = catalog.read(folder)
        if (
            known is None
            and folder.is_dir()
            and any(not name.startswith(".") for name in os.listdir(folder))
            and not (folder / VECTORS).is_dir()
        ):
            raise UserError(f"{folder} is not empty and no gallery; give another folder")
        header, table = known or (None, catalog.empty())
        if vector_type not in (None, *VECTOR_TYPES):
            raise UserError(f"vector_type {vector_type!r}: one of {', '.join(VECTOR_TYPES)}")
        if header and vector_type not in (None, header.vector_type):
            raise UserError(f"{folder} holds {header.vector_type} vectors; make another gallery for {vector_type}")
        if model is None and header is None:
            logger.warning("no model was named, so %s is taken", DEFAULT_MODEL)
        name = model or (header.model if header else DEFAULT_MODEL)
        opened = GalleryModel(name, device, trust_remote_code, header)
        gallery = cls(folder, opened, header, table, header.vector_type if header else vector_type or "float32")
        if header and opened.name != header.model and opened.maker != header.maker:
            raise UserError(
                f"the gallery {folder} is of {header.model}; {model} would see its pictures otherwise: make another"
            )
        return gallery

    def __len__(self) -> int:
        """Pictures that can be found."""
        return len(self.readable)

    @property
    def store(self) -> Store:
        if self._store is None:
            self._store = Store(self.folder / VECTORS, self.model.maker, "gallery")
        return self._store

    @property
    def readable(self) -> np.ndarray:
        """Rows of the catalog that can be found."""
        return np.flatnonzero(pc.equal(self.table["unreadable"], "").to_numpy())

    # changes

    def add(
        self, *sources: str | Path, batch_size: int = 64, num_workers: int = 0, threads: int = 8, progress: bool = False
    ) -> scanning.Changes:
        """Looks at folders of pictures, lists of files and archives, and brings the gallery in step with them: new and changed
        pictures are encoded, those that are gone from them leave. What was added from elsewhere stays.

        Args: threads, which read the files' heads; num_workers, processes which decode pictures.

        Returns: what changed. A second call on the same sources changes nothing.
        """
        checked = list(dict.fromkeys(scanning.check_source(source) for source in sources))
        processes = Processes()
        self.folder.mkdir(parents=True, exist_ok=True)
        with alone_in(self.folder, "gallery") if processes.is_first else nullcontext():
            self.refresh()
            looked = processes.from_first(lambda: self._look(checked, threads, progress))
            return self._update(*looked, processes, batch_size, num_workers, progress)

    def remove(self, image_ids: Sequence[str] = (), where: str | None = None) -> list[str]:
        """Takes pictures out: those named, and those for which the filter holds. They come back if `add` finds them again."""
        if self.header is None:
            raise UserError(f"{self.folder} holds no picture")
        with alone_in(self.folder, "gallery"):
            self.refresh()
            gone = pc.is_in(self.table["image_id"], pa.array(list(image_ids), pa.string())).to_numpy()
            unknown = set(image_ids) - set(self.table["image_id"].to_pylist())
            if unknown:
                raise UserError(f"{self.folder} holds no picture {sorted(unknown)[0]}")
            if where is not None:
                gone |= filters.allowed(self.table, where)
            removed = self.table.filter(pa.array(gone))["image_id"].to_pylist()
            self._commit(self.table.filter(pa.array(~gone)))
            return removed

    def refresh(self) -> None:
        """Another process may have changed the gallery since it was opened."""
        known = catalog.read(self.folder)
        if known:
            self.header, self.table = known
        self._store = self._searched = None

    def _look(self, sources, threads: int, progress: bool) -> tuple:
        """(header, table, changes, the sources) as they are now, before anything is encoded."""
        header = catalog.Header(self.model.name, self.model.maker, self.model.files, self.vector_type)
        if self.header:  # a copy: what ends in an error changes nothing
            header = replace(self.header, files=self.model.files)
        roots, changes, places = catalog.Roots(dict(header.roots)), scanning.Changes(), []
        known = list(zip(self.table["image_id"].to_pylist(), self.table["root"].to_pylist(), strict=True))
        for source in sources:
            taken = {place.image_id for place in places if place.root != str(source)}
            taken |= {name for name, root in known if root != str(source)}
            found, others = scanning.places_in(source, roots.prefix(str(source), taken))
            places += found
            for ending, count in others.items():
                changes.passed_over[ending] = changes.passed_over.get(ending, 0) + count
        header.roots = roots.prefixes
        names = {str(source) for source in sources}
        self._check_names(places, names)
        return header, self._in_step(places, names, changes, threads, progress), changes, sorted(names)

    def _check_names(self, places, roots: set[str]) -> None:
        """Raises `UserError` where two pictures would have one image_id: one of them could not be found."""
        others = self.table.filter(pc.invert(pc.is_in(self.table["root"], pa.array(sorted(roots), pa.string()))))
        seen = dict(zip(others["image_id"].to_pylist(), others["path"].to_pylist(), strict=True))
        for place in places:
            if seen.setdefault(place.image_id, place.path) != place.path:
                both = f"{seen[place.image_id]} and {place.path}"
                raise UserError(
                    f"{both} would both be called {place.image_id}; give one folder that holds both, or two galleries"
                )

    def _update(self, header, table, changes, roots, processes, batch_size, num_workers, progress) -> scanning.Changes:
        """Encodes what has no vector, and makes the change happen."""
        table = self._encode(table, processes, batch_size, num_workers, progress)
        ours = table.filter(pc.is_in(table["root"], pa.array(roots, pa.string()))).select(["image_id", "unreadable"])
        changes.unreadable = {row["image_id"]: row["unreadable"] for row in ours.to_pylist() if row["unreadable"]}
        self.header = header
        if processes.is_first:
            self._commit(table)
        processes.joined({})
        self.table = table
        self._store = self._searched = None
        return changes

    def _in_step(self, places, roots: set[str], changes, threads: int, progress: bool) -> pa.Table:
        """The table as the sources are now, without vectors yet. A file that could not be opened is tried again."""
        known = {
            row["image_id"]: row
            for row in self.table.select(["image_id", "bytes", "changed", "key", "root"]).to_pylist()
        }
        ours = {name for name, row in known.items() if row["root"] in roots}
        new = []
        for place in places:
            row = known.get(place.image_id)
            if row is None or row["key"] == NOT_READ or (row["bytes"], row["changed"]) != (place.bytes, place.changed):
                new.append(place)
        described = list(scanning.describe_all(new, threads, progress))
        for row in described:
            before = known.get(row["image_id"])
            if before is None:
                changes.added.append(row["image_id"])
            elif before["key"] != row["key"]:
                changes.changed.append(row["image_id"])
        changes.removed = sorted(ours - {place.image_id for place in places})
        changes.unchanged = len(places) - len(changes.added) - len(changes.changed)
        gone = {*changes.removed, *(row["image_id"] for row in described)}
        stays = pc.invert(pc.is_in(self.table["image_id"], pa.array(sorted(gone), pa.string())))
        table = pa.concat_tables([self.table.filter(stays), scanning.as_table(described)])
        return table.sort_by("image_id")

    def _encode(
        self, table: pa.Table, processes: Processes, batch_size: int, num_workers: int, progress: bool
    ) -> pa.Table:
        """Vectors of all pictures that have none yet; the table with the reasons of those that cannot be decoded."""
        readable = pc.equal(table["unreadable"], "")
        rows = np.flatnonzero(readable.to_numpy())
        keys, paths = catalog.keys_of(table)[rows], table["path"].to_numpy(zero_copy_only=False)[rows]
        lacking = len(self.store.missing(keys))
        processes.joined({})  # all have looked before anyone writes, so all share out the same rows
        if lacking:
            self._fill(keys, IndexedPictures(paths, keys), processes, batch_size, num_workers, progress)
            processes.joined({})
            self.store.reload()  # what the others have written
        unreadable = table["unreadable"].to_pylist()
        for place in compaction.without_vector(self.store, keys):
            unreadable[rows[place]] = (
                "its pixels cannot be decoded"  # the same words for a run that was stopped and went on
            )
        column = table.column_names.index("unreadable")
        return table.set_column(column, "unreadable", pa.array(unreadable, pa.string()))

    def _fill(self, keys, pictures, processes, batch_size: int, num_workers: int, progress: bool) -> None:
        encoder, kind = self.model.encoder, VECTOR_TYPES[self.vector_type]

        def encode(batches):
            options = {"num_workers": num_workers, "progress": progress, "unreadable": {}}
            for vectors in image_vector_batches(encoder.model, encoder.image_processor, pictures, batches, **options):
                bias = {"bias": encoder.bank.bias(vectors).numpy()} if encoder.bank else {}
                yield {"vectors": vectors.numpy().astype(kind)} | bias

        self.store.fill(keys, encode, batch_size, processes.share, ROWS_PER_SHARD)

    def _commit(self, table: pa.Table) -> None:
        catalog.write(self.folder, self.header, table)
        self.table, self._searched = table, None
        compaction.compact(self.store, catalog.keys_of(table)[self.readable])

    def export(self, path: str | Path) -> int:
        """Writes the catalog with each picture's vector (a list of float32) as one Parquet file; how many pictures it holds."""
        path = Path(path).expanduser()
        if path.suffix != ".parquet" or path.is_dir():
            raise UserError(f"{path}: give the name of a .parquet file")
        table, rows, _, _ = self._searchable()
        with whole_file(path) as file:
            size = rows.array("vectors", [0]).shape[1] if len(rows) else 0
            schema = table.schema.append(pa.field("vector", pa.list_(pa.float32(), size)))
            with pq.ParquetWriter(file, schema) as writer:
                for start in range(0, len(rows), ROWS_PER_SHARD):
                    part = table.slice(start, ROWS_PER_SHARD)
                    flat = rows.array("vectors", slice(start, start + len(part))).astype(np.float32).reshape(-1)
                    vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat), size)
                    writer.write_table(part.append_column(schema.field("vector"), vectors))
        return len(rows)

    # search

    def search(
        self, *parts: str | Part, top_k: int = 10, where: str | None = None, keep: float | None = None
    ) -> list[Found]:
        """The pictures that fit best, best first.

        Args:
            parts: sentences and paths of pictures, whose vectors are added; the part after a "-" is taken off.
            where: which pictures may be found, see `imagedex.gallery.filters`.
            keep: leaves out what probably does not match: of captions like those that the model was evaluated on, at least this
                share keeps its right picture. None: nothing is left out.
        """
        return self.search_vectors(self.query_vector(parts)[None], top_k, where, keep)[0]

    def query_vector(self, parts: Sequence[str | Part]) -> np.ndarray:
        """(D,) float32 of length 1: the weighted sum of the parts' vectors."""
        read = read_parts(parts)
        total = sum(part.weight * self.part_vector(part) for part in read)
        if not total.norm() > 1e-6:
            raise UserError("these parts take each other off, and nothing is left to search for")
        return torch.nn.functional.normalize(total, dim=0).numpy()

    def part_vector(self, part: Part) -> torch.Tensor:
        """(D,) of length 1. Raises `UserError` for a picture that cannot be read."""
        encoder = self.model.encoder
        if part.vector is not None:
            return part.vector
        if not part.path and part.picture is None:
            return encode_texts(encoder.model, encoder.tokenizer, [part.text], text_kwargs=encoder.text_kwargs)[0]
        pictures = PlacedPictures([part.picture or part.path])
        _, broken = pictures[0]
        if broken:
            raise UserError(f"cannot read the picture {part.path}: {broken}")
        return next(image_vector_batches(encoder.model, encoder.image_processor, pictures, [[0]]))[0]

    def search_vectors(
        self, vectors: np.ndarray, top_k: int = 10, where: str | None = None, keep: float | None = None
    ) -> list[list[Found]]:
        """Args: vectors (Q, D) float32 of length 1."""
        if top_k < 1:
            raise UserError(f"top_k {top_k}: must be 1 or more")
        table, rows, names, bias = self._searchable()
        allowed = None if where is None else filters.allowed(table.drop_columns(list(self.hidden)), where)
        least = self.least_scores(vectors, keep)
        blocks = [vectors[at : at + QUERIES_AT_ONCE] for at in range(0, len(vectors), QUERIES_AT_ONCE)]
        found = [one for block in blocks for one in exact.search(block, rows, names, top_k, allowed, bias=bias)]
        return [
            self._found(table, [(row, score) for row, score in answer if score >= lowest])
            for answer, lowest in zip(found, least, strict=True)
        ]

    def least_scores(self, vectors: np.ndarray, keep: float | None) -> list[float]:
        """Below which score a picture is left out, for each query: the cut-off is one of confidences, see `CaptionBank`."""
        if keep is None:
            return [-np.inf] * len(vectors)
        bank = self.model.encoder.bank
        if bank is None:
            raise UserError(
                "--keep: the model has kept no bank of captions; take an XMatchingModel that was trained with one"
            )
        try:
            return (bank.cut_off(keep) + bank.bias(torch.from_numpy(vectors))).tolist()
        except ValueError as error:
            raise UserError(f"--keep {keep}: {error}") from error

    def _rows(self, keys):
        try:
            return self.store.rows(keys)
        except (KeyError, FileNotFoundError):
            known = catalog.read(self.folder)
            if known is None or known[1].equals(self.table):
                raise UserError(f"{self.folder} lacks vectors of its pictures; give the index command again") from None
            return None

    def _searchable(self) -> tuple:
        if self._searched is None:
            table = self.table.take(pa.array(self.readable)).combine_chunks()
            rows = self._rows(catalog.keys_of(table))
            if rows is None:  # another process has changed the gallery since it was opened
                self.refresh()
                return self._searchable()
            biased = len(rows) and "bias" in self.store.shards[0].fields
            self._searched = table, rows, catalog.Names(table), "bias" if biased else None
        return self._searched

    @staticmethod
    def _found(table: pa.Table, answer: list[tuple[int, float]]) -> list[Found]:
        rows = table.take(pa.array([row for row, _ in answer], pa.int64())).to_pylist()
        pairs = zip(rows, answer, strict=True)
        return [Found(values["image_id"], values["path"], score, values) for values, (_, score) in pairs]
