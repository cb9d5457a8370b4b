"""Recipe → nested region ids of every image, the merge tree behind them, and the nesting check.

One Gram matrix per image serves both the split into object and background and the linkage of the
object's tokens; it is the only thing computed from the channels. On a CPU its products are summed in
float32, which is half the time of the whole; images with hardly any contrast are done again in float64.

    N images, L levels (coarse → fine), H×W grid, T = H·W tokens, C channels
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntFlag

import numba
import numpy as np
import torch
from threadpoolctl import ThreadpoolController

from hierarchy_builder.config import HierarchyRecipe
from hierarchy_builder.errors import BuilderError
from hierarchy_builder.linkage import average_linkage, cut_merges
from hierarchy_builder.records import MAX_REGIONS, REGION_DTYPE
from hierarchy_builder.two_means import two_means

GRAM_BYTES = 16 * 2**20
"""Memory of the Gram matrices worked on at once, 32 images of a 16×16 grid."""
SINGLE_PRECISION_SPREAD = 1e-2
"""Mean squared distance to the mean token (unit vectors) above which float32 products, exact to 1e-7, do."""
NORM_EPSILON = 1e-8
TIE = 1e-12


class Flag(IntFlag):
    """What is unusual about an image's hierarchy: bits of `Hierarchy.flags`."""

    DEGENERATE = 1
    """All tokens point the same way: the whole image is the object, its parts follow from positions alone."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Hierarchy:
    """Nested regions of N images and the trees they were cut from.

    regions: uint8 [N, L−1, H, W], coarse → fine; level 0 is object (1) and background (0); ids are dense,
    background 0, object regions from 1 in order of first token (row-major).
    merges: float32 [N, H·W−1, 3], rows (left, right, height) over the object tokens in rising order of
    height, not normalised; ids as in scipy's linkage (leaf i is the i-th object token); unused rows −1.
    flags: uint8 [N], bits of `Flag`.
    """

    regions: np.ndarray
    merges: np.ndarray
    flags: np.ndarray


def build_hierarchy(
    features: np.ndarray | torch.Tensor, recipe: HierarchyRecipe = HierarchyRecipe.paper()
) -> Hierarchy:
    """Divide every image into object and background, and the object into ever finer regions.

    features: float16 or float32 [N, H, W, C], encoder tokens as stored (any grid; a tensor may be on a GPU).
    Returns regions [N, L−1, H, W] with L − 1 = 1 + number of cuts, merges and flags, as numpy arrays.
    Raises BuilderError for another shape, for values that are not finite (naming the rows) and where a cut
    leaves more than 255 regions.
    Source: Trajectory Forcing (arXiv 2606.22527) as released: 2-means on L2-normalised tokens, the cluster
    nearer to the image centre is the object; average linkage on cosine distance + spatial_weight ·
    distance on the unit square; cuts at relative heights.
    """
    if features.ndim != 4 or 0 in features.shape[1:]:
        raise BuilderError(f"features have shape {tuple(features.shape)}, expected [N, H, W, C]")
    num_images, height, width, num_channels = features.shape
    coordinates = _coordinates(height, width)
    penalty = recipe.spatial_weight * np.linalg.norm(coordinates[:, None] - coordinates[None], axis=-1)

    mask = np.empty((num_images, height * width), dtype=np.uint8)
    merges = np.empty((num_images, height * width - 1, 3), dtype=np.float32)
    flags = np.zeros(num_images, dtype=np.uint8)
    for rows, gram in _grams(features):
        labels = two_means(gram, recipe.seed, num_channels)
        constant = ~labels.any(axis=1)
        gram[constant] = gram[constant, :1, :1]  # rounding must not decide between equal distances
        flags[rows] = np.where(constant, Flag.DEGENERATE, 0)
        mask[rows] = _object_mask(labels, coordinates)
        average_linkage(gram, mask[rows], penalty, out=merges[rows])
    regions = cut_levels(mask.reshape(num_images, height, width), merges, recipe.cuts)
    return Hierarchy(regions=regions, merges=merges, flags=flags)


def cut_levels(object_mask: np.ndarray, merges: np.ndarray, cuts: Sequence[float]) -> np.ndarray:
    """Levels of stored trees at other cuts, without the features.

    object_mask: [N, H, W], nonzero on the object (`regions[:, 0]`). merges: float32 [N, H·W−1, 3].
    cuts: relative heights, falling (coarse → fine).
    Returns uint8 [N, 1 + len(cuts), H, W], what `build_hierarchy` gives with these cuts.
    Raises BuilderError if the trees are not of these objects, or a cut leaves more than 255 regions.
    """
    num_images, height, width = object_mask.shape
    mask = (object_mask != 0).reshape(num_images, height * width)
    _require_trees_of(mask, merges)
    levels = cut_merges(mask, merges, tuple(cuts))
    for level, cut in enumerate(cuts):
        _require_few_regions(levels[:, level], cut)
    regions = np.concatenate([mask[:, None], levels], axis=1).astype(REGION_DTYPE)
    return regions.reshape(num_images, 1 + len(cuts), height, width)


def check_nesting(regions: np.ndarray) -> np.ndarray:
    """Count what breaks the rules of region ids, per image; 0 everywhere for a sound hierarchy.

    regions: uint8 [N, L−1, H, W]. Returns int64 [N]: ids missing from 0 or 1 up to the largest of their
    level, plus tokens that are background on this level but not on level 0 (or the reverse), plus tokens
    whose region has another parent than the region's last token.
    """
    num_images, num_levels, height, width = regions.shape
    ids = regions.reshape(num_images, num_levels, height * width).astype(np.int64)
    image = np.arange(num_images)[:, None]
    violations = np.zeros(num_images, dtype=np.int64)
    for level in range(num_levels):
        present = np.zeros((num_images, MAX_REGIONS), dtype=bool)
        present[image, ids[:, level]] = True
        violations += ids[:, level].max(axis=1) - present[:, 1:].sum(axis=1)
        violations += ((ids[:, level] == 0) != (ids[:, 0] == 0)).sum(axis=1)
        if level > 0:
            parent = np.zeros((num_images, MAX_REGIONS), dtype=np.int64)
            parent[image, ids[:, level]] = ids[:, level - 1]
            violations += (parent[image, ids[:, level]] != ids[:, level - 1]).sum(axis=1)
    return violations


def _coordinates(height: int, width: int) -> np.ndarray:
    """Token positions (y, x) on the unit square, float64 [T, 2]."""
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    return np.stack([y, x], axis=-1).reshape(-1, 2)


def _grams(features: np.ndarray | torch.Tensor) -> Iterator[tuple[slice, np.ndarray]]:
    """Cosine similarities of each image's tokens, a few images at a time: (rows, float64 [n, T, T])."""
    num_images, height, width, num_channels = features.shape
    num_tokens = height * width
    step = max(1, GRAM_BYTES // (8 * num_tokens**2))
    for start in range(0, num_images, step):
        rows = slice(start, min(start + step, num_images))
        tokens = _as_tensor(features[rows]).reshape(-1, num_tokens, num_channels)
        on_cpu = tokens.device.type == "cpu"
        gram = _cosines(tokens, torch.float32 if on_cpu else torch.float64)
        close = ~(_spread(gram) > SINGLE_PRECISION_SPREAD)
        if on_cpu and close.any():
            gram[close] = _cosines(tokens[torch.from_numpy(close)], torch.float64)
        _require_finite(gram, start)
        yield rows, gram


def _as_tensor(features: np.ndarray | torch.Tensor) -> torch.Tensor:
    if isinstance(features, torch.Tensor):
        return features.detach()
    return torch.from_numpy(np.require(features, requirements=["C", "W"]))  # torch warns of read-only memory


def _cosines(tokens: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """Inner products in `dtype`, then scaled by (‖z_i‖ + 1e-8)(‖z_j‖ + 1e-8): float64 [n, T, T], symmetric."""
    wide = tokens.to(dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # NaN and infinity are reported by their rows later
        if wide.device.type == "cpu":
            products = _products(wide.numpy())
        else:
            products = torch.bmm(wide, wide.mT).cpu().numpy()
            products = (products + products.swapaxes(1, 2)) / 2
        norms = np.sqrt(np.diagonal(products, axis1=1, axis2=2), dtype=np.float64)
        inverse = 1 / (norms + NORM_EPSILON)
        scale = inverse[:, :, None] * inverse[:, None, :]
        return np.multiply(products, scale, out=scale)


def _products(tokens: np.ndarray) -> np.ndarray:
    """tokens · tokensᵀ of each image, exactly symmetric (numpy calls syrk: half the work).

    Each image belongs to one thread, as in the compiled parts: a product divided among BLAS threads differs
    in its last bits with their number, and they would spin against numba's.
    """
    products = np.empty((len(tokens), tokens.shape[1], tokens.shape[1]), dtype=tokens.dtype)

    def multiply(rows: slice) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # does not reach into threads by itself
            np.matmul(tokens[rows], tokens[rows].swapaxes(1, 2), out=products[rows])

    threads = numba.get_num_threads()
    share = max(1, -(-len(tokens) // threads))
    shares = [slice(start, start + share) for start in range(0, len(tokens), share)]
    with _blas().limit(limits=1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        list(pool.map(multiply, shares))
    return products


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def _spread(gram: np.ndarray) -> np.ndarray:
    """Mean squared distance of the tokens to their mean."""
    return np.trace(gram, axis1=1, axis2=2) / gram.shape[1] - gram.mean(axis=(1, 2))


def _require_finite(gram: np.ndarray, start: int) -> None:
    bad = np.flatnonzero(~np.isfinite(_spread(gram)))
    if bad.size:
        raise BuilderError(
            f"features of image rows {_listed(start + bad)} hold NaN or infinity, expected finite numbers: "
            "leave these rows out, or encode them again"
        )


def _object_mask(labels: np.ndarray, coordinates: np.ndarray) -> np.ndarray:
    """The cluster whose tokens lie nearer to the centre on average; cluster 1 on a tie, and never an empty one."""
    from_centre = np.linalg.norm(coordinates - 0.5, axis=1)
    ones = labels.sum(axis=1, dtype=np.int64)
    zeros = labels.shape[1] - ones
    mean_of_ones = (labels @ from_centre) / np.maximum(ones, 1)
    mean_of_zeros = ((1 - labels) @ from_centre) / np.maximum(zeros, 1)
    zero_is_object = (ones == 0) | (mean_of_zeros < mean_of_ones - TIE)
    return np.where(zero_is_object[:, None], labels == 0, labels == 1)


def _require_trees_of(mask: np.ndarray, merges: np.ndarray) -> None:
    num_images, num_tokens = mask.shape
    if merges.shape != (num_images, num_tokens - 1, 3):
        raise BuilderError(
            f"merges have shape {merges.shape}, expected {(num_images, num_tokens - 1, 3)} for this grid"
        )
    rows = (merges[:, :, 0] >= 0).sum(axis=1)
    wrong = np.flatnonzero(rows != np.maximum(mask.sum(axis=1) - 1, 0))
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
