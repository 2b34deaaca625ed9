"""Beam search for identifiers: the beams of `generate` under a constraint, without what `generate` does in vain.

Every beam stands at a node of the trie and is scored by that node's children alone. There are no more beams than nodes of their
depth, the first step has one; where nothing is to be chosen any more, one pass scores all that is left. Which step has how
many beams and children is known from the trie: on an accelerator the search never waits for the device where all identifiers
are of one length, and otherwise only from the depth on at which the first ones have ended.
"""

import torch
from torch.nn import functional as F

from .beam_decoder import BeamDecoder
from .identifier_trie import ROOT, IdentifierTrie

BLOCK = {"cpu": 2**22}  # logits at once: larger ones leave the caches, and each pass pays for fresh pages
ACCELERATOR_BLOCK = 2**28


class Children:
    """Log-probabilities of children, from the decoder's last states.

    Args:
        over: "vocabulary", what `generate` gives: the logarithm of the softmax over all words of the model; or "children": over
            the children of the node alone, so that of all words only those that stand at this depth are scored. The sum over
            a node's children is then 1, whatever the model thinks of words that no identifier has there.
    """

    def __init__(self, model, trie: IdentifierTrie, over: str):
        self.output, self.trie, self.over = model.lm_head, trie, over

    @property
    def short(self) -> bool:
        """Whether some words are scored without the others. What an adapter adds, only the whole layer knows."""
        return self.over == "children" and type(self.output) is torch.nn.Linear and self.output.bias is None

    def __call__(self, states: torch.Tensor, nodes: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        """States (B, R, d_model) at nodes (B, R) -> scores (B, R, C), -inf where there is no child, and edges (B, R, C)."""
        edges, there = self.trie.edges(nodes, self.trie.levels[depth].width)
        tokens = self.trie.child_tokens[edges]
        if self.short:
            words = self.trie.words(depth)
            weight = self.output.weight[words]
            places = tokens - words.start if isinstance(words, slice) else torch.searchsorted(words, tokens)
            scores = F.linear(states, weight).float().gather(2, places.clamp_(0, len(weight) - 1))
        else:
            scores = self.of_tokens(states.flatten(0, 1), tokens.flatten(0, 1)).view(tokens.shape)
        scores = scores.masked_fill(~there, -torch.inf)
        return scores if self.over == "vocabulary" else scores.log_softmax(2), edges

    def of_tokens(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """States (N, d_model) and tokens (N, C) -> their log-probabilities over the full vocabulary (N, C) float32."""
        block = BLOCK.get(states.device.type, ACCELERATOR_BLOCK)
        parts = -(-len(states) * self.output.out_features // block)
        scores = []
        for some, own in zip(states.tensor_split(parts), tokens.tensor_split(parts), strict=True):
            logits = self.output(some).float()
            scores.append(logits.gather(1, own) - logits.logsumexp(1, keepdim=True))
        return torch.cat(scores)


class Found:
    """The best whole identifiers of B queries so far: scores (B, K) descending, rows (B, K); -inf and -1 where none is yet."""

    def __init__(self, queries: int, count: int, device):
        self.scores = torch.full((queries, count), -torch.inf, device=device)
        self.rows = torch.full((queries, count), -1, device=device)

    def add(self, scores: torch.Tensor, rows: torch.Tensor) -> None:
        """(B, M) scores and rows; those whose row is -1 are left out."""
        scores = torch.cat([self.scores, scores.masked_fill(rows < 0, -torch.inf)], dim=1)
        self.scores, places = scores.topk(self.scores.shape[1])
        self.rows = torch.cat([self.rows, rows], dim=1).gather(1, places).masked_fill(self.scores == -torch.inf, -1)


@torch.no_grad()
def search_identifiers(
    model, trie: IdentifierTrie, states, mask, num_beams: int, start_token_id: int, over="vocabulary"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best identifiers for B queries.

    Args:
        model: a T5ForConditionalGeneration, in evaluation mode. trie: on its device.
        states: (B, S, d_model) what its encoder gave. mask: (B, S) or None.
        num_beams: no more than there are identifiers.
        over: see `Children`.

    Returns: scores (B, num_beams) float32, descending, and rows (B, num_beams); -inf and -1 where no more were found. NaN where
        the model gives NaN.
    """
    levels, queries, device = trie.levels, len(states), states.device
    decoder = BeamDecoder(model, states, mask, num_beams * len(levels))
    children, found = Children(model, trie, over), Found(queries, num_beams, device)
    nodes = torch.full((queries, 1), ROOT, device=device)
    tokens, parents = torch.full_like(nodes, start_token_id), torch.zeros_like(nodes)
    totals = torch.zeros(queries, 1, device=device)
    for depth, level in enumerate(levels):
        looks = device.type == "cpu" or depth >= trie.shortest
        if looks and not (totals[:, 0] > found.scores[:, -1]).any():
            break  # a score only falls as it goes on
        length = forced(trie, level, nodes, looks)
        if length:
            found.add(*finish(decoder, children, nodes, tokens, parents, totals, length))
            break
        gains, edges = children(decoder(tokens[..., None], parents)[:, :, 0], nodes, depth)
        candidates = (totals[..., None] + gains).flatten(1)
        best, places = candidates.topk(min(2 * num_beams, candidates.shape[1]))
        reached = edges.flatten(1).gather(1, places) + 1
        if level.ends:  # of the ends only those among the first beams count, as in `generate`; the others go on without them
            rows = trie.rows[reached]
            found.add(best[:, :num_beams], rows[:, :num_beams])
            best = best.masked_fill(rows >= 0, -torch.inf)
        if depth + 1 < len(levels):
            totals, kept = best.topk(min(num_beams, levels[depth + 1].inner, best.shape[1]))
            nodes, parents = reached.gather(1, kept), places.gather(1, kept) // level.width
            tokens = trie.child_tokens[nodes - 1]
    return found.scores, found.rows


def forced(trie: IdentifierTrie, level, nodes: torch.Tensor, looks: bool) -> int:
    """How many tokens are still to come where no beam has a choice any more, 0 where one has.

    Args: looks, whether the nodes may be looked at, which an accelerator would have to be waited for.
    """
    if level.tail or not looks:
        return level.tail
    tails = trie.tails[nodes]
    return int(tails.max()) if tails.min() > 0 else 0


def finish(decoder, children: Children, nodes, tokens, parents, totals, length: int):
    """The scores (B, R) and rows (B, R) of beams without a choice, all their tokens in one pass.

    Args: nodes, tokens, parents, totals, (B, R) of the beams; length, the most tokens that are still to come.
    """
    following, ends = children.trie.tail(nodes, length)  # (B, R, L)
    if children.over == "vocabulary":
        written = torch.cat([tokens[..., None], following[..., :-1].clamp(min=0)], dim=2)
        states = decoder(written, parents)
        scores = children.of_tokens(states.flatten(0, 2), following.clamp(min=0).view(-1, 1)).view(following.shape)
        totals = totals + torch.where(following >= 0, scores, 0).sum(2)
    return totals, children.trie.rows[ends]
