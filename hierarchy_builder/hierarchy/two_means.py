"""2-means clustering of the tokens of each image, to separate object and background.

It reproduces scikit-learn's KMeans(n_clusters=2, n_init=1) on Gram matrices. Distances to a mean of tokens are sums of
inner products, so one matrix product per image replaces all passes over C channels, and the linkage uses the same
matrix.

    N images, T tokens of an image, C channels
"""

from __future__ import annotations

import numba
import numpy as np

from hierarchy_builder.hierarchy.similarity import NO_SPREAD

MAX_ITERATIONS = 300
RELATIVE_TOLERANCE = 1e-4
NUM_CANDIDATES = 2
"""Defaults of scikit-learn's KMeans, with 2 + int(log 2) candidates for the second initial centre."""


def two_means(gram: np.ndarray, seed: int, num_channels: int, num_starts: int = 1) -> np.ndarray:
    """Split the tokens of each image in two clusters, as scikit-learn's KMeans(2, n_init=1, random_state=seed).

    gram: float64 [N, T, T], symmetric, inner products of L2-normalised tokens. num_channels: C, which scales the
    tolerance of scikit-learn (mean variance per column; the published recipe appends two columns of zeros).
    num_starts: number of random starts; the result of least inertia is kept, the first one on a tie. The first start
    does not depend on this number.
    Returns uint8 [N, T] of 0 and 1. As in scikit-learn, an image whose tokens are all equal has one cluster, all 0.
    """
    num_images, num_tokens, _ = gram.shape
    labels = np.zeros((num_images, num_tokens), dtype=np.uint8)
    random = np.random.RandomState(seed)
    firsts, draws = np.empty(num_starts, dtype=np.int64), np.empty((num_starts, NUM_CANDIDATES))
    for start in range(num_starts):
        firsts[start] = random.choice(num_tokens, p=np.full(num_tokens, 1 / num_tokens))
        draws[start] = random.uniform(size=NUM_CANDIDATES)
    _split_images(gram, firsts, draws, num_channels + 2, labels)
    return labels


