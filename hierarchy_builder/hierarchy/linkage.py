"""Average linkage of the tokens of an image, and cuts of the resulting merge tree.

The tree is stored as `merges`, so that levels can be cut again at other heights without the features. A first build
also cuts by the stored float32 heights, so that both give the same regions. The code is compiled with numba, and
threads may process different images at the same time.

    N images, T = H·W tokens, m object tokens of an image, K cuts
"""

from __future__ import annotations

import numba
import numpy as np

from hierarchy_builder.hierarchy.constrained_linkage import FREE, GIVEN, PHASE, constrained_pairs, pair_phases

HEIGHT_EPSILON = 1e-8
"""Added to the range of heights before dividing by it, as in the published recipe."""
MARGIN = 0.5
"""A phase of heights starts this far below PHASE · phase, so that rounding cannot move a height to another phase."""


def average_linkage(
    gram: np.ndarray,
    object_mask: np.ndarray,
    penalty: np.ndarray,
    *,
    divide_background: bool = False,
    connected_width: int | None = None,
    given: np.ndarray | None = None,
) -> np.ndarray:
    """Merge the object tokens of each image, nearest clusters first, until one cluster is left.

    gram: float64 [N, T, T], symmetric, cosine similarities. object_mask: bool or uint8 [N, T].
    penalty: float64 [T, T], added to the cosine distance 1 − gram (spatial term).
    divide_background: also merge the background tokens, in rows after those of the object. connected_width: columns
    of the grid if only neighbours may merge. given: int [N, T], regions whose tokens merge with each other before they
    merge with other tokens (`constrained_linkage` defines the heights in both cases).
    Returns float32 [N, T − 1, 3], rows (left, right, height) by ascending height, with ids as in scipy: leaf i is the
    i-th token of its side (object or background) in row-major order, row j of a side of m tokens forms cluster m + j,
    and left < right. Unused rows are −1. Of equally distant clusters the first in token order is merged.
    Source: nearest-neighbour chain, Müllner (2011), arXiv 1109.2378, fig. 3, with the average update
    (Sokal and Michener 1958).
    """
    num_images, num_tokens = object_mask.shape
    merges = np.full((num_images, num_tokens - 1, 3), -1, dtype=np.float32)
    mask = np.asarray(object_mask, dtype=np.uint8)
    constrained, connected = connected_width is not None or given is not None, connected_width is not None
    regions = np.zeros(mask.shape, dtype=np.int32) if given is None else np.asarray(given, dtype=np.int32)
    width = connected_width or num_tokens
    _link_images(gram, mask, penalty, divide_background, constrained, width, connected, regions, merges)
    return merges


def cut_merges(
    object_mask: np.ndarray, merges: np.ndarray, cuts: tuple[float, ...], given_level: int | np.ndarray = 0
) -> np.ndarray:
    """Region ids of each image at each cut.

    object_mask: bool or uint8 [N, T]. merges: float32 [N, T − 1, 3] from `average_linkage`. cuts: relative heights (at
    most 1); a merge is undone if (h − h_min) / (h_max − h_min + 1e-8) > cut, where the range covers both sides if the
    background is divided. A cut above 1 is a number of regions: a merge is undone if it is higher than the mean of the
    2 · cut highest ones, so the cut stays the same when all heights are scaled or shifted.
    given_level: level (from 1) at which the given regions appear unchanged, for all images or as int [N]; finer cuts
    divide them and coarser cuts join them; 0 for images without given regions.
    Returns int32 [N, K, T]: background 0, object regions from 1 in the order of their first token, then the further
    regions of a divided background.
    """
    num_images, num_tokens = object_mask.shape
    regions = np.zeros((num_images, len(cuts), num_tokens), dtype=np.int32)
    _cut_images(
        np.asarray(object_mask, dtype=np.uint8),
        np.ascontiguousarray(merges, dtype=np.float32),
        np.asarray(cuts, dtype=np.float64),
        np.full(num_images, given_level, dtype=np.int64),
        regions,
    )
    return regions


