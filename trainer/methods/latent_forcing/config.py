"""Configuration of a run of Latent Forcing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hierarchy_builder.fields import MOST_BLOCKS, CheckedFields, require
from trainer.networks.config import NetworkConfig
from trainer.training.config import MethodRunConfig, RuledOptimConfig

Schedule = Literal[
    "cascaded", "cascaded-noised", "shifted", "offset", "independent", "latents-only", "pixels-only"
]
CASCADED = ("cascaded", "cascaded-noised")
"""Schedules that generate one canvas after the other, and then the pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentModelConfig(NetworkConfig):
    """The network of Latent Forcing. Defaults are LM/16 on DINOv2-B features.

    `depth` counts the blocks of the trunk; attention heads of output experts are as wide as those of the trunk.
    """

    width: int = 1024
    depth: int = 20
    num_heads: int = 16
    num_class_tokens: int = 32
    """Class tokens put before the image tokens, from block `class_tokens_at` to the end of the trunk."""
    class_tokens_at: int = 8
    """Block, counted from 0, before which the class tokens are added."""
    patch_px: int = 16
    """Side in pixels of the patch that one token covers; pictures are resized to grid × patch_px."""
    num_canvases: int = 1
    """K, number of canvases used as latents: 1 for the raw tokens only, L for every level of the hierarchy."""
    pixel_bottleneck: int = 128
    """Width between the two layers that embed a patch of pixels."""
    latent_bottleneck: int = 128
    """Width between the two layers that embed a latent token."""
    expert_depth: int = 2
    """Blocks of each output expert; with 0, pixels and latents share one output layer."""
    expert_width: int = 1024
    """Width of the output experts."""

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)  # super() does not find the class that slots make
        self.check_sizes("patch_px", "num_canvases", "pixel_bottleneck", "latent_bottleneck", "expert_width")
        self.check_counts("expert_depth", most=MOST_BLOCKS)
        head = self.width // self.num_heads
        require(
            not self.expert_depth or self.expert_width % head == 0,
            f"expert_width {self.expert_width}, expected a multiple of {head}, the width of a head",
        )
        require(
            not self.num_class_tokens or 0 <= self.class_tokens_at < self.depth,
            f"class_tokens_at {self.class_tokens_at}, expected 0 to depth − 1 = {self.depth - 1}",
        )

    @property
    def image_px(self) -> tuple[int, int]:
        """Height and width of a picture in pixels."""
        return self.grid[0] * self.patch_px, self.grid[1] * self.patch_px

    @property
    def num_levels(self) -> int:
        """Levels of a trajectory, K."""
        return self.num_canvases

    @property
    def latent_channels(self) -> int:
        """K·C, channels of one token over all canvases."""
        return self.num_canvases * self.in_channels


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentMethodConfig(CheckedFields):
    """Latent Forcing's objective: how the times of pixels and latents are drawn, and the weight of the latent loss.

    t = 1 is noise. The paper's distributions are those of 1 − t, so here means have the other sign and intervals are
    mirrored.
    """

    schedule: Schedule = "cascaded-noised"
    """Joint distribution of the two times, see `trainer.methods.latent_forcing.clocks`."""
    latent_share: float = 0.4
    """Probability that a sample trains a latent rather than the pixels, with schedules that train only one."""
    latent_weight: float = 1 / 3
    """Weight of the latent loss; the paper uses 0.333 for DINOv2 and 0.25 for Data2Vec2."""
    latent_time_mean: float = 1.2
    """Mean of logit(t) for the latents."""
    latent_time_std: float = 1.0
    """Standard deviation of logit(t) for the latents."""
    pixel_time_mean: float = 0.4
    """Mean of logit(t) for the pixels."""
    pixel_time_std: float = 0.8
    """Standard deviation of logit(t) for the pixels."""
    pixel_uniform_share: float = 0.1
    """With cascaded schedules, share of samples whose pixel time is uniform on [0.5, 1] instead."""
    condition_noise: float = 0.25
    """With schedule `cascaded-noised`, latents used as a condition get noise with t uniform up to this."""
    prefix_share: float = 0.5
    """With several canvases, share of the pixel samples conditioned only on the first levels, a random number."""
    shift: float = 9.0
    """With schedule `shifted`, factor α (in amplitude) by which latents are ahead of the pixels."""
    offset: float = 0.1
    """With schedule `offset`, part of their path that the latents have finished when the pixels start."""
    uniform_shift: float = 2.0
    """With schedule `independent`, factor by which uniform times are shifted towards noise."""
    time_floor: float = 0.05
    """Velocities divide by t, or by this where t is smaller. With schedule `independent` times are often small, so at
    0.05 noisy samples hardly count in the loss and 1/3 works better."""
    latent_scale: float = 0.485
    """Standard deviation that normalised latents are scaled to, about that of pixels."""
    label_dropout: float = 0.1
    """Probability that the label is replaced by the null class; 1 ignores the classes."""

    def __post_init__(self) -> None:
        self.check_shares(
            "latent_share", "pixel_uniform_share", "condition_noise", "prefix_share", "label_dropout"
        )
        self.check_above_zero("latent_time_std", "pixel_time_std", "shift", "uniform_shift", "latent_scale")
        self.check_above_zero("time_floor")
        self.check_finite("latent_time_mean", "pixel_time_mean", "latent_weight")
        self.check_least(0, "latent_weight")
        require(0 <= self.offset < 1, f"offset is {self.offset}, expected 0 up to below 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentOptimConfig(RuledOptimConfig):
    """Warm-up, then a constant learning rate and an optional cooldown. Defaults are the paper's."""

    lr: float = 2e-4
    """Learning rate after the warm-up, constant until the cooldown; the paper uses 5e-5 · batch size / 256."""
    warmup_images: int = 5 * 1_281_167
    """Images over which the learning rate rises linearly from 0: 5 epochs of ImageNet."""
    cooldown_fraction: float = 0.0
    """Share of the run, at its end, over which the learning rate falls linearly to 0."""
    ema_halflives_kimg: tuple[float, ...] = (7097.0, 3548.0)
    """Half-lives of the weight averages in thousands of images; at a batch of 1,024 decays of 0.9999 and 0.9998."""
    ema_ramp: float = 0.1
    """A half-life never exceeds this share of the images seen so far; the release has no such limit."""

    def __post_init__(self) -> None:
        RuledOptimConfig.__post_init__(self)  # super() does not find the class that slots make
        self.check_least(0, "warmup_images")
        self.check_shares("cooldown_fraction")


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentTrainConfig(MethodRunConfig):
    """One run of Latent Forcing."""

    method_name: Literal["latent-forcing"] = "latent-forcing"
    """Method of the run."""
    preset: str = "LF-LM"
    """Name of the preset the run started from."""
    model: LatentModelConfig = field(default_factory=LatentModelConfig)
    method: LatentMethodConfig = field(default_factory=LatentMethodConfig)
    optim: LatentOptimConfig = field(default_factory=LatentOptimConfig)
    pixel_stage: bool = False
    """Whether every level's canvas is a latent (object → parts → tokens → pixels in one network), not only the last."""

    def __post_init__(self) -> None:
        MethodRunConfig.__post_init__(self)  # super() does not find the class that slots make
        require(
            not self.pixel_stage or self.method.schedule in CASCADED,
            f"pixel_stage with schedule {self.method.schedule}, expected cascaded or cascaded-noised, which "
            "generate levels one after the other",
        )
