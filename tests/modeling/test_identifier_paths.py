"""The way through the trie: log-probabilities by a model whose logits are written by hand, choices by counting prefixes."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from imagedex.gallery.identified import IdentifierModel
from imagedex.modeling import GENERATIVE
from imagedex.modeling.constrained_decoding import identifier_steps, score_identifiers
from imagedex.modeling.identifier_paths import Step, identifier_paths
from imagedex.modeling.identifiers import Identifiers
from imagedex.retrieval.generative import GenerativeRetriever

EOS = 1


class ByHand(torch.nn.Module):
    """Gives token v the probability (v + 1) / 15 of a vocabulary of five, whatever came before."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=5, decoder_start_token_id=0, pad_token_id=0)
        self.generation_config = SimpleNamespace()

    def encode(self, input_ids):
        states = torch.zeros(len(input_ids), 1, 2)
        return SimpleNamespace(last_hidden_state=states), None

    def forward(self, encoder_outputs, attention_mask, decoder_input_ids, use_cache):
        logits = torch.arange(1.0, 6.0).log() + 7  # log-probabilities and what does not count
        return SimpleNamespace(logits=logits.expand(*decoder_input_ids.shape, 5))


class Letters:
    def convert_ids_to_tokens(self, tokens):
        return ["." if token == EOS else "?·abc"[token] for token in tokens]


def test_by_hand():
    identifiers = Identifiers.from_sequences("naive", ["x", "y", "z"], [[2, 3], [2, 4], [2]], EOS)
    a, b, c, end = (math.log(number / 15) for number in (3, 4, 5, 2))
    expected = {
        "x": [("a", a, 1), ("b", b, 3), (".", end, 1)],  # after a: b, c or the end
        "z": [("a", a, 1), (".", end, 3)],
        "y": [("a", a, 1), ("c", c, 3), (".", end, 1)],
    }
    found = identifier_paths(ByHand(), identifiers, {"input_ids": torch.zeros(1, 4)}, list(expected), Letters())
    for path, steps in zip(found, expected.values(), strict=True):
        assert [(step.token, step.choices) for step in path] == [(token, choices) for token, _, choices in steps]
        assert [step.log_prob for step in path] == pytest.approx([cost for _, cost, _ in steps], abs=1e-6)
    assert identifier_paths(ByHand(), identifiers, {"input_ids": torch.zeros(1, 4)}, [], Letters()) == []
    with pytest.raises(KeyError, match="no identifier"):
        identifier_paths(ByHand(), identifiers, {"input_ids": torch.zeros(1, 4)}, ["w"], Letters())


def test_choices_against_a_count_of_prefixes():
    rng = np.random.default_rng(0)
    sequences = list({tuple(rng.integers(2, 6, rng.integers(1, 6)).tolist()) for _ in range(200)})
    identifiers = Identifiers.from_sequences("naive", [str(n) for n in range(len(sequences))], sequences, EOS)
    labels = torch.from_numpy(identifiers.padded())
    ended = [(*sequence, EOS) for sequence in sequences]
    for own, counts in zip(ended, identifiers.trie.choices(labels).tolist(), strict=True):
        expected = [len({other[place] for other in ended if other[:place] == own[:place] and len(other) > place})
                    for place in range(len(own))]  # fmt: skip
        assert counts == expected + [0] * (len(counts) - len(own))
    nowhere = torch.tensor([[9, 2, EOS]])
    assert identifiers.trie.choices(nowhere)[0, 1:].tolist() == [0, 0]


@pytest.mark.parametrize("model_type", ["codebook_t5", "vision_grounded_t5"])
def test_a_model_s_own_paths_sum_to_the_scores_it_answers_with(save_generative, tmp_path, model_type):
    names = [f"{number}.jpg" for number in range(12)]
    folder = save_generative(tmp_path / "model", model_type, "naive", names)
    model = GENERATIVE[model_type].from_pretrained(folder).eval()
    found = model.retrieve("a red dog", num_beams=12)[0]
    paths = model.paths("a red dog", [image_id for image_id, _ in found])
    assert [sum(step.log_prob for step in path) for path in paths] == pytest.approx([s for _, s in found], abs=1e-4)
    assert all(isinstance(step, Step) and step.log_prob < 0 and step.choices >= 1 for path in paths for step in path)
    assert {path[0].choices for path in paths} == {len({model.identifiers.sequence(name)[0] for name in names})}


def test_the_paths_of_a_plain_t5_and_of_several_queries(save_generative, tmp_path):
    names = [f"{number}.jpg" for number in range(9)]
    asked = IdentifierModel(str(save_generative(tmp_path / "model", "t5", "naive", names)), "cpu", False, None)
    parts = asked.parts
    ranking = GenerativeRetriever("t5", parts, num_beams=9).candidates(["the left side is blue"])[0]
    paths = asked.paths("the left side is blue", ranking.images)
    assert [sum(step.log_prob for step in path) for path in paths] == pytest.approx(ranking.scores, abs=1e-4)

    inputs = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 5]]), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    steps, labels, _ = identifier_steps(parts.model, parts.identifiers, inputs, batch_size=4)
    assert steps.shape == (2, *labels.shape) and (steps[:, labels < 0] == 0).all()
    assert torch.allclose(steps.sum(2), score_identifiers(parts.model, parts.identifiers, inputs), atol=1e-5)
