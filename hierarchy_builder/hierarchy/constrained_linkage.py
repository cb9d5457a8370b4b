"""Average linkage under constraints: neighbours on the grid merge first, and tokens of one given region before others.

Each pair of tokens belongs to a phase, and all merges of a phase come before those of the next: FREE pairs first, then
tokens of one given region that are not neighbours (APART), then tokens of different given regions (GIVEN). The phase of
two clusters is the earliest phase of any pair of their tokens. The height of a merge is the average distance plus
PHASE · phase, so that the phases can be read from a stored tree when it is cut. Heights never fall: unlike plain
average linkage, this one can merge below an earlier merge of the same cluster, and then the earlier height is used.

    m tokens of one side (object or background) of an image
"""

from __future__ import annotations

import numba
import numpy as np

PHASE = 8.0
"""Offset between phases; the recipe limits spatial_weight so that average distances, ≤ 2 + spatial_weight · √2, fit."""
FREE, APART, GIVEN = 0, 1, 2


@numba.njit(cache=True)
def pair_phases(tokens: np.ndarray, width: int, connected: bool, given: np.ndarray) -> np.ndarray:
    """Phase of each pair of tokens, uint8 [m, m].

    tokens: ascending row-major positions on a grid of `width` columns. given: region of each position of the grid.
    """
    m = tokens.size
    phases = np.empty((m, m), dtype=np.uint8)
    for i in range(m):
        for j in range(m):
            down, right = tokens[j] // width - tokens[i] // width, tokens[j] % width - tokens[i] % width
            if given[tokens[i]] != given[tokens[j]]:
                phases[i, j] = GIVEN
            elif connected and abs(down) + abs(right) > 1:
                phases[i, j] = APART
            else:
                phases[i, j] = FREE
    return phases


@numba.njit(cache=True)
def constrained_pairs(distance: np.ndarray, phases: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge clusters until one is left, always the nearest pair of the earliest phase; overwrites both arguments.

    Returns the merged pairs of slots and their heights in the order of merging; the second slot of a pair holds the
    merged cluster. Of equally distant pairs the first in token order is merged.
    """
    m = distance.shape[0]
    pairs, heights = np.empty((m - 1, 2), dtype=np.int64), np.empty(m - 1)
    size, height = np.ones(m), np.zeros(m)
    nearest, nearest_at = np.empty(m, dtype=np.int64), np.empty(m)
    for i in range(m):
        _find_nearest(distance, phases, size, i, nearest, nearest_at)
    for merged in range(m - 1):
        gone = int(np.argmin(nearest_at))
        kept = nearest[gone]
        height[kept] = max(nearest_at[gone], max(height[gone], height[kept]))
        pairs[merged, 0], pairs[merged, 1], heights[merged] = gone, kept, height[kept]
        _join(distance, phases, size, gone, kept)
        nearest_at[gone] = np.inf
        for i in range(kept + 1):
            if size[i] == 0:
                continue
            if i == kept or nearest[i] == gone or nearest[i] == kept:
                _find_nearest(distance, phases, size, i, nearest, nearest_at)
            elif _effective(distance, phases, i, kept) < nearest_at[i]:
                nearest[i], nearest_at[i] = kept, _effective(distance, phases, i, kept)
    return pairs, heights


@numba.njit(cache=True)
def _effective(distance: np.ndarray, phases: np.ndarray, i: int, j: int) -> float:
    return distance[i, j] + PHASE * phases[i, j]


@numba.njit(cache=True)
def _find_nearest(
    distance: np.ndarray,
    phases: np.ndarray,
    size: np.ndarray,
    i: int,
    nearest: np.ndarray,
    nearest_at: np.ndarray,
) -> None:
    """Find the nearest cluster after `i`, since each pair is recorded at the first of its two clusters."""
    nearest[i], nearest_at[i] = i, np.inf
    for j in range(i + 1, size.size):
        if size[j] > 0:
            value = _effective(distance, phases, i, j)
            if value < nearest_at[i]:
                nearest[i], nearest_at[i] = j, value


@numba.njit(cache=True)
def _join(distance: np.ndarray, phases: np.ndarray, size: np.ndarray, gone: int, kept: int) -> None:
    total = size[gone] + size[kept]
    for i in range(size.size):
        if size[i] > 0 and i != gone and i != kept:
            mean = (size[gone] * distance[gone, i] + size[kept] * distance[kept, i]) / total
            distance[kept, i] = distance[i, kept] = mean
            phase = min(phases[gone, i], phases[kept, i])
            phases[kept, i] = phases[i, kept] = phase
    size[gone], size[kept] = 0.0, total
