"""2-means of every image's tokens: object or background.

Replays scikit-learn's KMeans(n_clusters=2, n_init=1) on Gram matrices: distances to a mean of tokens are sums
of inner products, so one matrix product per image replaces all passes over C channels (and the same matrix
serves the linkage).

    N images, T tokens of an image, C channels
"""

from __future__ import annotations

import numba
import numpy as np

MAX_ITERATIONS = 300
RELATIVE_TOLERANCE = 1e-4
NUM_CANDIDATES = 2
"""Defaults of scikit-learn's KMeans; 2 + int(log 2) candidates for the second start."""

NO_SPREAD = 1e-12
"""Mean squared distance to the mean token (unit vectors) up to which an image counts as constant."""


def two_means(gram: np.ndarray, seed: int, num_channels: int) -> np.ndarray:
    """Split each image's tokens in two clusters, as scikit-learn's KMeans(2, n_init=1, random_state=seed).

    gram: float64 [N, T, T], symmetric, inner products of L2-normalised tokens. num_channels: C, which
    scales scikit-learn's tolerance (mean variance per column; the recipe appends two columns of zeros).
    Returns uint8 [N, T] of 0 and 1. An image whose tokens are all alike has one cluster, all 0, which is
    what scikit-learn returns for it.
    """
    num_images, num_tokens, _ = gram.shape
    labels = np.zeros((num_images, num_tokens), dtype=np.uint8)
    random = np.random.RandomState(seed)
    first = int(random.choice(num_tokens, p=np.full(num_tokens, 1 / num_tokens)))
    draws = random.uniform(size=NUM_CANDIDATES)
    _split_images(gram, first, draws, num_channels + 2, labels)
    return labels


@numba.njit(cache=True, parallel=True)
def _split_images(
    gram: np.ndarray, first: int, draws: np.ndarray, num_columns: int, labels: np.ndarray
) -> None:
    for n in numba.prange(gram.shape[0]):
        _lloyd(gram[n], first, draws, num_columns, labels[n])


@numba.njit(cache=True)
def _squared_distances(gram: np.ndarray, token: int) -> np.ndarray:
    distances = np.empty(gram.shape[0])
    for i in range(gram.shape[0]):
        distances[i] = max(0.0, gram[i, i] + gram[token, token] - 2.0 * gram[token, i])
    return distances


@numba.njit(cache=True)
def _second_start(gram: np.ndarray, first: int, draws: np.ndarray) -> int:
    """k-means++: of a few tokens drawn by squared distance, the one that leaves the least inertia."""
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
    """Nearest centre of each token, the first on a tie. dots [2, T]: token · centre. squares: ‖centre‖²."""
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
    summed = np.full(num_tokens, 2, dtype=np.uint8)  # cluster each token is counted in; 2: none yet
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
    """Move only the tokens that changed cluster: after the first iterations they are few."""
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
    for i in range(row.size):  # a loop: the array expression would allocate
        total[i] += sign * row[i]


@numba.njit(cache=True)
def _move_centres(
    labels: np.ndarray, sums: np.ndarray, counts: np.ndarray, dots: np.ndarray, squares: np.ndarray
) -> float:
    """Put both centres at their cluster's mean; returns the sum of their squared shifts."""
    new_squares, crossed = np.zeros(2), np.zeros(2)
    for i in range(labels.size):
        k = labels[i]
        new_squares[k] += sums[k, i]
        crossed[k] += dots[k, i]  # old centre · tokens of the new cluster
    shift = 0.0
    for k in range(2):
        new_squares[k] /= counts[k] ** 2
        shift += max(0.0, new_squares[k] + squares[k] - 2.0 * crossed[k] / counts[k])
        squares[k] = new_squares[k]
        dots[k] = sums[k] / counts[k]
    return shift
