"""What every engine but the exact one shares: an index proposes candidates, and the stored vectors decide.

An index is derived from the gallery and never the truth. It holds one vector for each content of a picture (its key), follows the
gallery by what it lacks and what it has too much, and is asked for more candidates than are wanted. Their order is that of the
exact search: float64 products of the stored vectors, equal ones by image_id. A filter is applied before the search; where it
leaves few pictures, and wherever an index cannot answer well, exact search answers instead.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from imagedex.encoding.store import StoredRows, as_scalars
from imagedex.gallery import exact

FEW = 20_000  # so many pictures are searched exactly, whatever the engine
AT_ONCE = 2**15  # vectors in memory while an index is filled


@dataclass
class Pictures:
    """What can be found, in the catalog's order.

    Attributes:
        keys: (N, 16) uint8, of their contents. rows: their vectors. names: their image_ids.
        bias: name of the field that is taken off the scores; None where there is none.
        maker: fingerprint of what made the vectors.
    """

    keys: np.ndarray
    rows: StoredRows
    names: Sequence[str]
    bias: str | None
    maker: str

    def __len__(self) -> int:
        return len(self.names)

    def widened(self, rows: np.ndarray) -> np.ndarray:
        """(rows, D) float32 vectors; with a bias (rows, D + 1), so that the product with (query, 1) is the score."""
        vectors = self.rows.array("vectors", rows).astype(np.float32)
        if self.bias is None or not len(rows):
            return vectors
        return np.concatenate([vectors, -self.rows.array(self.bias, rows).astype(np.float32)[:, None]], 1)

    def asked(self, queries: np.ndarray) -> np.ndarray:
        """(Q, D) float32 -> what is multiplied with `widened`."""
        queries = np.ascontiguousarray(queries, np.float32)
        return queries if self.bias is None else np.pad(queries, ((0, 0), (0, 1)), constant_values=1)

    @property
    def contents(self) -> np.ndarray:
        """The first row of each key, ascending by key."""
        return np.unique(as_scalars(self.keys), return_index=True)[1]


class Index(ABC):
    """Each vector in it has an id, a number from 0 on or any other int64 that stands for its key."""

    few = FEW
    pictures: Pictures | None = None  # which it follows

    # what an engine brings

    @abstractmethod
    def prepare(self, pictures: Pictures, rows: np.ndarray) -> bool:
        """Before it follows: made anew where it is of another gallery, or no longer suits this one; whether it was.

        Args: rows, one a key.
        """

    @abstractmethod
    def lacking(self, keys: np.ndarray) -> np.ndarray:
        """(N,) booleans: the keys whose vectors are not in it."""

    @abstractmethod
    def add(self, keys: np.ndarray, vectors: np.ndarray) -> None:
        """Args: keys (n, 16) that are not in it; vectors (n, D)."""

    @abstractmethod
    def delete_others(self, keys: np.ndarray) -> int:
        """Takes out all that is not among these keys; how many there were."""

    @abstractmethod
    def ids_of(self, keys: np.ndarray) -> np.ndarray:
        """(N,) int64."""

    @abstractmethod
    def nearest(self, asked: np.ndarray, count: int, allowed: np.ndarray | None, depth: float) -> list | None:
        """For each vector that is asked the ids of up to `count` candidates; None: this cannot be answered well.

        Args:
            allowed: ids that may be found, ascending; None: all.
            depth: how many pictures a question would look at without the filter, until it had those that are wanted.
        """

    def save(self) -> None:  # noqa: B027  an engine that keeps itself has nothing to do
        """What has changed is written. Raises `CannotWrite`."""

    # what they share

    def follow(self, pictures: Pictures, progress: bool = False) -> bool:
        """Brings it in step with the gallery: deletes what is gone, adds what is new. Whether anything changed."""
        from tqdm.auto import tqdm

        first = pictures.contents
        keys = pictures.keys[first]
        changed = self.prepare(pictures, first)
        changed |= self.delete_others(keys) > 0
        new = first[self.lacking(keys)]
        with tqdm(total=len(new), desc="index", unit="vectors", disable=not progress or not len(new)) as bar:
            for at in range(0, len(new), AT_ONCE):
                block = np.sort(new[at : at + AT_ONCE])
                self.add(pictures.keys[block], pictures.widened(block))
                bar.update(len(block))
        self.pictures, self.ids = pictures, self.ids_of(pictures.keys)
        self._by_id = np.argsort(self.ids, kind="stable")
        self._sorted = self.ids[self._by_id]
        return changed or len(new) > 0

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> list[list[tuple[int, float]]]:
        """As `imagedex.gallery.exact.search`, over the pictures that it follows."""
        few = len(self.pictures) if allowed is None else int(allowed.sum())
        if few <= max(self.few, k):
            return self._exactly(queries, k, allowed)
        depth, answers, waiting = k * len(self.pictures) / few, {}, np.arange(len(queries))
        ids = None if allowed is None else np.unique(self.ids[allowed])
        count = 2 * k + 50
        while len(waiting):
            found = self.nearest(self.pictures.asked(queries[waiting]), count, ids, depth)
            if found is None:
                break
            decided = {
                number: self._decided(queries[number], own, k, allowed, count)
                for number, own in zip(waiting, found, strict=True)
            }
            answers |= {number: answer for number, answer in decided.items() if answer is not None}
            waiting = np.array([number for number in waiting if number not in answers], int)
            count, depth = 4 * count, max(depth, 4 * count)
        if len(waiting):
            answers |= zip(waiting, self._exactly(queries[waiting], k, allowed), strict=True)
        return [answers[number] for number in range(len(queries))]

    def _decided(self, query: np.ndarray, ids: np.ndarray, k: int, allowed, count: int) -> list | None:
        """The k best of the candidates; None where more candidates could be as good as these: they are many equal pictures, or
        too few."""
        start, end = (np.searchsorted(self._sorted, np.sort(ids), side) for side in ("left", "right"))
        runs = [self._by_id[a:b] for a, b in zip(start, end, strict=True)]
        rows = np.concatenate(runs) if runs else np.empty(0, int)
        rows = rows if allowed is None else rows[allowed[rows]]
        p = self.pictures
        answer = exact.decided(query, rows, p.rows, p.names, len(rows), "vectors", p.bias)
        more = len(answer) < k or (len(ids) == count and answer[k - 1][1] <= answer[-1][1])
        return None if more else answer[:k]

    def _exactly(self, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> list:
        p = self.pictures
        return exact.search(queries, p.rows, p.names, k, allowed, bias=p.bias)
