"""How much the images of one class differ from each other, level by level: the variance within classes.

    L levels (coarse → fine), H×W grid, C channels

A network that draws the mean of each class has perfect colours and layouts on average, and images that are all alike.
Their variance within a class is then far below that of real images, which no distance of means shows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hierarchy_builder.records import spread_evenly
from trainer.data.normalisation import FLOOR

MEMORY_BYTES = 2**29
"""Limit of the memory for the mean canvases of one set of images."""
FEWEST_IMAGES = 2
"""Smallest number of images with a variance."""


def measured_classes(labels: Iterable[int], numbers_per_image: int) -> list[int]:
    """The labels whose mean canvases fit into MEMORY_BYTES, spread evenly over all of them, in order.

    numbers_per_image: L·H·W·C. At 4 levels of 16×16 tokens of 768 channels this is 170 classes.
    """
    known = sorted(set(labels))
    return [known[i] for i in spread_evenly(len(known), max(1, MEMORY_BYTES // (4 * numbers_per_image)))]


@dataclass(slots=True)
class _Running:
    """Mean canvas float32 [L, H, W, C] and its mean squared distance × count, float64 [L, C], image by image."""

    count: int
    mean: Tensor
    squares: Tensor

    def add(self, canvases: Tensor) -> None:
        """Take in one image. Source: Welford (1962), the update of a variance without a second pass."""
        self.count += 1
        before = canvases - self.mean
        self.mean += before / self.count
        self.squares += (before * (canvases - self.mean)).double().mean(dim=(1, 2))


class WithinClasses:
    """The variance within each of some classes, updated image by image; images of other classes are passed over."""

    def __init__(self, classes: Collection[int]) -> None:
        self._classes = frozenset(classes)
        self._running: dict[int, _Running] = {}

    def add(self, canvases: Tensor, labels: Sequence[int]) -> None:
        """Add the canvases of n images, float [n, L, H, W, C]."""
        for image, label in zip(canvases.float(), labels, strict=True):
            if label not in self._classes:
                continue
            if label not in self._running:
                squares = torch.zeros(len(image), image.shape[-1], dtype=torch.float64)
                self._running[label] = _Running(0, torch.zeros_like(image), squares)
            self._running[label].add(image)

    def count(self, label: int) -> int:
        """Number of images of a class."""
        return self._running[label].count if label in self._running else 0

    def variance(self, label: int) -> Tensor:
        """Unbiased variance over the images of a class, mean over positions, float64 [L, C]."""
        found = self._running[label]
        return found.squares / (found.count - 1)

    @property
    def measurable(self) -> set[int]:
        """The classes with enough images for a variance."""
        return {label for label, found in self._running.items() if found.count >= FEWEST_IMAGES}


def variety(samples: WithinClasses, real: WithinClasses, unit: Tensor) -> list[float]:
    """Variance within classes of samples divided by that of real images, for each level; [] if no class has both.

    unit: float64 [C], the variance that makes channels comparable, such as that of the tokens of real images: without
    it a few channels of large numbers decide alone. The ratio is
    Σ_c n_c·v_c / Σ_c n_c·v′_c, where v_c and v′_c are the variances of samples and of real images of class c, divided
    by `unit` and averaged over positions and channels, and n_c is its number of real images. So both sides have the
    same mix of classes. A class needs two images on both sides. NaN on a level where real images of a class are equal.
    """
    shared = sorted(samples.measurable & real.measurable)
    if not shared:
        return []
    floor = FLOOR**2 * unit.mean()
    sides = [
        sum(real.count(c) * (side.variance(c) / unit.clamp(min=floor)).mean(dim=1) for c in shared)
        for side in (samples, real)
    ]
    pairs = zip(*(side.tolist() for side in sides), strict=True)  # type: ignore[union-attr]
    return [mine / other if other > 0 else math.nan for mine, other in pairs]
