"""Levels that end in the learned denoiser, with their gradient: what post-training differentiates.

L levels (coarse → fine), B images, H×W grid, C channels
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.methods.normalizing_trajectory import sample
from trainer.methods.normalizing_trajectory.network import Given


def refusal(config: Any) -> str | None:
    """Why the samples of a run have no gradient for every level, if so. config: that of the run."""
    if not config.model.denoiser_depth:
        return (
            "without a denoiser its samples end in a score, which is itself a gradient of the network; train a "
            "denoiser with --set distil_from=RUN"
        )
    if config.model.trajectory == "tokens":
        return "it draws tokens alone and no levels; train with --set model.trajectory=canvases"
    return None


def num_noises(network: Any, method: Any) -> int:
    """Canvases of noise that one image takes."""
    return sample.num_noises(network, network.config.num_steps[0])


def draw(networks: Sequence[Any], method: Any, label: Tensor, noise: Tensor, detached: bool) -> Tensor:
    """Draw canvases [B, L, H, W, C] in units of the network; see the function of this name of Trajectory Forcing."""
    how = sample.HowToSample(num_steps=networks[0].config.num_steps[0], ending="denoiser")
    label = sample.seen_label(label, networks[0], method)
    each, prev = len(noise) // len(networks), torch.zeros_like(noise[0])
    levels: list[Tensor] = []
    for number, network in enumerate(networks):
        given = Given(label, torch.full_like(label, number), prev)
        prev = sample.next_canvas(network, method, given, noise[number * each : (number + 1) * each], how)
        levels.append(prev)
        prev = prev.detach() if detached else prev
    return torch.stack(levels, dim=1)
