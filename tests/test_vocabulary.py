"""Token samples that do not depend on blocks, part prototypes, and the stored vocabulary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hierarchy_builder.config import VocabularyConfig
from hierarchy_builder.errors import BuilderError
from hierarchy_builder.kmeans import Prototypes, fit_prototypes, nearest_prototype
from hierarchy_builder.vocabulary import (
    NO_REGION,
    load_vocabulary,
    part_prototypes,
    sample_tokens,
    save_vocabulary,
)


def features_and_regions(num_images: int = 20) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    features = random.normal(size=(num_images, 4, 5, 3)).astype(np.float16)
    features[..., 0] = np.arange(num_images)[:, None, None]  # marks the image a token is of
    return features, random.integers(0, 3, size=(num_images, 2, 4, 5)).astype(np.uint8)


def blocks(features: np.ndarray, regions: np.ndarray, size: int):
    return ((features[i : i + size], regions[i : i + size]) for i in range(0, len(features), size))


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 25), wanted=st.integers(1, 500), seed=st.integers(0, 99))
def test_sample_is_even_and_independent_of_blocks(size: int, wanted: int, seed: int) -> None:
    arrays = features_and_regions()
    config = VocabularyConfig(sampled_tokens=wanted, seed=seed)
    sample = sample_tokens(blocks(*arrays, size), 20, config)
    assert sample.dtype == np.float32
    assert len(sample) == min(wanted, 400)
    per_image = np.bincount(sample[:, 0].astype(int), minlength=20)
    assert per_image.max() - per_image.min() <= 1
    assert len(np.unique(sample, axis=0)) == len(sample)  # no token twice
    np.testing.assert_array_equal(sample, sample_tokens(blocks(*arrays, 20), 20, config))


def test_sample_refuses_another_number_of_images() -> None:
    with pytest.raises(BuilderError, match="blocks hold 20 images, expected 21"):
        sample_tokens(blocks(*features_and_regions(), 8), 21, VocabularyConfig())


def test_part_prototypes_are_nearest_to_region_means() -> None:
    features, regions = features_and_regions()
    centroids = np.random.default_rng(2).normal(size=(7, 3)).astype(np.float32) * 8
    regions[0, 1] = 2
    prototypes = part_prototypes(features, regions, centroids, level=1)
    assert prototypes.shape == (20, 256)
    assert prototypes.dtype == np.uint16
    for image in range(20):
        for region in range(256):
            inside = regions[image, 1] == region
            expected = NO_REGION
            if inside.any():
                mean = features[image][inside].mean(axis=0, dtype=np.float32)
                expected = nearest_prototype(mean[None], centroids)[0]
            assert prototypes[image, region] == expected


def test_part_prototypes_refuse_other_channels_and_levels() -> None:
    features, regions = features_and_regions()
    with pytest.raises(BuilderError, match="prototypes have 4 channels, features 3"):
        part_prototypes(features, regions, np.zeros((2, 4), dtype=np.float32))
    with pytest.raises(BuilderError, match="level is 2, expected 0 to 1"):
        part_prototypes(features, regions, np.zeros((2, 3), dtype=np.float32), level=2)


def test_write_then_read_is_identity(tmp_path: Path) -> None:
    config = VocabularyConfig(num_prototypes=5, iterations=4, backend="torch", seed=3)
    arrays = features_and_regions()
    fitted = fit_prototypes(sample_tokens(blocks(*arrays, 6), 20, config), config)
    save_vocabulary(tmp_path / "vocabulary.npz", fitted, config)
    assert [path.name for path in tmp_path.iterdir()] == ["vocabulary.npz"]
    read, read_config = load_vocabulary(tmp_path / "vocabulary.npz")
    np.testing.assert_array_equal(read.centroids, fitted.centroids)
    assert (read.inertia, read.backend, read_config) == (fitted.inertia, fitted.backend, config)


def test_damaged_missing_and_newer_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "vocabulary.npz"
    with pytest.raises(BuilderError, match=r"vocabulary .*vocabulary\.npz cannot be read"):
        load_vocabulary(path)
    prototypes = Prototypes(centroids=np.zeros((2, 3), dtype=np.float32), inertia=(1.0,), backend="torch")
    monkeypatch.setattr("hierarchy_builder.vocabulary.FORMAT_VERSION", 99)
    save_vocabulary(path, prototypes, VocabularyConfig())
    monkeypatch.undo()
    with pytest.raises(BuilderError, match="has format version 99"):
        load_vocabulary(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BuilderError, match="cannot be read"):
        load_vocabulary(path)
