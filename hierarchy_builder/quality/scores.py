"""Scores of region hierarchies as functions of arrays: shape and similarity, stability, agreement with people.

    N images, L levels (coarse → fine), H×W grid, T = H·W tokens, C channels, K regions of one image and level

Regions are a partition of the tokens: the background counts like any other region. A score is one number per image
and level, float64 [N, L−1], NaN where it is not defined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from hierarchy_builder.canvases import region_means
from hierarchy_builder.hierarchy.agreement import (
    CELLS_PER_TOKEN,
    adjusted_rand,
    boundary_f,
    covering,
    object_iou,
)
from hierarchy_builder.hierarchy.recipe import Flag

NORM_EPSILON = 1e-8


def by_level(scores: Mapping[str, np.ndarray]) -> list[dict[str, float | None]]:
    """Return the mean of every score over the images that have it, one mapping per level; None if no image has."""
    levels = zip(*(values.T for values in scores.values()), strict=True)
    return [dict(zip(scores, map(mean_of, level), strict=True)) for level in levels]


def mean_of(values: np.ndarray) -> float | None:
    """Return the mean of the values that are defined, to 6 digits; None if there are none."""
    finite = values[np.isfinite(values)]
    return round(float(finite.mean()), 6) if len(finite) else None


def join(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Concatenate the images of `parts`, which have the same scores and levels."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def flag_names(value: int) -> list[str]:
    """Return the names of the flags that are set in `Hierarchy.flags` of one image, in lower case."""
    return [str(flag.name).lower() for flag in Flag(value)]


def flag_shares(flags: np.ndarray) -> dict[str, float]:
    """Return the share of images with each flag. flags: uint8 [N], N ≥ 1."""
    return {str(flag.name).lower(): float(((flags & flag.value) != 0).mean()) for flag in Flag}


def count_regions(regions: np.ndarray) -> np.ndarray:
    """Count the different ids of every image and level: int64 [N, L−1]. regions: integer [N, L−1, H, W]."""
    ids = np.sort(regions.reshape(*regions.shape[:2], -1), axis=2)
    return 1 + (np.diff(ids, axis=2) != 0).sum(axis=2)


def region_scores(features: np.ndarray, regions: np.ndarray) -> dict[str, np.ndarray]:
    """Describe the regions of every image and level by seven scores.

    features: float [N, H, W, C]. regions: integer [N, L−1, H, W], ids from 0.
    The scores are regions: their number; smallest, median, largest: tokens of a region; connected: share of regions
    that are one piece (4-connected); within: mean cosine between a token and the mean token of its region; between:
    mean cosine between the mean tokens of two regions, NaN if there is only one. Tokens are L2-normalised first.
    """
    tokens = features.astype(np.float32)
    tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True) + NORM_EPSILON
    levels = [_level_scores(tokens, regions[:, level]) for level in range(regions.shape[1])]
    scores = {name: np.stack([level[name] for level in levels], axis=1) for name in levels[0]}
    return scores | {"connected": _count_connected(regions) / scores["regions"]}


def stability(regions: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the adjusted Rand index of every level: float64 [N, L−1]. regions, others: integer [N, L−1, H, W]."""
    levels = range(regions.shape[1])
    return np.stack([adjusted_rand(regions[:, level], others[:, level]) for level in levels], axis=1)


