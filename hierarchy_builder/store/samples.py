"""Make the sample of one row of a build: metadata, rounding to int8, canvases, and the crop as JPEG."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from hierarchy_builder.canvases import level_canvases
from hierarchy_builder.config import ShardConfig
from hierarchy_builder.images.decoding import crop_square
from hierarchy_builder.records import FEATURE_DTYPE, ImageRecord, Sample
from hierarchy_builder.store.quantisation import dequantise, quantise

PART_LEVEL = 1
"""The level whose regions are linked to prototypes."""

FACTS = ("width", "height", "orientation")
"""Columns of the index that the metadata of a sample repeats."""


def make_sample(
    record: ImageRecord,
    facts: Mapping[str, Any],
    row: Mapping[str, np.ndarray],
    config: ShardConfig,
    image: bytes | None = None,
) -> Sample:
    """Make the sample of a usable image.

    facts: its outcome, which includes `FACTS`. row: `features` float16 [H,W,C], `regions` uint8 [L−1,H,W], `flags`,
    and `prototypes` uint16 [256] if parts are linked. image: JPEG bytes of the crop.
    """
    regions = row["regions"]
    counts = [int(level.max()) + 1 for level in regions]
    metadata = {
        "path": record.path,
        "class_name": record.class_name,
        **{name: facts[name] for name in FACTS},
        "regions_per_level": counts,
        "flags": int(row["flags"]),
    }
    if "prototypes" in row:
        level = min(PART_LEVEL, len(regions) - 1)
        metadata["part_prototypes"] = row["prototypes"][: counts[level]].tolist()
    features, scale = row["features"], None
    if config.feature_dtype == "int8":
        features, scale = quantise(features)
    # Canvases are means of the stored values, as a reader of the shard would compute them.
    values = features if scale is None else dequantise(features, scale).astype(FEATURE_DTYPE)
    canvases = level_canvases(values[None], regions[None])[0] if config.canvases else None
    return Sample(
        key=record.key,
        label=record.label,
        features=features,
        scale=scale,
        regions=regions,
        metadata=metadata,
        canvases=canvases,
        image=image,
    )


def picture_of(
    image: Image.Image, image_size_px: int, config: ShardConfig, crop: np.ndarray | None = None
) -> bytes:
    """Return the crop of an upright photo as JPEG of the configured size, without chroma subsampling.

    image_size_px: S of the encoder, which sees the same crop. crop: uint8 [S,S,3], if it exists already.
    """
    if crop is None or config.stored_px(image_size_px) != image_size_px:
        crop = crop_square(image, image_size_px, out_px=config.image_px)
    buffer = io.BytesIO()
    Image.fromarray(crop).save(buffer, "JPEG", quality=config.image_quality, subsampling=0)
    return buffer.getvalue()
