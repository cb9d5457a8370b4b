"""Configuration of a run of Normalizing Trajectory Models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hierarchy_builder.fields import MOST, MOST_BLOCKS, CheckedFields, require
from trainer.networks.config import ModelConfig, NetworkConfig
from trainer.training.config import MethodRunConfig, RuledOptimConfig

Trajectory = Literal["tokens", "canvases", "levels"]
"""Kind of trajectory: growing noise on the tokens, growing noise on each level's canvas given the level before, or the
levels of the hierarchy as states."""

Ending = Literal["inverse", "score", "denoiser"]
"""How final states of a trajectory become canvases, see `trainer.methods.normalizing_trajectory.sample`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NormalizingModelConfig(NetworkConfig):
    """The network of Normalizing Trajectory Models. Defaults are those of NTM-B.

    `width`, `depth` and `num_heads` are those of the predictor, whose blocks attend to all tokens.
    """

    num_levels: int = 4
    """L, levels of the hierarchy including the raw tokens; comes from the shards."""
    trajectory: Trajectory = "tokens"
    """States of a trajectory: noisy versions of the tokens or of every canvas, or the levels themselves."""
    num_steps: tuple[int, ...] = (4,)
    """Possible numbers T of transitions; each training step draws one of them. With `levels`, T is L."""
    flow_width: int = 768
    """Width of the transporter."""
    flow_blocks: int = 2
    """Affine autoregressive blocks of the transporter, in raster order and in reverse by turns."""
    flow_depth: int = 4
    """Causal transformer blocks in each autoregressive block."""
    flow_heads: int = 12
    """Attention heads of the transporter."""
    flow_max_log_scale: float = 1.0
    """Largest log-scale of a transporter block; the block's inverse amplifies by at most its exponential."""
    denoiser_depth: int = 0
    """Blocks of the learned denoiser, as wide as the predictor; 0 means no denoiser."""
    backbone: ModelConfig | None = None
    """Network of the flow-matching run in `init_from`, used as the predictor; it is read from that run."""

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
            f"trajectory {self.trajectory!r} with a backbone: expected 'canvases', on which the backbone was trained",
        )

    @property
    def drawn_levels(self) -> int:
        """Levels of a trajectory that is drawn: one where tokens alone are modelled."""
        return 1 if self.trajectory == "tokens" else self.num_levels

    @property
    def knows_levels(self) -> bool:
        """Whether level and previous canvas are inputs of the predictor."""
        return self.trajectory == "canvases"


@dataclass(frozen=True, kw_only=True, slots=True)
class NormalizingMethodConfig(CheckedFields):
    """The objective of Normalizing Trajectory Models."""

    pairs: Literal["all", "one"] = "all"
    """Transitions of a sample that a step trains: all of its trajectory, or one at random."""
    t_min: tuple[float, float] = (0.0, 0.05)
    """Interval from which training draws the noise of the cleanest state uniformly; not used by `levels`."""
    sampling_t_min: float = 0.02
    """Noise of the cleanest state in sampling and in likelihoods; not used by `levels`."""
    level_noise: float = 0.1
    """With trajectory `levels`, standard deviation of the noise on canvases, in units of normalised features."""
    label_dropout: float = 0.1
    """Probability that the label is replaced by the null class; a model trained with 0 cannot be guided."""
    flow_weight: float = 2.5
    """λ, initial weight of the distance to the means of the frozen flow-matching network; it falls to 0 by a cosine."""

    def __post_init__(self) -> None:
        low, high = self.t_min
        require(0 <= low <= high < 1, f"t_min is {self.t_min}, expected 0 ≤ low ≤ high < 1")
        require(
            0 < self.sampling_t_min < 1, f"sampling_t_min is {self.sampling_t_min}, expected above 0, below 1"
        )
        self.check_above_zero("level_noise")
        self.check_shares("label_dropout")
        self.check_finite("flow_weight")
        self.check_least(0, "flow_weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class NormalizingOptimConfig(RuledOptimConfig):
    """Warm-up and cosine. Defaults are the paper's, except warm-up and averages, which it does not state."""

    lr: float = 1e-4
    """Learning rate after the warm-up; the paper uses 5e-5 when it starts from a flow-matching network."""
    final_lr_fraction: float = 0.01
    """Share of the learning rate that remains at the end of the cosine."""
    warmup_fraction: float = 0.02
    """Share of the run, at its start, over which the learning rate rises from 0."""
    weight_decay: float = 1e-4
    """Decoupled weight decay of AdamW; must be 0 with Muon."""

    def __post_init__(self) -> None:
        RuledOptimConfig.__post_init__(self)  # super() does not find the class that slots make
        self.check_shares("final_lr_fraction", "warmup_fraction")


@dataclass(frozen=True, kw_only=True, slots=True)
class NormalizingTrainConfig(MethodRunConfig):
    """One run of Normalizing Trajectory Models."""

    method_name: Literal["normalizing-trajectory"] = "normalizing-trajectory"
    """Method of the run."""
    preset: str = "NTM-B"
    """Name of the preset the run started from."""
    model: NormalizingModelConfig = field(default_factory=NormalizingModelConfig)
    method: NormalizingMethodConfig = field(default_factory=NormalizingMethodConfig)
    optim: NormalizingOptimConfig = field(default_factory=NormalizingOptimConfig)
    init_from: str | None = None
    """Run of Trajectory Forcing whose network becomes the predictor, with an identity transporter at first."""
    distil_from: str | None = None
    """Run of this method whose network is frozen while a denoiser learns from the scores of its trajectories."""

    def __post_init__(self) -> None:
        MethodRunConfig.__post_init__(self)  # super() does not find the class that slots make
        require(
            self.init_from is None or self.distil_from is None,
            "init_from and distil_from exclude each other: the denoiser is trained after everything else",
        )
        require(
            not (self.compile and self.distil_from),
            "compile cannot be combined with distil_from: the denoiser's loss takes gradients, which torch.compile "
            "cannot trace",
        )
        require(
            self.init_from is None or self.method.t_min[0] > 0,
            f"method.t_min is {self.method.t_min}, expected its low end above 0 with init_from: the standard deviation "
            "of the last transition is about t_min",
        )
