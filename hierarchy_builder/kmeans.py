"""k-means twice: 2-means of every image's tokens (object or background), and prototypes of a data set.

2-means replays scikit-learn's KMeans(n_clusters=2, n_init=1) on Gram matrices: distances to a mean of
tokens are sums of inner products, so one matrix product per image replaces all passes over C channels
(and the same matrix serves the linkage). Prototypes come from one of three engines behind one function.

    N images, T tokens of an image, M tokens of a data set, K prototypes, C channels
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numba
import numpy as np
import torch
from torch.nn import functional as F

from hierarchy_builder.config import VocabularyConfig
from hierarchy_builder.errors import BuilderError, UsageError

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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prototypes:
    """Centroids of a data set's tokens.

    centroids: float32 [K, C]. inertia: sum of squared distances after each iteration the engine reports
    (cuML reports the last one only). backend: the engine that found them.
    """

    centroids: np.ndarray
    inertia: tuple[float, ...]
    backend: str


def fit_prototypes(tokens: np.ndarray, config: VocabularyConfig) -> Prototypes:
    """Find `config.num_prototypes` centroids of `tokens` by k-means, the same ones for the same seed.

    tokens: float32 [M, C]. torch and faiss repeat bit for bit on the same machine; cuML promises less.
    Raises UsageError if there are fewer tokens than prototypes, BuilderError for tokens that are not finite
    and where the library of the chosen engine is missing.
    """
    tokens = np.ascontiguousarray(tokens, dtype=np.float32)
    if len(tokens) < config.num_prototypes:
        raise UsageError(
            f"num_prototypes is {config.num_prototypes}, but there are only {len(tokens)} tokens to fit them to: "
            "lower num_prototypes or sample more tokens"
        )
    if not np.isfinite(tokens).all():
        raise BuilderError("tokens hold NaN or infinity, expected finite numbers: leave those images out")
    backend = choose_backend() if config.backend == "auto" else config.backend
    centroids, inertia = _ENGINES[backend](tokens, config)
    return Prototypes(
        centroids=np.ascontiguousarray(centroids, dtype=np.float32), inertia=tuple(inertia), backend=backend
    )


def nearest_prototype(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Index of the centroid nearest to each vector (squared Euclidean distance; the first on a tie).

    vectors: float [M, C]. centroids: float32 [K, C]. Returns int64 [M]. Distances are float64, so that the
    answer does not depend on which vectors are asked about together.
    """
    table = torch.from_numpy(np.asarray(centroids, dtype=np.float64))
    rows = torch.from_numpy(np.asarray(vectors, dtype=np.float64))
    labels, _ = _assign_tokens(rows, table)
    return labels.numpy()


def choose_backend() -> str:
    """What `auto` stands for here: with CUDA cuML, else FAISS with GPUs, else torch; without CUDA FAISS, else torch."""
    has_faiss = importlib.util.find_spec("faiss") is not None
    if not torch.cuda.is_available():
        return "faiss" if has_faiss else "torch"
    if importlib.util.find_spec("cuml") is not None:
        return "cuml"
    return "faiss" if has_faiss and _library("faiss").get_num_gpus() > 0 else "torch"


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = {"faiss": "faiss", "cuml": "gpu"}[name]
        raise BuilderError(
            f"k-means backend {name!r} cannot be loaded ({error}): "
            f"pip install 'trajectory-hierarchies[{extra}]', or choose backend torch"
        ) from None


def _fit_faiss(tokens: np.ndarray, config: VocabularyConfig) -> tuple[np.ndarray, list[float]]:
    faiss = _library("faiss")
    threads = faiss.omp_get_max_threads()
    # Two threads were measured twice as slow as one (its OpenMP threads spin beside BLAS threads).
    faiss.omp_set_num_threads(1)
    try:
        kmeans = faiss.Kmeans(
            tokens.shape[1],
            config.num_prototypes,
            niter=config.iterations,
            seed=config.seed,
            gpu=faiss.get_num_gpus() > 0,
            max_points_per_centroid=len(tokens),  # otherwise faiss silently samples 256 tokens per centroid
            min_points_per_centroid=1,
        )
        kmeans.train(tokens)
    finally:
        faiss.omp_set_num_threads(threads)
    return kmeans.centroids, [float(value) for value in kmeans.obj]


def _fit_cuml(tokens: np.ndarray, config: VocabularyConfig) -> tuple[np.ndarray, list[float]]:
    kmeans = _library("cuml").cluster.KMeans(
        n_clusters=config.num_prototypes,
        max_iter=config.iterations,
        random_state=config.seed,
        n_init=1,
        tol=1e-12,  # practically none: run all iterations
        output_type="numpy",
    )
    kmeans.fit(tokens)
    return np.asarray(kmeans.cluster_centers_), [float(kmeans.inertia_)]


