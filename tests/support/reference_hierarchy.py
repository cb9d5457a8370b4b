"""The published recipe, written plainly with scikit-learn and scipy: slow, one image at a time.

Independent of hierarchy_builder on purpose; tests compare with it and benchmarks time it.
"""

from __future__ import annotations

import warnings

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.cluster import KMeans


def reference_regions(features: np.ndarray, cuts: tuple[float, ...] = (0.65, 0.35)) -> np.ndarray:
    """Regions int64 [1 + len(cuts), H, W] of one image's features [H, W, C]; object ids as fcluster numbers them."""
    height, width, num_channels = features.shape
    tokens = features.reshape(-1, num_channels).astype(np.float32)
    tokens = tokens / (np.linalg.norm(tokens, axis=1, keepdims=True) + 1e-8)
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    coordinates = np.stack([x.ravel(), y.ravel()], axis=1)
    mask = _object_mask(tokens, coordinates)
    levels = [mask.astype(np.int64)] + [np.zeros(mask.size, dtype=np.int64) for _ in cuts]
    for level, ids in zip(levels[1:], _parts(tokens[mask], coordinates[mask], cuts), strict=True):
        level[mask] = ids
    return np.stack(levels).reshape(-1, height, width)


def _object_mask(tokens: np.ndarray, coordinates: np.ndarray) -> np.ndarray:
    columns = np.concatenate([tokens, 0.0 * coordinates], axis=1).astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one distinct token: ConvergenceWarning
        labels = KMeans(n_clusters=2, n_init=1, random_state=0).fit_predict(columns)
    from_centre = np.linalg.norm(coordinates - 0.5, axis=1)
    means = [from_centre[labels == k].mean() if (labels == k).any() else np.inf for k in (0, 1)]
    # Halves of a symmetric image tie up to rounding; on a tie cluster 1 is the object.
    return labels == (0 if means[0] < means[1] - 1e-12 else 1)


def _parts(tokens: np.ndarray, coordinates: np.ndarray, cuts: tuple[float, ...]) -> list[np.ndarray]:
    if len(tokens) < 2:
        return [np.ones(len(tokens), dtype=np.int64) for _ in cuts]
    apart = np.linalg.norm(coordinates[:, None] - coordinates[None], axis=-1)
    distance = (1.0 - tokens @ tokens.T) + 0.2 * apart
    np.fill_diagonal(distance, 0.0)
    tree = linkage(squareform(distance, checks=False), method="average")
    heights = tree[:, 2]
    tree[:, 2] = (heights - heights.min()) / (heights.max() - heights.min() + 1e-8)
    return [fcluster(tree, cut, criterion="distance") for cut in cuts]


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
