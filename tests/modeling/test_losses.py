"""Losses against hand arithmetic and naive loops."""

import math

import pytest
import torch
from torch.nn import functional as F

from imagedex.modeling.losses import (
    hardest_hinge_loss,
    hinge_loss,
    info_nce_loss,
    paired_hinge_loss,
    same_picture,
    sigmoid_loss,
)

IDS = [None, [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 2, 0, 1, 3, 4], [7, 7, 7, 7, 7, 7, 1, 7], [5] * 8]


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


def naive_hinges(text, image, margin, ids=None):
    """For each row that asks, in each direction, the list of its hinge terms: 2 B lists."""
    asked = []
    for a, b in ((text, image), (image, text)):
        for i in range(len(a)):
            others = [j for j in range(len(b)) if j != i and (ids is None or ids[j] != ids[i])]
            asked.append([max(0.0, margin - float(a[i] @ b[i]) + float(a[i] @ b[j])) for j in others])
    return asked


def naive_hinge(text, image, margin, reduction, ids=None):
    terms = [term for own in naive_hinges(text, image, margin, ids) for term in own]
    return sum(terms) if reduction == "sum" else sum(terms) / max(1, len(terms))


def naive_hardest(text, image, margin, reduction, ids=None):
    terms = [max(own) for own in naive_hinges(text, image, margin, ids) if own]
    return sum(terms) if reduction == "sum" else sum(terms) / max(1, len(terms))


def naive_sigmoid(text, image, scale, bias, ids=None):
    total = 0.0
    for i in range(len(text)):
        for j in range(len(image)):
            if i != j and ids is not None and ids[i] == ids[j]:
                continue
            logit = scale * float(text[i] @ image[j]) + bias
            probability = 1 / (1 + math.exp(-logit))
            total -= math.log(probability if i == j else 1 - probability)
    return total / len(text)


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


def three_rows():
    """Cosines, caption x picture: [[1, .6, 0], [0, .8, 1], [.6, 1, .8]]; every right pair but the first has a better rival."""
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    return text, torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])


def test_hinge_by_hand():
    text, image = three_rows()
    # captions ask, margin 0.2: row 0: 0; row 1: 0 and .2 - .8 + 1 = .4; row 2: .2 - .8 + .6 = 0 and .2 - .8 + 1 = .4
    # pictures ask (columns): column 0: 0; column 1: .2 - .8 + .6 = 0 and .2 - .8 + 1 = .4; column 2: 0 and .4
    assert hinge_loss(text, image, margin=0.2, reduction="sum").item() == pytest.approx(1.6)
    assert hinge_loss(text, image, margin=0.2, reduction="mean").item() == pytest.approx(1.6 / 12)
    # rows 1 and 2 show one picture: what is left, 4 pairs of different pictures in each direction, costs nothing
    assert hinge_loss(text, image, torch.tensor([0, 1, 1]), 0.2, "sum").item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("hardness", "expected"), [(0.0, 2.8), (0.5, 2.6), (1.0, 2.4)])
def test_hardest_hinge_by_hand(hardness, expected):
    text, image = three_rows()
    # margin 0.4, captions ask: row 0: (0, 0); row 1: (0, .6); row 2: (.2, .6); pictures ask: (0, 0), (.2, .6), (0, .6)
    # all terms: .6 + .8 + .8 + .6 = 2.8; the hardest of each row: .6 + .6 + .6 + .6 = 2.4
    found = hardest_hinge_loss(text, image, margin=0.4, reduction="sum", hardness=hardness)
    assert found.item() == pytest.approx(expected)
    mean = hardest_hinge_loss(text, image, margin=0.4, reduction="mean", hardness=hardness)
    assert mean.item() == pytest.approx(hardness * 2.4 / 6 + (1 - hardness) * 2.8 / 12)


