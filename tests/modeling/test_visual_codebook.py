"""Patches become words: against loops written out, and gradients against hand arithmetic."""

import itertools
import math

import pytest
import torch

from imagedex.modeling.visual_codebook import (
    LearnedCodebook,
    codebook_statistics,
    even_positions,
    merged_positions,
    nearest_words,
    random_positions,
    unused_codebook,
)


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


@pytest.mark.parametrize("at_a_time", [2048, 5])
def test_nearest_words_against_a_loop(monkeypatch, at_a_time):
    monkeypatch.setattr("imagedex.modeling.visual_codebook.NEAREST_PATCHES", at_a_time)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 4, 5, generator=generator) * 7
    words = torch.randn(20, 5, generator=generator) * torch.linspace(0.1, 9, 20)[:, None]  # lengths must not matter
    special = [0, 1, 2, 11]
    found = nearest_words(states, words, special)
    for row, column in itertools.product(range(3), range(4)):
        cosines = {i: cosine(states[row, column].tolist(), words[i].tolist()) for i in range(20) if i not in special}
        assert found[row, column].item() == max(cosines, key=cosines.get)


def test_a_special_token_is_never_a_word_even_where_it_is_nearest():
    words = torch.eye(4)
    assert nearest_words(torch.tensor([[0.0, 5.0, 1.0, 0.0]]), words, special=[1]).item() == 2


@pytest.mark.parametrize(
    ("patches", "count", "expected"),
    [(4, 8, [0, 1, 2, 3]), (4, 4, [0, 1, 2, 3]), (9, 3, [1, 4, 7]), (10, 4, [1, 3, 6, 8]), (5, 1, [2])],
)
def test_even_positions(patches, count, expected):
    assert even_positions(patches, count).tolist() == expected


def test_random_positions_are_drawn_anew_in_training_and_never_in_evaluation():
    torch.manual_seed(0)
    drawn = [random_positions(6, 50, 10, training=True) for _ in range(2)]
    for positions in drawn:
        assert positions.shape == (6, 10)
        for row in positions.tolist():
            assert row == sorted(set(row)) and row[0] >= 0 and row[-1] < 50
    assert not torch.equal(*drawn)
    assert len({tuple(row) for row in drawn[0].tolist()}) > 1  # rows of a batch have draws of their own
    evaluated = [random_positions(rows, 50, 10, training=False) for rows in (6, 1)]
    assert {tuple(row) for positions in evaluated for row in positions.tolist()} == {tuple(evaluated[0][0].tolist())}
    assert torch.equal(random_positions(2, 4, 10, training=True), torch.arange(4).expand(2, 4))  # fewer: all of them


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 20])
def test_merged_positions_against_groupby(count):
    generator = torch.Generator().manual_seed(count)
    words = torch.randint(0, 3, (30, 8), generator=generator)
    words[0] = 1  # one run
    words[1] = torch.arange(8)  # no repeats
    positions, kept = merged_positions(words, count)
    longest = 0
    for row, found, mask in zip(words.tolist(), positions, kept, strict=True):
        starts, at = [], 0
        for _, run in itertools.groupby(row):
            starts.append(at)
            at += len(list(run))
        if len(starts) > count:
            starts = [starts[math.floor((slot + 0.5) * len(starts) / count)] for slot in range(count)]
        assert found[mask].tolist() == starts
        assert mask.tolist() == [True] * len(starts) + [False] * (len(mask) - len(starts))
        longest = max(longest, len(starts))
    assert positions.shape[1] == longest


def test_codebook_statistics_by_hand():
    """Ten words; end-of-sequence and padding, and a token that was added later, do not count."""
    ids = torch.tensor([[3, 3, 1, 0], [5, 7, 1, 13]])
    perplexity, usage = codebook_statistics(ids, num_tokens=13, special=[0, 1, 2])
    assert perplexity.item() == pytest.approx(math.exp(0.5 * math.log(2) + 2 * 0.25 * math.log(4)))
    assert usage.item() == pytest.approx(0.3)
    assert codebook_statistics(torch.tensor([4, 4, 4]), 13, [0, 1, 2])[0].item() == pytest.approx(1.0)
    perplexity, usage = codebook_statistics(torch.tensor([1, 0]), 13, [0, 1, 2])  # no word at all
    assert (perplexity.item(), usage.item()) == (1.0, 0.0)


@pytest.fixture
def learned():
    torch.manual_seed(0)
    codebook = LearnedCodebook(vision_width=6, word_width=5, projection_dim=4, entropy_weight=0.0)
    states = torch.randn(2, 3, 6, requires_grad=True)
    words = torch.randn(12, 5, requires_grad=True)
    return codebook, states, words, torch.tensor([[True, True, True], [True, False, False]])


def test_the_learned_choice_and_its_loss_by_hand(learned):
    codebook, states, words, kept = learned
    ids, path, loss = codebook(states, words, [0, 1], kept)
    assert torch.equal(path, torch.zeros(2, 3, 5))
    distances = []
    for row, column in itertools.product(range(2), range(3)):
        patch = codebook.vision_projection(states[row, column]).tolist()
        cosines = [cosine(patch, codebook.word_projection(word).tolist()) for word in words]
        best = max(range(2, 12), key=cosines.__getitem__)
        assert ids[row, column].item() == best
        if kept[row, column]:
            distances.append(2 - 2 * cosines[best])  # squared distance of unit vectors
    assert loss.item() == pytest.approx(1.25 * sum(distances) / 4, rel=1e-5)


