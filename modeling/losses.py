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


def info_nce_loss(text_embeds, image_embeds, image_ids=None, logit_scale=1.0):
    """Cross-entropy of the right row among all of the batch, both directions averaged (InfoNCE 1807.03748; CLIP 2103.00020).

    Args: logit_scale, the inverse temperature (a float or a scalar tensor).
    """
    logits = logit_scale * text_embeds @ image_embeds.T  # (B, B) caption x picture
    if image_ids is not None:
        logits = logits.masked_fill(same_picture(image_ids), float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
