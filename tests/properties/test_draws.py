"""What is drawn in training: every row once an epoch, every item as often as the others, whoever draws and in whatever order."""

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from imagedex.training.draws import RowDraws, drawing_from
from imagedex.training.generative.data import Mixture, Rows, evenly


class Named(torch.utils.data.Dataset):
    """Row i is what it is called, and a number drawn at random."""

    def __init__(self, name, count):
        self.name, self.count = name, count

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        assert 0 <= row < self.count
        return {"row": f"{self.name}{row}", "drawn": torch.rand(()).item()}


def shown(mixture, epoch):
    mixture.set_epoch(epoch)
    return [mixture[row]["row"] for row in range(len(mixture))]


@given(
    sentences=st.integers(0, 12),
    items=st.integers(1, 9),
    kinds=st.integers(0, 2),
    ratio=st.one_of(st.none(), st.floats(0, 4)),
    seed=st.integers(0, 9),
    epochs=st.integers(1, 6),
)
def test_items_take_turns(sentences, items, kinds, ratio, seed, epochs):
    indexing = [Named("xy"[kind], items) for kind in range(kinds)]
    mixture = Mixture(Named("s", sentences), indexing, ratio, seed)
    rows = [shown(mixture, epoch) for epoch in range(epochs)]
    wanted = (items if ratio is None else round(ratio * sentences)) if kinds else 0
    for epoch in rows:
        counts = Counter(epoch)
        assert [counts[f"s{row}"] for row in range(sentences)] == [1] * sentences
        assert len(epoch) == sentences + kinds * wanted
        if ratio is None and kinds:
            assert [counts[f"x{row}"] for row in range(items)] == [1] * items
    over_all = Counter(row for epoch in rows for row in epoch)
    for kind in range(kinds):
        own = [over_all["xy"[kind] + str(row)] for row in range(items)]
        assert sum(own) == epochs * wanted and max(own) - min(own) <= 1
    again = Mixture(Named("s", sentences), indexing, ratio, seed)
    assert [shown(again, epoch) for epoch in reversed(range(epochs))] == rows[::-1]  # as a resumed run asks


@given(st.permutations(range(7)), st.integers(0, 3), st.integers(0, 5), st.integers(0, 2**40))
def test_a_rows_draw_belongs_to_the_row(order, epoch, stop, seed):
    def drawn(rows, row, noise):
        torch.rand(noise)  # others draw in between
        before = torch.get_rng_state()
        value = rows[row]["drawn"]
        assert torch.equal(torch.get_rng_state(), before)
        return value

    one, other = RowDraws(Named("s", 7), seed), RowDraws(Named("s", 7), seed)
    for rows in (one, other):
        rows.set_epoch(epoch)
    first = {row: drawn(one, row, 1) for row in range(7)}
    assert {row: drawn(other, row, stop) for row in order} == first
    assert len(set(first.values())) == 7
    one.set_epoch(epoch + 1)
    assert not set(first.values()) & {drawn(one, row, 0) for row in range(7)}


@given(st.integers(0, 2**63 - 1))
def test_the_state_comes_back_also_after_an_error(seed):
    before = torch.get_rng_state()
    try:
        with drawing_from(seed):
            torch.rand(3)
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(torch.get_rng_state(), before)


@given(st.integers(0, 300), st.integers(-1, 40))
def test_evenly(total, at_most):
    rows = evenly(total, at_most)
    assert len(rows) == (total if at_most < 0 else min(total, at_most))
    assert rows == sorted(set(rows)) and all(0 <= row < total for row in rows)
    steps = {b - a for a, b in zip(rows, rows[1:], strict=False)}
    assert not steps or max(steps) - min(steps) <= 1
    assert [Rows(range(total), rows)[place] for place in range(len(rows))] == rows
