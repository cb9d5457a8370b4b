"""Level canvases and region means: values, dtypes, independence of batch and of region names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hierarchy_builder.canvases import level_canvases, region_means
from hierarchy_builder.errors import BuilderError


def batch(num_images: int = 5, grid: tuple[int, int] = (6, 7), num_channels: int = 9, seed: int = 0):
    random = np.random.default_rng(seed)
    features = random.normal(size=(num_images, *grid, num_channels)).astype(np.float16)
    regions = random.integers(0, 5, size=(num_images, 3, *grid)).astype(np.uint8)
    return features, regions


def test_canvas_token_is_the_mean_of_its_region() -> None:
    features, regions = batch()
    canvases = level_canvases(features.astype(np.float32), regions)
    assert canvases.shape == (5, 4, 6, 7, 9)
    for image in range(5):
        for level in range(3):
            for region in np.unique(regions[image, level]):
                inside = regions[image, level] == region
                mean = features[image][inside].mean(axis=0, dtype=np.float64)
                # float32 sums of at most 42 values of order 1
                np.testing.assert_allclose(
                    canvases[image, level][inside], np.tile(mean, (inside.sum(), 1)), atol=1e-6
                )
    np.testing.assert_array_equal(canvases[:, 3], features)


def test_kind_and_dtype_follow_the_features() -> None:
    features, regions = batch()
    half = level_canvases(features, regions)
    assert isinstance(half, np.ndarray)
    assert half.dtype == np.float16
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        canvases = level_canvases(torch.tensor(features).to(dtype), torch.tensor(regions))
        assert canvases.dtype == dtype
    np.testing.assert_array_equal(level_canvases(torch.tensor(features), regions).numpy(), half)


def test_means_are_summed_in_float32() -> None:
    features = np.full((1, 64, 64, 1), 60.0, dtype=np.float16)  # the sum, 245760, is beyond float16
    canvases = level_canvases(features, np.zeros((1, 1, 64, 64), dtype=np.uint8))
    assert (canvases == 60).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), row=st.integers(0, 4))
def test_bits_do_not_depend_on_the_batch(seed: int, row: int) -> None:
    features, regions = batch(seed=seed)
    regions[(row + 1) % 5] += 40
    together = level_canvases(features.astype(np.float32), regions)
    alone = level_canvases(features[row : row + 1].astype(np.float32), regions[row : row + 1])
    np.testing.assert_array_equal(alone[0], together[row])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_bits_do_not_depend_on_region_names(seed: int) -> None:
    features, regions = batch(seed=seed)
    names = np.random.default_rng(seed).permutation(256).astype(np.uint8)
    features = features.astype(np.float32)
    np.testing.assert_array_equal(level_canvases(features, names[regions]), level_canvases(features, regions))


def test_gradients_reach_every_token_of_a_region() -> None:
    features, regions = batch(num_images=1)
    tokens = torch.tensor(features, dtype=torch.float32, requires_grad=True)
    level_canvases(tokens, regions)[0, 0, 0, 0].sum().backward()
    inside = torch.tensor(regions[0, 0] == regions[0, 0, 0, 0])
    expected = inside[..., None] / inside.sum() * torch.ones(9)
    torch.testing.assert_close(tokens.grad[0], expected)


def test_region_means_and_counts() -> None:
    features, regions = batch()
    regions[:, 1][regions[:, 1] == 3] = 2
    means, counts = region_means(features, regions[:, 1])
    assert means.shape == (5, int(regions[:, 1].max()) + 1, 9)
    assert means.dtype == np.float32
    assert (counts.sum(axis=1) == 42).all()
    assert (counts[:, 3] == 0).all()
    assert (means[:, 3] == 0).all()
    expected = features[2][regions[2, 1] == 2].mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(means[2, 2], expected, atol=1e-6)


def test_no_images_give_empty_canvases() -> None:
    features, regions = batch()
    assert level_canvases(features[:0], regions[:0]).shape == (0, 4, 6, 7, 9)


def test_shapes_that_do_not_fit_are_refused() -> None:
    features, regions = batch()
    with pytest.raises(BuilderError, match=r"regions have shape \(5, 3, 6, 6\), expected .*\[5, L−1, 6, 7\]"):
        level_canvases(features, regions[..., :6])
    with pytest.raises(BuilderError, match=r"expected \[N, H, W\] = \(5, 6, 7\)"):
        region_means(features, regions)
    with pytest.raises(BuilderError, match=r"expected \[N, H, W, C\]"):
        level_canvases(features[0], regions)
