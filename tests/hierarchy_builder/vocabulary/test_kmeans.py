"""k-means of a data set against scikit-learn, closed forms and itself: any split, thread, interruption and engine."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from hierarchy_builder.config import VocabularyConfig
from hierarchy_builder.errors import BuilderError, UsageError
from hierarchy_builder.vocabulary.kmeans import (
    FARTHEST_TOKENS,
    ClusterSums,
    first_centroids,
    fit_prototypes,
    lloyd,
    nearest_prototype,
    plus_plus,
    start_rows,
    sum_clusters,
)

BACKENDS = [
    "torch",
    pytest.param("faiss", marks=pytest.mark.skipif(not importlib.util.find_spec("faiss"), reason="no faiss")),
    pytest.param(
        "cuml", marks=pytest.mark.skipif(not importlib.util.find_spec("cuml"), reason="cuml is not installed")
    ),
]


def blobs(num_tokens: int = 3000, num_clusters: int = 12, num_channels: int = 16) -> np.ndarray:
    random = np.random.default_rng(3)
    centres = 4 * random.normal(size=(num_clusters, num_channels))
    member = random.integers(num_clusters, size=num_tokens)
    return (centres[member] + random.normal(size=(num_tokens, num_channels))).astype(np.float32)


def cloud() -> np.ndarray:
    """Tokens without clusters: many iterations to convergence, and no minimum much better than another."""
    return np.random.default_rng(5).normal(size=(5000, 16)).astype(np.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inertia_is_as_low_as_scikit_learn(backend: str) -> None:
    tokens = blobs()
    found = fit_prototypes(tokens, VocabularyConfig(sizes=(12,), iterations=30, backend=backend))
    assert found.centroids.shape == (12, 16)
    assert found.centroids.dtype == np.float32
    nearest, distances = nearest_prototype(tokens, found.centroids)
    np.testing.assert_allclose(found.inertia[-1], distances.sum(), rtol=1e-5)
    np.testing.assert_array_equal(found.counts, np.bincount(nearest, minlength=12))
    single_starts = [
        KMeans(12, n_init=1, init="random", random_state=seed).fit(tokens).inertia_ for seed in range(10)
    ]
    assert found.inertia[-1] <= max(single_starts)


def test_engines_agree_within_one_per_cent() -> None:
    pytest.importorskip("faiss")
    tokens = cloud()
    ours, faiss = (
        fit_prototypes(tokens, VocabularyConfig(sizes=(20,), backend=backend)).inertia[-1]
        for backend in ("torch", "faiss")
    )
    assert ours <= 1.01 * faiss


def test_iterations_equal_scikit_learn() -> None:
    tokens = cloud()
    start = tokens[:8]
    ours = lloyd(lambda centroids: [sum_clusters(tokens, centroids)], start, 5)
    theirs = KMeans(8, init=start, n_init=1, max_iter=5, tol=0, algorithm="lloyd").fit(tokens)
    np.testing.assert_allclose(ours.centroids, theirs.cluster_centers_, atol=1e-5)
    np.testing.assert_allclose(ours.inertia[-1], theirs.inertia_, rtol=1e-6)
    assert len(ours.inertia) == 6  # after 0 to 5 moves


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_the_same_seed_gives_the_same_bits(backend: str) -> None:
    if backend == "faiss":
        pytest.importorskip("faiss")
    tokens = blobs()
    first, second, other = (
        fit_prototypes(tokens, VocabularyConfig(sizes=(8,), iterations=5, seed=seed, backend=backend))
        for seed in (4, 4, 5)
    )
    np.testing.assert_array_equal(first.centroids, second.centroids)
    assert first.inertia == second.inertia
    assert not np.array_equal(first.centroids, other.centroids)


def test_inertia_never_rises_and_ends_at_a_fixed_point() -> None:
    tokens = blobs()
    found = fit_prototypes(tokens, VocabularyConfig(sizes=(12,), iterations=200))
    assert len(found.inertia) < 200
    assert all(
        later <= earlier * (1 + 1e-6)
        for earlier, later in zip(found.inertia, found.inertia[1:], strict=False)
    )
    nearest, _ = nearest_prototype(tokens, found.centroids)
    means = np.stack([tokens[nearest == k].mean(axis=0, dtype=np.float64) for k in range(12)])
    np.testing.assert_allclose(found.centroids, means, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 400), max_size=4), seed=st.integers(0, 9))
def test_any_split_of_stored_tokens_gives_the_same_sums(cuts: list[int], seed: int) -> None:
    """Sums of float16 are exact: however tokens are cut into parts, and in whichever order these are added."""
    random = np.random.default_rng(seed)
    centroids = random.normal(size=(7, 5)) * 10.0 ** np.arange(-2, 5)[:, None]
    member = random.integers(7, size=400)
    tokens = (centroids[member] * random.normal(1, 1e-2, (400, 5))).astype(np.float16)
    centroids = centroids.astype(np.float32)
    whole = sum_clusters(tokens, centroids)
    parts = [sum_clusters(part, centroids) for part in np.split(tokens, sorted(cuts)) if len(part)]
    random.shuffle(parts)  # type: ignore[arg-type]
    total, *others = parts
    for part in others:
        total.add(part)
    np.testing.assert_array_equal(total.sums, whole.sums)
    np.testing.assert_array_equal(total.counts, whole.counts)
    np.testing.assert_allclose(total.far_distances, whole.far_distances, rtol=1e-5)
    np.testing.assert_allclose(total.inertia, whole.inertia, rtol=1e-5)  # float32, rounded by the company


def test_sums_do_not_depend_on_threads() -> None:
    tokens = blobs(num_tokens=20_000, num_channels=4)
    one, three = (sum_clusters(tokens, tokens[:5], threads=threads) for threads in (1, 3))
    np.testing.assert_array_equal(one.sums, three.sums)
    assert one.inertia == three.inertia


def test_weighted_token_equals_repeated_tokens() -> None:
    tokens, weights = blobs(200), np.random.default_rng(0).integers(0, 5, 200)
    weighted = sum_clusters(tokens, tokens[:6], weights=weights)
    repeated = sum_clusters(np.repeat(tokens, weights, axis=0), tokens[:6])
    np.testing.assert_allclose(weighted.sums, repeated.sums, rtol=1e-12)
    np.testing.assert_array_equal(weighted.counts, repeated.counts)
    np.testing.assert_allclose(weighted.inertia, repeated.inertia, rtol=1e-9)


def test_empty_clusters_take_the_farthest_tokens() -> None:
    """Three centroids on one spot: the second and third are empty at once."""
    tokens = np.array([[0.0], [0.0], [1.0], [5.0], [9.0]], dtype=np.float32)
    centroids = np.zeros((3, 1), dtype=np.float32)
    assert sum_clusters(tokens, centroids).moved(centroids).tolist() == [[3.0], [9.0], [5.0]]


def test_surplus_empty_clusters_stay() -> None:
    tokens = np.arange(200, dtype=np.float32)[:, None]
    centroids = np.full((100, 1), -7, dtype=np.float32)
    moved = sum_clusters(tokens, centroids).moved(centroids)
    assert (moved == -7).sum() == 99 - FARTHEST_TOKENS


def test_resumed_fit_gives_the_same_bits() -> None:
    tokens = blobs()
    whole = lloyd(lambda centroids: [sum_clusters(tokens, centroids)], tokens[:9], 6)
    saved: list[tuple[np.ndarray, list[float]]] = []

    def stop(centroids: np.ndarray, inertia: list[float]) -> None:
        saved.append((centroids, list(inertia)))
        if len(saved) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lloyd(lambda centroids: [sum_clusters(tokens, centroids)], tokens[:9], 6, after_move=stop)
    centroids, inertia = saved[-1]
    rest = lloyd(lambda centroids: [sum_clusters(tokens, centroids)], centroids, 6, inertia=inertia)
    np.testing.assert_array_equal(rest.centroids, whole.centroids)
    assert rest.inertia == whole.inertia


def test_sums_of_other_processes_need_not_be_writable() -> None:
    """Ray gives arrays that share its memory and are read-only."""
    tokens = blobs()

    def assess(centroids: np.ndarray) -> list[ClusterSums]:
        parts = [sum_clusters(part, centroids) for part in np.array_split(tokens, 3)]
        for part in parts:
            part.sums.flags.writeable = part.counts.flags.writeable = False
        return parts

    found = lloyd(assess, tokens[:5], 3)
    np.testing.assert_array_equal(found.counts.sum(), len(tokens))


def test_second_start_is_drawn_by_squared_distance() -> None:
    """Points 0, 1 and 3, two starts: P(left out) in closed form, within 4 standard deviations of 3,000 draws."""
    points = np.array([[0.0], [1.0], [3.0]], dtype=np.float32)
    expected = np.array([4 / 5 + 4 / 13, 9 / 10 + 9 / 13, 1 / 10 + 1 / 5]) / 3
    left_out = np.zeros(3)
    for seed in range(3000):
        chosen = plus_plus(points, 2, np.random.default_rng(seed))[:, 0]
        left_out[[0.0, 1.0, 3.0].index(next(p for p in (0.0, 1.0, 3.0) if p not in chosen))] += 1
    assert np.abs(left_out / 3000 - expected).max() < 4 * 0.5 / np.sqrt(3000)


def test_batched_candidates_are_distributed_as_single_ones() -> None:
    """Of 20 pairs of close points, 20 starts take one each: twice the same pair has probability 1e-8."""
    ends = np.random.default_rng(1).permutation(20)[:, None] * 100.0
    points = np.concatenate([ends, ends + 0.01]).astype(np.float32)
    for seed in range(30):
        chosen = plus_plus(points, 20, np.random.default_rng(seed))
        assert len(np.unique(np.rint(chosen))) == 20


def test_tokens_of_weight_zero_are_never_starts() -> None:
    tokens, weights = np.arange(30, dtype=np.float32)[:, None], np.repeat([0, 3, 0], 10)
    for seed in range(20):
        chosen = plus_plus(tokens, 5, np.random.default_rng(seed), weights)
        assert len(np.unique(chosen)) == 5
        assert 10 <= chosen.min() <= chosen.max() < 20


def test_starts_come_from_a_bounded_sample() -> None:
    config = VocabularyConfig(sizes=(3,))
    rows = start_rows(1000, config)
    assert len(np.unique(rows)) == 96
    assert rows.min() >= 0
    assert rows.max() < 1000
    assert start_rows(50, config).tolist() == list(range(50))
    tokens = blobs(1000)
    starts = first_centroids(tokens[rows], config)
    assert {tuple(row) for row in starts.tolist()} <= {tuple(row) for row in tokens[rows].tolist()}


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_as_many_prototypes_as_tokens(backend: str) -> None:
    if backend == "faiss":
        pytest.importorskip("faiss")
    tokens = np.arange(12, dtype=np.float32).reshape(6, 2)
    found = fit_prototypes(tokens, VocabularyConfig(sizes=(6,), backend=backend))
    assert sorted(found.centroids.tolist()) == tokens.tolist()


def test_equal_tokens_keep_surplus_prototypes_in_place() -> None:
    tokens = np.repeat(np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32), 10, axis=0)
    found = fit_prototypes(tokens, VocabularyConfig(sizes=(5,)))
    assert {tuple(row) for row in found.centroids.tolist()} == {(1.0, 2.0), (3.0, 4.0)}
    assert found.inertia[-1] == 0
    assert found.counts.sum() == 20


def test_faiss_uses_every_token_and_restores_its_threads() -> None:
    faiss = pytest.importorskip("faiss")
    tokens = blobs(num_tokens=3000, num_clusters=2)
    before = faiss.omp_get_max_threads()
    found = fit_prototypes(tokens, VocabularyConfig(sizes=(2,), iterations=30, backend="faiss"))
    assert faiss.omp_get_max_threads() == before
    nearest, _ = nearest_prototype(tokens, found.centroids)
    means = np.stack([tokens[nearest == k].mean(axis=0, dtype=np.float64) for k in range(2)])
    np.testing.assert_allclose(found.centroids, means, atol=1e-4)  # the default would sample 512 of 3000


def test_nearest_prototype_equals_brute_force() -> None:
    tokens = blobs(500)
    centroids = tokens[:40]
    brute = ((tokens[:, None].astype(np.float64) - centroids[None]) ** 2).sum(axis=-1)
    nearest, distances = nearest_prototype(tokens, centroids)
    assert (nearest.dtype, distances.dtype) == (np.int64, np.float64)
    np.testing.assert_array_equal(nearest, brute.argmin(axis=1))
    np.testing.assert_allclose(distances, brute.min(axis=1), atol=1e-10)
    np.testing.assert_array_equal(nearest[123:124], nearest_prototype(tokens[123:124], centroids)[0])
    assert nearest_prototype(np.zeros((0, 16), dtype=np.float32), centroids)[0].shape == (0,)


def test_fewer_tokens_than_prototypes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"sizes require 9 prototypes, but there are only 5 tokens"):
        fit_prototypes(np.zeros((5, 2), dtype=np.float32), VocabularyConfig(sizes=(2, 9)))


def test_nonfinite_tokens_are_refused() -> None:
    tokens = blobs(50)
    tokens[7, 3] = np.nan
    with pytest.raises(BuilderError, match="NaN or infinity"):
        fit_prototypes(tokens, VocabularyConfig(sizes=(3,)))
    with pytest.raises(BuilderError, match="NaN or infinity"):  # as the workers of a build meet them
        lloyd(lambda centroids: [sum_clusters(tokens, centroids)], tokens[:3], 4)


@pytest.mark.parametrize(("backend", "extra"), [("faiss", "faiss"), ("cuml", "gpu")])
def test_a_missing_library_names_the_extra(backend: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, backend, None)  # import fails
    with pytest.raises(BuilderError, match=rf"{backend}.*pip install .*\[{extra}\]"):
        fit_prototypes(blobs(50), VocabularyConfig(sizes=(3,), backend=backend))


@pytest.mark.parametrize("sizes", [(), (0, 4), (8, 8), (8, 4), (70_000,)])
def test_sizes_that_do_not_rise_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"sizes are .*, expected rising numbers .* for example 64,512,4096"):
        VocabularyConfig(sizes=sizes)
