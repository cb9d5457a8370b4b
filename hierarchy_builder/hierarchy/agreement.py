"""Measures how far partitions of an image agree with each other, or with label maps drawn by people.

    N images, h×w cells, K regions of one partition, M label maps drawn by people for one image

Computed regions consist of tokens, label maps of pixels. Both are compared on a grid with `CELLS_PER_TOKEN` cells along
each side of a token (64×64 cells for 16×16 tokens). That is fine enough to see where an outline crosses a token, and
coarse enough that details smaller than a token do not dominate the score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from hierarchy_builder.errors import BuilderError

CELLS_PER_TOKEN = 4
TOLERANCE_CELLS = CELLS_PER_TOKEN / 2
"""Half a token. The tolerance of the BSDS benchmark, 0.0075 of the diagonal, is 0.17 tokens of a 16×16 grid; outlines
along token borders exceed it, since they deviate by a quarter of a token on average even if every token is right."""
TABLE_ENTRIES = 2**22
"""Entries of the contingency tables held in memory at once, 32 MiB."""


class BoundaryAgreement(NamedTuple):
    """Scores from 0 to 1, float64 [N] each."""

    precision: np.ndarray
    recall: np.ndarray
    f: np.ndarray


def adjusted_rand(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Adjusted Rand index of two partitions of each image: 1 for equal, on average 0 for unrelated partitions.

    a, b: integer [N, ...] of equal shape, ids from 0 (memory grows with the largest id).
    Returns float64 [N]; two partitions that both consist of one region score 1.
    Raises BuilderError if the shapes differ or are empty, or an id is negative.
    Source: Hubert and Arabie (1985), Comparing partitions, with pairs of cells counted in order.
    """
    return _by_tables(_adjusted_rand, a, b)