@numba.njit(cache=True, nogil=True)
def inertia(gram: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Sum of squared distances of the tokens of each image to the mean of their cluster, [N].

    gram: float64 [N, T, T]. labels: uint8 [N, T] of 0 and 1.
    """
    found = np.empty(len(gram))
    for n in range(len(gram)):
        found[n] = _inertia_of(gram[n], labels[n])
    return found


@numba.njit(cache=True, nogil=True)
def _split_images(
    gram: np.ndarray, firsts: np.ndarray, draws: np.ndarray, num_columns: int, labels: np.ndarray
) -> None:
    for n in range(gram.shape[0]):
        _lloyd(gram[n], firsts[0], draws[0], num_columns, labels[n])
        least = _inertia_of(gram[n], labels[n]) if firsts.size > 1 else 0.0
        for start in range(1, firsts.size):
            other = np.zeros_like(labels[n])
            _lloyd(gram[n], firsts[start], draws[start], num_columns, other)
            inertia = _inertia_of(gram[n], other)
            if inertia < least:
                least = inertia
                labels[n] = other


@numba.njit(cache=True)
def _inertia_of(gram: np.ndarray, labels: np.ndarray) -> float:
    """Sum of squared distances of the tokens to the mean of their cluster."""
    sums, counts = np.zeros(2), np.zeros(2)
    for i in range(labels.size):
        counts[labels[i]] += 1
        for j in range(labels.size):
            if labels[i] == labels[j]:
                sums[labels[i]] += gram[i, j]
    return np.trace(gram) - (sums / np.maximum(counts, 1.0)).sum()


@numba.njit(cache=True)
def _squared_distances(gram: np.ndarray, token: int) -> np.ndarray:
    distances = np.empty(gram.shape[0])
    for i in range(gram.shape[0]):
        distances[i] = max(0.0, gram[i, i] + gram[token, token] - 2.0 * gram[token, i])
    return distances


@numba.njit(cache=True)
def _second_start(gram: np.ndarray, first: int, draws: np.ndarray) -> int:
    """k-means++: draw a few tokens in proportion to squared distance and take the one of least remaining inertia."""
    closest = _squared_distances(gram, first)
    cumulative = np.cumsum(closest)
    best, best_inertia = first, np.inf
    for draw in draws:
        drawn = np.searchsorted(cumulative, draw * cumulative[-1])
        candidate = min(drawn, closest.size - 1)
        inertia = np.minimum(closest, _squared_distances(gram, candidate)).sum()
        if inertia < best_inertia:
            best, best_inertia = candidate, inertia
    return best


@numba.njit(cache=True)
def _assign(dots: np.ndarray, squares: np.ndarray, labels: np.ndarray) -> bool:
    """Assign each token to its nearest centre, the first on a tie. dots [2, T]: token · centre. squares: ‖centre‖²."""
    changed = False
    for i in range(labels.size):
        label = np.uint8(squares[1] - 2.0 * dots[1, i] < squares[0] - 2.0 * dots[0, i])
        changed = changed or label != labels[i]
        labels[i] = label
    return changed


@numba.njit(cache=True)
def _lloyd(gram: np.ndarray, first: int, draws: np.ndarray, num_columns: int, labels: np.ndarray) -> None:
    num_tokens = labels.size
    second = _second_start(gram, first, draws)
    dots = np.empty((2, num_tokens))
    dots[0], dots[1] = gram[first], gram[second]
    squares = np.array([gram[first, first], gram[second, second]])
    sums = np.zeros((2, num_tokens))  # token · (sum of a cluster's tokens)
    counts = np.zeros(2)
    summed = np.full(num_tokens, 2, dtype=np.uint8)  # cluster whose sums include each token; 2 if none does
    for iteration in range(MAX_ITERATIONS):
        if not _assign(dots, squares, labels) and iteration > 0:
            return
        _update_sums(gram, labels, summed, sums, counts)
        spread = np.trace(gram) / num_tokens - sums.sum() / num_tokens**2
        if spread <= NO_SPREAD or counts.min() == 0:
            labels[:] = 0
            return
        if _move_centres(labels, sums, counts, dots, squares) <= RELATIVE_TOLERANCE * spread / num_columns:
            break
    _assign(dots, squares, labels)


@numba.njit(cache=True)
def _update_sums(
    gram: np.ndarray, labels: np.ndarray, summed: np.ndarray, sums: np.ndarray, counts: np.ndarray
) -> None:
    """Update sums and counts for the tokens that changed cluster, which are few after the first iterations."""
    for i in range(labels.size):
        old, new = summed[i], labels[i]
        if old != new:
            _add_row(sums[new], gram[i], 1.0)
            counts[new] += 1
            if old < 2:
                _add_row(sums[old], gram[i], -1.0)
                counts[old] -= 1
            summed[i] = new


@numba.njit(cache=True)
def _add_row(total: np.ndarray, row: np.ndarray, sign: float) -> None:
    for i in range(row.size):  # a loop, since an array expression would allocate memory
        total[i] += sign * row[i]


@numba.njit(cache=True)
def _move_centres(
    labels: np.ndarray, sums: np.ndarray, counts: np.ndarray, dots: np.ndarray, squares: np.ndarray
) -> float:
    """Move both centres to the means of their clusters and return the sum of their squared shifts."""
    new_squares, crossed = np.zeros(2), np.zeros(2)
    for i in range(labels.size):
        k = labels[i]
        new_squares[k] += sums[k, i]
        crossed[k] += dots[k, i]  # old centre · sum of the tokens of the new cluster
    shift = 0.0
    for k in range(2):
        new_squares[k] /= counts[k] ** 2
        shift += max(0.0, new_squares[k] + squares[k] - 2.0 * crossed[k] / counts[k])
        squares[k] = new_squares[k]
        dots[k] = sums[k] / counts[k]
    return shift
