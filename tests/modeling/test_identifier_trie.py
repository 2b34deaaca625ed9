"""The trie as arrays against a Python dictionary of prefixes."""

import numpy as np
import pytest
import torch

from imagedex.modeling.identifier_trie import DEAD, IdentifierTrie

EOS = 1


def random_sequences(rng, count, vocabulary, longest):
    """Different sequences without end-of-sequence; many share prefixes, some are prefixes of others."""
    found = {tuple(rng.integers(2, vocabulary, rng.integers(1, longest + 1)).tolist()): None for _ in range(4 * count)}
    return [list(sequence) for sequence in found][:count]


def build(sequences, **kwargs):
    offsets = np.cumsum([0, *map(len, sequences)])
    return IdentifierTrie.from_sequences(np.concatenate(sequences), offsets, EOS, **kwargs)


def naive_trie(sequences):
    """{prefix: {next token, ...}} and {whole sequence with end-of-sequence: row}."""
    following, row_of = {}, {}
    for row, sequence in enumerate(sequences):
        whole = (*sequence, EOS)
        row_of[whole] = row
        for length, token in enumerate(whole):
            following.setdefault(whole[:length], set()).add(token)
    return following, row_of


CASES = [(seed, *shape) for seed in range(4) for shape in ((1, 5, 3), (30, 4, 5), (200, 12, 4), (60, 500, 1))]


@pytest.mark.parametrize(("seed", "count", "vocabulary", "longest"), CASES)
def test_walks_and_allowed_tokens_are_those_of_a_dictionary_of_prefixes(seed, count, vocabulary, longest):
    rng = np.random.default_rng(seed)
    sequences = random_sequences(rng, count, vocabulary, longest)
    trie = build(sequences)
    following, row_of = naive_trie(sequences)
    assert len(trie) == len(following) + len(row_of)  # inner nodes and ends

    for length in range(longest + 3):
        known = [prefix for prefix in [*following, *row_of] if len(prefix) == length]
        prefixes = known + [tuple(rng.integers(-1, vocabulary + 2, length).tolist()) for _ in range(40)]
        tensor = torch.tensor(prefixes, dtype=torch.int64).view(len(prefixes), length)
        nodes = trie.walk(tensor)
        index, tokens = trie.children(nodes)
        allowed = [set() for _ in prefixes]
        for beam, token in zip(index.tolist(), tokens.tolist(), strict=True):
            assert token not in allowed[beam]
            allowed[beam].add(token)
        assert allowed == [following.get(prefix, set()) for prefix in prefixes]
        assert trie.rows_of(nodes).tolist() == [row_of.get(prefix, -1) for prefix in prefixes]
        assert trie.is_end(nodes).tolist() == [prefix in row_of for prefix in prefixes]
        assert (nodes != DEAD).tolist() == [prefix in following or prefix in row_of for prefix in prefixes]


def test_single_steps_of_many_beams_are_those_of_the_dictionary():
    rng = np.random.default_rng(7)
    sequences = random_sequences(rng, 150, 9, 4)
    trie = build(sequences)
    following, _ = naive_trie(sequences)
    node_of = {prefix: int(trie.walk(torch.tensor([prefix], dtype=torch.int64).view(1, -1))[0]) for prefix in following}
    beams = list(node_of.items())
    for token in range(-1, 11):
        stepped = trie.step(
            torch.tensor([node for _, node in beams] + [DEAD]), torch.full((len(beams) + 1,), token)
        ).tolist()
        assert stepped[-1] == DEAD
        for (prefix, _), node in zip(beams, stepped, strict=False):
            assert (node != DEAD) == (token in following[prefix])
            if (*prefix, token) in node_of:
                assert node == node_of[(*prefix, token)]


