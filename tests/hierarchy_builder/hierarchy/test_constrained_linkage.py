"""Linkage where only some pairs may merge, against its definition written out over sets of tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from hierarchy_builder.hierarchy.constrained_linkage import (
    APART,
    FREE,
    GIVEN,
    PHASE,
    constrained_pairs,
    pair_phases,
)
from hierarchy_builder.hierarchy.linkage import average_linkage, cut_merges


def by_definition(distance: np.ndarray, phases: np.ndarray) -> list[tuple[frozenset[int], float]]:
    """Clusters in the order they come to be, with their heights; every mean taken over all pairs of tokens."""
    clusters = {frozenset([token]): 0.0 for token in range(len(distance))}
    found = []
    while len(clusters) > 1:
        pairs = [(a, b) for a in clusters for b in clusters if min(a) < min(b)]

        def cost(pair: tuple[frozenset[int], frozenset[int]]) -> float:
            block = np.ix_(sorted(pair[0]), sorted(pair[1]))
            return distance[block].mean() + PHASE * phases[block].min()

        a, b = min(pairs, key=cost)
        height = max(cost((a, b)), clusters.pop(a), clusters.pop(b))
        clusters[a | b] = height
        found.append((a | b, height))
    return found


def replay(pairs: np.ndarray, heights: np.ndarray) -> list[tuple[frozenset[int], float]]:
    slots = {slot: frozenset([slot]) for slot in range(len(heights) + 1)}
    found = []
    for (gone, kept), height in zip(pairs.tolist(), heights.tolist(), strict=True):
        slots[kept] = slots[kept] | slots.pop(gone)
        found.append((slots[kept], height))
    return found


@settings(max_examples=40, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    connected=st.booleans(),
    num_given=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_merges_follow_the_definition(grid, connected, num_given, seed) -> None:
    random = np.random.default_rng(seed)
    tokens = np.flatnonzero(random.random(grid[0] * grid[1]) < 0.8)
    distance = random.random((len(tokens), len(tokens)))
    distance = distance + distance.T
    np.fill_diagonal(distance, np.inf)
    phases = pair_phases(tokens, grid[1], connected, random.integers(num_given, size=grid[0] * grid[1]))
    expected = by_definition(distance, phases)
    if len(tokens) == 0:
        return
    found = replay(*constrained_pairs(distance.copy(), phases.copy()))
    assert [cluster for cluster, _ in found] == [cluster for cluster, _ in expected]
    np.testing.assert_allclose([height for _, height in found], [height for _, height in expected])


@pytest.mark.parametrize("level", [1, 2])
def test_one_given_region_is_one_region_up_to_its_level(level: int) -> None:
    tokens = np.random.default_rng(0).normal(size=(1, 36, 4))
    tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
    everything = np.ones((1, 36), dtype=np.int64)
    merges = average_linkage(tokens @ tokens.swapaxes(1, 2), everything, np.zeros((36, 36)), given=everything)
    levels = cut_merges(everything, merges, (0.9, 0.8, 0.0), level)
    assert (levels[:, :level] == 1).all()
    assert levels[0, 2].max() > 30


def test_tokens_that_never_touch_stay_apart_at_any_cut() -> None:
    scattered = np.zeros((1, 36), dtype=np.uint8)
    scattered[0, ::2] = 1  # columns 0, 2, 4 of each row: only upper and lower neighbours touch
    scattered[0, [6, 8, 10, 18, 20, 22, 30, 32, 34]] = 0
    merges = average_linkage(np.ones((1, 36, 36)), scattered, np.zeros((36, 36)), connected_width=6)
    assert cut_merges(scattered, merges, (1.0,)).max() == scattered.sum()


def test_phases_of_pairs() -> None:
    tokens = np.array([0, 1, 2, 4])  # of a grid 3 wide: a row, and the token below its middle
    given_regions = np.array([0, 0, 0, 0, 7, 0])
    phases = pair_phases(tokens, 3, True, given_regions)
    np.testing.assert_array_equal(
        phases,
        [
            [FREE, FREE, APART, GIVEN],
            [FREE, FREE, FREE, GIVEN],
            [APART, FREE, FREE, GIVEN],
            [GIVEN, GIVEN, GIVEN, FREE],
        ],
    )
    assert (pair_phases(tokens, 3, False, given_regions)[:3, :3] == FREE).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), both=st.booleans(), cut=st.floats(0.0, 1.0))
def test_connected_regions_are_in_one_piece(seed: int, both: bool, cut: float) -> None:
    random = np.random.default_rng(seed)
    tokens = random.normal(size=(3, 63, 5))
    tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
    mask = random.random((3, 63)) < 0.6
    merges = average_linkage(
        tokens @ tokens.swapaxes(1, 2),
        mask,
        np.zeros((63, 63)),
        divide_background=both,
        connected_width=9,
    )
    for image in cut_merges(mask, merges, (cut,)).reshape(3, 7, 9):
        for region in range(0 if both else 1, image.max() + 1):
            assert ndimage.label(image == region)[1] == 1


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_given_level_is_kept_and_the_others_nest_around_it(level: int) -> None:
    random = np.random.default_rng(level)
    tokens = random.normal(size=(4, 64, 6)) + random.normal(size=6)
    tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
    drawn = random.integers(6, size=(4, 64))  # 0: background
    merges = average_linkage(
        tokens @ tokens.swapaxes(1, 2), drawn > 0, np.zeros((64, 64)), connected_width=8, given=drawn
    )
    levels = cut_merges(drawn > 0, merges, (0.6, 0.5, 0.4), np.full(4, level))
    for image, labels in zip(levels, drawn, strict=True):
        pairs = set(zip(image[level - 1].tolist(), labels.tolist(), strict=True))
        assert len(pairs) == len(set(labels.tolist())) == image[level - 1].max() + 1
        counts = image.max(axis=1)
        assert (np.diff(counts) >= 0).all()
        if level < 3:
            assert counts[2] > counts[level - 1]
        if level > 1:
            assert 1 <= counts[0] < counts[level - 1]
