"""Builds nested regions and their merge trees from features as a recipe describes, and checks the nesting.

One Gram matrix per image serves both the split into object and background and the linkage of the tokens of each side.

    N images, L levels (coarse → fine), H×W grid, T = H·W tokens, C channels
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntFlag

import numpy as np
import torch

from hierarchy_builder.config import HierarchyRecipe
from hierarchy_builder.errors import BuilderError
from hierarchy_builder.hierarchy.linkage import average_linkage, cut_merges
from hierarchy_builder.hierarchy.normalized_cut import centred_cut, normalized_cut
from hierarchy_builder.hierarchy.similarity import similarities, single_threaded_blas, spread
from hierarchy_builder.hierarchy.two_means import inertia, two_means
from hierarchy_builder.machine.process import num_cpus
from hierarchy_builder.records import MAX_REGIONS, REGION_DTYPE

GRAM_BYTES = 4 * 2**20
"""Memory for the Gram matrices that a thread processes at once, enough for 8 images of a 16×16 grid."""
NUM_STARTS = 8
"""Number of starts with `start: several`; 40 starts lower the inertia of one image in ten, by 0.01 % on average."""
TIE = 1e-12
NO_MASK_LABEL = -1
"""Label of all tokens of an image without a label map."""


class Flag(IntFlag):
    """Bits of `Hierarchy.flags`, which mark images with an unusual hierarchy."""

    DEGENERATE = 1
    """Tokens hardly differ, so the whole image is the object. With a min_spread in the recipe it is one region on every
    level; without, its parts follow from token positions alone."""
    NONFINITE = 2
    """Features contain NaN or infinity, so the image is one region on every level."""
    NO_MASK = 4
    """The recipe uses label maps, but this image has no usable one, so that `start` of the recipe decided."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, repr=False)
class Hierarchy:
    """Nested regions of N images and the trees from which they were cut.

    regions: uint8 [N, L−1, H, W], coarse → fine. Level 0 is object (1) and background (0). Ids are dense: background
    0, object regions from 1 in the order of their first token (row-major), then other regions of a divided background.
    merges: float32 [N, H·W−1, 3], rows (left, right, height) by ascending height (not normalised) for the object, then
    for a divided background; ids as in scipy's linkage (leaf i is the i-th token of its side); unused rows are −1.
    flags: uint8 [N], bits of `Flag`.
    scores: float32 [N, 2], the mean squared distance of the L2-normalised tokens to their mean, and the share of it
    that level 0 explains (both 0 if features are not finite).
    """

    regions: np.ndarray
    merges: np.ndarray
    flags: np.ndarray
    scores: np.ndarray

    def __repr__(self) -> str:
        images, levels, *grid = self.regions.shape
        counts = (
            self.regions.reshape(images, levels, -1).max(axis=2, initial=0).mean(axis=0) + 1 if images else []
        )
        regions = ", ".join(f"{count:.1f}" for count in counts)
        return f"<Hierarchy of {images:,} images, {levels} levels of {grid[0]}×{grid[1]} with {regions} regions each>"


