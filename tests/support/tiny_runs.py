"""Small configurations of every training, and how two runs are compared."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.decode.config import DecoderConfig
from trainer.methods.latent_forcing.config import LatentModelConfig, LatentOptimConfig, LatentTrainConfig
from trainer.methods.normalizing_trajectory.config import (
    NormalizingModelConfig,
    NormalizingOptimConfig,
    NormalizingTrainConfig,
)
from trainer.methods.trajectory_forcing.config import TrainConfig
from trainer.networks.config import ModelConfig
from trainer.training import checkpoint as saved
from trainer.training.config import OptimConfig
from trainer.training.loop import Loop

RUN: dict[str, Any] = {
    "preset": "test",
    "total_images": 64,
    "batch_size": 8,
    "loader_workers": 0,
    "checkpoint_images": 32,
    "keep_checkpoints": 9,
    "log_images": 8,
}
"""Fields of every run."""
QUIET: dict[str, Any] = {**RUN, "sample_images": None, "tensorboard": False}

FLOW = TrainConfig(
    model=ModelConfig(
        width=16,
        depth=2,
        head_depth=1,
        num_heads=2,
        num_class_tokens=1,
        num_time_tokens=1,
        num_level_tokens=1,
    ),
    optim=OptimConfig(ema_halflives_kimg=(0.05, 1.0)),
    **RUN,
)

LATENT = LatentTrainConfig(
    model=LatentModelConfig(
        patch_px=2,
        width=16,
        depth=2,
        num_heads=2,
        pixel_bottleneck=8,
        latent_bottleneck=8,
        num_class_tokens=1,
        class_tokens_at=1,
        expert_depth=1,
        expert_width=16,
    ),
    optim=LatentOptimConfig(lr=3e-3, warmup_images=16, ema_halflives_kimg=(0.05,)),
    **QUIET,
)

NORMALIZING = NormalizingTrainConfig(
    model=NormalizingModelConfig(
        width=16, depth=1, num_heads=2, num_class_tokens=1, flow_width=16, flow_depth=1, flow_heads=2
    ),
    optim=NormalizingOptimConfig(lr=2e-3, ema_halflives_kimg=(0.05,)),
    **QUIET | {"total_images": 32, "checkpoint_images": 16},
)

DECODER = DecoderConfig(
    size="tiny",
    patch_size=4,
    total_images=48,
    batch_size=8,
    lr=1e-3,
    noise=0.3,
    ema_halflife_kimg=0.02,
    loader_workers=0,
    checkpoint_images=24,
    sample_images=None,
    log_images=8,
    held_out_shards=1,
    tensorboard=False,
)


def tensors_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = saved.checkpoint_folder(run, step)
    return {
        f"{path.stem}/{name}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in saved.load_tensors(path).items()
    }


def assert_same_state(a: Path, b: Path, step: int) -> None:
    mine, other = tensors_of(a, step), tensors_of(b, step)
    assert mine.keys() == other.keys()
    assert [name for name in mine if not torch.equal(mine[name], other[name])] == []


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, change: Callable[[Loop, Any], None]) -> None:
    """Call `change` with the loop and the batch of one step, whatever loop runs."""
    take_step = Loop.take_step

    def changed(self: Loop, batch: Any, time_is_up: bool) -> Any:
        if self.step == step:
            change(self, batch)
        return take_step(self, batch, time_is_up)

    monkeypatch.setattr(Loop, "take_step", changed)


def signal_at(monkeypatch: pytest.MonkeyPatch, number: signal.Signals, step: int) -> None:
    """Send this process a signal as one step begins."""
    before_step(monkeypatch, step, lambda loop, batch: os.kill(os.getpid(), number))
