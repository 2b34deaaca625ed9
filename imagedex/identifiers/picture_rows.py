"""From what a picture looks like to the row of its identifier's token: a linear map, fitted in closed form.

A T5 scores a token by the product of a state and the token's row, so rows are the weights of a linear classifier, and those of a
picture that nobody described can be predicted from its vector, as zero-shot learning predicts classifiers (DeViSE 2013; Elhoseiny
et al. 2013). How much the map is held back is chosen by leaving out one known picture at a time.
"""

import torch
from torch.nn import functional as F

RIDGES = tuple(10.0**power for power in range(-4, 4))  # next to the mean variance of the vectors
# Of the usual distance from the mean row: what is guessed speaks a little lower than what was learned. At 1 more new pictures are
# found (0.57 instead of 0.49 among the first ten, of 100 among 900), and two or three of a hundred trained ones lose their
# place to them.
LOUDNESS = 0.9
LEAST_KNOWN = 8  # pictures whose rows are known; from fewer nothing can be learned


def predicted_rows(known_vectors, known_rows, new_vectors) -> tuple[torch.Tensor, float]:
    """Rows of new pictures, nearly (`LOUDNESS`) as far from the mean row as those of known pictures are on average.

    Ridge regression (Hoerl and Kennard, 1970) between what is left after the means.

    Args:
        known_vectors (K, D), known_rows (K, W): of pictures that have a row; new_vectors (M, D), of those that need one.

    Returns: (M, W) float32; and the mean cosine, over the known pictures, between what sets a row apart from the mean row and
    what the map says of it when that picture is left out: 0 where vectors say nothing of rows, 1 where they say all.
    Raises: a `ValueError` with fewer than `LEAST_KNOWN` known pictures.
    """
    vectors, rows, new = (torch.as_tensor(part).double() for part in (known_vectors, known_rows, new_vectors))
    if len(vectors) < LEAST_KNOWN:
        raise ValueError(f"{len(vectors)} pictures with a known row are too few to predict others from")
    middle, centre = vectors.mean(0), rows.mean(0)
    left, values, right = torch.linalg.svd(vectors - middle, full_matrices=False)  # (K, R), (R,), (R, D)
    targets, projected = rows - centre, left.T @ (rows - centre)  # (K, W), (R, W)
    best, chosen = -2.0, None
    for ridge in RIDGES:
        kept = values.square() / (values.square() + ridge * values.square().sum() / len(vectors) + 1e-12)  # (R,)
        leverage = (left.square() @ kept + 1 / len(vectors)).clamp(max=1 - 1e-6)  # (K,), the mean counted
        fitted = left @ (kept[:, None] * projected)
        left_out = targets - (targets - fitted) / (1 - leverage)[:, None]  # as if each had not been there
        cosine = F.cosine_similarity(left_out, targets).mean().item()
        if cosine > best:
            best, chosen = cosine, kept / values.clamp_min(1e-12)
    away = (new - middle) @ right.T @ (chosen[:, None] * projected)
    usual = LOUDNESS * targets.norm(dim=1).mean()
    return (centre + usual * F.normalize(away, dim=1)).float(), best
