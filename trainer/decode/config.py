"""Configuration of a decoder training: the fields of every run, and the decoder's shape, losses and schedule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hierarchy_builder.fields import EXECUTION, require
from trainer.training.config import RunConfig

DecoderSize = Literal["tiny", "B", "L", "XL"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig(RunConfig):
    """One training of a decoder.

    Defaults are those of the code of RAE (Zheng et al. 2025), first stage, for features of ImageNet.
    """

    size: DecoderSize = "XL"
    """Shape of the decoder; B, L and XL are RAE's, tiny is made for a CPU."""
    total_images: int = field(default=20_480_000, metadata=EXECUTION)
    """Images seen until the run ends (16 epochs of ImageNet); the fractions below refer to this number."""
    batch_size: int = 512
    """Images in one optimiser step, over all ranks."""
    patch_size: int = 16
    """Pixels per side of a decoded token; pictures are resized to grid × patch_size."""
    noise: float = 0.8
    """Largest σ of the noise σ·N(0, 1) on tokens in training, in units of the features' root mean square."""
    lr: float = 2e-4
    """Learning rate of Adam after the warm-up; a cosine lowers it to a tenth at the end."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """Decay of Adam's first and second moments."""
    warmup_fraction: float = 1 / 16
    """Share of the run, at its start, in which the learning rate rises from 0."""
    ema_halflife_kimg: float = 161.0
    """Half-life of the weight average used to decode, in thousands of images (RAE: 0.9978 per step of 512)."""
    held_out_shards: int = 0
    """Number of shards, at the end of the list, that are held out and measured at the end of each epoch."""
    lpips_weights: str | None = None
    """Folder with `vgg16` and `lpips` weights for the perceptual loss; without it there is no such loss."""
    lpips_weight: float = 1.0
    """Weight of the perceptual loss."""
    gan_weights: str | None = None
    """Weights of DINO's ViT-S/8 for the adversarial loss; without them there is no such loss."""
    gan_weight: float = 0.75
    """Factor of the adversarial loss after its gradient is balanced with that of the other losses."""
    discriminator_start: float = 6 / 16
    """Share of the run after which the discriminator is trained."""
    gan_start: float = 8 / 16
    """Share of the run after which the decoder is trained against the discriminator."""

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        self.check_least(1, "patch_size")
        self.check_least(0, "held_out_shards", "noise", "lpips_weight", "gan_weight")
        self.check_finite("noise", "lpips_weight", "gan_weight")
        self.check_above_zero("lr", "ema_halflife_kimg")
        self.check_shares("warmup_fraction", "discriminator_start", "gan_start")
        for decay in self.adam_betas:
            require(0 <= decay < 1, f"adam_betas hold {decay}, expected 0 up to below 1")
