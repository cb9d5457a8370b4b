"""The calls of k-means libraries for GPUs, against signatures read from the wheels that the extra `gpu` installs.

faiss-gpu 1.15.1 (`faiss/extra_wrappers.py`, `faiss/__init__.pyi`) and cuml-cu13 26.10.0 (`cuml/cluster/kmeans.pyx`). A
call that these do not take fails here, without a GPU; a library that is installed must still have what is recorded.
"""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hierarchy_builder.config import VocabularyConfig
from hierarchy_builder.errors import BuilderError
from hierarchy_builder.vocabulary.kmeans import fit_prototypes

CLUSTERING_PARAMETERS = {
    *("niter", "nredo", "verbose", "spherical", "int_centroids", "update_index", "frozen_centroids", "seed"),
    *("min_points_per_centroid", "max_points_per_centroid", "decode_block_size", "check_input_data_for_NaNs"),
    *("use_faster_subsampling", "init_method", "afkmc2_chain_length", "early_stop_threshold"),
    "use_super_kmeans",
}
"""Fields of faiss.ClusteringParameters, which faiss.Kmeans takes beside d, k, gpu and progressive_dim_steps."""


class FaissKmeans:
    """faiss.Kmeans as far as its arguments go: another field is an error, as there."""

    def __init__(self, d: int, k: int, **kwargs: Any) -> None:
        assert kwargs.keys() <= CLUSTERING_PARAMETERS | {"gpu", "progressive_dim_steps"}
        assert kwargs["gpu"] is True  # all GPUs
        self.d, self.k, self.niter = d, k, kwargs["niter"]
        self.most = kwargs["max_points_per_centroid"]

    def train(self, x: np.ndarray, weights: Any = None, init_centroids: Any = None) -> float:
        assert x.dtype == np.float32
        assert x.flags.c_contiguous
        assert len(x) <= self.most * self.k  # more would be sampled
        self.centroids, self.obj = x[: self.k], np.ones(self.niter, np.float32)
        return 1.0


class CumlKMeans:
    """cuml.cluster.KMeans as far as its arguments go."""

    def __init__(
        self,
        *,
        n_clusters: int = 8,
        max_iter: int = 300,
        tol: float = 1e-4,
        verbose: bool = False,
        random_state: int | None = None,
        init: Any = "scalable-k-means++",
        n_init: Any = "auto",
        oversampling_factor: float = 2.0,
        max_samples_per_batch: int = 1 << 15,
        device_buffer_samples: int = 0,
        init_size: int = 0,
        output_type: str | None = None,
    ) -> None:
        self.n_clusters, self.output_type = n_clusters, output_type

    def fit(self, X: np.ndarray, y: Any = None, sample_weight: Any = None) -> CumlKMeans:
        assert X.dtype == np.float32
        assert self.output_type == "numpy"
        self.cluster_centers_ = X[: self.n_clusters]
        return self


def test_calls_are_what_the_wheels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    own: dict[str, Any] = {"get_num_gpus": lambda: 1, "omp_get_max_threads": lambda: 7}
    faiss = SimpleNamespace(Kmeans=FaissKmeans, omp_set_num_threads=threads.append, **own)
    monkeypatch.setitem(sys.modules, "faiss", faiss)  # type: ignore[arg-type]
    cuml = SimpleNamespace(cluster=SimpleNamespace(KMeans=CumlKMeans))
    monkeypatch.setitem(sys.modules, "cuml", cuml)  # type: ignore[arg-type]
    tokens = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float16)
    for backend in ("faiss", "cuml"):
        found = fit_prototypes(tokens, VocabularyConfig(sizes=(2, 5), iterations=3, backend=backend))
        np.testing.assert_array_equal(found.centroids, tokens[:5].astype(np.float32))
        assert len(found.inertia) == (4 if backend == "faiss" else 1)
    assert threads == [7]  # with a GPU, the sums of faiss keep all threads of the CPU


def test_cuml_without_a_gpu_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(self: CumlKMeans, X: np.ndarray) -> None:
        raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient\nat 0x7f")

    monkeypatch.setattr(CumlKMeans, "fit", fit)
    cuml = SimpleNamespace(cluster=SimpleNamespace(KMeans=CumlKMeans))
    monkeypatch.setitem(sys.modules, "cuml", cuml)  # type: ignore[arg-type]
    with pytest.raises(
        BuilderError, match=r"'cuml' cannot use a GPU here \(cudaError.* insufficient\): choose backend"
    ):
        fit_prototypes(np.eye(4, dtype=np.float32), VocabularyConfig(sizes=(2,), backend="cuml"))


def test_an_installed_faiss_has_what_is_recorded() -> None:
    faiss = pytest.importorskip("faiss")
    fields = {name for name in dir(faiss.ClusteringParameters) if not name.startswith("_")}
    assert {"niter", "seed", "min_points_per_centroid", "max_points_per_centroid"} <= fields
    for name in ("__init__", "train"):
        recorded, found = (inspect.signature(getattr(owner, name)) for owner in (FaissKmeans, faiss.Kmeans))
        assert [*recorded.parameters] == [*found.parameters]
    if faiss.__version__ == "1.15.1":
        assert fields - {"this", "thisown"} == CLUSTERING_PARAMETERS


def test_an_installed_cuml_has_what_is_recorded() -> None:
    cuml = pytest.importorskip("cuml")
    found = inspect.signature(cuml.cluster.KMeans.__init__).parameters
    assert {"n_clusters", "max_iter", "tol", "random_state", "n_init", "output_type"} <= {*found}
