"""Hits@k and mean reciprocal rank of a retrieval run: the only definition of these figures in this repository.

Plain numpy functions (`rank_from_scores`, `rank_from_list`, `summarize_ranks`) and, around them, a module for
``evaluate.load("metrics/hits_at_k")``. A tie counts against the model: an item that scores exactly as much as the
right one is taken to stand before it, so a model that scores all items alike gets the worst rank, not the best.
"""

# evaluate reads this file line by line to find what it needs: one import a line.
import math

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Hits@k: the share of queries whose right item is among the first k of their ranking. MRR: the mean of 1 / rank.
Ties count against the ranking; a right item that is not in the list has an infinite rank and adds nothing.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: for each query the ranked item ids, best first (lists of strings; lengths may differ).
    references: for each query the id of the right item, or a list of ids when several are right (then the best counts).
    scores: optional, for each query the scores of its ranked items in the same order; with them ties are seen.
    k: the cut-offs, default [1, 5, 10].
Returns:
    hits@<k> for each cut-off, mrr (both between 0 and 1) and median_rank (inf when half of the queries miss).
Examples:
    >>> metric = evaluate.load("metrics/hits_at_k")
    >>> metric.compute(predictions=[["a", "b"], ["b", "a"]], references=["a", "a"], k=[1, 2])
    {'hits@1': 0.5, 'hits@2': 1.0, 'mrr': 0.75, 'median_rank': 1.5}
