"""Moments against numpy and exact arithmetic, and the same bytes however the blocks come."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import write_tree

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build.workers import Workers
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig
from hierarchy_builder.progress import Reporter
from hierarchy_builder.records import Block, blocks_of
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store import statistics
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.statistics import (
    Moments,
    merge_tree,
    moments_of,
    per_channel,
    scatter_of,
    write_statistics,
)
from hierarchy_builder.verify.checks import find_problems

VALUES = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 30), st.just(2), st.just(3)), elements=st.floats(-100, 100, width=16)
)
FEATURES = arrays.arrays(
    np.float16, st.tuples(st.integers(1, 30), st.just(1), st.just(2), st.just(3)), elements=st.floats(-99, 99)
)


def joint_moments(features: np.ndarray, threads: int = 1) -> Moments:
    """Moments of all tokens of [n, H, W, C], with their scatter matrix."""
    channel = per_channel(moments_of(features))
    return Moments(channel.count, channel.mean, scatter_of(features, channel.mean, threads))


def test_threads_and_blocks_of_places_change_no_bit_of_the_moments() -> None:
    values = np.random.default_rng(0).standard_normal((50, 4, 3, 5)).astype(np.float16)
    found = moments_of(values, threads=3)
    rows = values.astype(np.float64)  # as earlier releases summed: a row of the grid at a time
    for row in range(4):
        mean = rows[:, row].mean(axis=0)
        assert np.array_equal(found.mean[row], mean)
        deviations = rows[:, row] - mean
        assert np.array_equal(found.m2[row], np.einsum("n...,n...->...", deviations, deviations))
    assert moments_of(values[:0], threads=3).count == 0


def moments_in(store: Path, block: Block) -> Moments:
    """The moments of a block as they were written."""
    count, mean, m2 = (stores.read_block(store, name, block)[0] for name in stores.MOMENTS)
    return Moments(int(count), mean, m2)


@settings(max_examples=40, deadline=None)
@given(values=VALUES, cuts=st.lists(st.integers(0, 30), max_size=5))
def test_merged_blocks_equal_the_whole(values: np.ndarray, cuts: list[int]) -> None:
    whole = moments_of(values)
    merged = merge_tree([moments_of(part) for part in np.split(values, sorted(cuts))])
    assert merged.count == len(values)
    np.testing.assert_allclose(merged.mean, values.astype(np.float64).mean(axis=0), atol=1e-9)
    np.testing.assert_allclose(merged.m2, whole.m2, atol=1e-6)
    np.testing.assert_allclose(whole.variance, values.astype(np.float64).var(axis=0), atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(features=FEATURES, cuts=st.lists(st.integers(0, 30), max_size=5))
def test_merged_covariance_equals_that_of_numpy(features: np.ndarray, cuts: list[int]) -> None:
    merged = merge_tree([joint_moments(part) for part in np.split(features, sorted(cuts))])
    tokens = features.reshape(-1, 3).astype(np.float64)
    assert merged.count == len(tokens)
    np.testing.assert_allclose(merged.variance, np.cov(tokens, rowvar=False, bias=True), atol=1e-9)
    np.testing.assert_allclose(np.diag(merged.m2), per_channel(moments_of(features)).m2, atol=1e-6)
    assert np.array_equal(merged.m2, merged.m2.T)


@pytest.mark.parametrize("width", [1, 2])
def test_covariance_of_few_channels_has_two_axes(width: int) -> None:
    features = np.random.default_rng(0).normal(size=(6, 2, 2, width)).astype(np.float16)
    merged = merge_tree([joint_moments(part) for part in np.split(features, 3)])
    expected = np.cov(features.reshape(-1, width).astype(np.float64), rowvar=False, bias=True)
    np.testing.assert_allclose(merged.variance, expected.reshape(width, width), atol=1e-12)


def test_covariance_does_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "SCATTER_VALUES", 5 * 4 * 4 * 24)  # seven parts
    features = np.random.default_rng(0).normal(3, 1, (33, 4, 4, 24)).astype(np.float16)
    alone = scatter_of(features, np.full(24, 3.0))
    for threads in (2, 3, 8):
        assert np.array_equal(scatter_of(features, np.full(24, 3.0), threads), alone)


def test_channels_pool_all_positions() -> None:
    values = np.random.default_rng(0).normal(3, 2, (50, 4, 5, 6))
    pooled = per_channel(moments_of(values))
    assert pooled.count == 50 * 20
    np.testing.assert_allclose(pooled.mean, values.mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(pooled.variance, values.var(axis=(0, 1, 2)))


def test_variance_is_exact_for_means_far_above_the_deviation() -> None:
    """Against rational arithmetic; the sum of squares minus the square of the sum has no correct digit here."""
    values = (1e4 + np.random.default_rng(1).normal(0, 1e-2, (300, 1, 1, 2))).astype(np.float32)
    exact = [[Fraction(float(value)) for value in column] for column in values.reshape(-1, 2).T]
    deviations = [[value - sum(column) / 300 for value in column] for column in exact]
    covariance = [
        [float(sum(a * b for a, b in zip(p, q, strict=True)) / 300) for q in deviations] for p in deviations
    ]
    blocks = np.array_split(values, 7)
    # float64 holds 1e4 to 2e-12, a deviation of 1e-2 to 2e-10 of itself.
    np.testing.assert_allclose(merge_tree(map(joint_moments, blocks)).variance, covariance, rtol=1e-9)
    merged = merge_tree(map(moments_of, blocks))
    np.testing.assert_allclose(merged.variance.ravel(), np.diag(covariance), rtol=1e-9)
    narrow = values.reshape(-1, 2)
    naive = (narrow**2).mean(axis=0) - narrow.mean(axis=0) ** 2
    assert (np.abs(naive / np.diag(covariance) - 1) > 1).all()


@settings(max_examples=8, deadline=None)
@given(num_rows=st.integers(1, 24), block_rows=st.integers(3, 9), data=st.data())
def test_bytes_do_not_depend_on_the_order_of_completion(
    tmp_path_factory: pytest.TempPathFactory, num_rows: int, block_rows: int, data: st.DataObject
) -> None:
    features = np.random.default_rng(num_rows).normal(5, 1, (num_rows, 2, 2, 3)).astype(np.float16)
    blocks = blocks_of(num_rows, block_rows)
    written = []
    for order in (blocks, data.draw(st.permutations(blocks))):
        folder = tmp_path_factory.mktemp("order")
        store = folder / "features.zarr"
        shape = (num_rows, block_rows, {"grid": (2, 2), "width": 3})
        layout = stores.stage_layout("extract", *shape) | stores.stage_layout("covariance", *shape)
        stores.create(store, layout)
        for block in order:
            part = features[block.start : block.stop]
            stores.write_block(store, block, stores.moment_arrays(moments_of(part)))
            stores.write_block(store, block, {"block_scatter": joint_moments(part).m2[None]})
        position = merge_tree(moments_in(store, block) for block in blocks)
        joint = merge_tree(
            replace(
                per_channel(moments_in(store, block)),
                m2=stores.read_block(store, "block_scatter", block)[0],
            )
            for block in blocks
        )
        write_statistics(folder / "statistics.npz", position, joint)
        written.append((folder / "statistics.npz").read_bytes())
    assert written[0] == written[1]


def test_file_loads_without_pickle(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(3, 2, 2, 4)).astype(np.float16)
    write_statistics(tmp_path / "a.npz", moments_of(features), joint_moments(features))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as stored:
        shapes = {name: stored[name].shape for name in stored.files}
        assert (stored["count"], stored["channel_count"]) == (3, 12)
        np.testing.assert_allclose(stored["channel_m2"], 12 * stored["channel_variance"])
        np.testing.assert_allclose(np.diag(stored["covariance"]), stored["channel_variance"])
    per_position = dict.fromkeys(("mean", "variance", "m2"), (2, 2, 4))
    pooled = {f"channel_{name}": (4,) for name in per_position}
    assert shapes == {"count": (), "channel_count": (), **per_position, **pooled, "covariance": (4, 4)}
    write_statistics(tmp_path / "b.npz", moments_of(features))
    with np.load(tmp_path / "b.npz", allow_pickle=False) as stored:
        assert "covariance" not in stored.files


def test_covariance_of_finished_shards_keeps_the_tars(tmp_path: Path) -> None:
    plan = steps.BuildPlan(
        extract=ExtractConfig(encoder="dct", block_rows=4),
        hierarchy=HierarchyRecipe.paper(),
        shard=ShardConfig(samples_per_shard=4),
    )
    folder = BuildFolder(tmp_path / "build")
    session = steps.Session(workers=Workers(count=0), reporter=Reporter(quiet=True))
    photos = write_tree(tmp_path / "photos", per_class=2)
    steps.build(folder, str(photos), plan, session)
    before = {tar: tar.stat().st_mtime_ns for tar in folder.shards.glob("*.tar")}
    index = (folder.shards / "index.json").read_bytes()
    for _ in range(2):  # the second finds every block done
        steps.shard(folder, replace(plan.shard, covariance=True), session)
        assert {tar: tar.stat().st_mtime_ns for tar in folder.shards.glob("*.tar")} == before
        assert (folder.shards / "index.json").read_bytes() == index
        tokens = stores.read_rows(stores.open_store(folder.features), "features", slice(None)).reshape(-1, 48)
        with np.load(folder.shards / "statistics.npz", allow_pickle=False) as stored:
            expected = np.cov(tokens.astype(np.float64), rowvar=False, bias=True)
            np.testing.assert_allclose(stored["covariance"], expected, atol=1e-12)
    assert list(find_problems(folder)) == []


def test_covariance_is_computed_again_for_new_features(tmp_path: Path) -> None:
    plan = steps.BuildPlan(
        extract=ExtractConfig(encoder="dct", block_rows=4),
        hierarchy=HierarchyRecipe.paper(),
        shard=ShardConfig(covariance=True),
    )
    folder = BuildFolder(tmp_path / "build")
    session = steps.Session(workers=Workers(count=0), reporter=Reporter(quiet=True))
    photos = write_tree(tmp_path / "photos", per_class=2)
    steps.build(folder, str(photos), plan, session)
    before = (folder.shards / "statistics.npz").read_bytes()
    steps.build(folder, str(photos), plan, replace(session, fresh=True))
    assert (folder.shards / "statistics.npz").read_bytes() == before
    with np.load(folder.shards / "statistics.npz", allow_pickle=False) as stored:
        np.testing.assert_allclose(np.diag(stored["covariance"]), stored["channel_variance"], atol=1e-12)
