"""A vocabulary of parts: nested prototypes for the whole data set, and the prototype of each region of an image.

The finest prototypes are fitted to tokens, coarser ones to the finer ones, weighted by their numbers of tokens. Hence
each prototype has one parent, and an id of the finest level implies the ids of all coarser levels. Centroids have the
units of the raw features.

    N images, n images of a block, L levels, H×W grid, T = H·W tokens, C channels, K prototypes
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hierarchy_builder.canvases import region_means
from hierarchy_builder.config import VocabularyConfig
from hierarchy_builder.errors import BuilderError
from hierarchy_builder.fields import brief, from_mapping, to_mapping
from hierarchy_builder.files.untrusted.arrays import npz_of, parse_npz
from hierarchy_builder.files.untrusted.documents import parse_json
from hierarchy_builder.files.whole import decoding, write_bytes
from hierarchy_builder.records import FORMAT_VERSION, MAX_REGIONS
from hierarchy_builder.vocabulary.kmeans import (
    ClusterSums,
    Prototypes,
    lloyd,
    nearest_prototype,
    plus_plus,
    sum_clusters,
)

NO_REGION = 65_535
"""Stored instead of a prototype if an image has no region with that id."""

COARSE_ITERATIONS = 100
"""Largest number of iterations for a coarser level, which usually converges long before."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Vocabulary:
    """Nested prototypes, coarse → fine.

    centroids: float32 [K, C] per level. counts: int64 [K] per level, the number of fitted tokens of each prototype.
    parents: uint16 [K] per level except the first, the prototype of the next coarser level to which each belongs.
    inertia: history of the finest level, as in `kmeans.Prototypes`.
    """

    __repr__ = brief

    centroids: tuple[np.ndarray, ...]
    counts: tuple[np.ndarray, ...]
    parents: tuple[np.ndarray, ...]
    inertia: tuple[float, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of prototypes per level, coarse → fine."""
        return tuple(len(level) for level in self.centroids)

    def climb(self, prototypes: np.ndarray, level: int) -> np.ndarray:
        """Map ids of the finest level to their ancestors on `level`, uint16; NO_REGION stays."""
        ids = np.asarray(prototypes, dtype=np.uint16)
        for parents in reversed(self.parents[level:]):
            ids = np.append(parents, np.repeat(np.uint16(NO_REGION), 2**16 - len(parents)))[ids]
        return ids


def nest_prototypes(finest: Prototypes, config: VocabularyConfig) -> Vocabulary:
    """Add the coarser levels of `config.sizes` by k-means on the next finer prototypes, weighted by their counts."""
    centroids, counts, parents = [finest.centroids], [finest.counts], list[np.ndarray]()
    for size in reversed(config.sizes[:-1]):
        fine, weights = centroids[0], counts[0]
        start = plus_plus(fine, size, np.random.default_rng((config.seed, size)), weights)
        coarse = lloyd(_assess(fine, weights), start, COARSE_ITERATIONS).centroids
        parent, _ = nearest_prototype(fine, coarse)
        total = np.zeros(size, np.int64)
        np.add.at(total, parent, weights)
        centroids, counts = [coarse, *centroids], [total, *counts]
        parents.insert(0, parent.astype(np.uint16))
    return Vocabulary(
        centroids=tuple(centroids), counts=tuple(counts), parents=tuple(parents), inertia=finest.inertia
    )


def token_shares(num_images: int, num_tokens: int) -> np.ndarray:
    """Numbers of tokens to draw per image, int64 [num_images]; they add up to `num_tokens` and differ by at most 1."""
    bounds = np.arange(num_images + 1, dtype=np.int64) * num_tokens // max(num_images, 1)
    return np.diff(bounds)


def draw_tokens(features: np.ndarray, rows: Iterable[int], shares: Iterable[int], seed: int) -> np.ndarray:
    """Draw `shares[i]` random tokens of each image; the draw depends on the row of the image, not on its block.

    features: [n, H, W, C] of the images `rows` of the data set. Returns [sum of shares, C] of the same dtype.
    """
    tokens = features.reshape(len(features), -1, features.shape[-1])
    drawn = [tokens[:0, 0]]
    for image, row, share in zip(tokens, rows, shares, strict=True):
        if share:
            chosen = np.random.default_rng((seed, row)).choice(len(image), share, replace=False)
            drawn.append(image[np.sort(chosen)])
    return np.concatenate(drawn)


def part_prototypes(
    features: np.ndarray, regions: np.ndarray, centroids: np.ndarray, level: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Nearest prototype to the mean feature of each region of one level, and the squared distance to it.

    features: float [n, H, W, C]. regions: uint8 [n, L−1, H, W]. centroids: float32 [K, C].
    Returns uint16 and float32 [n, 256]: entry k belongs to region id k (0 is the background), and is NO_REGION and NaN
    if the image has no such region.
    Raises BuilderError if the numbers of channels differ or the level has no regions.
    """
    if not 0 <= level < regions.shape[1]:
        raise BuilderError(f"level is {level}, expected 0 to {regions.shape[1] - 1}, the levels with regions")
    if features.shape[-1] != centroids.shape[1]:
        raise BuilderError(
            f"prototypes have {centroids.shape[1]} channels, features have {features.shape[-1]}: "
            "fit the vocabulary to features of the same encoder"
        )
    prototypes = np.full((len(features), MAX_REGIONS), NO_REGION, dtype=np.uint16)
    distances = np.full((len(features), MAX_REGIONS), np.nan, dtype=np.float32)
    if len(features):
        means, counts = region_means(features, regions[:, level])
        present = np.zeros(prototypes.shape, dtype=bool)
        present[:, : counts.shape[1]] = counts > 0
        prototypes[present], distances[present] = nearest_prototype(means[counts > 0], centroids)
    return prototypes, distances


def save_vocabulary(
    path: Path, vocabulary: Vocabulary, config: VocabularyConfig, *, config_hash: str = ""
) -> None:
    """Write all levels and the configuration to one .npz (without pickle), whole or not at all.

    config_hash: hash of the stage that fitted the vocabulary, by which a reader can recognise it.
    """
    described = {
        "format_version": FORMAT_VERSION,
        "sizes": list(vocabulary.sizes),
        "config": to_mapping(config),
        "config_hash": config_hash,
    }
    arrays = {
        **{f"centroids_{level}": values for level, values in enumerate(vocabulary.centroids)},
        **{f"counts_{level}": values for level, values in enumerate(vocabulary.counts)},
        **{f"parents_{level}": values for level, values in enumerate(vocabulary.parents, start=1)},
        "inertia": np.asarray(vocabulary.inertia, dtype=np.float64),
        "description": np.array(json.dumps(described, sort_keys=True)),
    }
    write_bytes(path, npz_of(**arrays))


def load_vocabulary(path: Path) -> tuple[Vocabulary, VocabularyConfig, str]:
    """Read the vocabulary, configuration and configuration hash that `save_vocabulary` wrote.

    Raises BuilderError if the file is missing, damaged or of another format version.
    """
    with decoding(path, "fit the vocabulary again, or run `hierarchy-builder repair` on its build"):
        with path.open("rb") as file:
            content = parse_npz(file)
            description = parse_json(str(content["description"]))
            version = description["format_version"]
            if version != FORMAT_VERSION:
                raise BuilderError(
                    f"vocabulary {path} has format version {version}, this program reads {FORMAT_VERSION}: fit it "
                    "again, or use the release that wrote it"
                )
            num_levels = len(description["sizes"])
            vocabulary = Vocabulary(
                centroids=tuple(content[f"centroids_{level}"] for level in range(num_levels)),
                counts=tuple(content[f"counts_{level}"] for level in range(num_levels)),
                parents=tuple(content[f"parents_{level}"] for level in range(1, num_levels)),
                inertia=tuple(content["inertia"].tolist()),
            )
        config = from_mapping(VocabularyConfig, description["config"], f"vocabulary {path}")
        return vocabulary, config, description["config_hash"]


def _assess(fine: np.ndarray, weights: np.ndarray) -> Callable[[np.ndarray], list[ClusterSums]]:
    return lambda centroids: [sum_clusters(fine, centroids, weights=weights)]
