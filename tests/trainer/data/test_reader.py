"""Damaged shards that a run goes on without, and where members lie in a tar."""

from __future__ import annotations

import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import SETTINGS, call
from fixture_shards import WIDTH, add_member, npy, reindex, write_shards
from hypothesis import given
from hypothesis import strategies as st

from hierarchy_builder.errors import DamagedShardError, TrainerError
from trainer.data.reader import ShardReader, classes_with_images, spread_order, spread_samples
from trainer.data.shards import open_index
from trainer.data.stream import BatchDataset, StreamPlan, batch_loader
from trainer.data.tars import OpenTar, ShardEntry
from trainer.training.log import read_metrics


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """24 samples in shards of 7, 7, 7 and 3; the second is corrupt, the third missing."""
    folder = write_shards(tmp_path / "shards")
    tar = folder / "train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[512 + 300] ^= 1  # padding behind the first member: only the SHA-256 can tell
    tar.write_bytes(data)
    (folder / "train-000002.tar").unlink()
    return folder


def batches_of(folder: Path, world_size: int = 1, workers: int = 0) -> list[list[str]]:
    """Keys of the global batches of two epochs, gathered from all ranks."""
    plan = StreamPlan(shard_sizes=(7, 7, 7, 3), num_levels=4, batch_size=6)
    index = open_index(str(folder))
    ranks = [BatchDataset(index, plan, rank, world_size, max_damaged=2) for rank in range(world_size)]
    loaders = [batch_loader(dataset, range(8), workers) for dataset in ranks]
    return [[key for part in parts for key in part.keys] for parts in zip(*loaders, strict=True)]


def test_samples_of_the_next_whole_shard_stand_in(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader = ShardReader(open_index(str(damaged)), max_damaged=2)
    keys = [reader.read(number).key for number in range(24)]
    assert keys[:7] == [f"{('ant', 'bee', 'cat')[n % 3]}/image{n:04d}" for n in range(7)]
    last = keys[21:]
    assert keys[7:14] == keys[14:21] == (last * 3)[:7]
    assert reader.damaged_shards() == ["train-000001.tar", "train-000002.tar"]
    said = capsys.readouterr().err
    assert said.count("warning") == 2
    assert "train-000001.tar: SHA-256" in said


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (3, 1)])
def test_batches_with_damaged_shards_depend_on_no_reader(
    damaged: Path, world_size: int, workers: int
) -> None:
    assert batches_of(damaged, world_size, workers) == batches_of(damaged)


def test_one_damaged_shard_too_many_stops(damaged: Path) -> None:
    reader = ShardReader(open_index(str(damaged)), max_damaged=1)
    reader.read(0)
    with pytest.raises(
        DamagedShardError,
        match=r"train-000002\.tar is missing.*; 2 damaged shards, max_damaged_shards is 1",
    ):
        reader.read(7)


def test_a_run_goes_on_without_damaged_shards_and_counts_them(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", damaged, "--preset", "tiny-cpu", *SETTINGS, "--batch-size", "8", "--total-images", "24"]
    assert call(*words, "--out", tmp_path / "stopped", "--quiet") == 1
    assert "copy or build it again" in capsys.readouterr().err
    out = tmp_path / "run"
    assert call(*words, "--out", out, "--set", "max_damaged_shards=2", "--quiet") == 0
    audits = [row for row in read_metrics(out) if "coverage" in row]
    assert [row["damaged_shards"] for row in audits] == [["train-000001.tar", "train-000002.tar"]]
    assert sum(audits[0]["coverage"]["images_per_level"]) == 24


def test_without_any_whole_shard_there_is_nothing_to_read(damaged: Path) -> None:
    for tar in damaged.glob("*.tar"):
        tar.write_bytes(b"")
    with pytest.raises(DamagedShardError, match="all shards are damaged"):
        ShardReader(open_index(str(damaged)), max_damaged=4).read(0)


def test_threads_share_a_reader_that_keeps_one_tar_open(tmp_path: Path) -> None:
    index = open_index(str(write_shards(tmp_path)))
    alone = ShardReader(index)
    expected = [alone.read_rows([n, 23 - n]) for n in range(24)]
    shared = ShardReader(index, max_open=1)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: shared.read_rows([n, 23 - n]), list(range(24)) * 5))
    for rows, same in zip(found, expected * 5, strict=True):
        assert rows.keys == same.keys
        assert torch.equal(rows.features, same.features)


