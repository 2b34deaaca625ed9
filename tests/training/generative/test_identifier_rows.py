"""Rows of identifiers beside pretrained words, against loops that do the same one sentence at a time."""

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from imagedex.identifiers.schemes import assign_identifiers
from imagedex.training.generative.starts import identifier_rows
from imagedex.training.generative.starts.identifier_rows import start_rows
from imagedex.training.tokenizer import train_tokenizer

SENTENCES = [
    ["a red dog", "the dog is red"],
    ["two cats asleep", "cats asleep on a red bed"],
    ["the sea", "a boat on the sea"],
    ["a boat", "two boats"],
]
NAMES = [f"{row}.jpg" for row in range(len(SENTENCES))]
SPARE = 3


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def parts(request):
    torch.manual_seed(0)
    tokenizer = train_tokenizer([text for own in SENTENCES for text in own], 100)
    config = T5Config(
        vocab_size=len(tokenizer) + SPARE, d_model=16, d_kv=8, num_heads=2, d_ff=16, num_layers=1,
        decoder_start_token_id=0, tie_word_embeddings=request.param, dropout_rate=0.5,
    )  # fmt: skip
    return T5ForConditionalGeneration(config), tokenizer


def tokens(tokenizer, sentences=SENTENCES):
    def row(text):
        return dict(tokenizer(text))

    return [[row(text) for text in own] for own in sentences]


def grown(model, tokenizer, scheme, **options):
    """Identifiers, with embeddings grown as a run grows them: the spare rows are taken first."""
    words = len(tokenizer)
    identifiers = assign_identifiers(scheme, NAMES, tokenizer, **options)
    if len(tokenizer) > model.shared.num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=True)
    return identifiers, words


def said(model, tokenizer, text, prefix):
    """(d_model,): the decoder's last state after the start token and `prefix`, of one sentence alone."""
    inputs = tokenizer(text, return_tensors="pt")
    ids = torch.tensor([[0, *prefix]])
    with torch.no_grad():
        output = model.eval()(**inputs, decoder_input_ids=ids, output_hidden_states=True)
    return output.decoder_hidden_states[-1][0, -1]


@torch.no_grad()
def expected_atomic(model, tokenizer):
    """Rows by hand: S^-1 (mean of an item - mean of all), without what is common to all; one direction a row."""
    states = [torch.stack([said(model, tokenizer, text, []) for text in own]) for own in SENTENCES]
    within = torch.zeros(16, 16)
    for own in states:
        for state in own:
            away = state - own.mean(0)
            within += torch.outer(away, away)
    within /= sum(map(len, states))
    metric = torch.linalg.inv(within + identifier_rows.SHRINKAGE * within.diagonal().mean() * torch.eye(16))
    middle = torch.stack([own.mean(0) for own in states]).mean(0)
    rows = torch.stack([metric @ (own.mean(0) - middle) for own in states])
    rows -= torch.outer(rows @ middle, middle) / middle.square().sum()
    return torch.nn.functional.normalize(rows, dim=1)


def test_atomic_rows_are_what_is_said_of_each_item(parts):
    model, tokenizer = parts
    identifiers, words = grown(model, tokenizer, "atomic")
    assert model.shared.num_embeddings == words + len(NAMES), "three fill spare rows, one is new"
    output = model.get_output_embeddings().weight
    old = output[:words].detach().clone()
    length = old.square().sum(1).mean().sqrt()
    directions = expected_atomic(model, tokenizer)
    start_rows(model, tokenizer, identifiers, tokens(tokenizer))
    torch.testing.assert_close(output[:words], old, msg="words stay as they are")
    torch.testing.assert_close(output[words:].detach(), length * directions, rtol=1e-3, atol=1e-4)
    if not model.config.tie_word_embeddings:
        inputs = model.shared.weight.detach()
        usual = inputs[:words].square().sum(1).mean().sqrt()
        torch.testing.assert_close(inputs[words:].norm(dim=1), usual.expand(len(NAMES)), rtol=1e-4, atol=0)
        means = torch.stack([
            torch.stack([inputs[tokenizer(text)["input_ids"]].mean(0) for text in own]).mean(0) for own in SENTENCES
        ])  # fmt: skip
        centred = torch.nn.functional.normalize(means - means.mean(0), dim=1)
        torch.testing.assert_close(inputs[words:] / usual, centred, rtol=1e-3, atol=1e-4)


