"""Which engine answers: the one that was named, or one that suits the size, which is said aloud."""

import importlib.util
import logging
from pathlib import Path

import numpy as np

from imagedex.errors import UserError
from imagedex.files import CannotWrite
from imagedex.gallery import exact
from imagedex.gallery.engines.index import Index, Pictures

logger = logging.getLogger(__name__)

EXACT_UP_TO = 500_000  # pictures; beyond it an index answers, if it can be had
NAMES = "auto, exact, faiss, milvus or milvus:URI"


def checked(engine: str) -> str:
    """Raises `UserError` for an engine that there is not, or whose package is missing. Returns it as it is kept."""
    name, colon, uri = engine.partition(":")
    if name == "milvus":
        from imagedex.gallery.engines import milvus

        milvus.library()
        return f"milvus:{milvus.absolute(uri)}" if colon else "milvus"
    if engine not in ("auto", "exact", "faiss"):
        raise UserError(f"--engine {engine!r}: there are {NAMES}")
    if engine == "faiss":
        from imagedex.gallery.engines import faiss_ivf

        faiss_ivf.library()
    return engine


class Searcher:
    """The engine of one gallery.

    Args: engine, as on the command line. Raises `UserError` for one that there is not.
    """

    def __init__(self, folder: Path, engine: str = "auto"):
        self.folder, self.engine = folder, checked(engine)
        self._index: Index | None = None
        self._said = False

    def _named(self, count: int) -> str:
        """The engine for so many pictures."""
        if self.engine != "auto" or count <= EXACT_UP_TO:
            return "exact" if self.engine == "auto" else self.engine
        there = importlib.util.find_spec("faiss") is not None
        if not self._said:
            self._said = True
            how = (
                "faiss proposes and exact products decide (--engine exact compares all)"
                if there
                else "each is compared with every question; faster: pip install 'imagedex[faiss]'"
            )
            logger.info("%s pictures, more than %s: %s", f"{count:,}", f"{EXACT_UP_TO:,}", how)
        return "faiss" if there else "exact"

    def _made(self, name: str) -> Index:
        if self._index is None and name == "faiss":
            from imagedex.gallery.engines.faiss_ivf import FaissIndex

            self._index = FaissIndex(self.folder)
        elif self._index is None:
            from imagedex.gallery.engines.milvus import MilvusIndex

            self._index = MilvusIndex(self.folder, name.partition(":")[2])
        return self._index

    def ready(self) -> str:
        """The engine's name. Raises `UserError` for a Milvus that does not answer, before anything else is done."""
        if self.engine.startswith("milvus"):
            self._made(self.engine)
        return self.engine

    def follow(self, pictures: Pictures, progress: bool = False) -> Index | None:
        """The engine's index, in step with the gallery; None: exact search has none. What cannot be written is kept for this run
        alone: the gallery is the truth, and the next run makes up for it."""
        name = self._named(len(pictures))
        if name == "exact" or not len(pictures):
            self._index = None
            return None
        index = self._made(name)
        if index.pictures is not None and index.pictures.rows is pictures.rows:
            return index
        changed = index.follow(pictures, progress)
        try:
            if changed:
                index.save()
        except CannotWrite as error:
            logger.warning("%s; the index of %s is kept for this run alone", error, name)
        return index

    def search(self, queries: np.ndarray, pictures: Pictures, k: int, allowed: np.ndarray | None) -> list:
        """As `imagedex.gallery.exact.search`."""
        index = self.follow(pictures)
        if index is None:
            return exact.search(queries, pictures.rows, pictures.names, k, allowed, bias=pictures.bias)
        return index.search(queries, k, allowed)
