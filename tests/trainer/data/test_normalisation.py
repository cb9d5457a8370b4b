"""Normalised features: an exact way in and out, a run that carries its own statistics, and every refusal."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from fixture_shards import NUM_LEVELS, WIDTH, vouch, write_shards
from tiny_runs import FLOW

from hierarchy_builder.canvases import level_canvases
from hierarchy_builder.errors import MismatchError, TrainerError
from trainer.data.normalisation import FLOOR, RAW, Normalisation, Normaliser, normaliser_of
from trainer.data.reader import ShardReader
from trainer.data.shards import open_index
from trainer.data.stream import Batch
from trainer.evaluation.evaluate import evaluate
from trainer.methods import registry
from trainer.methods.trajectory_forcing.sample import sample_levels
from trainer.seeds import level_noise
from trainer.training import checkpoint as saved
from trainer.trajectories.pipeline import Trajectory, TrajectoryPipeline

OFFSET = 60.0
"""The drawn features lie around here, with a spread near 1 in every channel."""
CHANNEL = dataclasses.replace(FLOW, normalise="channel")
KINDS: tuple[Normalisation, ...] = ("channel", "position")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards", offset=OFFSET)


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 8 steps on features normalised per channel."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    registry.train(CHANNEL, str(shards), str(out), quiet=True)
    return out


@pytest.fixture(scope="module")
def batch(shards: Path) -> Batch:
    index = open_index(str(shards))
    reader = ShardReader(index)
    samples = [reader.read(number) for number in range(index.num_samples)]
    return Batch(
        features=torch.from_numpy(np.stack([sample.features for sample in samples])),
        regions=torch.from_numpy(np.stack([sample.regions for sample in samples])),
        label=torch.tensor([sample.label for sample in samples]),
        level=torch.arange(len(samples)) % NUM_LEVELS,
        keys=[sample.key for sample in samples],
    )


@pytest.mark.parametrize(("kind", "axes"), [("channel", (0, 1, 2)), ("position", (0,))])
def test_the_network_sees_mean_0_and_spread_1(
    shards: Path, batch: Batch, kind: Normalisation, axes: tuple[int, ...]
) -> None:
    seen = normaliser_of(kind, open_index(str(shards))).apply(batch.features.float()).double()
    torch.testing.assert_close(seen.mean(axes), torch.zeros_like(seen.mean(axes)), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        seen.std(axes, correction=0), torch.ones_like(seen.mean(axes)), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_undo_is_the_inverse(shards: Path, batch: Batch, kind: Normalisation) -> None:
    normaliser = normaliser_of(kind, open_index(str(shards)))
    features = batch.features.float()
    # float32 holds numbers near 60 to 4e-6.
    torch.testing.assert_close(normaliser.undo(normaliser.apply(features)), features, atol=1e-5, rtol=0)


def test_normalise_none_keeps_every_bit(shards: Path, batch: Batch) -> None:
    normaliser = normaliser_of("none", open_index(str(shards)))
    features = batch.features.float()
    assert torch.equal(normaliser.apply(features), features)
    assert torch.equal(normaliser.undo(features), features)
    for mine, plain in zip(batch.targets(normaliser), batch.targets(), strict=True):
        assert torch.equal(mine, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_region_means_of_what_the_network_sees(
    shards: Path, batch: Batch, kind: Normalisation
) -> None:
    normaliser = normaliser_of(kind, open_index(str(shards)))
    seen = level_canvases(normaliser.apply(batch.features.float()), batch.regions)
    x, prev, _ = batch.targets(normaliser)
    row = torch.arange(len(batch))
    assert torch.equal(x, seen[row, batch.level])
    has_prev = batch.level > 0
    assert torch.equal(prev[has_prev], seen[row, batch.level - 1][has_prev])
    assert not prev[~has_prev].any()


def test_canvases_come_back_raw_per_channel_and_not_per_position(shards: Path, batch: Batch) -> None:
    features, index = batch.features.float(), open_index(str(shards))
    raw = level_canvases(features, batch.regions)
    channel, position = (
        normaliser_of(kind, index).teacher_canvases(features, batch.regions) for kind in KINDS
    )
    torch.testing.assert_close(channel, raw, atol=2e-5, rtol=0)
    torch.testing.assert_close(position[:, -1], raw[:, -1], atol=2e-5, rtol=0)
    assert (position[:, 0] - raw[:, 0]).abs().max() > 0.05


def test_channels_that_hardly_vary_stay_small() -> None:
    normaliser = Normaliser.of(np.array([2.0, -1.0, 5.0]), np.array([3.0, 0.0, 1e-9]))
    torch.testing.assert_close(normaliser.std, torch.tensor([3.0**0.5, FLOOR, FLOOR]))
    assert normaliser.apply(torch.tensor([2.0, -1.0, 5.0 + 3e-5])).abs().max() < 0.1
    constant = Normaliser.of(np.array([2.0, -1.0]), np.zeros(2))
    assert torch.equal(constant.undo(constant.apply(torch.tensor([2.0, -1.0]))), torch.tensor([2.0, -1.0]))


def test_samples_are_raw_features(run: Path, shards: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(run, tmp_path / "moved"))
    pipe = TrajectoryPipeline.from_pretrained(moved, device="cpu")
    trajectories = pipe([0, 1, 2], seed=[3, 4, 5])
    levels = torch.stack([trajectory.levels for trajectory in trajectories])
    assert (levels.mean(dim=(0, 1, 2, 3)) - OFFSET).abs().max() < 3  # not undone it would be 57 away
    assert 0.1 < (levels - OFFSET).std() < 10
    trajectories[0].save(tmp_path / "a.safetensors")
    assert torch.equal(Trajectory.load(tmp_path / "a.safetensors").levels, trajectories[0].levels)
    measured = dict(evaluate(pipe, open_index(str(shards)), samples_per_class=2))
    assert measured["roughness_real"] < 1e-2


def test_resuming_from_a_level_takes_and_gives_raw_features(run: Path) -> None:
    pipe = TrajectoryPipeline.from_pretrained(run, device="cpu")
    config, label = pipe.model.config, torch.tensor([0, 2])
    noise = level_noise([3, 4], config.num_levels, config.grid, config.in_channels)
    whole = sample_levels(pipe.model, label, noise, normaliser=pipe.normaliser)
    assert torch.equal(whole, torch.stack([each.levels for each in pipe([0, 2], seed=[3, 4])]))
    rest = sample_levels(
        pipe.model, label, noise, start_level=2, previous=whole[:, 1], normaliser=pipe.normaliser
    )
    torch.testing.assert_close(rest, whole[:, 2:], atol=1e-3, rtol=0)
    edited = sample_levels(
        pipe.model, label, noise, start_level=2, previous=whole[:, 1] + 3, normaliser=pipe.normaliser
    )
    assert (edited - rest).abs().max() > 1e-2


def test_resumed_run_equals_uninterrupted(shards: Path, run: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(shards, tmp_path / "shards"))
    out = str(tmp_path / "run")
    registry.train(dataclasses.replace(CHANNEL, total_images=32), str(moved), out, quiet=True)
    (moved / "statistics.npz").unlink()  # the checkpoint has its own
    registry.train(CHANNEL, str(moved), out, quiet=True)
    mine, other = tensors_of(tmp_path / "run"), tensors_of(run)
    assert {"normaliser/mean", "normaliser/std", "model/u_out.weight"} <= mine.keys() == other.keys()
    assert [name for name in mine if not torch.equal(mine[name], other[name])] == []


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    folder = saved.checkpoint_folder(run, 8)
    return {
        f"{path.stem}/{name}": tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in saved.load_tensors(path).items()
    }


@pytest.mark.parametrize("resume", ["auto", "other folder"])
@pytest.mark.parametrize("kind", ["none", "position"])
def test_another_normalisation_is_refused(
    shards: Path, run: Path, tmp_path: Path, kind: Normalisation, resume: str
) -> None:
    config = dataclasses.replace(CHANNEL, normalise=kind)
    where: dict[str, Any] = {"out": str(run)}
    if resume == "other folder":
        where = {"out": str(tmp_path / "run"), "resume": str(run)}
    with pytest.raises(MismatchError, match=f"normalise: 'channel' there, '{kind}' now") as caught:
        registry.train(config, str(shards), **where, quiet=True)
    assert caught.value.exit_code == 5


def test_checkpoints_without_normaliser_are_raw(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved.checkpoint_folder(run, 8), tmp_path / "step"))
    (folder / saved.NORMALISER).unlink()
    assert saved.load_normaliser(folder) is RAW
    with pytest.raises(TrainerError, match=r"normaliser\.safetensors: 0 bytes"):
        TrajectoryPipeline.from_pretrained(folder)  # the checkpoint lists it: it was lost


def test_missing_statistics_are_named(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    (shards / "statistics.npz").unlink()
    message = r"statistics\.npz is missing: normalise needs it; .* or train with normalise=none"
    with pytest.raises(TrainerError, match=message):
        registry.train(CHANNEL, str(shards), str(tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run").exists()
    assert normaliser_of("none", open_index(str(shards))) is RAW


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (None, "is damaged"),
        ({"channel_mean": np.zeros(WIDTH)}, "is damaged .*channel_variance"),
        (
            {"channel_mean": np.zeros(WIDTH), "channel_variance": np.ones(9)},
            r"shape \(9,\), expected .* \(3,\)",
        ),
        ({"channel_mean": np.zeros(WIDTH), "channel_variance": np.full(WIDTH, np.nan)}, "finite numbers"),
        ({"channel_mean": np.array([None])}, "is damaged"),  # pickled
    ],
)
def test_damaged_statistics_are_named(tmp_path: Path, arrays: dict[str, Any] | None, message: str) -> None:
    shards = write_shards(tmp_path / "shards")
    if arrays is None:
        (shards / "statistics.npz").write_bytes(b"PK\x03\x04 cut short")
    else:
        np.savez(shards / "statistics.npz", allow_pickle=True, **arrays)
    vouch(shards)
    with pytest.raises(TrainerError, match=message):
        normaliser_of("channel", open_index(str(shards)))


def test_statistics_are_read_from_remote_shards(shards: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(shards), "/far/shards", recursive=True)
    near, far = (normaliser_of("position", open_index(url)) for url in (str(shards), "memory://far/shards"))
    assert torch.equal(near.mean, far.mean)
    assert near.mean.shape == (4, 4, WIDTH)
    memory.rm("/far", recursive=True)
