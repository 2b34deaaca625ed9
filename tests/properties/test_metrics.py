"""Ranks and figures against naive loops: ties, infinities, several right items, several cut-offs, any block size."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from imagedex.evaluation.exact import (
    image_to_text_ranks,
    ranks_by_blocks,
    retrieval_metrics,
    similarity,
    split_folds,
    top_k,
    with_bias,
)
from imagedex.metrics.hits_at_k.hits_at_k import rank_from_list, rank_from_scores, summarize_ranks

SCORES = st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 0.5, 1.0, math.inf])  # few values: many ties
CUT_OFFS = st.lists(st.integers(1, 12), min_size=1, max_size=5, unique=True)


@st.composite
def score_tables(draw):
    """Scores (Q, N), and which of the N are right for each of the Q: at least one."""
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 8)))
    scores = draw(arrays.arrays(np.float32, shape, elements=SCORES))
    right = [draw(st.sets(st.integers(0, shape[1] - 1), min_size=1)) for _ in range(shape[0])]
    return scores, right


@st.composite
def vector_tables(draw):
    """Queries (Q, D), a gallery (N, D) with repeated rows, and the right row of each query."""
    few = st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0])
    width = draw(st.integers(1, 4))
    queries = draw(arrays.arrays(np.float32, (draw(st.integers(1, 6)), width), elements=few))
    gallery = draw(arrays.arrays(np.float32, (draw(st.integers(1, 7)), width), elements=few))
    targets = [draw(st.integers(0, len(gallery) - 1)) for _ in queries]
    return torch.from_numpy(queries), torch.from_numpy(gallery), np.array(targets)


def naive_rank(scores, right):
    """Every other item that is as good as the best right one stands before it."""
    best = max(scores[item] for item in right)
    return 1 + sum(1 for item, score in enumerate(scores) if item not in right and score >= best)


@given(score_tables())
def test_ranks_of_score_tables(table):
    scores, right = table
    expected = [naive_rank(row, own) for row, own in zip(scores.tolist(), right, strict=True)]
    mask = np.array([[item in own for item in range(scores.shape[1])] for own in right])
    assert rank_from_scores(scores, mask).tolist() == expected
    single = [min(own) for own in right]
    expected = [naive_rank(row, {own}) for row, own in zip(scores.tolist(), single, strict=True)]
    assert rank_from_scores(scores, np.array(single)).tolist() == expected


@given(score_tables(), st.data())
def test_one_nan_among_scores_is_refused(table, data):
    scores, right = table
    place = tuple(data.draw(st.integers(0, size - 1)) for size in scores.shape)
    scores[place] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        rank_from_scores(scores, np.array([min(own) for own in right]))


@given(score_tables())
def test_a_whole_ranking_with_its_scores_gives_the_rank_of_the_table(table):
    """A list that leaves nothing out knows as much as the table does."""
    scores, right = table
    for row, own in zip(scores.tolist(), right, strict=True):
        order = sorted(range(len(row)), key=lambda item: -row[item])
        found = rank_from_list(order, own, [row[item] for item in order])
        assert found == naive_rank(row, own)


@given(st.lists(st.sampled_from("abcdef"), max_size=8), st.sets(st.sampled_from("abcdefgh"), min_size=1))
def test_ranks_of_lists_without_scores(ranking, right):
    expected = next((place for place, item in enumerate(ranking, 1) if item in right), math.inf)
    assert rank_from_list(ranking, right) == expected


@given(st.lists(st.one_of(st.integers(1, 20), st.just(math.inf)), min_size=1, max_size=30), CUT_OFFS)
def test_figures_of_ranks(ranks, ks):
    found = summarize_ranks(ranks, ks=ks)
    assert found.keys() == {f"hits@{k}" for k in ks} | {"mrr", "median_rank"}
    for k in ks:
        assert found[f"hits@{k}"] == pytest.approx(sum(1 for rank in ranks if rank <= k) / len(ranks))
    assert found["mrr"] == pytest.approx(sum(0 if rank == math.inf else 1 / rank for rank in ranks) / len(ranks))
    middle = sorted(ranks)[(len(ranks) - 1) // 2], sorted(ranks)[len(ranks) // 2]
    assert found["median_rank"] == (middle[0] + middle[1]) / 2
    ascending = [found[f"hits@{k}"] for k in sorted(ks)]
    assert ascending == sorted(ascending)


@given(vector_tables(), st.integers(1, 9), st.integers(1, 3), st.integers(1, 40))
def test_search_by_blocks(table, k, query_batch_size, block_scores):
    """The k best in the order of their scores, of equals the first row; ranks do not depend on the blocks."""
    queries, gallery, targets = table
    scores = similarity(queries, gallery).tolist()
    values, rows = top_k(queries, gallery, k, query_batch_size)
    for query, row in enumerate(scores):
        order = sorted(range(len(row)), key=lambda item: (-row[item], item))[:k]
        assert rows[query].tolist() == order and values[query].tolist() == [row[item] for item in order]
    ranks = ranks_by_blocks(queries, gallery, targets, block_scores)
    assert ranks.tolist() == [naive_rank(row, {target}) for row, target in zip(scores, targets.tolist(), strict=True)]

    back, pictures = image_to_text_ranks(gallery, queries, targets, block_scores)
    assert pictures.tolist() == sorted(set(targets.tolist()))
    for picture, rank in zip(pictures.tolist(), back.tolist(), strict=True):
        own = {query for query, target in enumerate(targets) if target == picture}
        assert rank == naive_rank([row[picture] for row in scores], own)


@given(vector_tables(), st.integers(0, 1), st.data())
def test_nan_among_vectors_is_refused(table, side, data):
    queries, gallery, targets = table
    (queries, gallery)[side][data.draw(st.integers(0, len((queries, gallery)[side]) - 1))] = math.nan
    for ask in (lambda: top_k(queries, gallery, 1), lambda: ranks_by_blocks(queries, gallery, targets)):
        with pytest.raises(ValueError, match="NaN"):
            ask()


@given(vector_tables(), CUT_OFFS, st.data())
def test_figures_with_and_without_a_bias(table, ks, data):
    queries, gallery, targets = table
    few = st.sampled_from([-0.5, 0.0, 0.125, 0.5])
    bias = torch.tensor([data.draw(few) for _ in range(len(gallery))])
    found = retrieval_metrics(queries, gallery, targets, ks=tuple(ks), bias=bias)
    scores = queries @ gallery.T
    for prefix, table in (("", scores - bias), ("cosine_", scores)):
        ranks = [naive_rank(row, {target}) for row, target in zip(table.tolist(), targets.tolist(), strict=True)]
        for name, value in summarize_ranks(ranks, ks=ks).items():
            assert found[prefix + name] == pytest.approx(value)
    assert found["gallery_size"] == len(gallery)
    assert torch.equal(similarity(*with_bias(queries, gallery, bias)), scores - bias)


@given(st.lists(st.integers(0, 19), min_size=1, max_size=60), st.integers(1, 5))
def test_folds_part_the_gallery_and_the_captions(targets, folds):
    try:
        parts = split_folds(targets, 20, folds)
    except ValueError:  # a fold without a caption, and only then
        bounds = [20 * fold // folds for fold in range(folds + 1)]
        pairs = zip(bounds, bounds[1:], strict=False)
        assert any(not any(start <= target < stop for target in targets) for start, stop in pairs)
        return
    assert [part[0] for part in parts] == [0, *(part[1] for part in parts[:-1])] and parts[-1][1] == 20
    assert sorted(caption for part in parts for caption in part[2]) == list(range(len(targets)))
    for start, stop, inside in parts:
        assert all(start <= targets[caption] < stop for caption in inside)
