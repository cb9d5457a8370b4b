"""k-means of a data set's tokens: prototypes from one of three engines behind one function.

M tokens of a data set, K prototypes, C channels
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch.nn import functional as F

from hierarchy_builder.config import VocabularyConfig
from hierarchy_builder.errors import BuilderError, UsageError


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
