"""Any number of items, any vectors: an identifier each, no two alike, the same after saving, and room for more."""

import string

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imagedex.identifiers.schemes import IdentifierError, assign_identifiers, extend_identifiers
from imagedex.modeling.identifiers import SCHEMES, Identifiers
from imagedex.training.tokenizer import train_tokenizer

COUNTS = st.one_of(st.integers(1, 12), st.integers(13, 130))
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@st.composite
def vector_sets(draw, width=None):
    """(N, D) with as many different rows as is drawn: one for all, a few, or nearly all; some far out, some 0."""
    count, width = draw(COUNTS), width or draw(st.integers(1, 5))
    different = draw(st.integers(1, count))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    points = torch.randn(different, width, generator=generator) * draw(st.sampled_from([0.0, 1e-6, 1.0, 1e4]))
    return points[torch.randint(different, (count,), generator=generator)]


def tokenizer():
    return train_tokenizer(["a red circle left of 12 squares"] * 5, 80)


def named(count, start=0):
    return [f"{number}.jpg" for number in range(start, start + count)]


def check_whole(identifiers, names, tokenizer):
    """Everybody's own sequence, found from it again, not ended early, in the tokenizer's tokens."""
    assert identifiers.image_ids == names
    sequences = [tuple(identifiers.sequence(name)) for name in names]
    assert len(set(sequences)) == len(names) and all(sequences)
    assert identifiers.eos_token_id not in {token for sequence in sequences for token in sequence}
    assert identifiers.tokens.max() < len(tokenizer)
    assert [identifiers.image_id_of(sequence) for sequence in sequences] == names
    assert identifiers.max_length == 1 + max(map(len, sequences))
    ends = identifiers.trie.walk(torch.from_numpy(identifiers.padded(fill=0)), hold=True)
    assert identifiers.trie.rows_of(ends).tolist() == list(range(len(names)))


@settings(max_examples=40)
@given(
    scheme=st.sampled_from(SCHEMES),
    vectors=vector_sets(),
    branches=st.sampled_from([2, 3, 10, 17]),
    leaf_size=st.sampled_from([1, 2, 10, 100]),
    levels=st.integers(1, 3),
    codes=st.sampled_from([None, 2, 5, 300]),
    seed=st.integers(0, 5),
)
def test_every_item_gets_one(tmp_path_factory, scheme, vectors, branches, leaf_size, levels, codes, seed):
    options = {"branches": branches, "leaf_size": leaf_size, "levels": levels, "codes": codes, "seed": seed}
    names, own = named(len(vectors)), tokenizer()
    found = assign_identifiers(scheme, names, own, vectors, **options)
    check_whole(found, names, own)
    again = assign_identifiers(scheme, names, tokenizer(), vectors, **options)
    assert np.array_equal(again.tokens, found.tokens)
    folder = tmp_path_factory.mktemp("identifiers")
    found.save_pretrained(folder)
    kept = Identifiers.from_pretrained(folder)
    check_whole(kept, names, own)
    assert np.array_equal(kept.tokens, found.tokens) and kept.source == found.source


@settings(max_examples=30)
@given(
    scheme=st.sampled_from(["atomic", "semantic", "rq"]),
    vectors=vector_sets(width=3),
    more=vector_sets(width=3),
    leaf_size=st.sampled_from([1, 2, 10]),
    codes=st.sampled_from([None, 2]),
)
def test_new_items_beside_the_old(scheme, vectors, more, leaf_size, codes):
    """Old identifiers stay as they are; a new one is its own, or there is a line that says why there is none."""
    names, own = named(len(vectors)), tokenizer()
    old = assign_identifiers(scheme, names, own, vectors, branches=3, leaf_size=leaf_size, levels=2, codes=codes)
    new = named(len(more), len(vectors))
    try:
        grown = extend_identifiers(old, new, more, own)
    except IdentifierError as error:
        assert scheme == "rq" and "no suffix token is left" in str(error)
        return
    check_whole(grown, names + new, own)
    assert [grown.sequence(name) for name in names] == [old.sequence(name) for name in names]
    assert grown.added_image_ids == new


@given(st.dictionaries(NAMES, st.lists(st.integers(2, 40), min_size=1, max_size=5).map(tuple), min_size=1, max_size=20))
def test_any_names_and_sequences_come_back(tmp_path_factory, wanted):
    sequences = list(wanted.values())
    if len(set(sequences)) < len(sequences):
        with pytest.raises(ValueError, match="same identifier"):
            Identifiers.from_sequences("naive", list(wanted), sequences, 1)
        return
    folder = tmp_path_factory.mktemp("identifiers")
    Identifiers.from_sequences("naive", list(wanted), sequences, 1).save_pretrained(folder)
    kept = Identifiers.from_pretrained(folder)
    assert {name: tuple(kept.sequence(name)) for name in kept.image_ids} == wanted
    assert {kept.image_id_of([*sequence, 1, 7]): sequence for sequence in sequences} == wanted
    alone = [row for row, sequence in enumerate(sequences) if (*sequence, 5) not in sequences]
    assert [kept.image_id_of((*sequences[row], 5)) for row in alone] == [None] * len(alone)


@settings(max_examples=25)
@given(st.integers(1, 400), st.text(string.ascii_letters + string.digits + " .", min_size=1, max_size=60))
def test_numbers_of_any_tokenizer(count, text):
    """Naive identifiers are numbers; whichever digits the tokenizer has learned, each is written as a sequence of its own."""
    own = train_tokenizer([text] * 3, 90)
    found = assign_identifiers("naive", named(count), own)
    check_whole(found, named(count), own)
    by_token = {token: piece for piece, token in (found.known_tokens | found.new_tokens).items()}
    written = ["".join(filter(str.isdigit, "".join(by_token[t] for t in found.sequence(n)))) for n in named(count)]
    assert sorted(map(int, written)) == list(range(count))
