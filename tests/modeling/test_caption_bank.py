"""The bank against hubs: the bias of a plain loop, half of CSLS, kept and found beside the weights; it takes hubs down."""

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.nn import functional as F
from transformers import AutoModel

import imagedex.modeling  # noqa: F401  the Auto classes know the model
from imagedex.configuration.configuration_xmatching import XMatchingConfig
from imagedex.modeling import caption_bank
from imagedex.modeling.caption_bank import CONFIDENCES, FILE, CaptionBank
from imagedex.modeling.modeling_xmatching import XMatchingModel


def unit(rows, width, seed=0):
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("neighbours", [1, 5, 100])
def test_the_bias_is_that_of_a_plain_loop(neighbours, monkeypatch):
    monkeypatch.setattr(caption_bank, "_BLOCK", 90)  # several blocks
    bank, pictures = CaptionBank(unit(40, 6), neighbours), unit(23, 6, 1)
    kept = bank.vectors.double().numpy()
    kept /= np.linalg.norm(kept, axis=1, keepdims=True)
    for picture, found in zip(pictures.double().numpy(), bank.bias(pictures), strict=True):
        nearest = sorted((float(picture @ caption) for caption in kept), reverse=True)[:neighbours]
        assert found == pytest.approx(sum(nearest) / len(nearest) / 2, abs=1e-6)


def test_ranking_by_scores_is_ranking_by_csls():
    """CSLS = 2 cos - r(sentence) - r(picture): the sentence's term is the same for each of its pictures."""
    sentences, pictures, captions = unit(30, 8, 2), unit(50, 8, 3), unit(200, 8, 4).half().float()
    bank = CaptionBank(captions, 7)
    model = tiny()
    model.caption_bank = bank
    scores = model.search_scores(sentences, pictures)
    cosines = sentences @ pictures.T
    torch.testing.assert_close(scores, cosines - bank.bias(pictures))
    of_pictures = (pictures @ F.normalize(captions, dim=1).T).topk(7).values.mean(1)
    of_sentences = (sentences @ pictures.T).topk(7).values.mean(1)
    csls = 2 * cosines - of_sentences[:, None] - of_pictures
    torch.testing.assert_close(scores.argsort(1, descending=True), csls.argsort(1, descending=True))
    model.caption_bank = None
    assert torch.equal(model.search_scores(sentences, pictures), cosines)


def test_a_hub_goes_down_and_other_pictures_do_not_matter():
    captions = unit(300, 16, 5)
    hub = F.normalize(captions.mean(0, keepdim=True) + 0.05 * unit(1, 16, 6), dim=1)
    pictures = torch.cat([unit(40, 16, 7), hub])
    bank = CaptionBank(captions)
    bias = bank.bias(pictures)
    torch.testing.assert_close(bank.bias(pictures[[3, 40]]), bias[[3, 40]])
    near = F.normalize(captions[:1] + 0.3 * unit(1, 16, 8), dim=1)  # a picture that shows the first caption
    assert bank.bias(near) > bias.median()  # of its own captions a picture pays, too: all are measured alike


def test_confidences_are_whole_csls_and_the_cut_off_is_that_of_a_sorted_list(tmp_path):
    texts, pictures, bank = unit(99, 8, 2), unit(99, 8, 3), CaptionBank(unit(200, 8, 4), 7)
    with pytest.raises(ValueError, match="has no cut-off"):
        bank.cut_off(0.9)
    bank.calibrate(texts, pictures)
    captions = F.normalize(bank.vectors.float(), dim=1)
    near = [torch.sort(captions @ vector, descending=True).values[:7].mean() / 2 for vector in [*texts, *pictures]]
    by_hand = sorted(
        float(t @ p - near[row] - near[99 + row]) for row, (t, p) in enumerate(zip(texts, pictures, strict=True))
    )
    assert bank.right_confidences.tolist() == pytest.approx(by_hand, abs=1e-6)
    assert bank.cut_off(0.9) == pytest.approx(by_hand[9]) and bank.cut_off(0.5) == pytest.approx(by_hand[49])
    assert bank.cut_off(0.999) == -torch.inf  # so few captions can promise no more
    bank.save_pretrained(tmp_path)
    assert CaptionBank.from_pretrained(tmp_path).right_confidences is None
    bank.save_confidences(tmp_path)
    again = CaptionBank.from_pretrained(tmp_path)
    assert torch.equal(again.right_confidences, bank.right_confidences) and again.fingerprint == bank.fingerprint
    content = (tmp_path / CONFIDENCES).read_bytes()
    (tmp_path / CONFIDENCES).write_bytes(content.replace(bank.right_confidences.numpy().tobytes(), b"\0" * 99 * 4))
    assert CaptionBank.from_pretrained(tmp_path).right_confidences is None  # damaged
    (tmp_path / CONFIDENCES).write_bytes(content)
    CaptionBank(unit(200, 8, 9), 7).save_pretrained(tmp_path)
    assert CaptionBank.from_pretrained(tmp_path).right_confidences is None  # of another bank
    for keep in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="no share between 0 and 1"):
            bank.cut_off(keep)


