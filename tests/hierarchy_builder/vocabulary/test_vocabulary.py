"""Token draws that do not depend on blocks, nested prototypes, parts linked to them, and the stored vocabulary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hierarchy_builder.config import VocabularyConfig
from hierarchy_builder.errors import BuilderError
from hierarchy_builder.vocabulary.kmeans import fit_prototypes, nearest_prototype
from hierarchy_builder.vocabulary.prototypes import (
    NO_REGION,
    Vocabulary,
    draw_tokens,
    load_vocabulary,
    nest_prototypes,
    part_prototypes,
    save_vocabulary,
    token_shares,
)

CONFIG = VocabularyConfig(sizes=(3, 10, 40), iterations=8, seed=3)


def features_and_regions(num_images: int = 20) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    features = random.normal(size=(num_images, 4, 5, 3)).astype(np.float16)
    features[..., 0] = np.arange(num_images)[:, None, None]  # marks the image a token is of
    return features, random.integers(0, 3, size=(num_images, 2, 4, 5)).astype(np.uint8)


@pytest.fixture(scope="module")
def fitted() -> Vocabulary:
    tokens = np.random.default_rng(0).normal(size=(2000, 6)).astype(np.float16)
    return nest_prototypes(fit_prototypes(tokens, CONFIG), CONFIG)


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 25), wanted=st.integers(1, 400), seed=st.integers(0, 99))
def test_draw_is_even_and_independent_of_blocks(size: int, wanted: int, seed: int) -> None:
    features, _ = features_and_regions()
    shares = token_shares(20, wanted)
    assert shares.sum() == wanted
    whole = draw_tokens(features, range(20), shares, seed)
    assert whole.dtype == np.float16
    np.testing.assert_array_equal(np.bincount(whole[:, 0].astype(int), minlength=20), shares)
    assert shares.max() - shares.min() <= 1
    assert len(np.unique(whole, axis=0)) == wanted  # no token twice
    blocks = [slice(start, start + size) for start in range(0, 20, size)]
    parts = [draw_tokens(features[some], range(20)[some], shares[some], seed) for some in blocks]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_nothing_is_drawn_from_images_without_a_share() -> None:
    features, _ = features_and_regions(3)
    assert draw_tokens(features, range(3), [0, 0, 0], 0).shape == (0, 3)
    assert token_shares(0, 0).shape == (0,)


def test_each_prototype_has_a_parent(fitted: Vocabulary) -> None:
    assert fitted.sizes == (3, 10, 40)
    assert fitted.counts[-1].sum() == 2000
    for level, parents in enumerate(fitted.parents):
        coarse, fine = fitted.centroids[level : level + 2]
        assert parents.dtype == np.uint16
        np.testing.assert_array_equal(parents, nearest_prototype(fine, coarse)[0])
        assert len(np.unique(parents)) == len(coarse)
        weights = fitted.counts[level + 1]
        np.testing.assert_array_equal(np.bincount(parents, weights, len(coarse)), fitted.counts[level])
        for prototype, centroid in enumerate(coarse):  # converged: the mean of the children, by their tokens
            mine = parents == prototype
            np.testing.assert_allclose(
                centroid, np.average(fine[mine], axis=0, weights=weights[mine]), atol=1e-5
            )


def test_coarse_prototypes_are_about_as_good_as_ones_fitted_to_tokens(fitted: Vocabulary) -> None:
    """Sums of squares split: tokens about the coarse mean = about the fine one + between them."""
    tokens = np.random.default_rng(0).normal(size=(2000, 6)).astype(np.float16)
    direct = fit_prototypes(tokens, VocabularyConfig(sizes=(10,), iterations=8)).inertia[-1]
    assert nearest_prototype(tokens, fitted.centroids[1])[1].sum() < 1.1 * direct


def test_climb_maps_ids_to_their_ancestors(fitted: Vocabulary) -> None:
    ids = np.array([[0, 39], [17, NO_REGION]], dtype=np.uint16)
    np.testing.assert_array_equal(fitted.climb(ids, 2), ids)
    up = fitted.parents[1]
    np.testing.assert_array_equal(fitted.climb(ids, 1), [[up[0], up[39]], [up[17], NO_REGION]])
    top = fitted.parents[0][up]
    np.testing.assert_array_equal(fitted.climb(ids, 0), [[top[0], top[39]], [top[17], NO_REGION]])


def test_one_level_has_no_parents() -> None:
    config = VocabularyConfig(sizes=(4,), iterations=3)
    tokens = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float16)
    vocabulary = nest_prototypes(fit_prototypes(tokens, config), config)
    assert (vocabulary.sizes, vocabulary.parents) == ((4,), ())
    assert vocabulary.climb(np.array([3]), 0).tolist() == [3]


def test_equal_tokens_can_be_nested() -> None:
    config = VocabularyConfig(sizes=(2, 3, 5))
    tokens = np.ones((9, 2), dtype=np.float16)
    vocabulary = nest_prototypes(fit_prototypes(tokens, config), config)
    assert [int(counts.sum()) for counts in vocabulary.counts] == [9, 9, 9]
    assert all((level == 1).all() for level in vocabulary.centroids)


def test_part_prototypes_are_nearest_to_region_means() -> None:
    features, regions = features_and_regions()
    centroids = np.random.default_rng(2).normal(size=(7, 3)).astype(np.float32) * 8
    regions[0, 1] = 2
    prototypes, distances = part_prototypes(features, regions, centroids, level=1)
    assert prototypes.shape == distances.shape == (20, 256)
    assert (prototypes.dtype, distances.dtype) == (np.uint16, np.float32)
    for image in range(20):
        for region in range(256):
            inside = regions[image, 1] == region
            if not inside.any():
                assert prototypes[image, region] == NO_REGION
                assert np.isnan(distances[image, region])
                continue
            mean = features[image][inside].mean(axis=0, dtype=np.float32)
            squares = ((mean - centroids.astype(np.float64)) ** 2).sum(axis=1)
            assert prototypes[image, region] == squares.argmin()
            np.testing.assert_allclose(distances[image, region], squares.min(), rtol=1e-5)


def test_a_block_without_images_has_no_parts() -> None:
    features, regions = features_and_regions()
    prototypes, distances = part_prototypes(features[:0], regions[:0], np.zeros((2, 3), np.float32))
    assert prototypes.shape == distances.shape == (0, 256)


def test_part_prototypes_refuse_other_channels_and_levels() -> None:
    features, regions = features_and_regions()
    with pytest.raises(BuilderError, match="prototypes have 4 channels, features have 3"):
        part_prototypes(features, regions, np.zeros((2, 4), dtype=np.float32))
    with pytest.raises(BuilderError, match="level is 2, expected 0 to 1"):
        part_prototypes(features, regions, np.zeros((2, 3), dtype=np.float32), level=2)


def test_write_then_read_is_identity(fitted: Vocabulary, tmp_path: Path) -> None:
    save_vocabulary(tmp_path / "vocabulary.npz", fitted, CONFIG, config_hash="ab")
    assert [path.name for path in tmp_path.iterdir()] == ["vocabulary.npz"]
    read, config, config_hash = load_vocabulary(tmp_path / "vocabulary.npz")
    for name in ("centroids", "counts", "parents"):
        for before, after in zip(getattr(fitted, name), getattr(read, name), strict=True):
            np.testing.assert_array_equal(after, before)
            assert after.dtype == before.dtype
    assert (read.inertia, config, config_hash) == (fitted.inertia, CONFIG, "ab")


def test_damaged_missing_or_newer_file_is_refused(
    fitted: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vocabulary.npz"
    with pytest.raises(BuilderError, match=r"vocabulary\.npz is missing"):
        load_vocabulary(path)
    monkeypatch.setattr("hierarchy_builder.vocabulary.prototypes.FORMAT_VERSION", 99)
    save_vocabulary(path, fitted, CONFIG)
    monkeypatch.undo()
    with pytest.raises(BuilderError, match="has format version 99"):
        load_vocabulary(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BuilderError, match="is damaged"):
        load_vocabulary(path)
