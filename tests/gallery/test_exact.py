"""Search against a loop over all rows."""

import math

import numpy as np
import pytest
import torch

from imagedex.encoding.store import Store
from imagedex.evaluation import best_rows, int8_codes
from imagedex.gallery import exact


@pytest.fixture(autouse=True, params=["float32", "int8"])
def quick_products(request, monkeypatch):
    """Small blocks, and either kind of quick products from the first row on."""
    monkeypatch.setattr(best_rows, "BLOCK_SCORES", 200)
    monkeypatch.setattr(int8_codes, "CODED_FROM", 1)
    monkeypatch.setattr(int8_codes, "ASKED", 0)
    if not int8_codes.fast_products():
        monkeypatch.setattr(torch, "_int_mm", lambda a, b, out: out.copy_(a.int() @ b.int()))
    monkeypatch.setattr(int8_codes, "fast_products", lambda: request.param == "int8")


def stored(folder, vectors, shards=3, **fields):
    """Rows of a store in a shuffled order, and their keys."""
    keys = np.random.default_rng(7).integers(0, 256, (len(vectors), 16), dtype=np.uint8)
    store = Store(folder, {"model": "x"})
    for part in np.array_split(np.arange(len(vectors)), shards):
        store.write(keys[part], vectors=vectors[part], **{name: value[part] for name, value in fields.items()})
    store.reload()
    return store.rows(keys)


def unit(rows, size, seed=0, kind=np.float32):
    vectors = np.random.default_rng(seed).normal(size=(rows, size))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(kind)


def by_hand(query, vectors, names, k, allowed=None, bias=None):
    """Products of float32 numbers are exact in float64, and fsum adds them without any error."""
    scores = []
    for row, vector in enumerate(vectors):
        if allowed is None or allowed[row]:
            score = math.fsum(float(a) * float(b) for a, b in zip(query, vector, strict=True))
            scores.append((-(score - (float(bias[row]) if bias is not None else 0.0)), names[row], row))
    return [row for _, _, row in sorted(scores)[:k]]


@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize("k", [1, 7, 500])
def test_the_best_rows_in_the_order_of_exact_products(tmp_path, kind, k):
    vectors, queries = unit(300, 24, kind=kind), unit(4, 24, seed=1)
    names = [f"{row:03}" for row in range(300)]
    found = exact.search(queries, stored(tmp_path, vectors), names, k)
    for query, answer in zip(queries, found, strict=True):
        assert [row for row, _ in answer] == by_hand(query, vectors, names, k)
        assert all(score == pytest.approx(float(vectors[row].astype(float) @ query)) for row, score in answer)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_a_filter_is_applied_before_the_search(tmp_path, share):
    vectors, queries = unit(400, 16), unit(3, 16, seed=2)
    names, allowed = [str(row) for row in range(400)], np.random.default_rng(3).random(400) < share
    found = exact.search(queries, stored(tmp_path, vectors), names, 10, allowed)
    expected = [by_hand(query, vectors, names, 10, allowed) for query in queries]
    assert [[row for row, _ in answer] for answer in found] == expected


def test_near_ties_that_float32_cannot_tell_and_equal_rows_by_name(tmp_path):
    query = unit(1, 64, seed=5)
    near = np.repeat(unit(1, 64, seed=6), 200, axis=0)
    near[::2, 0] = np.nextafter(near[::2, 0], np.float32(2))  # one last bit apart
    vectors = np.concatenate([near, unit(50, 64, seed=8)])
    names = [f"{(row * 37) % 250:03}" for row in range(250)]
    found = exact.search(query, stored(tmp_path, vectors), names, 30)
    assert [row for row, _ in found[0]] == by_hand(query[0], vectors, names, 30)


def test_a_bias_is_taken_off(tmp_path):
    vectors, query = unit(200, 16), unit(1, 16, seed=9)
    bias = np.random.default_rng(1).random(200).astype(np.float32)
    names = [str(row) for row in range(200)]
    found = exact.search(query, stored(tmp_path, vectors, bias=bias), names, 20, bias="bias")
    assert [row for row, _ in found[0]] == by_hand(query[0], vectors, names, 20, bias=bias)


def test_nothing_to_find(tmp_path):
    rows = stored(tmp_path, unit(5, 8), shards=1)
    assert exact.search(unit(2, 8), rows, list("abcde"), 3, np.zeros(5, bool)) == [[], []]


def test_codes_are_made_once_and_only_where_they_pay(tmp_path, monkeypatch):
    made, real = [], int8_codes.Int8Codes
    monkeypatch.setattr(int8_codes, "Int8Codes", lambda *args: made.append(args) or real(*args))
    monkeypatch.setattr(int8_codes, "fast_products", lambda: True)
    monkeypatch.setattr(int8_codes, "ASKED", 5)
    rows, names = stored(tmp_path, unit(100, 16)), [str(row) for row in range(100)]
    counts = []
    for _ in range(4):
        exact.search(unit(2, 16), rows, names, 3)
        counts.append(len(made))
    monkeypatch.setattr(int8_codes, "CODED_FROM", 101)
    exact.search(unit(9, 16), stored(tmp_path / "other", unit(100, 16)), names, 3)
    assert counts == [0, 0, 1, 1] and len(made) == 1
