"""Sampling of level canvases: one network evaluation per level, coarse → fine, each given the level before.

    B images, L levels, H×W grid, C channels

t = 1 is noise, t = 0 is data. The chain is Markov in the level: canvases of levels ≥ l depend only on the canvas of
level l − 1 and on their own noise, so trajectories can be edited and resumed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hierarchy_builder.errors import UsageError
from trainer.data.normalisation import RAW, Normaliser
from trainer.methods.trajectory_forcing.network import Guidance, TrajectoryTransformer

TIME_WARP = 10.0
"""w of the times t' = w·t/(1 + (w−1)·t) of several steps, t on an even grid: most of them are near noise."""


@torch.no_grad()
def sample_levels(
    model: TrajectoryTransformer,
    label: Tensor,
    noise: Tensor,
    num_steps: int = 1,
    *,
    start_level: int = 0,
    previous: Tensor | None = None,
    guidance: Guidance | Mapping[str, object] | Sequence[object] | None = None,
    weak_model: TrajectoryTransformer | None = None,
    weak_scale: float = 0.0,
    normaliser: Normaliser = RAW,
) -> Tensor:
    """Sample canvases of levels `start_level` … L−1: float32 [B, L − start_level, H, W, C].

    label: int64 [B]. noise: float32 [L, B, H, W, C], of all levels, also when resuming. num_steps: network evaluations
    per level. previous: [B, H, W, C], the canvas of level start_level − 1 to resume from. guidance: for networks
    trained with it. weak_model, weak_scale: autoguidance, u + weak_scale·(u − u_weak) with an early checkpoint.
    normaliser: that of the run; `previous` and the result are raw features, noise is in the network's own units.
    Raises UsageError if labels, noise, steps or start do not fit.
    """
    _check(model, label, noise, num_steps, start_level, previous)
    canvas = torch.zeros_like(noise[0]) if previous is None else normaliser.apply(previous)
    levels = []
    for number in range(start_level, len(noise)):
        level = torch.full_like(label, number)
        inputs: dict[str, Any] = {"label": label, "level": level, "prev": canvas, "guidance": guidance}
        canvas = noise[number]
        for t_now, t_next in time_steps(num_steps):
            t, r = noise.new_full((len(label),), t_now), noise.new_full((len(label),), t_next)
            u = model(canvas, t=t, r=r, **inputs, heads="u").u
            if weak_model is not None:
                u = u + weak_scale * (u - weak_model(canvas, t=t, r=r, **inputs, heads="u").u)
            canvas = canvas - (t_now - t_next) * u
        levels.append(canvas)
    return normaliser.undo(torch.stack(levels, dim=1))


def time_steps(num_steps: int) -> list[tuple[float, float]]:
    """Return (t, next t) of each step from t = 1 to t = 0."""
    even = [1 - i / num_steps for i in range(num_steps + 1)]
    warped = [TIME_WARP * t / (1 + (TIME_WARP - 1) * t) for t in even]
    return list(itertools.pairwise(warped))


def _check(
    model: TrajectoryTransformer,
    label: Tensor,
    noise: Tensor,
    num_steps: int,
    start_level: int,
    previous: Tensor | None,
) -> None:
    c = model.config
    expected = (c.num_levels, len(label), *c.grid, c.in_channels)
    if tuple(noise.shape) != expected:
        raise UsageError(
            f"noise has shape {tuple(noise.shape)}, expected levels, images, grid, channels {expected}"
        )
    if len(label) and not 0 <= int(label.min()) <= int(label.max()) <= c.num_classes:
        raise UsageError(
            f"label {int(label.min())} to {int(label.max())}, expected 0 to {c.num_classes - 1}, "
            f"or {c.num_classes} for no class"
        )
    if num_steps < 1:
        raise UsageError(f"num_steps is {num_steps}, expected 1 or more")
    if not 0 <= start_level < c.num_levels:
        raise UsageError(f"start_level is {start_level}, expected 0 to {c.num_levels - 1}")
    if (start_level > 0) != (previous is not None):
        raise UsageError(
            f"start_level {start_level} with previous {'missing' if previous is None else 'given'}: resuming needs "
            "the canvas of the level before, and level 0 has none"
        )
