"""Palettes and region colours: stable, shared, distinct, and related from parent to child."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hierarchy_builder.canvases.colours import fit_palette, hierarchy_colours, spread_rows


def clustered_features(seed: int = 0, channels: int = 12) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(6, channels)) * np.linspace(3, 0.5, channels)
    ids = generator.integers(0, 6, size=(4, 8, 8))
    return (centres[ids] + 0.1 * generator.normal(size=(4, 8, 8, channels))).astype(np.float32)


def nested_regions(seed: int, side: int = 8) -> np.ndarray:
    """Object, parts and subparts by splitting ids at random; uint8 [3, side, side], dense from 1."""
    generator = np.random.default_rng(seed)
    levels = [(generator.random((side, side)) < 0.7).astype(np.uint8)]
    for _ in range(2):
        split = levels[-1].astype(int) * 3 + generator.integers(0, 3, size=(side, side))
        finer = np.zeros((side, side), dtype=np.uint8)
        inside = levels[-1] > 0
        finer[inside] = np.unique(split[inside], return_inverse=True)[1] + 1
        levels.append(finer)
    return np.stack(levels)


def distances(colours: np.ndarray) -> np.ndarray:
    """Euclidean sRGB distances of all pairs of different rows."""
    apart = np.linalg.norm(colours[:, None].astype(float) - colours[None].astype(float), axis=-1)
    return apart[~np.eye(len(colours), dtype=bool)]


def test_palette_uses_the_whole_range_and_keeps_similar_tokens_similar() -> None:
    features = clustered_features()
    colours = fit_palette(features).apply(features)
    assert colours.shape == (4, 8, 8, 3)
    assert colours.dtype == np.uint8
    assert (colours.min(axis=(0, 1, 2)) <= 2).all()
    assert (colours.max(axis=(0, 1, 2)) >= 253).all()


def test_palette_does_not_depend_on_the_order_of_tokens() -> None:
    features = clustered_features().reshape(-1, 12)
    shuffled = features[np.random.default_rng(1).permutation(len(features))]
    first, second = fit_palette(features).apply(features), fit_palette(shuffled).apply(features)
    # Sums in another order move an axis in the last bits: at most one of 255 steps.
    assert np.abs(first.astype(int) - second.astype(int)).max() <= 1


def test_palette_signs_are_fixed() -> None:
    axes = fit_palette(clustered_features()).axes
    assert (axes[np.abs(axes).argmax(axis=0), np.arange(3)] > 0).all()
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-5)


def test_outliers_do_not_wash_out_the_palette() -> None:
    features = clustered_features().reshape(-1, 12)
    features[:2] = 1000.0 * np.eye(12, dtype=np.float32)[:2]
    palette = fit_palette(features)
    assert palette.apply(features[2:]).astype(float).std() > 10


def test_tokens_that_are_not_finite_are_black_and_do_not_disturb_the_fit() -> None:
    features = clustered_features()
    expected = fit_palette(features.reshape(-1, 12)[1:]).apply(features)
    features[0, 0, 0] = np.nan
    colours = fit_palette(features).apply(features)
    assert not colours[0, 0, 0].any()
    assert np.array_equal(colours[1:], expected[1:])


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_few_channels_and_constant_features_have_a_colour(channels: int) -> None:
    constant = np.ones((5, 5, channels), dtype=np.float16)
    assert (fit_palette(constant).apply(constant) == 128).all()
    ramp = np.linspace(0, 1, 64 * channels).reshape(8, 8, channels)
    assert fit_palette(ramp).apply(ramp)[..., 0].max() == 255


def test_palette_takes_torch_tensors_of_half_precision() -> None:
    features = clustered_features().astype(np.float16)
    assert np.array_equal(
        fit_palette(torch.from_numpy(features)).apply(torch.from_numpy(features)),
        fit_palette(features).apply(features),
    )


def test_palette_refuses_another_number_of_channels() -> None:
    with pytest.raises(ValueError, match="features have 5 channels, the palette was fitted on 12"):
        fit_palette(clustered_features()).apply(np.zeros((2, 5)))


def test_palette_without_finite_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="no finite token"):
        fit_palette(np.full((4, 4, 3), np.nan))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_hierarchy_colours_are_one_per_region(seed: int) -> None:
    regions = nested_regions(seed)
    colours = hierarchy_colours(regions)
    assert colours.shape == (4, 8, 8, 3)
    for level in range(3):
        pairs = np.concatenate([regions[level].reshape(-1, 1), colours[level].reshape(-1, 3)], axis=1)
        ids = len(np.unique(regions[level]))
        assert len(np.unique(pairs, axis=0)) == ids == len(np.unique(colours[level].reshape(-1, 3), axis=0))
        if (regions[level] == 0).any():
            background = colours[level][regions[level] == 0][0]
            assert background.max() < 80
            assert np.ptp(background.astype(int)) <= 8


def divided_background(seed: int, count: int, side: int = 8) -> np.ndarray:
    """The hierarchy of `nested_regions` whose background is cut in `count` on level 1, and each in two on level 2."""
    regions = nested_regions(seed, side).astype(int)
    behind = regions[0] == 0
    rank = np.cumsum(behind).reshape(behind.shape) - 1
    for level, pieces in ((1, count), (2, 2 * count)):
        piece = rank * pieces // behind.sum()
        ids = np.where(piece == 0, 0, regions[level].max() + piece)
        regions[level] = np.where(behind, ids, regions[level])
    return regions.astype(np.uint8)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4))
def test_regions_of_a_divided_background_have_different_greys(seed: int, count: int) -> None:
    regions = divided_background(seed, count, side=12)
    behind = regions[0] == 0
    plain, colours = hierarchy_colours(nested_regions(seed, side=12)), hierarchy_colours(regions)
    assert np.array_equal(colours[:3][:, ~behind], plain[:3][:, ~behind])
    for level, pieces in ((0, 1), (1, count), (2, 2 * count)):
        greys = np.unique(colours[level][behind], axis=0).astype(int)
        assert len(greys) == pieces
        assert np.ptp(greys, axis=1).max() <= 8
        assert greys.max() < 128
        if pieces > 1:
            assert distances(greys).min() > 12


def test_a_background_divided_once_keeps_its_greys() -> None:
    regions = divided_background(0, 3)
    regions[2] = regions[1]
    colours = hierarchy_colours(regions)
    assert np.array_equal(colours[1], colours[2])


def test_undivided_regions_keep_their_colour() -> None:
    regions = np.zeros((3, 4, 4), dtype=np.uint8)
    regions[0, :, 1:] = 1
    regions[1] = regions[2] = np.array([0, 1, 2, 2])
    regions[2, 2:, 2:] = 3
    colours = hierarchy_colours(regions)
    assert np.array_equal(colours[1][:, 1], colours[2][:, 1])
    assert not np.array_equal(colours[1][3, 3], colours[2][3, 3])


def test_children_are_closer_to_their_own_parent_than_parents_to_each_other() -> None:
    parts = np.repeat(np.arange(1, 5, dtype=np.uint8), 2)
    subparts = np.arange(1, 9, dtype=np.uint8)
    regions = np.stack([np.ones(8, dtype=np.uint8), parts, subparts])[:, None]
    colours = hierarchy_colours(regions)[:, 0].astype(float)
    to_parent = np.linalg.norm(colours[2] - colours[1], axis=-1)
    assert to_parent.max() < distances(colours[1][::2]).min()


def test_neighbouring_tokens_differ_in_shade() -> None:
    tokens = hierarchy_colours(np.ones((3, 6, 6), dtype=np.uint8))[-1].astype(int)
    for neighbour in (
        tokens[1:] - tokens[:-1],
        tokens[:, 1:] - tokens[:, :-1],
        tokens[1:, 1:] - tokens[:-1, :-1],
    ):
        assert np.abs(neighbour).max(axis=-1).min() > 0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 5000), st.integers(1, 300), st.integers(0, 3))
def test_spread_rows_rise_and_cover_everything(num_rows: int, limit: int, seed: int) -> None:
    rows = spread_rows(num_rows, limit, seed)
    assert len(rows) == min(num_rows, limit)
    assert (np.diff(rows) >= 0).all()
    if len(rows):
        assert 0 <= rows[0] <= num_rows / limit
        assert rows[-1] < num_rows
    if num_rows >= 2 * limit:
        assert (np.diff(rows) <= 2 * num_rows / limit + 1).all()


def test_spread_rows_meet_every_column_of_the_grid() -> None:
    # 64 maps of 16 columns and a stride of exactly 16: even spacing would take column 0 alone.
    assert len(np.unique(spread_rows(64 * 256, 1024) % 16)) == 16