@pytest.mark.parametrize(
    ("member", "data", "message"),
    [
        ("scale.npy", npy(np.full((4, 4, 1), np.nan, np.float32)), "scale is not finite"),
        ("scale.npy", npy(np.ones((4, 4, 1))), r"scale is float64\[4, 4, 1\]"),
        ("scale.npy", None, "float16 in others"),
    ],
)
def test_wrong_scales_are_named(tmp_path: Path, member: str, data: bytes | None, message: str) -> None:
    folder = write_shards(tmp_path, int8=True)
    rewrite(folder / "train-000000.tar", f"ant/image0003.{member}", data)
    reindex(folder)
    with pytest.raises(TrainerError, match=rf"train-000000\.tar, sample ant/image0003: .*{message}"):
        ShardReader(open_index(str(folder))).read_rows([2, 3])


def test_arrays_in_another_layout_of_npy_are_read_too(tmp_path: Path) -> None:
    folder = write_shards(tmp_path)
    index = open_index(str(folder))
    expected = ShardReader(index).read(3).features
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asfortranarray(expected), version=(2, 0))
    rewrite(folder / "train-000000.tar", "ant/image0003.features.npy", stream.getvalue())
    reindex(folder)
    found = ShardReader(open_index(str(folder))).read(3).features
    assert found.shape == (4, 4, WIDTH)
    np.testing.assert_array_equal(found, expected)


def rewrite(tar: Path, name: str, data: bytes | None) -> None:
    """Replace the content of a member, or leave it out."""
    old = tar.rename(tar.with_suffix(".old"))
    with tarfile.open(old) as source, tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as target:
        for info in source:
            content = source.extractfile(info).read()
            if info.name != name:
                add_member(target, info.name, content)
            elif data is not None:
                add_member(target, name, data)


@given(
    folder=st.text("abcdefghijklmnopqrstuvwxyzü_", min_size=1, max_size=130),
    sizes=st.lists(st.integers(0, 1500), min_size=1, max_size=4),
    format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_lie_where_tarfile_says(
    tmp_path_factory: pytest.TempPathFactory, folder: str, sizes: list[int], format: int
) -> None:
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for number, size in enumerate(sizes):
            add_member(tar, f"{folder}/{number}.features.npy", bytes([number]) * size)
    entry = ShardEntry(name=path.name, num_samples=len(sizes), num_bytes=0, sha256="", folder="")
    opened = OpenTar(str(path), entry)
    for number, size in enumerate(sizes):
        key, members = opened.samples[number]
        assert key == f"{folder}/{number}"
        assert opened.read(*members["features.npy"]) == bytes([number]) * size


def test_classes_and_examples_of_a_large_set_open_few_shards(tmp_path: Path) -> None:
    index = open_index(str(write_shards(tmp_path, 240, per_shard=2)))
    assert spread_order(6) == [0, 4, 2, 1, 5, 3]
    opened = sorted({number // 2 for number in spread_samples(index, 50)})
    assert (len(opened), opened[0], opened[-1]) == (32, 0, 119)
    assert len(spread_samples(index, 50)) == 50
    for shard in set(range(120)) - {*spread_order(120)[:3]}:  # 0, 64 and 32, which hold the three classes
        (tmp_path / f"train-{shard:06d}.tar").unlink()
    assert classes_with_images(index, most=10) == [0, 1, 2]
