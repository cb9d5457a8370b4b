"""Levels in one evaluation each, with their gradient: what post-training differentiates.

L levels (coarse → fine), B images, H×W grid, C channels
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def refusal(config: Any) -> str | None:
    """Why the samples of a run have no gradient, if so: those of this method always have one."""
    return None


def num_noises(network: Any, method: Any) -> int:
    """Canvases of noise that one image takes: L."""
    return int(network.config.num_levels)


def draw(networks: Sequence[Any], method: Any, label: Tensor, noise: Tensor, detached: bool) -> Tensor:
    """Draw canvases [B, L, H, W, C] in units of the network; those of `sample_levels` in one step, up to rounding.

    networks: the network that draws each level; they may be one and the same. method: the method's configuration.
    label: int64 [B]. noise: float32 [L, B, H, W, C]. detached: whether a level takes the one before as a constant, so
    that no gradient passes between levels.
    """
    levels: list[Tensor] = []
    prev = torch.zeros_like(noise[0])
    start, end = noise.new_ones(len(label)), noise.new_zeros(len(label))
    for number, network in enumerate(networks):
        level = torch.full_like(label, number)
        # At t = 1 the step z − (t − r)·u ends in the clean canvas that the u-head predicts.
        prev = network(noise[number], t=start, r=end, label=label, level=level, prev=prev, heads="u").x
        levels.append(prev)
        prev = prev.detach() if detached else prev
    return torch.stack(levels, dim=1)