def variation_of_information(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Variation of information of two partitions of each image in nats; it is a metric, 0 for equal partitions.

    a, b: as for `adjusted_rand`. Returns float64 [N], H(a|b) + H(b|a), at most log(cells).
    Source: Meilă (2007), Comparing clusterings: an information based distance.
    """
    return _by_tables(_variation_of_information, a, b)


def covering(segments: np.ndarray, humans: Sequence[np.ndarray]) -> np.ndarray:
    """How well the segments cover the drawn regions: area-weighted best overlap, averaged over the label maps.

    segments: integer [N, h, w]. humans: N integer arrays [M, h, w] with ids from 0; M ≥ 0 may differ.
    Returns float64 [N] from 0 to 1, NaN for images without label maps.
    Source: Arbelaez et al. (2011), Contour detection and hierarchical image segmentation: covering of the ground
    truth by the segmentation.
    """
    owners, drawn = _pairs(segments, humans)
    scores = _by_tables(_covering, segments[owners], drawn)
    return _mean_over_people(scores, owners, len(segments))


def object_iou(objects: np.ndarray, humans: Sequence[np.ndarray]) -> np.ndarray:
    """Intersection over union of the object and the drawn object, averaged over the label maps.

    objects: bool [N, h, w]. humans: as for `covering`. In a map with the label 0, all other labels form the object. A
    map without 0 (segments without a marked object, as in BSDS) scores with the best union of its segments; this
    measures whether the outline follows drawn outlines, not whether it is the intended object.
    Returns float64 [N], NaN for images without label maps.
    """
    owners, drawn = _pairs(objects, humans)
    scores = _by_tables(_object_iou, (~objects[owners]).astype(np.uint8), drawn)
    return _mean_over_people(scores, owners, len(objects))


def boundary_f(
    segments: np.ndarray, humans: Sequence[np.ndarray], tolerance: float = TOLERANCE_CELLS
) -> BoundaryAgreement:
    """Precision, recall and F of region outlines, matched one to one with drawn outlines within `tolerance` cells.

    segments: integer [N, h, w]. humans: N integer arrays [M, h, w].
    Precision is the share of the computed outline that matches some label map, recall the share of all drawn outlines
    that is matched, and F their harmonic mean. Segments without any outline score 0, or 1 if no map has an outline
    either. Images without label maps have NaN.
    Source: boundary benchmark of BSDS (Martin et al. 2004). Here the matching has maximum size; there it has minimum
    cost with a high cost for unmatched cells.
    """
    _pairs(segments, humans)
    outlines = boundaries(segments)
    scores = [
        _boundary_scores(ours, boundaries(maps), tolerance)
        for ours, maps in zip(outlines, humans, strict=True)
    ]
    precision, recall = np.array(scores, dtype=np.float64).reshape(-1, 2).T
    total = precision + recall
    f = 2 * precision * recall / np.where(total == 0, 1, total)
    return BoundaryAgreement(precision, recall, f)


def boundaries(labels: np.ndarray) -> np.ndarray:
    """Outlines one cell wide: the cells that differ from their right, lower or lower right neighbour.

    labels: integer [N, h, w]. Returns bool [N, h, w]. Source: seg2bmap of the BSDS benchmark.
    """
    padded = np.pad(labels, ((0, 0), (0, 1), (0, 1)), mode="edge")
    right, below, corner = padded[:, :-1, 1:], padded[:, 1:, :-1], padded[:, 1:, 1:]
    return (labels != right) | (labels != below) | (labels != corner)


def _by_tables(score: Callable[[np.ndarray], np.ndarray], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Apply `score` to the contingency tables int64 [n, Ka, Kb] of a few images at a time."""
    if a.shape != b.shape or 0 in a.shape[1:]:
        raise BuilderError(f"partitions have shapes {a.shape} and {b.shape}, expected equal shapes [N, h, w]")
    if not len(a):
        return np.empty(0)
    a, b = a.reshape(len(a), -1).astype(np.int64), b.reshape(len(b), -1).astype(np.int64)
    if min(a.min(), b.min()) < 0:
        raise BuilderError("partitions hold negative ids, expected ids from 0")
    sizes = int(a.max()) + 1, int(b.max()) + 1
    step = max(1, TABLE_ENTRIES // (sizes[0] * sizes[1]))
    spans = [slice(start, start + step) for start in range(0, len(a), step)]
    return np.concatenate([score(_table(a[span], b[span], sizes)) for span in spans])


def _table(a: np.ndarray, b: np.ndarray, sizes: tuple[int, int]) -> np.ndarray:
    images = np.arange(len(a))[:, None]
    slots = (images * sizes[0] + a) * sizes[1] + b
    return np.bincount(slots.ravel(), minlength=len(a) * sizes[0] * sizes[1]).reshape(len(a), *sizes)


def _adjusted_rand(table: np.ndarray) -> np.ndarray:
    together = (table.astype(np.float64) ** 2).sum(axis=(1, 2))
    in_a = (table.sum(axis=2, dtype=np.float64) ** 2).sum(axis=1)
    in_b = (table.sum(axis=1, dtype=np.float64) ** 2).sum(axis=1)
    cells = table.sum(axis=(1, 2), dtype=np.float64)
    # Numbers of ordered pairs of cells: in one region of both partitions, of a, of b, and all pairs.
    both, pairs_a, pairs_b, pairs = together - cells, in_a - cells, in_b - cells, cells**2 - cells
    by_chance = pairs_a * pairs_b / np.maximum(pairs, 1)
    largest = (pairs_a + pairs_b) / 2
    equal = (both == pairs_a) & (both == pairs_b)
    return np.where(equal, 1.0, (both - by_chance) / np.where(equal, 1.0, largest - by_chance))


def _variation_of_information(table: np.ndarray) -> np.ndarray:
    """−Σ p(a,b) [log p(a|b) + log p(b|a)], written so that it is never negative and exactly 0 for equal partitions."""
    counts = np.maximum(table, 1)
    in_a, in_b = table.sum(axis=2, keepdims=True), table.sum(axis=1, keepdims=True)
    nats = np.log(np.maximum(in_a, 1) / counts) + np.log(np.maximum(in_b, 1) / counts)
    return (table * nats).sum(axis=(1, 2)) / table.sum(axis=(1, 2))


def _covering(table: np.ndarray) -> np.ndarray:
    ours, drawn = table.sum(axis=2, keepdims=True), table.sum(axis=1, keepdims=True)
    union = ours + drawn - table
    overlap = (table / np.maximum(union, 1)).max(axis=1)
    return (overlap * drawn[:, 0]).sum(axis=1) / drawn.sum(axis=(1, 2))


def _object_iou(table: np.ndarray) -> np.ndarray:
    """table [n, 1 or 2, K]: first row the object, second the background; columns are the labels of a map."""
    inside, area = table[:, 0].astype(np.float64), table.sum(axis=1).astype(np.float64)
    object_area = inside.sum(axis=1)

    def iou(inside: np.ndarray, area: np.ndarray) -> np.ndarray:
        union = object_area[:, None] + area - inside
        return np.where(union > 0, inside / np.maximum(union, 1), 1.0)

    foreground = iou(inside[:, 1:].sum(axis=1)[:, None], area[:, 1:].sum(axis=1)[:, None])[:, 0]
    # The best union takes all segments whose share inside exceeds some value (Dinkelbach): a prefix in this order.
    order = np.argsort(-inside / np.maximum(area, 1), axis=1, kind="stable")
    prefixes = (np.take_along_axis(values, order, axis=1).cumsum(axis=1) for values in (inside, area))
    return np.where(area[:, 0] > 0, foreground, iou(*prefixes).max(axis=1))


def _boundary_scores(ours: np.ndarray, drawn: np.ndarray, tolerance: float) -> tuple[float, float]:
    """Precision and recall of one outline [h, w] against M drawn outlines [M, h, w]."""
    if not len(drawn):
        return np.nan, np.nan
    if not drawn.any():
        return (0.0, 0.0) if ours.any() else (1.0, 1.0)
    people, our_cells, their_cells = _neighbours(ours, drawn, tolerance)
    cells = ours.size
    edges = csr_array(
        (np.ones(len(people), dtype=np.uint8), (people * cells + our_cells, people * cells + their_cells)),
        shape=(len(drawn) * cells, len(drawn) * cells),
    )
    partner = maximum_bipartite_matching(edges, perm_type="column").reshape(len(drawn), cells)
    found = partner >= 0
    return found.any(axis=0).sum() / max(ours.sum(), 1), found.sum() / drawn.sum()


def _neighbours(
    ours: np.ndarray, drawn: np.ndarray, tolerance: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of outline cells at most `tolerance` apart: index of the map, our cell, drawn cell (row-major)."""
    reach, width = int(tolerance), ours.shape[1]
    padded = np.pad(drawn, ((0, 0), (reach, reach), (reach, reach)))
    y, x = np.nonzero(ours)
    steps = np.indices((2 * reach + 1, 2 * reach + 1)).reshape(2, -1) - reach
    dy, dx = steps[:, (steps**2).sum(axis=0) <= tolerance**2]
    near_y, near_x = y[:, None] + dy, x[:, None] + dx
    people, cell, step = np.nonzero(padded[:, near_y + reach, near_x + reach])
    return people, (y * width + x)[cell], (near_y * width + near_x)[cell, step]


def _pairs(segments: np.ndarray, humans: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The image index of each map, int64 [P], and all maps [P, h, w]. Raises BuilderError if shapes do not fit."""
    shapes = {maps.shape[1:] for maps in humans if len(maps)}
    if len(humans) != len(segments) or shapes - {segments.shape[1:]}:
        raise BuilderError(
            f"found {len(humans)} sets of label maps of sizes {sorted(shapes)}, expected {len(segments)} sets of "
            f"the size of the partitions, {segments.shape[1:]}"
        )
    owners = np.repeat(np.arange(len(segments)), [len(maps) for maps in humans])
    drawn = np.concatenate([maps for maps in humans if len(maps)]) if len(owners) else segments[:0]
    return owners, drawn


def _mean_over_people(scores: np.ndarray, owners: np.ndarray, num_images: int) -> np.ndarray:
    people = np.bincount(owners, minlength=num_images)
    sums = np.bincount(owners, weights=scores, minlength=num_images)
    return np.where(people > 0, sums / np.maximum(people, 1), np.nan)
