"""How much of the data a network can see at the times it is trained at: signal-to-noise of each level.

z_t = (1−t)·x + t·e, so a canvas whose values deviate by σ from their mean has the signal-to-noise ratio ((1−t)·σ/t)² in
one token. The n tokens of a region share their value, and their mean has n times that ratio. It is 1 at
t = σ·sqrt(n)/(1 + σ·sqrt(n)): the data is visible below, and hidden above.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hierarchy_builder.canvases import level_canvases
from trainer.methods.trajectory_forcing.config import MethodConfig
from trainer.methods.trajectory_forcing.objective import draw_times

DRAWS = 20_000
LEAST_VISIBLE, LEAST_HIDDEN = 0.02, 0.02
"""Shares of the draws below which a level can hardly be learned."""


class Visibility(NamedTuple):
    """One level, in the units of the network."""

    level: int
    std: float
    """Standard deviation of the canvases' values."""
    tokens_per_region: float
    """Mean number of tokens that share a value."""
    visible_below: float
    """Time t at which signal and noise are equal."""
    visible_share: float
    """Share of the drawn times at which the data is visible."""

    @property
    def warning(self) -> str | None:
        """What is wrong with this level's scale or times, and what to do; None if nothing is."""
        what = (
            f"level {self.level}: at {self.visible_share:.1%} of the drawn times its data (standard deviation "
            f"{self.std:.2g}, noise has 1) is visible"
        )
        if self.visible_share < LEAST_VISIBLE:
            return f"{what}; it can hardly be learned: use normalise=channel or a smaller method.time_shift"
        if self.visible_share > 1 - LEAST_HIDDEN:
            return f"{what}; the start from noise can hardly be learned: use a larger method.time_shift"
        return None


def visibility(features: Tensor, regions: Tensor, config: MethodConfig) -> list[Visibility]:
    """Measure every level of a few samples, coarse to fine.

    features: float32 [b, H, W, C] in the network's units. regions: integer [b, L−1, H, W], dense from 0.
    """
    canvases = level_canvases(features, regions)
    times, _ = draw_times(DRAWS, config, torch.Generator().manual_seed(0))
    num_tokens = regions[0, 0].numel()
    counts = (regions.flatten(2).amax(dim=2).float() + 1).mean(dim=0).tolist()
    found = []
    for level, count in enumerate([*counts, float(num_tokens)]):
        canvas = canvases[:, level]
        std = float((canvas - canvas.mean(dim=(0, 1, 2))).square().mean().sqrt())
        amplitude = std * (num_tokens / count) ** 0.5
        limit = amplitude / (1 + amplitude)
        share = float((times <= limit).float().mean())
        found.append(Visibility(level, std, num_tokens / count, limit, share))
    return found


def visibility_lines(features: Tensor, regions: Tensor, config: MethodConfig) -> Iterator[str]:
    """The measures of every level as a table, a sentence on what it shows, and warnings; see `visibility`."""
    levels = visibility(features, regions, config)
    yield (
        "for each level: spread of the data (std), and the time t above which noise hides it (t = 1 is pure noise); "
        "the last column is the share of training times below that"
    )
    yield f"{'level':>7}{'std':>8}{'tokens/region':>15}{'visible below t':>17}{'share of times':>16}"
    for each in levels:
        yield (
            f"{each.level:>7}{each.std:>8.3f}{each.tokens_per_region:>15.1f}{each.visible_below:>17.2f}"
            f"{each.visible_share:>16.1%}"
        )
    yield from (f"warning: {each.warning}" for each in levels if each.warning)
