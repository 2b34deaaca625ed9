"""Hits@k against a sort written out in plain Python, against scikit-learn, and at the corners."""

import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
from sklearn.metrics import label_ranking_average_precision_score, top_k_accuracy_score

from imagedex.metrics.hits_at_k.hits_at_k import rank_from_list, rank_from_scores, summarize_ranks

REPOSITORY = Path(__file__).resolve().parents[2]


def naive_rank(scores, relevant):
    """Sort pessimistically: by score, and among equal scores the irrelevant items first."""
    order = sorted(range(len(scores)), key=lambda item: (-scores[item], item in relevant))
    return 1 + next(place for place, item in enumerate(order) if item in relevant)


@pytest.mark.parametrize("levels", [2, 5, 10_000])  # few levels: ties everywhere
def test_ranks_equal_a_naive_pessimistic_sort(levels):
    rng = np.random.default_rng(levels)
    scores = rng.integers(0, levels, size=(200, 30)).astype(np.float32)
    target = rng.integers(0, 30, size=200)
    expected = [naive_rank(row.tolist(), {int(t)}) for row, t in zip(scores, target, strict=True)]
    assert rank_from_scores(scores, target).tolist() == expected

    several = rng.random((200, 30)) < 0.1
    several[np.arange(200), target] = True
    expected = [naive_rank(row.tolist(), set(np.flatnonzero(mask))) for row, mask in zip(scores, several, strict=True)]
    assert rank_from_scores(scores, several).tolist() == expected


def test_agrees_with_scikit_learn_where_nothing_ties():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((300, 40))
    target = rng.integers(0, 40, size=300)
    summary = summarize_ranks(rank_from_scores(scores, target), ks=(1, 3, 5, 10))
    for k in (1, 3, 5, 10):
        assert summary[f"hits@{k}"] == pytest.approx(top_k_accuracy_score(target, scores, k=k, labels=range(40)))
    # with one right label, label-ranking average precision is the mean reciprocal rank
    one_hot = np.eye(40, dtype=int)[target]
    assert summary["mrr"] == pytest.approx(label_ranking_average_precision_score(one_hot, scores))


def test_ties_count_against_the_model_as_in_label_ranking_average_precision():
    # scikit-learn ranks ties by their maximum there, which is the same honest convention
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 4, size=(300, 20)).astype(float)
    target = rng.integers(0, 20, size=300)
    ours = summarize_ranks(rank_from_scores(scores, target))["mrr"]
    assert ours == pytest.approx(label_ranking_average_precision_score(np.eye(20, dtype=int)[target], scores))


@pytest.mark.parametrize("constant", [0.0, 1.0, -math.inf, math.inf])
def test_a_constant_score_gets_the_worst_rank(constant):
    ranks = rank_from_scores(np.full((3, 50), constant), np.array([0, 24, 49]))
    assert ranks.tolist() == [50, 50, 50]
    assert summarize_ranks(ranks) == {"hits@1": 0, "hits@5": 0, "hits@10": 0, "mrr": 1 / 50, "median_rank": 50}


def test_several_relevant_items_do_not_push_each_other_down():
    scores = np.array([[0.9, 0.9, 0.9, 0.1]])
    assert rank_from_scores(scores, np.array([[True, True, False, False]])).tolist() == [2]  # one irrelevant tie
    assert rank_from_scores(scores, np.array([[True, True, True, True]])).tolist() == [1]
    assert rank_from_list(["x", "a", "b"], {"a", "b"}) == 2
    assert rank_from_list(["b", "a", "x"], ["a", "b"], scores=[1.0, 1.0, 1.0]) == 2


def test_rank_from_list_finds_ties_and_misses():
    assert rank_from_list(["a", "b", "c"], "b") == 2
    assert rank_from_list(["a", "b", "c"], "b", scores=[3.0, 2.0, 2.0]) == 3
    assert rank_from_list(["a", "b", "c"], "z") == math.inf
    assert rank_from_list(["a", "b", "c"], "z", scores=[3.0, 2.0, 2.0]) == math.inf
    assert rank_from_list([], "a") == math.inf


