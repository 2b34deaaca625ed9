"""Beam search for identifiers: the beams of `generate` under a constraint, without what `generate` does in vain.

Every beam stands at a node of the trie and is scored by that node's children alone. There are no more beams than nodes of their
depth, the first step has one; where nothing is to be chosen any more, one pass scores all that is left. Which step has how
many beams and children is known from the trie: on an accelerator the search never waits for the device where all identifiers
are of one length, and otherwise only from the depth on at which the first ones have ended.
"""

import torch
from torch.nn import functional as F

from .beam_decoder import BeamDecoder
from .identifier_trie import DEAD, ROOT, IdentifierTrie

LOGITS_AT_ONCE = {"cpu": 2**20}  # so many stay in the processor's caches
ON_ACCELERATORS = 2**28


class Scores:
    """Log-probabilities of tokens, from the decoder's last states.

    Args:
        over: "vocabulary", what `generate` gives: the logarithm of the softmax over all words of the model; or "children": over
            the children of the node alone, so that of all words only those that stand at this depth are scored. The sum over
            a node's children is then 1, whatever the model thinks of words that no identifier has there.
    """

    def __init__(self, model, trie: IdentifierTrie, over: str):
        self.output, self.trie, self.over = model.lm_head, trie, over
        self.whole = not plain(self.output)

    def of_children(self, states: torch.Tensor, nodes: torch.Tensor, depth: int) -> torch.Tensor:
        """States (B, R, d_model) at nodes (B, R), or (1, R) where all queries stand at the same ones -> (B, R, C), the children
        in their order in the trie, -inf where there is none."""
        tokens, there = self.trie.following(nodes, self.trie.levels[depth].width)
        words = self.trie.words(depth)
        logits, total = self.logits(states, words)
        places = tokens - words.start if isinstance(words, slice) else torch.searchsorted(words, tokens)
        places = torch.where(there, places, 0).expand(len(states), -1, -1)
        scores = logits.gather(2, places).masked_fill(~there, -torch.inf)
        return scores.log_softmax(2).masked_fill(~there, -torch.inf) if total is None else scores - total

    def logits(self, states: torch.Tensor, words: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of these words (B, R, words), and the logsumexp of all words (B, R, 1), which the children's score needs not."""
        if self.whole:
            logits = self.output(states).float()
            return logits[..., words], logits.logsumexp(-1, keepdim=True) if self.over == "vocabulary" else None
        logits = F.linear(states, self.output.weight[words]).float()
        return logits, self.logsumexp(states) if self.over == "vocabulary" else None

    def logsumexp(self, states: torch.Tensor) -> torch.Tensor:
        """(B, R, d_model) -> (B, R, 1) of the logits of all words, some words after the others."""
        at_once = max(1, LOGITS_AT_ONCE.get(states.device.type, ON_ACCELERATORS) // states[..., 0].numel())
        parts = []
        for words in self.output.weight.split(at_once):
            logits = F.linear(states, words).float()
            most = logits.amax(-1, keepdim=True)
            parts.append(logits.sub_(most).exp_().sum(-1, keepdim=True).log_().add_(most))
        return torch.cat(parts, dim=-1).logsumexp(-1, keepdim=True)

    def of_tokens(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """States (B, R, L, d_model) and tokens (B, R, L) -> log-probabilities over the vocabulary (B, R, L)."""
        states = states.flatten(1, 2)
        if self.whole:
            scores = self.output(states).float().log_softmax(-1).gather(2, tokens.flatten(1)[..., None])
        else:
            weight = self.output.weight[tokens.flatten(1)]  # (B, R * L, d_model)
            scores = (weight[..., None, :] @ states[..., None])[..., 0].float() - self.logsumexp(states)
        return scores.view(tokens.shape)


def plain(layer: torch.nn.Module) -> bool:
    """Whether a layer is its weight alone. What an adapter, a quantised weight or a hook makes of it, only the whole of it
    knows."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return type(layer) is torch.nn.Linear and type(layer.weight) is torch.nn.Parameter and not hooked


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
        over: see `Scores`.

    Returns: scores (B, num_beams) float32, descending, and rows (B, num_beams); -inf and -1 where no more were found. NaN where
        the model gives NaN.
    """
    levels, queries, device = trie.levels, len(states), states.device
    decoder = BeamDecoder(model, states, mask, num_beams * len(levels))
    scores, found = Scores(model, trie, over), Found(queries, num_beams, device)
    nodes = torch.full((queries, 1), ROOT, device=device)
    tokens, parents = torch.full_like(nodes, start_token_id), torch.zeros_like(nodes)
    totals = torch.zeros(queries, 1, device=device)
    for depth, level in enumerate(levels):
        looks = not asynchronous(device) or depth >= trie.shortest
        if looks and not (totals[:, 0] > found.scores[:, -1]).any():
            break  # a score only falls as it goes on
        length = forced(trie, level, nodes, looks)
        if length:
            found.add(*finish(decoder, scores, nodes, tokens, parents, totals, length))
            break
        states = decoder(tokens[..., None], parents)[:, :, 0]
        gains = scores.of_children(states, nodes if depth else nodes[:1], depth)  # (B, R, C)
        candidates = (totals[..., None] + gains).flatten(1)
        best, places = candidates.topk(min(2 * num_beams, candidates.shape[1]))
        beams = places // level.width
        reached = trie.child_offsets[nodes.gather(1, beams)] + places % level.width + 1
        # where fewer go on than there are beams, the rest of them stand at no node: no child, no score
        reached = torch.where(best == -torch.inf, DEAD, reached)
        if (
            level.ends
        ):  # of the ends only those among the first beams count, as in `generate`; the others go on without them
            rows = trie.rows[reached]
            found.add(best[:, :num_beams], rows[:, :num_beams])
            best = best.masked_fill(rows >= 0, -torch.inf)
        if depth + 1 < len(levels):
            totals, kept = best.topk(min(num_beams, levels[depth + 1].inner, best.shape[1]))
            nodes, parents = reached.gather(1, kept), beams.gather(1, kept)
            tokens = trie.child_tokens[nodes - 1]
    return found.scores, found.rows


def asynchronous(device: torch.device) -> bool:
    """Whether one has to wait for the device to learn what it has computed."""
    return device.type != "cpu"


def forced(trie: IdentifierTrie, level, nodes: torch.Tensor, looks: bool) -> int:
    """How many tokens are still to come where no beam has a choice any more, 0 where one has.

    Args: looks, whether the nodes may be looked at, which an accelerator would have to be waited for.
    """
    if level.tail or not looks:
        return level.tail
    tails = trie.tails[nodes]
    return int(tails.max()) if tails.min() > 0 else 0


def finish(decoder: BeamDecoder, scores: Scores, nodes, tokens, parents, totals, length: int):
    """The scores (B, R) and rows (B, R) of beams without a choice, all their tokens in one pass.

    Args: nodes, tokens, parents, totals, (B, R) of the beams; length, the most tokens that are still to come.
    """
    following, ends = scores.trie.tail(nodes, length)  # (B, R, L)
    if scores.over == "vocabulary":  # among children, where there is no choice, nothing is added
        tokens = torch.cat([tokens[..., None], following[..., :-1].clamp(min=0)], dim=2)
        gains = scores.of_tokens(decoder(tokens, parents), following.clamp(min=0))
        totals = totals + torch.where(following >= 0, gains, 0).sum(2)
    return totals, scores.trie.rows[ends]
