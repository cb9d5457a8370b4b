"""Recipe → nested region ids of every image, the merge tree behind them, and the nesting check.

One Gram matrix per image serves both the split into object and background and the linkage of the
tokens of each side.

    N images, L levels (coarse → fine), H×W grid, T = H·W tokens, C channels
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntFlag

import numpy as np
import torch

from hierarchy_builder.config import HierarchyRecipe
from hierarchy_builder.errors import BuilderError
from hierarchy_builder.hierarchy.linkage import average_linkage, cut_merges
from hierarchy_builder.hierarchy.normalized_cut import normalized_cut
from hierarchy_builder.hierarchy.similarity import similarities, single_threaded_blas, spread
from hierarchy_builder.hierarchy.two_means import inertia, two_means
from hierarchy_builder.records import MAX_REGIONS, REGION_DTYPE

GRAM_BYTES = 4 * 2**20
"""Memory of the Gram matrices a thread works on at once: 8 images of a 16×16 grid."""
NUM_STARTS = 8
"""Draws of `start: several`; 40 found a lower inertia for one image in ten, by 0.01 % on average."""
TIE = 1e-12
NO_MASK_LABEL = -1
"""In label maps: this image has none."""


class Flag(IntFlag):
    """What is unusual about an image's hierarchy: bits of `Hierarchy.flags`."""

    DEGENERATE = 1
    """Tokens hardly differ: the whole image is the object, and one region on every level where the recipe has a
    min_spread; without, its parts follow from positions alone."""
    NONFINITE = 2
    """Features hold NaN or infinity: one region on every level."""
    NO_MASK = 4
    """The recipe asks for label maps, and this image has none that can be used: its `start` decided."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Hierarchy:
    """Nested regions of N images and the trees they were cut from.

    regions: uint8 [N, L−1, H, W], coarse → fine; level 0 is object (1) and background (0); ids are dense,
    background 0, object regions from 1 in order of first token (row-major), then, where the background is
    divided, its regions after the first.
    merges: float32 [N, H·W−1, 3], rows (left, right, height) over the object tokens in rising order of
    height, not normalised, then over the background tokens where it is divided; ids as in scipy's linkage
    (leaf i is the i-th token of its side); unused rows −1.
    flags: uint8 [N], bits of `Flag`.
    scores: float32 [N, 2], mean squared distance of the L2-normalised tokens to their mean, and the share of
    it that level 0 explains (both 0 where features are not finite).
    """

    regions: np.ndarray
    merges: np.ndarray
    flags: np.ndarray
    scores: np.ndarray


def build_hierarchy(
    features: np.ndarray | torch.Tensor,
    recipe: HierarchyRecipe = HierarchyRecipe.paper(),
    masks: np.ndarray | None = None,
    *,
    threads: int | None = None,
) -> Hierarchy:
    """Divide every image into object and background, and these into ever finer regions.

    features: float16 or float32 [N, H, W, C], encoder tokens as stored (any grid; a tensor may be on a GPU).
    masks: integer [N, H, W] for recipes with masks: labels of tokens, 0 background, −1 throughout where an
    image has none. threads: images worked on at once, all CPUs if None; results do not depend on it.
    Returns regions [N, L−1, H, W] with L − 1 = 1 + number of cuts, merges, flags and scores, as numpy arrays.
    Raises BuilderError for another shape, and where a cut leaves more than 255 regions. Images whose features
    are not finite are flagged.
    Source: Trajectory Forcing (arXiv 2606.22527) as released: 2-means on L2-normalised tokens, the cluster
    nearer to the image centre is the object; average linkage on cosine distance + spatial_weight ·
    distance on the unit square; cuts at relative heights. `HierarchyRecipe` says where it may differ.
    """
    if features.ndim != 4 or 0 in features.shape[1:]:
        raise BuilderError(f"features have shape {tuple(features.shape)}, expected [N, H, W, C]")
    num_images, height, width, _ = features.shape
    given = _given_labels(masks, (num_images, height, width), recipe)
    mask = np.empty((num_images, height * width), dtype=np.uint8)
    merges = np.full((num_images, height * width - 1, 3), -1, dtype=np.float32)
    flags = np.zeros(num_images, dtype=np.uint8)
    scores = np.zeros((num_images, 2), dtype=np.float32)

    def divide(rows: slice) -> None:
        drawn = None if given is None else given[rows]
        _divide(
            features[rows],
            recipe,
            drawn,
            mask=mask[rows],
            merges=merges[rows],
            flags=flags[rows],
            scores=scores[rows],
        )

    step = max(1, GRAM_BYTES // (8 * (height * width) ** 2))
    groups = [slice(start, start + step) for start in range(0, num_images, step)]
    with single_threaded_blas(), ThreadPoolExecutor(threads or num_cpus()) as pool:
        list(pool.map(divide, groups))
    regions = cut_levels(
        mask.reshape(num_images, height, width), merges, recipe.cuts, given_levels(flags, recipe)
    )
    return Hierarchy(regions=regions, merges=merges, flags=flags, scores=scores)


def num_cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def _divide(
    features: np.ndarray | torch.Tensor,
    recipe: HierarchyRecipe,
    drawn: np.ndarray | None,
    *,
    mask: np.ndarray,
    merges: np.ndarray,
    flags: np.ndarray,
    scores: np.ndarray,
) -> None:
    """Fill in objects, trees, flags and scores of a few images, one after another on one thread."""
    _, height, width, num_channels = features.shape
    gram = similarities(features)
    contrast = spread(gram)
    finite = np.isfinite(contrast)
    gram[~finite] = 1.0
    labels = _halves(gram, recipe, num_channels)
    alike = ~labels.any(axis=1)
    gram[alike] = gram[alike, :1, :1]  # rounding must not decide between equal distances
    undivided = ~finite | ((contrast <= recipe.min_spread) & (recipe.min_spread > 0))
    labels[undivided] = 0
    flags[:] = np.where(finite, Flag.DEGENERATE * (alike | undivided), Flag.NONFINITE)
    mask[:] = _object_mask(labels, height, width, recipe)
    if drawn is not None:
        usable = drawn.any(axis=1) & (drawn != NO_MASK_LABEL).all(axis=1)
        flags |= np.where(usable, 0, Flag.NO_MASK).astype(np.uint8)
        mask[:] = np.where((usable & ~undivided)[:, None], drawn > 0, mask)
    average_linkage(
        gram,
        mask,
        recipe.spatial_weight * _token_distances(height, width),
        out=merges,
        divide_background=recipe.divide_background,
        connected_width=width if recipe.connected else None,
        given=drawn if recipe.masks_level else None,
    )
    merges[undivided] = -1
    scores[finite, 0] = contrast[finite]
    scores[finite, 1] = _explained(gram[finite], mask[finite], contrast[finite])


def given_levels(flags: np.ndarray, recipe: HierarchyRecipe) -> np.ndarray:
    """Level (from 1) each image has from a label map, int64 [N]; 0 where the tree decides about all of them."""
    own = (flags & (Flag.NO_MASK | Flag.NONFINITE)) == 0
    return np.where(own, recipe.masks_level if recipe.masks is not None else 0, 0).astype(np.int64)


def cut_levels(
    object_mask: np.ndarray,
    merges: np.ndarray,
    cuts: Sequence[float],
    given_level: int | np.ndarray = 0,
) -> np.ndarray:
    """Levels of stored trees at other cuts, without the features.

    object_mask: [N, H, W], nonzero on the object (`regions[:, 0]`). merges: float32 [N, H·W−1, 3].
    cuts: relative heights, falling (coarse → fine). given_level: of `given_levels`, one for all images or one
    of each.
    Returns uint8 [N, 1 + len(cuts), H, W], what `build_hierarchy` gives with these cuts.
    Raises BuilderError if the trees are not of these objects, or a cut leaves more than 255 regions.
    """
    num_images, height, width = object_mask.shape
    mask = (object_mask != 0).reshape(num_images, height * width)
    _require_trees_of(mask, merges)
    levels = cut_merges(mask, merges, tuple(cuts), given_level)
    for level, cut in enumerate(cuts):
        _require_few_regions(levels[:, level], cut)
    regions = np.concatenate([mask[:, None], levels], axis=1).astype(REGION_DTYPE)
    return regions.reshape(num_images, 1 + len(cuts), height, width)


def check_nesting(regions: np.ndarray) -> np.ndarray:
    """Count what breaks the rules of region ids, per image; 0 everywhere for a sound hierarchy.

    regions: uint8 [N, L−1, H, W]. Returns int64 [N]: ids missing from 0 or 1 up to the largest of their
    level, plus tokens of id 0 that are object on level 0, plus tokens whose region has another parent than
    the region's last token.
    """
    num_images, num_levels, height, width = regions.shape
    ids = regions.reshape(num_images, num_levels, height * width).astype(np.int64)
    image = np.arange(num_images)[:, None]
    violations = np.zeros(num_images, dtype=np.int64)
    for level in range(num_levels):
        present = np.zeros((num_images, MAX_REGIONS), dtype=bool)
        present[image, ids[:, level]] = True
        violations += ids[:, level].max(axis=1) - present[:, 1:].sum(axis=1)
        violations += ((ids[:, level] == 0) & (ids[:, 0] != 0)).sum(axis=1)
        if level > 0:
            parent = np.zeros((num_images, MAX_REGIONS), dtype=np.int64)
            parent[image, ids[:, level]] = ids[:, level - 1]
            violations += (parent[image, ids[:, level]] != ids[:, level - 1]).sum(axis=1)
    return violations


@functools.lru_cache(maxsize=8)
def _token_distances(height: int, width: int) -> np.ndarray:
    """Distances of all pairs of tokens on the unit square, float64 [T, T]."""
    where = _coordinates(height, width)
    return np.linalg.norm(where[:, None] - where[None], axis=-1)


def _coordinates(height: int, width: int) -> np.ndarray:
    """Token positions (y, x) on the unit square, float64 [T, 2]."""
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    return np.stack([y, x], axis=-1).reshape(-1, 2)


def _halves(gram: np.ndarray, recipe: HierarchyRecipe, num_channels: int) -> np.ndarray:
    """Labels 0 and 1 of each image's tokens, uint8 [n, T]; all 0 where they are all alike."""
    if recipe.start == "cut":
        return normalized_cut(gram)
    return two_means(gram, recipe.seed, num_channels, NUM_STARTS if recipe.start == "several" else 1)


