"""What a build is asked to do: frozen, checked, YAML in and out; see `hierarchy_builder.fields`."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from hierarchy_builder.errors import UsageError
from hierarchy_builder.fields import CAME_LATER, EXECUTION, CheckedFields, fields_of_file, nearest, require

MAX_IMAGE_PX = 8192
"""Largest stored picture; more is a slip of the keyboard."""
MAX_SEED = 2**32 - 1
MOST_PARTITIONS = 1_000_000
MOST_PARTS = 255
"""Largest number of regions to aim at: ids are stored in one byte."""


@dataclass(frozen=True, slots=True)
class Partition:
    """Part `number` of `count`, from 1, of the images of a listing; the parts are disjoint and together complete.

    An image belongs to part 1 + h mod `count`, where h is the first 8 bytes of the SHA-256 of its key as a big-endian
    number. The key is the plain one, before images of equal keys are told apart, so that all of these are in one part
    and get the keys that they have in the whole. Each image is judged by itself: no part needs the others.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Partition:
        """Read `3/64`. Raises ValueError for anything else."""
        found = re.fullmatch(r"([1-9][0-9]{0,6})/([1-9][0-9]{0,6})", text)
        number, count = map(int, found.groups()) if found else (0, 0)
        require(
            1 <= number <= count <= MOST_PARTITIONS,
            f"partition is {text!r}, expected K/N with K from 1 to N and N up to {MOST_PARTITIONS:,}, such as 3/64",
        )
        return cls(number, count)

    def takes(self, key: str) -> bool:
        """Whether the image with this plain key belongs to the part."""
        digest = hashlib.sha256(key.encode()).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractConfig(CheckedFields):
    """Images → features."""

    encoder: str = "dinov2-reg-base"
    """Name of an encoder (`hierarchy-builder encoders` lists them), `NAME@K` for a ViT after its first K blocks,
    `onnx:FILE[:OUTPUT]` or `module:function`."""
    weights: str | None = field(default=None, metadata=EXECUTION)
    """Local weight file of the encoder; without it the weights come from the hub where the encoder has any."""
    split: str | None = None
    """Sub-folder of the input to take, for example `train`; without it the folder itself."""
    partition: str | None = field(default=None, metadata=CAME_LATER)
    """Part of the images to build, `K/N` for the K-th of N parts: by a hash of the key, so that N builds have every
    image once, and `trainer train` reads their shards as one set. Ids of classes are those of the whole listing."""
    order: Literal["shuffled", "listed"] = "shuffled"
    """Order of rows: by a hash of the key, so that every block and shard mixes the classes, or as listed."""
    block_rows: int | None = None
    """Rows in a unit of work and in one shard of features.zarr; without it 1,024, fewer for small sets."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the encoder; auto takes that of the build, and for a new build
    bfloat16 where there is a GPU, else float32."""
    max_pixels: int = 178_956_970
    """Pixels (width × height) above which an image is skipped before it is decoded; Pillow itself takes no more."""
    max_bad_fraction: float = field(default=0.01, metadata=EXECUTION)
    """Share of skipped images above which the run ends with exit code 3."""
    batch_size: int = field(default=32, metadata=EXECUTION)
    """Images in one evaluation of the encoder."""

    def __post_init__(self) -> None:
        self.check_between(1, 1_000_000, "block_rows")
        self.check_least(1, "batch_size", "max_pixels")
        self.check_shares("max_bad_fraction")
        if self.partition is not None:
            Partition.parse(self.partition)

    def for_images(self, num_images: int) -> ExtractConfig:
        """The same with block_rows settled: at least 16 blocks where the set is not tiny, whole chunks of 8 rows."""
        if self.block_rows is not None:
            return self
        sixteenth = -(-num_images // (16 * 8)) * 8
        return dataclasses.replace(self, block_rows=min(1024, max(32, sixteenth)))


@dataclass(frozen=True, kw_only=True, slots=True)
class HierarchyRecipe(CheckedFields):
    """Features → nested regions. The defaults are the published recipe."""

    cuts: tuple[float, ...] = (0.65, 0.35)
    """Where trees are cut into parts, coarse → fine; each cut adds one level. Either relative merge heights from 0 to
    1, falling; or, which suits any encoder, about how many regions a photo gets, whole numbers from 2, rising (`8,16`):
    for n regions its tree is cut at the mean height of its 2n highest merges."""
    spatial_weight: float = 0.2
    """Weight of the distance of two tokens on the unit square, added to their cosine distance."""
    start: Literal["single", "several", "cut", "centred"] = "single"
    """How tokens are split into object and background. `single`: 2-means from one k-means++ start of scikit-learn
    with `seed`. `several`: the best of 8 such starts by inertia. `cut`: the normalised cut of the similarity graph of
    the tokens, which has no random start. `centred`: of three such graphs, whose sharpness is in units of the variance
    of the photo's tokens, the cut that best separates the centre of the photo."""
    seed: int = 0
    """Seed of the k-means++ draws."""
    object_choice: Literal["centre", "border"] = "centre"
    """Which half is the object: its tokens lie nearer to the image centre on average (`centre`), or a smaller share
    of them lies on the border of the grid (`border`)."""
    connected: bool = False
    """Whether only clusters that touch (4 neighbours) merge, so that each region below level 0 is in one piece."""
    divide_background: bool = False
    """Whether the background is split into parts too, at the same heights, or stays one region on every level."""
    min_spread: float = 0.0
    """Treat an image as one single region on every level if its L2-normalised tokens vary no more than this (mean
    squared distance to their mean)."""
    masks: str | None = field(default=None, metadata=EXECUTION)
    """Folder of label maps `<stem>.png` (0 is background), from which the level `masks_level` is taken; images
    without a map are split by `start`."""
    masks_level: int = 0
    """Level that the label maps give: at 0 they say only what is object, at a finer level they give its regions; the
    other levels follow from the features."""

    def __post_init__(self) -> None:
        # 8 and 8.0 are one request, and have to have one identity.
        object.__setattr__(self, "cuts", tuple(float(cut) for cut in self.cuts))
        numbers = any(cut > 1 for cut in self.cuts)
        require(
            all(
                cut == int(cut) if 2 <= cut <= MOST_PARTS else 0 <= cut <= 1 and not numbers
                for cut in self.cuts
            ),
            f"cuts are {self.cuts}, expected relative heights from 0 to 1, or numbers from 2 to {MOST_PARTS}",
        )
        order = "rising numbers" if numbers else "falling heights"
        require(
            all(coarse < fine if numbers else coarse > fine for coarse, fine in pairwise(self.cuts)),
            f"cuts are {self.cuts}, expected {order} (coarse → fine), for example "
            + ("8,16" if numbers else "0.65,0.35"),
        )
        require(
            0 <= self.spatial_weight < math.inf,
            f"spatial_weight is {self.spatial_weight}, expected 0 or more, and finite",
        )
        require(
            self.spatial_weight <= 3 or not (self.connected or self.masks_level),
            f"spatial_weight is {self.spatial_weight}, expected 3 or less with connected or masks_level",
        )
        self.check_between(0, MAX_SEED, "seed")
        self.check_between(0, 1, "min_spread")
        require(
            0 <= self.masks_level <= len(self.cuts),
            f"masks_level is {self.masks_level}, expected 0 to {len(self.cuts)}: these levels have regions",
        )

    @property
    def num_levels(self) -> int:
        """L: object/background, one level per cut, and the raw tokens."""
        return len(self.cuts) + 2

    @classmethod
    def paper(cls) -> HierarchyRecipe:
        """The recipe of the Trajectory Forcing release: single start, cuts 0.65 and 0.35, spatial weight 0.2."""
        return cls()

    @classmethod
    def stable(cls) -> HierarchyRecipe:
        """Nothing drawn by chance, connected regions, a divided background, about as many regions with any encoder:
        docs/results.md compares it to `paper`."""
        return cls(
            cuts=(8, 16),
            spatial_weight=0.0,
            start="centred",
            object_choice="border",
            connected=True,
            divide_background=True,
            min_spread=1e-3,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabularyConfig(CheckedFields):
    """Features → dataset-wide prototypes."""

    sizes: tuple[int, ...] = (256,)
    """Prototypes of each level, coarse → fine (rising); those of a level are grouped into those before it."""
    sampled_tokens: int | None = 262_144
    """Tokens drawn evenly from all images to fit the finest level; without a number all tokens."""
    iterations: int = 20
    """Most Lloyd iterations of the finest level; fewer where it converges."""
    seed: int = 0
    """Seed of the token sample and of k-means++."""
    backend: Literal["torch", "faiss", "cuml"] = "torch"
    """k-means engine: torch on all workers, on GPUs where they have any; faiss and cuml in one process."""

    def __post_init__(self) -> None:
        rising = all(coarse < fine for coarse, fine in pairwise(self.sizes))
        require(
            bool(self.sizes) and rising and self.sizes[0] >= 1 and self.sizes[-1] <= 65_535,
            f"sizes are {self.sizes}, expected rising numbers (coarse → fine) from 1 to 65535, for example"
            " 64,512,4096",
        )
        self.check_least(1, "iterations", "sampled_tokens")
        self.check_between(0, MAX_SEED, "seed")

    @property
    def num_prototypes(self) -> int:
        """K, prototypes of the finest level."""
        return self.sizes[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardConfig(CheckedFields):
    """Features and regions → webdataset tars."""

    split: str = "train"
    """First part of the shard names, `<split>-000000.tar`."""
    samples_per_shard: int = 1000
    """Samples in each tar but the last; ignored when `shard_bytes` is given."""
    shard_bytes: int | None = None
    """Size in bytes a tar aims at; the samples per tar follow from the size of one sample."""
    feature_dtype: Literal["float16", "int8"] = "float16"
    """How features are stored: float16, or int8 with one float32 scale per token, in half the bytes."""
    images: bool = False
    """Also store the crop the features came from, as JPEG."""
    image_px: int | None = field(default=None, metadata=CAME_LATER)
    """Pixels a side of the stored crop, resampled from the photograph; without it as many as the encoder sees."""
    image_quality: int = 95
    """JPEG quality of the stored crop, 1 to 100."""
    canvases: bool = False
    """Also store the level canvases (float16), for readers that cannot build them."""
    covariance: bool = field(default=False, metadata=EXECUTION)
    """Also compute the covariance of the channels, for statistics.npz; the tars are the same without it."""
    licence: str | None = field(default=None, metadata=EXECUTION)
    """Licence of the photographs for the dataset card, such as cc-by-4.0. Without it the card keeps what was given
    before, or else says unknown."""

    def __post_init__(self) -> None:
        require(
            self.licence is None or bool(self.licence.strip() and self.licence.isprintable()),
            f"licence is {self.licence!r}, expected a name on one line, such as cc-by-4.0",
        )
        self.check_least(1, "samples_per_shard")
        self.check_least(10_000, "shard_bytes")
        self.check_between(1, 100, "image_quality")
        self.check_between(1, MAX_IMAGE_PX, "image_px")
        require(
            self.images or self.image_px is None,
            f"image_px is {self.image_px}, the size of stored pictures, and none are stored: expected it with images"
            " (--images)",
        )
        require(
            bool(self.split) and self.split.isascii() and self.split.replace("_", "").isalnum(),
            f"split is {self.split!r}, expected letters, digits and underscores",
        )

    def stored_px(self, image_size_px: int) -> int | None:
        """Pixels a side of the stored crop where an encoder sees `image_size_px`; None where none is stored."""
        return (self.image_px or image_size_px) if self.images else None


def read_sections(path: Path) -> dict[str, Any]:
    """Read a config file of sections `extract`, `hierarchy`, `vocabulary`, `shard`."""
    content, sections = fields_of_file(path), ["extract", "hierarchy", "vocabulary", "shard"]
    for name, section in content.items():
        if name not in sections:
            raise UsageError(f"config file {path}: unknown section {name!r}, {nearest(name, sections)}")
        if not isinstance(section, dict | None):
            raise UsageError(f"config file {path}: section {name} is {section!r}, expected fields")
    return content
