"""Do samples look like their class? Accuracy of the nearest class mean, between that of real images and chance.

B images, H×W grid, C channels, F numbers that describe an image, K classes
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

POOLED_GRID = 4
"""Rows and columns of the grid of means that describes an image. On 1,858 Caltech photos in 20 classes, with `dct`
features, held-out accuracy is 0.24 with one mean over the image, 0.36 with 4×4, 0.41 with all 16×16 tokens."""
FAR = 1e6
"""Coordinates of the mean of a class without images, so that it is never the nearest."""


def describe(features: Tensor) -> Tensor:
    """Means of tokens over a 4×4 grid of cells: [B, H, W, C] → float32 [B, 16·C]."""
    return F.adaptive_avg_pool2d(features.float().permute(0, 3, 1, 2), POOLED_GRID).flatten(1)


def class_mean_accuracy(
    samples: tuple[Tensor, Tensor], real: tuple[Tensor, Tensor], num_classes: int
) -> Iterator[tuple[str, float]]:
    """Accuracy of samples, of real images held out from the class means, and of guessing a class that has real images.

    Both pairs are (descriptions [N, F], labels int64 [N]); every second real image is held out. The nearest class mean
    is that of a class with real images.
    """
    descriptions, labels = real
    kept, held_out = (descriptions[::2], labels[::2]), (descriptions[1::2], labels[1::2])
    count = torch.bincount(kept[1], minlength=num_classes)[:, None]
    total = torch.zeros(num_classes, descriptions.shape[1]).index_add_(0, kept[1], kept[0])
    means = torch.where(count > 0, total / count.clamp(min=1), FAR)
    for suffix, (shown, own) in (("", samples), ("_real", held_out)):
        nearest = torch.cdist(shown, means).argmin(dim=1)
        yield f"class_mean_accuracy{suffix}", float((nearest == own).float().mean())
    yield "class_mean_chance", 1.0 / len(labels.unique())
