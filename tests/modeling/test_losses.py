"""Losses against hand arithmetic and naive loops."""

import math

import pytest
import torch
from torch.nn import functional as F

from modeling.losses import info_nce_loss, paired_hinge_loss, same_picture


def unit(batch_size, dim=5, seed=0):
    vectors = torch.randn(batch_size, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(vectors, dim=-1)


def naive_paired_hinge(text, image, margin, ids=None):
    """The definition, one pair at a time: first half against second half. Returns (sum, number of terms that count)."""
    half, total, count = len(text) // 2, 0.0, 0
    for i in range(half):
        j = i + half
        if ids is not None and ids[i] == ids[j]:
            continue
        total += max(0.0, margin - float(text[i] @ image[i]) + float(text[i] @ image[j]))
        total += max(0.0, margin - float(text[j] @ image[j]) + float(text[j] @ image[i]))
        count += 2
    return total, count


def naive_info_nce(text, image, scale, ids=None):
    total = 0.0
    for a, b in ((text, image), (image, text)):
        for i in range(len(a)):
            others = [j for j in range(len(b)) if j == i or ids is None or ids[j] != ids[i]]
            total -= scale * float(a[i] @ b[i]) - math.log(sum(math.exp(scale * float(a[i] @ b[j])) for j in others))
    return total / (2 * len(text))


def test_paired_hinge_by_hand():
    # captions along x and y; the pictures are their own captions turned, so that every cosine can be read off
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    image = torch.tensor([[0.6, 0.8], [0.8, 0.6]])
    # row 0: 0.5 - 0.6 + 0.8 = 0.7; row 1: 0.5 - 0.6 + 0.8 = 0.7
    assert paired_hinge_loss(text, image, margin=0.5, reduction="sum").item() == pytest.approx(1.4)
    assert paired_hinge_loss(text, image, margin=0.5, reduction="mean").item() == pytest.approx(0.7)
    # a right picture that is better by more than the margin costs nothing
    assert paired_hinge_loss(text, text, margin=0.5).item() == 0.0


def test_info_nce_by_hand():
    eye = torch.eye(2)
    # every softmax is over (s, 0): loss = log(1 + exp(-s))
    assert info_nce_loss(eye, eye, logit_scale=3.0).item() == pytest.approx(math.log(1 + math.exp(-3.0)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ids", [None, [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 2, 0, 1, 3, 4], [7, 7, 7, 7, 7, 7, 1, 7]])
def test_against_naive_loops(seed, ids):
    text, image = unit(8, seed=seed), unit(8, seed=seed + 100)
    given = None if ids is None else torch.tensor(ids)
    total, count = naive_paired_hinge(text, image, 0.5, ids)
    assert paired_hinge_loss(text, image, given, 0.5, "sum").item() == pytest.approx(total, abs=1e-12)
    assert paired_hinge_loss(text, image, given, 0.5, "mean").item() == pytest.approx(total / max(1, count), abs=1e-12)
    expected = naive_info_nce(text, image, 4.0, ids)
    assert info_nce_loss(text, image, given, 4.0).item() == pytest.approx(expected, abs=1e-12)


def test_gradients_are_those_of_finite_differences():
    text, image = unit(4, 3).requires_grad_(), unit(4, 3, seed=9).requires_grad_()
    ids = torch.tensor([0, 1, 1, 2])
    assert torch.autograd.gradcheck(lambda t, v: paired_hinge_loss(t, v, ids, 0.5, "sum"), (text, image))
    assert torch.autograd.gradcheck(lambda t, v: info_nce_loss(t, v, ids, 4.0), (text, image))


def test_odd_batch_is_refused_with_its_size():
    with pytest.raises(ValueError, match="even batch, this one has 3"):
        paired_hinge_loss(unit(3), unit(3))


def test_same_picture_marks_other_rows_of_the_picture_only():
    assert same_picture(torch.tensor([4, 5, 4])).tolist() == [
        [False, False, True],
        [False, False, False],
        [True, False, False],
    ]


def test_masking_means_no_gradient_between_captions_of_one_picture():
    text, image = unit(4).requires_grad_(), unit(4, seed=1).requires_grad_()
    info_nce_loss(text[:2], image[:2], torch.tensor([3, 3])).backward()
    assert text.grad.abs().max() == 0  # with the only other row masked, each softmax is over one picture
