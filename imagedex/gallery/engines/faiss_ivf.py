"""An inverted file (IVF) by faiss: vectors lie in the cells of a k-means, in one byte a number, and a question visits the nearest
cells alone.

How many cells it visits is measured when the index is made, not guessed: questions are drawn at a cosine of 0.3 from pictures, as
sentences lie from theirs in CLIP's space, their true neighbours are found exactly, and so many cells are visited that they hold
0.99 of these. A filter that one picture in f passes asks for neighbours f times as deep, and cells without any such picture are
passed over. Vectors without clusters end with nearly all cells visited: slow, but not wrong.

    folder/faiss/index     one file: what it was made of, the keys, faiss' own bytes, and a checksum of all that
"""

import hashlib
import json
import logging
import sys
import time
from pathlib import Path

import numpy as np
import torch  # before faiss, always: both bring OpenMP, and torch's has to be the first

from imagedex.encoding.store import KEY_BYTES, as_scalars
from imagedex.errors import UserError
from imagedex.files import TEMPORARY, CannotWrite, whole_file
from imagedex.gallery.engines.index import AT_ONCE, Index, Pictures

logger = logging.getLogger(__name__)

FORMAT = "imagedex faiss 1"
DIGEST = 16  # bytes
TARGET = 0.99  # share of the true neighbours that the visited cells hold
COSINE = 0.3  # of a drawn question with its picture
QUESTIONS, MIXED = 128, 64
DEPTHS = 2 ** np.arange(11)  # 1, 2, ..., 1024 neighbours
TRAINED_ON = 64  # vectors a cell