def test_trained_sentences_find_their_items_before_the_first_step(parts):
    model, tokenizer = parts
    identifiers, words = grown(model, tokenizer, "atomic")
    sentences = [(text, row) for row, own in enumerate(SENTENCES) for text in own]

    def found():
        output = model.get_output_embeddings().weight
        scores = torch.stack([output[words:] @ said(model, tokenizer, text, []) for text, _ in sentences])
        spread = scores.std(1) / output[:words].std()
        return (scores.argmax(1) == torch.tensor([row for _, row in sentences])).float().mean(), spread.mean()

    start_rows(model, tokenizer, identifiers, tokens(tokenizer))
    share, spread = found()
    assert share == 1 and spread > 0.1


def test_codes_are_told_apart_at_every_place(parts):
    """rq: of a later place, what sets a code apart among the items with the same codes before it."""
    model, tokenizer = parts
    vectors = np.array([[0.0, 0.0], [0.0, 1.0], [9.0, 0.0], [9.0, 2.0]], dtype=np.float32)
    identifiers, words = grown(model, tokenizer, "rq", vectors=vectors, levels=2, codes=2)
    start_rows(model, tokenizer, identifiers, tokens(tokenizer))
    output = model.get_output_embeddings().weight.detach()
    length = output[:words].square().sum(1).mean().sqrt()
    new = sorted(identifiers.new_tokens.values())
    torch.testing.assert_close(output[new].norm(dim=1), length.expand(len(new)), rtol=1e-4, atol=0)
    first = {identifiers.sequence(name)[0] for name in NAMES}
    assert len(first) == 2
    for row, name in enumerate(NAMES):
        own = identifiers.sequence(name)[0]
        other = (first - {own}).pop()
        states = torch.stack([said(model, tokenizer, text, []) for text in SENTENCES[row]]).mean(0)
        assert states @ output[own] > states @ output[other]


def test_items_without_sentences_start_from_their_pictures(parts):
    """Three kinds of items, four of each; a picture that nobody described gets a row near those of its kind."""
    model, tokenizer = parts
    kinds = [["a red dog", "the dog is red"], ["two cats asleep", "cats on a bed"], ["the sea", "a boat on the sea"]]
    sentences = [kinds[row % 3] for row in range(12)] + [[]]
    looks = torch.nn.functional.one_hot(torch.arange(12) % 3, 3).float()
    looks += 0.05 * torch.randn(looks.shape, generator=torch.Generator().manual_seed(0))
    vectors = torch.cat([looks, torch.tensor([[0.0, 0.1, 1.0]])]).numpy()
    words = len(tokenizer)
    identifiers = assign_identifiers("atomic", [f"{row}.jpg" for row in range(13)], tokenizer)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=True)
    start_rows(model, tokenizer, identifiers, tokens(tokenizer, sentences), lambda: vectors)
    rows = torch.nn.functional.normalize(model.get_output_embeddings().weight[words:].detach(), dim=1)
    cosines = rows[:12] @ rows[12]
    assert cosines[2::3].min() > cosines[0::3].max() and cosines[2::3].min() > cosines[1::3].max()


def test_without_sentences_rows_are_drawn_at_the_words_scale(parts):
    model, tokenizer = parts
    identifiers, words = grown(model, tokenizer, "atomic")
    start_rows(model, tokenizer, identifiers, [[] for _ in NAMES], seed=1)
    output = model.get_output_embeddings().weight.detach()
    length = output[:words].square().sum(1).mean().sqrt()
    torch.testing.assert_close(output[words:].norm(dim=1), length.expand(len(NAMES)))
    assert (torch.nn.functional.normalize(output[words:], dim=1).cov().diagonal() > 0).all()
    cosines = torch.nn.functional.normalize(output[words:], dim=1)
    assert (cosines @ cosines.T - torch.eye(len(NAMES))).abs().max() < 0.9


def test_digits_are_words_already(parts):
    """naive identifiers of digits that the tokenizer has add nothing, and nothing changes."""
    model, tokenizer = parts
    before = {name: value.clone() for name, value in model.state_dict().items()}
    identifiers, _ = grown(model, tokenizer, "naive")
    assert not identifiers.new_tokens
    start_rows(model, tokenizer, identifiers, tokens(tokenizer))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
