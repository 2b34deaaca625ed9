"""Patch states become words: which patches are taken, which word each of them is, and the learned form of that choice.

No size depends on what is in a tensor (but for `merged_positions`, whose rows are cut), so that torch.compile makes one graph.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .towers import unsharded

EVALUATION_DRAW = 0  # seed of the one random draw that evaluation uses for every picture
NEAREST_PATCHES = 2048  # compared at a time: patches x words numbers have to fit in memory
ENTROPY_TEMPERATURE = 0.02  # of the softmax over cosines; at 0.05 the penalty hardly opens the codebook
ENTROPY_PATCHES = 1024  # patches of a batch that the penalty looks at, for the same reason


def even_positions(patches: int, count: int, device=None) -> torch.Tensor:
    """(min(count, patches),) positions, the middles of `count` equal stretches; all of them where there are fewer."""
    if patches <= count:
        return torch.arange(patches, device=device)
    return ((torch.arange(count, device=device) + 0.5) * (patches / count)).long()


def places_first(mask: torch.Tensor) -> torch.Tensor:
    """(..., P) bool -> (..., P) int64: where it is true, in order, then where it is not."""
    return (~mask).to(torch.uint8).argsort(dim=-1, stable=True)


@torch.compiler.assume_constant_result
def evaluation_draw(patches: int, count: int) -> list[int]:
    """`count` of `patches` positions, always the same ones."""
    return torch.randperm(patches, generator=torch.Generator().manual_seed(EVALUATION_DRAW))[:count].tolist()


def random_positions(rows: int, patches: int, count: int, training: bool, device=None) -> torch.Tensor:
    """(rows, min(count, patches)) positions without repeats, in raster order, so that relative positions mean something.

    In training each row has a draw of its own; in evaluation all rows share one that never changes.
    """
    count = min(count, patches)
    if training:
        drawn = torch.rand(rows, patches, device=device).argsort(1)[:, :count]
    else:
        drawn = torch.tensor(evaluation_draw(patches, count), device=device).expand(rows, count)
    return drawn.sort(1).values


def merged_positions(words: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First patch of every run of equal words, at most `count` a row; of more runs, evenly spaced ones.

    Args: words (B, P), the word of every patch in raster order.
    Returns positions (B, K) and which of them count (B, K) bool, K <= count: a row with fewer runs is shorter.
    """
    patches = words.shape[1]
    first = torch.ones_like(words, dtype=torch.bool)
    first[:, 1:] = words[:, 1:] != words[:, :-1]
    runs = first.sum(1, keepdim=True)  # (B, 1)
    starts = places_first(first)  # (B, P)
    slots = torch.arange(min(count, patches), device=words.device)[None, :]
    spread = ((slots + 0.5) * runs / count).long()
    kept = slots < runs
    chosen = torch.where(runs > count, spread, slots).clamp(max=patches - 1)
    longest = int(kept.sum(1).max())
    return starts.gather(1, chosen)[:, :longest], kept[:, :longest]


def nearest_words(states: torch.Tensor, words: torch.Tensor, special: list[int]) -> torch.Tensor:
    """Token id of the word nearest by cosine.

    Args: states (rows, ..., D); words (W, D), row i is token i; special, ids that are no words.
    Returns (rows, ...) int64. No gradient passes. In float32: in half precision near ties would fall one way or the other.
    """
    with torch.no_grad(), torch.autocast(states.device.type, enabled=False):
        words = F.normalize(words.float(), dim=-1)
        nearest = []
        for rows in F.normalize(states.float(), dim=-1).flatten(0, -2).split(NEAREST_PATCHES):
            cosines = rows @ words.T  # (rows, W)
            cosines[:, special] = float("-inf")
            nearest.append(cosines.argmax(-1))
        return torch.cat(nearest).view(states.shape[:-1])


