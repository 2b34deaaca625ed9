"""What words say for items: each part against a loop over the definition, and the vectors that hold it against NumPy."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from weights_by_hand import alike_by_hand, weights_by_hand

from imagedex.evaluation.baselines import BM25
from imagedex.training.generative.starts import lexical_weights
from imagedex.training.generative.starts.lexical_weights import (
    lexical_factors,
    occurrences,
    relevance_weights,
    words_alike,
)

SPELLINGS = ["dog", "dogs", "lamp", "run", "runs", "running", "red", "a", "boat", "tree"]


def corpus(items=30, sentences=3, seed=4):
    """(documents, pairs): three sentences an item, of words that its own draw favours."""
    draw = np.random.default_rng(seed)
    documents, pairs = [], []
    for _ in range(items):
        shares = draw.dirichlet(np.full(len(SPELLINGS), 0.5))
        own = [draw.choice(len(SPELLINGS), draw.integers(2, 5), p=shares).tolist() for _ in range(sentences)]
        documents.append(sum(own, []))
        pairs += [(own[i], sum(own[:i] + own[i + 1 :], [])) for i in range(sentences)]
    return documents, pairs


def near(spellings):
    """(words, words): how far each counts for each."""
    found = words_alike(dict(enumerate(spellings)))
    return [[found[word].get(other, 0.0) for other in range(len(spellings))] for word in range(len(spellings))]


def test_dogs_are_nearly_a_dog():
    expected = [
        [1.0 if row == column else alike_by_hand(SPELLINGS, one, other) for column, other in enumerate(SPELLINGS)]
        for row, one in enumerate(SPELLINGS)
    ]
    np.testing.assert_allclose(near(SPELLINGS), expected)
    found = words_alike(dict(enumerate(SPELLINGS)))
    assert set(found[0]) == {0, 1} and 0.15 < found[0][1] < 0.5


def test_spellings_are_compared_in_pieces_alike(monkeypatch):
    whole = near(SPELLINGS)
    monkeypatch.setattr(lexical_weights, "CHUNK", 3)
    np.testing.assert_allclose(near(SPELLINGS), whole)


def test_words_without_a_spelling_or_with_the_same():
    found = near(["", "dog", "dog", ""])
    assert found[0] == [1, 0, 0, 0]
    assert found[1] == pytest.approx([0, 1, 0.5, 0])


def test_a_text_has_what_is_nearly_in_it():
    found = occurrences(Counter({"dog": 2, "red": 1}), {"dog": {"dog": 1.0, "dogs": 0.25}, "red": {"red": 1.0}})
    assert found == {"dog": 2, "dogs": 0.5, "red": 1}


def test_a_word_that_comes_again_weighs_more():
    # of 4 items, "dog" is in 2 and comes again each time, or as "dogs", which is a quarter of it; "red" is in 2 and never does
    near = {"dog": {"dog": 1.0, "dogs": 0.25}, "dogs": {"dogs": 1.0, "dog": 0.25}, "red": {"red": 1.0}}
    pairs = [(["dog", "red"], ["dog", "dog"]), (["dog", "dog"], ["dogs", "boat"]), (["red"], ["boat"])] * 4
    usual = (4 + 1 + 0.5) / (8 + 8 + 1)
    dog, red = (5 + 30 * usual) / 38, 30 * usual / 38
    found = [{"dog": 2.0, "dogs": 0.5}, {"dog": 1.0, "dogs": 0.25}, {"red": 1.0}, {"red": 3.0}]
    weights = relevance_weights(found, pairs, near)
    assert dog / (1 - dog) < 1 < math.exp(0.5), (
        "less than half come again: that says less than nothing of a word in half"
    )
    assert weights["dog"] == weights["red"] == pytest.approx(0.2 * math.log(2))
    rare = relevance_weights([*found, *[{}] * 96], pairs, near)  # of 100 items
    q = 2.5 / 101
    assert rare["dog"] == pytest.approx(math.log(dog / (1 - dog) * (1 - q) / q))
    assert rare["red"] == pytest.approx(math.log(red / (1 - red) * (1 - q) / q))
    q = 1.25 / 101  # "dogs", of which nobody asked: as all words
    assert rare["dogs"] == pytest.approx(math.log(usual / (1 - usual) * (1 - q) / q))


def test_where_nothing_is_known_of_relevance_it_is_idf():
    found = relevance_weights([{"a": 2.0, "b": 0.5}, {"a": 1.0}, {}], [], {})
    assert found == pytest.approx({"a": math.log(1 + 1.5 / 2.5), "b": math.log(1 + 3 / 1)})


@pytest.mark.parametrize("known", [True, False])
def test_factors_that_fit_give_the_weights_themselves(known):
    documents, pairs = corpus()
    pairs = pairs if known else []
    expected = weights_by_hand(documents, pairs, dict(enumerate(SPELLINGS)))
    words, items = lexical_factors(documents, pairs, dict(enumerate(SPELLINGS)), 16)
    assert sorted(words) == sorted(expected) and items.shape == (30, 16)
    assert max(vector.norm().item() for vector in words.values()) == pytest.approx(1, abs=1e-5)
    for word, weights in expected.items():
        np.testing.assert_allclose((items @ words[word]).numpy(), weights, atol=1e-4)


def test_too_few_dimensions_are_the_best_for_the_words_as_often_as_they_are_used():
    documents, pairs = corpus()
    expected = weights_by_hand(documents, pairs, dict(enumerate(SPELLINGS)))
    uses = Counter(sum(documents, []))
    often = np.sqrt([uses[word] for word in sorted(expected)])[:, None]
    left, values, right = np.linalg.svd(often * np.array([expected[word] for word in sorted(expected)]))
    best = (left[:, :4] * values[:4]) @ right[:4] / often
    words, items = lexical_factors(documents, pairs, dict(enumerate(SPELLINGS)), 4)
    found = torch.stack([words[word] for word in sorted(words)]) @ items.T
    np.testing.assert_allclose(found.numpy(), best, atol=1e-4)


def test_words_that_are_not_alike_and_of_which_nothing_is_known_weigh_as_in_bm25():
    documents, _ = corpus()
    spelling = {word: chr(ord("a") + word) * 3 for word in range(len(SPELLINGS))}
    expected = BM25(documents, epsilon=None)
    words, items = lexical_factors(documents, [], spelling, 16)
    for word, vector in words.items():
        np.testing.assert_allclose((items @ vector).numpy(), expected.scores([[word]])[0], atol=1e-4)


def test_no_words_are_an_error():
    with pytest.raises(ValueError, match="no item has a text"):
        lexical_factors([[], []], [], {}, 8)
