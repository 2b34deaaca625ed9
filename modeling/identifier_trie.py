"""The prefix tree of all identifiers as flat arrays, walked for a whole batch of beams at once.

The layout is compressed sparse rows with the nodes numbered breadth first, so that the edge `e` leads to the node `e + 1`
and no array of targets is needed (the same idea as STATIC, arXiv 2602.22647):

    child_offsets (nodes + 1,)  the edges of node n are child_offsets[n] .. child_offsets[n + 1] - 1
    child_tokens  (nodes - 1,)  the token on each edge, ascending among the edges of one node
    rows          (nodes,)      the picture's row at the node behind its end-of-sequence token, -1 elsewhere

Breadth first also means that the nodes of one depth lie together: what is known of a whole level is kept as plain numbers, so
that a search can choose its shapes without asking the device.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

ROOT, DEAD = 0, -1


@dataclass(frozen=True)
class Level:
    """The nodes of one depth.

    Attributes:
        inner: how many of them go on, and do not end an identifier.
        width: the most children that one of them has.
        ends: whether a child of one of them ends an identifier.
        tail: the most tokens that one of them may still be followed by, where none of them has a choice any more; else 0.
    """

    inner: int
    width: int
    ends: bool
    tail: int


class IdentifierTrie:
    """A trie over token sequences that end with the end-of-sequence token; node 0 is the root, node -1 is no node.

    Args:
        child_offsets, child_tokens, rows: int64 tensors as above, on one device.
    """

    def __init__(self, child_offsets: torch.Tensor, child_tokens: torch.Tensor, rows: torch.Tensor):
        self.child_offsets, self.child_tokens, self.rows = child_offsets, child_tokens, rows
        self.vocab_size = int(child_tokens.max()) + 1  # the least vocabulary that holds every token
        counts = child_offsets[1:] - child_offsets[:-1]
        parents = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts)
        self._keys = parents * self.vocab_size + child_tokens  # ascending, because nodes are numbered breadth first
        self._copies, self._words = {rows.device: self}, {}

    @classmethod
    def from_sequences(cls, tokens, offsets, eos_token_id: int, names=None) -> "IdentifierTrie":
        """Builds the trie by sorting, without a Python object for a node.

        Args:
            tokens: (sum of lengths,) integers, all sequences one after another, without end-of-sequence.
            offsets: (N + 1,) where each sequence starts, and the end.
            eos_token_id: appended to every sequence, so that one may be a prefix of another.
            names: (N,) what to call the sequences in the error message; their rows without it.

        Raises:
            ValueError: no sequence at all, a negative token or an end-of-sequence token inside, two equal sequences.
        """
        tokens, offsets = np.asarray(tokens), np.asarray(offsets, dtype=np.int64)
        count, lengths = len(offsets) - 1, np.diff(offsets)
        if count < 1:
            raise ValueError("there are no identifiers: a trie needs at least one sequence")
        if len(tokens) and (tokens.min() < 0 or (tokens == eos_token_id).any()):
            raise ValueError(f"an identifier holds a negative token or the end-of-sequence token {eos_token_id}")
        width = int(lengths.max()) + 1
        matrix = np.full((count, width), -1, dtype=np.int64)
        matrix[np.repeat(np.arange(count), lengths), np.arange(len(tokens)) - np.repeat(offsets[:-1], lengths)] = tokens
        matrix[np.arange(count), lengths] = eos_token_id
        order = np.lexsort(matrix.T[::-1])
        matrix = matrix[order]

        starts = np.zeros(count, dtype=bool)  # rows whose prefix of this depth is another than that of the row above
        starts[0] = True
        node = np.zeros(count, dtype=np.int64)  # where each row stands
        parents, labels, nodes = [], [], 1
        for column in matrix.T:
            starts[1:] |= column[1:] != column[:-1]
            alive = column >= 0
            first = starts & alive
            parents.append(node[first])
            labels.append(column[first])
            node = np.where(alive, nodes + np.cumsum(first) - 1, node)
            nodes += int(first.sum())
        if not starts.all():
            later = int(np.argmin(starts))
            a, b = (int(order[row]) for row in (later - 1, later))
            a, b = (names[a], names[b]) if names is not None else (f"row {a}", f"row {b}")
            raise ValueError(f"{a} and {b} have the same identifier; every picture needs one of its own")
        rows = np.full(nodes, -1, dtype=np.int64)
        rows[node] = order
        child_offsets = np.zeros(nodes + 1, dtype=np.int64)
        np.cumsum(np.bincount(np.concatenate(parents), minlength=nodes), out=child_offsets[1:])
        return cls(*(torch.from_numpy(array) for array in (child_offsets, np.concatenate(labels), rows)))

    def __len__(self) -> int:
        """The number of nodes."""
        return len(self.rows)

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def to(self, device) -> "IdentifierTrie":
        """The trie on that device; the copy is kept, so that asking again costs nothing."""
        device = torch.empty(0, device=device).device  # "cuda" -> cuda:0
        if device not in self._copies:
            copy = IdentifierTrie(*(t.to(device) for t in self.arrays))
            copy._copies, copy.bounds, copy.levels = self._copies, self.bounds, self.levels
            copy.tails = self.tails.to(device)
            self._copies[device] = copy
        return self._copies[device]

    @property
    def arrays(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.child_offsets, self.child_tokens, self.rows

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """For each depth its nodes, (first, last + 1), the root's first; the last depth has ends of identifiers alone."""
        bounds, (start, end) = [], (ROOT, ROOT + 1)
        while start < end:
            bounds.append((start, end))
            start, end = (self.child_offsets[[start, end]] + 1).tolist()
        return bounds

    @cached_property
    def tails(self) -> torch.Tensor:
        """(nodes,) tokens that follow where nothing is to be chosen any more, end-of-sequence included; 0 at an end, and where
        there is a choice."""
        tails = torch.zeros_like(self.rows)
        for start, end in reversed(self.bounds[:-1]):
            nodes = torch.arange(start, end, device=self.device)
            only = self.child_offsets[nodes + 1] - self.child_offsets[nodes] == 1
            child = (self.child_offsets[nodes] + 1).clamp(max=len(self) - 1)
            forced = only & ((self.rows[child] >= 0) | (tails[child] > 0))
            tails[start:end] = torch.where(forced, tails[child] + 1, 0)
        return tails

    @cached_property
    def levels(self) -> list[Level]:
        """All depths whose nodes may go on, the root's first."""
        levels, counts = [], self.child_offsets[1:] - self.child_offsets[:-1]
        for (start, end), (first, last) in zip(self.bounds, self.bounds[1:], strict=False):
            inner = self.rows[start:end] < 0
            tails, ends = self.tails[start:end][inner], (self.rows[first:last] >= 0).any()
            tail = int(tails.max()) if tails.min() > 0 else 0
            levels.append(Level(int(inner.sum()), int(counts[start:end].max()), bool(ends), tail))
        return levels

    @cached_property
    def shortest(self) -> int:
        """Tokens of the shortest identifier, end-of-sequence included."""
        return 1 + next(depth for depth, level in enumerate(self.levels) if level.ends)

    def words(self, depth: int) -> slice | torch.Tensor:
        """The tokens on all edges from the nodes of one depth, ascending; a slice where they lie close together."""
        if depth not in self._words:
            start, end = self.bounds[depth + 1]
            words = self.child_tokens[start - 1 : end - 1].unique()
            first, last = words[[0, -1]].tolist()
            self._words[depth] = slice(first, last + 1) if last - first < 2 * len(words) else words
        return self._words[depth]

    def following(self, nodes: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What may follow each node, in a shape that does not depend on how much it is: (...,) nodes -> tokens (..., width), in
        the order of the edges, and (..., width) bool which of them there are; none at no node."""
        starts, ends = self.child_offsets[nodes], self.child_offsets[nodes + 1]
        edges = starts[..., None] + torch.arange(width, device=nodes.device)
        return self.child_tokens[edges.clamp(max=len(self.child_tokens) - 1)], edges < ends[..., None]

    def tail(self, nodes: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The way on from nodes without a choice: (...,) nodes -> tokens (..., length), -1 behind the end, and the last nodes
        (...,)."""
        tokens = []
        for _ in range(length):
            edges = self.child_offsets[nodes].clamp(max=len(self.child_tokens) - 1)
            goes_on = self.rows[nodes] < 0
            tokens.append(torch.where(goes_on, self.child_tokens[edges], -1))
            nodes = torch.where(goes_on, edges + 1, nodes)
        return torch.stack(tokens, dim=-1), nodes

    def step(self, nodes: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """One token further: (M,) nodes and (M,) tokens -> (M,) nodes, -1 where there is no such edge."""
        keys = nodes * self.vocab_size + tokens
        edges = torch.searchsorted(self._keys, keys).clamp_(max=len(self._keys) - 1)
        found = (self._keys[edges] == keys) & (nodes >= 0) & (tokens >= 0) & (tokens < self.vocab_size)
        return torch.where(found, edges + 1, DEAD)

    def walk(self, prefixes: torch.Tensor, hold: bool = False) -> torch.Tensor:
        """From the root along whole prefixes: (M, t) tokens -> (M,) nodes, -1 where a prefix leads nowhere.

        Args:
            hold: a row that has reached its picture stays there, whatever follows (`generate` fills up with padding, and
                where the padding token is 0, beam search with end-of-sequence).
        """
        nodes = torch.full((len(prefixes),), ROOT, dtype=torch.int64, device=prefixes.device)
        for tokens in prefixes.unbind(1):
            following = self.step(nodes, tokens)
            nodes = torch.where(self.is_end(nodes), nodes, following) if hold else following
        return nodes

    def choices(self, sequences: torch.Tensor) -> torch.Tensor:
        """Among how many tokens each was chosen: (M, T) tokens of identifiers, negative behind their ends -> (M, T) how many
        children the node has that stands before it, 0 behind the end or where the prefix leads nowhere."""
        counts, before = torch.zeros_like(sequences), torch.full_like(sequences[:, 0], ROOT)
        for place, tokens in enumerate(sequences.unbind(1)):
            alive = before.clamp(min=0)
            children = self.child_offsets[alive + 1] - self.child_offsets[alive]
            counts[:, place] = torch.where((before >= 0) & (tokens >= 0), children, 0)
            before = self.step(before, tokens)
        return counts

    def is_end(self, nodes: torch.Tensor) -> torch.Tensor:
        """(M,) nodes -> (M,) bool: is this the node behind an end-of-sequence token?"""
        return (nodes >= 0) & (self.rows[nodes.clamp(min=0)] >= 0)

    def rows_of(self, nodes: torch.Tensor) -> torch.Tensor:
        """(M,) nodes -> (M,) rows of pictures, -1 where the node is not the end of an identifier."""
        return torch.where(nodes >= 0, self.rows[nodes.clamp(min=0)], -1)

    def children(self, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What may follow: (M,) nodes -> (index into nodes, token), both (all children,), nothing for a dead node."""
        alive = nodes.clamp(min=0)
        starts = self.child_offsets[alive]
        counts = torch.where(nodes >= 0, self.child_offsets[alive + 1] - starts, 0)
        index = torch.repeat_interleave(torch.arange(len(nodes), device=nodes.device), counts)
        before = counts.cumsum(0) - counts
        edges = torch.arange(len(index), device=nodes.device) + (starts - before)[index]
        return index, self.child_tokens[edges]
