"""extract, cluster, vocabulary and shard as functions of one unit of work.

A stage is loaded once per worker and then called with units. `run(unit)` reads what the stage before it wrote,
writes its own rows, and returns what the marker keeps. It knows neither Ray nor the other units.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numba
import numpy as np
import pyarrow as pa
import torch
import zarr
from PIL import Image

from hierarchy_builder import stores
from hierarchy_builder.artefacts import BuildFolder
from hierarchy_builder.canvases import level_canvases
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig
from hierarchy_builder.decoding import ImageFacts, crop_square, decode_image
from hierarchy_builder.encoders import Encoder, encode, load_encoder
from hierarchy_builder.errors import BuilderError, ImageError
from hierarchy_builder.hierarchy import build_hierarchy
from hierarchy_builder.images import Reader, open_reader
from hierarchy_builder.index import read_index, records_of, status_name
from hierarchy_builder.ledger import Ledger
from hierarchy_builder.records import FEATURE_DTYPE, Block, ImageRecord, Sample, Status
from hierarchy_builder.shards import shard_name, write_shard
from hierarchy_builder.statistics import moments_of
from hierarchy_builder.units import usable_rows
from hierarchy_builder.vocabulary import NO_REGION, load_vocabulary, part_prototypes

PART_LEVEL = 1
"""The level whose regions are linked to prototypes."""


class Stage(Protocol):
    """A stage, loaded in a worker."""

    def run(self, unit: Block, threads: int) -> dict[str, Any]:
        """Do one unit on up to `threads` threads and write it; returns what its marker keeps, at least `images`."""


def perform(stage: Stage, ledger: Ledger, unit: Block, threads: int) -> dict[str, Any]:
    """Run one unit and mark it done once everything it wrote is on disk.

    torch sums on one thread: its last bits depend on how many there are, and the bytes of a result must not depend
    on the machine. Images are what is spread over `threads`.
    """
    started = time.perf_counter()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = stage.run(unit, threads)
    finally:
        torch.set_num_threads(before)
    result["seconds"] = round(time.perf_counter() - started, 3)
    ledger.finish(unit.number, result)
    return result


@dataclass(slots=True)
class ExtractStage:
    """A block of images → features, status and statistics of features.zarr; outcomes go into the marker."""

    folder: BuildFolder
    source: str
    config: ExtractConfig
    encoder: Encoder
    reader: Reader
    index: pa.Table

    @classmethod
    def load(cls, folder: BuildFolder, source: str, config: ExtractConfig) -> ExtractStage:
        encoder = load_encoder(config.encoder, weights=config.weights, precision=config.precision)
        return cls(folder, source, config, encoder, open_reader(source), read_index(folder.index))

    def run(self, unit: Block, threads: int) -> dict[str, Any]:
        records = records_of(self.index.slice(unit.start, len(unit)))
        features = np.zeros((len(unit), *self.encoder.grid, self.encoder.width), FEATURE_DTYPE)
        status = np.full(len(unit), Status.SKIPPED, np.uint8)
        outcomes: list[dict[str, Any]] = [{} for _ in records]
        for rows, images in self._batches(records, outcomes, threads):
            values = encode(self.encoder, images)
            with np.errstate(over="ignore"):
                stored = values.astype(FEATURE_DTYPE)
            finite = np.isfinite(stored).all(axis=(1, 2, 3))
            status[rows] = np.where(finite, Status.OK, Status.NONFINITE)
            features[rows] = np.where(finite.reshape(-1, 1, 1, 1), stored, 0)
        for outcome, value in zip(outcomes, status.tolist(), strict=True):
            outcome["status"] = status_name(Status(value))
            if value == Status.NONFINITE:
                outcome["reason"] = "features are not finite in float16"
        stores.write_block(self.folder.features, unit, {"features": features, "status": status})
        moments = moments_of(features[status == Status.OK])
        stores.write_block_statistics(self.folder.features, unit, moments.count, moments.mean, moments.m2)
        return {"images": len(unit), "outcomes": outcomes}

    def _batches(
        self, records: list[ImageRecord], outcomes: list[dict[str, Any]], threads: int
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Decode in threads, ahead of the encoder; yields (rows, uint8 [b,S,S,3]) of the images that decode."""
        rows: list[int] = []
        crops: list[np.ndarray] = []
        with ThreadPoolExecutor(threads) as pool:
            for row, (crop, outcome) in enumerate(pool.map(self._load, records)):
                outcomes[row] = outcome
                if crop is not None:
                    rows.append(row)
                    crops.append(crop)
                if len(rows) == self.config.batch_size:
                    yield rows, np.stack(crops)
                    rows, crops = [], []
        if rows:
            yield rows, np.stack(crops)

    def _load(self, record: ImageRecord) -> tuple[np.ndarray | None, dict[str, Any]]:
        try:
            image, facts = decode_image(self.reader.read(record.path), max_pixels=self.config.max_pixels)
            return crop_square(image, self.encoder.image_size_px), _facts(facts)
        except ImageError as error:
            return None, {"reason": str(error)}
        except OSError as error:
            return None, {"reason": f"unreadable: {error.strerror or error}"}


@dataclass(slots=True)
class ClusterStage:
    """A block of features → regions, merges and flags of regions.zarr."""

    folder: BuildFolder
    recipe: HierarchyRecipe

    @classmethod
    def load(cls, folder: BuildFolder, recipe: HierarchyRecipe) -> ClusterStage:
        return cls(folder, recipe)

    def run(self, unit: Block, threads: int) -> dict[str, Any]:
        usable = stores.read_block(self.folder.features, "status", unit) == Status.OK
        features = stores.read_block(self.folder.features, "features", unit)
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        hierarchy = build_hierarchy(features[usable], self.recipe)
        parts = {"regions": hierarchy.regions, "merges": hierarchy.merges, "flags": hierarchy.flags}
        stores.write_block(
            self.folder.regions, unit, {name: _scatter(values, usable) for name, values in parts.items()}
        )
        counts = hierarchy.regions.max(axis=(2, 3)).astype(int) + 1
        return {
            "images": int(usable.sum()),
            "regions": counts.sum(axis=0).tolist(),
            "degenerate": int((hierarchy.flags != 0).sum()),
        }


