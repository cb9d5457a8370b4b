"""Sampling of latents and pixels along the clocks of `trainer.methods.latent_forcing.clocks`, by Heun's method.

    B images, H×W grid, K canvases, C channels of one, h×w pixels, S steps

t = 1 is noise, t = 0 is data. Both modalities take every step; one whose clock stands still does not change.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hierarchy_builder.errors import UsageError
from trainer.methods.latent_forcing.objective import TIME_FLOOR, per_channel, velocity

Pair = tuple[Tensor, Tensor]
"""A tensor of the pixels, and the same of the latents."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClockGuidance:
    """Guidance of one modality: v_u + scale·(v_c − v_u) while low < t < high on its own clock, t = 1 also if high is 1.

    The paper's intervals are of 1 − t: its (0.06, 1) is low 0, high 0.94 here.
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def at(self, t: float) -> float:
        """Return the scale at time t."""
        return self.scale if self.low < t and (t < self.high or self.high >= 1) else 1.0


UNGUIDED = ClockGuidance()


@torch.no_grad()
def sample_pixels(
    network: Any,
    label: Tensor,
    noise_pixels: Tensor,
    noise_latents: Tensor,
    grid: tuple[Tensor, Tensor],
    *,
    pixel_guidance: ClockGuidance = UNGUIDED,
    latent_guidance: ClockGuidance = UNGUIDED,
    weak_network: Any = None,
    weak_from: float = 1.0,
    clean_ends: bool = False,
    time_floor: float = TIME_FLOOR,
) -> tuple[Tensor, Tensor]:
    """Sample (pixels, latents), float32 of the shapes of the noise.

    label: int64 [B]. noise_pixels: [B, h, w, 3] and noise_latents: [B, H, W, K·C] are the states at the start of the
    grid; to sample the pixels of given latents, pass clean latents and a grid with their time at 0 throughout. grid:
    t_pixels [S + 1] and t_latents [S + 1, K], see `clocks.sampling_grid`.
    Guidance moves away from the network without class, or from weak_network without class (autoguidance). weak_from:
    weak_network is used once all latents have reached this time, and the network itself before; 1 means always, 0.001
    the pixel stage alone, as in the paper's best setting.
    The last step of Heun's method is an Euler step. clean_ends: so is each step in which a latent reaches t = 0; the
    release takes a Heun step there, which leaves half the noise of that step, since a clean latent has no velocity.
    time_floor: as in training.
    Raises UsageError when the grid does not run from a time to a smaller one.
    """
    t_pixels, t_latents = (times.to(noise_pixels.device) for times in grid)
    for times in (t_pixels, t_latents):
        if len(times) < 2 or len(t_pixels) != len(t_latents) or (times.diff(dim=0) > 0).any():
            raise UsageError("the grid is not one of times that fall, as many for pixels as for latents")

    def guided_velocities(z: Pair, times: Pair) -> Pair:
        guided = _velocities(network, label, z, times, time_floor)
        pixel_scale = pixel_guidance.at(float(times[0]))
        latent_scale = torch.tensor([[latent_guidance.at(float(t)) for t in times[1]]], device=z[1].device)
        if pixel_scale == 1.0 and bool((latent_scale == 1.0).all()):
            return guided
        use_weak = weak_network is not None and float(times[1].max()) <= weak_from
        guide = weak_network if use_weak else network
        plain = _velocities(guide, torch.full_like(label, guide.config.num_classes), z, times, time_floor)
        return (
            plain[0] + pixel_scale * (guided[0] - plain[0]),
            plain[1] + per_channel(latent_scale, z[1]) * (guided[1] - plain[1]),
        )

    z: Pair = (noise_pixels, noise_latents)
    last = len(t_pixels) - 2
    for step, (now, then) in enumerate(itertools.pairwise(zip(t_pixels, t_latents, strict=True))):
        v = guided_velocities(z, now)
        ahead = _moved(z, v, now, then)
        arrives = clean_ends and bool(((then[1] == 0) & (now[1] > 0)).any())
        if step < last and not arrives:
            after = guided_velocities(ahead, then)
            v = ((v[0] + after[0]) / 2, (v[1] + after[1]) / 2)
            ahead = _moved(z, v, now, then)
        z = ahead
    return z


def _velocities(network: Any, label: Tensor, z: Pair, times: Pair, floor: float) -> Pair:
    t_pixels, t_latents = times[0].expand(len(label)), times[1].expand(len(label), -1)
    x = network(*z, t_pixels=t_pixels, t_latents=t_latents, label=label)
    return velocity(z[0], x[0], t_pixels, floor), velocity(z[1], x[1], t_latents, floor)


def _moved(z: Pair, v: Pair, now: Pair, then: Pair) -> Pair:
    pixel_step, latent_step = now[0] - then[0], per_channel((now[1] - then[1])[None], z[1])
    return z[0] - pixel_step * v[0], z[1] - latent_step * v[1]
