"""What a training run is: nested as the rooms are, frozen, checked, YAML in and out.

Fields marked `execution` change how fast or how long a run goes, not the course it takes: a run folder may be
continued with other values of them, and with no other value of the rest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import pydantic

from hierarchy_builder import fields
from hierarchy_builder.errors import MismatchError, UsageError
from hierarchy_builder.fields import (
    EXECUTION,
    MOST,
    MOST_BLOCKS,
    MOST_ROWS,
    STRICT,
    require,
    require_size,
    to_mapping,
)

Config = TypeVar("Config")
Normalisation = Literal["none", "channel", "position"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The network; stored in every checkpoint, enough to rebuild it. Defaults are TF-B on DINOv2-B features.

    The first four fields are those of the shards a run trains on.
    """

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    grid: tuple[int, int] = (16, 16)
    """Rows and columns of tokens."""
    in_channels: int = 768
    """Channels of one token, the width of the encoder."""
    num_classes: int = 1000
    """Classes; the label table has one row more, the null class."""
    num_levels: int = 4
    """L, levels of the hierarchy including the raw tokens."""
    width: int = 768
    """Width of the transformer."""
    depth: int = 16
    """Blocks a token passes, shared ones and those of one head."""
    head_depth: int = 8
    """Blocks of the u-head and, with other weights, of the v-head; depth − head_depth are shared."""
    num_heads: int = 12
    """Attention heads."""
    num_class_tokens: int = 8
    """Conditioning tokens that carry the class."""
    num_time_tokens: int = 8
    """Conditioning tokens that carry h = t − r."""
    num_level_tokens: int = 8
    """Conditioning tokens that carry the level."""
    guidance: bool = False
    """Whether the network takes a guidance scale omega and its interval as input."""
    num_guidance_tokens: int = 4
    """Conditioning tokens that carry omega, with guidance."""
    num_interval_tokens: int = 2
    """Conditioning tokens for each end of the guidance interval, with guidance."""
    fusion: Literal["fused", "concat"] = "fused"
    """How the previous level enters: fused with each token, or appended to the sequence."""
    mlp_ratio: float = 8 / 3
    """Hidden width of the SwiGLU as a multiple of the width."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""

    def __post_init__(self) -> None:
        for name in ("in_channels", "num_classes", "width", "num_heads", "mlp_ratio"):
            require_size(name, getattr(self, name))
        require(
            0 < self.rope_theta < math.inf, f"rope_theta is {self.rope_theta}, expected above 0, and finite"
        )
        for name in ("class", "time", "level", "guidance", "interval"):
            count = getattr(self, f"num_{name}_tokens")
            require(0 <= count <= MOST, f"num_{name}_tokens is {count}, expected 0 to {MOST:,}")
        for side in self.grid:
            require_size("a side of the grid", side, MOST_ROWS)
        require_size("depth", self.depth, MOST_BLOCKS)
        require(
            0 < self.head_depth <= self.depth,
            f"head_depth {self.head_depth}, expected 1 to depth {self.depth}",
        )
        require(
            self.width % (4 * self.num_heads) == 0,
            f"width {self.width}, expected a multiple of 4 × num_heads = {4 * self.num_heads} (rotary pairs)",
        )
        require(2 <= self.num_levels <= MOST, f"num_levels is {self.num_levels}, expected 2 to {MOST:,}")
        require(0 <= self.norm_eps < 1, f"norm_eps is {self.norm_eps}, expected 0 up to below 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig:
    """Trajectory Forcing's objective: the law of (t, r), guidance, and the weight of the region loss."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    time_mean: float = 0.0
    """Mean of logit(t) before the shift."""
    time_std: float = 1.0
    """Standard deviation of logit(t)."""
    time_shift: float = 10.0
    """Shift of the law: its logarithm is added to the mean."""
    uniform_fraction: float = 0.1
    """Share of samples whose t and r are uniform on [0, 1] instead."""
    data_fraction: float = 0.0
    """Share of samples with r = t (plain flow matching)."""
    region_weight: float = 1.0
    """Weight of the region loss."""
    guidance_max: float = 8.0
    """Largest guidance scale omega drawn in training, with guidance."""
    label_dropout: float = 0.1
    """Probability that the label is replaced by the null class, with guidance."""
    prev_noise: float = 0.0
    """Noise on the canvas of the previous level: σ·N(0, 1), σ uniform up to this, in the network's units; 0: none."""

    def __post_init__(self) -> None:
        for name in ("uniform_fraction", "data_fraction", "label_dropout"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} is {value}, expected a share from 0 to 1")
        for name in ("time_std", "time_shift"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name} is {value}, expected above 0, and finite")
        for name, least in (("region_weight", 0), ("prev_noise", 0), ("guidance_max", 1)):
            value = getattr(self, name)
            require(least <= value < math.inf, f"{name} is {value}, expected {least} or more, and finite")
        require(math.isfinite(self.time_mean), f"time_mean is {self.time_mean}, expected a finite number")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Muon for matrices, Adam with Nesterov for the rest, and the weight averages."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    lr: float = 1e-2
    """Learning rate of both, constant until the cooldown."""
    cooldown_fraction: float = 0.0
    """Share of the run, at its end, over which the learning rate falls linearly to 0; the release has none."""
    momentum: float = 0.95
    """Momentum of Muon."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """Decay of Adam's first and second moments."""
    newton_schulz_steps: int = 5
    """Iterations of Muon's orthogonalisation."""
    ema_halflives_kimg: tuple[float, ...] = (500.0, 1000.0, 2000.0)
    """Half-lives of the weight averages in thousands of images."""
    ema_ramp: float = 0.05
    """A half-life never exceeds this share of the images seen so far."""

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, f"lr is {self.lr}, expected above 0, and finite")
        for decay in (self.momentum, *self.adam_betas):
            require(0 <= decay < 1, f"momentum and adam_betas hold {decay}, expected 0 up to below 1")
        for halflife in self.ema_halflives_kimg:
            require(0 < halflife < math.inf, f"ema_halflives_kimg holds {halflife}, expected above 0")
        require(self.ema_ramp >= 0, f"ema_ramp is {self.ema_ramp}, expected 0 or more")
        steps = self.newton_schulz_steps
        require(steps >= 1, f"newton_schulz_steps is {steps}, expected 1 or more")
        require(
            0 <= self.cooldown_fraction <= 1,
            f"cooldown_fraction is {self.cooldown_fraction}, expected a share from 0 to 1",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """What every training run has: its length, batches and seed, and how it is carried out and watched."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    total_images: int = field(default=102_400_000, metadata=EXECUTION)
    """Images seen until the run ends (80 epochs of ImageNet); a cooldown begins at its share of them."""
    batch_size: int = 1024
    """Images in one optimiser step, over all ranks."""
    micro_batch_size: int | None = field(default=None, metadata=EXECUTION)
    """Images in one backward pass on one rank; without it the rank's whole share of the batch."""
    seed: int = 0
    """Seed of all that is random: initial weights, order of the data, noise."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic inside the network; weights and losses stay float32."""
    shuffle_shards: int = 64
    """Shards whose samples are shuffled together, at most 128: a rank keeps them open."""
    loader_workers: int = field(default=2, metadata=EXECUTION)
    """Threads that read shards ahead, per rank; 0 reads between the steps."""
    checkpoint_images: int = field(default=1_280_000, metadata=EXECUTION)
    """Images between two checkpoints."""
    keep_checkpoints: int = field(default=2, metadata=EXECUTION)
    """Latest checkpoints kept."""
    log_images: int = field(default=10_240, metadata=EXECUTION)
    """Images between two lines of metrics.jsonl."""
    sample_images: int | None = field(default=1_280_000, metadata=EXECUTION)
    """Images between two sheets of samples in RUN/samples; none without it."""
    tensorboard: bool = field(default=True, metadata=EXECUTION)
    """Whether numbers and sheets also go to RUN/tensorboard."""
    wandb_project: str | None = field(default=None, metadata=EXECUTION)
    """Project of Weights & Biases that numbers and sheets also go to."""
    verify_shards: bool = field(default=True, metadata=EXECUTION)
    """Whether each shard's SHA-256 is checked when it is first read."""
    max_damaged_shards: int = field(default=0, metadata=EXECUTION)
    """Damaged shards that a run goes on without, reading samples of the next in their place; 0 stops at the first."""
    max_seconds: float | None = field(default=None, metadata=EXECUTION)
    """Wall clock after which the run writes a checkpoint and ends with exit code 75, to be resumed."""

    def __post_init__(self) -> None:
        counts = ("total_images", "batch_size", "checkpoint_images", "log_images", "keep_checkpoints")
        for name in (*counts, "shuffle_shards"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, expected 1 or more")
        require(self.shuffle_shards <= 128, f"shuffle_shards is {self.shuffle_shards}, expected at most 128")
        require(self.seed >= 0, f"seed is {self.seed}, expected 0 or more")
        for name in ("loader_workers", "max_damaged_shards"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, expected 0 or more")
        for name in ("micro_batch_size", "sample_images"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} is {value}, expected 1 or more")
        require(
            self.max_seconds is None or self.max_seconds > 0,
            f"max_seconds is {self.max_seconds}, expected above 0",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodRunConfig(RunConfig):
    """What a run of every method has beside: two ways through its objective."""

    compile: bool = field(default=False, metadata=EXECUTION)
    """Whether the objective is compiled; equal up to rounding, after minutes of compiling."""
    activation_checkpointing: bool = field(default=False, metadata=EXECUTION)
    """Whether blocks keep only their input and run again in the backward pass: less memory, more time; exact."""

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)  # super() does not find the class that slots make
        require(
            not (self.compile and self.activation_checkpointing),
            "compile and activation_checkpointing: expected one of them, compiled code chooses itself what it keeps",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(MethodRunConfig):
    """One run of Trajectory Forcing."""

    preset: str = "TF-B"
    """Name of the preset the run started from."""
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    normalise: Normalisation = "none"
    """Units of the network's features: raw as in the release, or of mean 0 and spread 1 per channel or per position
    and channel, by statistics.npz; samples are raw always."""
    level_per: Literal["sample", "batch"] = "sample"
    """Whether each sample draws its level or, as the release does, a batch shares one."""


def from_mapping(mapping: Mapping[str, Any], where: str = "configuration") -> TrainConfig:
    """Build a checked TrainConfig from plain nested data; see `checked`."""
    return checked(TrainConfig, mapping, where)


def checked(kind: type[Config], mapping: Mapping[str, Any], where: str) -> Config:
    """Build a configuration of one kind from plain nested data.

    Raises UsageError as `fields.from_mapping` does, and MismatchError for the configuration of another method.
    """
    try:
        return fields.from_mapping(kind, mapping, where)
    except UsageError:
        if issubclass(kind, RunConfig) and _method_in(mapping) != (wanted := _method_of(kind)):
            raise MismatchError(
                f"{where}: found a run of {_method_in(mapping)}, expected one of {wanted}"
            ) from None
        raise


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """The config with fields replaced by dotted name, for example `{"optim.lr": 0.005}`.

    Raises UsageError for an unknown field, naming the nearest, for a value the field does not take, and for another
    method than that of `config`.
    """
    mapping, kind = to_mapping(config), type(config)
    own = _method_in(mapping)
    if isinstance(config, MethodRunConfig) and (asked := settings.get("method_name", own)) != own:
        raise UsageError(
            f"method_name is {asked!r}, expected {own!r}: --method, or a preset, chooses the method"
        )
    for name, value in settings.items():
        room, _, field_name = name.rpartition(".")
        if name not in (known := fields.known_fields(kind)):
            raise UsageError(f"unknown field {name!r}, {fields.nearest(name, known)}; --dry-run lists all")
        (mapping[room] if room else mapping)[field_name] = value
    return checked(kind, mapping, "settings")


def _method_of(kind: type) -> str:
    return _method_in({field.name: field.default for field in dataclasses.fields(kind)})


def _method_in(given: Mapping[str, Any]) -> str:
    """The method a run's fields are of; those of a decoder have no network."""
    is_decoder = "patch_size" in given and "model" not in given
    return given.get("method_name", "train-decoder" if is_decoder else "trajectory-forcing")
