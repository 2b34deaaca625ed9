"""Exact search over unit vectors by blocks, and the ranks and metrics that follow from it.

Scores are cosines: float32 vectors multiplied in float64 and rounded to float32 (`similarity`). A float32 matrix
product gives the same pair of vectors another last bit when the block has another shape, so that two equal pictures
would not tie; products of float32 numbers are exact in float64, and after the rounding equal pairs have equal scores
whatever the block (but for a chance of about 1e-8 a pair that a sum lies on a rounding boundary). The right item's
score is read from the very block it is compared with. So `top_k`, the ranks here and `rank_from_scores` of the full
matrix agree.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch

from imagedex.evaluation.intervals import intervals
from imagedex.metrics.hits_at_k.hits_at_k import rank_from_scores, summarize_ranks

OTHER_GALLERIES = ("new_", "whole_")  # how figures begin that are not of the gallery a run is judged by
BLOCK_SCORES = 2**24  # float32 scores held at once: 64 MiB
_PRODUCT_SCORES = 2**22  # float64 scores of one matrix product: 32 MiB
_LOW_32 = 0xFFFFFFFF


def similarity(queries: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    """Dot products of (Q, D) and (N, D) float32 vectors: (Q, N) float32, computed in float64 (see above)."""
    return (queries.double() @ gallery.double().T).float()


def with_bias(queries: torch.Tensor, gallery: torch.Tensor, bias: torch.Tensor | None) -> tuple:
    """(queries, gallery) whose dot products are those of the given ones less each gallery row's bias (N,): one column more.
    Without a bias, the vectors themselves."""
    if bias is None:
        return queries, gallery
    ones = torch.ones(len(queries), 1, dtype=queries.dtype, device=queries.device)
    return torch.cat([queries, ones], 1), torch.cat([gallery, -bias[:, None].to(gallery.dtype)], 1)


def score_blocks(queries: torch.Tensor, gallery: torch.Tensor, block_scores: int = BLOCK_SCORES) -> Iterator:
    """All scores, some queries at a time.

    Args:
        queries: (Q, D) unit vectors, float32.
        gallery: (N, D) unit vectors, float32, on the same device.
        block_scores: at most this many scores are held at once (one query's N scores are the smallest block).

    Yields:
        (first query's row, (q, N) float32 scores on the CPU)
    """
    step = max(1, block_scores // max(1, len(gallery)))
    for start in range(0, len(queries), step):
        block = queries[start : start + step]
        scores = torch.empty(len(block), len(gallery), dtype=torch.float32)
        for first, part in _gallery_parts(gallery, len(block)):
            scores[:, first : first + len(part)] = similarity(block, part)
        yield start, scores


def top_k(
    queries: torch.Tensor, gallery: torch.Tensor, k: int, query_batch_size: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best gallery rows of each query; never more than a few blocks of scores in memory.

    Args:
        queries: (Q, D) unit vectors, float32.
        gallery: (N, D) unit vectors, float32, on the same device.
        k: how many; with fewer than k rows in the gallery, all of them.

    Returns:
        scores: (Q, min(k, N)) float32, descending, on the CPU.
        rows: (Q, min(k, N)) int64; equal scores stand in the order of their rows, so the result is reproducible.

    Raises:
        ValueError: k below 1, NaN among the vectors.
    """
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")
    width = min(k, len(gallery))
    kept = []
    for start in range(0, len(queries), query_batch_size):
        block = queries[start : start + query_batch_size]
        best = torch.empty(len(block), 0, dtype=torch.int64, device=queries.device)
        for first, part in _gallery_parts(gallery, len(block)):
            keys = torch.cat([best, _sort_keys(similarity(block, part), first)], dim=1)
            best = keys.topk(min(width, keys.shape[1]), dim=1).values
        kept.append(best.cpu())
    keys = torch.cat(kept) if kept else torch.empty(0, width, dtype=torch.int64)
    rows = _LOW_32 - (keys & _LOW_32)
    return _flip(keys >> 32).to(torch.int32).view(torch.float32), rows


def ranks_by_blocks(
    queries: torch.Tensor, gallery: torch.Tensor, target_rows, block_scores: int = BLOCK_SCORES
) -> np.ndarray:
    """Rank of each query's right gallery row, the best of several, among the whole gallery, ties counted against it.

    Args:
        queries: (Q, D) unit vectors, float32.
        gallery: (N, D) unit vectors, float32.
        target_rows: (Q,) integers, the right row of each query; or Q lists of them.

    Returns:
        (Q,) int64, what `rank_from_scores` gives on the full (Q, N) matrix.
    """
    return _ranks(queries, gallery, lambda rows: right_columns(target_rows[rows], len(gallery)), block_scores)


def right_columns(target_rows, gallery_size: int) -> np.ndarray:
    """What `rank_from_scores` takes: (Q,) integers where each query has one right row, else (Q, N) booleans."""
    if all(np.ndim(own) == 0 or len(own) == 1 for own in target_rows):
        return np.array(target_rows, dtype=np.int64).reshape(-1)
    marks = np.zeros((len(target_rows), gallery_size), dtype=bool)
    for mark, columns in zip(marks, target_rows, strict=True):
        mark[np.asarray(columns)] = True
    return marks


def image_to_text_ranks(
    image_vectors: torch.Tensor, text_vectors: torch.Tensor, target_rows, block_scores: int = BLOCK_SCORES
) -> tuple[np.ndarray, np.ndarray]:
    """The other direction: rank of the best of each picture's own captions among all captions.

    Args:
        image_vectors: (N, D) unit vectors.
        text_vectors: (Q, D) unit vectors.
        target_rows: (Q,) integers, the picture each caption belongs to.

    Returns:
        ranks: (M,) int64 of the M pictures that have a caption; one picture's captions do not push each other down.
        image_rows: (M,) int64, which pictures these are, ascending.
    """
    targets = np.asarray(target_rows, dtype=np.int64)
    image_rows = np.unique(targets)
    asking = image_vectors[torch.from_numpy(image_rows)]

    def own_captions(rows: slice) -> np.ndarray:
        return targets[None, :] == image_rows[rows, None]  # (q, Q)

    return _ranks(asking, text_vectors, own_captions, block_scores), image_rows


def retrieval_metrics(
    text_vectors: torch.Tensor,
    image_vectors: torch.Tensor,
    target_rows,
    *,
    ks: tuple[int, ...] = (1, 5, 10),
    five_fold: bool = False,
    both_directions: bool = True,
    bias: torch.Tensor | None = None,
    with_intervals: bool = False,
    block_scores: int = BLOCK_SCORES,
) -> dict[str, float]:
    """Figures of every caption against the whole gallery, in both directions, by blocks.

    Args:
        text_vectors: (Q, D) unit vectors of the captions, float32.
        image_vectors: (N, D) unit vectors of the gallery, float32.
        target_rows: (Q,) integers, the gallery row each caption belongs to.
        five_fold: Karpathy's 1K protocol (as in VSE++, 1707.05612): the gallery in its order is cut into five runs
            of pictures (5 x 1,000 for the COCO 5K test split), each caption searches its own fifth, and every figure
            is the mean over the folds. `gallery_size` is then the size of the largest fold.
        both_directions: also image to text.
        bias: (N,) of each picture, taken off its scores when a caption asks; see `CaptionBank`. The figures of cosines alone
            are then given, too, as `cosine_...`.
        with_intervals: also how far Hits@k and MRR could be off by chance, see `intervals`.

    Returns:
        `hits@k`, `mrr`, `median_rank` (text to image), the same under `image_to_text_...`, and `gallery_size`.

    Raises:
        ValueError: no queries, NaN, a target outside the gallery, a fold without captions.
    """
    targets = np.asarray(target_rows, dtype=np.int64)
    if targets.shape != (len(text_vectors),):
        raise ValueError(f"{len(text_vectors)} captions but target_rows of shape {targets.shape}")
    if len(targets) == 0:
        raise ValueError("no captions to evaluate with")
    if targets.min() < 0 or targets.max() >= len(image_vectors):
        raise ValueError(f"a caption belongs to a row outside the gallery of {len(image_vectors)} pictures")
    folds, sizes, asked, asking = [], [], [], []
    for start, stop, inside in split_folds(targets, len(image_vectors), 5 if five_fold else 1):
        sizes.append(stop - start)
        texts, images = text_vectors[torch.from_numpy(inside)], image_vectors[start:stop]
        local = targets[inside] - start
        own_bias = None if bias is None else bias[start:stop]
        asked.append((ranks_by_blocks(*with_bias(texts, images, own_bias), local, block_scores), local))
        figures = summarize_ranks(asked[-1][0], ks=ks)
        if bias is not None:
            plain = summarize_ranks(ranks_by_blocks(texts, images, local, block_scores), ks=ks)
            figures |= {f"cosine_{name}": value for name, value in plain.items()}
        if both_directions:
            asking.append(image_to_text_ranks(images, texts, local, block_scores))
            figures |= _backwards(summarize_ranks(asking[-1][0], ks=ks))
        folds.append(figures)
    means = {name: float(np.mean([figures[name] for figures in folds])) for name in folds[0]}
    if with_intervals:
        means |= intervals(*asked, ks=ks) | _backwards(intervals(*asking, ks=ks) if both_directions else {})
    return means | {"gallery_size": max(sizes)}


def _backwards(figures: Mapping) -> dict:
    return {f"image_to_text_{name}": value for name, value in figures.items()}


def metrics_by_gallery(
    text_vectors: torch.Tensor,
    image_vectors: torch.Tensor,
    target_rows,
    galleries: Mapping[str, np.ndarray],
    bias: torch.Tensor | None = None,
    **options,
) -> dict[str, float]:
    """`retrieval_metrics` of the same captions within several galleries of the same embedded pictures.

    Args: target_rows, (Q,) rows of `image_vectors` that are in every gallery; galleries, prefix of the figures' names ->
    the gallery's rows of `image_vectors`, ascending; bias, (N,); options, of `retrieval_metrics`. Image to text is measured in
    the first gallery alone: pictures without captions ask nothing, so the others would repeat it.
    """
    figures = {}
    for prefix, rows in galleries.items():
        within = np.searchsorted(rows, target_rows)
        inside = torch.from_numpy(rows)
        own_bias = None if bias is None else bias[inside]
        own = retrieval_metrics(text_vectors, image_vectors[inside], within, bias=own_bias, **options)
        figures |= {prefix + name: value for name, value in own.items()}
        options = options | {"both_directions": False}
    return figures


def figures_within(figures: Mapping, prefix: str) -> dict:
    """Of what `metrics_by_gallery` gives the figures of one gallery, by their plain names."""
    if prefix:
        return {name.removeprefix(prefix): value for name, value in figures.items() if name.startswith(prefix)}
    return {name: value for name, value in figures.items() if not name.startswith(OTHER_GALLERIES)}


def split_folds(target_rows, gallery_size: int, folds: int) -> list[tuple[int, int, np.ndarray]]:
    """The gallery in its order cut into runs of pictures: (first row, last row + 1, the captions that belong to them).

    Raises:
        ValueError: a fold without captions.
    """
    targets, bounds = np.asarray(target_rows), np.linspace(0, gallery_size, folds + 1).astype(int)
    parts = []
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        inside = np.flatnonzero((targets >= start) & (targets < stop))
        if len(inside) == 0:
            raise ValueError(f"pictures {start} to {stop} have no caption, so this fold cannot be evaluated")
        parts.append((start, stop, inside))
    return parts


def _ranks(queries, gallery, relevant_of: Callable[[slice], np.ndarray], block_scores: int) -> np.ndarray:
    ranks = [
        rank_from_scores(scores.numpy(), relevant_of(slice(start, start + len(scores))))
        for start, scores in score_blocks(queries, gallery, block_scores)
    ]
    return np.concatenate(ranks) if ranks else np.empty(0, dtype=np.int64)


def _gallery_parts(gallery: torch.Tensor, num_queries: int) -> Iterator[tuple[int, torch.Tensor]]:
    step = max(1, _PRODUCT_SCORES // max(1, num_queries))
    for first in range(0, len(gallery), step):
        yield first, gallery[first : first + step]


def _sort_keys(scores: torch.Tensor, first_row: int) -> torch.Tensor:
    """(q, n) int64 keys that sort as (score, -row): the score's bits above, the counted-down row below."""
    if torch.isnan(scores).any():
        raise ValueError("NaN among the scores: a ranking cannot be told from them")
    rows = torch.arange(first_row, first_row + scores.shape[1], device=scores.device)
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # + 0.0 makes -0.0 and 0.0 the same bits
    return (_flip(bits) << 32) | (_LOW_32 - rows)


def _flip(bits: torch.Tensor) -> torch.Tensor:
    """Float bits to integers in the floats' order and back: negative floats count downwards."""
    return torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
