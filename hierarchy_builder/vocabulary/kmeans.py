"""k-means clustering of the tokens of a data set: distributed Lloyd iterations, and library engines.

An iteration assigns tokens to their nearest centroid and sums each cluster. `sum_clusters` does this for a part of the
tokens, in any process; `lloyd` adds the sums of all parts in a fixed order and moves the centroids.

    M tokens of a data set, K prototypes, C channels
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import numpy as np
import torch

from hierarchy_builder.config import VocabularyConfig
from hierarchy_builder.errors import BuilderError, UsageError
from hierarchy_builder.machine.installing import install_extras
from hierarchy_builder.machine.transfers import as_tensor

SLAB_TOKENS = 8192
"""Tokens per float64 sum: sums of up to 8,192 float16 are exact in any order (2¹³ · 2¹⁶ = 2⁵³ · 2⁻²⁴)."""
CACHED_TOKENS = 1024
"""Tokens assigned at once on a CPU: 1,024 × 768 fit its cache, so that summing takes a tenth of the time."""
FARTHEST_TOKENS = 32
"""Tokens kept as new centroids of empty clusters; more empty clusters are refilled over several iterations."""
START_TOKENS = 131_072
"""Largest number of tokens that k-means++ chooses from; it takes 32 per prototype if that is fewer."""
CANDIDATES = 256
"""Largest number of candidates whose distances k-means++ computes at once."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prototypes:
    """Centroids of a data set's tokens.

    centroids: float32 [K, C]. counts: int64 [K], the tokens nearest to each. inertia: sum of squared distances of the
    tokens to their nearest centroid after 0, 1, 2, … Lloyd iterations, or as a library engine reports it; the last
    value belongs to `centroids`.
    """

    centroids: np.ndarray
    counts: np.ndarray
    inertia: tuple[float, ...]


@dataclass(kw_only=True, slots=True, eq=False)
class ClusterSums:
    """Sums over some tokens for one iteration.

    sums: float64 [K, C]. counts: int64 [K]. inertia: sum of squared distances. far_tokens: float32 [F, C] and
    far_distances: float32 [F], the tokens farthest from their centroid, farthest first; F ≤ FARTHEST_TOKENS.
    """

    sums: np.ndarray
    counts: np.ndarray
    inertia: float
    far_tokens: np.ndarray
    far_distances: np.ndarray

    def add(self, other: ClusterSums) -> None:
        """Add the sums over further tokens."""
        self.sums += other.sums
        self.counts += other.counts
        self.inertia += other.inertia
        distances = np.concatenate([self.far_distances, other.far_distances])
        farthest = np.argsort(-distances, kind="stable")[:FARTHEST_TOKENS]
        self.far_distances = distances[farthest]
        self.far_tokens = np.concatenate([self.far_tokens, other.far_tokens])[farthest]

    def moved(self, centroids: np.ndarray) -> np.ndarray:
        """Return the mean of each cluster, float32 [K, C].

        Empty clusters move to the tokens farthest from their own centroids, which then change cluster in the next
        iteration. Empty clusters beyond FARTHEST_TOKENS, or beyond the tokens that differ from their centroid, stay.
        """
        means = (self.sums / np.maximum(self.counts, 1)[:, None]).astype(np.float32)
        empty = np.flatnonzero(self.counts == 0)
        tokens = self.far_tokens[self.far_distances > 0][: len(empty)]
        means[empty] = centroids[empty]
        means[empty[: len(tokens)]] = tokens
        return means


def sum_clusters(
    tokens: np.ndarray, centroids: np.ndarray, *, weights: np.ndarray | None = None, threads: int = 1
) -> ClusterSums:
    """Assign tokens to their nearest centroid (the first on a tie) and sum each cluster, on CUDA if available.

    tokens: float16 or float32 [M, C]. centroids: float32 [K, C]. weights: int64 [M], how often each token counts.
    Distances are float32, sums float64. The result does not depend on `threads` and, for float16 tokens, not on the
    order of additions on a GPU.
    """
    table = as_tensor(centroids).to(_device())
    rows, shares = as_tensor(tokens), np.ones(len(tokens), np.int64) if weights is None else weights
    sums = torch.zeros(table.shape, dtype=torch.float64, device=table.device)
    counts = torch.zeros(len(table), dtype=torch.float64, device=table.device)
    distances = []
    with ThreadPoolExecutor(1 if table.is_cuda else threads) as pool:
        slabs = rows.split(SLAB_TOKENS), as_tensor(shares).split(SLAB_TOKENS)
        for slab_sums, slab_counts, slab_distances in pool.map(partial(_sum_slab, table), *slabs):
            sums += slab_sums
            counts += slab_counts
            distances.append(slab_distances.cpu().numpy())
    distance = np.concatenate(distances)
    farthest = np.argsort(-distance * (shares > 0), kind="stable")[:FARTHEST_TOKENS]
    return ClusterSums(
        sums=sums.cpu().numpy(),
        counts=counts.cpu().numpy().astype(np.int64),
        inertia=float((distance.astype(np.float64) * shares).sum()),
        far_tokens=tokens[farthest].astype(np.float32),
        far_distances=distance[farthest] * (shares[farthest] > 0),
    )


