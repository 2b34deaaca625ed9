"""Losses of a dual encoder: small free functions over a batch of embeddings, each with its paper.

Every function takes

    text_embeds   (B, D)  L2-normalised; row i is a caption of the picture in row i
    image_embeds  (B, D)  L2-normalised
    image_ids     (B,)    int64, equal for rows that show the same picture; None: every row is its own picture

and returns a scalar. With `image_ids`, two captions of one picture are not each other's negatives.
"""

import torch
from torch.nn import functional as F


def same_picture(image_ids: torch.Tensor) -> torch.Tensor:
    """(B,) ids -> (B, B) bool: True off the diagonal where two rows show the same picture."""
    same = image_ids[:, None] == image_ids[None, :]
    return same & ~torch.eye(len(image_ids), dtype=torch.bool, device=image_ids.device)


def paired_hinge_loss(text_embeds, image_embeds, image_ids=None, margin=0.5, reduction="mean"):
    """Each row's negative picture is that of its partner in the other half of the batch (Vokenization 2010.06775; Maria).

        sum_i max(0, margin - <t_i, v_i> + <t_i, v_partner(i)>),   partner(i) = (i + B/2) mod B

    Args: margin in units of cosine; reduction "sum" (Maria) or "mean" over the terms that count.
    Raises a `ValueError` when B is odd: there are no two halves.
    """
    batch_size = len(text_embeds)
    if batch_size % 2:
        raise ValueError(f"the paired hinge loss needs an even batch, this one has {batch_size} rows")
    negatives = image_embeds.roll(batch_size // 2, dims=0)  # (B, D) row i: the partner's picture
    positive = (text_embeds * image_embeds).sum(-1)  # (B,)
    negative = (text_embeds * negatives).sum(-1)  # (B,)
    terms = (margin - positive + negative).clamp(min=0)
    counts = torch.ones_like(terms)
    if image_ids is not None:  # a partner that shows the same picture is no negative
        counts = (image_ids != image_ids.roll(batch_size // 2)).to(terms.dtype)
    total = (terms * counts).sum()
    return total if reduction == "sum" else total / counts.sum().clamp(min=1)


def hinge_terms(text_embeds, image_embeds, image_ids, margin):
    """Hinge of every row against every negative, both ways.

    Returns (B, B) terms with caption i asking, (B, B) terms with picture i asking, and (B, B) bool: who is a negative.
    """
    scores = text_embeds @ image_embeds.T  # (B, B) caption x picture
    positive = scores.diagonal()[:, None]  # (B, 1)
    negatives = ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    if image_ids is not None:
        negatives &= ~same_picture(image_ids)
    by_caption = (margin - positive + scores).clamp(min=0) * negatives
    by_picture = (margin - positive + scores.T).clamp(min=0) * negatives
    return by_caption, by_picture, negatives


def hinge_loss(text_embeds, image_embeds, image_ids=None, margin=0.2, reduction="mean"):
    """Every other picture and every other caption of the batch is a negative (Kiros et al. 1411.2539; VSE++'s "SH").

    Args: as `paired_hinge_loss`; "mean" is over all 2 B (B - 1) terms that count.
    """
    by_caption, by_picture, negatives = hinge_terms(text_embeds, image_embeds, image_ids, margin)
    total = by_caption.sum() + by_picture.sum()
    return total if reduction == "sum" else total / (2 * negatives.sum()).clamp(min=1)


def hardest_hinge_loss(text_embeds, image_embeds, image_ids=None, margin=0.2, reduction="mean", hardness=1.0):
    """Only the hardest negative of the batch counts, in each direction (VSE++ 1707.05612, "MH").

    Args: hardness in [0, 1] mixes in `hinge_loss`: from a random start the hardest negative alone collapses all vectors
    into one, so training warms up from 0 to 1. "mean" is over the 2 B hardest terms.
    """
    by_caption, by_picture, negatives = hinge_terms(text_embeds, image_embeds, image_ids, margin)
    hardest = by_caption.amax(1).sum() + by_picture.amax(1).sum()
    if reduction == "mean":
        hardest = hardest / (2 * negatives.any(1).sum()).clamp(min=1)
    if hardness == 1.0:
        return hardest
    return hardness * hardest + (1 - hardness) * hinge_loss(text_embeds, image_embeds, image_ids, margin, reduction)


def info_nce_loss(text_embeds, image_embeds, image_ids=None, logit_scale=1.0):
    """Cross-entropy of the right row among all of the batch, both directions averaged (InfoNCE 1807.03748; CLIP 2103.00020).

    Args: logit_scale, the inverse temperature (a float or a scalar tensor).
    """
    logits = logit_scale * text_embeds @ image_embeds.T  # (B, B) caption x picture
    if image_ids is not None:
        logits = logits.masked_fill(same_picture(image_ids), float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sigmoid_loss(text_embeds, image_embeds, image_ids=None, logit_scale=10.0, logit_bias=-10.0):
    """Each caption-picture pair is a yes-or-no question of its own (SigLIP 2303.15343, algorithm 1).

    Args: logit_scale and logit_bias, the learned t' and b of the paper (floats or scalar tensors).
    """
    logits = logit_scale * text_embeds @ image_embeds.T + logit_bias  # (B, B)
    signs = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1  # +1 on the diagonal, -1 elsewhere
    terms = F.logsigmoid(signs * logits)
    if image_ids is not None:
        terms = terms.masked_fill(same_picture(image_ids), 0.0)
    return -terms.sum() / len(logits)
