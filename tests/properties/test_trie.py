"""The trie and what may be decoded, against a plain set of sequences."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import T5Config, T5ForConditionalGeneration

from imagedex.modeling.constrained_decoding import IdentifierConstraint, rank_identifiers, score_identifiers
from imagedex.modeling.identifier_trie import IdentifierTrie
from imagedex.modeling.identifiers import Identifiers

EOS, VOCABULARY = 1, 9
TOKENS = st.integers(2, VOCABULARY - 1)
SETS = st.lists(st.lists(TOKENS, min_size=1, max_size=4).map(tuple), min_size=1, max_size=25, unique=True)
PREFIXES = st.lists(st.integers(0, VOCABULARY + 1), max_size=6)


def built(sequences):
    tokens = [token for sequence in sequences for token in sequence]
    return IdentifierTrie.from_sequences(tokens, np.cumsum([0, *map(len, sequences)]), EOS)


def following(sequences, prefix):
    """The tokens that go on from this prefix in the plain set; end-of-sequence is one of them."""
    ended = [(*sequence, EOS) for sequence in sequences]
    prefix = tuple(prefix)
    return {one[len(prefix)] for one in ended if one[: len(prefix)] == prefix and len(one) > len(prefix)}


@given(SETS, st.lists(PREFIXES, min_size=1, max_size=8))
def test_the_trie_is_the_set(sequences, prefixes):
    trie = built(sequences)
    begun = {(*sequence, EOS)[:length] for sequence in sequences for length in range(len(sequence) + 2)}
    assert len(trie) == len(begun)  # a node a prefix
    for row, sequence in enumerate(sequences):
        node = trie.walk(torch.tensor([[*sequence, EOS]]))
        assert trie.rows_of(node).tolist() == [row] and trie.is_end(node).all()
    for prefix in prefixes + [list(sequence) for sequence in sequences]:
        node = trie.walk(torch.tensor([prefix], dtype=torch.int64).view(1, -1))
        assert (node.item() >= 0) == (tuple(prefix) in begun)
        _, tokens = trie.children(node)
        assert tokens.tolist() == sorted(following(sequences, prefix))


@given(SETS, st.data())
def test_a_sequence_that_is_there_twice_is_refused(sequences, data):
    copied = data.draw(st.sampled_from(sequences))
    place = data.draw(st.integers(0, len(sequences)))
    with pytest.raises(ValueError, match="same identifier"):
        built([*sequences[:place], copied, *sequences[place:]])


@given(SETS, st.data())
def test_what_a_beam_may_write_next(sequences, data):
    """Of several beams of one length: scores stay where the set goes on, and are -inf elsewhere; after an end comes padding."""
    ended = [(*sequence, EOS) for sequence in sequences]
    length = data.draw(st.integers(0, 5))
    rows = [
        data.draw(st.one_of(st.sampled_from(ended), st.lists(TOKENS, min_size=length, max_size=length).map(tuple)))
        for _ in range(4)
    ]
    rows = [(row + (0,) * length)[:length] for row in rows]
    scores = torch.arange(4.0 * VOCABULARY).view(4, VOCABULARY)
    start = torch.zeros(4, 1, dtype=torch.int64)
    asked = torch.cat([start, torch.tensor(rows, dtype=torch.int64).view(4, length)], 1)
    found = IdentifierConstraint(built(sequences))(asked, scores.clone())
    for beam, row in enumerate(rows):
        whole = any(row[: len(one)] == one for one in ended)
        allowed = {0} if whole else following(sequences, row)
        for token in range(VOCABULARY):
            assert found[beam, token] == (scores[beam, token] if token in allowed else -torch.inf)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **config))
    with torch.no_grad():  # far from uniform, so that beams differ
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model.eval()


@settings(max_examples=12)
@given(sequences=SETS, beams=st.integers(1, 6), k=st.integers(1, 6), seed=st.integers(0, 100))
def test_beams_write_identifiers_with_their_true_scores(model, sequences, beams, k, seed):
    names = [f"{row}.jpg" for row in range(len(sequences))]
    identifiers = Identifiers.from_sequences("naive", names, sequences, EOS)
    inputs = {"input_ids": torch.randint(2, VOCABULARY, (3, 4), generator=torch.Generator().manual_seed(seed))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    exact = score_identifiers(model, identifiers, inputs)
    scores, rows = rank_identifiers(model, identifiers, inputs, beams, k)
    assert rows.shape == (3, k)
    for query in range(3):
        found = [row for row in rows[query].tolist() if row >= 0]
        assert len(set(found)) == len(found) and rows[query, : len(found)].tolist() == found
        assert found or beams == 0
        torch.testing.assert_close(scores[query, : len(found)], exact[query, found], atol=1e-4, rtol=1e-4)
        assert scores[query, len(found) :].eq(-torch.inf).all()
    everything, order = rank_identifiers(model, identifiers, inputs, len(sequences))
    torch.testing.assert_close(everything, exact.sort(dim=1, descending=True).values, atol=1e-4, rtol=1e-4)
    assert order.sort(dim=1).values.tolist() == [list(range(len(sequences)))] * 3