def lloyd(
    assess: Callable[[np.ndarray], Iterable[ClusterSums]],
    start: np.ndarray,
    iterations: int,
    *,
    inertia: Iterable[float] = (),
    after_move: Callable[[np.ndarray, list[float]], None] | None = None,
) -> Prototypes:
    """Move centroids to the means of their clusters, `iterations` times or until they no longer change.

    assess: returns the sums over all tokens for centroids float32 [K, C], in parts that are added in their order.
    start: float32 [K, C]; to resume a run, its centroids after `len(inertia)` iterations. after_move: called with
    centroids and inertia after each iteration, from which the fit can be resumed.
    Raises BuilderError if a distance is not finite. Source: Lloyd (1982).
    """
    centroids, history = start, list(inertia)
    while True:
        parts = iter(assess(centroids))
        total = copy.deepcopy(next(parts))  # arrays that come from another process are read-only
        for part in parts:
            total.add(part)
        if not math.isfinite(total.inertia):
            raise BuilderError("tokens hold NaN or infinity, expected finite numbers: leave those images out")
        history.append(total.inertia)
        moved = total.moved(centroids)
        if len(history) > iterations or np.array_equal(moved, centroids):
            return Prototypes(centroids=centroids, counts=total.counts, inertia=tuple(history))
        centroids = moved
        if after_move is not None:
            after_move(centroids, history)


def fit_prototypes(tokens: np.ndarray, config: VocabularyConfig, threads: int = 1) -> Prototypes:
    """Fit `config.num_prototypes` centroids to tokens in memory.

    tokens: float16 or float32 [M, C]; library engines make a float32 copy. With the same seed on the same machine,
    torch and faiss return the same bits; cuML does not guarantee that. threads: number of threads for engine torch.
    Raises UsageError if there are fewer tokens than prototypes, and BuilderError if tokens are not finite or the
    library of the chosen engine is missing.
    """
    check_tokens(len(tokens), config)
    if not np.isfinite(tokens).all():
        raise BuilderError("tokens hold NaN or infinity, expected finite numbers: leave those images out")
    if config.backend == "torch":
        start = first_centroids(tokens[start_rows(len(tokens), config)], config)
        return lloyd(
            lambda centroids: [sum_clusters(tokens, centroids, threads=threads)], start, config.iterations
        )
    fit = _fit_faiss if config.backend == "faiss" else _fit_cuml
    centroids, inertia = fit(np.ascontiguousarray(tokens, dtype=np.float32), config)
    total = sum_clusters(tokens, centroids)
    return Prototypes(centroids=centroids, counts=total.counts, inertia=(*inertia, total.inertia))


def check_tokens(num_tokens: int, config: VocabularyConfig) -> None:
    """Raise UsageError if there are fewer tokens than prototypes."""
    if num_tokens < config.num_prototypes:
        raise UsageError(
            f"sizes require {config.num_prototypes} prototypes, but there are only {num_tokens} tokens to fit them to: "
            "lower sizes, or raise sampled_tokens if the images have more tokens"
        )


def num_start_tokens(num_tokens: int, config: VocabularyConfig) -> int:
    """Number of tokens, out of `num_tokens`, that k-means++ chooses from."""
    return min(num_tokens, max(config.num_prototypes, min(32 * config.num_prototypes, START_TOKENS)))


def start_rows(num_tokens: int, config: VocabularyConfig) -> np.ndarray:
    """Indices of the tokens, out of `num_tokens`, that k-means++ chooses from: int64, ascending, uniformly drawn."""
    random = np.random.default_rng((config.seed, 0))
    return np.sort(random.choice(num_tokens, num_start_tokens(num_tokens, config), replace=False))


def first_centroids(tokens: np.ndarray, config: VocabularyConfig) -> np.ndarray:
    """Initial centroids for `lloyd`, float32 [K, C]: k-means++ on some of the tokens."""
    return plus_plus(tokens, config.num_prototypes, np.random.default_rng((config.seed, 1)))


