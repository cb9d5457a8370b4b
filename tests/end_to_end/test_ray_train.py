"""Training as a cluster job: two ranks of a real Ray Train take the steps of one process."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from command_line import cli
from fixture_shards import write_shards
from tiny_runs import FLOW as TINY

from hierarchy_builder.fields import to_mapping
from trainer.methods import registry
from trainer.training.log import read_metrics

needs_ray_train = pytest.mark.skipif(
    importlib.util.find_spec("pandas") is None, reason='Ray Train needs pandas: pip install "ray[train]"'
)


def job(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines.train", *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "NO_COLOR": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )


@needs_ray_train
@pytest.mark.timeout(300)
def test_two_ranks_of_ray_take_the_steps_of_one_process(tmp_path: Path) -> None:
    shards = str(write_shards(tmp_path / "shards"))
    config = {**to_mapping(TINY), "total_images": 24, "tensorboard": False, "sample_images": None}
    for name in ("grid", "in_channels", "num_classes", "num_levels"):  # the shards say
        del config["model"][name]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    options = ("--out", str(tmp_path / "ray"), "--config", str(tmp_path / "tiny.yaml"))
    done = job(tmp_path, "--workers", "2", "--cpus-per-worker", "0.5", "--json", "--", shards, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["step"] == 3
    registry.train(dataclasses.replace(TINY, total_images=24), shards, str(tmp_path / "alone"), quiet=True)
    traces = [
        [row["loss"] for row in read_metrics(tmp_path / run) if "loss" in row] for run in ("ray", "alone")
    ]
    assert len(traces[0]) == 3
    np.testing.assert_allclose(*traces, rtol=1e-5)  # sums in another order
    other = cli("pipelines.train", "--workers", "2", "--", shards, *options, "--seed", "7")
    assert other.code == 5
    assert "seed: 0 there, 7 now" in other.err
    assert "worker" not in other.err


@needs_ray_train
def test_wrong_command_is_refused_before_any_worker_starts(tmp_path: Path) -> None:
    shards = str(write_shards(tmp_path / "shards"))
    wrong = cli("pipelines.train", "--", shards, "--out", tmp_path / "run", "--set", "optim.lrr=1")
    assert wrong.code == 2
    assert "unknown field 'optim.lrr', did you mean 'optim.lr'?" in wrong.err
    missing = cli("pipelines.train", "--", shards)
    assert missing.code == 2
    assert "--out RUN is missing behind --" in missing.err


@needs_ray_train
def test_no_cluster_at_the_address_is_said_at_once(tmp_path: Path) -> None:
    shards = str(write_shards(tmp_path / "shards"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # taken, and nobody listens
        address = f"127.0.0.1:{free.getsockname()[1]}"
        done = job(
            tmp_path,
            "--address",
            address,
            "--",
            shards,
            "--out",
            str(tmp_path / "run"),
            "--preset",
            "tiny-cpu",
        )
    assert done.returncode == 1, done.stderr
    assert f"no Ray cluster answers at '{address}'" in done.stderr
    assert not (tmp_path / "run").exists()
