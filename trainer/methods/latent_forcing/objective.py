"""Latent Forcing's loss: flow matching of pixels and latents together, each with its own time; x-prediction, v-loss.

    t = 1 is noise, t = 0 is data, z_t = (1−t)·x + t·e and v = (z_t − x)/max(t, floor) for either modality

The release has t = 0 for noise, which only changes the sign of v. The times alone decide which modality is generated
first, see `trainer.methods.latent_forcing.clocks`.

    B batch, H×W grid, K canvases, C channels of a canvas, h×w pixels

Source: Latent Forcing (2026), arXiv 2602.11401; x-prediction with v-loss from JiT (2025), arXiv 2511.13720.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.methods.latent_forcing.clocks import Clocks, draw_clocks
from trainer.methods.latent_forcing.config import LatentMethodConfig
from trainer.seeds import StepRows

TIME_FLOOR = 0.05
"""Default of `LatentMethodConfig.time_floor`: velocities divide by max(t, floor)."""


def loss(
    network: Any,
    pixels: Tensor,
    latents: Tensor,
    *,
    label: Tensor,
    t_pixels: Tensor,
    t_latents: Tensor,
    noise_pixels: Tensor,
    noise_latents: Tensor,
    weight_pixels: Tensor,
    weight_latents: Tensor,
    latent_weight: float = 1 / 3,
    time_floor: float = TIME_FLOOR,
) -> dict[str, Tensor]:
    """Compute the loss of a batch; call `backward` on `["loss"]`.

    network: called as network(pixels, latents, t_pixels=, t_latents=, label=) → clean (pixels, latents). pixels,
    noise_pixels: float32 [B, h, w, 3]; clean pixels lie in [−1, 1]. latents, noise_latents: float32 [B, H, W, K·C].
    t_pixels, weight_pixels: float [B]. t_latents, weight_latents: float [B] or [B, K]; a weight is 1 where a sample
    trains that modality, else 0. label: int64 [B].

    Returns scalars: loss = loss_pixels + latent_weight·loss_latents; each is the mean over the whole batch of the
    weighted squared error of v, so a sample that does not train a modality counts as 0.
    """
    z_pixels, z_latents = mixed(pixels, noise_pixels, t_pixels), mixed(latents, noise_latents, t_latents)
    found = network(z_pixels, z_latents, t_pixels=t_pixels, t_latents=t_latents, label=label)
    # (v − v̂)² = ((x̂ − x)/max(t, floor))²
    squares_pixels, squares_latents = (
        ((x_hat - x) / per_channel(t, x).clamp(min=time_floor)).square()
        for x_hat, x, t in ((found[0], pixels, t_pixels), (found[1], latents, t_latents))
    )
    loss_pixels = (squares_pixels * per_channel(weight_pixels, pixels)).mean()
    # One canvas of a sample is trained: take its mean over H, W and C, so sum over canvases instead of averaging.
    num_canvases = weight_latents.shape[1] if weight_latents.ndim == 2 else 1
    loss_latents = num_canvases * (squares_latents * per_channel(weight_latents, latents)).mean()
    return {
        "loss": loss_pixels + latent_weight * loss_latents,
        "loss_pixels": loss_pixels,
        "loss_latents": loss_latents,
    }


def mixed(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return z_t of x [B, ., ., F] at times t [B], or [B, K] for K equal groups of the F channels."""
    t = per_channel(t, x)
    return (1 - t) * x + t * noise


def velocity(z: Tensor, x: Tensor, t: Tensor, time_floor: float = TIME_FLOOR) -> Tensor:
    """Return the velocity at z that leads to the clean x, both [B, ., ., F]: (z − x)/max(t, floor); t as in `mixed`."""
    return (z - x) / per_channel(t, z).clamp(min=time_floor)


def per_channel(value: Tensor, like: Tensor) -> Tensor:
    """Reshape a number per sample [B], or per sample and channel group [B, K], to multiply `like` [B, ., ., F]."""
    if value.ndim == 2 and value.shape[1] > 1:
        value = value.repeat_interleave(like.shape[-1] // value.shape[1], dim=1)
        return value[:, None, None, :]
    return value.reshape(-1, 1, 1, 1)


class Draws(NamedTuple):
    """The random numbers of one training step, for some rows of the global batch."""

    clocks: Clocks
    noise_pixels: Tensor
    noise_latents: Tensor
    drop_label: Tensor


def draw_batch(
    rows: StepRows,
    pixel_shape: tuple[int, ...],
    latent_shape: tuple[int, ...],
    config: LatentMethodConfig,
    num_canvases: int = 1,
) -> Draws:
    """Draw clocks, noise and label dropout for rows of a step."""
    generator = rows.generator()
    clocks = draw_clocks(rows.batch_size, config, generator, num_canvases)
    drop = torch.rand(rows.batch_size, generator=generator) < config.label_dropout
    pixels, latents = rows.noise(pixel_shape, latent_shape)
    return Draws(Clocks(*map(rows.own, clocks)), pixels, latents, rows.own(drop))
