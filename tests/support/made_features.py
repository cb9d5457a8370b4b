"""Features made by a rule, and partitions to compare."""

from __future__ import annotations

import numpy as np


def smooth_features(num_images: int, height: int, width: int, num_channels: int, noise: float, seed: int = 0):
    """Random fields that vary over about a third of the image, plus white noise, around a common direction."""
    random = np.random.default_rng(seed)
    coarse = random.normal(size=(num_images, 4, 4, num_channels))
    y, x = np.linspace(0, 3, height), np.linspace(0, 3, width)
    weight_y = np.maximum(0, 1 - np.abs(y[:, None] - np.arange(4)))
    weight_x = np.maximum(0, 1 - np.abs(x[:, None] - np.arange(4)))
    field = np.einsum("yi,xj,nijc->nyxc", weight_y, weight_x, coarse)
    field += 0.5 * random.normal(size=num_channels) + noise * random.normal(size=field.shape)
    return field.astype(np.float16)


def partition(regions: np.ndarray) -> np.ndarray:
    """Ids replaced by the position of their first token: equal arrays mean equal partitions."""
    flat = regions.reshape(-1, regions.shape[-2] * regions.shape[-1])
    canonical = np.empty(flat.shape, dtype=np.int64)
    for row, ids in enumerate(flat):
        _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
        canonical[row] = first[inverse]
    return canonical.reshape(regions.shape)
