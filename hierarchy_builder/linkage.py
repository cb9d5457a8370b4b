"""Average linkage of an image's object tokens, the merge tree, and its cuts.

The tree is stored (`merges`), so levels can be cut anew without the features; for that reason the cuts
read the stored float32 heights also when a hierarchy is first built. Compiled with numba, parallel over
images; one image is always worked on by one thread, so results do not depend on their number.

    N images, T = H·W tokens, m object tokens of an image, K cuts
"""

from __future__ import annotations

import numba
import numpy as np

HEIGHT_EPSILON = 1e-8
"""Added to the range of heights before dividing by it, as the published recipe does."""


def average_linkage(
    gram: np.ndarray, object_mask: np.ndarray, penalty: np.ndarray, out: np.ndarray | None = None
) -> np.ndarray:
    """Merge the object tokens of each image, nearest clusters first, until one cluster is left.

    gram: float64 [N, T, T], symmetric, cosine similarities. object_mask: bool or uint8 [N, T].
    penalty: float64 [T, T], added to the cosine distance 1 − gram (spatial term).
    Returns float32 [N, T − 1, 3]: rows (left, right, height) in rising order of height. Ids are scipy's:
    leaf i is the i-th object token in row-major order, row j makes cluster m + j, left < right; unused
    rows are −1. `out` may give the array to fill. Equal distances: the first cluster in token order wins.
    Source: nearest-neighbour chain, Müllner (2011), arXiv 1109.2378, fig. 3, with the average update
    (Sokal and Michener 1958).
    """
    num_images, num_tokens = object_mask.shape
    if out is None:
        out = np.empty((num_images, num_tokens - 1, 3), dtype=np.float32)
    out[:] = -1
    _link_images(gram, np.asarray(object_mask, dtype=np.uint8), penalty, out)
    return out


def cut_merges(object_mask: np.ndarray, merges: np.ndarray, cuts: tuple[float, ...]) -> np.ndarray:
    """Region ids of each image at each cut.

    object_mask: bool or uint8 [N, T]. merges: float32 [N, T − 1, 3] of `average_linkage`. cuts: relative
    heights; a merge is undone where (h − h_min) / (h_max − h_min + 1e-8) > cut.
    Returns int32 [N, K, T]: background 0, object regions 1… in order of first token.
    """
    num_images, num_tokens = object_mask.shape
    regions = np.zeros((num_images, len(cuts), num_tokens), dtype=np.int32)
    _cut_images(
        np.asarray(object_mask, dtype=np.uint8),
        np.ascontiguousarray(merges, dtype=np.float32),
        np.asarray(cuts, dtype=np.float64),
        regions,
    )
    return regions


@numba.njit(cache=True, parallel=True)
def _link_images(gram: np.ndarray, object_mask: np.ndarray, penalty: np.ndarray, merges: np.ndarray) -> None:
    for n in numba.prange(object_mask.shape[0]):
        tokens = np.flatnonzero(object_mask[n])
        if tokens.size > 1:
            distance = _distances(gram[n], penalty, tokens)
            pairs, heights = _chain(distance)
            _label(pairs, heights, merges[n])


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


@numba.njit(cache=True, parallel=True)
def _cut_images(object_mask: np.ndarray, merges: np.ndarray, cuts: np.ndarray, regions: np.ndarray) -> None:
    for n in numba.prange(object_mask.shape[0]):
        tokens = np.flatnonzero(object_mask[n])
        for k in range(cuts.size):
            _cut(tokens, merges[n], cuts[k], regions[n, k])


@numba.njit(cache=True)
def _cut(tokens: np.ndarray, merges: np.ndarray, cut: float, regions: np.ndarray) -> None:
    m = tokens.size
    kept = 0
    if m > 1:
        lowest, span = np.float64(merges[0, 2]), np.float64(merges[m - 2, 2]) - np.float64(merges[0, 2])
        while kept < m - 1 and (merges[kept, 2] - lowest) / (span + HEIGHT_EPSILON) <= cut:
            kept += 1
    root = np.arange(m + kept)
    for row in range(kept - 1, -1, -1):  # from the top down: a child's root is its parent's
        root[np.int64(merges[row, 0])] = root[m + row]
        root[np.int64(merges[row, 1])] = root[m + row]
    region_of = np.zeros(m + kept, dtype=np.int32)
    found = 0
    for leaf in range(m):
        if region_of[root[leaf]] == 0:
            found += 1
            region_of[root[leaf]] = found
        regions[tokens[leaf]] = region_of[root[leaf]]