def test_unused_codebook_by_hand():
    """Four words. Sure patches on all of them: 0. All on one word, or all unsure: log 4. On two words: log 4 - log 2."""
    sure = 2 * torch.eye(4) - 1

    def unused(cosines):
        return unused_codebook(cosines, torch.full((len(cosines),), 1 / len(cosines)))

    assert unused(sure).item() == pytest.approx(0.0, abs=1e-5)
    assert unused(sure[[2, 2, 2]]).item() == pytest.approx(math.log(4), abs=1e-5)
    assert unused(sure[[0, 1, 1, 0]]).item() == pytest.approx(math.log(2), abs=1e-5)
    assert unused(torch.zeros(3, 4)).item() == pytest.approx(math.log(4), abs=1e-5)
    weights = torch.tensor([0.5, 0.5, 0.0])  # the third patch does not count
    assert unused_codebook(sure[[0, 1, 2]], weights).item() == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("looked_at", [1024, 3, 2])
def test_the_entropy_penalty_is_added_and_moves_both_projections(learned, monkeypatch, looked_at):
    """Of the four patches that count, `looked_at` in the middles of equal stretches."""
    monkeypatch.setattr("imagedex.modeling.visual_codebook.ENTROPY_PATCHES", looked_at)
    codebook, states, words, kept = learned
    without = codebook(states, words, [0, 1], kept)[2]
    codebook.entropy_weight = 0.5
    patches = torch.nn.functional.normalize(codebook.vision_projection(states[kept]), dim=-1)
    patches = patches[{1024: [0, 1, 2, 3], 3: [0, 2, 3], 2: [1, 3]}[looked_at]]
    cosines = patches @ torch.nn.functional.normalize(codebook.word_projection(words[2:]), dim=-1).T
    loss = codebook(states, words, [0, 1], kept)[2]
    torch.testing.assert_close(
        loss, without + 0.5 * unused_codebook(cosines, torch.full((len(cosines),), 1 / len(cosines)))
    )
    codebook.zero_grad()
    (loss - without).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in codebook.parameters())
    assert words.grad is None and states.grad[~kept].abs().sum() == 0


def test_each_side_is_moved_by_its_own_loss_and_the_words_by_none(learned):
    codebook, states, words, kept = learned
    codebook(states, words, [0, 1], kept)[2].backward()
    both = {name: parameter.grad.clone() for name, parameter in codebook.named_parameters()}
    assert words.grad is None
    assert states.grad[kept].abs().sum() > 0 and states.grad[~kept].abs().sum() == 0
    codebook.zero_grad()
    codebook.commitment_cost = 0.0
    codebook(states, words, [0, 1], kept)[2].backward()
    assert torch.equal(codebook.word_projection.weight.grad, both["word_projection.weight"])
    assert codebook.vision_projection.weight.grad.abs().sum() == 0
    assert both["vision_projection.weight"].abs().sum() > 0


def test_the_gradient_for_a_word_goes_straight_through_to_its_patch(learned):
    """d loss / d (unit patch) has to be |W w| W g, where g is the gradient that T5 has for the word w and W projects words."""
    codebook, states, words, kept = learned
    gradient = torch.randn(2, 3, 5)
    ids, path, _ = codebook(states, words, [0, 1], kept)
    (path * gradient).sum().backward()
    found = states.grad.clone()
    states.grad = None
    weight = codebook.word_projection.weight.detach()  # (4, 5)
    lengths = torch.stack([(weight @ word).norm() for word in words[ids].flatten(0, 1)]).view(2, 3, 1).detach()
    units = torch.nn.functional.normalize(codebook.vision_projection(states), dim=-1)
    (units * (gradient @ weight.T) * lengths).sum().backward()
    torch.testing.assert_close(found, states.grad)
    assert words.grad is None and codebook.word_projection.weight.grad is None


def test_following_the_straight_through_gradient_finds_the_wanted_words():
    """Only the patches' projection learns; what it is asked for is that T5 reads certain words."""
    torch.manual_seed(0)
    codebook = LearnedCodebook(
        vision_width=16, word_width=12, projection_dim=8, commitment_cost=0.0, entropy_weight=0.0
    )
    states, words, kept = torch.randn(1, 6, 16), torch.randn(20, 12), torch.ones(1, 6, dtype=torch.bool)
    wanted = torch.tensor([[3, 17, 9, 12, 5, 4]])
    codebook.word_projection.requires_grad_(False)
    optimizer = torch.optim.Adam(codebook.vision_projection.parameters(), lr=1e-2)
    assert not torch.equal(codebook.nearest(states, words, [0, 1, 2]), wanted)
    for _ in range(300):
        ids, path, _ = codebook(states, words, [0, 1, 2], kept)
        loss = (words[ids] + path - words[wanted]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(codebook.nearest(states, words, [0, 1, 2]), wanted)
