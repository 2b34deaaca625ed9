"""Search by blocks against the full matrix, written out naively."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from imagedex.evaluation import exact as search
from imagedex.evaluation.intervals import interval_of, intervals, without_intervals
from imagedex.metrics.hits_at_k.hits_at_k import summarize_ranks

ROOT = Path(__file__).resolve().parents[2]


def unit_vectors(rng, rows, width=16):
    vectors = rng.standard_normal((rows, width)).astype(np.float32)
    return torch.from_numpy(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def full_matrix(queries, gallery):
    return (queries.numpy().astype(np.float64) @ gallery.numpy().astype(np.float64).T).astype(np.float32)


def naive_rank(scores, relevant):
    best = max(scores[item] for item in relevant)
    return 1 + sum(score >= best for item, score in enumerate(scores) if item not in relevant)


@pytest.fixture
def example():
    """60 pictures of which 20 are exact copies of others, 150 captions, many of them copies of a picture's vector."""
    rng = np.random.default_rng(0)
    images = unit_vectors(rng, 60)
    images[40:] = images[:20]
    texts = unit_vectors(rng, 150)
    targets = rng.integers(0, 60, size=150)
    texts[::3] = images[targets[::3]]
    return texts, images, targets


@pytest.mark.parametrize("block_scores", [1, 61, 60 * 7, 60 * 150, 2**24])
def test_ranks_by_blocks_equal_the_naive_way_with_ties(example, block_scores):
    texts, images, targets = example
    scores = full_matrix(texts, images)
    expected = [naive_rank(row, {target}) for row, target in zip(scores.tolist(), targets, strict=True)]
    ranks = search.ranks_by_blocks(texts, images, targets, block_scores)
    assert ranks.tolist() == expected
    copied = (targets < 20) | (targets >= 40)
    assert (ranks[copied] >= 2).all()  # the copy of the right picture stands before it
    assert (ranks[::3][~copied[::3]] == 1).all()

    own = {image: set(np.flatnonzero(targets == image)) for image in np.unique(targets)}
    expected = [naive_rank(scores[:, image].tolist(), captions) for image, captions in own.items()]
    backwards, image_rows = search.image_to_text_ranks(images, texts, targets, block_scores)
    assert backwards.tolist() == expected
    assert image_rows.tolist() == list(own)


def test_equal_vectors_get_equal_scores_in_blocks_of_any_shape():
    """What float32 products do not promise: the same pair, computed alone, in a row and in odd blocks."""
    rng = np.random.default_rng(1)
    gallery = unit_vectors(rng, 1, width=512).repeat(1003, 1)
    queries = unit_vectors(rng, 33, width=512)
    whole = search.similarity(queries, gallery)
    assert (whole == whole[:, :1]).all()
    for rows in (1, 2, 7, 1003):
        for asked in (1, 5, 33):
            assert (search.similarity(queries[:asked], gallery[:rows]) == whole[:asked, :rows]).all()
    assert search.ranks_by_blocks(queries, gallery, np.arange(33)).tolist() == [1003] * 33


@pytest.mark.parametrize("k", [1, 4, 60, 100])
@pytest.mark.parametrize("product_scores", [8, 2**22])
def test_top_k_equals_a_stable_sort(example, k, product_scores, monkeypatch):
    monkeypatch.setattr(search, "_PRODUCT_SCORES", product_scores)
    texts, images, _ = example
    scores = full_matrix(texts, images)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    found_scores, found_rows = search.top_k(texts, images, k, query_batch_size=11)
    assert found_rows.tolist() == order.tolist()
    assert found_scores.tolist() == np.take_along_axis(scores, order, axis=1).tolist()
    assert found_rows.shape == (150, min(k, 60))


def test_top_k_orders_signs_zeros_and_infinities():
    gallery = torch.tensor([[-0.0], [0.0], [-2.0], [3.0], [-1e-45], [float("inf")], [-float("inf")], [3.0]])
    scores, rows = search.top_k(torch.tensor([[1.0]]), gallery, 8)
    assert rows.tolist() == [[5, 3, 7, 0, 1, 4, 2, 6]]
    assert scores[0, :3].tolist() == [float("inf"), 3.0, 3.0]


def test_the_full_matrix_is_never_held(monkeypatch):
    """25,000 captions x 5,000 pictures scaled down fifty-fold, with the block budget scaled too."""
    rng = np.random.default_rng(2)
    texts, images = unit_vectors(rng, 500), unit_vectors(rng, 100)
    held = []
    honest = search.similarity
    monkeypatch.setattr(search, "similarity", lambda q, g: held.append(len(q) * len(g)) or honest(q, g))
    blocks = [scores.numel() for _, scores in search.score_blocks(texts, images, block_scores=1000)]
    assert max(blocks) <= 1000 and sum(blocks) == 500 * 100
    held.clear()
    search.retrieval_metrics(texts, images, np.arange(500) % 100, block_scores=1000)
    assert max(held) <= 1000 and sum(held) == 2 * 500 * 100


