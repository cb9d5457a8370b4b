"""Builds, shards, checkpoints and trajectories that an earlier commit wrote still open, verify, sample and resume."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from hierarchy_builder.cli.app import app as builder
from trainer.cli.app import app as trainer
from trainer.trajectories.pipeline import TrajectoryPipeline
from trainer.trajectories.trajectory import Trajectory

ARCHIVE = Path(__file__).resolve().parents[1] / "golden" / "earlier" / "files.tar.gz"


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["build", "fused"])
def test_a_build_verifies_and_repair_changes_nothing(earlier: Path, name: str) -> None:
    before = contents(earlier / name)
    for verb in ("verify", "status", "repair"):
        done = CliRunner().invoke(builder, [verb, str(earlier / name)])
        assert done.exit_code == 0, done.output
    after = contents(earlier / name)
    after.pop(".lock", None)
    assert after == before


@pytest.mark.parametrize(
    ("name", "flags"),
    [("build", ["--images", "--vocabulary", "4,8", "--covariance"]), ("fused", ["--fused"])],
)
def test_the_same_build_command_finds_everything_done(earlier: Path, name: str, flags: list[str]) -> None:
    before = contents(earlier / name / "shards")
    words = [
        "build",
        str(earlier / "photos"),
        "--out",
        str(earlier / name),
        "--encoder",
        "dct",
        "--workers",
        "0",
    ]
    done = CliRunner().invoke(builder, [*words, *flags])
    assert done.exit_code == 0, done.output
    assert contents(earlier / name / "shards") == before


@pytest.mark.parametrize("name", ["tf", "lf", "ntm"])
def test_a_run_of_each_method_samples(earlier: Path, name: str) -> None:
    trajectory = TrajectoryPipeline.from_pretrained(earlier / name)(0, 0)
    assert trajectory.class_name == "circle"
    assert torch.isfinite(trajectory.levels).all()


def test_a_stored_trajectory_opens_and_equals_the_sample_of_its_seed(earlier: Path) -> None:
    stored = Trajectory.load(next((earlier / "samples" / "trajectories").glob("*.safetensors")))
    drawn = TrajectoryPipeline.from_pretrained(earlier / "tf")(0, 0)
    torch.testing.assert_close(drawn.levels, stored.levels, rtol=1e-4, atol=1e-5)


def test_a_run_resumes_to_the_weights_that_the_earlier_commit_reached(earlier: Path) -> None:
    last = earlier / "tf" / "checkpoints" / "step-00000004"
    reached = load_file(last / "model.safetensors")
    shutil.rmtree(last)
    words = ["train", str(earlier / "build" / "shards"), "--out", str(earlier / "tf")]
    done = CliRunner().invoke(trainer, [*words, "--total-images", "16", "--quiet"])
    assert done.exit_code == 0, done.output
    resumed = load_file(last / "model.safetensors")
    assert resumed.keys() == reached.keys()
    for key, tensor in reached.items():
        torch.testing.assert_close(resumed[key], tensor, rtol=1e-4, atol=1e-5)
