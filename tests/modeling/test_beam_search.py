"""The search for identifiers against `generate` with the same constraint, and against loops over tokens."""

import accelerate
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5Config, T5ForConditionalGeneration

from imagedex.modeling import beam_search
from imagedex.modeling.beam_decoder import BeamDecoder
from imagedex.modeling.constrained_decoding import rank_identifiers
from imagedex.modeling.identifiers import Identifiers

EOS, VOCABULARY, COUNT = 1, 60, 30
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
KINDS = {
    "t5": {"dropout_rate": 0.1},
    "gated, untied": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "heads wider than the model": {"d_kv": 16, "relative_attention_num_buckets": 8},
    "codebook_t5": None,
    "vision_grounded_t5": None,
}


def spread(model):
    """Weights far from uniform, so that beams differ."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "vision_model" not in name:
                parameter.mul_(2)
    return model.eval()


@pytest.fixture
def build(tiny_picture_t5):
    def build(kind):
        torch.manual_seed(0)
        if KINDS[kind] is None:
            return spread(tiny_picture_t5(kind))
        return spread(T5ForConditionalGeneration(T5Config(**T5 | KINDS[kind], decoder_start_token_id=0)))

    return build


def sequences_of(scheme):
    rng = np.random.default_rng(0)
    if scheme == "atomic":
        found = [[20 + row] for row in range(COUNT)]
    elif scheme == "rq":  # one length, a token range a level, almost always a suffix 0
        found = {tuple(8 * level + rng.integers(8, 16, 1)[0] for level in range(3)) + (50,) for _ in range(COUNT)}
    elif scheme == "naive":  # numbers of one digit are the beginnings of others
        found = [[10 + int(digit) for digit in str(number)] for number in rng.permutation(COUNT)]
    else:  # semantic: ways of very different lengths
        found = {tuple(rng.integers(10, 13, rng.integers(1, 8)).tolist()) for _ in range(2 * COUNT)}
    return [list(sequence) for sequence in sorted(map(tuple, found))][:COUNT]


SCHEMES = ("atomic", "naive", "semantic", "rq")


def identifiers_of(scheme, sequences=None):
    sequences = sequences or sequences_of(scheme)
    return Identifiers.from_sequences(scheme, [f"{row}.jpg" for row in range(len(sequences))], sequences, EOS)


def texts(batch, side):
    """The same sentences, padded at the other side."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    order = torch.argsort(mask, dim=1, stable=True) if side == "left" else torch.arange(ids.shape[1]).expand_as(ids)
    return {"input_ids": ids.gather(1, order), "attention_mask": mask.gather(1, order)}


def by_generate(monkeypatch, *args):
    with monkeypatch.context() as patch:
        patch.setattr("imagedex.modeling.constrained_decoding.searchable", lambda *_: False)
        return rank_identifiers(*args)


def assert_same(found, expected, atol=1e-4):
    torch.testing.assert_close(found[0], expected[0], atol=atol, rtol=0)
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_as_generate(build, picture_batch, monkeypatch, kind, scheme):
    model, identifiers = build(kind), identifiers_of(scheme)
    asked = [texts(picture_batch, "right"), texts(picture_batch, "left")]
    asked += [picture_batch, {"pixel_values": picture_batch["pixel_values"]}] if KINDS[kind] is None else []
    asked.append({"input_ids": picture_batch["input_ids"]})  # padding without a mask
    some = identifiers.image_ids[::3]
    for inputs in asked:
        for beams in (1, 4, COUNT):
            expected = by_generate(monkeypatch, model, identifiers, dict(inputs), beams)
            assert_same(rank_identifiers(model, identifiers, dict(inputs), beams), expected)
    among = identifiers.restricted(some)
    assert_same(
        rank_identifiers(model, among, dict(asked[0]), 4), by_generate(monkeypatch, model, among, dict(asked[0]), 4)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "autocast"])
@pytest.mark.parametrize("kind", ["t5", "gated, untied", "vision_grounded_t5"])
def test_in_half_precision_as_generate_to_within_its_rounding(build, picture_batch, monkeypatch, kind, dtype):
    """Of the same size of error against float32, and the same best identifier wherever float32 has no doubt."""
    model, inputs, identifiers = build(kind), texts(picture_batch, "right"), identifiers_of("naive")
    exact, order = rank_identifiers(model, identifiers, inputs, COUNT)
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast")
    if dtype != "autocast":
        model.to(dtype)
    with mixed:
        found = rank_identifiers(model, identifiers, inputs, COUNT)
        expected = by_generate(monkeypatch, model, identifiers, inputs, COUNT)
    errors = []
    for scores, rows in (found, expected):
        own = torch.zeros_like(scores).scatter(1, rows, scores)
        errors.append((own - torch.zeros_like(exact).scatter(1, order, exact)).abs().max())
        sure = exact[:, 0] - exact[:, 1] > 2 * errors[-1]
        assert torch.equal(rows[sure, 0], order[sure, 0])
    assert 0 < errors[0] < 1.5 * errors[1] + 1e-3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_where_all_words_are_as_likely_no_identifier_comes_twice(build, picture_batch, monkeypatch, scheme):
    """Which of those with the same score come first is not said, here nor by `generate`."""
    model, inputs, identifiers = build("gated, untied"), texts(picture_batch, "right"), identifiers_of(scheme)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    for beams in (3, len(identifiers)):
        scores, rows = rank_identifiers(model, identifiers, inputs, beams)
        lengths = torch.from_numpy(np.diff(identifiers.offsets))[rows] + 1
        torch.testing.assert_close(scores, -lengths * np.log(VOCABULARY).astype(np.float32), atol=1e-4, rtol=0)
        assert all(len(set(own)) == beams for own in rows.tolist())
    torch.testing.assert_close(by_generate(monkeypatch, model, identifiers, inputs, beams)[0], scores)


