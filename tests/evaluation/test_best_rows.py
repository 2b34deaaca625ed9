"""The k best rows against a loop, with vectors that are made to mislead quick products."""

import numpy as np
import pytest
import torch

from imagedex.evaluation import best_rows as search
from imagedex.evaluation import int8_codes
from imagedex.evaluation.best_rows import FloatScores, Rows, best_rows, error_bound
from imagedex.evaluation.int8_codes import CodedQueries, Int8Codes


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(search, "BLOCK_SCORES", 300)
    monkeypatch.setattr(search, "QUERIES_AT_ONCE", 7)
    monkeypatch.setattr(search, "PAIRS_AT_ONCE", 50)
    if not int8_codes.fast_products():  # the same whole numbers, slowly
        monkeypatch.setattr(torch, "_int_mm", lambda a, b, out: out.copy_(a.int() @ b.int()))


def unit(vectors):
    vectors = np.asarray(vectors, np.float64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths == 0, 1, lengths)).astype(np.float32)


def gaussian(rows, size, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, size))


def turned_back(size):
    """Vectors that the rotation turns into a single coordinate each, the worst for steps of one length."""
    return int8_codes.turned(torch.eye(size)).T.numpy()[:size]


def one_bit_apart():
    near = np.repeat(unit(gaussian(1, 64)), 300, axis=0)
    near[::2, 0] = np.nextafter(near[::2, 0], np.float32(2))
    return near


ROWS = {
    "random": lambda: unit(gaussian(500, 70)),
    "one number": lambda: unit(gaussian(50, 1)),
    "three numbers": lambda: unit(gaussian(200, 3)),
    "one direction": lambda: np.repeat(unit(gaussian(1, 65)), 300, axis=0),
    "copies": lambda: np.repeat(unit(gaussian(40, 64)), 10, axis=0),
    "one bit apart": one_bit_apart,
    "zeros": lambda: np.zeros((100, 64), np.float32),
    "zeros among others": lambda: unit(gaussian(300, 64) * (np.arange(300) % 3 > 0)[:, None]),
    "one hot": lambda: np.eye(128, dtype=np.float32)[np.arange(300) % 128],
    "one hot after the rotation": lambda: unit(np.concatenate([gaussian(300, 128), turned_back(128)])),
    "only one hot after the rotation": lambda: turned_back(128),
    "a hot coordinate": lambda: unit(gaussian(400, 96) + 40 * (np.arange(96) == 5)),
    "from 1e-30 to 1": lambda: unit(gaussian(300, 128) * 10.0 ** -np.linspace(0, 30, 128)),
    "a tight cluster": lambda: unit(gaussian(1, 64) + 1e-4 * gaussian(400, 64)),
    "opposites": lambda: unit(np.concatenate([gaussian(100, 64), -gaussian(100, 64)])),
    "float16": lambda: unit(gaussian(300, 72)).astype(np.float16),
    "no unit vectors": lambda: (gaussian(300, 64) * 10.0 ** np.random.default_rng(1).uniform(-3, 3, (300, 1))).astype("f4"),
    "numbers that are none": lambda: np.where(np.arange(300)[:, None] % 50 == 7, np.nan, unit(gaussian(300, 64))).astype("f4"),
    "a single row": lambda: unit(gaussian(1, 64)),
    "of low rank": lambda: unit(gaussian(300, 40) @ gaussian(40, 300, 1)),
    "few coordinates": lambda: unit(gaussian(300, 256) * (np.arange(256) % 17 == 0)),
    "two huge opposites": lambda: np.concatenate(
        [unit(gaussian(200, 300)), [[1e18], [-1e18]] * unit(gaussian(1, 300))]
    ).astype("f4"),
    "a spectrum": lambda: unit(gaussian(400, 300) * np.arange(1, 301) ** -0.7),
    "a spectrum and what is outside it": lambda: unit(
        np.concatenate([gaussian(400, 300) * np.arange(1, 301) ** -0.7, gaussian(20, 300)])
    ),
}  # fmt: skip


