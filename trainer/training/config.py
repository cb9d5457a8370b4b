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
    STRICT,
    require,
    to_mapping,
)

Config = TypeVar("Config")


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
class RuledOptimConfig:
    """AdamW or Muon, and the weight averages; the learning rate's course is the method's own."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    rule: Literal["adamw", "muon"] = "adamw"
    """AdamW as published, or Muon as in Trajectory Forcing, by which small networks learn in minutes."""
    lr: float = 1e-4
    """Learning rate after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moments; with Muon of what Adam then takes."""
    weight_decay: float = 0.0
    """Decoupled weight decay; Muon here has none."""
    ema_halflives_kimg: tuple[float, ...] = (1000.0,)
    """Half-lives of the weight averages in thousands of images."""
    ema_ramp: float = 0.05
    """A half-life never exceeds this share of the images seen so far."""

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, f"lr is {self.lr}, expected above 0, and finite")
        for decay in self.betas:
            require(0 <= decay < 1, f"betas hold {decay}, expected 0 up to below 1")
        for halflife in self.ema_halflives_kimg:
            require(0 < halflife < math.inf, f"ema_halflives_kimg holds {halflife}, expected above 0")
        for name in ("ema_ramp", "weight_decay"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, expected 0 or more")
        require(
            self.rule == "adamw" or self.weight_decay == 0,
            f"weight_decay is {self.weight_decay} with rule {self.rule}, expected 0: Muon here has none",
        )

    def check_shares(self, *names: str) -> None:
        """Refuse fields of these names that are no share from 0 to 1."""
        for name in names:
            found = getattr(self, name)
            require(0 <= found <= 1, f"{name} is {found}, expected a share from 0 to 1")


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
    """What a run of every method has besides: the units of its features, and two ways through its objective."""

    normalise: Literal["none", "channel", "position"] = "channel"
    """Units of the network's features: raw (`none`), or of mean 0 and spread 1 per channel or per position and
    channel, by statistics.npz; samples are always raw."""
    compile: bool = field(default=False, metadata=EXECUTION)
    """Whether the objective is compiled; equal up to rounding, after minutes of compiling."""
    activation_checkpointing: bool = field(default=False, metadata=EXECUTION)
    """Whether blocks keep only their input and run again in the backward pass: less memory, more time; exact."""

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)  # super() does not find the class that slots make
        require(
            not (self.compile and self.activation_checkpointing),
            "compile and activation_checkpointing exclude each other: compiled code chooses itself what it keeps",
        )


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
