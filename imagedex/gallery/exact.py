"""Exact search in vectors that lie on disk: quick products choose, float64 products decide, see `imagedex.evaluation.best_rows`.

Quick products are of float32 numbers, or of int8 codes once many questions were asked of many rows and where the processor
multiplies those. Codes are held in memory, a quarter of what the vectors take. Either way the answers are the same. No index, no
probability, no parameter: recall is 1 under every filter.
"""

from collections.abc import Sequence

import numpy as np

from imagedex.encoding.store import StoredRows
from imagedex.evaluation import int8_codes
from imagedex.evaluation.best_rows import Rows, best_rows


def search(
    queries: np.ndarray,
    rows: StoredRows,
    names: Sequence[str],
    k: int,
    allowed: np.ndarray | None = None,
    field: str = "vectors",
    bias: str | None = None,
) -> list[list[tuple[int, float]]]:
    """The k best rows of each query, with their scores, best first.

    Args:
        queries: (Q, D) float32 vectors of length 1.
        rows: the N vectors, of length 1; float16 ones are taken as what they are.
        names: (N,) of the rows, which decide where scores are equal.
        allowed: (N,) booleans; None: all.
        field, bias: names of the fields; a row's bias (a number) is taken off its scores.
    """
    if bias is not None and bias not in rows.kept:
        rows.kept[bias] = rows.array(bias)
    searched = Rows(lambda places: contiguous(rows, field, places), len(rows), names, rows.kept.get(bias))
    return best_rows(queries, searched, k, allowed, _codes(rows.kept, searched, (field, bias), len(queries)))


def _codes(kept: dict, searched: Rows, key: tuple, queries: int) -> int8_codes.Int8Codes | None:
    kept["asked"] = kept.get("asked", 0) + queries
    if not int8_codes.pay(len(searched), kept["asked"]):
        return None
    if key not in kept:
        kept[key] = int8_codes.Int8Codes(searched.read, len(searched), searched.bias)
    return kept[key] if kept[key].of_use else None


def contiguous(rows: StoredRows, field: str, places: np.ndarray) -> np.ndarray:
    """The field's rows; a view of the mapped file where they lie in it one after the other."""
    if not len(places):
        return rows.array(field, slice(0, 1))[:0]
    shard, place = rows.shard_of[places[0]], rows.place_of[places[0]]
    in_turn = np.arange(place, place + len(places))
    if (rows.shard_of[places] == shard).all() and np.array_equal(rows.place_of[places], in_turn):
        return rows.shards[shard].fields[field][place : place + len(places)]
    return rows.array(field, places)


def decided(query, candidates: np.ndarray, rows: StoredRows, names, k: int, field: str, bias: str | None) -> list:
    """(row, score) of the k best of these rows by float64 products. A row's product is summed alone, so that equal vectors have
    equal scores wherever they lie."""
    if not len(candidates):
        return []
    scores = (rows.array(field, candidates).astype(np.float64) * query.astype(np.float64)).sum(1)
    if bias is not None:
        scores -= rows.array(bias, candidates)
    order = sorted(range(len(candidates)), key=lambda place: (-scores[place], names[candidates[place]]))
    return [(int(candidates[place]), float(scores[place])) for place in order[:k]]