@dataclass(slots=True)
class VocabularyStage:
    """A block of parts → the dataset-wide prototype nearest to each, `prototypes` of regions.zarr."""

    folder: BuildFolder
    centroids: np.ndarray

    @classmethod
    def load(cls, folder: BuildFolder) -> VocabularyStage:
        return cls(folder, load_vocabulary(folder.vocabulary)[0].centroids)

    def run(self, unit: Block, threads: int) -> dict[str, Any]:
        usable = stores.read_block(self.folder.features, "status", unit) == Status.OK
        features = stores.read_block(self.folder.features, "features", unit)[usable]
        regions = stores.read_block(self.folder.regions, "regions", unit)[usable]
        level = min(PART_LEVEL, regions.shape[1] - 1)
        found = part_prototypes(features, regions, self.centroids, level=level)
        prototypes = _scatter(found, usable, fill=NO_REGION)
        stores.write_block(self.folder.regions, unit, {"prototypes": prototypes})
        return {"images": int(usable.sum())}


@dataclass
class ShardStage:
    """A run of usable rows → one tar. A unit counts usable rows, `start` ≤ i < `stop`, not rows of the index."""

    folder: BuildFolder
    source: str
    config: ShardConfig
    image_size_px: int
    max_pixels: int
    stage_hash: str

    @classmethod
    def load(
        cls,
        folder: BuildFolder,
        source: str,
        config: ShardConfig,
        image_size_px: int,
        max_pixels: int,
        stage_hash: str,
    ) -> ShardStage:
        return cls(folder, source, config, image_size_px, max_pixels, stage_hash)

    def run(self, unit: Block, threads: int) -> dict[str, Any]:
        tar = self.folder.shards / shard_name(self.config.split, unit.number)
        facts = write_shard(tar, self._samples(unit), config_hash=self.stage_hash)
        return {"images": facts["count"], **facts}

    @cached_property
    def usable_rows(self) -> np.ndarray:
        """Index rows that go into shards, rising."""
        return usable_rows(self.folder)

    @cached_property
    def index(self) -> pa.Table:
        return read_index(self.folder.index)

    def _samples(self, unit: Block) -> Iterator[Sample]:
        rows = self.usable_rows[unit.start : unit.stop]
        features, regions = stores.open_store(self.folder.features), stores.open_store(self.folder.regions)
        step = stores.ROWS_PER_CHUNK * 16
        for some in (rows[i : i + step] for i in range(0, len(rows), step)):
            span = slice(int(some[0]), int(some[-1]) + 1)
            table = self.index.slice(span.start, span.stop - span.start)
            arrays = {
                "features": stores.read_rows(features, "features", span),
                **{name: stores.read_rows(regions, name, span) for name in _region_arrays(regions)},
            }
            records = records_of(table)
            outcomes = table.select(["width", "height", "orientation"]).to_pylist()
            for offset in (some - span.start).tolist():
                row = {name: values[offset] for name, values in arrays.items()}
                yield self._sample(records[offset], outcomes[offset], row)

    def _sample(self, record: ImageRecord, facts: dict[str, Any], row: Mapping[str, np.ndarray]) -> Sample:
        regions = row["regions"]
        counts = [int(level.max()) + 1 for level in regions]
        metadata = {
            "path": record.path,
            "class_name": record.class_name,
            **facts,
            "regions_per_level": counts,
            "flags": int(row["flags"]),
        }
        if "prototypes" in row:
            level = min(PART_LEVEL, len(regions) - 1)
            metadata["part_prototypes"] = row["prototypes"][: counts[level]].tolist()
        canvases = level_canvases(row["features"][None], regions[None])[0] if self.config.canvases else None
        return Sample(
            key=record.key,
            label=record.label,
            features=row["features"],
            regions=regions,
            metadata=metadata,
            canvases=canvases,
            image=self._jpeg(record) if self.config.images else None,
        )

    def _jpeg(self, record: ImageRecord) -> bytes:
        try:
            image, _ = decode_image(self._reader.read(record.path), max_pixels=self.max_pixels)
        except ImageError as error:
            raise BuilderError(
                f"{record.path} of {self.source}: {error}; bring it back, or shard with --no-images"
            ) from None
        buffer = io.BytesIO()
        crop = Image.fromarray(crop_square(image, self.image_size_px))
        crop.save(buffer, "JPEG", quality=self.config.image_quality, subsampling=0)
        return buffer.getvalue()

    @cached_property
    def _reader(self) -> Reader:
        return open_reader(self.source)


def _region_arrays(group: zarr.Group) -> list[str]:
    return [name for name in ("regions", "flags", "prototypes") if name in group]


def _scatter(values: np.ndarray, usable: np.ndarray, fill: int = 0) -> np.ndarray:
    """Rows of the usable images back at their places in the block; `fill` elsewhere."""
    block = np.full((len(usable), *values.shape[1:]), fill, values.dtype)
    block[usable] = values
    return block


def _facts(facts: ImageFacts) -> dict[str, Any]:
    return {
        "width": facts.width,
        "height": facts.height,
        "mode": facts.mode,
        "frames": facts.frames,
        "orientation": facts.orientation,
    }
