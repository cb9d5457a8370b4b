"""Order, levels and damage: the stream gives each sample once per epoch, alike on any number of ranks."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import tarfile
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from fixture_shards import (
    CLASS_NAMES,
    GRID,
    WIDTH,
    change_index,
    make_sample,
    npy,
    reindex,
    vouch,
    write_shards,
)
from hypothesis import given
from hypothesis import strategies as st
from mutations import bits_of, flipped

from hierarchy_builder.errors import MismatchError, TrainerError, UsageError
from trainer.data import stream
from trainer.data.reader import ShardReader
from trainer.data.shards import open_index, read_statistics
from trainer.data.stream import BatchDataset, StreamPlan, batch_loader, coverage, epoch_order


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards")


def plan_of(sizes: tuple[int, ...] = (7, 7, 7, 3), batch_size: int = 6, **fields: object) -> StreamPlan:
    return StreamPlan(shard_sizes=sizes, num_levels=4, batch_size=batch_size, **fields)


def test_reads_what_was_written(folder: Path) -> None:
    reader = ShardReader(open_index(str(folder)), max_open=2)
    generator = np.random.default_rng(0)
    for number in range(24):
        key, label, features, regions = make_sample(number, generator)
        sample = reader.read(number, extras=True)
        assert (sample.key, sample.label) == (key, label)
        assert sample.metadata["class_name"] == CLASS_NAMES[label]
        np.testing.assert_array_equal(sample.features, features)
        np.testing.assert_array_equal(sample.regions, regions)


def test_int8_features_are_scaled_back(tmp_path: Path, folder: Path) -> None:
    exact = ShardReader(open_index(str(folder))).read(5).features.astype(np.float32)
    coded = ShardReader(open_index(str(write_shards(tmp_path, int8=True)))).read(5).features
    assert coded.dtype == np.float16
    # Half a step of 127, and the rounding of float16.
    bound = np.abs(exact).max(-1, keepdims=True) * (0.5 / 127 + 2**-10)
    assert np.all(np.abs(coded - exact) <= bound)


def test_build_folder_is_accepted(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    assert open_index(str(tmp_path)).num_samples == 24


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("index.json", "[]"),
        ("index.json", "{"),
        ("index.json", '{"format_version": 1}'),
        ("index.json", '{"format_version": 1, "shardlist": 3}'),
        ("class_map.json", "{"),
        ("class_map.json", '{"ant": "x"}'),
        ("class_map.json", '{"ant": 0, "bee": 0}'),
        ("class_map.json", "{}"),
    ],
)
def test_a_damaged_index_is_named(tmp_path: Path, name: str, content: str) -> None:
    (write_shards(tmp_path) / name).write_text(content)
    with pytest.raises(TrainerError, match=f"{name} is not the file that _SUCCESS vouches for"):
        open_index(str(tmp_path))
    vouch(tmp_path)
    with pytest.raises(TrainerError, match=name):
        open_index(str(tmp_path))


def test_labels_that_the_class_map_leaves_out_are_numbers(tmp_path: Path) -> None:
    (write_shards(tmp_path) / "class_map.json").write_text('{"cat": 3, "ant": 0}')
    vouch(tmp_path)
    assert open_index(str(tmp_path)).class_names == ("ant", "1", "2", "cat")


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(TrainerError, match="nosuch://x: Protocol not known"):
        open_index("nosuch://x")


def test_remote_shards_are_downloaded_once(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path))
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/stream-test", recursive=True)
    index = open_index("memory://stream-test")
    first = ShardReader(index).read(0)
    memory.rm("/stream-test", recursive=True)
    again = ShardReader(index).read(0)
    np.testing.assert_array_equal(first.features, again.features)


def test_a_set_that_does_not_fit_into_the_cache_is_read_where_it_lies(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/distant-test", recursive=True)
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path))
    monkeypatch.setenv("TRAINER_CACHE_BYTES", "100")
    near, far = open_index(str(folder)), open_index("memory://distant-test")
    expected = ShardReader(near).read_rows(range(near.num_samples))
    reader = ShardReader(far)
    found = reader.read_rows(range(far.num_samples))
    assert torch.equal(found.features, expected.features)
    assert torch.equal(found.regions, expected.regions)
    assert (found.keys, found.label.tolist()) == (expected.keys, expected.label.tolist())
    assert reader.read(3, extras=True).metadata == ShardReader(near).read(3, extras=True).metadata
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".lock"}
    monkeypatch.setattr(memory, "get_file", pytest.fail)  # where its members lie is known now
    assert ShardReader(far).read_rows([5]).keys == expected.keys[5:6]
    memory.rm("/distant-test", recursive=True)


def test_copies_of_other_sets_make_room(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fsspec.filesystem("memory")
    index = open_index(str(folder))
    size = sum(shard.num_bytes for shard in index.shards)
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path))
    monkeypatch.setenv("TRAINER_CACHE_BYTES", str(2 * size))
    for name in ("first", "second", "first", "third"):
        memory.put(str(folder), f"/{name}-set", recursive=True)
        reader = ShardReader(open_index(f"memory://{name}-set"))
        reader.read_rows(range(index.num_samples))
        for number, tar in enumerate(
            sorted(tmp_path.glob("*/*.tar"), key=lambda tar: tar.stat().st_mtime_ns)
        ):
            os.utime(tar, (number, number))  # a clock that is finer than that of the disk
    assert sum(tar.stat().st_size for tar in tmp_path.glob("*/*.tar")) == 2 * size
    kept = {hashlib.sha256(f"memory://{name}-set".encode()).hexdigest()[:16] for name in ("first", "third")}
    assert {
        tar.parent.name for tar in tmp_path.glob("*/*.tar")
    } == kept  # the second was used before the first
    for name in ("first", "second", "third"):
        memory.rm(f"/{name}-set", recursive=True)


@pytest.mark.parametrize("name", ["_SUCCESS", "index.json", "class_map.json", "statistics.npz"])
@pytest.mark.parametrize("kind", ["pipe", "device", "sparse"])
def test_only_files_of_bounded_size_are_read_beside_the_tars(tmp_path: Path, name: str, kind: str) -> None:
    (place := write_shards(tmp_path) / name).unlink()
    match kind:
        case "pipe":
            os.mkfifo(place)
        case "device":
            place.symlink_to("/dev/zero")
        case _:
            place.touch()
            os.truncate(place, 2**40)
    with pytest.raises(TrainerError, match=f"{name}.* damaged .*(no regular file|more than)"):
        read_statistics(open_index(str(tmp_path)), ["channel_mean"])


@pytest.mark.parametrize(
    ("end", "message"), [(b"x", "the shard is corrupt"), (bytes(2**24), "more than the .* bytes")]
)
def test_a_corrupt_download_leaves_nothing_behind(
    tmp_path: Path, folder: Path, end: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path))
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/corrupt-test", recursive=True)
    index = open_index("memory://corrupt-test")
    tar = f"/corrupt-test/{index.shards[0].name}"
    memory.pipe_file(tar, memory.cat_file(tar)[:-1] + end)
    with pytest.raises(TrainerError, match=message):
        ShardReader(index).read(0)
    memory.rm("/corrupt-test", recursive=True)
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".lock"]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6).map(tuple),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
    window=st.integers(1, 7),
)
def test_epoch_visits_each_sample_once_window_by_window(
    sizes: tuple[int, ...], seed: int, epoch: int, window: int
) -> None:
    order = epoch_order(sizes, seed, epoch, window)
    np.testing.assert_array_equal(np.sort(order), np.arange(sum(sizes)))
    shard_of = np.repeat(np.arange(len(sizes)), sizes)[order]
    first = {s: np.flatnonzero(shard_of == s).min() for s in range(len(sizes))}
    last = {s: np.flatnonzero(shard_of == s).max() for s in range(len(sizes))}
    overlapping = max(sum(first[s] <= place <= last[s] for s in first) for place in range(len(order)))
    assert overlapping <= window


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple),
    split=st.integers(1, 60),
    level_per=st.sampled_from(["sample", "batch"]),
)
def test_places_do_not_depend_on_how_they_are_asked(
    sizes: tuple[int, ...], split: int, level_per: str
) -> None:
    plan = plan_of(sizes, level_per=level_per)
    samples, levels = plan.places(0, 60)
    for whole, parts in zip(
        (samples, levels), zip(plan.places(0, split), plan.places(split, 60), strict=True), strict=True
    ):
        np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(epoch_order((20, 20), seed, epoch, 2)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("level_per", ["sample", "batch"])
def test_ranks_share_the_same_global_batches(folder: Path, world_size: int, level_per: str) -> None:
    index, plan = open_index(str(folder)), plan_of(level_per=level_per)
    whole = BatchDataset(index, plan)
    ranks = [BatchDataset(index, plan, rank, world_size) for rank in range(world_size)]
    for number in range(6):  # across the border of an epoch (24 samples, 6 a batch)
        expected, parts = whole.read(number), [dataset.read(number) for dataset in ranks]
        assert expected.keys == list(itertools.chain.from_iterable(part.keys for part in parts))
        assert torch.equal(expected.level, torch.cat([part.level for part in parts]))
        assert torch.equal(expected.features, torch.cat([part.features for part in parts]))


@pytest.mark.parametrize("workers", [1, 3])
def test_loader_threads_give_the_same_batches(folder: Path, workers: int) -> None:
    dataset = BatchDataset(open_index(str(folder)), plan_of())
    alone = list(batch_loader(dataset, range(1, 7)))
    helped = list(batch_loader(dataset, range(1, 7), workers=workers))
    assert [batch.keys for batch in alone] == [batch.keys for batch in helped]
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one.features, other.features)


def test_a_loader_that_is_left_early_ends_its_threads(folder: Path) -> None:
    before = threading.active_count()
    loader = batch_loader(BatchDataset(open_index(str(folder)), plan_of()), range(100), workers=2)
    next(loader)
    assert threading.active_count() > before
    loader.close()
    assert threading.active_count() == before


def test_reading_ahead_is_bounded_by_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = BatchDataset(open_index(str(folder)), plan_of())
    asked: list[int] = []
    monkeypatch.setattr(BatchDataset, "read", lambda self, number, pin_memory: asked.append(number) or number)
    monkeypatch.setattr(stream, "AHEAD_BYTES", 3 * dataset.num_bytes)
    loader = batch_loader(dataset, range(20), workers=2)
    assert next(loader) == 0
    assert len(asked) <= 3
    assert [*loader] == [*range(1, 20)]


@given(num_levels=st.integers(2, 5), seed=st.integers(0, 5), first=st.integers(0, 3), size=st.integers(1, 30))
def test_every_sample_meets_every_level_once_in_as_many_epochs(
    num_levels: int, seed: int, first: int, size: int
) -> None:
    plan = StreamPlan(shard_sizes=(size,), num_levels=num_levels, batch_size=1, seed=seed)
    epochs = num_levels * size
    counts = plan.level_counts(first * epochs, (first + 1) * epochs)
    np.testing.assert_array_equal(counts, np.ones((size, num_levels)))


def test_levels_of_one_epoch_are_uniform_and_differ_between_samples() -> None:
    plan = plan_of((5000, 5000), batch_size=100)
    by_epoch = []
    for epoch in range(6):
        counts = plan.level_counts(epoch * 10_000, (epoch + 1) * 10_000)
        # 10,000 draws over 4 levels: standard deviation 43.
        assert np.all(np.abs(counts.sum(axis=0) - 2500) < 220)
        by_epoch.append(counts.argmax(axis=1))
    # Epochs 3 and 4 belong to two orders, drawn independently: a quarter agrees, standard deviation 43.
    assert abs(np.sum(by_epoch[3] == by_epoch[4]) - 2500) < 220
    assert not np.any(by_epoch[2] == by_epoch[3])


def test_audit_counts_pairs_of_sample_and_level() -> None:
    plan = plan_of((10, 6), batch_size=4)
    half, whole = plan.level_counts(0, 2 * 16), plan.level_counts(0, 4 * 16)
    assert coverage(half)["samples_by_levels_met"] == [0, 0, 16, 0, 0]
    assert coverage(half)["pairs_by_times_met"] == [32, 32]
    assert coverage(whole) == {
        "images_per_level": [16, 16, 16, 16],
        "samples_by_levels_met": [0, 0, 0, 0, 16],
        "pairs_by_times_met": [0, 64],
    }


def test_level_per_batch_is_one_level_for_all_its_images() -> None:
    _, levels = plan_of(level_per="batch").places(0, 600)
    assert np.all(levels.reshape(100, 6) == levels.reshape(100, 6)[:, :1])
    assert set(levels) == {0, 1, 2, 3}


def test_targets_are_the_canvases_of_the_drawn_levels(folder: Path) -> None:
    batch = BatchDataset(open_index(str(folder)), plan_of(batch_size=24)).read(0)
    x, prev, regions = batch.targets()
    assert x.dtype == prev.dtype == torch.float32
    for row in range(len(batch)):
        level = int(batch.level[row])
        expected = mean_over_regions(batch, row, level)
        torch.testing.assert_close(x[row], expected, atol=1e-5, rtol=1e-5)
        before = mean_over_regions(batch, row, level - 1) if level else torch.zeros(*GRID, WIDTH)
        torch.testing.assert_close(prev[row], before, atol=1e-5, rtol=1e-5)
        assert torch.equal(regions[row], batch.regions[row, min(level, 2)])


def test_int8_features_reach_the_device_as_they_are(tmp_path: Path, folder: Path) -> None:
    plan = plan_of(batch_size=24)
    exact = BatchDataset(open_index(str(folder)), plan).read(0)
    coded = BatchDataset(open_index(str(write_shards(tmp_path, int8=True))), plan).read(0).rows(3, 20)
    assert (coded.features.dtype, coded.scale.dtype) == (torch.int8, torch.float32)
    moved = coded.to(torch.device("cpu"))
    for found, expected in zip(moved.targets()[:2], exact.rows(3, 20).targets()[:2], strict=True):
        # Half a step of the largest value in 127 steps; means over regions only lower it.
        assert (found - expected).abs().max() <= exact.features.abs().max() * 0.51 / 127


def mean_over_regions(batch: object, row: int, level: int) -> torch.Tensor:
    features = batch.features[row].float()
    if level == 3:
        return features
    canvas = torch.empty_like(features)
    for region in batch.regions[row, level].unique():
        here = batch.regions[row, level] == region
        canvas[here] = features[here].mean(dim=0)
    return canvas


def test_unfinished_folder(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "_SUCCESS").unlink()
    with pytest.raises(
        TrainerError, match="is not a finished shard folder: run `hierarchy-builder shard DIR`"
    ):
        open_index(str(tmp_path))


def test_newer_format_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path)
    change_index(tmp_path, format_version=2)
    with pytest.raises(MismatchError, match="format version 2, this program reads 1"):
        open_index(str(tmp_path))


def test_corrupt_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    shard = tmp_path / "train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[512 + 300] ^= 1  # padding behind the first member: only the SHA-256 can tell
    shard.write_bytes(data)
    index = open_index(str(tmp_path))
    with pytest.raises(TrainerError, match=r"train-000001\.tar: SHA-256 .* corrupt"):
        ShardReader(index).read(8)
    ShardReader(index, verifies=lambda shard: False).read(8)


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    shard = tmp_path / "train-000002.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(TrainerError, match=r"train-000002\.tar: 3000 bytes, .* truncated"):
        ShardReader(open_index(str(tmp_path))).read(15)
    reindex(tmp_path)
    with pytest.raises(TrainerError, match=r"train-000002\.tar: unexpected end of data"):
        ShardReader(open_index(str(tmp_path))).read(15)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "train-000000.tar").unlink()
    with pytest.raises(TrainerError, match=r"train-000000\.tar is missing"):
        ShardReader(open_index(str(tmp_path))).read(0)


@pytest.mark.parametrize(
    ("member", "data", "message"),
    [
        ("features.npy", npy(np.zeros((4, 4, 5), np.float16)), r"features is float16\[4, 4, 5\]"),
        ("regions.npy", npy(np.zeros((2, 4, 4), np.uint8)), r"regions is uint8\[2, 4, 4\]"),
        ("cls", b"3", "label 3, expected 0 to 2"),
        ("features.npy", b"not numpy", "magic"),
    ],
)
def test_wrong_sample_is_named(tmp_path: Path, member: str, data: bytes, message: str) -> None:
    write_shards(tmp_path)
    shard = tmp_path / "train-000000.tar"
    rewritten = tmp_path / "rewritten.tar"
    with tarfile.open(shard) as old, tarfile.open(rewritten, "w", format=tarfile.USTAR_FORMAT) as new:
        for info in old:
            content = old.extractfile(info)
            if info.name == f"ant/image0003.{member}":
                info.size, content = len(data), io.BytesIO(data)
            new.addfile(info, content)
    rewritten.replace(shard)
    reindex(tmp_path)
    with pytest.raises(TrainerError, match=rf"train-000000\.tar, sample ant/image0003: .*{message}"):
        ShardReader(open_index(str(tmp_path))).read(3)


def test_fewer_samples_than_a_batch(folder: Path) -> None:
    with pytest.raises(TrainerError, match="24 samples to train on, fewer than one batch of 30"):
        BatchDataset(open_index(str(folder)), plan_of(batch_size=30))


def test_batch_must_divide_by_ranks(folder: Path) -> None:
    with pytest.raises(UsageError, match="batch_size 6, expected a multiple of the 4 processes"):
        BatchDataset(open_index(str(folder)), plan_of(), rank=0, world_size=4)


def test_readers_share_the_check_of_a_shard(tmp_path: Path) -> None:
    write_shards(tmp_path)
    shard = tmp_path / "train-000003.tar"
    data = bytearray(shard.read_bytes())
    data[3 * 512 + 300] ^= 1  # in the padding behind a member: only the SHA-256 can tell
    shard.write_bytes(data)
    index, plan = open_index(str(tmp_path)), plan_of(batch_size=24)
    assert BatchDataset(index, plan, rank=0, world_size=2).read(0).keys
    with pytest.raises(TrainerError, match=r"train-000003\.tar: SHA-256"):
        BatchDataset(index, plan, rank=1, world_size=2).read(0)


def test_every_flipped_bit_beside_the_tars_is_found(tmp_path: Path) -> None:
    write_shards(tmp_path, num_samples=6)
    for name in ("_SUCCESS", "index.json", "class_map.json", "statistics.npz"):
        for bit in bits_of((tmp_path / name).stat().st_size, 60):
            with flipped(tmp_path / name, bit), pytest.raises(TrainerError, match=r"damaged|vouches"):
                read_statistics(open_index(str(tmp_path)), ["channel_mean"])


def test_a_marker_of_an_earlier_release_vouches_for_the_index_alone(tmp_path: Path) -> None:
    write_shards(tmp_path, num_samples=6)
    digest = hashlib.sha256((tmp_path / "index.json").read_bytes()).hexdigest()
    (tmp_path / "_SUCCESS").write_text(json.dumps({"count": 6, "index_sha256": digest}))
    assert open_index(str(tmp_path)).num_samples == 6
    text = (tmp_path / "index.json").read_text()
    (tmp_path / "index.json").write_text(text.replace('"drawn"', '"drawm"'))
    with pytest.raises(TrainerError, match=r"index\.json is not the file that _SUCCESS vouches for"):
        open_index(str(tmp_path))
    (tmp_path / "_SUCCESS").write_text("")
    with pytest.raises(TrainerError, match="_SUCCESS is damaged"):
        open_index(str(tmp_path))
