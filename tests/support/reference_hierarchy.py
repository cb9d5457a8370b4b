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