"""

_CITATION = """
@inproceedings{voorhees1999trec8,
    title = {The {TREC-8} Question Answering Track Report},
    author = {Voorhees, Ellen M.},
    booktitle = {Proceedings of the Eighth Text REtrieval Conference},
    year = {1999}
}
"""


def rank_from_scores(scores, relevant):
    """Rank of the best relevant item of each query, ties counted against it.

    Args:
        scores: (Q, N) real numbers, higher is better. Infinities are allowed, NaN is not.
        relevant: (Q,) integers, the column of the right item of each query; or (Q, N) booleans, several right items.

    Returns:
        (Q,) int64: 1 + the number of items that are not relevant and score at least as much as the best relevant one.
        Other relevant items never push the best one down.

    Raises:
        ValueError: NaN among the scores, shapes that do not fit, a column outside 0..N-1, a query without a right item.
    """
    scores = np.asarray(scores)
    relevant = np.asarray(relevant)
    if scores.ndim != 2:
        raise ValueError(f"scores must be (queries, items), got shape {scores.shape}")
    if np.isnan(scores).any():
        raise ValueError("NaN among the scores: a ranking cannot be told from them")
    if relevant.dtype == bool:
        if relevant.shape != scores.shape:
            raise ValueError(f"relevant has shape {relevant.shape}, scores {scores.shape}")
        if not relevant.any(axis=1).all():
            raise ValueError("a query has no relevant item, so it has no rank")
        best = np.where(relevant, scores, -np.inf).max(axis=1, keepdims=True)  # (Q, 1)
        return 1 + ((scores >= best) & ~relevant).sum(axis=1)
    if not np.issubdtype(relevant.dtype, np.integer) or relevant.shape != scores.shape[:1]:
        raise ValueError(f"relevant must be (Q,) integers or (Q, N) booleans, got {relevant.dtype} {relevant.shape}")
    if relevant.size and not (relevant.min() >= 0 and relevant.max() < scores.shape[1]):
        raise ValueError(f"relevant names a column outside 0..{scores.shape[1] - 1}")
    own = np.take_along_axis(scores, relevant[:, None], axis=1)  # (Q, 1)
    return (scores >= own).sum(axis=1)  # the right item counts itself: that is the 1


def rank_from_list(ranking, relevant, scores=None):
    """Rank of the best relevant item in one ranked list, `math.inf` when none is in it.

    Args:
        ranking: item ids, best first. An id that is listed twice takes two places, as the user sees it.
        relevant: the id of the right item, or a set, list or tuple of ids.
        scores: optional scores in the order of `ranking`; with them, listed items that tie with the right one
            stand before it. Ties with items that the list left out cannot be seen here: where scores of all items
            exist, use `rank_from_scores`.

    Returns:
        int >= 1, or `math.inf`: not found, which adds 0 to every Hits@k and to MRR.

    Raises:
        ValueError: no right item given, or scores that are NaN or not as many as the ranking.
    """
    relevant = set(relevant) if isinstance(relevant, (set, frozenset, list, tuple)) else {relevant}
    if not relevant:
        raise ValueError("a query has no relevant item, so it has no rank")
    if scores is None:
        places = [place for place, item in enumerate(ranking, start=1) if item in relevant]
        # other relevant items in front would be better places themselves, so the first is the best
        return places[0] if places else math.inf
    if len(scores) != len(ranking):
        raise ValueError(f"{len(scores)} scores for a ranking of {len(ranking)} items")
    is_relevant = np.array([item in relevant for item in ranking], dtype=bool)
    if np.isnan(np.asarray(scores, dtype=float)).any():
        raise ValueError("NaN among the scores: a ranking cannot be told from them")
    if not is_relevant.any():
        return math.inf
    return int(rank_from_scores(np.asarray([scores], dtype=float), is_relevant[None])[0])


def summarize_ranks(ranks, ks=(1, 5, 10), counts=None):
    """Hits@k, mean reciprocal rank and median rank.

    Args:
        ranks: (Q,) numbers >= 1; `math.inf` stands for "not found".
        ks: cut-offs, integers >= 1.
        counts: optional (Q,) integers >= 1, how many queries have each of these ranks; without them, one each.

    Returns:
        dict of floats: `hits@<k>` for each k and `mrr` (0 to 1), `median_rank` (may be inf).

    Raises:
        ValueError: no ranks, a rank below 1 or NaN, a cut-off below 1.
    """
    ranks = np.asarray(ranks, dtype=np.float64)
    if ranks.ndim != 1 or ranks.size == 0:
        raise ValueError(f"ranks must be a non-empty list of numbers, got shape {ranks.shape}")
    if not (ranks >= 1).all():
        raise ValueError("a rank is below 1 or NaN; ranks count from 1")
    if any(k < 1 or k != int(k) for k in ks):
        raise ValueError(f"cut-offs must be integers of 1 or more, got {list(ks)}")
    counts = np.ones(ranks.shape, dtype=np.int64) if counts is None else np.asarray(counts, dtype=np.int64)
    order = np.argsort(ranks, kind="stable")  # the same figures, to the last bit, in whatever order the queries come
    ranks, up_to = ranks[order], np.cumsum(counts[order])
    total = int(up_to[-1])
    summary = {f"hits@{int(k)}": int(counts[order][ranks <= k].sum()) / total for k in ks}
    summary["mrr"] = float((counts[order] / ranks).sum()) / total
    # of an even number the mean of the two in the middle; inf with inf is inf: no special case needed
    middle = [ranks[np.searchsorted(up_to, place, side="right")] for place in ((total - 1) // 2, total // 2)]
    summary["median_rank"] = float(sum(middle) / 2)
    return summary


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class HitsAtK(evaluate.Metric):
    """The functions above behind `evaluate.load`."""

    def _info(self):
        ids = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[
                datasets.Features({"predictions": ids, "references": datasets.Value("string")}),
                datasets.Features({"predictions": ids, "references": ids}),
            ],
        )

    def _compute(self, predictions, references, scores=None, k=(1, 5, 10)):
        if scores is not None and len(scores) != len(predictions):
            raise ValueError(f"scores of {len(scores)} queries for predictions of {len(predictions)}")
        rows = zip(predictions, references, scores if scores is not None else [None] * len(predictions), strict=True)
        return summarize_ranks([rank_from_list(*row) for row in rows], ks=k)
