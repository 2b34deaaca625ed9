"""The bias against hubs: a mean of the nearest captions, whatever the blocks; and the same after saving."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from imagedex.modeling import caption_bank
from imagedex.modeling.caption_bank import CaptionBank

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**20))


def unit(count, width, generator):
    return F.normalize(torch.randn(count, width, generator=generator), dim=1)


@given(SHAPES, st.integers(1, 15), st.integers(1, 40))
def test_bias(monkeypatch, tmp_path_factory, shape, neighbours, block):
    captions, pictures, width, seed = shape
    generator = torch.Generator().manual_seed(seed)
    texts, images = unit(captions, width, generator), unit(pictures, width, generator)
    bank = CaptionBank(texts, neighbours)
    expected = []
    for image in images.tolist():
        cosines = []
        for text in texts.half().tolist():
            length = sum(x * x for x in text) ** 0.5
            cosines.append(sum(a * b for a, b in zip(image, text, strict=True)) / length)
        nearest = sorted(cosines, reverse=True)[:neighbours]
        expected.append(sum(nearest) / len(nearest) / 2)
    found = bank.bias(images)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    with monkeypatch.context() as patch:
        patch.setattr(caption_bank, "_BLOCK", block)
        assert bank.bias(images).tolist() == pytest.approx(found.tolist(), abs=1e-7)
    twice = bank.bias(torch.cat([images, images.flip(0)]))
    assert torch.equal(twice[:pictures], twice[pictures:].flip(0))  # equal pictures, equal biases
    folder = tmp_path_factory.mktemp("bank")
    bank.save_pretrained(folder)
    kept = CaptionBank.from_pretrained(folder)
    assert kept.fingerprint == bank.fingerprint and torch.equal(kept.bias(images), found)
