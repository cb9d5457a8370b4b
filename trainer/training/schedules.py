"""Learning rates, the decay of weight averages, and the distributions from which training draws times.

t = 1 is noise, t = 0 is data. Times are drawn by inverting a distribution function, with one uniform number each, so
the generator advances by the same amount whatever the parameters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ema_beta(step: int, halflife_kimg: float, batch_size: int = 1024, ramp: float = 0.05) -> float:
    """Return the weight of the old average at step `step`, counted from 1, if all steps have `batch_size` images."""
    return ema_decay(step * batch_size, halflife_kimg, batch_size, ramp)


def ema_decay(images_seen: int, halflife_kimg: float, batch_size: int, ramp: float = 0.05) -> float:
    """Return the weight of the old average in an update by `batch_size` images that brings the total to `images_seen`.

    Source: Karras et al. (2022), the EMA half-life ramp-up of EDM.
    """
    halflife_images = min(halflife_kimg * 1000, images_seen * ramp)
    return 0.5 ** (batch_size / max(halflife_images, 1e-8))


def learning_rate(images_seen: int, total_images: int, lr: float, cooldown_fraction: float) -> float:
    """Return the learning rate after `images_seen` images: `lr`, then falling linearly to 0 at `total_images`."""
    left = max(0, total_images - images_seen)
    return lr * min(1.0, left / max(cooldown_fraction * total_images, 1e-8))


def warmup_cosine(
    images_seen: int, total_images: int, lr: float, warmup_fraction: float, final: float = 0.1
) -> float:
    """Return the learning rate of the update that brings the total to `images_seen`: it rises linearly to `lr`, then
    falls along a cosine to final·lr at `total_images`.
    """
    share = min(1.0, images_seen / total_images)
    if share < warmup_fraction:
        return lr * share / warmup_fraction
    falling = (share - warmup_fraction) / max(1 - warmup_fraction, 1e-8)
    return lr * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * falling)))


def logit_normal(
    n: int, mean: float, std: float, shift: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draw t with logit(t) ~ N(mean + ln shift, std²): float32 [n] on [0, 1]; a larger shift means more noise."""
    uniform = torch.rand(n, dtype=torch.float64, generator=generator)
    return torch.sigmoid(mean + math.log(shift) + std * torch.special.ndtri(uniform)).float()


def plateau_logit_normal(
    n: int, mean: float, std: float, shift: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draw t from a density that is logit-normal up to its mode and constant from there to 1.

    The logit-normal part has mean `mean + ln shift` and standard deviation `std`. Returns float32 [n] on [0, 1].
    """
    centre = mean + math.log(shift)
    mode = _mode(centre, std)
    below = 0.5 * math.erfc(-(_logit(mode) - centre) / (std * math.sqrt(2)))
    density = _density(mode, centre, std)
    mass = torch.rand(n, dtype=torch.float64, generator=generator) * (below + density * (1 - mode))
    rising = torch.sigmoid(centre + std * torch.special.ndtri(mass.clamp(max=below)))
    flat = mode + (mass - below) / density
    return torch.where(mass < below, rising, flat).float()


def _mode(centre: float, std: float) -> float:
    """Return the t of the largest logit-normal density: y = logit(t) solves y = centre + std²·tanh(y/2).

    Started above and below, the iteration converges to the outermost solutions, which are equal if std² ≤ 2.
    """
    candidates = []
    for y in (centre + std**2, centre - std**2):
        for _ in range(10_000):
            y, last = centre + std**2 * math.tanh(y / 2), y
            if abs(y - last) < 1e-14:
                break
        candidates.append(1 / (1 + math.exp(-y)))
    return max(candidates, key=lambda t: _density(t, centre, std))


def _density(t: float, centre: float, std: float) -> float:
    z = (_logit(t) - centre) / std
    return math.exp(-z * z / 2) / (std * math.sqrt(2 * math.pi) * t * (1 - t))


def _logit(t: float) -> float:
    return math.log(t / (1 - t))
