"""Frozen quantizers that travel with the identifiers: a new picture's vector gets its code from them, without training.

How they are fitted is in `imagedex.retrieval`; here is only what is needed to encode.
"""

import numpy as np
import torch

BLOCK = 2**24  # numbers held at once


def nearest(points: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest centroid by Euclidean distance, the first of equals.

    Args:
        points: (M, D) float. centroids: (K, D), of the same type.

    Returns:
        codes (M,) int64; squared distances (M,).
    """
    middle = centroids.mean(0)  # distances are differences of squares: small numbers keep them exact
    centroids = centroids - middle
    squares = centroids.square().sum(1)
    step = max(1, BLOCK // max(1, *centroids.shape))
    codes, distances = [], []
    for block in points.split(step):
        block = block - middle
        values, found = torch.addmm(squares, block, centroids.T, alpha=-2).min(1)
        codes.append(found)
        distances.append((values + block.square().sum(1)).clamp_(min=0))
    return torch.cat(codes), torch.cat(distances)


class KMeansTree:
    """The clusters of hierarchical k-means, nodes numbered breadth first: the child behind centroid `e` is node `e + 1`.

    Args:
        child_offsets: (nodes + 1,) int64; the children of node n are the centroids child_offsets[n] .. child_offsets[n + 1] - 1,
            the first of them is digit 0. A node without children is a leaf.
        centroids: (nodes - 1, D) float32.
    """

    def __init__(self, child_offsets: torch.Tensor, centroids: torch.Tensor):
        self.child_offsets, self.centroids = child_offsets, centroids

    @property
    def width(self) -> int:
        """The length of the vectors it was fitted on."""
        return self.centroids.shape[1]

    def encode(self, vectors: torch.Tensor) -> torch.Tensor:
        """Down the tree to the nearest centroid of each node: (M, D) float32 -> the number of the leaf (M,) int64."""
        nodes = torch.zeros(len(vectors), dtype=torch.int64)
        pending = torch.arange(len(vectors))
        while True:
            pending = pending[self.child_offsets[nodes[pending] + 1] > self.child_offsets[nodes[pending]]]
            if not len(pending):
                return nodes
            pending = pending[nodes[pending].argsort(stable=True)]
            here, counts = nodes[pending].unique_consecutive(return_counts=True)
            for node, members in zip(here.tolist(), pending.split(counts.tolist()), strict=True):
                start, end = self.child_offsets[node : node + 2].tolist()
                nodes[members] = start + nearest(vectors[members], self.centroids[start:end])[0] + 1

    def digits(self) -> list[list[int]]:
        """For each node, the digits that lead from the root to it."""
        ways = [[]]
        for node, children in enumerate(self.child_offsets.diff().tolist()):
            ways += [[*ways[node], digit] for digit in range(children)]
        return ways

    def leaf_of(self, digits: list[int]) -> tuple[int, int]:
        """Follows digits from the root to a leaf: (leaf, how many digits were used). The digits behind them are the position."""
        node = 0
        for used, digit in enumerate(digits):
            start, end = self.child_offsets[node : node + 2].tolist()
            if start == end:
                return node, used
            if not 0 <= digit < end - start:
                raise ValueError(f"the digits {digits} do not lead to a leaf of this k-means tree")
            node = start + digit + 1
        return node, len(digits)

    def to_arrays(self) -> dict[str, np.ndarray]:
        return {"tree_child_offsets": self.child_offsets.numpy(), "tree_centroids": self.centroids.numpy()}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "KMeansTree":
        names = ("tree_child_offsets", "tree_centroids")
        return cls(*(torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in names))


class ResidualQuantizer:
    """A codebook a level; each level quantises what the levels before it left over (2203.01941, section 3.1).

    Args:
        codebooks: (levels, codes, D) float32.
    """

    def __init__(self, codebooks: torch.Tensor):
        self.codebooks = codebooks

    @property
    def width(self) -> int:
        """The length of the vectors it was fitted on."""
        return self.codebooks.shape[2]

    def encode(self, vectors: torch.Tensor) -> torch.Tensor:
        """(M, D) float32 -> codes (M, levels) int64."""
        residual, codes = vectors, []
        for codebook in self.codebooks:
            code, _ = nearest(residual, codebook)
            residual = residual - codebook[code]
            codes.append(code)
        return torch.stack(codes, dim=1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """codes (M, levels) -> the vectors (M, D) they stand for."""
        return sum(codebook[code] for codebook, code in zip(self.codebooks, codes.unbind(1), strict=True))

    def to_arrays(self) -> dict[str, np.ndarray]:
        return {"codebooks": self.codebooks.numpy()}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "ResidualQuantizer":
        return cls(torch.from_numpy(np.ascontiguousarray(arrays["codebooks"])))
