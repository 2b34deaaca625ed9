"""The prefix tree of all identifiers as flat arrays, walked for a whole batch of beams at once.

The layout is compressed sparse rows with the nodes numbered breadth first, so that the edge `e` leads to the node `e + 1`
and no array of targets is needed (the same idea as STATIC, arXiv 2602.22647):

    child_offsets (nodes + 1,)  the edges of node n are child_offsets[n] .. child_offsets[n + 1] - 1
    child_tokens  (nodes - 1,)  the token on each edge, ascending among the edges of one node
    rows          (nodes,)      the picture's row at the node behind its end-of-sequence token, -1 elsewhere
"""

import numpy as np
import torch

ROOT, DEAD = 0, -1


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
        self._copies = {rows.device: self}

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
            self._copies[device] = IdentifierTrie(*(t.to(device) for t in self.arrays))
            self._copies[device]._copies = self._copies
        return self._copies[device]

    @property
    def arrays(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.child_offsets, self.child_tokens, self.rows

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
