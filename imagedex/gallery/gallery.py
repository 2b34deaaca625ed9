"""A gallery: pictures on disk, their vectors, and the search over them.

folder/
  catalog.parquet     what is in it, see `imagedex.gallery.catalog`: readable with pandas, DuckDB, ...
  vectors/            the vectors by the hash of a picture's content, see `imagedex.encoding.store`
  faiss/, milvus.*    indexes made of these, see `imagedex.gallery.engines`: what is missing there is made again

A picture that is renamed, or lies there twice, is encoded once. What is removed leaves the catalog at once and the disk when a
fifth of it would be such rows.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image

from imagedex.encoding.store import ROWS_PER_SHARD, Store, as_scalars
from imagedex.encoding.vectors import encode_texts, image_vector_batches
from imagedex.errors import UserError
from imagedex.files import Lock, clear_leftovers
from imagedex.gallery import catalog, compaction, exporting, filters, looked, planning, scanning, sources
from imagedex.gallery.engines.index import Pictures
from imagedex.gallery.engines.searcher import Searcher
from imagedex.gallery.model import DEFAULT_MODEL, GalleryModel
from imagedex.gallery.pictures import IndexedPictures, PlacedPictures, open_picture, readable_picture
from imagedex.gallery.processes import Processes
from imagedex.gallery.query import Part, read_parts

logger = logging.getLogger(__name__)

VECTORS = "vectors"
VECTOR_TYPES = {"float32": np.float32, "float16": np.float16}


@dataclass
class Found:
    """A picture that was found. score: a cosine, less the picture's bias where the model has kept a bank against hubs; of a
    model that writes identifiers a log-probability in nats."""

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
        self, folder: Path, model: GalleryModel, header: catalog.Header | None, table: pa.Table, vector_type: str,
        engine: str | None = None,
    ):  # fmt: skip
        self.folder, self.model, self.header, self.table, self.vector_type = folder, model, header, table, vector_type
        self._store: Store | None = None
        self._searched: tuple | None = None
        self.searcher = Searcher(folder, engine or (header.engine if header else "auto"))

    @classmethod
    def open(
        cls, folder: str | Path, model: str | None = None, *, device: str | None = None, vector_type: str | None = None,
        trust_remote_code: bool = False, engine: str | None = None,
    ) -> "Gallery":  # fmt: skip
        """Opens a gallery, or begins one where there is none: its folder is made when the first picture is added.

        Args:
            model: folder or Hub id of a dual encoder, or of a model that writes identifiers, which any gallery may be asked with;
                by default the gallery's own, and of a new one SigLIP 2.
            vector_type: "float32" or "float16", which takes half the room; of a new gallery.
            engine: "auto", "exact", "faiss", "milvus" or "milvus:URI", see `imagedex.gallery.engines`; by default the one that it
                was last filled with.

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
        kind, opened = cls._kind(GalleryModel(name, device, trust_remote_code, header))
        gallery = kind(
            folder, opened, header, table, header.vector_type if header else vector_type or "float32", engine
        )
        if header and opened.name != header.model and opened.maker and opened.maker != header.maker:
            raise UserError(
                f"the gallery {folder} is of {header.model}; {model} would see its pictures otherwise: make another"
            )
        return gallery

    @classmethod
    def _kind(cls, model: GalleryModel) -> tuple[type["Gallery"], GalleryModel]:
        """The class of a gallery that is asked with this model, and the model as that class has it."""
        from imagedex.gallery import identified  # which builds on this file

        if not identified.writes_identifiers(model):
            return cls, model
        options = model.name, model.device, model.trust_remote_code, model.header
        return identified.IdentifierGallery, identified.IdentifierModel(*options)

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
        return np.flatnonzero(catalog.mask_of(catalog.readable(self.table)))

    # changes

    def add(
        self, *given, batch_size: int = 64, num_workers: int = 0, threads: int = 8, progress: bool = False,
        image_column: str | None = None, image_dir: str | None = None,
    ) -> scanning.Changes:  # fmt: skip
        """Looks at sources (all kinds: `imagedex.gallery.sources`), and brings the gallery in step with them: new and changed
        pictures are encoded, those that are gone from them leave. What was added from elsewhere stays.

        Args: threads, which read the files' heads; num_workers, processes which decode pictures; image_column, of tables;
        image_dir, of the pictures that tables name.

        Returns: what changed. A second call on the same sources changes nothing.
        """
        checked = list(dict.fromkeys(sources.check(source, self.folder, image_column, image_dir) for source in given))
        processes = Processes()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone() if processes.is_first else nullcontext():
            self.refresh()
            state = processes.from_first(lambda: self._look(checked, threads, progress))
            return self._update(*state, processes, batch_size, num_workers, progress)

    def remove(self, image_ids: Sequence[str] = (), where: str | None = None) -> list[str]:
        """Takes pictures out: those named, and those for which the filter holds. They come back if `add` finds them again."""
        if self.header is None:
            raise UserError(f"{self.folder} holds no picture")
        with self._alone():
            self.refresh()
            gone = pc.is_in(self.table["image_id"], pa.array(list(image_ids), pa.string())).to_numpy()
            unknown = set(image_ids) - set(self.table["image_id"].to_pylist())
            if unknown:
                raise UserError(f"{self.folder} holds no picture {sorted(unknown)[0]}")
            if where is not None:
                gone |= filters.allowed(self.table, where)
            removed = self.table.filter(pa.array(gone))["image_id"].to_pylist()
            self._check_parts()
            self._commit(self.table.filter(pa.array(~gone)), self.header)
            return removed

    def _check_parts(self) -> None:
        """Raises `UserError` for a model or an engine that cannot be had, before anything is changed."""
        self.searcher.ready()
        self.store  # noqa: B018  it is opened with the model

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While this process changes the gallery no other does, nor another thread of this one. Raises `UserError`."""
        with Lock(self.folder, f"--gallery {self.folder}") as lock:
            if lock.held:
                for folder in (self.folder, self.folder / VECTORS):
                    clear_leftovers(folder)
            yield

    def refresh(self) -> None:
        """Another process may have changed the gallery since it was opened."""
        known = catalog.read(self.folder)
        if known:
            self.header, self.table = known
        self._look_again()

    def _look_again(self) -> None:
        """At the store's files: those that are known stay mapped, and are not checked once more."""
        self._searched = None
        if self._store is not None:
            self._store.reload()

    def _look(self, checked, threads: int, progress: bool) -> tuple:
        """(header, table, changes, the sources) as they are now, before anything is encoded."""
        header = catalog.Header(self.model.name, self.model.maker, self.model.files, self.vector_type)
        if self.header:  # a copy: what ends in an error changes nothing
            header = replace(self.header, files=self.model.files)
        header.engine = self.searcher.ready()
        return header, *planning.planned(self.folder, self.table, header, checked, threads, progress)

    def _update(self, header, table, changes, roots, processes, batch_size, num_workers, progress) -> scanning.Changes:
        """Encodes what has no vector, and makes the change happen."""
        table = self._encode(table, processes, batch_size, num_workers, progress)
        ours = table.filter(pc.is_in(table["root"], pa.array(roots, pa.string()))).select(["image_id", "unreadable"])
        changes.unreadable = {row["image_id"]: row["unreadable"] for row in ours.to_pylist() if row["unreadable"]}
        if processes.is_first:
            self._commit(table, header, progress)
        processes.joined({})
        self.header, self.table = header, table
        self._look_again()
        return changes

    def _encode(
        self, table: pa.Table, processes: Processes, batch_size: int, num_workers: int, progress: bool
    ) -> pa.Table:
        """Vectors of all pictures that have none yet; the table with the reasons of those that cannot be decoded."""
        rows = np.flatnonzero(catalog.mask_of(catalog.readable(table)))
        rows = rows[
            np.argsort(table["path"].to_numpy(zero_copy_only=False)[rows], kind="stable")
        ]  # as they lie in tables
        keys, paths = catalog.keys_of(table)[rows], table["path"].to_numpy(zero_copy_only=False)[rows]
        lacking = len(self.store.missing(keys))
        processes.joined({})  # all have looked before anyone writes, so all share out the same rows
        if lacking:
            self._fill(keys, IndexedPictures(paths, keys), processes, batch_size, num_workers, progress)
            processes.joined({})
            self.store.reload()  # what the others have written
        unreadable = table["unreadable"].to_pylist()
        known = as_scalars(catalog.keys_of(self.table)[self.readable])
        new = np.flatnonzero(~np.isin(as_scalars(keys), known))
        for place in compaction.without_vector(
            self.store, keys[new]
        ):  # the same words for a run that was stopped and went on
            unreadable[rows[new[place]]] = "its pixels cannot be decoded"
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

    def _commit(self, table: pa.Table, header: catalog.Header, progress: bool = False) -> None:
        if header != self.header or not table.equals(self.table):
            catalog.write(self.folder, header, table)
        self.header, self.table, self._searched = header, table, None
        looked.clear(self.folder)
        compaction.compact(self.store, catalog.keys_of(table)[self.readable])
        if self.searcher.engine != "exact":
            self.searcher.follow(self._pictures(), progress)

    def export(self, to: str | Path, progress: bool = False) -> int:
        """Writes the catalog with each picture's vector (a list of float32) as one Parquet file, or into Milvus (milvus:URI); how
        many pictures there are."""
        return exporting.export(self._searchable()[0], self._pictures(), self.folder, to, progress)

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
        pictures = PlacedPictures([readable_picture(part.picture or part.path)])
        return next(image_vector_batches(encoder.model, encoder.image_processor, pictures, [[0]]))[0]

    def search_vectors(
        self, vectors: np.ndarray, top_k: int = 10, where: str | None = None, keep: float | None = None
    ) -> list[list[Found]]:
        """Args: vectors (Q, D) float32 of length 1."""
        if top_k < 1:
            raise UserError(f"top_k {top_k}: must be 1 or more")
        table, pictures = self._searchable()[0], self._pictures()
        allowed = None if where is None else filters.allowed(table.drop_columns(list(self.hidden)), where)
        least = self.least_scores(vectors, keep)
        found = self.searcher.search(vectors, pictures, top_k, allowed)
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
            table = self.table.filter(catalog.readable(self.table)).combine_chunks()
            rows = self._rows(catalog.keys_of(table))
            if rows is None:  # another process has changed the gallery since it was opened
                self.refresh()
                return self._searchable()
            biased = len(rows) and "bias" in self.store.shards[0].fields
            self._searched = table, rows, catalog.Names(table), "bias" if biased else None
        return self._searched

    def _pictures(self) -> Pictures:
        table, rows, names, bias = self._searchable()
        return Pictures(catalog.keys_of(table), rows, names, bias, f"{self.store.fingerprint} {self.vector_type}")

    @staticmethod
    def _found(table: pa.Table, answer: list[tuple[int, float]]) -> list[Found]:
        rows = [table.slice(row, 1).to_pylist()[0] for row, _ in answer]  # pa.array would import pandas
        pairs = zip(rows, answer, strict=True)
        return [Found(values["image_id"], values["path"], score, values) for values, (_, score) in pairs]
