"""What holds for the loop of every method: a signal stops it to be resumed, and what is not finite is named."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import DECODER, FLOW, LATENT, NORMALIZING, assert_same_state, before_step, signal_at

from hierarchy_builder.errors import InterruptedRunError, NonFiniteLossError, TrainerError
from trainer.decode import train as train_decoder
from trainer.methods import registry
from trainer.training import checkpoint as saved
from trainer.training.loop import Loop
from trainer.training.run_folder import locked

METHODS = {
    "trajectory-forcing": dataclasses.replace(FLOW, sample_images=None, tensorboard=False),
    "latent-forcing": LATENT,
    "latent-forcing, levels": dataclasses.replace(LATENT, pixel_stage=True),
    "normalizing-trajectory": NORMALIZING,
    "train-decoder": DECODER,
}
Train = Callable[[Path], Any]


@pytest.fixture(params=METHODS)
def train(request: pytest.FixtureRequest, picture_shards: str) -> Train:
    """Trains four steps of a method in a folder."""
    config = dataclasses.replace(METHODS[request.param], total_images=32, checkpoint_images=1000)
    run = train_decoder.train_decoder if request.param == "train-decoder" else registry.train
    return lambda out: run(config, picture_shards, str(out), quiet=True)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, InterruptedRunError), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_stops_after_a_checkpoint_that_goes_on(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, error: type
) -> None:
    before = signal.getsignal(number)
    signal_at(monkeypatch, number, step=1)
    with pytest.raises(error):
        train(tmp_path / "cut")
    assert [folder.name for folder in saved.list_checkpoints(tmp_path / "cut")] == ["step-00000002"]
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    train(tmp_path / "cut")
    train(tmp_path / "whole")
    assert_same_state(tmp_path / "whole", tmp_path / "cut", 4)


def test_a_folder_has_one_training_at_a_time(train: Train, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(TrainerError, match="is locked by another process"):
        train(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_features_that_are_not_finite_are_named(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[str] = []

    def damage(loop: Loop, batch: Any) -> None:
        batch.features[5, 0, 0, 0] = torch.inf
        keys.append(batch.keys[5])

    before_step(monkeypatch, 2, damage)
    with pytest.raises(NonFiniteLossError, match="step 2, seed 0: loss") as caught:
        train(tmp_path)
    assert f"features are not finite in {keys[0]}. Train into another folder" in str(caught.value)
    assert saved.list_checkpoints(tmp_path) == []


def test_a_network_that_is_not_finite_names_the_samples_it_met(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[str] = []

    def damage(loop: Loop, batch: Any) -> None:
        keys.extend(batch.keys)
        with torch.no_grad():
            for parameter in loop.model.parameters():
                parameter.fill_(torch.nan)

    before_step(monkeypatch, 2, damage)
    with pytest.raises(NonFiniteLossError, match="step 2, seed 0: loss nan") as caught:
        train(tmp_path)
    assert f"all features are finite; samples of this rank: {', '.join(keys)}. " in str(caught.value)
    assert "lower " in str(caught.value)