def children_scores(model, identifiers, inputs):
    """One query, one identifier, one token at a time, each against its siblings."""
    whole = [[*identifiers.sequence(name), EOS] for name in identifiers.image_ids]
    scores = torch.zeros(len(inputs["input_ids"]), len(whole))
    for query in range(len(scores)):
        own = {name: tensor[query : query + 1] for name, tensor in inputs.items()}
        for row, tokens in enumerate(whole):
            with torch.no_grad():
                logits = model(**own, decoder_input_ids=torch.tensor([[0, *tokens[:-1]]])).logits[0]
            for length, token in enumerate(tokens):
                siblings = sorted({other[length] for other in whole if other[:length] == tokens[:length]})
                scores[query, row] += logits[length, siblings].log_softmax(0)[siblings.index(token)]
    return scores


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scores_over_children(build, picture_batch, scheme):
    model, inputs, identifiers = build("t5"), texts(picture_batch, "right"), identifiers_of(scheme)
    expected, order = children_scores(model, identifiers, inputs).sort(dim=1, descending=True)
    scores, rows = rank_identifiers(model, identifiers, inputs, COUNT, over="children")
    assert_same((scores[:, : expected.shape[1]], rows[:, : expected.shape[1]]), (expected, order))
    torch.testing.assert_close(expected.exp().sum(1), torch.ones(3))  # a probability over the identifiers
    with pytest.raises(ValueError, match="neither"):
        rank_identifiers(model, identifiers, inputs, COUNT, over="words")


@pytest.mark.parametrize("target", ["q", "v", "wo", "lm_head"])
def test_adapters_count(build, picture_batch, monkeypatch, target):
    peft = pytest.importorskip("peft")
    model, inputs, identifiers = build("gated, untied"), texts(picture_batch, "right"), identifiers_of("naive")
    without = rank_identifiers(model, identifiers, inputs, COUNT)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=[target], init_lora_weights=False), model)
    found = rank_identifiers(model.eval(), identifiers, inputs, COUNT)
    assert (found[0] - without[0]).abs().max() > 0.01
    assert_same(found, by_generate(monkeypatch, model, identifiers, inputs, COUNT))
    alone = identifiers_of("rq", [[5, 6, 7], [8, 9, 10]])  # whose last tokens are scored together
    assert_same(rank_identifiers(model, alone, inputs, 2), by_generate(monkeypatch, model, alone, inputs, 2))


def test_hooks_count(build, picture_batch, monkeypatch):
    """Among them accelerate's, which fetches weights when they are needed."""
    model, inputs, identifiers = build("gated, untied"), texts(picture_batch, "right"), identifiers_of("naive")
    hook = model.lm_head.register_forward_hook(lambda layer, states, logits: logits / 3)
    for beams in (1, 4):
        expected = by_generate(monkeypatch, model, identifiers, inputs, beams)
        assert_same(rank_identifiers(model, identifiers, inputs, beams), expected)
    hook.remove()
    expected = rank_identifiers(model, identifiers, inputs, 4)
    offloaded = accelerate.cpu_offload(model, execution_device="cpu")
    assert_same(rank_identifiers(offloaded, identifiers, inputs, 4), expected)


def test_each_part_is_left_in_the_mode_it_was_in(build, picture_batch):
    model = build("t5").train()
    model.encoder.eval()
    modes = [module.training for module in model.modules()]
    inputs = texts(picture_batch, "right")
    found = [rank_identifiers(model, identifiers_of("rq"), inputs, 4)[0] for _ in range(2)]
    assert torch.equal(*found)  # no dropout
    assert [module.training for module in model.modules()] == modes


def passes(monkeypatch, *args, **kwargs):
    """(B, R, L) of the tokens that each pass of the decoder takes."""
    shapes, call = [], BeamDecoder.__call__
    monkeypatch.setattr(
        BeamDecoder,
        "__call__",
        lambda self, tokens, parents: shapes.append(tuple(tokens.shape)) or call(self, tokens, parents),
    )
    rank_identifiers(*args, **kwargs)
    monkeypatch.setattr(BeamDecoder, "__call__", call)
    return shapes


