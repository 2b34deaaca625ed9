"""How far a figure could be off by chance: intervals of 95 % from a bootstrap over the pictures asked for.

Captions of one picture are found or missed together, so they are drawn together (the cluster bootstrap: Davison and
Hinkley, "Bootstrap Methods and their Application", 1997, 2.4 and 3.8; the ends are percentiles of the draws). The
interval of `hits@1` is kept beside it as `hits@1_low` and `hits@1_high`: flat numbers, which trackers and JSON take.
"""

from collections.abc import Mapping, Sequence

import numpy as np

DRAWS = 2000
LOW, HIGH = "_low", "_high"
_INDICES = 2**22  # pictures drawn at once: 32 MiB of int64


def intervals(*folds: tuple[Sequence[float], Sequence], ks: Sequence[int] = (1, 5, 10), draws: int = DRAWS) -> dict:
    """The ends of the intervals of Hits@k and MRR. The same ranks always give the same ends.

    Args:
        folds: (ranks (Q,), of which infinite ones were not found; pictures (Q,), any names, the picture each query asks
            for, or tuples of all that are right). Of several folds the figures are means over the folds, each of which is
            drawn from by itself.

    Returns:
        `hits@k_low`, `hits@k_high` for each k, `mrr_low`, `mrr_high`; nothing where a fold asks for one picture alone.
        Where every query fares alike both ends are the figure itself, however few queries there are.
    """
    return intervals_of_sums(
        *(_by_picture(np.asarray(ranks, dtype=np.float64), pictures, ks) for ranks, pictures in folds),
        ks=ks,
        draws=draws,
    )


def intervals_of_sums(
    *folds: tuple[np.ndarray, np.ndarray], ks: Sequence[int] = (1, 5, 10), draws: int = DRAWS
) -> dict:
    """As `intervals`. Args: folds, (P, figures) sums over each picture's queries of what they add to Hits@k, for each k, and to
    MRR; and (P,) how many queries it has."""
    rng, drawn = np.random.default_rng(0), []
    for sums, counts in folds:
        if len(counts) < 2:
            return {}
        drawn.append(_resampled(sums, counts, draws, rng))
    ends = np.quantile(np.mean(drawn, axis=0), (0.025, 0.975), axis=0)  # (2, figures)
    names = [*(f"hits@{k}" for k in ks), "mrr"]
    return {f"{name}{end}": float(value) for end, row in zip((LOW, HIGH), ends, strict=True)
            for name, value in zip(names, row, strict=True)}  # fmt: skip


def interval_of(figures: Mapping, name: str) -> tuple[float, float] | None:
    """(low, high) of a figure, where they are known."""
    ends = figures.get(name + LOW), figures.get(name + HIGH)
    return None if None in ends else ends


def without_intervals(figures: Mapping) -> dict:
    """The figures themselves."""
    return {name: value for name, value in figures.items() if not name.endswith((LOW, HIGH))}


def _by_picture(ranks: np.ndarray, pictures: Sequence, ks: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """What `intervals_of_sums` takes of a fold."""
    names = pictures.tolist() if isinstance(pictures, np.ndarray) else list(pictures)
    place_of = {name: place for place, name in enumerate(sorted(set(names)))}
    owner = np.array([place_of[name] for name in names])
    added = np.stack([*(ranks <= k for k in ks), 1 / ranks], axis=1).astype(np.float64)  # (Q, figures)
    counts = np.bincount(owner).astype(np.float64)
    return np.stack([np.bincount(owner, weights=column) for column in added.T], axis=1), counts


def _resampled(sums: np.ndarray, counts: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws, figures): the figures of as many pictures, drawn with replacement. A block of draws at a time."""
    total, figures = len(counts), []
    step = max(1, _INDICES // total)
    for start in range(0, draws, step):
        size = min(step, draws - start)
        chosen = rng.integers(total, size=(size, total)) + total * np.arange(size)[:, None]
        times = np.bincount(chosen.ravel(), minlength=size * total).reshape(size, total).astype(np.float64)
        figures.append((times @ sums) / (times @ counts)[:, None])
    return np.concatenate(figures)