def _given_labels(
    masks: np.ndarray | None, shape: tuple[int, int, int], recipe: HierarchyRecipe
) -> np.ndarray | None:
    """Label maps as int [N, T], or None where the recipe knows of none."""
    if masks is None and recipe.masks is None:
        return None
    if masks is None or recipe.masks is None:
        raise BuilderError(
            f"the recipe's masks are {recipe.masks!r}, but label maps were {'not ' * (masks is None)}passed: "
            "pass both or neither"
        )
    if masks.shape != shape:
        raise BuilderError(f"masks have shape {masks.shape}, expected [N, H, W] = {shape} of the features")
    return masks.reshape(shape[0], -1)


def _explained(gram: np.ndarray, mask: np.ndarray, contrast: np.ndarray) -> np.ndarray:
    """Share of the spread that object and background explain, [n]; 0 where there is none."""
    total = contrast * mask.shape[1]
    return np.clip(np.where(total > 0, 1 - inertia(gram, mask) / np.where(total > 0, total, 1), 0), 0, 1)


def _object_mask(labels: np.ndarray, height: int, width: int, recipe: HierarchyRecipe) -> np.ndarray:
    """The cluster the recipe takes for the object; cluster 1 on a tie, and never an empty one."""
    if recipe.object_choice == "border":
        inner = np.zeros((height, width))
        inner[1:-1, 1:-1] = 1
        away = 1 - inner.ravel()
    else:
        away = np.linalg.norm(_coordinates(height, width) - 0.5, axis=1)
    ones = labels.sum(axis=1, dtype=np.int64)
    zeros = labels.shape[1] - ones
    mean_of_ones = (labels @ away) / np.maximum(ones, 1)
    mean_of_zeros = ((1 - labels) @ away) / np.maximum(zeros, 1)
    zero_is_object = (ones == 0) | (mean_of_zeros < mean_of_ones - TIE)
    return np.where(zero_is_object[:, None], labels == 0, labels == 1)


