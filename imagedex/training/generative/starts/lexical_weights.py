"""How much each word of a sentence says for each item, from the trained sentences alone; and vectors that hold it.

It is BM25 (Robertson and Zaragoza, 2009), but for two things that the trained sentences teach:

    weight(word, item) = relevance(word) * tf * (k1 + 1) / (tf + k1 * (1 - b + b * |item| / mean |item|))

- tf counts words that are written alike, too, each as far as it is: "dog" finds a little of "dogs".
- relevance(word) is the whole relevance weight of Robertson and Sparck Jones ("Relevance weighting of search terms", 1976),
  of which idf is what is left where nothing is known of relevance. Here something is: each trained sentence, and what else
  is said of its item. So a word weighs much that people use again of the same thing, and not just a rare one.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch.nn import functional as F

from imagedex.identifiers.vectors import truncated_svd

K1, B = 1.5, 0.75  # as in imagedex/retrieval/baselines.py
PRIOR = 30.0  # sentences' worth of what is known of all words, in what is known of one
LEAST = 0.2  # of its idf, that each word weighs at least
ALIKE = 0.5  # of an occurrence, that a word counts for another that is written all the same; and in proportion
DIFFERENT = 0.3  # cosine of spellings that are no longer alike
CHUNK = 1024  # words compared with all others at once

Near = dict[int, dict[int, float]]


def lexical_factors(
    documents: Sequence[Sequence[int]],
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    spelling: dict[int, str],
    dimensions: int,
    seed: int = 0,
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """Vectors of words and items, word . item ~ weight(word, item).

    They are a singular value decomposition of the weights in which a word counts as often as it is used, so that where
    `dimensions` do not hold all, it is rare words that lose: the least squared error over what sentences ask.

    Args:
        documents: of each item (N of them), the words of all that is said of it.
        pairs: the words of a trained sentence, and those of what else is said of its item.
        spelling: of each word.
        dimensions: of the vectors; what is more than the weights' rank stays zero.

    Returns: word -> (dimensions,) vector, the longest of length 1; and (N, dimensions) vectors of the items.

    Raises: `ValueError` when there are no words.
    """
    uses = Counter(word for text in [*documents, *(sentence for sentence, _ in pairs)] for word in text)
    near = words_alike({word: spelling[word] for word in sorted(uses)})
    found = [occurrences(Counter(document), near) for document in documents]
    relevance = relevance_weights(found, pairs, near)
    if not relevance:
        raise ValueError("no item has a text")
    line = {word: place for place, word in enumerate(sorted(relevance))}
    often = {word: math.sqrt(uses[word]) for word in line}
    mean = sum(map(len, documents)) / len(documents)
    indices, weights = [], []
    for item, (document, own) in enumerate(zip(documents, found, strict=True)):
        norm = K1 * (1 - B + B * len(document) / mean)
        for word, tf in own.items():
            indices.append((line[word], item))
            weights.append(often[word] * relevance[word] * tf * (K1 + 1) / (tf + norm))
    matrix = sparse(indices, weights, (len(line), len(documents)))

    left = truncated_svd(matrix, dimensions, seed)  # U * S
    values = np.linalg.norm(left, axis=0)
    left, values = (part[..., values > 1e-6 * values.max()] for part in (left, values))  # the rest is noise
    left = left / np.sqrt(values)
    items = matrix.T @ left / values  # (N, rank)
    left = left / np.array(list(often.values()))[:, None]
    longest, empty = np.linalg.norm(left, axis=1).max(), dimensions - len(values)
    left, items = (F.pad(torch.from_numpy(part), (0, empty)).float() for part in (left / longest, items * longest))
    return dict(zip(line, left, strict=True)), items


def occurrences(counts: Counter, near: Near) -> dict[int, float]:
    """tf of every word in a text of these words."""
    found: dict[int, float] = {}
    for word, times in counts.items():
        for other, share in near[word].items():
            found[other] = found.get(other, 0.0) + share * times
    return found


def relevance_weights(
    found: Sequence[dict[int, float]], pairs: Iterable[tuple[Sequence[int], Sequence[int]]], near: Near
) -> dict[int, float]:
    """log(p / (1 - p)) - log(q / (1 - q)) of every word that an item has.

    q is the share of all items that have it, and p the share, of the sentences with the word, whose item has it in what else
    is said of it, drawn towards that of all words by `PRIOR` sentences. To have a word is to have its tf, up to 1. Without
    `pairs`, idf as Lucene has it: of a word in most captions, rank_bm25's floor makes too much.

    Args:
        found: word -> tf, of each item.
    """
    having, asked, again = Counter(), Counter(), Counter()
    for own in found:
        having.update({word: min(1.0, tf) for word, tf in own.items()})
    for sentence, rest in pairs:
        rest = Counter(rest)
        for word in set(sentence):
            asked[word] += 1
            again[word] += min(1.0, sum(share * rest[other] for other, share in near[word].items()))
    usual = (again.total() + 0.5) / (asked.total() + 1)
    weights = {}
    for word, items in having.items():
        q = (items + 0.5) / (len(found) + 1)
        weights[word] = idf = math.log1p((1 - q) / q)
        if asked:
            p = (again[word] + PRIOR * usual) / (asked[word] + PRIOR)
            weights[word] = max(LEAST * idf, math.log(p / (1 - p) * (1 - q) / q))
    return weights


def words_alike(spelling: dict[int, str]) -> Near:
    """Of each word those that are written alike, itself among them, and how far: 1 for itself, else `ALIKE` times the cosine
    of their letters by three ("<do", "dog", "og>"), each as heavy as its idf, where that is above `DIFFERENT`."""
    words, size = list(spelling), len(spelling)
    trigrams = [Counter(f"<{spelling[word]}>"[at : at + 3] for at in range(len(spelling[word]))) for word in words]
    frequency = Counter(trigram for own in trigrams for trigram in own)
    column = {trigram: place for place, trigram in enumerate(frequency)}
    indices, weights = [], []
    for row, own in enumerate(trigrams):
        heavy = [times * math.log((1 + size) / frequency[trigram]) for trigram, times in own.items()]
        indices += [(row, column[trigram]) for trigram in own]
        weights += [weight / math.hypot(*heavy) for weight in heavy]
    matrix = sparse(indices, weights, (size, max(1, len(column))))
    near = {word: {word: 1.0} for word in words}
    for begin in range(0, size, CHUNK):
        cosines = (matrix[begin : begin + CHUNK] @ matrix.T).tocoo()  # (own, words)
        for place, other, cosine in zip(cosines.row.tolist(), cosines.col.tolist(), cosines.data.tolist(), strict=True):
            if cosine > DIFFERENT and other != begin + place:
                near[words[begin + place]][words[other]] = ALIKE * cosine
    return near


def sparse(indices: list[tuple[int, int]], values: list[float], shape: tuple[int, int]) -> csr_matrix:
    rows, columns = np.array(indices, dtype=np.int64).reshape(-1, 2).T
    return csr_matrix((np.array(values, dtype=np.float64), (rows, columns)), shape=shape)