@pytest.mark.slow
def test_coco_size_in_bounded_memory():
    """The real size, in a process of its own: its peak memory stays far below the 500 MB that the full matrix takes."""
    code = """
import resource, sys
import numpy as np, torch
from imagedex.evaluation import exact as search
rng = np.random.default_rng(0)
unit = lambda rows: torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((rows, 64), dtype=np.float32)))
images = unit(5000)
targets = np.repeat(np.arange(5000), 5)
texts = torch.nn.functional.normalize(images[torch.from_numpy(targets)] + 1.5 * unit(25000))
search.retrieval_metrics(texts[:500], images[:100], targets[:500])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
figures = search.retrieval_metrics(texts, images, targets)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
scores = (texts[::100].double() @ images.double().T).float().numpy()
naive = (scores >= scores[np.arange(250), targets[::100]][:, None]).sum(1)
assert naive.tolist() == search.ranks_by_blocks(texts[::100], images, targets[::100]).tolist()
print(figures["gallery_size"], (after - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    gallery_size, grown_mib = map(int, done.stdout.split())
    assert gallery_size == 5000
    assert grown_mib < 350


def test_metrics_in_both_directions(example):
    texts, images, targets = example
    figures = search.retrieval_metrics(texts, images, targets, ks=(1, 5))
    forwards = summarize_ranks(search.ranks_by_blocks(texts, images, targets), ks=(1, 5))
    backwards = summarize_ranks(search.image_to_text_ranks(images, texts, targets)[0], ks=(1, 5))
    expected = forwards | {f"image_to_text_{name}": value for name, value in backwards.items()} | {"gallery_size": 60}
    assert figures == expected
    assert search.retrieval_metrics(texts, images, targets, ks=(1, 5), both_directions=False) == forwards | {
        "gallery_size": 60
    }


def test_five_folds_are_five_evaluations_averaged(example):
    texts, images, targets = example
    folds = []
    for fold in range(5):
        inside = np.flatnonzero(targets // 12 == fold)
        scores = full_matrix(texts[inside], images[fold * 12 : fold * 12 + 12])
        folds.append(
            [naive_rank(row, {t}) for row, t in zip(scores.tolist(), targets[inside] - fold * 12, strict=True)]
        )
    figures = search.retrieval_metrics(texts, images, targets, five_fold=True)
    assert figures["hits@1"] == pytest.approx(np.mean([np.mean(np.array(ranks) <= 1) for ranks in folds]))
    assert figures["mrr"] == pytest.approx(np.mean([np.mean(1 / np.array(ranks)) for ranks in folds]))
    assert figures["gallery_size"] == 12
    assert figures["hits@1"] > search.retrieval_metrics(texts, images, targets)["hits@1"]  # a smaller gallery is easier


def test_galleries_of_the_same_pictures_are_evaluations_of_their_own(example):
    """The captions of the last 20 pictures ask, once among these alone and once among all 60."""
    texts, images, targets = example
    inside = np.flatnonzero(targets >= 40)
    texts, targets = texts[inside], targets[inside]
    galleries = {"": np.arange(40, 60), "whole_": np.arange(60)}
    figures = search.metrics_by_gallery(texts, images, targets, galleries, with_intervals=True)
    alone = search.retrieval_metrics(texts, images[40:], targets - 40, with_intervals=True)
    whole = search.retrieval_metrics(texts, images, targets, with_intervals=True, both_directions=False)
    assert figures == alone | {f"whole_{name}": value for name, value in whole.items()}
    assert (figures["gallery_size"], figures["whole_gallery_size"]) == (20, 60)
    assert figures["hits@1"] > figures["whole_hits@1"]
    again = search.retrieval_metrics(texts, images, targets)  # pictures without captions ask nothing
    backwards = {name: value for name, value in again.items() if name.startswith("image_to_text")}
    assert backwards.items() <= alone.items()


def test_intervals_are_over_the_pictures_asked_for(example):
    texts, images, targets = example
    figures = search.retrieval_metrics(texts, images, targets, with_intervals=True)
    ranks = search.ranks_by_blocks(texts, images, targets)
    expected = intervals((ranks, targets))
    backwards = intervals(search.image_to_text_ranks(images, texts, targets))
    expected |= {f"image_to_text_{name}": value for name, value in backwards.items()}
    assert {name: v for name, v in figures.items() if name.endswith(("_low", "_high"))} == expected
    assert without_intervals(figures) == search.retrieval_metrics(texts, images, targets)
    for name in ("hits@1", "mrr", "image_to_text_hits@5"):
        low, high = interval_of(figures, name)
        assert low < figures[name] < high


def test_wrong_input_is_refused(example):
    texts, images, targets = example
    with pytest.raises(ValueError, match="outside the gallery"):
        search.retrieval_metrics(texts, images[:10], targets)
    with pytest.raises(ValueError, match="target_rows"):
        search.retrieval_metrics(texts, images, targets[:-1])
    with pytest.raises(ValueError, match="no captions"):
        search.retrieval_metrics(texts[:0], images, targets[:0])
    with pytest.raises(ValueError, match="fold"):
        search.retrieval_metrics(texts, images, np.zeros(150, dtype=int), five_fold=True)
    with pytest.raises(ValueError, match="k must"):
        search.top_k(texts, images, 0)
    broken = images.clone()
    broken[3] = float("nan")
    for call in (lambda: search.top_k(texts, broken, 2), lambda: search.ranks_by_blocks(texts, broken, targets)):
        with pytest.raises(ValueError, match="NaN"):
            call()


def test_no_queries_give_empty_answers(example):
    _, images, _ = example
    scores, rows = search.top_k(torch.empty(0, 16), images, 3)
    assert scores.shape == rows.shape == (0, 3)
    assert search.ranks_by_blocks(torch.empty(0, 16), images, []).shape == (0,)