@numba.njit(cache=True, nogil=True)
def _link_images(
    gram: np.ndarray,
    object_mask: np.ndarray,
    penalty: np.ndarray,
    both: bool,
    constrained: bool,
    width: int,
    connected: bool,
    given: np.ndarray,
    merges: np.ndarray,
) -> None:
    for n in range(object_mask.shape[0]):
        row = 0
        for side in range(1, -1 if both else 0, -1):
            tokens = np.flatnonzero(object_mask[n] == side)
            if tokens.size > 1:
                distances = _distances(gram[n], penalty, tokens)
                if constrained:
                    phases = pair_phases(tokens, width, connected, given[n])
                    pairs, heights = constrained_pairs(distances, phases)
                else:
                    pairs, heights = _chain(distances)
                _label(pairs, heights, merges[n, row : row + heights.size])
                row += heights.size


@numba.njit(cache=True)
def _distances(gram: np.ndarray, penalty: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    m = tokens.size
    distance = np.empty((m, m))
    for i in range(m):
        similarity, extra = gram[tokens[i]], penalty[tokens[i]]
        for j in range(m):
            distance[i, j] = 1.0 - similarity[tokens[j]] + extra[tokens[j]]
        distance[i, i] = np.inf
    return distance


# Without NaN a minimum does not depend on the order, so the flags allow LLVM to vectorise it (3 times as fast).
@numba.njit(cache=True, fastmath={"nnan", "nsz", "reassoc"})
def _smallest(row: np.ndarray) -> float:
    smallest = np.inf
    for value in row:
        smallest = min(smallest, value)
    return smallest


@numba.njit(cache=True)
def _nearest(row: np.ndarray, previous: int) -> int:
    """First index of the smallest value; `previous` if its value is as small, so that chains end."""
    smallest = _smallest(row)
    if previous >= 0 and row[previous] <= smallest:
        return previous
    for i in range(row.size):
        if row[i] == smallest:
            return i
    return -1


@numba.njit(cache=True)
def _chain(distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge clusters until one is left; overwrites `distance`, inf on the diagonal and for merged slots.

    Returns the merged pairs of slots and their heights in the order in which the chain finds them; the second slot of
    a pair holds the merged cluster.
    """
    m = distance.shape[0]
    pairs = np.empty((m - 1, 2), dtype=np.int64)
    heights = np.empty(m - 1)
    size = np.ones(m, dtype=np.int64)
    chain = np.empty(m, dtype=np.int64)
    length = 0
    first = 0
    for merged in range(m - 1):
        if length == 0:
            while size[first] == 0:
                first += 1
            chain[0] = first
            length = 1
        while True:
            top = chain[length - 1]
            previous = chain[length - 2] if length > 1 else -1
            nearest = _nearest(distance[top], previous)
            if nearest == previous:
                break
            chain[length] = nearest
            length += 1
        length -= 2
        gone, kept = min(top, nearest), max(top, nearest)
        pairs[merged, 0], pairs[merged, 1] = gone, kept
        heights[merged] = distance[gone, kept]
        _merge_rows(distance, size, gone, kept)
    return pairs, heights


@numba.njit(cache=True)
def _merge_rows(distance: np.ndarray, size: np.ndarray, gone: int, kept: int) -> None:
    size_gone, size_kept = size[gone], size[kept]
    size[gone], size[kept] = 0, size_gone + size_kept
    row_gone, row_kept = distance[gone], distance[kept]
    for i in range(size.size):
        row_kept[i] = (size_gone * row_gone[i] + size_kept * row_kept[i]) / (size_gone + size_kept)
    row_kept[gone] = np.inf
    row_kept[kept] = np.inf
    for i in range(size.size):
        distance[i, kept] = row_kept[i]
        distance[i, gone] = np.inf


@numba.njit(cache=True)
def _label(pairs: np.ndarray, heights: np.ndarray, merges: np.ndarray) -> None:
    """Sort merges by height and number clusters as scipy does."""
    m = heights.size + 1
    order = np.argsort(heights, kind="mergesort")
    parent = np.arange(m)  # union-find over slots, updated merge by merge
    name = np.arange(m)  # cluster id of each root slot
    for row in range(m - 1):
        a, b = _root(parent, pairs[order[row], 0]), _root(parent, pairs[order[row], 1])
        merges[row, 0] = min(name[a], name[b])
        merges[row, 1] = max(name[a], name[b])
        merges[row, 2] = heights[order[row]]
        parent[a] = b
        name[b] = m + row


@numba.njit(cache=True)
def _root(parent: np.ndarray, slot: int) -> int:
    while parent[slot] != slot:
        parent[slot] = parent[parent[slot]]
        slot = parent[slot]
    return slot


@numba.njit(cache=True, nogil=True)
def _cut_images(
    object_mask: np.ndarray,
    merges: np.ndarray,
    cuts: np.ndarray,
    given_level: np.ndarray,
    regions: np.ndarray,
) -> None:
    for n in range(object_mask.shape[0]):
        objects, others = np.flatnonzero(object_mask[n] == 1), np.flatnonzero(object_mask[n] == 0)
        rows = 0
        while rows < merges.shape[1] and merges[n, rows, 0] >= 0:
            rows += 1
        split = min(rows, max(objects.size - 1, 0))  # number of rows in the tree of the object
        heights = merges[n, :rows, 2]
        for k in range(cuts.size):
            limit = _limit(heights, k + 1, cuts[k], given_level[n])
            found = _number(objects, merges[n, :split], limit, 1, 1, regions[n, k])
            if rows > split:
                _number(others, merges[n, split:rows], limit, 0, found, regions[n, k])


@numba.njit(cache=True)
def _limit(heights: np.ndarray, level: int, cut: float, given_level: int) -> tuple[float, float, float]:
    """(start, scale, cut) such that merges of height h are kept if (h − start) / scale ≤ cut."""
    if level == given_level:
        return PHASE * GIVEN - MARGIN, 1.0, 0.0
    coarser = level < given_level
    phase = GIVEN if coarser else FREE
    lowest, span = _range(heights, phase)
    if (
        span < 0
    ):  # the tree has no merges of this phase: a coarser level keeps all others, a finer one undoes them
        return np.inf if coarser else -np.inf, 1.0, cut
    if cut > 1:
        return _mean_of_highest(heights, phase, int(2 * cut)), 1.0, 0.0
    return lowest, span + HEIGHT_EPSILON, cut


@numba.njit(cache=True)
def _mean_of_highest(heights: np.ndarray, phase: int, number: int) -> float:
    """Mean of the highest merges of a phase, of all its merges if there are fewer than `number`."""
    start = PHASE * phase - MARGIN
    inside = np.sort(heights[(heights >= start) & (heights < start + PHASE)].astype(np.float64))
    return inside[-number:].mean() if inside.size > number else inside.mean()


@numba.njit(cache=True)
def _range(heights: np.ndarray, phase: int) -> tuple[float, float]:
    """Lowest height of a phase and the difference to its highest, which is negative if the phase has no merges."""
    lowest, highest = np.inf, -np.inf
    for height in heights:
        if PHASE * phase - MARGIN <= height < PHASE * (phase + 1) - MARGIN:
            lowest, highest = min(lowest, np.float64(height)), max(highest, np.float64(height))
    return lowest, highest - lowest


@numba.njit(cache=True)
def _number(
    tokens: np.ndarray,
    merges: np.ndarray,
    limit: tuple[float, float, float],
    first: int,
    second: int,
    regions: np.ndarray,
) -> int:
    """Write the region ids of the clusters that remain after the merges within `limit`, in order of first token.

    The first cluster gets the id `first`, the next ones `second`, `second` + 1 and so on; if both are equal, ids count
    up from there. Returns the next unused id. A tree without merges is one cluster.
    """
    m = tokens.size
    start, scale, cut = limit
    kept = 0
    while kept < len(merges) and (merges[kept, 2] - start) / scale <= cut:
        kept += 1
    root = np.arange(m + kept)
    for row in range(
        kept - 1, -1, -1
    ):  # from the top down, so that children inherit the root of their parent
        root[np.int64(merges[row, 0])] = root[m + row]
        root[np.int64(merges[row, 1])] = root[m + row]
    if len(merges) == 0:
        root[:] = 0
    region_of = np.full(m + kept, -1, dtype=np.int32)
    following = first
    for leaf in range(m):
        if region_of[root[leaf]] < 0:
            region_of[root[leaf]] = following
            following = following + 1 if following >= second else second
        regions[tokens[leaf]] = region_of[root[leaf]]
    return following