def test_the_promise_holds_for_captions_of_the_same_kind():
    """Over many draws: at least the promised share of right pictures, and not much more."""
    generator, kept = torch.Generator().manual_seed(0), []
    for _ in range(400):
        bank = CaptionBank(unit(3, 4))
        bank.right_confidences = torch.randn(50, generator=generator).sort().values
        kept.append((torch.randn(200, generator=generator) >= bank.cut_off(0.9)).float().mean())
    assert 0.9 <= torch.stack(kept).mean() + 0.005 <= 0.93


def tiny():
    torch.manual_seed(0)
    text = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
            "vocab_size": 20}  # fmt: skip
    vision = {"model_type": "convnext", "hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2}
    return XMatchingModel(XMatchingConfig(text_config=text, vision_config=vision, projection_dim=8))


def test_it_is_kept_and_found_beside_the_weights(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "without")
    assert not (tmp_path / "without" / FILE).exists()
    assert XMatchingModel.from_pretrained(tmp_path / "without").caption_bank is None
    model.caption_bank = CaptionBank(unit(9, 8), 3)
    model.save_pretrained(tmp_path / "with")
    for found in (
        XMatchingModel.from_pretrained(tmp_path / "with"),
        AutoModel.from_pretrained(tmp_path / "with"),
        XMatchingModel.from_pretrained(tmp_path / "with", output_loading_info=True)[0],
    ):
        assert torch.equal(found.caption_bank.vectors, model.caption_bank.vectors)
        assert found.caption_bank.neighbours == 3
        assert found.caption_bank.fingerprint == model.caption_bank.fingerprint
    assert CaptionBank(unit(9, 8), 4).fingerprint != model.caption_bank.fingerprint
    assert CaptionBank(unit(400, 8), 300).fingerprint
    model.caption_bank = None
    model.save_pretrained(tmp_path / "with")  # other weights: an old bank beside them would be taken for theirs
    assert not (tmp_path / "with" / FILE).exists()
    (tmp_path / "with" / FILE).write_bytes(b"broken")
    with pytest.raises(ValueError, match="is broken"):
        XMatchingModel.from_pretrained(tmp_path / "with")


def test_equal_pictures_have_equal_biases_in_whatever_block(monkeypatch):
    bank, picture = CaptionBank(unit(333, 48, 11)), unit(1, 48, 12)
    found = []
    for block in (333, 700, 5000, 40_000):
        monkeypatch.setattr(caption_bank, "_BLOCK", block)
        found.append(bank.bias(picture.repeat(37, 1)))
    assert all((biases == found[0][0]).all() for biases in found)


def test_what_makes_no_bias():
    for vectors, neighbours in ((torch.empty(0, 4), 5), (torch.ones(4), 5), (unit(3, 4), 0)):
        with pytest.raises(ValueError, match="makes no bias"):
            CaptionBank(vectors, neighbours)


def test_a_flipped_byte_of_a_kept_bank_is_found(tmp_path):
    CaptionBank(unit(9, 8), 3).save_pretrained(tmp_path)
    path = tmp_path / FILE
    content = path.read_bytes()
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match=FILE):
            CaptionBank.from_pretrained(tmp_path)


def test_banks_of_earlier_versions_are_read(tmp_path):
    vectors = unit(9, 8).half()
    safetensors.torch.save_file({"vectors": vectors}, tmp_path / FILE, {"neighbours": "3"})
    found = CaptionBank.from_pretrained(tmp_path)
    assert torch.equal(found.vectors, vectors) and found.neighbours == 3
