"""Which gallery rows may be among the k best: float32 products choose, so that few are left to be multiplied in float64.

For vectors of D numbers a float32 product differs from the true one by at most D u / (1 - D u) times the product of their
lengths, in any order of summing (u = 2⁻²⁴). So whoever is among the true k best has a float32 score within twice that of the k-th
best one. Rows are looked at in groups of 64, by their maximum: a group below the line costs a pass and nothing else.
"""

import torch

GROUP = 64
ROWS_AT_ONCE = 2**13
MOST = (
    2**20
)  # survivors of a block of queries; more, as where thousands of pictures are the same, are left to the plain search
UNIT = 2.0**-24


def margin(queries: torch.Tensor, gallery: torch.Tensor) -> float:
    """How far below the k-th best float32 score a row may stand that is among the true k best, scores rounded to float32."""
    width = queries.shape[1]
    lengths = float(queries.norm(dim=1).max()) * float(gallery.norm(dim=1).max())
    return 2.02 * (width * UNIT / (1 - width * UNIT) + 2 * UNIT) * lengths


def survivors(
    queries: torch.Tensor, gallery: torch.Tensor, k: int, within: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(query, row) of all that may be among the k best, in no order; None where they are too many.

    Args: queries (Q, D), gallery (N, D), float32, on the CPU; within, the `margin`.
    """
    best = torch.full((len(queries), k), -torch.inf)  # of different rows
    found, count = [], 0
    room = torch.empty(
        len(queries) * min(ROWS_AT_ONCE, len(gallery))
    )  # pages that are taken anew would cost more than the product
    for first in range(0, len(gallery), ROWS_AT_ONCE):
        part = gallery[first : first + ROWS_AT_ONCE]
        scores = torch.mm(queries, part.T, out=room[: len(queries) * len(part)].view(len(queries), len(part)))
        groups = scores.shape[1] // GROUP
        grouped = scores[:, : groups * GROUP].unflatten(1, (GROUP, groups))  # row r is in group r % groups
        maxima = torch.cat([grouped.amax(1), scores[:, groups * GROUP :]], 1) if groups else scores
        best = torch.cat([best, maxima], 1).topk(k).values
        line = best[:, -1:] - within
        query, group = torch.nonzero(maxima >= line, as_tuple=True)
        if GROUP * len(query) > 8 * MOST:
            return None
        rows = group[:, None] + groups * torch.arange(GROUP)
        rows = torch.where(
            group[:, None] < groups, rows, groups * (GROUP - 1) + group[:, None]
        )  # the rest: alone, GROUP times
        own = scores[query[:, None], rows]
        own[(group >= groups), 1:] = -torch.inf
        hit, place = torch.nonzero((own >= line[query]) & (own > -torch.inf), as_tuple=True)
        found.append((query[hit], rows[hit, place] + first, own[hit, place]))
        count += len(hit)
        if count > MOST:
            return None
    query, row, score = map(torch.cat, zip(*found, strict=True))
    stays = score >= best[query, -1] - within
    return query[stays], row[stays]