def test_edge_e_leads_to_node_e_plus_1_and_children_ascend():
    trie = build(random_sequences(np.random.default_rng(1), 80, 6, 4))
    offsets, tokens, _ = (array.tolist() for array in trie.arrays)
    assert offsets[0] == 0 and offsets[-1] == len(tokens) == len(trie) - 1
    for node, (start, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        assert tokens[start:end] == sorted(set(tokens[start:end]))
        for edge in range(start, end):
            assert trie.step(torch.tensor([node]), torch.tensor([tokens[edge]])).item() == edge + 1


def test_a_finished_row_is_held_whatever_follows_and_only_then():
    trie = build([[5, 6], [5]])
    prefixes = torch.tensor([[5, EOS, 0, 0], [5, EOS, EOS, EOS], [5, 6, EOS, 9], [5, 7, 0, 0], [0, 5, EOS, 0]])
    assert trie.rows_of(trie.walk(prefixes, hold=True)).tolist() == [1, 1, 0, -1, -1]
    assert trie.rows_of(trie.walk(prefixes)).tolist() == [-1] * 5


def test_dead_nodes_and_empty_batches_have_no_children():
    trie = build([[5, 6], [5]])
    index, tokens = trie.children(torch.tensor([DEAD, 0, DEAD, 1]))
    assert list(zip(index.tolist(), tokens.tolist(), strict=True)) == [(1, 5), (3, EOS), (3, 6)]
    assert trie.children(torch.empty(0, dtype=torch.int64))[0].tolist() == []
    assert trie.walk(torch.empty(0, 3, dtype=torch.int64)).tolist() == []
    assert trie.walk(torch.empty(2, 0, dtype=torch.int64)).tolist() == [0, 0]


def test_a_copy_on_the_same_device_is_the_trie_itself():
    trie = build([[5, 6], [5]])
    assert trie.to("cpu") is trie and trie.to(torch.device("cpu")) is trie


def test_what_cannot_be_a_trie_is_refused():
    with pytest.raises(ValueError, match="row 0 and row 2 have the same identifier"):
        build([[5, 6], [5], [5, 6]])
    with pytest.raises(ValueError, match="a.jpg and c.jpg have the same"):
        build([[5, 6], [5], [5, 6]], names=["a.jpg", "b.jpg", "c.jpg"])
    with pytest.raises(ValueError, match="negative token or the end-of-sequence"):
        build([[5, EOS]])
    with pytest.raises(ValueError, match="negative token or the end-of-sequence"):
        build([[5, -2]])
    with pytest.raises(ValueError, match="no identifiers"):
        IdentifierTrie.from_sequences([], [0], EOS)


@pytest.mark.slow
def test_a_million_identifiers():
    numbers = np.random.default_rng(0).permutation(10**7)[: 10**6]
    digits = np.stack([numbers // 10**power % 10 + 5 for power in range(6, -1, -1)], axis=1)
    trie = IdentifierTrie.from_sequences(digits.reshape(-1), np.arange(10**6 + 1) * 7, EOS)
    asked = torch.from_numpy(np.random.default_rng(1).permutation(10**6)[:1000])
    ends = trie.step(trie.walk(torch.from_numpy(digits)[asked]), torch.full((1000,), EOS))
    assert torch.equal(trie.rows_of(ends), asked)
    prefixes = {len(np.unique(numbers // 10**power)) for power in range(7)}
    assert len(trie) == 1 + sum(prefixes) + 10**6


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu():
    sequences = random_sequences(np.random.default_rng(3), 200, 12, 4)
    trie = build(sequences)
    prefixes = torch.randint(0, 13, (5000, 3), generator=torch.Generator().manual_seed(0))
    prefixes[::2] = torch.tensor([(*sequence, EOS, 0, 0)[:3] for sequence in sequences]).repeat(13, 1)[:2500]
    nodes, moved = trie.walk(prefixes, hold=True), trie.to("cuda").walk(prefixes.cuda(), hold=True)
    assert torch.equal(nodes, moved.cpu()) and (nodes >= 0).sum() > 1000
    for one, other in zip(trie.children(nodes), trie.to("cuda").children(moved), strict=True):
        assert torch.equal(one, other.cpu())


@pytest.mark.parametrize(("seed", "count", "vocabulary", "longest"), CASES)
def test_levels_tails_and_children_are_those_of_the_dictionary(seed, count, vocabulary, longest):
    sequences = random_sequences(np.random.default_rng(seed), count, vocabulary, longest)
    trie, (following, row_of) = build(sequences), naive_trie(sequences)
    prefixes = [*following, *row_of]
    assert len(trie.levels) == max(map(len, row_of)) and trie.shortest == min(map(len, row_of))
    for depth, level in enumerate(trie.levels):
        inner = [prefix for prefix in following if len(prefix) == depth]
        start, end = trie.bounds[depth]
        assert end - start == sum(len(prefix) == depth for prefix in prefixes)
        assert level.inner == len(inner) and level.width == max(len(following[prefix]) for prefix in inner)
        assert level.ends == any(EOS in following[prefix] for prefix in inner)
        words = trie.words(depth)
        there = set().union(*(following[prefix] for prefix in inner))
        if isinstance(words, slice):  # with at most as many others in between
            assert (
                min(there) == words.start
                and max(there) == words.stop - 1
                and words.stop - words.start <= 2 * len(there)
            )
        else:
            assert words.tolist() == sorted(there)
        nodes = trie.walk(torch.tensor(inner, dtype=torch.int64).view(len(inner), depth))
        tokens, real = trie.following(nodes, level.width)
        assert [own[here].tolist() for own, here in zip(tokens, real, strict=True)] == [
            sorted(following[prefix]) for prefix in inner
        ]
        left = []
        for prefix in inner:
            ways = [whole[depth:] for whole in row_of if whole[:depth] == prefix]
            left.append(len(ways[0]) if len(ways) == 1 else 0)
            if len(ways) == 1:
                way, end = trie.tail(nodes[inner.index(prefix)], longest + 2)
                assert way.tolist() == [*ways[0], *[-1] * (longest + 2 - len(ways[0]))]
                assert trie.rows_of(end[None]).tolist() == [row_of[prefix + ways[0]]]
        assert trie.tails[nodes].tolist() == left
        assert level.tail == (max(left) if min(left) > 0 else 0)
