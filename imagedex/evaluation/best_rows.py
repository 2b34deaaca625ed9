"""The k best rows of each query, exactly: quick products with a known error choose, float64 products decide.

The k-th best true score that is known so far is a floor under the true k-th best. A quick product that misses the true one by at
most E can rule out a row whose quick score is below the floor less E. Whoever is left is multiplied in float64, the floor rises,
and so on, block by block of rows. The scores of all rows are never held together. For a single query the first coordinates of the
codes rule out most rows before the codes themselves are read.

Quick products are of int8 codes (`imagedex.evaluation.int8_codes`) or of float32 numbers. A float32 product of two vectors with D
numbers, summed in any order, misses the true one by at most D · 2⁻²⁴ / (1 - D · 2⁻²⁴) times the product of their lengths.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from imagedex.evaluation.int8_codes import HEAD_QUERIES, ROUNDED, CodedQueries, Int8Codes, float32_is_coarse

QUERIES_AT_ONCE = 256  # products of more leave the processor's cache before they are compared
BLOCK_SCORES = 2**18
MOST_ROWS = 2**16  # read at once
DRAWN = 2**13  # rows from everywhere that give a first floor
GROUP = 32  # rows that are ruled out by the best of them
PAIRS_AT_ONCE = 2**11
PENDING = 32  # pairs a query that are found before they are decided
_CROWDED, _GIVE_UP = (
    1 / 16,
    4,
)  # where codes leave so large a share of a full block, float32 is quicker; after so many blocks, for good
HEADS_AT_ONCE = 2**20
_HEADS_CROWDED = 1 / 2  # where heads leave so large a share, they are not looked at any more

Places = range | np.ndarray  # ascending


def error_bound(size: int) -> float:
    """By how much a float32 product of two unit vectors with `size` numbers, summed in any order, misses the true one."""
    unit = 2.0**-24
    return 1.01 * size * unit / (1 - size * unit)


class Rows:
    """The N rows that are searched.

    Args:
        read: places (n,) -> (n, D), float32 or float16.
        count: N.
        names: (N,), which decide where scores are equal; None: the earlier row.
        bias: (N,) float32, taken off the scores.
        longest: no row is longer.
    """

    def __init__(
        self,
        read: Callable[[np.ndarray], np.ndarray],
        count: int,
        names: Sequence | None = None,
        bias: np.ndarray | None = None,
        longest: float = 1.0,
    ):
        self.read, self.count, self.names, self.bias, self.longest = read, count, names, bias, longest

    @classmethod
    def of(cls, vectors: np.ndarray, **options) -> "Rows":
        """Those of (N, D) vectors in memory."""
        return cls(lambda places: vectors[in_turn(places)], len(vectors), **options)

    def __len__(self) -> int:
        return self.count


def _parts(pairs: int) -> list[slice]:
    return [slice(start, start + PAIRS_AT_ONCE) for start in range(0, pairs, PAIRS_AT_ONCE)]


class FloatScores:
    """Quick products of float32 numbers."""

    def __init__(self, rows: Rows, queries: np.ndarray):
        self.rows, self.dtype = rows, torch.float64 if float32_is_coarse() else torch.float32
        self.narrow, self.queries = queries, torch.from_numpy(queries).to(self.dtype)
        lengths = np.linalg.norm(queries.astype(np.float64), axis=1)
        biases = np.abs(rows.bias if rows.bias is not None else np.zeros(1))
        largest = float(biases.max(initial=0.0, where=np.isfinite(biases)))  # taken off, infinity is exact
        # and the rounding of a score less its bias, and of the floor
        reach = lengths * rows.longest
        self.error = error_bound(queries.shape[1]) * reach + ROUNDED * (reach + largest) + 1e-12

    def scores(self, places: np.ndarray) -> torch.Tensor:
        """(n, Q) of these rows."""
        found = torch.from_numpy(self.rows.read(places)).to(self.dtype) @ self.queries.T
        return found if self.rows.bias is None else found.sub_(torch.from_numpy(self.rows.bias[places])[:, None])

    def least(self, floor: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(floor - self.error).to(self.dtype)

    def of_pairs(self, query: np.ndarray, row: np.ndarray) -> np.ndarray:
        """(n,) of these pairs."""
        scores = np.empty(len(row), np.float32)
        for part in _parts(len(row)):
            read = self.rows.read(row[part]).astype(np.float32, copy=False)
            scores[part] = np.einsum("ij,ij->i", read, self.narrow[query[part]])
        return scores if self.rows.bias is None else scores - self.rows.bias[row]


class Best:
    """The k best rows of each query among those that were added; more where the k-th score is that of several.

    Attributes:
        floor: (Q,) the k-th best score, -inf before k rows are known.
        query, row, score: (M,) what is known, by query, best first.
    """

    def __init__(self, rows: Rows, queries: np.ndarray, k: int, rounded: bool):
        self.rows, self.queries, self.k, self.rounded = rows, queries.astype(np.float64), k, rounded
        self.floats = FloatScores(rows, queries)
        self.floor = np.full(len(queries), -np.inf)
        self.query, self.row, self.score = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)

    def add(self, query: np.ndarray, row: np.ndarray) -> None:
        """Pairs (n,) that were not added before."""
        rough = self.floats.of_pairs(query, row)
        floor = self._raised(query, rough - self.floats.error[query])
        near = rough >= (floor - self.floats.error)[query]
        query, row = np.concatenate([self.query, query[near]]), np.concatenate([self.row, row[near]])
        score = np.concatenate([self.score, self._products(query[len(self.query) :], row[len(self.row) :])])
        self.floor = self._raised(query, score)
        order = np.lexsort((row, -score, query))
        order = order[(score >= self.floor[query])[order]]
        self.query, self.row, self.score = query[order], row[order], score[order]
        if (np.bincount(self.query, minlength=1) > 2 * self.k).any():  # very many equal ones
            self._cut()

    def _raised(self, query: np.ndarray, score: np.ndarray) -> np.ndarray:
        """The floor, as these scores raise it."""
        order = np.lexsort((-score, query))
        first = np.searchsorted(query[order], np.arange(len(self.queries) + 1))
        full = np.flatnonzero(np.diff(first) >= self.k)
        floor = self.floor.copy()
        floor[full] = np.fmax(floor[full], score[order[first[full] + self.k - 1]])
        return floor

    def _products(self, query: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Float64 products. Each is summed alone, so that equal vectors have equal scores wherever they lie."""
        scores = np.empty(len(row))
        for part in _parts(len(row)):
            scores[part] = (self.rows.read(row[part]).astype(np.float64) * self.queries[query[part]]).sum(1)
        if self.rows.bias is not None:
            scores -= self.rows.bias[row]
        return scores.astype(np.float32).astype(np.float64) if self.rounded else scores

    def _cut(self) -> None:
        keep = np.concatenate([own[: self.k] for own in self._ordered()])
        self.query, self.row, self.score = self.query[keep], self.row[keep], self.score[keep]

    def _ordered(self) -> list[np.ndarray]:
        """Of each query the places of its pairs, best first, equal ones by name."""
        ends = np.searchsorted(self.query, np.arange(len(self.queries) + 1))
        ordered = [np.arange(*ends[number : number + 2]) for number in range(len(self.queries))]
        if self.rows.names is None:  # they stand by row already
            return ordered
        for number, own in enumerate(ordered):
            if (self.score[own][1:] == self.score[own][:-1]).any():
                name = [self.rows.names[row] for row in self.row[own]]
                order = sorted(range(len(own)), key=lambda at, own=own, name=name: (-self.score[own[at]], name[at]))
                ordered[number] = own[order]
        return ordered

    def answers(self) -> list[list[tuple[int, float]]]:
        """(row, score) of the k best of each query."""
        return [list(zip(self.row[own].tolist(), self.score[own].tolist(), strict=True))
                for own in (places[: self.k] for places in self._ordered())]  # fmt: skip


