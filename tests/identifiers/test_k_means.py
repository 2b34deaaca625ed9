"""k-means against scikit-learn, and the two quantizers against what they promise."""

import pytest
import torch
from sklearn.cluster import KMeans

from imagedex.identifiers.k_means import _lloyd, fit_k_means_tree, fit_residual_quantizer, k_means
from imagedex.modeling.identifier_quantizers import nearest


def clustered(count=600, clusters=25, width=16, spread=0.4, seed=0):
    """Points around random centres, and which centre each is of."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, width, generator=generator)
    of = torch.randint(clusters, (count,), generator=generator)
    return centres[of] + spread * torch.randn(count, width, generator=generator), of


def inertia(points, centroids):
    return torch.cdist(points.double(), centroids.double()).square().min(1).values.sum().item()


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_nearest_is_that_of_all_distances(shift):
    points, centroids = clustered()[0] + shift, clustered(seed=1)[0][:40] + shift
    codes, distances = nearest(points, centroids)
    expected = torch.cdist(points.double(), centroids.double()).square()
    torch.testing.assert_close(distances.double(), expected.min(1).values, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(expected.gather(1, codes[:, None])[:, 0], expected.min(1).values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [2, 10, 25, 60])
@pytest.mark.parametrize("spread", [0.1, 0.4, 2.0])
def test_inertia_is_that_of_scikit_learn(k, spread):
    points, _ = clustered(spread=spread)
    centroids = k_means(points, k, torch.Generator().manual_seed(0))
    assert centroids.shape == (k, 16)
    expected = KMeans(k, n_init=10, random_state=0).fit(points.numpy()).inertia_
    assert inertia(points, centroids) <= 1.03 * expected


def test_of_very_many_points_a_part_decides_and_it_costs_little():
    points, _ = clustered(count=40_000, clusters=12, spread=0.3)
    centroids = k_means(points, 12, torch.Generator().manual_seed(0))
    expected = KMeans(12, n_init=4, random_state=0).fit(points.numpy()).inertia_
    assert inertia(points, centroids) <= 1.03 * expected


def test_the_seed_decides():
    points, _ = clustered()
    first, again, other = (k_means(points, 10, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_cluster_that_runs_empty_starts_again():
    points, of = clustered(clusters=2, spread=0.01)
    starts = torch.stack([points[of == 0][0], torch.full((16,), 50.0)])  # nothing is near the second
    centroids = _lloyd(points, starts, torch.tensor(1e-6), max_steps=50)
    expected = torch.stack([points[of == cluster].mean(0) for cluster in range(2)])
    torch.testing.assert_close(torch.cdist(expected, centroids).min(1).values, torch.zeros(2), atol=1e-3, rtol=0)


@pytest.mark.parametrize("different", [1, 2, 5])
def test_fewer_different_points_than_clusters(different):
    base, _ = clustered(count=different)
    points = base.repeat(30, 1)
    centroids = k_means(points, 10, torch.Generator().manual_seed(0))
    assert len(centroids) == different
    assert torch.cdist(base, centroids).min(1).values.max() < 1e-5


@pytest.mark.parametrize(("branches", "leaf_size"), [(10, 100), (3, 7), (2, 1), (10, 1000)])
def test_tree_leaves_are_small_and_the_way_down_finds_them_again(branches, leaf_size):
    points, _ = clustered(count=120 if leaf_size == 1 else 600)
    tree, leaf = fit_k_means_tree(points, branches, leaf_size, seed=0)
    counts = torch.bincount(leaf)
    children = tree.child_offsets.diff()
    assert counts.max() <= leaf_size
    assert children.max() <= branches and ((children == 0) | (children >= 2)).all()
    assert (children[leaf] == 0).all() and set(leaf.tolist()) == set((children == 0).nonzero().flatten().tolist())
    assert len(tree.centroids) == len(children) - 1 == tree.child_offsets[-1]
    assert torch.equal(tree.encode(points), leaf)

    ways = tree.digits()
    for node in leaf.unique().tolist():
        assert tree.leaf_of([*ways[node], 3, 1]) == (node, len(ways[node]))
    assert len({tuple(ways[node]) for node in leaf.unique().tolist()}) == len(leaf.unique())


def test_every_step_down_the_tree_is_to_the_nearest_centroid():
    points, _ = clustered()
    tree, leaf = fit_k_means_tree(points, 4, 20, seed=0)
    ways, offsets = tree.digits(), tree.child_offsets.tolist()
    for point, end in zip(points.double(), leaf.tolist(), strict=True):
        node = 0
        for digit in ways[end]:
            away = (tree.centroids[offsets[node] : offsets[node + 1]].double() - point).square().sum(1)
            assert away[digit] <= away.min() + 1e-4
            node = offsets[node] + digit + 1
        assert node == end


def test_tree_of_points_that_are_the_same():
    tree, leaf = fit_k_means_tree(torch.ones(50, 4), 10, 5)  # nothing tells them apart: one leaf, larger than asked
    assert len(tree.child_offsets) == 2 and leaf.tolist() == [0] * 50
    assert tree.encode(torch.zeros(3, 4)).tolist() == [0, 0, 0]

    points = torch.cat([clustered(count=40)[0], clustered(count=1, seed=9)[0].expand(60, -1)])
    tree, leaf = fit_k_means_tree(points, 4, 8)
    assert len(leaf[40:].unique()) == 1
    counts = torch.bincount(leaf)
    assert (counts > 8).sum() == 1 and counts.max() >= 60
    assert torch.equal(tree.encode(points), leaf)


def test_points_that_differ_by_little_far_from_the_origin_still_end():
    generator = torch.Generator().manual_seed(0)
    points = 1000 + 1e-3 * torch.randn(200, 8, generator=generator)
    tree, leaf = fit_k_means_tree(points, 10, 10)
    assert torch.bincount(leaf).max() <= 10 and len(tree.digits()[-1]) <= 6


def test_a_digit_that_leads_nowhere_is_refused():
    tree, _ = fit_k_means_tree(clustered()[0], 3, 300)
    with pytest.raises(ValueError, match="do not lead to a leaf"):
        tree.leaf_of([7])


def test_residual_quantizer_beats_random_codes_and_each_level_helps():
    points, of = clustered(count=2000, clusters=30)
    quantizer = fit_residual_quantizer(points, levels=3, codes=16, seed=0)
    assert quantizer.codebooks.shape == (3, 16, 16)
    codes = quantizer.encode(points)
    errors = []
    for levels in range(4):
        decoded = sum((quantizer.codebooks[level][codes[:, level]] for level in range(levels)), torch.zeros(()))
        errors.append((points - decoded).square().sum().item())
    assert errors[0] > 1.5 * errors[1] and errors[1] > 1.2 * errors[2] > 1.2 * errors[3]
    torch.testing.assert_close(quantizer.decode(codes), decoded)

    rows = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    chance = quantizer.decode(codes[rows])  # codes of other points
    assert (points - chance).square().sum() > 4 * errors[3]
    same = codes[:, 0][:, None] == codes[:, 0]
    alike, apart = (of[:, None] == of), (of[:, None] != of)
    assert same[alike].float().mean() > 0.7 > 0.1 > same[apart].float().mean()  # neighbours share their first code


def test_residual_quantizer_of_few_different_points():
    points = clustered(count=3)[0].repeat(5, 1)
    quantizer = fit_residual_quantizer(points, levels=2, codes=8)
    torch.testing.assert_close(quantizer.decode(quantizer.encode(points)), points, atol=1e-4, rtol=0)
    assert len(quantizer.encode(points).unique(dim=0)) == 3
