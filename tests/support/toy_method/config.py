"""The configuration of the toy method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trainer.training.config import MethodRunConfig, OptimConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyModelConfig:
    """Sizes of the network."""

    grid: tuple[int, int] = (16, 16)
    in_channels: int = 48
    num_levels: int = 4
    num_classes: int = 3
    width: int = 1
    depth: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyMethodConfig:
    """Settings of the method itself."""

    noise: float = 0.1
    """Deviation of the noise on a sampled canvas."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyTrainConfig(MethodRunConfig):
    """One run of the toy method."""

    method_name: Literal["toy"] = "toy"
    preset: str = "toy-small"
    normalise: Literal["none"] = "none"
    model: ToyModelConfig = field(default_factory=ToyModelConfig)
    method: ToyMethodConfig = field(default_factory=ToyMethodConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(ema_halflives_kimg=(0.05,)))


def toy_small() -> ToyTrainConfig:
    """Trains in seconds."""
    return ToyTrainConfig(
        total_images=32,
        batch_size=8,
        loader_workers=0,
        checkpoint_images=16,
        sample_images=16,
        log_images=8,
        tensorboard=False,
    )


PRESETS = {"toy-small": toy_small}