def _require_trees_of(mask: np.ndarray, merges: np.ndarray) -> None:
    num_images, num_tokens = mask.shape
    if merges.shape != (num_images, num_tokens - 1, 3):
        raise BuilderError(
            f"merges have shape {merges.shape}, expected {(num_images, num_tokens - 1, 3)} for this grid"
        )
    rows = (merges[:, :, 0] >= 0).sum(axis=1)
    object_rows = np.maximum(mask.sum(axis=1) - 1, 0)
    all_rows = object_rows + np.maximum((~mask).sum(axis=1) - 1, 0)
    wrong = np.flatnonzero((rows != object_rows) & (rows != all_rows) & (rows != 0))
    if wrong.size:
        raise BuilderError(
            f"merges of image rows {_listed(wrong)} do not belong to these objects: a tree of m tokens has "
            "m − 1 rows; pass regions and merges of the same build"
        )


def _require_few_regions(level: np.ndarray, cut: float) -> None:
    most = level.max(axis=1, initial=0)
    wrong = np.flatnonzero(most >= MAX_REGIONS)
    if wrong.size:
        raise BuilderError(
            f"cut {cut} leaves {most[wrong[0]]} object regions in image row {wrong[0]} ({wrong.size} such "
            f"images), uint8 ids hold {MAX_REGIONS - 1}: raise this cut, or use a smaller grid"
        )


def _listed(rows: np.ndarray) -> str:
    shown = ", ".join(str(row) for row in rows[:16])
    return shown if rows.size <= 16 else f"{shown} and {rows.size - 16} more"