def _fit_torch(tokens: np.ndarray, config: VocabularyConfig) -> tuple[np.ndarray, list[float]]:
    """Lloyd's iterations from a k-means++ start on a sample of the tokens.

    An empty cluster takes the token farthest from its own centroid (several: the farthest ones in turn); its
    former cluster gives it up in the next iteration. Ends early when no token changes cluster.
    """
    rows = torch.from_numpy(tokens)
    if torch.cuda.is_available():
        rows = rows.cuda()
    centroids = _plus_plus(rows, config.num_prototypes, np.random.default_rng(config.seed))
    inertia: list[float] = []
    previous = None
    for _ in range(config.iterations):
        labels, distances = _assign_tokens(rows, centroids)
        inertia.append(float(distances.sum(dtype=torch.float64)))
        if previous is not None and torch.equal(labels, previous):
            break
        previous = labels
        centroids = _cluster_means(rows, labels, distances, centroids)
    return centroids.cpu().numpy(), inertia


_ENGINES: dict[str, Callable[[np.ndarray, VocabularyConfig], tuple[np.ndarray, list[float]]]] = {
    "torch": _fit_torch,
    "faiss": _fit_faiss,
    "cuml": _fit_cuml,
}


def _plus_plus(rows_MC: torch.Tensor, num_clusters: int, random: np.random.Generator) -> torch.Tensor:
    """k-means++ on a sample of 64 tokens per cluster (Arthur and Vassilvitskii 2007), float32 [K, C]."""
    num_sampled = min(len(rows_MC), 64 * num_clusters)
    chosen = np.sort(random.choice(len(rows_MC), num_sampled, replace=False))
    sample = rows_MC[torch.from_numpy(chosen).to(rows_MC.device)]
    norms = sample.square().sum(dim=1)
    starts = [int(random.integers(num_sampled))]
    closest = torch.full_like(norms, torch.inf)
    for draw in random.random(num_clusters - 1):
        last = sample[starts[-1]]
        closest = torch.minimum(closest, (norms + norms[starts[-1]] - 2 * (sample @ last)).clamp(min=0))
        closest[starts[-1]] = 0
        cumulative = closest.cpu().cumsum(0, dtype=torch.float64)  # on CUDA its bits change from run to run
        drawn = torch.searchsorted(cumulative, draw * cumulative[-1], right=True)
        starts.append(min(int(drawn), num_sampled - 1))
    return sample[torch.tensor(starts, device=sample.device)]


def _assign_tokens(rows_MC: torch.Tensor, centroids_KC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest centroid of each row, int64 [M], and the squared distance to it, [M]; memory is bounded."""
    half_squares = 0.5 * centroids_KC.square().sum(dim=1)
    labels, distances = [], []
    for chunk in rows_MC.split(_chunk_rows(len(centroids_KC))):
        closeness, label = torch.addmm(-half_squares, chunk, centroids_KC.T).max(dim=1)
        labels.append(label)
        distances.append((chunk.square().sum(dim=1) - 2 * closeness).clamp(min=0))
    if not labels:
        return torch.empty(0, dtype=torch.int64), torch.empty(0)
    return torch.cat(labels), torch.cat(distances)


def _cluster_means(
    rows_MC: torch.Tensor, labels: torch.Tensor, distances: torch.Tensor, centroids_KC: torch.Tensor
) -> torch.Tensor:
    num_clusters, num_channels = centroids_KC.shape
    sums = torch.zeros(num_clusters, num_channels, dtype=torch.float64, device=rows_MC.device)
    size = _chunk_rows(num_clusters)
    for chunk, label in zip(rows_MC.split(size), labels.split(size), strict=True):
        if sums.is_cuda:  # index_add_ would use atomics there, whose order changes from run to run
            sums += F.one_hot(label, num_clusters).double().T @ chunk.double()
        else:
            sums.index_add_(0, label, chunk.double())
    counts = torch.bincount(labels, minlength=num_clusters)
    means = (sums / counts.clamp(min=1)[:, None]).float()
    empty = torch.nonzero(counts == 0).flatten()
    if len(empty):
        farthest, token = distances.topk(min(len(empty), len(rows_MC)))
        means[empty] = torch.where(farthest[:, None] > 0, rows_MC[token], centroids_KC[empty])
    return means


def _chunk_rows(num_clusters: int) -> int:
    return min(8192, max(256, 2**24 // num_clusters))
