"""What flows through the builder and into the trainer: plain records, dtypes, shapes and file names.

Standard library and numpy only, so that a reader of our shards can import this file and nothing else.

    N images, L levels (coarse → fine), H×W grid of tokens, C channels of the encoder
    features [N, H, W, C] float16    regions [N, L−1, H, W] uint8    canvases [N, L, H, W, C]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

FORMAT_VERSION = 1
"""Version of the artefacts on disk; readers refuse another one."""

FEATURE_DTYPE = np.dtype("float16")
REGION_DTYPE = np.dtype("uint8")
MAX_REGIONS = 256
"""Region ids of one image and level fit uint8."""

FEATURES_MEMBER = "features.npy"
SCALE_MEMBER = "scale.npy"
REGIONS_MEMBER = "regions.npy"
LABEL_MEMBER = "cls"
METADATA_MEMBER = "json"
IMAGE_MEMBER = "jpg"
CANVASES_MEMBER = "canvases.npy"
"""Members of a sample in a tar: `<key>.<member>`."""


class Status(IntEnum):
    """What became of one row: the `status` array of features.zarr and the column of index.parquet."""

    PENDING = 0
    OK = 1
    SKIPPED = 2
    """The image could not be decoded; `reason` says why."""
    NONFINITE = 3
    """The encoder returned NaN or infinity; the row is stored as zeros and left out of shards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRecord:
    """One image of the input listing. `key` is unique in the dataset and safe in a tar; `path` is as listed."""

    key: str
    path: str
    label: int
    class_name: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A unit of work: rows `start` ≤ i < `stop` of the index, always one whole shard of the zarr arrays."""

    number: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(kw_only=True, slots=True)
class Sample:
    """One training example, as stored in a tar.

    features: float16 [H, W, C], or int8 [H, W, C] together with scale float32 [H, W, 1].
    regions: uint8 [L−1, H, W], nested, level 0 first. canvases: float16 [L, H, W, C] or None.
    image: JPEG bytes of the crop the features came from, or None.
    """

    key: str
    label: int
    features: np.ndarray
    regions: np.ndarray
    metadata: dict[str, Any] = field(default_factory=dict)
    scale: np.ndarray | None = None
    canvases: np.ndarray | None = None
    image: bytes | None = None


def spread_evenly(count: int, limit: int) -> list[int]:
    """Return at most `limit` of the numbers below `count`, spread evenly from the first to the last."""
    return np.linspace(0, count - 1, min(count, limit)).astype(int).tolist()


def blocks_of(num_rows: int, block_rows: int) -> list[Block]:
    """Cut `num_rows` rows into blocks of `block_rows` (the last may be shorter), numbered from 0."""
    starts = range(0, num_rows, block_rows)
    return [
        Block(number=n, start=start, stop=min(start + block_rows, num_rows)) for n, start in enumerate(starts)
    ]
