"""Rows predicted from vectors, against ridge regression of scikit-learn and leaving out by hand."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from imagedex.identifiers import picture_rows
from imagedex.identifiers.picture_rows import predicted_rows


def made(count=40, noise=0.0, seed=0):
    draw = np.random.default_rng(seed)
    vectors, weights = draw.normal(size=(count, 6)), draw.normal(size=(6, 5))
    return vectors, vectors @ weights + 3.0 + noise * draw.normal(size=(count, 5))


def cosines(one, other):
    one, other = np.asarray(one), np.asarray(other)
    return (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


def test_what_is_linear_is_found():
    vectors, rows = made()
    found, agreement = predicted_rows(vectors[:30], rows[:30], vectors[30:])
    found = found.numpy()
    centre = rows[:30].mean(0)
    assert cosines(found - centre, rows[30:] - centre).min() > 0.999 and agreement > 0.999
    usual = 0.9 * np.linalg.norm(rows[:30] - centre, axis=1).mean()
    np.testing.assert_allclose(np.linalg.norm(found - centre, axis=1), usual, rtol=1e-5)


def test_directions_and_agreement_are_those_of_ridge_regression(monkeypatch):
    vectors, rows = made(noise=3.0)
    monkeypatch.setattr(picture_rows, "RIDGES", (0.5,))
    found, agreement = predicted_rows(vectors[:30], rows[:30], vectors[30:])
    known, targets = vectors[:30], rows[:30]

    def ridge(inputs, outputs, asked):
        spread = (inputs - inputs.mean(0)).astype(float)
        model = Ridge(alpha=0.5 * np.square(spread).sum() / len(known)).fit(inputs, outputs)
        return model.predict(asked)

    centre = targets.mean(0)
    expected = ridge(known, targets, vectors[30:]) - centre
    np.testing.assert_allclose(cosines(found.numpy() - centre, expected), 1, rtol=1e-6)
    left_out = []
    for row in range(30):
        rest = [other for other in range(30) if other != row]
        # the same penalty, whoever is left out
        spread = np.square(known - known.mean(0)).sum() / len(known)
        model = Ridge(alpha=0.5 * spread).fit(known[rest], targets[rest])
        left_out.append(model.predict(known[row : row + 1])[0] - centre)
    np.testing.assert_allclose(agreement, cosines(left_out, targets - centre).mean(), rtol=1e-6)


def test_vectors_that_say_nothing_are_told():
    vectors, rows = made()
    draw = np.random.default_rng(1)
    _, agreement = predicted_rows(draw.normal(size=(40, 6)), rows, vectors)
    assert abs(agreement) < 0.3


def test_too_few_are_refused():
    vectors, rows = made(5)
    with pytest.raises(ValueError, match="5 pictures with a known row are too few"):
        predicted_rows(vectors, rows, vectors)


def test_more_dimensions_than_pictures():
    draw = torch.Generator().manual_seed(0)
    vectors, rows = torch.randn(12, 50, generator=draw), torch.randn(12, 4, generator=draw)
    found, _ = predicted_rows(vectors, rows, vectors[:2])
    assert found.shape == (2, 4) and found.isfinite().all()
