"""k-means with k-means++ starts, seeded, and the two quantizers built from it: hierarchical and residual k-means."""

import torch
from tqdm.auto import tqdm

from imagedex.modeling.identifier_quantizers import KMeansTree, ResidualQuantizer, nearest

SAME = 1e-6  # points nearer than this share of the largest squared distance from the mean count as one point
POINTS_PER_CENTROID, LEAST_POINTS = 256, 2**14  # more points than this do not make the centroids better
CHEAP = 2**20  # points times clusters up to which several tries cost nothing worth mention
SETTLED = 1e-4  # Lloyd's steps end when the inertia falls by less than this share


def k_means(
    points: torch.Tensor, k: int, generator: torch.Generator, tries: int = 10, max_steps: int = 100
) -> torch.Tensor:
    """Lloyd's algorithm from greedy k-means++ starts (Arthur and Vassilvitskii 2007), the best of some tries (one where many
    points make it long).

    A cluster that runs empty starts again at the point that is farthest from its centroid.

    Args:
        points: (N, D) float32. Of very many, a random part decides where the centroids are.
        k: clusters at most.
        generator: on the CPU; the same seed gives the same centroids.

    Returns:
        (k, D) centroids, fewer when there are fewer different points (one row for points that are all the same).
    """
    limit = max(LEAST_POINTS, POINTS_PER_CENTROID * k)
    if len(points) > limit:
        points = points[torch.randperm(len(points), generator=generator)[:limit].sort().values]
    middle = points.mean(0)
    points = points - middle  # small numbers keep squared distances exact
    same = SAME * points.square().sum(1).max()
    best, least = points[:1], torch.inf
    for _ in range(tries if 1 < k <= CHEAP // len(points) else 1):
        centroids = _lloyd(points, _plus_plus(points, k, same, generator), same, max_steps)
        inertia = nearest(points, centroids)[1].sum()
        if inertia < least:
            best, least = centroids, inertia
    return best + middle


def _plus_plus(points: torch.Tensor, k: int, same: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Starts far from each other: each is the best of a few points drawn by their squared distance to the starts so far."""
    candidates = 2 + k.bit_length()
    chosen = points[torch.randint(len(points), (1,), generator=generator)]
    squares = points.square().sum(1)

    def distances_to(centres):  # (C, D) -> (C, N)
        away = torch.addmm(squares, centres, points.T, alpha=-2) + centres.square().sum(1, keepdim=True)
        return torch.where(away > same, away, 0.0)

    distances = distances_to(chosen)[0]
    while len(chosen) < k and distances.max() > 0:
        drawn = points[torch.multinomial(distances, candidates, replacement=True, generator=generator)]
        reduced = torch.minimum(distances_to(drawn), distances)
        winner = int(reduced.sum(1).argmin())
        chosen, distances = torch.cat([chosen, drawn[winner : winner + 1]]), reduced[winner]
    return chosen


def _lloyd(points: torch.Tensor, centroids: torch.Tensor, same: torch.Tensor, max_steps: int) -> torch.Tensor:
    """Assign, average, until that changes little; only clusters that hold a point come back."""
    before = torch.inf
    for _ in range(max_steps):
        codes, distances = nearest(points, centroids)
        inertia = distances.sum().item()
        if inertia >= (1 - SETTLED) * before:
            break
        before = inertia
        counts = torch.bincount(codes, minlength=len(centroids))
        sums = torch.zeros_like(centroids).index_add_(0, codes, points)
        centroids = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids)
        empty = (counts == 0).nonzero().flatten()
        if len(empty):
            farthest = distances.topk(len(empty)).indices
            usable = distances[farthest] > same
            centroids[empty[usable]] = points[farthest[usable]]
    counts = torch.bincount(nearest(points, centroids)[0], minlength=len(centroids))
    return centroids[counts > 0]


def fit_k_means_tree(
    vectors: torch.Tensor, branches: int = 10, leaf_size: int = 100, seed: int = 0
) -> tuple[KMeansTree, torch.Tensor]:
    """Hierarchical k-means as in DSI (2202.06991, section 3.2): clusters of more than `leaf_size` are clustered again.

    Works breadth first with a queue. A cluster is split only if that gives at least two parts, so it always ends; vectors
    that are all the same stay together, and only such a leaf may hold more than `leaf_size`.

    Args:
        vectors: (N, D) float32.
        branches: clusters of a node at most. leaf_size: vectors of a leaf at most.

    Returns:
        the tree; the leaf of each vector, (N,) int64, the same that `KMeansTree.encode` gives.
    """
    generator = torch.Generator().manual_seed(seed)
    members = [torch.arange(len(vectors))]  # of each node, breadth first; None once it is split
    leaf = torch.zeros(len(vectors), dtype=torch.int64)
    offsets, centroids = [0], []
    progress = tqdm(
        total=len(vectors), desc="Hierarchical k-means", unit="vector", disable=len(vectors) < 20_000 or None
    )
    node = 0
    while node < len(members):
        own, members[node] = members[node], None
        parts, centres = [], None
        if len(own) > leaf_size:
            parts, centres = _split(vectors[own], branches, generator, tries=3 if node else 10)  # the root weighs most
        if len(parts) > 1:
            members += [own[part] for part in parts]
            centroids.append(centres)
        else:
            leaf[own] = node
            progress.update(len(own))
        offsets.append(len(members) - 1)
        node += 1
    progress.close()
    centroids = torch.cat(centroids) if centroids else torch.zeros(0, vectors.shape[1])
    return KMeansTree(torch.tensor(offsets), centroids), leaf


def _split(points: torch.Tensor, branches: int, generator: torch.Generator, tries: int):
    """(the members of each cluster, (c, D) centroids); clusters that hold nothing are gone from both."""
    if (points == points[0]).all():
        return [], None
    centres = k_means(points, branches, generator, tries)
    while True:
        codes, _ = nearest(points, centres)
        held = torch.bincount(codes, minlength=len(centres)) > 0
        if held.all():
            return [(codes == code).nonzero().flatten() for code in range(len(centres))], centres
        centres = centres[held]  # `nearest` moves its origin with them, so ask again


def fit_residual_quantizer(vectors: torch.Tensor, levels: int, codes: int, seed: int = 0) -> ResidualQuantizer:
    """Residual k-means: each level's codebook is fitted to what the levels before it left over.

    The quantizer of RQ-VAE (2203.01941) and TIGER (2305.05065) without their autoencoder: the vectors are already
    trained. Where a level has fewer different residuals than codes, the spare codes are copies that are never chosen.

    Args:
        vectors: (N, D) float32. levels: codebooks. codes: rows of each.
    """
    generator = torch.Generator().manual_seed(seed)
    residual, codebooks = vectors, []
    for _ in tqdm(range(levels), desc="Residual k-means", unit="level", disable=len(vectors) < 20_000 or None):
        codebook = k_means(residual, codes, generator)
        codebook = torch.cat([codebook, codebook[:1].expand(codes - len(codebook), -1)])
        residual = residual - codebook[nearest(residual, codebook)[0]]
        codebooks.append(codebook)
    return ResidualQuantizer(torch.stack(codebooks))