def above(scores: torch.Tensor, least: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(row, query) of (n, Q) scores that are at least `least` (Q,)."""
    whole = len(scores) // GROUP * GROUP
    grouped = scores[:whole].view(-1, GROUP, scores.shape[1])
    group, query = np.nonzero((~(grouped.amax(1) < least)).numpy())  # a group with a NaN is looked at
    if not len(group) and whole == len(scores):
        return group, query
    of = torch.from_numpy(query)
    hit, place = np.nonzero((grouped[torch.from_numpy(group), :, of] >= least[of, None]).numpy())
    row, rest = np.nonzero((scores[whole:] >= least).numpy())
    return np.concatenate([group[hit] * GROUP + place, whole + row]), np.concatenate([query[hit], rest])


def likely(scores: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, query) of k rows for each column of (n, Q) scores, among the best; of all rows where there are fewer."""
    queries = torch.arange(scores.shape[1])
    groups = scores[: len(scores) // GROUP * GROUP].view(-1, GROUP, len(queries))
    if len(groups) < 4 * k:
        row = scores.T.contiguous().topk(min(k, len(scores)), dim=1).indices.T
    else:  # the best of each of the k best groups
        group = groups.amax(1).T.contiguous().topk(k, dim=1).indices.T
        row = group * GROUP + groups[group, :, queries].argmax(2)
    return row.reshape(-1).numpy(), queries.expand_as(row).reshape(-1).numpy()


class Search:
    """One search of some queries."""

    def __init__(self, rows: Rows, queries: np.ndarray, k: int, places: Places, codes: Int8Codes | None, rounded: bool):
        self.places, self.best = places, Best(rows, queries, k, rounded)
        self.floats, self.crowded = self.best.floats, 0
        self.codes = None if codes is None else CodedQueries(codes, queries)
        self.heads = self.codes is not None and codes.rest is not None and len(queries) <= HEAD_QUERIES
        self.step = min(MOST_ROWS, max(GROUP, BLOCK_SCORES // len(queries)))
        self.pending: list[tuple[np.ndarray, np.ndarray]] = []
        self.waiting, self.least = 0, {}

    def answers(self) -> list[list[tuple[int, float]]]:
        self._first_floor()
        if self.codes:
            strays = self.codes.rows.strays
            strays = strays[_among(strays, self.places)]
            for start in range(0, len(strays), self.step):
                self._look(strays[start : start + self.step])
        for block in _blocks(self.places, HEADS_AT_ONCE if self.heads else len(self.places)):
            for part in _blocks(self._look_at_heads(block) if self.heads else block, self.step):
                if not (self.codes and self.crowded < _GIVE_UP and self._look_at_codes(part)):
                    part = _at(part, np.arange(len(part)))
                    self._look(part[~self.codes.rows.is_stray[part]] if self.codes else part)
        self._decide()
        return self.best.answers()

    def _first_floor(self) -> None:
        """The k-th best among rows from everywhere: neighbours on disk may be alike."""
        best = self.best
        count = min(len(self.places), max(4 * best.k, min(DRAWN, len(self.places) // 16)))
        drawn = _at(self.places, np.linspace(0, len(self.places) - 1, count).astype(np.int64))
        self._raise_floor(drawn, (self.codes or self.floats).scores(drawn), best.k)

    def _raise_floor(self, places: Places, scores: torch.Tensor, count: int) -> None:
        """To the k-th best of `count` likely rows of each query. They are not added here; the scan finds them again."""
        best, (row, query) = self.best, likely(scores, count)
        known = Best(best.rows, self.floats.narrow, best.k, best.rounded)
        known.add(query, _at(places, row))
        best.floor, self.least = np.fmax(best.floor, known.floor), {}

    def _least(self, least: Callable[[np.ndarray], torch.Tensor]) -> torch.Tensor:
        """For the floor as it is now."""
        if least not in self.least:
            self.least[least] = least(self.best.floor)
        return self.least[least]

    def _look_at_codes(self, block: Places) -> bool:
        """False, and nothing done, where codes leave too many rows."""
        row, query = above(self.codes.scores(in_turn(block)), self._least(self.codes.least))
        if len(row) > _CROWDED * self.step * len(self.best.queries):
            self.crowded += 1
            return False
        row = _at(block, row)
        coded = ~self.codes.rows.is_stray[row]
        self._found(row[coded], query[coded])
        return True

    def _look_at_heads(self, block: Places) -> Places:
        """The rows that their heads do not rule out; all, and no heads from now on, where these rule out too few."""
        scores = self.codes.head_scores(in_turn(block))
        self._raise_floor(block, scores, 4 * self.best.k)
        row = np.flatnonzero((~(scores < self._least(self.codes.head_least))).any(1).numpy())  # a NaN says nothing
        self.heads = len(row) <= _HEADS_CROWDED * len(block)
        return _at(block, row) if self.heads else block

    def _look(self, block: np.ndarray) -> None:
        row, query = above(self.floats.scores(block), self._least(self.floats.least))
        self._found(block[row], query)

    def _found(self, row: np.ndarray, query: np.ndarray) -> None:
        self.pending.append((query, row))
        self.waiting += len(row)
        if self.waiting > PENDING * len(self.best.queries):
            self._decide()

    def _decide(self) -> None:
        if self.waiting:
            self.best.add(*(np.concatenate(part) for part in zip(*self.pending, strict=True)))
        self.pending, self.waiting, self.least = [], 0, {}


def _among(some: np.ndarray, places: Places) -> np.ndarray:
    """(n,) whether ascending places hold each of some."""
    if isinstance(places, range):
        return (some >= places.start) & (some < places.stop)
    at = np.searchsorted(places, some)
    return places[np.minimum(at, len(places) - 1)] == some


def _blocks(places: Places, size: int) -> list[Places]:
    return [places[start : start + size] for start in range(0, len(places), size)]


def _at(places: Places, number: np.ndarray) -> np.ndarray:
    return number + places.start if isinstance(places, range) else places[number]


def in_turn(places: Places) -> np.ndarray | slice:
    """A slice where places follow each other: a view, no copy."""
    if isinstance(places, range):
        return slice(places.start, places.stop)
    in_turn = len(places) and (np.diff(places) == 1).all()
    return slice(int(places[0]), int(places[-1]) + 1) if in_turn else places


def best_rows(
    queries: np.ndarray,
    rows: Rows,
    k: int,
    allowed: np.ndarray | None = None,
    codes: Int8Codes | None = None,
    rounded: bool = False,
) -> list[list[tuple[int, float]]]:
    """(row, score) of the k best rows of each query, best first; of all where there are fewer.

    Args:
        queries: (Q, D) float32.
        allowed: (N,) booleans; None: all.
        codes: of these rows, with their bias; None: float32 products choose.
        rounded: scores are compared after they have been rounded to float32.
    """
    places = range(len(rows)) if allowed is None else np.flatnonzero(allowed)
    if not len(places):
        return [[] for _ in queries]
    queries = np.ascontiguousarray(queries, np.float32)
    parts = [queries[at : at + QUERIES_AT_ONCE] for at in range(0, len(queries), QUERIES_AT_ONCE)]
    return [answer for part in parts for answer in Search(rows, part, k, places, codes, rounded).answers()]
