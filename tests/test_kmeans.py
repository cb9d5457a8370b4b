"""2-means against scikit-learn, and data set k-means on every engine at hand."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
from sklearn.cluster import KMeans

from hierarchy_builder import kmeans
from hierarchy_builder.config import VocabularyConfig
from hierarchy_builder.errors import BuilderError, UsageError
from hierarchy_builder.kmeans import choose_backend, fit_prototypes, nearest_prototype

BACKENDS = [
    "torch",
    pytest.param("faiss", marks=pytest.mark.skipif(not importlib.util.find_spec("faiss"), reason="no faiss")),
    pytest.param(
        "cuml", marks=pytest.mark.skipif(not importlib.util.find_spec("cuml"), reason="cuml is not installed")
    ),
]


def blobs(
    num_tokens: int = 3000, num_clusters: int = 12, num_channels: int = 16
) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    centres = 4 * random.normal(size=(num_clusters, num_channels))
    member = random.integers(num_clusters, size=num_tokens)
    return (centres[member] + random.normal(size=(num_tokens, num_channels))).astype(np.float32), member


@pytest.mark.parametrize("backend", BACKENDS)
def test_prototypes_are_as_good_as_scikit_learns(backend: str) -> None:
    tokens, _ = blobs()
    config = VocabularyConfig(num_prototypes=12, iterations=30, backend=backend)
    found = fit_prototypes(tokens, config)
    assert found.backend == backend
    assert found.centroids.shape == (12, 16)
    assert found.centroids.dtype == np.float32
    nearest = nearest_prototype(tokens, found.centroids)
    inertia = ((tokens - found.centroids[nearest]) ** 2).sum()
    np.testing.assert_allclose(found.inertia[-1], inertia, rtol=0.02)  # measured before the last move
    single_starts = [
        KMeans(12, n_init=1, init="random", random_state=seed).fit(tokens).inertia_ for seed in range(10)
    ]
    assert inertia <= max(single_starts)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_the_same_seed_gives_the_same_bits(backend: str) -> None:
    if backend == "faiss":
        pytest.importorskip("faiss")
    tokens, _ = blobs()
    first, second, other = (
        fit_prototypes(tokens, VocabularyConfig(num_prototypes=8, iterations=5, seed=seed, backend=backend))
        for seed in (4, 4, 5)
    )
    np.testing.assert_array_equal(first.centroids, second.centroids)
    assert first.inertia == second.inertia
    assert not np.array_equal(first.centroids, other.centroids)


def test_torch_inertia_never_rises_and_ends_at_a_fixed_point() -> None:
    tokens, _ = blobs()
    found = fit_prototypes(tokens, VocabularyConfig(num_prototypes=12, iterations=200, backend="torch"))
    assert len(found.inertia) < 200
    assert all(
        later <= earlier * (1 + 1e-6)
        for earlier, later in zip(found.inertia, found.inertia[1:], strict=False)
    )
    nearest = nearest_prototype(tokens, found.centroids)
    means = np.stack([tokens[nearest == k].mean(axis=0, dtype=np.float64) for k in range(12)])
    np.testing.assert_allclose(found.centroids, means, atol=1e-5)


def test_torch_refills_empty_clusters() -> None:
    """Two centroids on one spot: the second is empty at once and moves to the farthest token."""
    tokens = np.array([[0.0], [0.0], [1.0], [9.0]], dtype=np.float32)
    rows, centroids = (kmeans.torch.tensor(values) for values in (tokens, [[0.0], [0.0]]))
    labels, distances = kmeans._assign_tokens(rows, centroids)
    means = kmeans._cluster_means(rows, labels, distances, centroids)
    assert means.tolist() == [[2.5], [9.0]]


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_as_many_prototypes_as_tokens(backend: str) -> None:
    if backend == "faiss":
        pytest.importorskip("faiss")
    tokens = np.arange(12, dtype=np.float32).reshape(6, 2)
    found = fit_prototypes(tokens, VocabularyConfig(num_prototypes=6, backend=backend))
    assert sorted(found.centroids.tolist()) == tokens.tolist()


def test_equal_tokens_leave_spare_prototypes_in_place() -> None:
    tokens = np.repeat(np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32), 10, axis=0)
    found = fit_prototypes(tokens, VocabularyConfig(num_prototypes=5, backend="torch"))
    assert {tuple(row) for row in found.centroids.tolist()} == {(1.0, 2.0), (3.0, 4.0)}
    assert found.inertia[-1] == 0


def test_faiss_uses_every_token_and_restores_its_threads() -> None:
    faiss = pytest.importorskip("faiss")
    tokens, _ = blobs(num_tokens=3000, num_clusters=2)
    before = faiss.omp_get_max_threads()
    found = fit_prototypes(tokens, VocabularyConfig(num_prototypes=2, iterations=30, backend="faiss"))
    assert faiss.omp_get_max_threads() == before
    nearest = nearest_prototype(tokens, found.centroids)
    means = np.stack([tokens[nearest == k].mean(axis=0, dtype=np.float64) for k in range(2)])
    np.testing.assert_allclose(found.centroids, means, atol=1e-4)  # the default would sample 512 of 3000


def test_nearest_prototype_against_brute_force() -> None:
    tokens, _ = blobs(500)
    centroids = tokens[:40]
    brute = ((tokens[:, None].astype(np.float64) - centroids[None]) ** 2).sum(axis=-1).argmin(axis=1)
    nearest = nearest_prototype(tokens, centroids)
    assert nearest.dtype == np.int64
    np.testing.assert_array_equal(nearest, brute)
    np.testing.assert_array_equal(nearest[123:124], nearest_prototype(tokens[123:124], centroids))
    assert nearest_prototype(np.zeros((0, 16), dtype=np.float32), centroids).shape == (0,)


def test_too_few_tokens_are_named() -> None:
    with pytest.raises(UsageError, match=r"num_prototypes is 9, but there are only 5 tokens"):
        fit_prototypes(np.zeros((5, 2), dtype=np.float32), VocabularyConfig(num_prototypes=9))


def test_nonfinite_tokens_are_refused() -> None:
    tokens, _ = blobs(50)
    tokens[7, 3] = np.nan
    with pytest.raises(BuilderError, match="NaN or infinity"):
        fit_prototypes(tokens, VocabularyConfig(num_prototypes=3, backend="torch"))


@pytest.mark.parametrize(("backend", "extra"), [("faiss", "faiss"), ("cuml", "gpu")])
def test_a_missing_library_names_the_extra(backend: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, backend, None)  # import fails
    with pytest.raises(BuilderError, match=rf"{backend}.*trajectory-hierarchies\[{extra}\]"):
        fit_prototypes(blobs(50)[0], VocabularyConfig(num_prototypes=3, backend=backend))


@pytest.mark.parametrize(
    ("cuda", "installed", "expected"),
    [
        (False, {"faiss", "cuml"}, "faiss"),
        (False, set(), "torch"),
        (True, {"faiss", "cuml"}, "cuml"),
        (True, set(), "torch"),
    ],
)
def test_auto(cuda: bool, installed: set[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans.torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(kmeans.importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert choose_backend() == expected
