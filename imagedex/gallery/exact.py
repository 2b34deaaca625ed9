"""Exact search in vectors that lie on disk: float32 products choose, float64 products decide.

For unit vectors of D numbers the float32 product differs from the true one by at most D · 2⁻²⁴ times the product of the
vectors' lengths of absolute values, hence by at most `error_bound`. So whoever is among the true k best has a float32 score
within twice that bound of the k-th best float32 score. These few are multiplied again in float64, and ordered by it; equal ones
stand in the order of their names. No index, no probability, no parameter: recall is 1 under every filter.
"""

from collections.abc import Sequence

import numpy as np
import torch

from imagedex.encoding.store import StoredRows

ROWS_AT_ONCE = 2**16


def error_bound(vectors: int) -> float:
    """By how much a float32 product of two unit vectors with D numbers, in any order of summing, differs from the true one."""
    unit = 2.0**-24
    return 1.01 * vectors * unit / (1 - vectors * unit)


def search(
    queries: np.ndarray,
    rows: StoredRows,
    names: Sequence[str],
    k: int,
    allowed: np.ndarray | None = None,
    field: str = "vectors",
    bias: str | None = None,
    rows_at_once: int = ROWS_AT_ONCE,
) -> list[list[tuple[int, float]]]:
    """The k best rows of each query, with their scores, best first.

    Args:
        queries: (Q, D) float32 vectors of length 1.
        rows: the N vectors, of length 1; float16 ones are taken as what they are.
        names: (N,) of the rows, which decide where scores are equal.
        allowed: (N,) booleans; None: all.
        field, bias: names of the fields; a row's bias (a number) is taken off its scores.
    """
    places = np.arange(len(rows)) if allowed is None else np.flatnonzero(allowed)
    margin = 2 * (error_bound(queries.shape[1]) + 2.0**-23)  # and the rounding of a score less its bias
    asked = torch.from_numpy(np.ascontiguousarray(queries, np.float32))
    least = torch.full((len(queries), 1), -torch.inf)  # k rows with at least this score are known
    found = []
    for start in range(0, len(places), rows_at_once):
        block = places[start : start + rows_at_once]
        scores = asked @ torch.from_numpy(contiguous(rows, field, block)).float().T
        if bias is not None:
            scores -= torch.from_numpy(contiguous(rows, bias, block))
        if len(block) >= k:
            least = torch.maximum(least, scores.topk(k).values[:, -1:])
        query, place = torch.nonzero(scores >= least - margin, as_tuple=True)
        found.append((query.numpy(), block[place.numpy()], scores[query, place].numpy()))
    query, row, score = (np.concatenate(part) for part in zip(*found, strict=True)) if found else [np.empty(0, int)] * 3
    answers = []
    for number, vector in enumerate(queries):
        own = np.flatnonzero(query == number)
        own = own[score[own] >= kth_largest(score[own], k) - margin]
        answers.append(decided(vector, row[own], rows, names, k, field, bias))
    return answers


def contiguous(rows: StoredRows, field: str, places: np.ndarray) -> np.ndarray:
    """The field's rows; a view of the mapped file where they lie in it one after the other."""
    shard, place = rows.shard_of[places[0]], rows.place_of[places[0]]
    in_turn = np.arange(place, place + len(places))
    if (rows.shard_of[places] == shard).all() and np.array_equal(rows.place_of[places], in_turn):
        return rows.shards[shard].fields[field][place : place + len(places)]
    return rows.array(field, places)


def kth_largest(scores: np.ndarray, k: int) -> float:
    return float(np.partition(scores, len(scores) - k)[len(scores) - k]) if len(scores) > k else -np.inf


def decided(query, candidates: np.ndarray, rows: StoredRows, names, k: int, field: str, bias: str | None) -> list:
    """(row, score) of the k best candidates by float64 products. A row's product is summed alone, so that equal vectors have
    equal scores wherever they lie."""
    if not len(candidates):
        return []
    scores = (rows.array(field, candidates).astype(np.float64) * query.astype(np.float64)).sum(1)
    if bias is not None:
        scores -= rows.array(bias, candidates)
    order = sorted(range(len(candidates)), key=lambda place: (-scores[place], names[candidates[place]]))
    return [(int(candidates[place]), float(scores[place])) for place in order[:k]]
