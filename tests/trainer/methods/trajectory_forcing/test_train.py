"""The loop: the same run whether cut in two, split over ranks, or over micro-batches."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fixture_shards import write_shards
from tiny_runs import FLOW as TINY
from tiny_runs import assert_same_state, signal_at, tensors_of

from hierarchy_builder.errors import (
    InterruptedRunError,
    MismatchError,
    NonFiniteLossError,
    TrainerError,
    UsageError,
)
from trainer.data.reader import Rows
from trainer.data.shards import open_index
from trainer.data.stream import Batch, BatchDataset
from trainer.methods import registry
from trainer.methods.trajectory_forcing import train as room
from trainer.methods.trajectory_forcing.config import TrainConfig
from trainer.training import checkpoint as saved
from trainer.training.log import read_metrics


def tiny(**fields: Any) -> TrainConfig:
    return dataclasses.replace(TINY, **fields)


@pytest.fixture(scope="module")
def whole(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 8 steps."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    registry.train(TINY, shards, str(out), quiet=True)
    return out


def timeless(run: Path) -> list[dict[str, Any]]:
    clocks = ("time", "images_per_second")
    return [{k: v for k, v in row.items() if k not in clocks} for row in read_metrics(run)]


def test_run_folder_holds_configuration_shards_and_metrics(whole: Path, shards: str) -> None:
    content = yaml.safe_load((whole / "config.yaml").read_text())
    assert content["config"]["model"]["grid"] == [4, 4]
    assert content["config"]["model"]["num_classes"] == 3
    assert content["shards"]["class_names"] == ["ant", "bee", "cat"]
    assert content["shards"]["encoder"]["name"] == "drawn"
    rows = [row for row in read_metrics(whole) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["images"] for row in rows] == list(range(8, 65, 8))
    assert all(row["loss"] == pytest.approx(row["loss_u"] + row["loss_v"] + row["region"]) for row in rows)
    assert rows[-1]["raw_mse_u"] != rows[0]["raw_mse_u"]


def test_first_step_does_not_rule_the_ones_after(shards: str, tmp_path: Path) -> None:
    registry.train(tiny(checkpoint_images=8), shards, str(tmp_path), quiet=True)
    weights = [tensors_of(tmp_path, step)["model/u_out.weight"].flatten() for step in range(1, 9)]
    steps = [after - before for before, after in itertools.pairwise(weights)]
    assert torch.cosine_similarity(steps[0], steps[-1], dim=0) < 0.95
    assert all(row["grad_norm"] < 1e4 for row in read_metrics(tmp_path) if "loss" in row)


def test_coverage_audits_finished_epochs(whole: Path) -> None:
    audits = [row for row in read_metrics(whole) if "coverage" in row]
    assert [(row["epoch"], row["images"]) for row in audits] == [(1, 24), (2, 48)]
    for row in audits:
        assert sum(row["coverage"]["images_per_level"]) == 24 * row["epoch"]
        assert sum(row["coverage"]["samples_by_levels_met"]) == 24
        assert sum(row["coverage"]["samples_by_levels_met"][1 : row["epoch"] + 1]) == 24


def test_resumed_run_equals_uninterrupted(
    shards: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_step = room.TrajectoryForcingRun.take_step

    def killed(self: Any, batch: Batch, time_is_up: bool) -> Any:
        if self.step == 6:
            raise RuntimeError("killed")
        return take_step(self, batch, time_is_up)

    monkeypatch.setattr(room.TrajectoryForcingRun, "take_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        registry.train(TINY, shards, str(tmp_path), quiet=True)
    monkeypatch.undo()
    assert read_metrics(tmp_path)[-1]["step"] == 6  # beyond the checkpoint of step 4
    registry.train(TINY, shards, str(tmp_path), quiet=True)
    assert_same_state(whole, tmp_path, 8)
    assert timeless(tmp_path) == timeless(whole)


def test_run_with_a_gaussian_start_resumes_and_keeps_what_it_was_fitted_to(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, samples = list[int](), room.TrajectoryForcingRun._samples

    def noted(self: Any, numbers: Sequence[int]) -> Iterator[Rows]:
        read.extend(numbers)
        return samples(self, numbers)

    monkeypatch.setattr(room.TrajectoryForcingRun, "_samples", noted)
    config = tiny(model=dataclasses.replace(TINY.model, start="gaussian"), normalise="none")
    for name, parts in (("whole", [64]), ("resumed", [32, 64])):
        for images in parts:
            part = dataclasses.replace(config, total_images=images)
            registry.train(part, shards, str(tmp_path / name), quiet=True)
    assert read == 2 * [*range(open_index(shards).num_samples)]  # once for each fit, and never to go on
    assert_same_state(tmp_path / "whole", tmp_path / "resumed", 8)
    tensors = tensors_of(tmp_path / "whole", 8)
    fitted = [name for name in tensors if name.endswith("start.deviation")]
    assert len(fitted) == 3  # the weights and two averages
    for name in fitted:
        torch.testing.assert_close(tensors[name], tensors["model/start.deviation"], rtol=0, atol=0)
        assert tensors[name].unique().numel() > 2


def test_resume_in_the_middle_of_a_log_interval(shards: str, tmp_path: Path) -> None:
    config = tiny(log_images=48, checkpoint_images=1000)
    registry.train(config, shards, str(tmp_path / "whole"), quiet=True)
    cut = dataclasses.replace(config, max_seconds=1e-9)
    for _ in range(7):  # every call takes one step, then stops at the wall clock
        with pytest.raises(InterruptedRunError):
            registry.train(cut, shards, str(tmp_path / "cut"), quiet=True)
    summary = registry.train(cut, shards, str(tmp_path / "cut"), quiet=True)
    assert summary.step == 8
    assert_same_state(tmp_path / "whole", tmp_path / "cut", 8)
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")


def test_finished_run_is_left_alone(shards: str, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole / "checkpoints").rglob("*")}
    summary = registry.train(TINY, shards, str(whole), quiet=True)
    assert (summary.step, summary.images_seen) == (8, 64)
    assert summary.loss == pytest.approx(
        next(r["loss"] for r in reversed(read_metrics(whole)) if "loss" in r)
    )
    assert {path: path.stat().st_mtime_ns for path in (whole / "checkpoints").rglob("*")} == before


def test_run_that_is_made_longer_equals_an_uninterrupted_one(
    shards: str, whole: Path, tmp_path: Path
) -> None:
    registry.train(tiny(total_images=32), shards, str(tmp_path), quiet=True)
    registry.train(TINY, shards, str(tmp_path), quiet=True)
    assert_same_state(whole, tmp_path, 8)


def test_resume_from_another_folder_and_back_to_an_earlier_step(
    shards: str, whole: Path, tmp_path: Path
) -> None:
    origin = saved.checkpoint_folder(whole, 4)
    registry.train(TINY, shards, str(tmp_path), resume=str(origin), quiet=True)
    assert_same_state(whole, tmp_path, 8)
    earlier = tmp_path / "checkpoints" / "step-00000008"
    registry.train(tiny(total_images=72), shards, str(tmp_path), resume=str(earlier), quiet=True)
    assert [row["step"] for row in read_metrics(tmp_path) if "loss" in row] == [5, 6, 7, 8, 9]


def test_resume_never_asks_for_a_fresh_folder(shards: str, whole: Path) -> None:
    with pytest.raises(UsageError, match=r"holds checkpoints up to step-00000008"):
        registry.train(TINY, shards, str(whole), resume="never", quiet=True)


def test_other_configuration_is_refused_side_by_side(shards: str, whole: Path) -> None:
    optim = dataclasses.replace(TINY.optim, lr=0.5)
    with pytest.raises(MismatchError) as caught:
        registry.train(tiny(optim=optim, seed=3), shards, str(whole), quiet=True)
    assert caught.value.exit_code == 5
    assert "optim.lr: 0.01 there, 0.5 now" in str(caught.value)
    assert "seed: 0 there, 3 now" in str(caught.value)


def test_other_shards_are_refused(whole: Path, tmp_path: Path) -> None:
    other = write_shards(tmp_path / "shards", num_samples=30)
    with pytest.raises(MismatchError, match=r"shards\.num_samples: 24 there, 30 now"):
        registry.train(TINY, str(other), str(whole), quiet=True)


def test_micro_batches_take_the_same_steps(shards: str, whole: Path, tmp_path: Path) -> None:
    registry.train(tiny(micro_batch_size=3), shards, str(tmp_path), quiet=True)
    assert_close_traces(whole, tmp_path)


def test_two_processes_take_the_same_steps(shards: str, whole: Path, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        "import json, sys\n"
        "from pathlib import Path\n"
        "from trainer.methods import registry\n"
        "registry.train(registry.config_of(json.loads(sys.argv[1]), ''), sys.argv[2], sys.argv[3], quiet=True)\n"
        # A thread of gloo that outlives the training may free a tensor while Python ends, which aborts the process.
        "threads = [path.read_text() for path in Path('/proc/self/task').glob('*/comm')]\n"
        "assert not any('gloo' in name for name in threads), threads\n"
    )
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    config = json.dumps(dataclasses.asdict(TINY))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, config, shards, str(out)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert_close_traces(whole, out)


def assert_close_traces(a: Path, b: Path) -> None:
    for name in ("loss", "region", "raw_mse_u"):
        traces = [[row[name] for row in read_metrics(run) if "loss" in row] for run in (a, b)]
        # Sums in another order: float32 rounding, carried through 8 steps.
        np.testing.assert_allclose(*traces, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_stops_after_a_checkpoint(
    shards: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    signal_at(monkeypatch, number, step=2)
    with pytest.raises(InterruptedRunError, match="the same command continues") as caught:
        registry.train(TINY, shards, str(tmp_path), quiet=True)
    assert caught.value.exit_code == 75
    assert saved.latest_checkpoint(tmp_path) == saved.checkpoint_folder(tmp_path, 3)
    monkeypatch.undo()
    registry.train(TINY, shards, str(tmp_path), quiet=True)
    assert_same_state(whole, tmp_path, 8)


def test_ctrl_c_stops_after_a_checkpoint(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    signal_at(monkeypatch, signal.SIGINT, step=2)
    with pytest.raises(KeyboardInterrupt):
        registry.train(TINY, shards, str(tmp_path), quiet=True)
    assert saved.latest_checkpoint(tmp_path) == saved.checkpoint_folder(tmp_path, 3)
    assert signal.getsignal(signal.SIGINT) is before


def test_nonfinite_sample_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_shards(tmp_path / "shards")
    read = BatchDataset.read

    def damaged(self: Any, number: int, pin_memory: bool = False) -> Batch:
        batch = read(self, number, pin_memory)
        if number == 2:
            batch.features[5, 0, 0, 0] = torch.inf
            damaged.key = batch.keys[5]
        return batch

    monkeypatch.setattr(BatchDataset, "read", damaged)
    with pytest.raises(NonFiniteLossError, match="step 2, seed 0") as caught:
        registry.train(TINY, str(shards), str(tmp_path / "run"), quiet=True)
    assert f"features are not finite in {damaged.key}. " in str(caught.value)


def test_bfloat16_run_learns(shards: str, whole: Path, tmp_path: Path) -> None:
    registry.train(tiny(precision="bfloat16", total_images=16), shards, str(tmp_path), quiet=True)
    trace = [row["raw_mse_u"] for row in read_metrics(tmp_path) if "loss" in row]
    exact = [row["raw_mse_u"] for row in read_metrics(whole) if "loss" in row][:2]
    np.testing.assert_allclose(trace, exact, rtol=0.05)  # bfloat16 keeps 8 bits
    assert trace != exact


def test_guided_model_trains(shards: str, tmp_path: Path) -> None:
    model = dataclasses.replace(TINY.model, guidance=True)
    summary = registry.train(tiny(model=model, total_images=16), shards, str(tmp_path), quiet=True)
    assert summary.step == 2


def test_damaged_shard_stops_the_run_from_a_loader_thread(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    tar = shards / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(TrainerError, match=r"train-000001\.tar: .* truncated") as caught:
        registry.train(tiny(loader_workers=1), str(shards), str(tmp_path / "run"), quiet=True)
    assert "Traceback" not in str(caught.value)
