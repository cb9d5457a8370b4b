"""Configuration of a run of Trajectory Forcing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hierarchy_builder.fields import CheckedFields
from trainer.networks.config import ModelConfig
from trainer.training.config import MethodRunConfig, OptimConfig

RELEASE_SHIFT, RELEASE_NUMBERS = 10.0, 16 * 16 * 768
"""The time shift that the paper chose, and the numbers in one of its canvases."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig(CheckedFields):
    """Trajectory Forcing's objective: the distribution of (t, r), guidance, and the weight of the region loss."""

    time_mean: float = 0.0
    """Mean of logit(t) before the shift."""
    time_std: float = 1.0
    """Standard deviation of logit(t)."""
    time_shift: float | None = RELEASE_SHIFT
    """Shift of the distribution of t: its logarithm is added to the mean. null chooses it by the numbers in a canvas,
    max(1, 10·sqrt(H·W·C / 196,608)), and the run records the value."""
    uniform_fraction: float = 0.1
    """Share of samples whose t and r are uniform on [0, 1] instead."""
    data_fraction: float = 0.0
    """Share of samples with r = t (plain flow matching)."""
    region_weight: float = 1.0
    """Weight of the region loss."""
    region_timing: Literal["uniform", "signal"] = "uniform"
    """Weight of the region loss over t: `uniform` as in the release, or `signal`, the share of data in the variance of
    z_t, (1−t)²/((1−t)² + t²). Near t = 1 the image cannot be known, and the loss pulls one-step samples to a mean."""
    direction: Literal["network", "data"] = "network"
    """Direction of the derivative without guidance: the network's own velocity at h = 0, as in the release, or `data`,
    e − x of each sample, as in MeanFlow, which leaves out one pass: 15 % of the operations of a step."""
    guidance_max: float = 8.0
    """Largest guidance scale omega drawn in training, with guidance."""
    label_dropout: float = 0.1
    """Probability that the label is replaced by the null class, with guidance."""
    prev_noise: float = 0.0
    """Largest noise on the previous level's canvas: σ·N(0, 1) with σ uniform up to this, in the network's units."""

    def __post_init__(self) -> None:
        self.check_shares("uniform_fraction", "data_fraction", "label_dropout")
        self.check_above_zero("time_std", "time_shift")
        self.check_finite("time_mean", "region_weight", "prev_noise", "guidance_max")
        self.check_least(0, "region_weight", "prev_noise")
        self.check_least(1, "guidance_max")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(MethodRunConfig):
    """One run of Trajectory Forcing."""

    preset: str = "TF-B"
    """Name of the preset the run started from."""
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    normalise: Literal["auto", "none", "channel", "position"] = "none"
    """Units of the network's features: raw (`none`) as in the release, of mean 0 and standard deviation 1 per channel
    or per position and channel, or `auto`: raw if their standard deviation is between 0.5 and 2, else `channel`."""
    level_per: Literal["sample", "batch"] = "sample"
    """Whether each sample draws its own level, or the whole batch shares one as in the release."""