def test_list_and_matrix_give_the_same_rank():
    rng = np.random.default_rng(2)
    for _ in range(100):
        scores = rng.integers(0, 6, size=12).astype(float)
        order = np.argsort(-scores, kind="stable")
        target = int(rng.integers(12))
        assert rank_from_list(order.tolist(), target, scores[order]) == rank_from_scores(scores[None], [target])[0]


def test_misses_add_nothing():
    summary = summarize_ranks([1, math.inf, math.inf, 4], ks=(1, 4, 1000))
    assert summary == {"hits@1": 0.25, "hits@4": 0.5, "hits@1000": 0.5, "mrr": (1 + 0.25) / 4, "median_rank": math.inf}


@pytest.mark.parametrize(
    "scores, relevant, message",
    [
        ([[1.0, math.nan]], [0], "NaN"),
        ([[math.nan, 1.0]], [[False, True]], "NaN"),
        ([1.0, 2.0], [0], "shape"),
        ([[1.0, 2.0]], [2], "outside"),
        ([[1.0, 2.0]], [-1], "outside"),
        ([[1.0, 2.0]], [[False, False]], "no relevant"),
        ([[1.0, 2.0]], [[True]], "shape"),
        ([[1.0, 2.0]], [0.0], "integers"),
        ([[1.0, 2.0]], [0, 1], "integers"),
    ],
)
def test_wrong_input_is_refused(scores, relevant, message):
    with pytest.raises(ValueError, match=message):
        rank_from_scores(np.array(scores), np.array(relevant))


@pytest.mark.parametrize("ranks, ks", [([], (1,)), ([0], (1,)), ([math.nan], (1,)), ([1], (0,)), ([1], (1.5,))])
def test_wrong_ranks_are_refused(ranks, ks):
    with pytest.raises(ValueError):
        summarize_ranks(ranks, ks=ks)


def test_wrong_lists_are_refused():
    with pytest.raises(ValueError, match="2 scores"):
        rank_from_list(["a"], "a", scores=[1.0, 2.0])
    with pytest.raises(ValueError, match="NaN"):
        rank_from_list(["a", "b"], "z", scores=[1.0, math.nan])
    with pytest.raises(ValueError, match="no relevant"):
        rank_from_list(["a"], [])


@pytest.fixture(scope="module")
def module():
    return evaluate.load(str(REPOSITORY / "metrics" / "hits_at_k"))


def test_evaluate_module_gives_the_plain_functions_figures(module):
    rng = np.random.default_rng(3)
    names = [f"{item}.jpg" for item in range(20)]
    predictions, references, scores, ranks = [], [], [], []
    for _ in range(50):
        row = rng.integers(0, 8, size=20).astype(float)
        order = np.argsort(-row, kind="stable")[:10]
        target = int(rng.integers(20))
        predictions.append([names[item] for item in order])
        references.append(names[target])
        scores.append(row[order].tolist())
        ranks.append(rank_from_list(predictions[-1], references[-1], scores[-1]))
    assert module.compute(predictions=predictions, references=references, scores=scores) == summarize_ranks(ranks)
    plain = module.compute(predictions=predictions, references=references, k=[3])
    assert plain["hits@3"] == np.mean([r in p[:3] for p, r in zip(predictions, references, strict=True)])
    assert "hits@1" not in plain


def test_evaluate_module_takes_several_references_and_batches(module):
    assert module.compute(predictions=[["a", "b"]], references=[["x", "b"]], k=[1, 2]) == {
        "hits@1": 0.0,
        "hits@2": 1.0,
        "mrr": 0.5,
        "median_rank": 2.0,
    }
    module.add_batch(predictions=[["a", "b"], []], references=["a", "b"])
    module.add(prediction=["b", "a"], reference="a")
    summary = module.compute(k=[1])
    assert summary["hits@1"] == pytest.approx(1 / 3)
    assert summary["mrr"] == pytest.approx((1 + 0 + 0.5) / 3)
    with pytest.raises(ValueError, match="scores of 2 queries"):
        module.compute(predictions=[["a"]], references=["a"], scores=[[1.0], [2.0]])
