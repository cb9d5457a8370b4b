"""Scores of regions against brute force; baselines have the given counts and are nested."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from hierarchy_builder.config import HierarchyRecipe
from hierarchy_builder.hierarchy.recipe import Flag, build_hierarchy
from hierarchy_builder.quality.assessment import Assessment
from hierarchy_builder.quality.scores import (
    baselines,
    by_level,
    count_regions,
    flag_names,
    flag_shares,
    grid_regions,
    human_scores,
    join,
    random_regions,
    region_scores,
    stability,
)


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    """Smooth random fields, float16 [5, 12, 16, 8]."""
    noise = np.random.default_rng(0).normal(size=(5, 12, 16, 8))
    return ndimage.gaussian_filter(noise, (0, 2, 2, 0)).astype(np.float16)


@pytest.fixture(scope="module")
def regions(features) -> np.ndarray:
    return build_hierarchy(features, HierarchyRecipe(cuts=(0.6, 0.3))).regions


def test_region_scores_by_brute_force(features, regions) -> None:
    found = region_scores(features, regions)
    for n, level in np.ndindex(*regions.shape[:2]):
        tokens = features[n].astype(np.float64)
        tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
        masks = [regions[n, level] == region for region in np.unique(regions[n, level])]
        means = [tokens[mask].mean(axis=0) for mask in masks]
        directions = [mean / np.linalg.norm(mean) for mean in means]
        sizes = [mask.sum() for mask in masks]
        within = sum(
            (tokens[mask] @ direction).sum() for mask, direction in zip(masks, directions, strict=True)
        )
        between = [a @ b for i, a in enumerate(directions) for b in directions[:i]]
        expected = {
            "regions": len(masks),
            "smallest": min(sizes),
            "median": np.median(sizes),
            "largest": max(sizes),
            "connected": np.mean([ndimage.label(mask)[1] == 1 for mask in masks]),
            "within": within / sum(sizes),
            "between": np.mean(between),
        }
        assert {name: values[n, level] for name, values in found.items()} == pytest.approx(expected, abs=1e-5)


def test_between_is_undefined_for_one_region() -> None:
    found = region_scores(np.ones((1, 4, 4, 2), np.float16), np.zeros((1, 1, 4, 4), np.uint8))
    assert np.isnan(found["between"][0, 0])
    assert found["within"][0, 0] == pytest.approx(1)


def test_regions_that_touch_at_a_corner_are_not_connected() -> None:
    regions = np.array([[[[1, 0], [0, 1]]], [[[1, 1], [0, 1]]]], np.uint8)
    assert region_scores(np.ones((2, 2, 2, 3)), regions)["connected"].tolist() == [[0.0], [1.0]]


def test_stability_compares_level_by_level(regions) -> None:
    same = stability(regions, regions)
    assert (same == 1).all()
    changed = regions.copy()
    changed[2, 1] = changed[2, 1, ::-1]
    found = stability(regions, changed)
    assert found[2, 1] < 1
    assert (found == 1).sum() == found.size - 1


def test_human_scores_are_1_for_label_maps_equal_to_the_regions(regions) -> None:
    drawn = [level[None].repeat(4, axis=1).repeat(4, axis=2).astype(np.int64) for level in regions[:, 1]]
    found = human_scores(regions, drawn)
    assert (found["covering"][:, 1] == 1).all()
    assert (found["boundary_f"][:, 1] == 1).all()
    assert (found["object_iou"][:, 0] == 1).all()
    assert np.isnan(found["object_iou"][:, 1:]).all()
    assert (found["covering"][:, 0] < 1).all()
    assert (found["recall"][:, 2] == 1).all()  # finer levels hold every outline of coarser ones
    assert (found["precision"][:, 2] < 1).any()


counts_of_levels = st.lists(
    st.lists(st.integers(1, 30), min_size=2, max_size=2).map(sorted), min_size=1, max_size=3
)


@settings(max_examples=30, deadline=None)
@given(counts_of_levels, st.sampled_from([(5, 6), (16, 16)]))
def test_baselines_have_the_given_counts_and_are_nested(counts, grid) -> None:
    wanted = np.array(counts)
    for made in (grid_regions(wanted, grid), random_regions(wanted, grid)):
        assert made.shape == (*wanted.shape, *grid)
        np.testing.assert_array_equal(count_regions(made), wanted)
        for coarse, fine in made:
            assert all(len(np.unique(coarse[fine == region])) == 1 for region in np.unique(fine))


def test_grid_is_regular() -> None:
    four, sixteen = grid_regions(np.array([[4, 16]]), (16, 16))[0]
    for labels, side in ((four, 8), (sixteen, 4)):
        blocks = labels.reshape(16 // side, side, 16 // side, side).swapaxes(1, 2).reshape(-1, side * side)
        assert (blocks == blocks[:, :1]).all()


def test_random_regions_are_drawn_by_seed() -> None:
    counts = np.full((2, 1), 7)
    first, again, other = (random_regions(counts, (8, 8), seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first[0] != first[1]).any()


def test_baselines_take_counts_from_the_regions(features, regions) -> None:
    found = baselines(features, count_regions(regions), None)
    assert list(found) == ["grid", "random"]
    for scores in found.values():
        np.testing.assert_array_equal(scores["regions"], count_regions(regions))


def test_means_ignore_undefined_scores() -> None:
    scores = {"s": np.array([[0.5, np.nan], [np.nan, np.nan], [1.0, np.nan]])}
    assert by_level(scores) == [{"s": 0.75}, {"s": None}]
    assert by_level(join([scores, scores])) == by_level(scores)
    found = Assessment(
        rows=[0, 1, 2],
        keys=["a", "b", "c"],
        scores=scores,
        violations=np.array([0, 2, 0]),
        flags=np.array([0, 1, 0], np.uint8),
        baselines={},
        facts={},
    )
    assert found.of_image(1) == {"key": "b", "violations": 2, "flags": ["degenerate"], "s": [None, None]}


def test_flags_have_names_and_shares() -> None:
    flags = np.array([0, Flag.DEGENERATE, 0, Flag.DEGENERATE], np.uint8)
    assert flag_shares(flags)["degenerate"] == 0.5
    assert flag_names(0) == []
    assert flag_names(Flag.DEGENERATE) == ["degenerate"]
