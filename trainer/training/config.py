"""Configurations of training runs: frozen dataclasses, validated, read from and written to YAML.

Fields marked EXECUTION change how fast or how long a run trains, and at most by rounding the weights of a step. A run
folder may be continued with other values of these fields; any other difference is refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from hierarchy_builder import fields
from hierarchy_builder.errors import MismatchError, UsageError
from hierarchy_builder.fields import CAME_LATER, EXECUTION, CheckedFields, require, to_mapping

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True, slots=True)
class AveragedOptimConfig(CheckedFields):
    """The learning rate and the weight averages of every optimiser."""

    lr: float = 1e-4
    """Learning rate after the warm-up."""
    ema_halflives_kimg: tuple[float, ...] = (1000.0,)
    """Half-lives of the weight averages in thousands of images."""
    ema_ramp: float = 0.05
    """A half-life never exceeds this share of the images seen so far."""

    def __post_init__(self) -> None:
        self.check_above_zero("lr")
        for halflife in self.ema_halflives_kimg:
            require(0 < halflife < math.inf, f"ema_halflives_kimg holds {halflife}, expected above 0")
        self.check_least(0, "ema_ramp")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig(AveragedOptimConfig):
    """Muon for matrices, Adam with Nesterov momentum for all other parameters, and the weight averages."""

    lr: float = 1e-2
    """Learning rate of Muon and Adam, constant until the cooldown."""
    cooldown_fraction: float = 0.0
    """Share of the run, at its end, over which the learning rate falls linearly to 0; 0 in the release."""
    momentum: float = 0.95
    """Momentum of Muon."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """Decay of Adam's first and second moments."""
    newton_schulz_steps: int = 5
    """Iterations of Muon's orthogonalisation."""
    ema_halflives_kimg: tuple[float, ...] = (500.0, 1000.0, 2000.0)
    """Half-lives of the weight averages in thousands of images."""

    def __post_init__(self) -> None:
        AveragedOptimConfig.__post_init__(self)  # super() does not find the class that slots make
        for decay in (self.momentum, *self.adam_betas):
            require(0 <= decay < 1, f"momentum and adam_betas hold {decay}, expected 0 up to below 1")
        self.check_least(1, "newton_schulz_steps")
        self.check_shares("cooldown_fraction")


