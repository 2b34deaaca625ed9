"""Constrained decoding with a tiny random T5: only identifiers come out, and the ranking is that of their exact scores."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, T5Config, T5ForConditionalGeneration

from imagedex.modeling.constrained_decoding import IdentifierConstraint, rank_identifiers, score_identifiers
from imagedex.modeling.identifiers import Identifiers

EOS, VOCABULARY, COUNT = 1, 40, 45


@pytest.fixture(scope="module")
def model():
    config = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.1}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **config))
    with torch.no_grad():  # far from uniform, so that beams differ
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model.eval()


@pytest.fixture(scope="module")
def identifiers():
    """Different lengths, shared prefixes, some a prefix of another."""
    rng = np.random.default_rng(0)
    found = {tuple(rng.integers(2, 14, rng.integers(1, 5)).tolist()): None for _ in range(300)}
    return Identifiers.from_sequences("naive", [f"{n}.jpg" for n in range(COUNT)], list(found)[:COUNT], EOS)


@pytest.fixture(scope="module")
def inputs():
    """Five queries, two of them padded."""
    torch.manual_seed(1)
    batch = {"input_ids": torch.randint(2, VOCABULARY, (5, 7)), "attention_mask": torch.ones(5, 7, dtype=torch.int64)}
    batch["attention_mask"][1, 3:] = 0
    batch["attention_mask"][4, 6:] = 0
    return batch


def token_by_token(model, identifiers, inputs):
    """The score as it is defined, spelled out: one query, one identifier, one token at a time."""
    scores = torch.zeros(len(inputs["input_ids"]), len(identifiers), dtype=torch.float64)
    for query in range(len(scores)):
        own = {name: tensor[query : query + 1] for name, tensor in inputs.items()}
        for row, image_id in enumerate(identifiers.image_ids):
            written = [0]
            for token in [*identifiers.sequence(image_id), EOS]:
                with torch.no_grad():
                    logits = model(**own, decoder_input_ids=torch.tensor([written])).logits[0, -1].double()
                scores[query, row] += logits.log_softmax(-1)[token]
                written.append(token)
    return scores.float()


def test_exact_scores_are_those_of_a_loop_over_tokens(model, identifiers, inputs):
    few = {name: tensor[:2] for name, tensor in inputs.items()}
    expected = token_by_token(model, identifiers, few)
    scores = score_identifiers(model, identifiers, few)
    assert scores.shape == (2, COUNT) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(score_identifiers(model, identifiers, few, batch_size=7), expected, atol=1e-4, rtol=0)
    rows = [30, 2, 2]
    torch.testing.assert_close(
        score_identifiers(model, identifiers, few, rows=rows), expected[:, rows], atol=1e-4, rtol=0
    )


def test_a_model_s_own_encode_is_used_when_it_has_one(model, identifiers, inputs, monkeypatch):
    expected = score_identifiers(model, identifiers, inputs)
    doubled = {name: tensor[[0, 0, 1, 2]] for name, tensor in inputs.items()}

    def encode(other_ids):  # another name, as a picture's would be
        return model.get_encoder()(**doubled), doubled["attention_mask"]

    monkeypatch.setattr(model, "encode", encode, raising=False)
    found = score_identifiers(model, identifiers, {"other_ids": None})
    torch.testing.assert_close(found, expected[[0, 0, 1, 2]], atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_beams", [COUNT, COUNT + 30])
def test_with_enough_beams_the_ranking_is_the_exhaustive_one(model, identifiers, inputs, num_beams):
    scores, rows = rank_identifiers(model, identifiers, inputs, num_beams=num_beams)
    exact, order = score_identifiers(model, identifiers, inputs).sort(dim=1, descending=True)
    assert scores.shape == rows.shape == (5, num_beams)
    assert (exact[:, :-1] - exact[:, 1:]).min() > 1e-5  # no ties that could stand in either order
    assert torch.equal(rows[:, :COUNT], order)
    torch.testing.assert_close(scores[:, :COUNT], exact, atol=1e-4, rtol=0)
    assert (scores[:, COUNT:] == -torch.inf).all() and (rows[:, COUNT:] == -1).all()


@pytest.mark.parametrize("num_beams", [1, 2, 7, 20])
def test_with_fewer_beams_what_is_found_exists_differs_and_has_its_exact_score(model, identifiers, inputs, num_beams):
    scores, rows = rank_identifiers(model, identifiers, inputs, num_beams)
    exact = score_identifiers(model, identifiers, inputs)
    assert scores.shape == rows.shape == (5, num_beams) and scores.dtype == torch.float32 and rows.dtype == torch.int64
    assert rows.min() >= 0  # as many as beams, because there are enough identifiers
    assert all(len(set(own)) == num_beams for own in rows.tolist())
    torch.testing.assert_close(scores, exact.gather(1, rows), atol=1e-4, rtol=0)
    assert (scores.diff(dim=1) <= 0).all()


def test_k_cuts_or_fills_up(model, identifiers, inputs):
    scores, rows = rank_identifiers(model, identifiers, inputs, num_beams=8)
    fewer_scores, fewer_rows = rank_identifiers(model, identifiers, inputs, num_beams=8, k=3)
    assert torch.equal(fewer_rows, rows[:, :3])
    torch.testing.assert_close(fewer_scores, scores[:, :3])
    more_scores, more_rows = rank_identifiers(model, identifiers, inputs, num_beams=8, k=10)
    assert torch.equal(more_rows[:, :8], rows) and (more_rows[:, 8:] == -1).all()
    assert more_scores.shape == (5, 10) and (more_scores[:, 8:] == -torch.inf).all()
    for arguments in ({"num_beams": 0}, {"num_beams": 3, "k": 0}):
        with pytest.raises(ValueError, match="must be 1 or more"):
            rank_identifiers(model, identifiers, inputs, **arguments)


def test_a_query_alone_is_ranked_as_in_a_batch(model, identifiers, inputs):
    scores, rows = rank_identifiers(model, identifiers, inputs, num_beams=6)
    for query in range(5):
        own = {name: tensor[query : query + 1] for name, tensor in inputs.items()}
        own_scores, own_rows = rank_identifiers(model, identifiers, own, num_beams=6)
        assert torch.equal(own_rows[0], rows[query])
        torch.testing.assert_close(own_scores[0], scores[query], atol=1e-4, rtol=0)


def test_shorter_rankings_where_fewer_identifiers_exist(model, inputs):
    for sequences in ([[5]], [[5], [5, 6]], [[5], [5, 6], [5, 6, 7, 8, 9, 10]]):
        few = Identifiers.from_sequences("naive", [str(n) for n in range(len(sequences))], sequences, EOS)
        scores, rows = rank_identifiers(model, few, inputs, num_beams=10)
        exact, order = score_identifiers(model, few, inputs).sort(dim=1, descending=True)
        assert torch.equal(rows[:, : len(few)], order) and (rows[:, len(few) :] == -1).all()
        torch.testing.assert_close(scores[:, : len(few)], exact, atol=1e-4, rtol=0)


def test_copies_and_unfinished_beams_that_generate_fills_up_with_are_dropped(model, identifiers, inputs, monkeypatch):
    first, second = (identifiers.sequence(name) for name in ("3.jpg", "4.jpg"))
    beams = [[0, *first, EOS], [0, *second, EOS], [0, *first, EOS], [0, *first[:1]]]
    width = max(map(len, beams))
    output = {
        "sequences": torch.tensor([beam + [EOS if beam[-1] == EOS else 0] * (width - len(beam)) for beam in beams]),
        "sequences_scores": torch.tensor([-3.0, -5.0, -1e9, -1e9 - 64]),
    }
    monkeypatch.setattr(model, "generate", lambda **kwargs: SimpleNamespace(**output))
    monkeypatch.setattr("imagedex.modeling.constrained_decoding.searchable", lambda *_: False)
    scores, rows = rank_identifiers(model, identifiers, inputs, num_beams=4)
    assert rows.tolist() == [[3, 4, -1, -1]] and scores.tolist() == [[-3.0, -5.0, -torch.inf, -torch.inf]]


def test_the_state_of_the_model_is_left_as_it_was(model, identifiers, inputs):
    expected = rank_identifiers(model, identifiers, inputs, num_beams=4)
    model.train()
    try:
        found = rank_identifiers(model, identifiers, inputs, num_beams=4)  # without dropout all the same
        assert model.training
        assert torch.equal(found[1], expected[1])
    finally:
        model.eval()
    rank_identifiers(model, identifiers, inputs, num_beams=4)
    assert not model.training


def test_generation_settings_of_the_model_do_not_reach_the_ranking(model, identifiers, inputs, monkeypatch):
    expected = rank_identifiers(model, identifiers, inputs, num_beams=6)
    for name, value in (("repetition_penalty", 3.0), ("no_repeat_ngram_size", 1), ("max_length", 3), ("num_beams", 2)):
        monkeypatch.setattr(model.generation_config, name, value)
    found = rank_identifiers(model, identifiers, inputs, num_beams=6)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0])


def generate(model, identifiers, inputs, **kwargs):
    constraint = LogitsProcessorList([IdentifierConstraint(identifiers.trie)])
    return model.generate(**inputs, logits_processor=constraint, max_new_tokens=identifiers.max_length, **kwargs)[
        :, 1:
    ].tolist()


def test_plain_generate_writes_identifiers_only(model, identifiers, inputs):
    free = model.generate(**inputs, num_beams=10, num_return_sequences=10, max_new_tokens=5)[:, 1:].tolist()
    assert not all(identifiers.image_id_of(tokens) for tokens in free)  # the constraint has something to do

    greedy = generate(model, identifiers, inputs, num_beams=1, do_sample=False)
    beams = generate(model, identifiers, inputs, num_beams=10, num_return_sequences=10, length_penalty=0.0)
    torch.manual_seed(0)
    sampled = generate(model, identifiers, inputs, do_sample=True, temperature=3.0, num_return_sequences=40)
    assert (len(greedy), len(beams), len(sampled)) == (5, 50, 200)
    for written in (greedy, beams, sampled):
        assert None not in [identifiers.image_id_of(tokens) for tokens in written]
    for query in range(5):
        own = [identifiers.image_id_of(tokens) for tokens in beams[10 * query : 10 * query + 10]]
        assert len(set(own)) == 10
    assert len({identifiers.image_id_of(tokens) for tokens in sampled}) > 10


def test_the_constraint_against_a_dictionary_on_a_batch_of_beams(identifiers):
    whole = [[*identifiers.sequence(name), EOS] for name in identifiers.image_ids]
    generator = torch.Generator().manual_seed(0)
    for length in range(5):
        prefixes = [tokens[:length] for tokens in whole if len(tokens) >= length]
        prefixes += [(tokens + [0] * length)[:length] for tokens in whole if len(tokens) < length]  # ended, then padded
        prefixes += torch.randint(0, 14, (30, length), generator=generator).tolist()
        scores = torch.randn(len(prefixes), VOCABULARY, generator=generator)
        found = IdentifierConstraint(identifiers.trie)(torch.tensor([[0, *prefix] for prefix in prefixes]), scores)
        for prefix, before, after in zip(prefixes, scores, found, strict=True):
            ended = any(prefix[: len(tokens)] == tokens for tokens in whole)
            following = {tokens[length] for tokens in whole if tokens[:length] == prefix and len(tokens) > length}
            allowed = {0} if ended else following
            for token in range(VOCABULARY):
                assert after[token] == (before[token] if token in allowed else -torch.inf)


def test_at_the_first_step_the_root_s_children_are_asked_for_once(identifiers, monkeypatch):
    asked, children = [], identifiers.trie.children
    monkeypatch.setattr(identifiers.trie, "children", lambda nodes: asked.append(nodes.tolist()) or children(nodes))
    scores = torch.randn(20, VOCABULARY)
    found = IdentifierConstraint(identifiers.trie)(torch.zeros(20, 1, dtype=torch.int64), scores)
    assert asked == [[0]]
    first = {identifiers.sequence(name)[0] for name in identifiers.image_ids}
    for beam in range(20):
        for token in range(VOCABULARY):
            assert found[beam, token] == (scores[beam, token] if token in first else -torch.inf)


def test_prompt_length_and_padding_token(identifiers):
    first = identifiers.sequence("0.jpg")
    constraint = IdentifierConstraint(identifiers.trie, prompt_length=3, pad_token_id=39)
    scores = torch.zeros(2, VOCABULARY)
    found = constraint(torch.tensor([[30, 31, 32, *first, EOS, 39], [30, 31, 32, *first, EOS, EOS]]), scores)
    assert found.isfinite().nonzero().tolist() == [[0, 39], [1, 39]]
    assert torch.equal(scores, torch.zeros(2, VOCABULARY))  # the scores that came in are left alone


def test_a_model_without_the_new_tokens_is_told(model, inputs):
    wide = Identifiers.from_sequences("atomic", ["a", "b"], [[5], [VOCABULARY]], EOS)
    message = f"use token {VOCABULARY}, but the model has only {VOCABULARY} tokens; resize"
    with pytest.raises(ValueError, match=message):
        rank_identifiers(model, wide, inputs, num_beams=2)
    with pytest.raises(ValueError, match=message):
        score_identifiers(model, wide, inputs)


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu(model, identifiers, inputs):
    expected = rank_identifiers(model, identifiers, inputs, num_beams=8)
    try:
        moved = {name: tensor.cuda() for name, tensor in inputs.items()}
        scores, rows = rank_identifiers(model.cuda(), identifiers, moved, num_beams=8)
        exact = score_identifiers(model, identifiers, moved)
    finally:
        model.cpu()
    assert torch.equal(rows.cpu(), expected[1])
    torch.testing.assert_close(scores.cpu(), expected[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(exact.cpu().gather(1, expected[1]), expected[0], atol=1e-3, rtol=0)
