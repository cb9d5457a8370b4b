"""Moments against numpy, and the same bytes however the blocks come."""

import hypothesis.extra.numpy as arrays
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hierarchy_builder.statistics import merge_tree, moments_of, per_channel, write_statistics

VALUES = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 30), st.just(2), st.just(3)), elements=st.floats(-100, 100, width=16)
)


@settings(max_examples=40, deadline=None)
@given(values=VALUES, cuts=st.lists(st.integers(0, 30), max_size=5))
def test_merged_blocks_equal_the_whole(values: np.ndarray, cuts: list[int]) -> None:
    whole = moments_of(values)
    merged = merge_tree([moments_of(part) for part in np.split(values, sorted(cuts))])
    assert merged.count == len(values)
    np.testing.assert_allclose(merged.mean, values.astype(np.float64).mean(axis=0), atol=1e-9)
    np.testing.assert_allclose(merged.m2, whole.m2, atol=1e-6)
    np.testing.assert_allclose(whole.variance, values.astype(np.float64).var(axis=0), atol=1e-9)


def test_channels_pool_all_positions() -> None:
    values = np.random.default_rng(0).normal(3, 2, (50, 4, 5, 6))
    pooled = per_channel(moments_of(values))
    assert pooled.count == 50 * 20
    np.testing.assert_allclose(pooled.mean, values.mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(pooled.variance, values.var(axis=(0, 1, 2)))


def test_large_offsets_keep_their_variance() -> None:
    values = 1e6 + np.random.default_rng(1).normal(0, 1e-2, (1000, 1))
    parts = [moments_of(part) for part in np.array_split(values, 7)]
    np.testing.assert_allclose(merge_tree(parts).variance, values.var(axis=0), rtol=1e-6)


def test_file_loads_without_pickle(tmp_path) -> None:
    write_statistics(tmp_path / "statistics.npz", moments_of(np.ones((3, 2, 2, 4), np.float16)))
    with np.load(tmp_path / "statistics.npz", allow_pickle=False) as stored:
        assert stored["count"] == 3
        assert stored["channel_mean"].shape == (4,)
        assert not stored["variance"].any()
