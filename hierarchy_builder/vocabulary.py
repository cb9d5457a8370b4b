"""A vocabulary of parts: prototypes shared by the whole data set, and which of them each image's parts are.

Works on blocks of arrays and knows no store; centroids live in the space of the raw features.

    N images, n images of a block, L levels, H×W grid, C channels, K prototypes
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from hierarchy_builder.artefacts import write_bytes
from hierarchy_builder.canvases import region_means
from hierarchy_builder.config import VocabularyConfig, from_mapping, to_mapping
from hierarchy_builder.errors import BuilderError
from hierarchy_builder.kmeans import Prototypes, nearest_prototype
from hierarchy_builder.records import FORMAT_VERSION, MAX_REGIONS

NO_REGION = 65_535
"""Stored where an image has no region of that id."""


def sample_tokens(
    blocks: Iterable[tuple[np.ndarray, np.ndarray]], num_images: int, config: VocabularyConfig
) -> np.ndarray:
    """Draw tokens evenly over all images; the same ones however the images are cut into blocks.

    blocks: (features [n, H, W, C], regions [n, L−1, H, W]) in row order, `num_images` rows altogether.
    Returns float32 [M, C] with M = min(config.sampled_tokens, all tokens). Any two images differ by at most
    one in how many tokens they give.
    Raises BuilderError if the blocks hold another number of images.
    """
    random = np.random.default_rng(config.seed)
    sampled = []
    row = 0
    for features, _ in blocks:
        tokens = features.reshape(len(features), -1, features.shape[-1])
        wanted = min(config.sampled_tokens, num_images * tokens.shape[1])
        for image in tokens:
            share = (row + 1) * wanted // num_images - row * wanted // num_images
            if share > 0:
                chosen = np.sort(random.choice(len(image), share, replace=False))
                sampled.append(image[chosen].astype(np.float32))
            row += 1
    if row != num_images or not sampled:
        raise BuilderError(f"blocks hold {row} images, expected {num_images} (at least 1)")
    return np.concatenate(sampled)


def part_prototypes(
    features: np.ndarray, regions: np.ndarray, centroids: np.ndarray, level: int = 1
) -> np.ndarray:
    """Nearest prototype of the mean feature of each region of one level.

    features: float [n, H, W, C]. regions: uint8 [n, L−1, H, W]. centroids: float32 [K, C].
    Returns uint16 [n, 256]: entry k belongs to region id k (0 is the background), 65535 where there is none.
    Raises BuilderError if channels differ or the level has no regions.
    """
    if not 0 <= level < regions.shape[1]:
        raise BuilderError(f"level is {level}, expected 0 to {regions.shape[1] - 1}: these have regions")
    if features.shape[-1] != centroids.shape[1]:
        raise BuilderError(
            f"prototypes have {centroids.shape[1]} channels, features {features.shape[-1]}: "
            "fit the vocabulary to features of the same encoder"
        )
    means, counts = region_means(features, regions[:, level])
    present = counts > 0
    prototypes = np.full((len(features), MAX_REGIONS), NO_REGION, dtype=np.uint16)
    prototypes[:, : counts.shape[1]][present] = nearest_prototype(means[present], centroids)
    return prototypes


def save_vocabulary(path: str | Path, prototypes: Prototypes, config: VocabularyConfig) -> None:
    """Write centroids, inertia and the configuration to one .npz (no pickle), under its name only when complete."""
    described = {
        "format_version": FORMAT_VERSION,
        "backend": prototypes.backend,
        "config": to_mapping(config),
    }
    buffer = io.BytesIO()
    np.savez(
        buffer,
        centroids=prototypes.centroids,
        inertia=np.asarray(prototypes.inertia, dtype=np.float64),
        description=np.array(json.dumps(described, sort_keys=True)),
    )
    write_bytes(Path(path), buffer.getvalue())


def load_vocabulary(path: str | Path) -> tuple[Prototypes, VocabularyConfig]:
    """Read what `save_vocabulary` wrote. Raises BuilderError for a missing or damaged file, or another version."""
    try:
        with np.load(path, allow_pickle=False) as content:
            centroids, inertia = content["centroids"], content["inertia"]
            description = json.loads(str(content["description"]))
            version = description["format_version"]
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BuilderError(
            f"vocabulary {path} cannot be read ({type(error).__name__}: {error}): fit it again"
        ) from None
    if version != FORMAT_VERSION:
        raise BuilderError(
            f"vocabulary {path} has format version {version}, this program reads {FORMAT_VERSION}: fit it again, "
            "or use the release that wrote it"
        )
    prototypes = Prototypes(
        centroids=centroids, inertia=tuple(inertia.tolist()), backend=description["backend"]
    )
    return prototypes, from_mapping(VocabularyConfig, description["config"], f"vocabulary {path}")
