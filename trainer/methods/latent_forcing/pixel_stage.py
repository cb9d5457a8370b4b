"""Decodes canvases to pixels with a network of Latent Forcing, where no decoder was trained.

T trajectories, K canvases, H×W grid, C channels, h×w pixels
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from hierarchy_builder.errors import MismatchError
from trainer.data.normalisation import RAW, Normaliser
from trainer.decode.rae import ConditionalDecoder
from trainer.methods.latent_forcing.network import PIXEL_CHANNELS, PixelLatentTransformer
from trainer.methods.latent_forcing.objective import TIME_FLOOR
from trainer.methods.latent_forcing.sample import UNGUIDED, ClockGuidance, sample_pixels
from trainer.seeds import level_noise, mixed_seed

STEPS_PER_STAGE = 25
"""Steps of each canvas and of the pixels if one step is asked for, which is too few for any picture; with one canvas
that makes the 50 steps of the paper."""


def pixel_noise(seed: int, image_px: tuple[int, int]) -> Tensor:
    """Noise of the pixels of an image, float32 [h, w, 3] on the CPU; it is independent of the noise of the levels."""
    generator = torch.Generator().manual_seed(mixed_seed(seed, 1))
    return torch.randn(*image_px, PIXEL_CHANNELS, generator=generator)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PixelStage(ConditionalDecoder):
    """Decodes canvases to pixels with a network of Latent Forcing.

    weak: the network that guides; without it, this network without class. knows_classes: whether the network was
    trained with classes. label: class that is drawn, None for the null class. seed: seed of the noise of the pixels.
    """

    network: PixelLatentTransformer
    normaliser: Normaliser = RAW
    num_steps: int = STEPS_PER_STAGE
    time_floor: float = TIME_FLOOR
    guidance: ClockGuidance = UNGUIDED
    weak: nn.Module | None = None
    knows_classes: bool = True
    label: int | None = None
    seed: int = 0

    def of(self, label: int, seed: int) -> PixelStage:
        """Return this pixel stage for a trajectory of this class and seed."""
        return dataclasses.replace(self, label=label if self.knows_classes else None, seed=seed)

    def to(self, device: str | torch.device) -> Self:
        """Move the networks to a device; the normaliser follows them where it is used."""
        self.network.to(device)
        if self.weak is not None:
            self.weak.to(device)
        return self

    @torch.no_grad()
    def __call__(self, canvases: Tensor) -> Tensor:
        """Raw canvases [B, H, W, C] → RGB [B, 3, h, w] in [0, 1], all of one class and seed.

        A network of one latent draws a picture of each canvas. One of all levels takes the L levels of a trajectory,
        coarse → fine, or those of several; picture ℓ is drawn given levels 0 to ℓ.
        Raises MismatchError if canvases do not fit the network.
        """
        latents = self._latents(canvases)
        pictures = [self._drawn(latents, level) for level in range(self.network.config.num_canvases)]
        return torch.stack(pictures, dim=1).flatten(0, 1)

    @torch.no_grad()
    def at(self, canvases: Tensor, level: int) -> Tensor:
        """The picture of one level of a trajectory, RGB [3, h, w]."""
        latents, K = self._latents(canvases), self.network.config.num_canvases
        return self._drawn(latents[level // K][None], level % K)[0]

    def _latents(self, canvases: Tensor) -> Tensor:
        """Canvases of T trajectories as the network sees them, [T, H, W, K·C]."""
        c = self.network.config
        if canvases.shape[1:] != (*c.grid, c.in_channels) or len(canvases) % c.num_canvases:
            raise MismatchError(
                f"canvases are {tuple(canvases.shape)}, the pixel stage expects {(*c.grid, c.in_channels)} each, and "
                f"a multiple of {c.num_canvases}"
            )
        device = next(self.network.parameters()).device
        canvases = self.normaliser.to(device).apply(canvases.to(device))
        return side_by_side(canvases.unflatten(0, (-1, c.num_canvases)))

    def _drawn(self, latents: Tensor, level: int) -> Tensor:
        """Pictures RGB [T, 3, h, w] given levels 0 to `level` of T trajectories [T, H, W, K·C]."""
        c, count, device = self.network.config, len(latents), latents.device
        given = (level + 1) * c.in_channels
        noise = level_noise([self.seed], c.num_canvases, c.grid, c.in_channels).transpose(0, 1)
        noise = side_by_side(noise).to(device).expand(count, -1, -1, -1)
        times = (torch.arange(c.num_canvases) > level).float().expand(self.num_steps + 1, -1)
        pixels, _ = sample_pixels(
            self.network,
            torch.full((count,), c.num_classes if self.label is None else self.label, device=device),
            pixel_noise(self.seed, c.image_px).to(device).expand(count, -1, -1, -1),
            torch.cat([latents[..., :given], noise[..., given:]], dim=-1),
            (torch.linspace(1, 0, self.num_steps + 1), times),
            pixel_guidance=self.guidance,
            weak_network=self.weak,
            time_floor=self.time_floor,
        )
        return (pixels.permute(0, 3, 1, 2) + 1) / 2


@dataclass(frozen=True, slots=True, eq=False)
class Drawn(ConditionalDecoder):
    """Returns the picture that was sampled together with these latents, instead of decoding them.

    picture: RGB [1, 3, h, w] that was sampled with these levels [1, H, W, C]. stage: draws the pictures of other
    levels, such as edited ones, if the network can.
    """

    levels: Tensor
    picture: Tensor
    stage: PixelStage | None

    def of(self, label: int, seed: int) -> Drawn:
        """Return this decoder with the pixel stage of a trajectory of this class and seed."""
        return self if self.stage is None else dataclasses.replace(self, stage=self.stage.of(label, seed))

    def draws(self, canvases: Tensor) -> bool:
        """Whether these are the levels that the picture was sampled with, or there is a pixel stage."""
        return self.stage is not None or torch.equal(canvases, self.levels)

    def __call__(self, canvases: Tensor) -> Tensor:
        """Return the picture of these levels, [1, 3, h, w]. Raises MismatchError for others without a pixel stage."""
        if torch.equal(canvases, self.levels):
            return self.picture
        if self.stage is None:
            raise MismatchError(
                "these are not the levels that the picture was drawn with, and there is no other"
            )
        return self.stage(canvases)


def side_by_side(canvases: Tensor) -> Tensor:
    """[B, K, H, W, C] → [B, H, W, K·C]."""
    return canvases.permute(0, 2, 3, 1, 4).flatten(3)


def apart(latents: Tensor, num_canvases: int) -> Tensor:
    """[B, H, W, K·C] → [B, K, H, W, C]."""
    return latents.unflatten(3, (num_canvases, -1)).permute(0, 3, 1, 2, 4)