def build_hierarchy(
    features: np.ndarray | torch.Tensor,
    recipe: HierarchyRecipe = HierarchyRecipe.paper(),
    masks: np.ndarray | None = None,
    *,
    threads: int | None = None,
) -> Hierarchy:
    """Divide each image into object and background, and these into finer regions.

    features: float16 or float32 [N, H, W, C], encoder tokens as stored, of any grid; a tensor may be on a GPU.
    masks: integer [N, H, W] for recipes with masks, the label of each token: 0 is background, and all labels of an
    image without a map are −1. threads: number of threads, by default one per CPU; results do not depend on it.
    Returns numpy arrays, with L − 1 = 1 + number of cuts. Images whose features are not finite are flagged.
    Raises BuilderError for another shape, or if a cut leaves more than 255 regions.
    Source: Trajectory Forcing (arXiv 2606.22527) as released: 2-means on L2-normalised tokens, where the cluster nearer
    to the image centre is the object; average linkage on cosine distance + spatial_weight · distance on the unit
    square; cuts at relative heights. `HierarchyRecipe` lists the alternatives.
    """
    if features.ndim != 4 or 0 in features.shape[1:]:
        raise BuilderError(f"features have shape {tuple(features.shape)}, expected [N, H, W, C]")
    num_images, height, width, _ = features.shape
    given = _given_labels(masks, (num_images, height, width), recipe)
    mask = np.empty((num_images, height * width), dtype=np.uint8)
    merges = np.empty((num_images, height * width - 1, 3), dtype=np.float32)
    flags = np.zeros(num_images, dtype=np.uint8)
    scores = np.zeros((num_images, 2), dtype=np.float32)

    def divide(rows: slice) -> None:
        drawn = None if given is None else given[rows]
        _divide(features[rows], recipe, drawn, mask[rows], merges[rows], flags[rows], scores[rows])

    step = max(1, GRAM_BYTES // (8 * (height * width) ** 2))
    groups = [slice(start, start + step) for start in range(0, num_images, step)]
    with single_threaded_blas(), ThreadPoolExecutor(threads or num_cpus()) as pool:
        list(pool.map(divide, groups))
    regions = cut_levels(
        mask.reshape(num_images, height, width), merges, recipe.cuts, given_levels(flags, recipe)
    )
    return Hierarchy(regions=regions, merges=merges, flags=flags, scores=scores)


def _divide(
    features: np.ndarray | torch.Tensor,
    recipe: HierarchyRecipe,
    drawn: np.ndarray | None,
    mask: np.ndarray,
    merges: np.ndarray,
    flags: np.ndarray,
    scores: np.ndarray,
) -> None:
    """Fill in objects, trees, flags and scores of a few images on one thread."""
    _, height, width, num_channels = features.shape
    gram = similarities(features)
    contrast = spread(gram)
    finite = np.isfinite(contrast)
    gram[~finite] = 1.0
    labels = _halves(gram, recipe, num_channels, _from_centre(height, width))
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
    merges[:] = average_linkage(
        gram,
        mask,
        recipe.spatial_weight * _token_distances(height, width),
        divide_background=recipe.divide_background,
        connected_width=width if recipe.connected else None,
        given=drawn if recipe.masks_level else None,
    )
    merges[undivided] = -1
    scores[finite, 0] = contrast[finite]
    scores[finite, 1] = _explained(gram[finite], mask[finite], contrast[finite])


def given_levels(flags: np.ndarray, recipe: HierarchyRecipe) -> np.ndarray:
    """The level (from 1) that each image takes from its label map, int64 [N]; 0 if all levels come from the tree."""
    own = (flags & (Flag.NO_MASK | Flag.NONFINITE)) == 0
    return np.where(own, recipe.masks_level if recipe.masks is not None else 0, 0).astype(np.int64)


def cut_levels(
    object_mask: np.ndarray, merges: np.ndarray, cuts: Sequence[float], given_level: int | np.ndarray = 0
) -> np.ndarray:
    """Cut stored trees at other heights, without the features.

    object_mask: [N, H, W], nonzero on the object (`regions[:, 0]`). merges: float32 [N, H·W−1, 3].
    cuts: as in a recipe, coarse → fine. given_level: as from `given_levels`, or one for all images.
    Returns uint8 [N, 1 + len(cuts), H, W], the regions that `build_hierarchy` returns with these cuts.
    Raises BuilderError if the trees do not belong to these objects, or if a cut leaves more than 255 regions.
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
    """Count violations of the rules of region ids per image; a valid hierarchy has none.

    regions: uint8 [N, L−1, H, W]. Returns int64 [N], the sum of: ids missing between 1 and the largest id of a level;
    tokens with id 0 that belong to the object on level 0; and tokens whose parent region differs from that of the last
    token of their region.
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
    """Distances between all pairs of tokens on the unit square, float64 [T, T]."""
    where = _coordinates(height, width)
    return np.linalg.norm(where[:, None] - where[None], axis=-1)


def _coordinates(height: int, width: int) -> np.ndarray:
    """Token positions (y, x) on the unit square, float64 [T, 2]."""
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    return np.stack([y, x], axis=-1).reshape(-1, 2)


def _from_centre(height: int, width: int) -> np.ndarray:
    """Distance of each token from the image centre on the unit square, float64 [T]."""
    return np.linalg.norm(_coordinates(height, width) - 0.5, axis=1)


def _halves(
    gram: np.ndarray, recipe: HierarchyRecipe, num_channels: int, from_centre: np.ndarray
) -> np.ndarray:
    """Split the tokens of each image in two: labels 0 and 1, uint8 [n, T], all 0 if the tokens are all equal."""
    if recipe.start == "cut":
        return normalized_cut(gram)
    if recipe.start == "centred":
        return centred_cut(gram, from_centre)
    return two_means(gram, recipe.seed, num_channels, NUM_STARTS if recipe.start == "several" else 1)


def _given_labels(
    masks: np.ndarray | None, shape: tuple[int, int, int], recipe: HierarchyRecipe
) -> np.ndarray | None:
    """Label maps as int [N, T], or None if the recipe uses none."""
    if masks is None and recipe.masks is None:
        return None
    if masks is None or recipe.masks is None:
        raise BuilderError(
            f"the recipe's masks are {recipe.masks!r}, but label maps were {'not ' * (masks is None)}passed: "
            "pass both or neither"
        )
    if masks.shape != shape:
        raise BuilderError(f"masks have shape {masks.shape}, expected [N, H, W] = {shape} as the features")
    return masks.reshape(shape[0], -1)


def _explained(gram: np.ndarray, mask: np.ndarray, contrast: np.ndarray) -> np.ndarray:
    """Share of the spread that the split into object and background explains, [n]; 0 if there is no spread."""
    total = contrast * mask.shape[1]
    return np.clip(np.where(total > 0, 1 - inertia(gram, mask) / np.where(total > 0, total, 1), 0), 0, 1)


def _object_mask(labels: np.ndarray, height: int, width: int, recipe: HierarchyRecipe) -> np.ndarray:
    """The cluster that the recipe chooses as the object: cluster 1 on a tie, and never an empty one."""
    if recipe.object_choice == "border":
        inner = np.zeros((height, width))
        inner[1:-1, 1:-1] = 1
        away = 1 - inner.ravel()
    else:
        away = _from_centre(height, width)
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
        shown = ", ".join(map(str, wrong[:16])) + (f" and {wrong.size - 16} more" if wrong.size > 16 else "")
        raise BuilderError(
            f"merges of image rows {shown} do not belong to these objects: a tree of m tokens has "
            "m − 1 rows; pass regions and merges of the same build"
        )


def _require_few_regions(level: np.ndarray, cut: float) -> None:
    most = level.max(axis=1, initial=0)
    wrong = np.flatnonzero(most >= MAX_REGIONS)
    if wrong.size:
        change = "ask for fewer" if cut > 1 else "raise this cut"
        raise BuilderError(
            f"cut {cut} leaves {most[wrong[0]]} object regions in image row {wrong[0]} ({wrong.size} such "
            f"images), at most {MAX_REGIONS - 1} fit uint8: {change}, or use a smaller grid"
        )