def test_no_more_is_decoded_than_there_is_to_choose(build, picture_batch, monkeypatch):
    model, inputs = build("t5"), texts(picture_batch, "right")
    apart = identifiers_of("rq", [[5, 6, 7], [5, 8, 9], [10, 11, 12]])
    assert passes(monkeypatch, model, apart, inputs, 10) == [(3, 1, 1), (3, 2, 1), (3, 3, 2)]
    assert passes(monkeypatch, model, apart, inputs, 1)[-1][2] >= 2  # the last choice made, what is left comes at once
    assert passes(monkeypatch, model, apart, inputs, 10, over="children") == [(3, 1, 1), (3, 2, 1)]
    alone = identifiers_of("rq", [[5, 6, 7]])
    assert passes(monkeypatch, model, alone, inputs, 10) == [(3, 1, 4)]
    assert passes(monkeypatch, model, alone, inputs, 10, over="children") == []
    deep = [[4], *([5] * length for length in range(1, 30))]
    assert (
        len(passes(monkeypatch, model, identifiers_of("semantic", deep), inputs, 2)) < 29
    )  # two are found, and none is better


class Watched(TorchDispatchMode):
    """What is computed, in shapes; whatever has to look at a result is an error."""

    looks = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.startswith(self.looks), name
        found = func(*args, **(kwargs or {}))
        self.shapes.append((name, tuple(found.shape) if isinstance(found, torch.Tensor) else None))
        return found


@pytest.mark.parametrize("over", ["vocabulary", "children"])
def test_nothing_waits_for_the_device_and_shapes_do_not_depend_on_what_is_found(
    build, picture_batch, monkeypatch, over
):
    monkeypatch.setattr(beam_search, "asynchronous", lambda device: True)
    model, trie = build("t5"), identifiers_of("rq").trie
    expected = None
    for seed in (0, 1, 2):
        states = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(seed))
        arguments = (model, trie, states, picture_batch["attention_mask"], 4, 0, over)
        beam_search.search_identifiers(*arguments)  # what is kept of the trie is counted once
        with Watched() as watched:
            beam_search.search_identifiers(*arguments)
        assert watched.shapes == (expected or watched.shapes)
        expected = watched.shapes


def test_other_models_are_searched_by_generate_and_it_is_said(build, picture_batch, monkeypatch):
    model, inputs, identifiers = build("t5"), texts(picture_batch, "right"), identifiers_of("naive")

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def __getattr__(self, name):
            return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

    said = []
    monkeypatch.setattr("imagedex.modeling.constrained_decoding.logger.warning_once", said.append)
    assert_same(rank_identifiers(Wrapped(), identifiers, inputs, 4), rank_identifiers(model, identifiers, inputs, 4))
    assert len(said) == 1 and "Wrapped is no T5ForConditionalGeneration" in said[0]
    with pytest.raises(ValueError, match="children"):
        rank_identifiers(Wrapped(), identifiers, inputs, 4, over="children")


def plain_search(model, whole, ids, beams, over):
    """One query, one beam, one token at a time: {identifier's row: score}, best first."""

    def following(prefix):
        siblings = sorted({other[len(prefix)] for other in whole if other[: len(prefix)] == prefix})
        with torch.no_grad():
            logits = model(input_ids=ids, decoder_input_ids=torch.tensor([[0, *prefix]])).logits[0, -1]
        scores = logits.log_softmax(0)[siblings] if over == "vocabulary" else logits[siblings].log_softmax(0)
        return zip(siblings, scores.tolist(), strict=True)

    alive, found = {(): 0.0}, {}
    while alive:
        reached = {(*way, token): score + gain for way, score in alive.items() for token, gain in following(way)}
        best = sorted(reached, key=reached.get, reverse=True)[: 2 * beams]
        found |= {way: reached[way] for way in best[:beams] if way[-1] == EOS}
        alive = {way: reached[way] for way in best if way[-1] != EOS}
        alive = dict(list(alive.items())[:beams])
    return {whole.index(way): found[way] for way in sorted(found, key=found.get, reverse=True)[:beams]}


@pytest.mark.parametrize("over", ["vocabulary", "children"])
def test_few_beams_among_ways_of_different_lengths(picture_batch, over):
    """One query's beams end, or have one way on, where other nodes of their depth have many."""
    wide = [[4, 10 + first, 20 + second, 40 + third] for first in range(4) for second in range(3) for third in range(2)]
    sequences = [*wide, [5], [6, 12, 35, 50], [6, 12, 35, 51]]
    identifiers, whole = identifiers_of("semantic", sequences), [(*own, EOS) for own in sequences]
    ids = picture_batch["input_ids"].clamp(min=2)
    for seed in range(6):
        torch.manual_seed(seed)
        model = spread(T5ForConditionalGeneration(T5Config(**T5 | KINDS["gated, untied"], decoder_start_token_id=0)))
        for beams in (1, 2, 3):
            scores, rows = rank_identifiers(model, identifiers, {"input_ids": ids}, beams, over=over)
            for query, own in enumerate(ids):
                expected = plain_search(model, whole, own[None], beams, over)
                assert [row for row in rows[query].tolist() if row >= 0] == list(expected)
                torch.testing.assert_close(
                    scores[query, : len(expected)], torch.tensor(list(expected.values())), atol=1e-4, rtol=0
                )
