"""Average linkage of an image's tokens, the merge tree, and its cuts.

The tree is stored (`merges`), so levels can be cut anew without the features; for that reason the cuts
read the stored float32 heights also when a hierarchy is first built. Compiled with numba; threads may work on
different images at once.

    N images, T = H·W tokens, m object tokens of an image, K cuts
"""

from __future__ import annotations

import numba
import numpy as np

from hierarchy_builder.hierarchy.constrained_linkage import FREE, GIVEN, PHASE, constrained_pairs, pair_phases

HEIGHT_EPSILON = 1e-8
"""Added to the range of heights before dividing by it, as the published recipe does."""
MARGIN = 0.5
"""Phases of heights are told apart this far below their start, out of the reach of rounding."""


def average_linkage(
    gram: np.ndarray,
    object_mask: np.ndarray,
    penalty: np.ndarray,
    *,
    out: np.ndarray | None = None,
    divide_background: bool = False,
    connected_width: int | None = None,
    given: np.ndarray | None = None,
) -> np.ndarray:
    """Merge the object tokens of each image, nearest clusters first, until one cluster is left.

    gram: float64 [N, T, T], symmetric, cosine similarities. object_mask: bool or uint8 [N, T].
    penalty: float64 [T, T], added to the cosine distance 1 − gram (spatial term). divide_background: also
    merge the other tokens, in rows after the object's. connected_width: width of the grid on which only
    neighbours merge. given: int [N, T], regions whose tokens merge before any with others (see
    `constrained_linkage` for the heights of both).
    Returns float32 [N, T − 1, 3]: rows (left, right, height) in rising order of height. Ids are scipy's:
    leaf i is the i-th token of its side in row-major order, row j of the side makes cluster m + j,
    left < right; unused rows are −1. `out` may give the array to fill. Equal distances: the first cluster
    in token order wins.
    Source: nearest-neighbour chain, Müllner (2011), arXiv 1109.2378, fig. 3, with the average update
    (Sokal and Michener 1958).
    """
    num_images, num_tokens = object_mask.shape
    if out is None:
        out = np.empty((num_images, num_tokens - 1, 3), dtype=np.float32)
    out[:] = -1
    mask = np.asarray(object_mask, dtype=np.uint8)
    if connected_width is None and given is None:
        _link_images(gram, mask, penalty, divide_background, out)
    else:
        regions = np.zeros(mask.shape, dtype=np.int32) if given is None else np.asarray(given, dtype=np.int32)
        width, connected = connected_width or num_tokens, connected_width is not None
        _link_constrained(gram, mask, penalty, divide_background, width, connected, regions, out)
    return out


def cut_merges(
    object_mask: np.ndarray, merges: np.ndarray, cuts: tuple[float, ...], given_level: int | np.ndarray = 0
) -> np.ndarray:
    """Region ids of each image at each cut.

    object_mask: bool or uint8 [N, T]. merges: float32 [N, T − 1, 3] of `average_linkage`. cuts: relative
    heights; a merge is undone where (h − h_min) / (h_max − h_min + 1e-8) > cut, over the heights of both
    sides where the background is divided. given_level: level (from 1), one or int [N], at which the given
    regions appear as they are, finer cuts divide them and coarser ones join them; 0 where there are none.
    Returns int32 [N, K, T]: background 0, object regions 1… in order of first token, then what else the
    background is divided into.
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
    gram: np.ndarray, object_mask: np.ndarray, penalty: np.ndarray, both: bool, merges: np.ndarray
) -> None:
    for n in range(object_mask.shape[0]):
        row = 0
        for side in range(1, -1 if both else 0, -1):
            tokens = np.flatnonzero(object_mask[n] == side)
            if tokens.size > 1:
                pairs, heights = _chain(_distances(gram[n], penalty, tokens))
                _label(pairs, heights, merges[n, row : row + heights.size])
                row += heights.size


@numba.njit(cache=True, nogil=True)
def _link_constrained(
    gram: np.ndarray,
    object_mask: np.ndarray,
    penalty: np.ndarray,
    both: bool,
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
                phases = pair_phases(tokens, width, connected, given[n])
                pairs, heights = constrained_pairs(_distances(gram[n], penalty, tokens), phases)
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


# Without NaN, a minimum is the same in any order: the flags let LLVM use vector instructions (3× here).
@numba.njit(cache=True, fastmath={"nnan", "nsz", "reassoc"})
def _smallest(row: np.ndarray) -> float:
    smallest = np.inf
    for value in row:
        smallest = min(smallest, value)
    return smallest


@numba.njit(cache=True)
def _nearest(row: np.ndarray, previous: int) -> int:
    """First index of the smallest value; `previous` where it is no farther (so that chains end)."""
    smallest = _smallest(row)
    if previous >= 0 and row[previous] <= smallest:
        return previous
    for i in range(row.size):
        if row[i] == smallest:
            return i
    return -1


@numba.njit(cache=True)
def _chain(distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge rows of `distance` (overwritten; inf on the diagonal and for dead clusters).

    Returns the pairs of slots merged and their heights, in the order the chain finds them: the merged
    cluster lives on in the second slot.
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
    """Sort merges by height and name clusters as scipy does."""
    m = heights.size + 1
    order = np.argsort(heights, kind="mergesort")
    parent = np.arange(m)  # slots, joined as merges are replayed
    name = np.arange(m)  # cluster id a root slot stands for
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
        split = min(
            rows, max(objects.size - 1, 0)
        )  # rows of the object's tree; none where nothing is divided
        heights = merges[n, :rows, 2]
        for k in range(cuts.size):
            limit = _limit(heights, k + 1, cuts[k], given_level[n])
            found = _number(objects, merges[n, :split], limit, 1, 1, regions[n, k])
            if rows > split:
                _number(others, merges[n, split:rows], limit, 0, found, regions[n, k])


@numba.njit(cache=True)
def _limit(heights: np.ndarray, level: int, cut: float, given_level: int) -> tuple[float, float, float]:
    """(start, scale, cut): merges of a height h are kept where (h − start) / scale ≤ cut."""
    if given_level == 0 or level > given_level:
        lowest, span = _range(heights, FREE)
        if span < 0:  # no such merges: keep none of the others
            return -np.inf, 1.0, cut
        return lowest, span + HEIGHT_EPSILON, cut
    if level < given_level:
        lowest, span = _range(heights, GIVEN)
        if span < 0:  # no such merges: keep all of the others
            return np.inf, 1.0, cut
        return lowest, span + HEIGHT_EPSILON, cut
    return PHASE * GIVEN - MARGIN, 1.0, 0.0


@numba.njit(cache=True)
def _range(heights: np.ndarray, phase: int) -> tuple[float, float]:
    """Lowest height of a phase and how far the highest is above it; negative where the phase has none."""
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
    """Number the clusters that the merges within `limit` leave, by first token: `first`, then on from `second`.

    Where first is second, on from there. Returns the number after the last. A tree without merges is one cluster.
    """
    m = tokens.size
    start, scale, cut = limit
    kept = 0
    while kept < len(merges) and (merges[kept, 2] - start) / scale <= cut:
        kept += 1
    root = np.arange(m + kept)
    for row in range(kept - 1, -1, -1):  # from the top down: a child's root is its parent's
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
