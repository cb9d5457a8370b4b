"""What a run of Normalizing Trajectory Models is: the fields of every run, with its network, method and optimiser."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pydantic

from hierarchy_builder.fields import MOST, MOST_BLOCKS, STRICT, require
from trainer.networks.config import ModelConfig, NetworkConfig
from trainer.training.config import MethodRunConfig, RuledOptimConfig

Trajectory = Literal["tokens", "canvases", "levels"]
"""What a trajectory runs through: noise levels of the tokens, of each level's canvas given the one before, or the
levels of the hierarchy themselves."""

Ending = Literal["inverse", "score", "denoiser"]
"""How the states that a trajectory ends in become canvases, see `trainer.methods.normalizing_trajectory.sample`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NormalizingModelConfig(NetworkConfig):
    """The network of Normalizing Trajectory Models. Defaults are those of NTM-B.

    Width, depth and heads are those of the predictor, whose blocks see all tokens at once.
    """

    num_levels: int = 4
    """L, levels of the hierarchy including the raw tokens; comes from the shards."""
    trajectory: Trajectory = "tokens"
    """What a trajectory runs through: noise levels of the tokens, of every canvas, or the levels themselves."""
    num_steps: tuple[int, ...] = (4,)
    """Transitions T of a trajectory; one of them is drawn for each step of training. With `levels` T is L."""
    flow_width: int = 768
    """Width of the transporter."""
    flow_blocks: int = 2
    """Affine autoregressive blocks of the transporter, alternately in raster order and against it."""
    flow_depth: int = 4
    """Causal transformer blocks in each of them."""
    flow_heads: int = 12
    """Attention heads of the transporter."""
    flow_max_log_scale: float = 1.0
    """Largest logarithm of a scale of the transporter; its inverse stretches by as much, once in each block."""
    denoiser_depth: int = 0
    """Blocks of the learned denoiser, as wide as the predictor; 0 for none."""
    backbone: ModelConfig | None = None
    """Network of the flow-matching run that `init_from` named, which then predicts; it comes from that run."""

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)  # super() does not find the class that slots make
        self.check_sizes("flow_blocks", "flow_depth", "flow_max_log_scale")
        self.check_counts("denoiser_depth", most=MOST_BLOCKS)
        self.check_heads("flow_width", "flow_heads")
        require(2 <= self.num_levels <= MOST, f"num_levels is {self.num_levels}, expected 2 to {MOST:,}")
        require(
            len(self.num_steps) >= 1
            and min(self.num_steps) >= 1
            and len(set(self.num_steps)) == len(self.num_steps),
            f"num_steps is {self.num_steps}, expected different numbers of 1 or more, for example (4, 8, 16)",
        )
        require(
            self.backbone is None or self.trajectory == "canvases",
            f"trajectory {self.trajectory!r} with a backbone: expected 'canvases', which is what it was trained on",
        )

    @property
    def knows_levels(self) -> bool:
        """Whether the predictor is told the level and the canvas before it."""
        return self.trajectory == "canvases"


@dataclass(frozen=True, kw_only=True, slots=True)
class NormalizingMethodConfig:
    """The objective of Normalizing Trajectory Models."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    pairs: Literal["all", "one"] = "all"
    """Transitions of a sample that a step trains: all of its trajectory, or one drawn by chance."""
    t_min: tuple[float, float] = (0.0, 0.05)
    """Interval of the noise on the cleanest state, uniform in training; not used by `levels`."""
    sampling_t_min: float = 0.02
    """Noise on the cleanest state in sampling and in likelihoods; not used by `levels`."""
    level_noise: float = 0.1
    """Trajectory `levels`: standard deviation of the noise on canvases, in units of the normalised features."""
    label_dropout: float = 0.1
    """Probability that the label is replaced by the null class; 0 trains a model that takes no guidance."""
    flow_weight: float = 2.5
    """λ, weight of the distance to the means of the frozen flow-matching network, which falls along a cosine to 0."""

    def __post_init__(self) -> None:
        low, high = self.t_min
        require(0 <= low <= high < 1, f"t_min is {self.t_min}, expected 0 ≤ low ≤ high < 1")
        require(
            0 < self.sampling_t_min < 1, f"sampling_t_min is {self.sampling_t_min}, expected above 0, below 1"
        )
        require(
            0 < self.level_noise < math.inf,
            f"level_noise is {self.level_noise}, expected above 0, and finite",
        )
        require(0 <= self.label_dropout <= 1, f"label_dropout is {self.label_dropout}, expected 0 to 1")
        require(0 <= self.flow_weight < math.inf, f"flow_weight is {self.flow_weight}, expected 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class NormalizingOptimConfig(RuledOptimConfig):
    """Warm-up and cosine. Defaults are the paper's, but for warm-up and averages, which it does not state."""

    lr: float = 1e-4
    """Learning rate after the warm-up; from a flow-matching network the paper has 5e-5."""
    final_lr_fraction: float = 0.01
    """Share of it that is left at the end of the cosine."""
    warmup_fraction: float = 0.02
    """Share of the run, at its start, over which the learning rate rises from 0."""
    weight_decay: float = 1e-4
    """Decoupled weight decay; Muon here has none."""

    def __post_init__(self) -> None:
        RuledOptimConfig.__post_init__(self)  # super() does not find the class that slots make
        self.check_shares("final_lr_fraction", "warmup_fraction")


@dataclass(frozen=True, kw_only=True, slots=True)
class NormalizingTrainConfig(MethodRunConfig):
    """One run of Normalizing Trajectory Models."""

    method_name: Literal["normalizing-trajectory"] = "normalizing-trajectory"
    """Tells this configuration from one of another method."""
    preset: str = "NTM-B"
    """Name of the preset the run started from."""
    model: NormalizingModelConfig = field(default_factory=NormalizingModelConfig)
    method: NormalizingMethodConfig = field(default_factory=NormalizingMethodConfig)
    optim: NormalizingOptimConfig = field(default_factory=NormalizingOptimConfig)
    init_from: str | None = None
    """Run of Trajectory Forcing whose network predicts from the start, with an identity transporter."""
    distil_from: str | None = None
    """Run of this method that is frozen while its denoiser is trained on what the scores of its trajectories say."""

    def __post_init__(self) -> None:
        MethodRunConfig.__post_init__(self)  # super() does not find the class that slots make
        require(
            self.init_from is None or self.distil_from is None,
            "init_from and distil_from exclude each other: a denoiser is trained after the rest",
        )
        require(
            not (self.compile and self.distil_from),
            "compile cannot be combined with distil_from: the denoiser's loss takes gradients, which torch.compile "
            "cannot trace",
        )
        require(
            self.init_from is None or self.method.t_min[0] > 0,
            f"method.t_min is {self.method.t_min}, expected a low end above 0 with init_from: the deviation of its "
            "last transition is about t_min",
        )
