"""The search that lets float32 products choose, against the one that multiplies everything in float64."""

import pytest
import torch

from imagedex.evaluation import exact, survivors
from imagedex.evaluation.exact import similarity, top_k, with_bias


def by_hand(queries, gallery, k):
    scores = similarity(queries, gallery)
    rows = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]  # equal scores in the order of their rows
    return scores.gather(1, rows), rows


def unit(count, width, seed, numbers=None):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, width, generator=generator)
    if numbers:  # few different vectors: many ties, and differences in the last bit
        vectors = vectors[torch.randint(numbers, (count,), generator=generator)]
        vectors[::3] += 1e-7 * torch.randn(vectors[::3].shape, generator=generator)
    return torch.nn.functional.normalize(vectors, dim=1)


@pytest.mark.parametrize("size", [4096, 8191, 8192, 8192 + 63, 20000])
@pytest.mark.parametrize("numbers", [None, 500, 20])
def test_the_same_rankings_to_the_last_bit(size, numbers, monkeypatch):
    chosen = []
    real = survivors.survivors
    monkeypatch.setattr(exact, "survivors", lambda *a: chosen.append(real(*a)) or chosen[-1])
    for width, k in ((3, 1), (16, 10), (48, 200)):
        queries, gallery = unit(7, width, 1), unit(size, width, 2, numbers)
        for found, wanted in zip(top_k(queries, gallery, k), by_hand(queries, gallery, k), strict=True):
            assert torch.equal(found, wanted)
    assert all(few is not None and len(few[0]) >= 7 for few in chosen) and len(chosen) == 3


def test_with_a_bias_and_vectors_of_other_lengths():
    queries, gallery = unit(5, 12, 3), unit(9000, 12, 4, 900)
    bias = torch.rand(9000, generator=torch.Generator().manual_seed(5)) * 3
    for pair in (with_bias(queries, gallery, bias), (queries * 30, gallery * torch.linspace(0, 9, 9000)[:, None])):
        for found, wanted in zip(top_k(*pair, 11), by_hand(*pair, 11), strict=True):
            assert torch.equal(found, wanted)


def test_too_many_equal_pictures_are_left_to_the_plain_search(monkeypatch):
    monkeypatch.setattr(survivors, "MOST", 1000)
    queries, gallery = unit(3, 8, 6), unit(1, 8, 7).expand(5000, 8).contiguous()
    assert survivors.survivors(queries, gallery, 4, 1e-6) is None
    assert top_k(queries, gallery, 4)[1].tolist() == [[0, 1, 2, 3]] * 3


def test_nan_is_an_error_here_too():
    gallery = unit(5000, 8, 8)
    gallery[77, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        top_k(unit(2, 8, 9), gallery, 3)
