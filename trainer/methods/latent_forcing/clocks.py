"""The times ("clocks") of pixels and latents: how training draws them, and the path that sampling takes.

    t = 1 is noise, t = 0 is data; n samples, S steps, K canvases used as latents, each with its own time

The times alone decide which modality is generated first. Data scaled by α has the same signal-to-noise ratio as data
at a shifted time (see `shifted`), so "α times ahead" is meaningful for two modalities of equal standard deviation.

    cascaded         latents first, then pixels given the clean latents
    cascaded-noised  trained with a little noise on given latents, sampled like cascaded; the paper's recipe
    shifted          both at once, latents α times ahead
    offset           both at once and at constant speed; pixels start when latents have finished `offset` of their path
    independent      trained on all pairs of times, sampled along any path
    latents-only     pixels stay noise
    pixels-only      latents stay noise

The release only samples with `offset` and does not train with it. Training here works as for `shifted`: the modality
that is trained draws its time from its own distribution, and the other one has the time that the path assigns to it.

Source: Latent Forcing (2026), arXiv 2602.11401, sections on schedules; its times are 1 − t.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hierarchy_builder.errors import UsageError
from trainer.methods.latent_forcing.config import CASCADED, LatentMethodConfig, Schedule
from trainer.training.schedules import logit_normal

PIXEL_UNIFORM_FROM = 0.5
"""With cascaded schedules, the uniformly drawn pixel times lie between this and 1."""


class Clocks(NamedTuple):
    """Times and loss weights of a batch: float32 [n] for pixels, [n, K] for latents.

    weight_pixels, weight_latents: 1 where a sample trains that modality, else 0.
    """

    t_pixels: Tensor
    t_latents: Tensor
    weight_pixels: Tensor
    weight_latents: Tensor


def shifted(t: Tensor, towards_noise: float) -> Tensor:
    """Return w·t/(1 + (w − 1)·t), at which data are as noisy as w times smaller data at t; 1/w inverts it."""
    return towards_noise * t / (1 + (towards_noise - 1) * t)


def draw_clocks(
    n: int, config: LatentMethodConfig, generator: torch.Generator, num_canvases: int = 1
) -> Clocks:
    """Draw the times of n samples by `config.schedule`; every schedule consumes the same random numbers.

    With several canvases (cascaded schedules only), a sample that trains a latent trains one canvas, chosen uniformly:
    the canvases before it are given, the canvases after it and the pixels are noise. Some of the samples that train
    pixels are given only the first levels, so that pictures can be drawn from every level.
    """
    latent = logit_normal(n, config.latent_time_mean, config.latent_time_std, generator=generator)
    pixel = logit_normal(n, config.pixel_time_mean, config.pixel_time_std, generator=generator)
    uniform, use_uniform, stage, canvas, prefix, *given = torch.rand(5 + num_canvases, n, generator=generator)
    trains_latent = stage < config.latent_share
    ones = torch.ones(n)
    if config.schedule in CASCADED:
        spread = 1 - PIXEL_UNIFORM_FROM
        pixel = torch.where(
            use_uniform < config.pixel_uniform_share, PIXEL_UNIFORM_FROM + spread * uniform, pixel
        )
        noise = config.condition_noise if config.schedule == "cascaded-noised" else 0.0
        num_given = torch.where(
            prefix < config.prefix_share, 1 + (canvas * (num_canvases - 1)).long(), num_canvases
        )
        given_times = noise * torch.stack(given, dim=1)
        return _cascade(latent, pixel, trains_latent, (canvas * num_canvases).long(), num_given, given_times)
    if config.schedule == "independent":
        w = config.uniform_shift
        times, weights = (shifted(uniform, w), shifted(given[0], w)), (ones, ones)
    elif config.schedule == "latents-only":
        times, weights = (ones, latent), (0 * ones, ones)
    elif config.schedule == "pixels-only":
        times, weights = (pixel, ones), (ones, 0 * ones)
    else:
        if config.schedule == "shifted":
            follows, leads = shifted(latent, config.shift), shifted(pixel, 1 / config.shift)
        else:
            follows, leads = (latent / (1 - config.offset)).clamp(max=1.0), (1 - config.offset) * pixel
        times = torch.where(trains_latent, follows, pixel), torch.where(trains_latent, latent, leads)
        weights = 1.0 - trains_latent.float(), trains_latent.float()
    return Clocks(times[0], times[1][:, None], weights[0], weights[1][:, None])


def _cascade(
    latent: Tensor, pixel: Tensor, trains_latent: Tensor, canvas: Tensor, num_given: Tensor, given: Tensor
) -> Clocks:
    """Train one of K + 1 stages in each sample.

    canvas: [n], the canvas to train in samples that train a latent. num_given: [n], 1 … K, the number of canvases given
    in samples that train pixels. given: [n, K], times of canvases that are given.
    """
    number = torch.arange(given.shape[1])
    is_given = number < torch.where(trains_latent, canvas, num_given)[:, None]
    is_trained = trains_latent[:, None] & (number == canvas[:, None])
    t_latents = torch.where(is_given, given, torch.where(is_trained, latent[:, None], 1.0))
    t_pixels = torch.where(trains_latent, 1.0, pixel)
    return Clocks(t_pixels, t_latents, (~trains_latent).float(), is_trained.float())


def sampling_grid(
    schedule: Schedule,
    num_steps: int,
    *,
    num_canvases: int = 1,
    latent_warp: float = 1.0,
    pixel_warp: float = 1.0,
    shift: float = 9.0,
    offset: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Return the times of a sampler from noise to data: float32 t_pixels [S + 1] and t_latents [S + 1, K].

    Cascaded: the steps are divided evenly among the canvases and the pixels, and the pixels get the remainder; times
    within a stage are evenly spaced, then shifted towards noise by the warps (1/0.575 here is 0.575 in the paper).
    shift: α of `shifted` and `independent`; above 1 latents come first, at 1 both go together, below 1 pixels come
    first. Raises UsageError for fewer steps than stages.
    """
    K = num_canvases
    if schedule in CASCADED:
        if num_steps <= K:
            raise UsageError(
                f"{num_steps} steps, expected {K + 1} or more: one for each canvas and one for the pixels"
            )
        per_stage = num_steps // (K + 1)
        latent, pixel = _even(per_stage), _even(num_steps - K * per_stage)
        t_latents = torch.ones(num_steps + 1, K, dtype=torch.float64)
        for k in range(K):
            start, stop = k * per_stage, (k + 1) * per_stage
            t_latents[start : stop + 1, k], t_latents[stop:, k] = shifted(latent, latent_warp), 0.0
        still = torch.ones(K * per_stage, dtype=torch.float64)
        return torch.cat([still, shifted(pixel, pixel_warp)]).float(), t_latents.float()
    if num_steps < 1 or K != 1:
        raise UsageError(
            f"{num_steps} steps of {K} canvases, expected 1 or more, and one canvas for {schedule}"
        )
    if schedule in ("shifted", "independent"):
        root = math.sqrt(shift)
        even = _even(num_steps)
        both = torch.cat([shifted(even, root), shifted(even, 1 / root)]).sort(descending=True).values[::2]
        t_pixels, t_latents = shifted(both, root), shifted(both, 1 / root)
    elif schedule == "offset":
        t_latents = _even(num_steps)
        t_pixels = (t_latents / (1 - offset)).clamp(max=1.0)
    else:
        moving, still = _even(num_steps), torch.ones(num_steps + 1, dtype=torch.float64)
        t_pixels, t_latents = (still, moving) if schedule == "latents-only" else (moving, still)
    return t_pixels.float(), t_latents.float()[:, None]


def _even(num_steps: int) -> Tensor:
    return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
