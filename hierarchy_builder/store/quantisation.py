"""Features as int8 with one scale per token, which takes half the bytes, and its error on a sample of a build.

    N images, H×W grid, C channels

The largest value of a token becomes 127, so outliers are exact and the small channels of their token lose most.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hierarchy_builder.config import HierarchyRecipe
from hierarchy_builder.records import spread_evenly
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.stored import Stored

LARGEST = 127
"""Largest int8 in use: −128 is left out, so that the range is symmetric and zero stays zero."""

SAMPLED_IMAGES = 256
"""Largest number of images whose features and regions are compared; they are spread evenly over the build."""


def quantise(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round features to int8 [..., C] and scale float32 [..., 1], with value = int8 · scale.

    features: float [..., C], finite. The scale of a token is max|x|/127, so an error is at most half of that.
    """
    wide = features.astype(np.float32)
    scale = np.abs(wide).max(axis=-1, keepdims=True) / np.float32(LARGEST)
    steps = wide / np.where(scale > 0, scale, 1)
    # With the smallest numbers of float32 the division can round up to 128.
    return np.clip(np.rint(steps), -LARGEST, LARGEST).astype(np.int8), scale


def dequantise(features: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return int8 [..., C] · scale float32 [..., 1] as float32 [..., C]."""
    return features.astype(np.float32) * scale


def measure_quantisation(folder: BuildFolder, recipe: HierarchyRecipe, rows: np.ndarray) -> dict[str, Any]:
    """Measure how int8 changes the features of a build and the regions that `recipe` finds in them.

    rows: usable rows of the index, rising; up to 256 of them, spread evenly, are read.
    Returns plain data: `images`, `relative_error` (root of squared error over squared length), `cosine` (the smallest
    between a token and its stored form), and for each level, coarse → fine, `tokens_changed` (share of tokens outside
    the best one-to-one matching of regions before and after) and `agreement` (mean adjusted Rand index).
    """
    from hierarchy_builder.hierarchy import build_hierarchy
    from hierarchy_builder.hierarchy.agreement import adjusted_rand

    chosen = rows[spread_evenly(len(rows), SAMPLED_IMAGES)]
    exact = Stored(folder).rows("features", chosen).astype(np.float32)
    stored = dequantise(*quantise(exact))
    before, after = (build_hierarchy(values, recipe).regions for values in (exact, stored))
    levels = range(before.shape[1])
    products, squares, kept = (
        (a * b).sum(axis=-1) for a, b in ((exact, stored), (exact, exact), (stored, stored))
    )
    lengths = np.sqrt(squares * kept)
    error = ((stored - exact) ** 2).sum() / max(float(squares.sum()), 1e-30)
    return {
        "images": len(chosen),
        "relative_error": _digits(np.sqrt(error)),
        "cosine": _digits((products[lengths > 0] / lengths[lengths > 0]).min(initial=1)),
        "tokens_changed": [_digits(changed_share(before[:, n], after[:, n]).mean()) for n in levels],
        "agreement": [_digits(adjusted_rand(before[:, n], after[:, n]).mean()) for n in levels],
    }


def changed_share(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return the share of tokens outside the best one-to-one matching of regions, float64 [N].

    before, after: uint8 [N, H, W]. The numbering of the ids does not matter.
    """
    from scipy.optimize import linear_sum_assignment

    shares = np.empty(len(before))
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        table = np.zeros((int(old.max()) + 1, int(new.max()) + 1), np.int64)
        np.add.at(table, (old, new), 1)
        shares[number] = 1 - table[linear_sum_assignment(table, maximize=True)].sum() / old.size
    return shares


def _digits(value: float) -> float:
    """Round to six significant digits, since the last bits differ between machines and index.json must not."""
    return float(f"{value:.6g}")