@dataclass(frozen=True, kw_only=True, slots=True)
class RuledOptimConfig(AveragedOptimConfig):
    """AdamW or Muon, and the weight averages; each method adds its own schedule of the learning rate."""

    rule: Literal["adamw", "muon"] = "adamw"
    """AdamW as in the paper, or Muon as in Trajectory Forcing, with which small networks learn in minutes."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moments of AdamW, or of the Adam part of Muon."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW; must be 0 with Muon."""

    def __post_init__(self) -> None:
        AveragedOptimConfig.__post_init__(self)  # super() does not find the class that slots make
        for decay in self.betas:
            require(0 <= decay < 1, f"betas hold {decay}, expected 0 up to below 1")
        self.check_least(0, "weight_decay")
        require(
            self.rule == "adamw" or self.weight_decay == 0,
            f"weight_decay is {self.weight_decay} with rule {self.rule}, expected 0: this Muon has no weight decay",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(CheckedFields):
    """Fields of every training run: length, batches, seed, execution and logging."""

    total_images: int = field(default=102_400_000, metadata=EXECUTION)  # 80 epochs of ImageNet
    """Images after which the run ends."""
    batch_size: int = 1024
    """Images in one optimiser step, over all ranks."""
    micro_batch_size: int | None = field(default=None, metadata=EXECUTION)
    """Images in one backward pass on one rank; by default the rank's whole share of the batch."""
    seed: int = 0
    """Seed of all random numbers: initial weights, order of the data, noise."""
    precision: Literal["auto", "float32", "bfloat16"] = field(default="float32", metadata=EXECUTION)
    """Arithmetic inside the network; weights and losses stay float32. `auto` takes what the run has recorded, or at its
    start bfloat16 on CUDA and float32 on a CPU, and the run records it. Another value may be given to a run that has
    begun: it goes on with that one, which its later checkpoints record."""
    shuffle_shards: int = 64
    """Number of shards whose samples are shuffled together; at most 128, because a rank keeps them open."""
    loader_workers: int = field(default=2, metadata=EXECUTION)
    """Threads per rank that read shards ahead of training; 0 reads between steps."""
    checkpoint_images: int = field(default=1_280_000, metadata=EXECUTION)
    """Images between two checkpoints."""
    keep_checkpoints: int = field(default=2, metadata=EXECUTION)
    """Number of newest checkpoints to keep."""
    log_images: int = field(default=10_240, metadata=EXECUTION)
    """Images between two lines of metrics.jsonl."""
    sample_images: int | None = field(default=1_280_000, metadata=EXECUTION)
    """Images between two sheets of samples in RUN/samples; null draws none."""
    tensorboard: bool = field(default=True, metadata=EXECUTION)
    """Whether metrics and sample sheets are also written to RUN/tensorboard."""
    wandb_project: str | None = field(default=None, metadata=EXECUTION)
    """Weights & Biases project to which metrics and sample sheets are also sent."""
    verify_shards: bool = field(default=True, metadata=EXECUTION)
    """Whether each shard's SHA-256 is checked when it is first read."""
    max_damaged_shards: int = field(default=0, metadata=EXECUTION)
    """Number of damaged shards to skip, reading samples of the next shard instead; 0 stops at the first one."""
    max_seconds: float | None = field(default=None, metadata=EXECUTION)
    """Seconds after which the run writes a checkpoint and ends with exit code 75, so that it can be resumed."""

    def __post_init__(self) -> None:
        self.check_least(
            1, "total_images", "batch_size", "checkpoint_images", "log_images", "keep_checkpoints"
        )
        self.check_least(1, "shuffle_shards", "micro_batch_size", "sample_images")
        self.check_least(0, "seed", "loader_workers", "max_damaged_shards")
        require(self.shuffle_shards <= 128, f"shuffle_shards is {self.shuffle_shards}, expected at most 128")
        require(
            self.max_seconds is None or self.max_seconds > 0,
            f"max_seconds is {self.max_seconds}, expected above 0",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PostTrainingConfig(CheckedFields):
    """What `trainer post-train` adds to the configuration of the run it starts from: targets, statistics, gradient."""

    start: str = ""
    """Checkpoint and weight average the run started from, and the checksum of that file of weights."""
    levels: bool = True
    """Whether the canvases of every level are compared with those of the shards."""
    spaces: tuple[Literal["tokens", "pooled"], ...] = ("tokens", "pooled")
    """How a canvas is described: by each of its tokens (C numbers), or by all means over a grid of `pooled_grid`
    squares at once (pooled_grid²·C numbers), which holds the layout too."""
    classes: tuple[Literal["all", "within", "each"], ...] = ("all", "within")
    """Whose moments are compared: of all classes together; of deviations from the mean of the real images of the
    same class, pooled over classes (`within`); or of each class alone, whose covariance is shrunk towards the pooled
    one by (n·Σ + D·Σ_within)/(n + D), with n images of the class and D numbers (`each`, with statistics `average`)."""
    pooled_grid: int = 4
    """Rows and columns of the means of the pooled space, in squares of tokens."""
    judges: tuple[str, ...] = ()
    """Networks that compare decoded pictures, each as NAME or NAME=WEIGHT; see `trainer post-train --help`."""
    judge_files: dict[str, str] = field(default_factory=dict)
    """File of weights by the name of a judge; without one a judge known by name takes them from the hub."""
    judge_references: dict[str, str] = field(default_factory=dict)
    """File of mean and covariance of real images by the name of a judge."""
    statistics: Literal["average", "snapshot", "online"] = "average"
    """How samples before the newest batch count: moving averages, or a queue whose moments are computed anew
    (`snapshot`, float32) or updated (`online`, float64)."""
    ema_beta: float | None = None
    """Share of earlier samples in the moving averages, from 0 to below 1, for each step; 0.999 in the release. null
    chooses 1 − batch_size/queue_images, but at most 0.999, and the run records it."""
    queue_images: int | None = None
    """Images drawn before the first step, with which the averages begin or the queue is filled; 50,000 in the
    release. null chooses as many as the shards hold, at most 50,000, and the run records it."""
    floor: float = 0.01
    """Added to each distance when its gradient is divided by it, in squared units of the space."""
    per_level: bool = False
    """Whether a level is trained by its own distances alone: the canvas it is given is then a constant."""
    balanced: bool = False
    """Whether the gradients that arrive at each level's evaluation are scaled to equal norms before they are added:
    through the cascade the last level would outweigh the others."""
    rule: Literal["adamw", "own"] = "adamw"
    """AdamW as in the release, without weight decay, or the optimiser that the run was trained with (`own`)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moments of AdamW."""
    warmup_fraction: float = 0.0625
    """Share of the run over which the learning rate rises linearly from 0; it then falls along a cosine to 0."""

    def __post_init__(self) -> None:
        for name in ("spaces", "classes"):
            chosen = getattr(self, name)
            require(len(set(chosen)) == len(chosen), f"{name} names {', '.join(chosen)}, expected each once")
            require(bool(chosen) or not self.levels, f"{name} is empty, expected one or more with levels")
        require(self.levels or bool(self.judges), "there is no target: expected levels, or judges")
        require(
            "each" not in self.classes or self.statistics == "average",
            f"classes `each` with statistics {self.statistics}: expected statistics `average`, because the rows of a "
            "class in a batch vary in number",
        )
        for decay in (*self.betas, self.ema_beta or 0.0):
            require(0 <= decay < 1, f"betas and ema_beta hold {decay}, expected 0 up to below 1")
        self.check_least(1, "pooled_grid")
        self.check_least(2, "queue_images")
        self.check_above_zero("floor")
        self.check_shares("warmup_fraction")


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodRunConfig(RunConfig):
    """Fields of every method's run: the units of features, and how the objective is computed."""

    normalise: Literal["auto", "none", "channel", "position"] = "channel"
    """Units of the network's features: raw (`none`), or of mean 0 and standard deviation 1 per channel or per position
    and channel, from statistics.npz; `auto` takes raw features if their standard deviation is between 0.5 and 2, else
    `channel`, and the run records which. Samples are always in raw units."""
    compile: bool | None = field(default=False, metadata=EXECUTION)
    """Whether to compile the objective; takes minutes at the start, results are equal up to rounding. null compiles on
    CUDA, unless `activation_checkpointing` is set, and goes on without where the machine has no compiler."""
    activation_checkpointing: bool = field(default=False, metadata=EXECUTION)
    """Whether to recompute blocks in the backward pass instead of storing activations: less memory, more time."""
    post_training: PostTrainingConfig | None = field(default=None, metadata=CAME_LATER)
    """Set by `trainer post-train` alone: what the samples of the run were post-trained towards; null otherwise."""

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)  # super() does not find the class that slots make
        require(
            not (self.compile and self.activation_checkpointing),
            "compile and activation_checkpointing exclude each other: torch.compile decides itself what to recompute",
        )


def checked(kind: type[Config], mapping: Mapping[str, Any], where: str) -> Config:
    """Build a configuration of type `kind` from plain nested data.

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
    """Return the config with fields replaced by dotted name, for example `{"optim.lr": 0.005}`.

    Raises UsageError for an unknown field (with the nearest known name), for an invalid value, and for a
    `method_name` that is not the one of `config`.
    """
    mapping, kind = to_mapping(config), type(config)
    own = _method_in(mapping)
    if isinstance(config, MethodRunConfig) and (asked := settings.get("method_name", own)) != own:
        raise UsageError(
            f"method_name is {asked!r}, expected {own!r}: choose the method by --method or a preset"
        )
    for name, value in settings.items():
        section, _, field_name = name.rpartition(".")
        if name not in (known := fields.known_fields(kind)):
            raise UsageError(f"unknown field {name!r}, {fields.nearest(name, known)} (--dry-run lists all)")
        (mapping[section] if section else mapping)[field_name] = value
    return checked(kind, mapping, "settings")


def _method_of(kind: type) -> str:
    return _method_in({field.name: field.default for field in dataclasses.fields(kind)})


def _method_in(given: Mapping[str, Any]) -> str:
    """Return the method that a run's fields belong to; a decoder's run is recognised by its fields."""
    is_decoder = "patch_size" in given and "model" not in given
    return given.get("method_name", "train-decoder" if is_decoder else "trajectory-forcing")
