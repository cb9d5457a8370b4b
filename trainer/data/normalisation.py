"""Normalise features by the statistics of the training shards, and undo it.

    H×W grid of tokens, C channels

Tokens are normalised before region means are taken, so that canvases are means of normalised tokens. A shift and
scale per channel commutes with means, so `undo` returns raw region means. A shift and scale per position does not: a
canvas of constant regions comes back as the region's mean deviation, on top of each position's own mean and spread.

A run stores its own mean and spread, and all features outside the network are raw: `Batch.targets` normalises what
enters it, and `sample_levels` undoes this for what leaves it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hierarchy_builder.canvases import level_canvases
from hierarchy_builder.errors import MismatchError
from hierarchy_builder.fields import brief
from trainer.data.shards import STATISTICS, ShardIndex, read_statistics

Normalisation = Literal["none", "channel", "position"]
"""By which statistics of the shards features are centred and scaled."""

UNIT_SCALE = (0.5, 2.0)
"""Standard deviations of features that count as about 1, that of the noise. Tokens after a layer norm lie between, such
as those of DINOv2; `dct` features, at about 0.14, do not."""
ARRAYS = {"channel": ("channel_mean", "channel_variance"), "position": ("mean", "variance")}
"""Names of the mean and the population variance in statistics.npz that each kind uses."""
LARGEST_RATIO = 4.0
"""If normalised features are larger or smaller than 1 by more than this factor, the statistics are refused."""
FLOOR = 1e-3
"""Lower limit of the standard deviation, relative to its root mean square over all channels (and positions). Smaller
variation is rounding error, which must not be scaled up to unit spread."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Normaliser:
    """(x − mean)/std and its inverse; the default is the identity.

    mean, std: float32 [], [C] or [H, W, C], std above 0.
    """

    __repr__ = brief

    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    std: Tensor = field(default_factory=lambda: torch.ones(()))

    @classmethod
    def of(cls, mean: np.ndarray, variance: np.ndarray) -> Normaliser:
        """From the mean and the population variance of the features, float64 [C] or [H, W, C]."""
        std = np.maximum(np.sqrt(variance), FLOOR * np.sqrt(variance.mean()))
        std[std == 0] = 1.0  # all values are equal
        return cls(mean=torch.from_numpy(mean).float(), std=torch.from_numpy(std).float())

    def apply(self, features: Tensor) -> Tensor:
        """Normalise raw features or canvases [..., H, W, C]."""
        return (features - self.mean) / self.std

    def undo(self, canvases: Tensor) -> Tensor:
        """Convert the network's output [..., H, W, C] to units of the raw features."""
        return canvases * self.std + self.mean

    def teacher_canvases(self, features: Tensor, regions: Tensor) -> Tensor:
        """The canvases that a network is trained to draw, in units of the raw features.

        features: float32 [N, H, W, C], raw. regions: integer [N, L−1, H, W]. Returns [N, L, H, W, C].
        """
        return self.undo(level_canvases(self.apply(features), regions))

    def to(self, device: torch.device | str) -> Normaliser:
        """The same on `device`."""
        return Normaliser(mean=self.mean.to(device), std=self.std.to(device))


RAW = Normaliser()
"""The normaliser that changes nothing."""


def check_describes(normaliser: Normaliser, features: Tensor, index: ShardIndex) -> None:
    """Refuse statistics that do not describe the shards, for example because another encoder wrote them.

    features: float [b, H, W, C], raw, a few of the shards. Raises MismatchError if their root mean square, normalised,
    is far from 1.
    """
    found = float(normaliser.apply(features.float()).square().mean().sqrt())
    if not 1 / LARGEST_RATIO < found < LARGEST_RATIO:
        raise MismatchError(
            f"{index.url}/{STATISTICS} does not describe these features: normalised by it, their root mean square is "
            f"{found:.3g}, expected about 1; run `hierarchy-builder shard DIR` again"
        )


def chosen_normalisation(index: ShardIndex) -> Normalisation:
    """Choose the units of features from the shards' statistics: `none` if their scale is about 1, else `channel`.

    The scale is the root of the mean over channels of the variance within a channel. See `read_statistics` for errors.
    """
    _, variance = read_statistics(index, ARRAYS["channel"])
    low, high = UNIT_SCALE
    return "none" if low <= float(np.sqrt(variance.mean())) <= high else "channel"


def normaliser_of(kind: Normalisation | Literal["auto"], index: ShardIndex) -> Normaliser:
    """The normaliser of a configuration, from the statistics of the shards; see `read_statistics` for errors."""
    assert kind != "auto", "with_model chooses it"
    return RAW if kind == "none" else Normaliser.of(*read_statistics(index, ARRAYS[kind]))