def library():
    """faiss. Raises `UserError` where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            "the engine faiss is not installed: pip install 'imagedex[faiss]', or give --engine exact"
        ) from error
    # one pool of threads as large as torch's; on macOS two OpenMPs in one process do not bear more than one thread
    faiss.omp_set_num_threads(1 if sys.platform == "darwin" else torch.get_num_threads())
    return faiss


class FaissIndex(Index):
    """
    Attributes:
        keys: (S, 16) uint8; the id of a vector is its place here. cells: (S,) int32, where it lies; -1: the place is free.
        visited: (depths,) int64, cells to be visited for so many neighbours, `DEPTHS`.
    """

    def __init__(self, folder: Path):
        self.path, self.faiss, self.index = Path(folder) / "faiss" / "index", library(), None
        self.record: dict = {}
        self._read()

    # on disk

    def _read(self) -> None:
        if not self.path.is_file():
            return
        try:
            with open(self.path, "rb") as file:
                check_digest(file)
                self.record = json.loads(file.readline())
                if self.record.get("format") != FORMAT:
                    raise ValueError("of another format")
                self.keys, self.cells, self.visited = (np.load(file, allow_pickle=False) for _ in range(3))
                self.index = self.faiss.read_index(self.faiss.PyCallbackIOReader(file.read))
            if self.index.ntotal != (self.cells >= 0).sum() or len(self.keys) != len(self.cells):
                raise ValueError("its parts do not belong together")
        except (OSError, ValueError, KeyError, RuntimeError, MemoryError, EOFError) as error:
            logger.warning("%s is damaged (%s); it is made anew", self.path, " ".join(str(error).split())[:100])
            self.index = None

    def save(self) -> None:
        """One file, whole or not at all."""
        for left in self.path.parent.glob(f".{self.path.name}.*{TEMPORARY}"):  # by a run that was killed
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink(missing_ok=True)
        try:
            with whole_file(self.path) as target:
                file = Digested(target)
                file.write(json.dumps(self.record).encode() + b"\n")
                for array in (self.keys, self.cells, self.visited):
                    np.save(file, array, allow_pickle=False)
                self.faiss.write_index(self.index, self.faiss.PyCallbackIOWriter(file.write))
                target.write(file.digest.digest())
        except OSError as error:
            raise CannotWrite(f"{self.path} cannot be written: {error.strerror}") from error

    # following the gallery

    def prepare(self, pictures: Pictures, rows: np.ndarray) -> bool:
        if self.index is not None and self.record["maker"] != pictures.maker:
            logger.warning("%s is of another gallery; it is made anew", self.path)
            self.index = None
        if self.index is not None and self.record["trained"] / 2 <= len(rows) <= 2 * self.record["trained"]:
            return False
        self._train(pictures, rows)
        return True

    def _train(self, pictures: Pictures, rows: np.ndarray) -> None:
        """Cells of these vectors, and all of the vectors in them."""
        started = time.perf_counter()
        cells = int(max(1, min(2 * len(rows) ** 0.5, len(rows) / 8)))
        sample = np.random.default_rng(0).choice(rows, min(len(rows), TRAINED_ON * cells), replace=False)
        vectors = pictures.widened(np.sort(sample))
        size, inner = vectors.shape[1], self.faiss.METRIC_INNER_PRODUCT
        index = self.faiss.IndexIVFScalarQuantizer(
            self.faiss.IndexFlatIP(size), size, cells, self.faiss.ScalarQuantizer.QT_8bit, inner
        )
        index.cp.niter, index.cp.min_points_per_centroid = 10, 1
        index.cp.max_points_per_centroid = TRAINED_ON
        index.train(vectors)
        self.index, self.record = index, {"format": FORMAT, "maker": pictures.maker, "trained": len(rows)}
        self.keys, self.cells = np.empty((0, KEY_BYTES), np.uint8), np.empty(0, np.int32)
        for at in range(0, len(rows), AT_ONCE):
            block = np.sort(rows[at : at + AT_ONCE])
            self.add(pictures.keys[block], pictures.widened(block))
        self.visited = self._measured(pictures, rows)
        self.record["seconds"] = round(time.perf_counter() - started, 1)
        logger.info(
            "faiss: %s vectors in %s cells, of which ten neighbours take %s (%.0f s)",
            *(f"{number:,}" for number in (len(rows), cells, self.visited[4])), self.record["seconds"],
        )  # fmt: skip

    def _measured(self, pictures: Pictures, rows: np.ndarray) -> np.ndarray:
        """How many cells hold `TARGET` of the neighbours of drawn questions, for each of `DEPTHS`."""
        asked = drawn_questions(pictures, rows)
        neighbours = self._cells_of_neighbours(pictures, rows, asked)
        order = np.argsort(-(asked @ self.centroids().T), axis=1, kind="stable")
        rank = np.argsort(order, axis=1)
        ranks = np.take_along_axis(rank, neighbours, 1) + 1
        return np.array([np.quantile(ranks[:, :depth], TARGET, method="higher") for depth in DEPTHS], np.int64)

    def _cells_of_neighbours(self, pictures: Pictures, rows: np.ndarray, asked: np.ndarray) -> np.ndarray:
        """(questions, depth): the cell of each of the true neighbours, best first."""
        questions, depth = torch.from_numpy(asked.astype(np.float32)), min(int(DEPTHS[-1]), len(rows))
        cells = torch.from_numpy(self.cells[self.ids_of(pictures.keys[rows])])
        scores, best = torch.empty(len(asked), 0), torch.empty(len(asked), 0, dtype=torch.int32)
        for at in range(0, len(rows), AT_ONCE):
            block = torch.from_numpy(pictures.widened(rows[at : at + AT_ONCE]))
            own = cells[at : at + AT_ONCE].expand(len(asked), -1)
            scores, best = torch.cat([scores, questions @ block.T], 1), torch.cat([best, own], 1)
            scores, places = scores.topk(min(depth, scores.shape[1]), dim=1)
            best = best.gather(1, places)
        return best.numpy().astype(np.int64)

    def centroids(self) -> np.ndarray:
        return self.index.quantizer.reconstruct_n(0, self.index.nlist)

    def _live(self) -> np.ndarray:
        return np.flatnonzero(self.cells >= 0)

    def lacking(self, keys: np.ndarray) -> np.ndarray:
        return ~np.isin(as_scalars(keys), as_scalars(self.keys[self._live()]))

    def add(self, keys: np.ndarray, vectors: np.ndarray) -> None:
        free = np.flatnonzero(self.cells < 0)[: len(keys)]
        grown = len(keys) - len(free)
        ids = np.concatenate([free, np.arange(len(self.keys), len(self.keys) + grown)]).astype(np.int64)
        self.keys = np.concatenate([self.keys, np.zeros((grown, KEY_BYTES), np.uint8)])
        self.cells = np.concatenate([self.cells, np.full(grown, -1, np.int32)])
        cells = self.index.quantizer.search(vectors, 1)[1][:, 0]
        self.index.add_core(len(ids), *(self.faiss.swig_ptr(array) for array in (vectors, ids, cells)))
        self.keys[ids], self.cells[ids] = keys, cells

    def delete_others(self, keys: np.ndarray) -> int:
        live = self._live()
        gone = live[~np.isin(as_scalars(self.keys[live]), as_scalars(keys))]
        if len(gone):
            removed = self.index.remove_ids(self.faiss.IDSelectorBatch(gone.astype(np.int64)))
            if removed != len(gone):
                raise RuntimeError(f"{self.path}: faiss removed {removed} of {len(gone)} vectors")
            self.cells[gone] = -1
        return len(gone)

    def ids_of(self, keys: np.ndarray) -> np.ndarray:
        live = self._live()
        known, wanted = as_scalars(self.keys[live]), as_scalars(keys)
        order = np.argsort(known, kind="stable")
        found = np.searchsorted(known, wanted, sorter=order)
        return live[order[found]].astype(np.int64)

    # search

    def nearest(self, asked: np.ndarray, count: int, allowed: np.ndarray | None, depth: float) -> list | None:
        if depth > DEPTHS[-1]:
            return None
        nprobe = int(self.visited[np.searchsorted(DEPTHS, depth)])
        if allowed is None:
            limits = {}
        else:
            cells = np.unique(self.cells[allowed])
            limits = {"sel": self._bitmap(allowed, len(self.cells)), "quantizer_params": self._cell_choice(cells)}
            nprobe = min(nprobe, len(cells))
        parameters = self.faiss.SearchParametersIVF(nprobe=nprobe, **limits)
        _, ids = self.index.search(asked, count, params=parameters)
        return [own[own >= 0] for own in ids]

    def _cell_choice(self, cells: np.ndarray):
        """Cells without any picture that may be found are not visited."""
        return self.faiss.SearchParameters(sel=self._bitmap(cells, self.index.nlist))

    def _bitmap(self, chosen: np.ndarray, size: int):
        bits = np.zeros(size, bool)
        bits[chosen] = True
        return self.faiss.IDSelectorBitmap(np.packbits(bits, bitorder="little"))


def drawn_questions(pictures: Pictures, rows: np.ndarray, seed: int = 1) -> np.ndarray:
    """`QUESTIONS` vectors as they are asked, at a cosine of `COSINE` from pictures; the rest of each is a mixture of others with
    random signs, and so lies in the directions in which pictures differ."""
    rng = np.random.default_rng(seed)
    near, others = (pictures.rows.array("vectors", rng.choice(rows, size)).astype(np.float32)
                    for size in (QUESTIONS, (QUESTIONS * MIXED)))  # fmt: skip
    signs = rng.choice(np.array([-1, 1], np.float32), (QUESTIONS, MIXED, 1))
    rest = (others.reshape(QUESTIONS, MIXED, -1) * signs).sum(1)
    rest -= (rest * near).sum(1, keepdims=True) * near
    rest /= np.linalg.norm(rest, axis=1, keepdims=True) + 1e-12
    return pictures.asked(COSINE * near + (1 - COSINE**2) ** 0.5 * rest)


class Digested:
    """Writes to a file, and knows the checksum of all that was written."""

    def __init__(self, file):
        self.file, self.digest = file, hashlib.blake2b(digest_size=DIGEST)

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        self.file.write(content)
        return len(content)


def check_digest(file) -> None:
    """Reads a file through, and goes back to its beginning. Raises a `ValueError` where its last bytes are not its checksum."""
    digest, last = hashlib.blake2b(digest_size=DIGEST), b""
    while block := file.read(2**22):
        content = last + block
        digest.update(content[:-DIGEST])
        last = content[-DIGEST:]
    if digest.digest() != last:
        raise ValueError("its checksum is another")
    file.seek(0)