def test_sigmoid_by_hand():
    eye = torch.eye(2)
    # right pairs: logit 3 - 1 = 2; wrong pairs: logit -1, asked for "no"; a sum over pairs, divided by the batch
    expected = math.log(1 + math.exp(-2.0)) + math.log(1 + math.exp(-1.0))
    assert sigmoid_loss(eye, eye, logit_scale=3.0, logit_bias=-1.0).item() == pytest.approx(expected)
    masked = sigmoid_loss(eye, eye, torch.tensor([5, 5]), logit_scale=3.0, logit_bias=-1.0)
    assert masked.item() == pytest.approx(math.log(1 + math.exp(-2.0)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ids", IDS)
def test_against_naive_loops(seed, ids):
    text, image = unit(8, seed=seed), unit(8, seed=seed + 100)
    given = None if ids is None else torch.tensor(ids)
    total, count = naive_paired_hinge(text, image, 0.5, ids)
    assert paired_hinge_loss(text, image, given, 0.5, "sum").item() == pytest.approx(total, abs=1e-12)
    assert paired_hinge_loss(text, image, given, 0.5, "mean").item() == pytest.approx(total / max(1, count), abs=1e-12)
    expected = naive_info_nce(text, image, 4.0, ids)
    assert info_nce_loss(text, image, given, 4.0).item() == pytest.approx(expected, abs=1e-12)
    expected = naive_sigmoid(text, image, 4.0, -2.0, ids)
    assert sigmoid_loss(text, image, given, 4.0, -2.0).item() == pytest.approx(expected, abs=1e-12)
    for reduction in ("sum", "mean"):
        easy = naive_hinge(text, image, 0.3, reduction, ids)
        assert hinge_loss(text, image, given, 0.3, reduction).item() == pytest.approx(easy, abs=1e-12)
        hard = naive_hardest(text, image, 0.3, reduction, ids)
        for hardness in (0.0, 0.5, 1.0):
            found = hardest_hinge_loss(text, image, given, 0.3, reduction, hardness).item()
            assert found == pytest.approx(hardness * hard + (1 - hardness) * easy, abs=1e-12)


def test_gradients_are_those_of_finite_differences():
    text, image = unit(4, 3).requires_grad_(), unit(4, 3, seed=9).requires_grad_()
    ids = torch.tensor([0, 1, 1, 2])
    assert torch.autograd.gradcheck(lambda t, v: paired_hinge_loss(t, v, ids, 0.5, "sum"), (text, image))
    for reduction in ("sum", "mean"):
        assert torch.autograd.gradcheck(lambda t, v, r=reduction: hinge_loss(t, v, ids, 0.5, r), (text, image))
        for hardness in (0.0, 0.5, 1.0):
            options = (ids, 0.5, reduction, hardness)
            assert torch.autograd.gradcheck(lambda t, v, o=options: hardest_hinge_loss(t, v, *o), (text, image))
    scale, bias = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (4.0, -2.0))
    assert torch.autograd.gradcheck(lambda t, v, s: info_nce_loss(t, v, ids, s), (text, image, scale))
    assert torch.autograd.gradcheck(lambda t, v, s, b: sigmoid_loss(t, v, ids, s, b), (text, image, scale, bias))


def test_learned_scalars_of_one_element_leave_the_loss_a_scalar():
    text, image, scale = unit(4), unit(4, seed=1), torch.tensor([4.0], dtype=torch.float64)
    assert info_nce_loss(text, image, None, scale).shape == sigmoid_loss(text, image, None, scale, -scale).shape == ()


@pytest.mark.parametrize("loss", [hinge_loss, hardest_hinge_loss, info_nce_loss, sigmoid_loss])
def test_the_order_of_rows_does_not_matter(loss):
    text, image, ids = unit(8), unit(8, seed=1), torch.tensor([0, 1, 2, 2, 0, 1, 3, 4])
    order = torch.tensor([3, 1, 4, 0, 5, 7, 2, 6])
    torch.testing.assert_close(loss(text[order], image[order], ids[order]), loss(text, image, ids))


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
