"""A method of another package goes through every verb that the three have, after one call of `register`."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line import trainer
from tiny_runs import assert_same_state, signal_at
from toy_method.pipeline import ToyPipeline

from hierarchy_builder.errors import InterruptedRunError, UsageError
from trainer import TrajectoryPipeline
from trainer.methods import registry
from trainer.training import checkpoint as saved

TOY = registry.Method(
    name="toy",
    config="toy_method.config:ToyTrainConfig",
    presets="toy_method.config:PRESETS",
    default_preset="toy-small",
    small_preset="toy-small",
    run="toy_method.train:ToyRun",
    pipeline="toy_method.pipeline:ToyPipeline",
    losses_text="loss is the mean squared error of canvases.",
)


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    """The row of the toy method, for this module alone."""
    registry.register(TOY)
    yield
    del registry.METHODS["toy"]


@pytest.fixture(scope="module")
def run(registered: None, picture_shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the toy method."""
    out = tmp_path_factory.mktemp("toy") / "run"
    trainer("train", picture_shards, "--out", out, "--method", "toy", "--quiet")
    return out


def test_its_presets_are_listed() -> None:
    assert json.loads(trainer("presets", "--json").out)["toy-small"]["method_name"] == "toy"
    refused = trainer("presets", "--suggest", "shards", "--method", "toy", code=2)
    assert "has the one preset toy-small" in refused.err


def test_an_interrupted_run_goes_on_as_if_it_had_not_stopped(
    run: Path, picture_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = registry.preset_of(None, "toy")
    signal_at(monkeypatch, signal.SIGTERM, step=1)
    with pytest.raises(InterruptedRunError):
        registry.train(config, picture_shards, str(tmp_path), quiet=True)
    monkeypatch.undo()
    assert [folder.name for folder in saved.list_checkpoints(tmp_path)] == ["step-00000002"]
    trainer("train", picture_shards, "--out", tmp_path, "--quiet")  # the run folder says which method
    assert_same_state(run, tmp_path, 4)
    assert list((tmp_path / "samples").iterdir())


def test_it_is_sampled_edited_and_resumed(run: Path, tmp_path: Path) -> None:
    pipe = TrajectoryPipeline.from_pretrained(run)
    assert isinstance(pipe, ToyPipeline)
    trajectory = pipe("bee", 3)
    for level in range(trajectory.num_levels):
        assert torch.equal(trajectory.resume(level).levels, trajectory.levels)
    assert not torch.equal(trajectory.resume(1, seeds=4).levels[2:], trajectory.levels[2:])
    trainer("sample", run, "--labels", "bee", "--seeds", "3", "--out", tmp_path, "--ema", "auto")
    (file,) = (tmp_path / "trajectories").iterdir()
    trainer(
        "edit", file, "--level", 0, "--region", 0, "--to-neighbours", "--out", tmp_path / "edited.safetensors"
    )


def test_it_is_evaluated_and_reported(run: Path, picture_shards: str, tmp_path: Path) -> None:
    words = ("--shards", picture_shards, "--samples-per-class", 2)
    assert json.loads(trainer("evaluate", run, *words, "--json", "--quiet").out)
    trainer("report", run, "--shards", picture_shards, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "mean squared error of canvases" in page
    assert "Toy: toy-small" in page


def test_options_that_it_does_not_take_are_refused(run: Path) -> None:
    with pytest.raises(UsageError, match=r"--shift 2\.0: .* is a run of toy, and only Latent Forcing draws"):
        TrajectoryPipeline.from_pretrained(run, shift=2.0)
    with pytest.raises(UsageError, match="is of toy, which has no autoguidance"):
        TrajectoryPipeline.from_pretrained(run, weak=run)
    with pytest.raises(UsageError, match="'toy' is registered already"):
        registry.register(TOY)
