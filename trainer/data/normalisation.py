"""Raw features ↔ what the network sees: shifted and scaled by the statistics of the training shards.

    H×W grid of tokens, C channels

Tokens are normalised before region means are taken, so that canvases stay the means of what the network sees. A
shift and scale per channel commutes with means: canvases come back as raw region means. One per position does not:
a canvas of constant regions comes back as each region's mean deviation on every position's own mean and spread.

A run carries its own mean and spread, and everything outside the network is raw: batches enter through `apply` in
`Batch.targets`, samples leave through `undo` in `sample_levels`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hierarchy_builder.canvases import level_canvases
from trainer.data.shards import ShardIndex, read_statistics

Normalisation = Literal["none", "channel", "position"]
"""By which statistics of the shards features are centred and scaled."""

ARRAYS = {"channel": ("channel_mean", "channel_variance"), "position": ("mean", "variance")}
"""The mean and the population variance in statistics.npz that each kind takes."""
FLOOR = 1e-3
"""Smallest standard deviation divided by, as a share of the root mean square over all channels (and positions): what
varies less is rounding, and stays small instead of growing to unit spread."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Normaliser:
    """(x − mean)/std and its inverse; the default changes nothing.

    mean, std: float32 [], [C] or [H, W, C], std above 0.
    """

    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    std: Tensor = field(default_factory=lambda: torch.ones(()))

    @classmethod
    def of(cls, mean: np.ndarray, variance: np.ndarray) -> Normaliser:
        """From the mean and the population variance of the features, float64 [C] or [H, W, C]."""
        std = np.maximum(np.sqrt(variance), FLOOR * np.sqrt(variance.mean()))
        std[std == 0] = 1.0  # nothing varies at all
        return cls(mean=torch.from_numpy(mean).float(), std=torch.from_numpy(std).float())

    def apply(self, features: Tensor) -> Tensor:
        """Raw features or canvases [..., H, W, C] as the network sees them."""
        return (features - self.mean) / self.std

    def undo(self, canvases: Tensor) -> Tensor:
        """What the network made, [..., H, W, C], in units of the raw features."""
        return canvases * self.std + self.mean

    def teacher_canvases(self, features: Tensor, regions: Tensor) -> Tensor:
        """What a perfect sample would be: the canvases a network is taught, in units of the raw features.

        features: float32 [N, H, W, C], raw. regions: integer [N, L−1, H, W]. Returns [N, L, H, W, C].
        """
        return self.undo(level_canvases(self.apply(features), regions))

    def to(self, device: torch.device | str) -> Normaliser:
        """The same on `device`."""
        return Normaliser(mean=self.mean.to(device), std=self.std.to(device))


RAW = Normaliser()
"""Leaves features as they are."""


def normaliser_of(kind: Normalisation, index: ShardIndex) -> Normaliser:
    """The normaliser of a configuration, by the statistics beside the shards; see `read_statistics` for errors."""
    return RAW if kind == "none" else Normaliser.of(*read_statistics(index, ARRAYS[kind]))