def plus_plus(
    tokens: np.ndarray, num_clusters: int, random: np.random.Generator, weights: np.ndarray | None = None
) -> np.ndarray:
    """Choose tokens one after another with probability proportional to the squared distance from those chosen before.

    tokens: float [M, C]. weights: int64 [M], how often each token counts. Returns float32 [num_clusters, C]; if all
    tokens coincide with chosen ones, the first chosen token is repeated.
    Source: Arthur and Vassilvitskii (2007), k-means++. Many candidates are drawn at a time with the distances at that
    moment, and each is accepted with probability current distance / distance when drawn, which keeps the distribution.
    One matrix product then replaces many passes over the tokens: a quarter of the time for 4,096 clusters.
    """
    rows = as_tensor(tokens).to(_device()).float()
    shares = torch.ones(len(rows)) if weights is None else as_tensor(weights)
    shares, norms = shares.to(rows.device), rows.square().sum(dim=1)

    def draw(mass: torch.Tensor, count: int) -> torch.Tensor:
        heap = mass.double().cpu().cumsum(0)  # on the CPU, since CUDA sums differ from run to run
        found = torch.searchsorted(heap, torch.from_numpy(random.random(count)) * heap[-1], right=True)
        return found.clamp(max=len(rows) - 1).to(rows.device)

    def distances(token: torch.Tensor) -> torch.Tensor:
        return (norms[token, None] + norms - 2 * (rows[token] @ rows.T)).clamp(min=0)

    first = draw(shares, 1)
    chosen, closest = first.tolist(), distances(first)[0]
    closest[first] = 0
    while len(chosen) < num_clusters:
        if not (closest * shares).any():
            chosen += chosen[:1] * (num_clusters - len(chosen))
            break
        candidates = draw(closest * shares, min(CANDIDATES, 1 + len(chosen) // 4))
        then, now = closest[candidates].tolist(), distances(candidates)
        for row, (token, before) in enumerate(zip(candidates.tolist(), then, strict=True)):
            if random.random() * before < float(closest[token]) and len(chosen) < num_clusters:
                chosen.append(token)
                torch.minimum(closest, now[row], out=closest)
                closest[token] = 0
    return rows[torch.tensor(chosen, device=rows.device)].cpu().numpy()


def nearest_prototype(vectors: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of the centroid nearest to each vector (the first on a tie), and the squared Euclidean distance to it.

    vectors: float [M, C]. centroids: float32 [K, C]. Returns int64 [M] and float64 [M]. Distances are computed in
    float64, so that the result for a vector does not depend on the other vectors of the call.
    """
    table = as_tensor(np.asarray(centroids, dtype=np.float64))
    chunks = as_tensor(vectors).split(max(256, 2**22 // len(centroids)))
    found = [_assign(chunk.double(), table) for chunk in chunks]
    labels, distances = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    return labels, distances


def _fit_faiss(tokens: np.ndarray, config: VocabularyConfig) -> tuple[np.ndarray, list[float]]:
    faiss = _library("faiss")
    threads = faiss.omp_get_max_threads()
    on_gpu = faiss.get_num_gpus() > 0
    if not on_gpu:
        # Two threads were measured twice as slow as one: those of OpenMP compete with those of BLAS.
        faiss.omp_set_num_threads(1)
    try:
        kmeans = faiss.Kmeans(
            tokens.shape[1],
            config.num_prototypes,
            niter=config.iterations,
            seed=config.seed,
            gpu=on_gpu,
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
        tol=1e-12,  # never reached, so that all iterations run
        output_type="numpy",
    )
    try:
        kmeans.fit(tokens)
    except Exception as error:  # cupy, rmm and cuVS have errors of their own: no device, driver or memory
        if "cuda" not in str(error).lower():
            raise
        reason = str(error).partition("\n")[0][:200]
        raise BuilderError(
            f"k-means backend 'cuml' cannot use a GPU here ({reason}): choose backend torch"
        ) from None
    return np.asarray(kmeans.cluster_centers_, dtype=np.float32), []


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = {"faiss": "faiss", "cuml": "gpu"}[name]
        raise BuilderError(
            f"k-means backend {name!r} cannot be loaded ({error}): "
            f"{install_extras(extra)}, or choose backend torch"
        ) from None


def _sum_slab(
    table: torch.Tensor, slab: torch.Tensor, shares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums and counts of each cluster over one slab of tokens, float64, and squared distances of tokens, float32."""
    sums = torch.zeros(table.shape, dtype=torch.float64, device=table.device)
    counts = torch.zeros(len(table), dtype=torch.float64, device=table.device)
    distances = []
    step = SLAB_TOKENS if table.is_cuda else CACHED_TOKENS
    for some, share in zip(slab.split(step), shares.split(step), strict=True):
        rows, weight = some.to(table.device).float(), share.to(table.device, torch.float64)
        label, distance = _assign(rows, table)
        sums.index_add_(0, label, rows.double().mul_(weight[:, None]))
        counts.index_add_(0, label, weight)
        distances.append(distance)
    return sums, counts, torch.cat(distances)


def _assign(rows_MC: torch.Tensor, table_KC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest centroid of each row, int64 [M], and the squared distance to it, [M]."""
    closeness, label = torch.addmm(-0.5 * table_KC.square().sum(dim=1), rows_MC, table_KC.T).max(dim=1)
    return label, (rows_MC.square().sum(dim=1) - 2 * closeness).clamp(min=0)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