def human_scores(regions: np.ndarray, humans: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Compare with label maps that people drew: covering, boundary precision, recall and F; object IoU of level 0.

    regions: integer [N, L−1, H, W]. humans: N integer arrays [M, h, w] on the cells of `cells_of`.
    `hierarchy.agreement` defines the scores; a mean over images is the mean of the scores of single images.
    """
    cells = regions.repeat(CELLS_PER_TOKEN, axis=2).repeat(CELLS_PER_TOKEN, axis=3)
    levels = [(covering(level, humans), *boundary_f(level, humans)) for level in cells.swapaxes(0, 1)]
    names = ("covering", "precision", "recall", "boundary_f")
    scores = {
        name: np.stack(values, axis=1) for name, values in zip(names, zip(*levels, strict=True), strict=True)
    }
    iou = np.full(regions.shape[:2], np.nan)
    iou[:, 0] = object_iou(cells[:, 0] != 0, humans)
    return {"object_iou": iou, **scores}


def cells_of(grid: Sequence[int]) -> tuple[int, int]:
    """Return the grid of cells (h, w) on which label maps are compared with regions of tokens (H, W)."""
    return grid[0] * CELLS_PER_TOKEN, grid[1] * CELLS_PER_TOKEN


def baselines(
    features: np.ndarray, counts: np.ndarray, humans: Sequence[np.ndarray] | None, seed: int = 0
) -> dict[str, dict[str, np.ndarray]]:
    """Compute the same scores for partitions that do not depend on the image: `grid` and `random`.

    counts: number of regions of every image and level, integer [N, L−1]; a level has at least as many as a coarser one.
    """
    counts, grid = np.maximum.accumulate(counts.astype(np.int64), axis=1), features.shape[1:3]
    found = {"grid": grid_regions(counts, grid), "random": random_regions(counts, grid, seed)}
    return {
        name: region_scores(features, regions) | ({} if humans is None else human_scores(regions, humans))
        for name, regions in found.items()
    }


def grid_regions(counts: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """Divide the grid into `counts` rectangular blocks.

    counts: int [N, L−1], 1 to T, not falling from coarse to fine. The largest block is halved across its longer
    side until there are enough, so 4 and 16 blocks of a square are 2×2 and 4×4, and levels are nested.
    Returns int64 [N, L−1, H, W], ids from 0.
    """
    blocks = [np.arange(np.prod(grid)).reshape(grid)]
    planes = np.zeros((int(counts.max()), blocks[0].size), dtype=np.int64)
    for number in range(1, len(planes)):
        largest = max(range(number), key=lambda n: blocks[n].size)
        height, width = blocks[largest].shape
        blocks[largest], half = np.array_split(blocks[largest], 2, axis=int(width > height))
        blocks.append(half)
        planes[number:, half.ravel()] = number
    return planes[counts - 1].reshape(*counts.shape, *grid)


def random_regions(counts: np.ndarray, grid: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Divide the grid into the Voronoi cells of `counts` random tokens; a coarser level keeps only the first of them.

    counts: int [N, L−1], 1 to T, not falling from coarse to fine. Each cell joins that of the nearest token which the
    coarser level keeps, so levels are nested. Returns int64 [N, L−1, H, W], ids from 0.
    """
    positions = np.indices(grid).reshape(2, -1).T
    random = np.random.default_rng(seed)
    regions = np.empty((*counts.shape, len(positions)), dtype=np.int64)
    for image, wanted in enumerate(counts.tolist()):
        centres = positions[random.permutation(len(positions))]
        cells, points = np.arange(len(positions)), positions
        for level in reversed(range(len(wanted))):
            kept = centres[: wanted[level]]
            nearest = ((points[:, None] - kept[None]) ** 2).sum(axis=-1).argmin(axis=1)
            cells, points = nearest[cells], kept
            regions[image, level] = cells
    return regions.reshape(*counts.shape, *grid)


def _level_scores(tokens: np.ndarray, regions: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the scores of one level. tokens: unit vectors float32 [N, H, W, C]. regions: [N, H, W]."""
    means, counts = region_means(tokens, regions)
    number = (counts > 0).sum(axis=1)
    sizes = np.where(counts > 0, counts, np.nan)
    lengths = np.linalg.norm(means.astype(np.float64), axis=-1)
    directions = means / np.maximum(lengths, NORM_EPSILON)[..., None]
    # The mean cosine of unit vectors to their mean is its length; Σ_{k≠l} d_k·d_l = |Σ d|² − Σ |d|².
    pairs = (directions.sum(axis=1) ** 2).sum(axis=-1) - (directions**2).sum(axis=(1, 2))
    return {
        "regions": number.astype(np.float64),
        "smallest": np.nanmin(sizes, axis=1),
        "median": np.nanmedian(sizes, axis=1),
        "largest": np.nanmax(sizes, axis=1),
        "within": (lengths * counts).sum(axis=1) / counts.sum(axis=1),
        "between": np.where(number > 1, pairs / np.maximum(number * (number - 1), 1), np.nan),
    }


def _count_connected(regions: np.ndarray) -> np.ndarray:
    """Count the regions that are one 4-connected piece: int64 [N, L−1]."""
    planes = regions.reshape(-1, *regions.shape[2:]).astype(np.int64)
    tokens = np.arange(planes.size).reshape(planes.shape)
    down, right = planes[:, 1:] == planes[:, :-1], planes[:, :, 1:] == planes[:, :, :-1]
    edges = (
        np.concatenate([tokens[:, 1:][down], tokens[:, :, 1:][right]]),
        np.concatenate([tokens[:, :-1][down], tokens[:, :, :-1][right]]),
    )
    graph = csr_array((np.ones(len(edges[0]), dtype=bool), edges), shape=(planes.size, planes.size))
    num_pieces, piece = connected_components(graph, directed=False)
    num_ids = int(planes.max()) + 1
    region = planes + np.arange(0, len(planes) * num_ids, num_ids)[:, None, None]
    region_of_piece = np.empty(num_pieces, dtype=np.int64)
    region_of_piece[piece] = region.ravel()
    pieces = np.bincount(region_of_piece, minlength=len(planes) * num_ids)
    return (pieces == 1).reshape(*regions.shape[:2], num_ids).sum(axis=2)
