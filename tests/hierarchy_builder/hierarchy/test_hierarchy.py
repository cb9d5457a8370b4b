"""Hierarchies: parity with the release's numbers and with the plain reference, rules of ids, odd images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_hierarchy import partition, reference_regions, smooth_features
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

from hierarchy_builder.config import HierarchyRecipe
from hierarchy_builder.errors import BuilderError
from hierarchy_builder.hierarchy.linkage import average_linkage, cut_merges
from hierarchy_builder.hierarchy.recipe import Flag, build_hierarchy, check_nesting, cut_levels


def assert_parity(regions: np.ndarray, expected: np.ndarray, images: float = 0.99, tokens: float = 0.999):
    same = partition(regions) == partition(expected)
    assert same.all(axis=(1, 2, 3)).mean() >= images
    assert same.mean() >= tokens


def test_golden_paper_cuts(shared: Path) -> None:
    features = np.load(shared / "golden/hierarchy/features.npz")["features"]
    expected = np.load(shared / "golden/hierarchy/regions.npz")["regions"]
    hierarchy = build_hierarchy(features)
    assert_parity(hierarchy.regions, expected)
    assert (hierarchy.regions[:, 0] == expected[:, 0]).mean() >= 0.999  # which side is the object, too
    assert not hierarchy.flags.any()
    assert not check_nesting(hierarchy.regions).any()


def test_golden_four_cuts(shared: Path) -> None:
    features = np.load(shared / "golden/hierarchy/features.npz")["features"][:32]
    expected = np.load(shared / "golden/hierarchy/regions.npz")["regions_cuts_80_60_40_20"]
    regions = build_hierarchy(features, HierarchyRecipe(cuts=(0.8, 0.6, 0.4, 0.2))).regions
    assert regions.shape == (32, 5, 16, 16)
    assert_parity(regions[:, 1:], expected)


@pytest.mark.parametrize(
    ("num_channels", "noise", "grid"),
    [
        (768, 0.3, (16, 16)),
        (768, 3.0, (16, 16)),
        (384, 1.0, (14, 20)),
        (48, 0.1, (16, 16)),
        (48, 2.0, (9, 5)),
    ],
)
def test_reference_parity(num_channels: int, noise: float, grid: tuple[int, int]) -> None:
    features = smooth_features(24, *grid, num_channels, noise, seed=num_channels)
    expected = np.stack([reference_regions(image) for image in features])
    regions = build_hierarchy(features).regions
    # 24 images: none may differ; the reference rounds to float32 where we do not, and no tie is that close.
    assert_parity(regions, expected, images=1.0, tokens=1.0)
    assert (regions[:, 0] == expected[:, 0]).all()


def test_reference_parity_with_little_contrast() -> None:
    """Tokens that differ by 0.1 % of their norm: float32 products would not do, float64 ones are taken."""
    random = np.random.default_rng(5)
    features = 1 + 1e-3 * smooth_features(12, 16, 16, 384, 0.3, seed=5).astype(np.float32)
    features *= random.uniform(0.5, 2, size=(12, 1, 1, 1)).astype(np.float32)
    expected = np.stack([reference_regions(image) for image in features])
    hierarchy = build_hierarchy(features)
    assert not hierarchy.flags.any()
    assert_parity(hierarchy.regions[:, :1], expected[:, :1], images=1.0, tokens=1.0)


def test_linkage_equals_scipy_with_ties() -> None:
    coordinates = np.stack(np.meshgrid(np.arange(7.0), np.arange(6.0), indexing="ij"), -1).reshape(-1, 2)
    distance = np.linalg.norm(coordinates[:, None] - coordinates[None], axis=-1)
    gram = np.ones((1, 42, 42))
    merges = average_linkage(gram, np.ones((1, 42), dtype=np.uint8), distance)
    np.testing.assert_array_equal(
        merges[0], linkage(squareform(distance), "average")[:, :3].astype(np.float32)
    )


def test_merges_of_the_object_equal_scipy() -> None:
    features = smooth_features(4, 8, 8, 32, 0.5)
    hierarchy = build_hierarchy(features)
    tokens = features.reshape(4, 64, 32).astype(np.float64)
    tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
    y, x = np.meshgrid(np.linspace(0, 1, 8), np.linspace(0, 1, 8), indexing="ij")
    coordinates = np.stack([y.ravel(), x.ravel()], axis=1)
    for image in range(4):
        mask = hierarchy.regions[image, 0].ravel() == 1
        apart = np.linalg.norm(coordinates[mask][:, None] - coordinates[mask][None], axis=-1)
        distance = 1 - tokens[image, mask] @ tokens[image, mask].T + 0.2 * apart
        np.fill_diagonal(distance, 0)
        expected = linkage(squareform(distance, checks=False), "average")[:, :3]
        used = hierarchy.merges[image, : mask.sum() - 1]
        np.testing.assert_array_equal(used[:, :2], expected[:, :2])
        np.testing.assert_allclose(used[:, 2], expected[:, 2], atol=1e-6)  # float32
        assert (hierarchy.merges[image, mask.sum() - 1 :] == -1).all()


@settings(max_examples=30, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    cuts=st.lists(st.floats(0.01, 0.99), max_size=4, unique=True),
    noise=st.sampled_from([0.0, 0.2, 2.0]),
    seed=st.integers(0, 1000),
)
def test_any_grid_and_cuts_keep_the_rules(grid, cuts, noise, seed) -> None:
    features = smooth_features(3, *grid, 8, noise, seed)
    recipe = HierarchyRecipe(cuts=tuple(sorted(cuts, reverse=True)))
    hierarchy = build_hierarchy(features, recipe)
    assert hierarchy.regions.shape == (3, recipe.num_levels - 1, *grid)
    assert hierarchy.regions.dtype == np.uint8
    assert not check_nesting(hierarchy.regions).any()
    for level in hierarchy.regions.reshape(-1, grid[0] * grid[1]):
        first_seen = list(dict.fromkeys(level[level > 0].tolist()))
        assert first_seen == list(range(1, len(first_seen) + 1))
    again = cut_levels(hierarchy.regions[:, 0], hierarchy.merges, recipe.cuts)
    np.testing.assert_array_equal(again, hierarchy.regions)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), row=st.integers(0, 19))
def test_an_image_alone_equals_the_image_in_a_batch(seed: int, row: int) -> None:
    features = smooth_features(20, 16, 16, 24, 1.0, seed)
    together, alone = build_hierarchy(features), build_hierarchy(features[row : row + 1])
    np.testing.assert_array_equal(alone.regions[0], together.regions[row])
    np.testing.assert_array_equal(alone.merges[0], together.merges[row])


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    features = smooth_features(35, 16, 16, 384, 0.5)
    everything, single = build_hierarchy(features, threads=3), build_hierarchy(features, threads=1)
    np.testing.assert_array_equal(single.merges, everything.merges)
    np.testing.assert_array_equal(single.regions, everything.regions)


def test_recutting_equals_building_with_those_cuts() -> None:
    features = smooth_features(6, 12, 12, 48, 1.0)
    stored = build_hierarchy(features)
    cuts = (0.9, 0.5, 0.1)
    expected = build_hierarchy(features, HierarchyRecipe(cuts=cuts)).regions
    np.testing.assert_array_equal(cut_levels(stored.regions[:, 0], stored.merges, cuts), expected)


def test_transposing_the_grid_transposes_the_regions() -> None:
    features = smooth_features(3, 6, 10, 32, 0.5)
    masks, grams, penalties = [], [], []
    for grid in (features, features.swapaxes(1, 2)):
        tokens = grid.reshape(3, 60, 32).astype(np.float64)
        tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
        y, x = np.meshgrid(*(np.linspace(0, 1, size) for size in grid.shape[1:3]), indexing="ij")
        where = np.stack([y.ravel(), x.ravel()], axis=1)
        penalties.append(0.2 * np.linalg.norm(where[:, None] - where[None], axis=-1))
        grams.append(tokens @ tokens.swapaxes(1, 2))
        masks.append(tokens[:, :, 0] < 0.1)
    upright, transposed = (average_linkage(*each) for each in zip(grams, masks, penalties, strict=True))
    np.testing.assert_allclose(upright[:, :, 2], transposed[:, :, 2], rtol=1e-6)
    cuts = (0.6, 0.3)
    levels = cut_merges(masks[0], upright, cuts).reshape(3, 2, 6, 10)
    turned = cut_merges(masks[1], transposed, cuts).reshape(3, 2, 10, 6).swapaxes(2, 3)
    assert levels.max() > 2
    np.testing.assert_array_equal(partition(levels), partition(turned))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_numpy_and_torch_agree(dtype: type) -> None:
    features = smooth_features(3, 8, 8, 16, 0.5).astype(dtype)
    features.setflags(write=False)  # as zarr and memory maps hand them out
    expected = build_hierarchy(features)
    given = build_hierarchy(torch.tensor(features))
    np.testing.assert_array_equal(given.regions, expected.regions)
    np.testing.assert_array_equal(given.merges, expected.merges)


@pytest.mark.parametrize(("value", "num_subparts"), [(1.0, 11), (0.1, 11), (-3.0, 11), (0.0, 12)])
def test_constant_image_is_all_object_and_flagged(value: float, num_subparts: int) -> None:
    """scikit-learn puts all tokens in cluster 0; the release then cuts by positions: 4 parts, 11 subparts.

    Zeros keep cosine distance 1 between tokens, so equal distances round differently (as in the reference).
    """
    features = np.full((2, 16, 16, 768), value, dtype=np.float16)
    features[1] = smooth_features(1, 16, 16, 768, 0.3)
    hierarchy = build_hierarchy(features)
    assert hierarchy.flags.tolist() == [Flag.DEGENERATE, 0]
    assert hierarchy.regions[0].reshape(3, -1).min(axis=1).tolist() == [1, 1, 1]
    assert hierarchy.regions[0].reshape(3, -1).max(axis=1).tolist() == [1, 4, num_subparts]
    expected = reference_regions(features[0])
    assert (expected[0] == 1).all()
    assert expected.reshape(3, -1).max(axis=1).tolist() == [1, 4, num_subparts]


def test_constant_direction_is_degenerate_at_any_length() -> None:
    lengths = np.linspace(1, 2, 256, dtype=np.float32).reshape(1, 16, 16, 1)
    features = lengths * np.random.default_rng(0).normal(size=64).astype(np.float32)
    assert build_hierarchy(features).flags.tolist() == [Flag.DEGENERATE]


@pytest.mark.parametrize("num_object_tokens", [1, 2])
def test_tiny_object_is_one_region(num_object_tokens: int) -> None:
    features = np.zeros((1, 8, 8, 4), dtype=np.float32)
    features[..., 0] = 1
    features[0, 3, 3 : 3 + num_object_tokens, :2] = [0, 1]
    hierarchy = build_hierarchy(features)
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[3, 3 : 3 + num_object_tokens] = 1
    np.testing.assert_array_equal(hierarchy.regions[0], np.stack([mask] * 3))
    assert (hierarchy.merges[0, :, 0] >= 0).sum() == num_object_tokens - 1
    np.testing.assert_array_equal(partition(hierarchy.regions[0]), partition(reference_regions(features[0])))


def test_one_token_and_one_row() -> None:
    single = build_hierarchy(np.ones((2, 1, 1, 8), dtype=np.float32))
    assert single.regions.tolist() == np.ones((2, 3, 1, 1)).tolist()
    assert single.merges.shape == (2, 0, 3)
    row = smooth_features(3, 1, 12, 16, 0.2)
    expected = np.stack([reference_regions(image) for image in row])
    np.testing.assert_array_equal(partition(build_hierarchy(row).regions), partition(expected))


def test_no_images_and_no_cuts() -> None:
    assert build_hierarchy(np.zeros((0, 4, 4, 8), dtype=np.float16)).regions.shape == (0, 3, 4, 4)
    objects = build_hierarchy(smooth_features(2, 4, 4, 8, 0.1), HierarchyRecipe(cuts=()))
    assert objects.regions.shape == (2, 1, 4, 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("recipe", [HierarchyRecipe.paper(), HierarchyRecipe.stable()])
def test_nonfinite_features_are_flagged_and_the_others_go_on(bad: float, recipe: HierarchyRecipe) -> None:
    features = smooth_features(40, 6, 6, 8, 0.5)
    sound = build_hierarchy(features, recipe)
    features[[7, 38], 2, 3, 1] = bad
    hierarchy = build_hierarchy(features, recipe)
    others = np.setdiff1d(np.arange(40), [7, 38])
    assert hierarchy.flags[[7, 38]].tolist() == [Flag.NONFINITE] * 2
    assert (hierarchy.regions[[7, 38]] == 1).all()
    assert (hierarchy.merges[[7, 38]] == -1).all()
    assert (hierarchy.scores[[7, 38]] == 0).all()
    for name in ("regions", "merges", "flags", "scores"):
        np.testing.assert_array_equal(getattr(hierarchy, name)[others], getattr(sound, name)[others])
    again = cut_levels(hierarchy.regions[:, 0], hierarchy.merges, recipe.cuts)
    np.testing.assert_array_equal(again, hierarchy.regions)


def test_products_beyond_float32_are_handled() -> None:
    features = smooth_features(2, 6, 6, 8, 0.5).astype(np.float32)
    np.testing.assert_array_equal(build_hierarchy(features * 1e25).regions, build_hierarchy(features).regions)


def test_features_of_wrong_shape_are_refused() -> None:
    with pytest.raises(BuilderError, match=r"shape \(4, 4, 8\), expected \[N, H, W, C\]"):
        build_hierarchy(np.zeros((4, 4, 8), dtype=np.float16))


def test_more_regions_than_uint8_holds_are_refused() -> None:
    features = smooth_features(1, 30, 30, 16, 3.0)
    with pytest.raises(BuilderError, match=r"cut 0\.001 leaves \d+ object regions in image row 0 .* 255"):
        build_hierarchy(features, HierarchyRecipe(cuts=(0.5, 0.001)))


def test_trees_of_other_objects_are_refused() -> None:
    hierarchy = build_hierarchy(smooth_features(3, 6, 6, 8, 0.5))
    mask = hierarchy.regions[:, 0].copy()
    mask[1] = 1
    with pytest.raises(BuilderError, match=r"image rows 1 do not belong"):
        cut_levels(mask, hierarchy.merges, (0.5,))
    with pytest.raises(BuilderError, match=r"expected \(3, 35, 3\)"):
        cut_levels(mask, hierarchy.merges[:, :4], (0.5,))


def test_side_without_a_tree_is_one_region() -> None:
    mask = np.ones((1, 2, 2), dtype=np.uint8)
    assert (cut_levels(mask, np.full((1, 3, 3), -1, dtype=np.float32), (0.7, 0.3)) == 1).all()


def test_check_nesting_counts_each_kind_of_violation() -> None:
    sound = build_hierarchy(smooth_features(1, 8, 8, 16, 0.5)).regions
    damaged = np.repeat(sound, 4, axis=0)
    damaged[1, 2][damaged[1, 2] == 1] = damaged[1, 2].max() + 1  # id 1 is missing
    token = np.argwhere(damaged[2, 0] == 0)[0]
    damaged[2, 2, token[0], token[1]] = 1  # background on level 0, object on level 2
    first, last = np.argwhere(damaged[3, 1] == 1)[0], np.argwhere(damaged[3, 1] == 2)[-1]
    damaged[3, 2, first[0], first[1]] = damaged[3, 2, last[0], last[1]]  # a region with two parents
    counts = check_nesting(damaged)
    assert counts[0] == 0
    assert (counts[1:] > 0).all()
