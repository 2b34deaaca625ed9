"""Hits@k, MRR, median rank and intervals of queries that come one after another: memory grows with the gallery, not with them."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from imagedex.evaluation.intervals import intervals_of_sums
from imagedex.metrics.hits_at_k.hits_at_k import summarize_ranks


class Figures:
    """What ranks add up to. Args: ks, the cut-offs."""

    def __init__(self, ks: Sequence[int] = (1, 5, 10)):
        self.ks = tuple(ks)
        self._ranks: Counter[float] = Counter()
        self._pictures: dict[str | tuple, np.ndarray] = {}  # (len(ks) + 2,): hits at each k, reciprocal ranks, queries

    def __len__(self) -> int:
        return self._ranks.total()

    def add(self, rank: float, picture: str | tuple) -> None:
        """Args: rank, `math.inf` where it was not found; picture, the one asked for (or all that are right)."""
        self._ranks[rank] += 1
        sums = self._pictures.setdefault(picture, np.zeros(len(self.ks) + 2))
        sums += [*(rank <= k for k in self.ks), 1 / rank, 1]

    def summary(self) -> dict[str, float]:
        """See `summarize_ranks`."""
        return summarize_ranks(list(self._ranks), self.ks, list(self._ranks.values()))

    def intervals(self) -> dict[str, float]:
        """See `imagedex.evaluation.intervals.intervals`."""
        rows = np.stack([self._pictures[picture] for picture in sorted(self._pictures)])
        return intervals_of_sums((rows[:, :-1], rows[:, -1]), ks=self.ks)
