"""Intervals against a bootstrap written as loops, and how often they hold what they should."""

import math

import numpy as np
import pytest

from imagedex.evaluation.intervals import interval_of, intervals, without_intervals

NAMES = ("hits@1", "hits@5", "hits@10", "mrr")


def asked(rng, pictures, per_picture=4):
    """Ranks that captions of one picture share in part, and the pictures they ask for; pictures differ in their captions."""
    ranks, names = [], []
    for picture in range(pictures):
        easy = rng.random()
        for _ in range(rng.integers(1, per_picture + 1)):
            ranks.append(1 if rng.random() < easy else math.inf if rng.random() < 0.2 else int(rng.integers(2, 30)))
            names.append(f"{picture}.jpg")
    return ranks, names


def test_names_are_names_whatever_they_are_of():
    ranks, names = asked(np.random.default_rng(5), 12)
    numbers = np.array([int(name[:-4]) for name in names])
    tuples = [(number,) if number % 2 else (number, 99) for number in numbers.tolist()]
    assert intervals((ranks, numbers)) == intervals((ranks, tuples))


def redrawn(ranks, names, rng):
    """Lists of the ranks of as many pictures, drawn with replacement, without end."""
    own = {}
    for rank, name in zip(ranks, names, strict=True):
        own.setdefault(name, []).append(rank)
    own = list(own.values())
    while True:
        yield [rank for picture in rng.integers(len(own), size=len(own)) for rank in own[picture]]


def figures_of(ranks):
    return [
        *(sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 5, 10)),
        sum(1 / r for r in ranks) / len(ranks),
    ]


def test_intervals_are_those_of_a_loop_over_redrawn_pictures():
    rng = np.random.default_rng(1)
    ranks, names = asked(rng, 60)
    found = intervals((ranks, names))
    assert list(found) == [name + end for end in ("_low", "_high") for name in NAMES]
    drawn = redrawn(ranks, names, rng)
    expected = np.percentile([figures_of(next(drawn)) for _ in range(4000)], [2.5, 97.5], axis=0)
    for column, name in enumerate(NAMES):
        np.testing.assert_allclose(interval_of(found, name), expected[:, column], atol=0.012)


def test_captions_of_a_picture_are_drawn_together():
    """Five captions that always fare alike say no more than one of them does."""
    ranks, pictures = np.array([1, 7] * 50), np.arange(100)
    once, five = intervals((ranks, pictures)), intervals((ranks.repeat(5), pictures.repeat(5)))
    assert five == pytest.approx(once)
    apart = intervals((ranks.repeat(5), np.arange(500)))
    assert apart["hits@1_high"] - apart["hits@1_low"] < 0.6 * (five["hits@1_high"] - five["hits@1_low"])


def test_blocks_of_draws_change_nothing(monkeypatch):
    ranks, names = asked(np.random.default_rng(2), 40)
    whole = intervals((ranks, names))
    monkeypatch.setattr("imagedex.evaluation.intervals._INDICES", 130)
    assert intervals((ranks, names)) == pytest.approx(whole)
    assert intervals((ranks, names)) == intervals((ranks, names))


def test_folds_are_drawn_from_apart():
    rng = np.random.default_rng(3)
    folds = [asked(rng, 30), asked(rng, 50)]
    drawn = [redrawn(*fold, rng) for fold in folds]
    means = [np.mean([figures_of(next(fold))[0] for fold in drawn]) for _ in range(4000)]
    np.testing.assert_allclose(interval_of(intervals(*folds), "hits@1"), np.percentile(means, [2.5, 97.5]), atol=0.012)


def test_about_nineteen_of_twenty_intervals_hold_the_truth():
    """Pictures from a known source: a picture is easy with Hits@1 0.6 or hard with 0.2, half of them each, so 0.4 is true."""
    rng, held, trials = np.random.default_rng(4), 0, 400
    for _ in range(trials):
        easy = np.where(rng.random(80) < 0.5, 0.6, 0.2).repeat(4)
        ranks = np.where(rng.random(320) < easy, 1, 20)
        low, high = interval_of(intervals((ranks, np.arange(80).repeat(4)), draws=400), "hits@1")
        held += low <= 0.4 <= high
    assert 0.91 <= held / trials <= 0.98


def test_one_picture_says_nothing_of_chance():
    assert intervals(([1, 2], ["a.jpg", "a.jpg"])) == {}
    assert intervals(([1, 2], ["a", "b"]), ([1], ["c"])) == {}
    assert interval_of({"hits@1": 0.5}, "hits@1") is None
    assert without_intervals({"hits@1": 0.5, "hits@1_low": 0.4, "hits@1_high": 0.6}) == {"hits@1": 0.5}