def codebook_statistics(
    visual_token_ids: torch.Tensor, num_tokens: int, special: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much of the codebook is in use (VQ-VAE's perplexity).

    Args: visual_token_ids, of any shape; what is not below num_tokens, or is in `special`, is no word and does not count.
    Returns perplexity, exp of the entropy in nats, between 1 and the number of words; and the share of words used at least once.
    """
    ids = visual_token_ids.flatten()
    counts = torch.zeros(num_tokens, device=ids.device)
    counts = counts.scatter_add(0, ids.clamp(max=num_tokens - 1), (ids < num_tokens).float())
    counts[special] = 0
    shares = counts / counts.sum().clamp(min=1)
    return (-torch.xlogy(shares, shares).sum()).exp(), (counts > 0).sum() / (num_tokens - len(set(special)))


def unused_codebook(cosines: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Nats of the codebook that are not in use: log W minus the information that a patch gives about its word. 0 to log W.

    H(word) - H(word | patch), each patch's words softly by softmax: small where every patch is sure of its word and all words
    are somebody's (the entropy penalty of MAGVIT-v2, 2310.05737, with a constant added).

    Args: cosines (patches, W); weights (patches,) of the patches in the means, 1 in all.
    """
    logs = (cosines / ENTROPY_TEMPERATURE).log_softmax(1)  # (patches, W)
    of_a_patch = -weights @ (logs.exp() * logs).sum(1)
    shares = weights @ logs.exp()
    of_all = -(
        shares * shares.clamp(min=1e-12).log()
    ).sum()  # a share may be 0, and the logarithm's gradient must not be
    return math.log(cosines.shape[1]) - of_all + of_a_patch


class FixedCodebook(nn.Module):
    """The word embeddings as they were at the start: T5's own move in training, and the words of a picture must not.

    `words` (W, word width) float32, row i is token i; saved with the model, never trained. A parameter and not a buffer, so that
    FSDP shards it and no step of data parallel training sends it around.
    """

    def __init__(self, num_words: int, word_width: int):
        super().__init__()
        self.words = nn.Parameter(torch.empty(num_words, word_width, dtype=torch.float32), requires_grad=False)

    def train(self, mode: bool = True):
        """As `nn.Module.train`; the words stay frozen, also where `from_pretrained` has made the parameter anew."""
        self.words.requires_grad_(False)
        return super().train(mode)

    def forward(self, states: torch.Tensor, special: list[int]) -> torch.Tensor:
        """(..., word width) -> (...) token ids of the nearest words."""
        return nearest_words(states, unsharded(self.words), special)


class CodebookProjection(nn.Linear):
    """A layer into the space where patches and words meet; it starts orthogonal. A class of its own, because transformers asks
    `_init_weights` only for modules that have parameters of their own."""


class LearnedCodebook(nn.Module):
    """Patch states and words meet in a space of their own (VQ-VAE 1711.00937; into a language model's words: LQAE 2302.00902).

    The nearest word there is chosen, and T5 reads that word's embedding, nothing else. Backwards the choice is passed
    straight through: the gradient that T5 has for the word reaches the patch as if the patch had been the word. Two losses of
    squared distance between unit vectors: the codebook's moves the words' projection (never the words, they keep their
    meaning), the commitment loss moves the patches'. Alone, they end with a dozen words for all pictures, so a third,
    `unused_codebook`, keeps many words in use.
    """

    def __init__(
        self,
        vision_width: int,
        word_width: int,
        projection_dim: int,
        commitment_cost: float = 0.25,
        entropy_weight: float = 1.0,
    ):
        super().__init__()
        self.vision_projection = CodebookProjection(vision_width, projection_dim)
        self.word_projection = CodebookProjection(word_width, projection_dim, bias=False)
        self.commitment_cost, self.entropy_weight = commitment_cost, entropy_weight

    def projected(self, states: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches (..., vision width) and words (W, word width) -> both in projection_dim; no gradient reaches the words.

        Each in its layer's own dtype: T5 in float16 keeps every parameter in float32 whose name has "wo" in it, and so
        `word_projection`.
        """
        sides = (self.vision_projection, states), (self.word_projection, words.detach())
        return tuple(layer(side.to(layer.weight.dtype)) for layer, side in sides)

    def nearest(self, states: torch.Tensor, words: torch.Tensor, special: list[int]) -> torch.Tensor:
        """(..., vision width) -> (...) token ids."""
        return nearest_words(*self.projected(states, words), special)

    def forward(self, states: torch.Tensor, words: torch.Tensor, special: list[int], kept: torch.Tensor):
        """
        Args: states (B, K, vision width); words (W, word width), no gradient reaches them; kept (B, K) bool: which count.
        Returns ids (B, K); a path (B, K, word width), all zeros, to be added to the words' embeddings: it carries their
        gradient to the patches; the loss, a scalar.
        """
        projected = self.projected(states, words)
        ids = nearest_words(*projected, special)  # (B, K)
        patches, vocabulary = (F.normalize(side.float(), dim=-1) for side in projected)
        # The transpose of the words' projection leads back to the words' space (it starts orthogonal), at the word's length.
        length = projected[1].detach()[ids].float().norm(dim=-1, keepdim=True)
        back = self.word_projection.weight.detach().float()  # (projection_dim, word width)
        with torch.autocast(states.device.type, enabled=False):
            path = ((patches - patches.detach()) * length @ back).to(words.dtype)
            flat = (side.flatten(0, 1) for side in (patches, vocabulary[ids], kept))
            loss = self.loss(*flat, vocabulary, special)
        return ids, path, loss

    def loss(self, patches, chosen, kept, vocabulary, special: list[int]) -> torch.Tensor:
        """Unit vectors: patches and the words chosen for them (R, projection_dim), all words (W, projection_dim); kept (R,)."""
        weights = kept / kept.sum()
        codebook = weights @ (patches.detach() - chosen).square().sum(-1)
        commitment = weights @ (patches - chosen.detach()).square().sum(-1)
        loss = codebook + self.commitment_cost * commitment
        if self.entropy_weight:
            # Of the patches that count `even_positions`, all of them where they are fewer.
            slots, count = torch.arange(min(len(patches), ENTROPY_PATCHES), device=kept.device), kept.sum()
            spread = ((slots + 0.5) * (count / ENTROPY_PATCHES)).long()
            seen = places_first(kept)[torch.where(count > ENTROPY_PATCHES, spread, slots)]
            is_word = torch.ones(len(vocabulary), dtype=torch.bool, device=vocabulary.device)
            is_word[special] = False
            words = vocabulary[places_first(is_word)[: len(vocabulary) - len(set(special))]]
            weights = kept[seen] / kept[seen].sum()
            loss = loss + self.entropy_weight * unused_codebook(patches[seen] @ words.T, weights)
        return loss