@pytest.fixture
def heads_everywhere(monkeypatch):
    """Heads of all rows that have more than 64 numbers, whatever they rule out, for all queries."""
    monkeypatch.setattr(search, "HEAD_QUERIES", 7)
    monkeypatch.setattr(search, "_HEADS_CROWDED", 1)
    monkeypatch.setattr(search, "HEADS_AT_ONCE", 150)
    monkeypatch.setattr(int8_codes, "HEADS_A_PRODUCT", 100)
    monkeypatch.setattr(int8_codes, "WIDE", int8_codes.HEAD + 1)
    monkeypatch.setattr(int8_codes, "SMALL_REST", 2)


def in_a_loop(products, k, names, bias, allowed):
    """Args: products (N,), each row's own with the query."""
    found = []
    for row, product in enumerate(products):
        score = product - (0.0 if bias is None else bias[row])
        if allowed[row] and not np.isnan(score):
            found.append((-score, names[row], row, score))
    return [(row, score) for *_, row, score in sorted(found)[:k]]


def queries_for(rows):
    """Random ones, rows themselves, a zero, and one hot after the rotation."""
    size = rows.shape[1]
    own = np.nan_to_num(rows[:: max(1, len(rows) // 3)]).astype(np.float32)
    special = [np.zeros((1, size)), turned_back(size)[:1] if size % 64 == 0 else np.eye(size)[:1]]
    return np.concatenate([unit(gaussian(8, size, 9)), unit(own), *special]).astype(np.float32)


def found_by(kind, rows, queries, k, names, bias, allowed):
    longest = float(np.nanmax(np.linalg.norm(rows.astype(np.float64), axis=1)))
    searched = Rows.of(rows, names=names, bias=bias, longest=longest)
    codes = Int8Codes(searched.read, len(rows), bias) if kind != "float32" else None
    return best_rows(queries, searched, k, allowed, codes)


@pytest.mark.parametrize("kind", ["float32", "int8", "heads"])
@pytest.mark.parametrize("name", ROWS)
def test_the_best_rows_are_those_of_float64_products(name, kind, request):
    if kind == "heads":
        request.getfixturevalue("heads_everywhere")
    rows = ROWS[name]()
    rng = np.random.default_rng(5)
    names = [f"{number:04}" for number in rng.permutation(len(rows))]
    biases = [
        None,
        rng.normal(size=len(rows)).astype(np.float32) / 5,
        (1e6 * rng.normal(size=len(rows))).astype(np.float32),
    ]
    queries = queries_for(rows)
    wide, asked = rows.astype(np.float64), queries.astype(np.float64)
    products = [[(vector * query).sum() for vector in wide] for query in asked]
    for k in (1, 10, len(rows) + 5):
        for bias in biases:
            allowed = rng.random(len(rows)) < (0.4 if k == 10 else 1.1)
            found = found_by(kind, rows, queries, k, names, bias, None if allowed.all() else allowed)
            assert found == [in_a_loop(own, k, names, bias, allowed) for own in products]


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_most_rows_are_never_multiplied_in_float64(kind, monkeypatch):
    rows, decided = unit(gaussian(20_000, 64)), []
    products = search.Best._products
    monkeypatch.setattr(search, "BLOCK_SCORES", 2**14)
    monkeypatch.setattr(
        search.Best, "_products", lambda self, *pairs: decided.append(len(pairs[0])) or products(self, *pairs)
    )
    found_by(kind, rows, unit(gaussian(5, 64, 1)), 10, None, None, np.ones(len(rows), bool))
    assert sum(decided) < 5 * 200


@pytest.mark.parametrize("name", [name for name in ROWS if name != "numbers that are none"])
def test_no_product_of_codes_misses_by_more_than_the_bound(name):
    rows = ROWS[name]()
    codes = Int8Codes(lambda places: rows[places], len(rows))
    queries = queries_for(rows)
    coded = CodedQueries(codes, queries)
    true = rows.astype(np.float64) @ queries.astype(np.float64).T
    near = coded.scores(slice(0, len(rows))).numpy() * coded.step + coded.at_mean
    usual = ~codes.is_stray
    assert (np.abs(near - true)[usual] <= coded.error + 1e-9 * np.abs(true[usual])).all()
    least = coded.least(true[0]).numpy()  # the first row's own score is never ruled out
    assert codes.is_stray[0] or (coded.scores(slice(0, 1)).numpy()[0] >= least).all()


@pytest.mark.parametrize("name", [name for name in ROWS if name != "numbers that are none"])
def test_no_head_rules_out_more_than_the_bound_allows(name, heads_everywhere):
    rows = ROWS[name]()
    bias = np.random.default_rng(2).normal(size=len(rows)).astype(np.float32)
    for own in (None, bias):
        codes = Int8Codes(lambda places: rows[places], len(rows), own)
        if codes.rest is None:
            assert rows.shape[1] <= int8_codes.HEAD or (rows == rows[0]).all()
            return
        queries = queries_for(rows)
        coded = CodedQueries(codes, queries)
        true = rows.astype(np.float64) @ queries.astype(np.float64).T - (0 if own is None else own[:, None])
        scores = coded.head_scores(slice(0, len(rows))).numpy()
        for row in np.flatnonzero(~codes.is_stray):  # were it the floor, the row itself would be kept
            assert (scores[row] >= coded.head_least(true[row]).numpy()).all()


def test_heads_rule_out_nearly_all_rows_of_a_spectrum_and_do_not_exist_without_one():
    rows = ROWS["a spectrum"]()
    codes = Int8Codes(lambda places: rows[places], len(rows))
    coded = CodedQueries(codes, rows[:1])
    kept = coded.head_scores(slice(0, len(rows))) >= coded.head_least(np.array([0.9]))
    assert kept[0] and kept.sum() < 40
    even = unit(gaussian(2000, 300))
    assert Int8Codes(lambda places: even[places], len(even)).rest is None


def test_rows_of_low_rank_are_coded_and_a_matrix_that_cannot_be_decomposed_turns_nothing(monkeypatch):
    rows = ROWS["of low rank"]()
    codes = Int8Codes(lambda places: rows[places], len(rows))
    assert codes.rest is not None and codes.of_use

    def gives_up(matrix):
        raise np.linalg.LinAlgError

    monkeypatch.setattr(np.linalg, "eigh", gives_up)
    assert found_by("int8", rows, rows[3:4], 5, None, None, None) == found_by(
        "float32", rows, rows[3:4], 5, None, None, None
    )


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_a_query_that_is_no_number_costs_the_others_nothing(kind):
    rows, queries = unit(gaussian(400, 64)), unit(gaussian(3, 64, 1))
    bias = np.random.default_rng(3).normal(size=400).astype(np.float32)
    expected = found_by(kind, rows, queries, 5, None, bias, None)
    queries[1, 3] = np.nan
    found = found_by(kind, rows, queries, 5, None, bias, None)
    assert (found[0], found[2]) == (expected[0], expected[2])


def test_strays_are_few_among_usual_vectors_and_all_where_codes_are_of_no_use():
    usual, odd = unit(gaussian(5000, 128)), turned_back(128)[:3]
    assert len(Int8Codes(lambda places: usual[places], len(usual)).strays) < 25
    few = np.concatenate([usual, odd])
    assert set(range(5000, 5003)) <= set(Int8Codes(lambda places: few[places], len(few)).strays.tolist())
    assert not Int8Codes(lambda places: np.full((len(places), 8), np.nan, np.float32), 100).of_use


def test_the_rotation_turns_to_the_largest_directions_first_and_keeps_products():
    rows = torch.from_numpy(gaussian(500, 300) * np.arange(1, 301)[::-1].copy() ** 0.5)
    turn = int8_codes.directions(rows)
    torch.testing.assert_close(turn @ turn.T, torch.eye(300, dtype=torch.float64), atol=1e-12, rtol=0)
    head = (rows @ turn)[:, : int8_codes.HEAD]
    lengths = rows / rows.norm(dim=1, keepdim=True)
    best = torch.linalg.svd(lengths, full_matrices=False).S[: int8_codes.HEAD] ** 2
    torch.testing.assert_close((head / rows.norm(dim=1, keepdim=True)).square().sum(), best.sum())


def test_flipping_and_mixing_keeps_products_and_shares_out_what_is_large():
    left, right = torch.from_numpy(gaussian(5, 100)), torch.from_numpy(gaussian(6, 100, 1))
    torch.testing.assert_close(int8_codes.turned(left) @ int8_codes.turned(right).T, left @ right.T)
    assert int8_codes.turned(torch.eye(100)).abs().max() <= 0.126


def test_scores_that_are_rounded_tie_by_row():
    rows = one_bit_apart()
    query = unit(gaussian(1, 64, 3))
    scores = (rows.astype(np.float64) @ query[0].astype(np.float64)).astype(np.float32)
    expected = np.lexsort((np.arange(len(rows)), -scores))[:20].tolist()
    found = best_rows(query, Rows.of(rows), 20, rounded=True)
    assert [row for row, _ in found[0]] == expected


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_rounding_rules_out_no_copy_of_what_is_found(kind):
    """Codes of copies say everything, but for what a score loses where it is rounded."""
    one = unit(gaussian(1, 1024))
    rows = np.repeat(one, 300, axis=0)
    searched = Rows.of(rows)
    codes = Int8Codes(searched.read, len(rows)) if kind == "int8" else None
    for query in unit(one + 0.001 * gaussian(20, 1024, 3)):
        (found,) = best_rows(query[None], searched, 10, codes=codes, rounded=True)
        assert [row for row, _ in found] == list(range(10))


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_an_endless_bias_costs_the_other_rows_nothing(kind, monkeypatch):
    rows, decided, products = unit(gaussian(2000, 64)), [], search.Best._products
    bias = np.zeros(len(rows), np.float32)
    bias[[3, 70]] = np.inf, -np.inf
    monkeypatch.setattr(
        search.Best, "_products", lambda self, *pairs: decided.append(len(pairs[0])) or products(self, *pairs)
    )
    (found,) = found_by(kind, rows, rows[5:6], 10, None, bias, None)
    assert [row for row, _ in found[:2]] == [70, 5] and 3 not in [row for row, _ in found]
    assert sum(decided) < 400


def test_products_set_to_be_coarse_are_not_used():
    rows, queries = unit(gaussian(400, 64)), unit(gaussian(3, 64, 1))
    expected = found_by("float32", rows, queries, 5, None, None, None)
    torch.set_float32_matmul_precision("medium")
    try:
        assert FloatScores(Rows.of(rows), queries).dtype == torch.float64
        assert found_by("float32", rows, queries, 5, None, None, None) == expected
        assert found_by("int8", rows, queries, 5, None, None, None) == expected
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_error_bound_holds_for_the_worst_that_was_tried():
    rng = np.random.default_rng(0)
    for size in (8, 384, 1024):
        left, right = np.abs(unit(gaussian(200, size, size))), np.abs(unit(gaussian(200, size, size + 1)))
        true = (left.astype(np.float64) * right.astype(np.float64)).sum(1)
        order = rng.permutation(size)
        summed = np.zeros(200, np.float32)
        for place in order:  # one after the other, the order that errs most
            summed += left[:, place] * right[:, place]
        assert np.abs(summed - true).max() <= error_bound(size)
