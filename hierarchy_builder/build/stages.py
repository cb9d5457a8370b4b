"""extract, cluster, link, covariance and shard as functions of one unit of work.

A worker loads a stage once and then calls it with units. `run(unit)` reads the output of the previous stage, writes
its own rows, and returns the contents of the marker. It does not depend on Ray or on other units.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig
from hierarchy_builder.encoders import Encoder, load_encoder
from hierarchy_builder.encoders.encoding import ImageEncoder
from hierarchy_builder.encoders.probe import check_probe, probe_value
from hierarchy_builder.errors import BuilderError, ImageError
from hierarchy_builder.images.decoding import decode_image
from hierarchy_builder.images.masks import MaskFolder, open_masks
from hierarchy_builder.images.originals import changed_images, file_hash, refuse_changed
from hierarchy_builder.images.sources import Reader, open_reader
from hierarchy_builder.images.table import COLUMNS, ImageTable
from hierarchy_builder.records import FEATURE_DTYPE, Block, ImageRecord, Sample, Status
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import StoredIndex, status_name
from hierarchy_builder.store.ledger import REOPENED, Ledger, stage_entry
from hierarchy_builder.store.samples import FACTS, make_sample, picture_of
from hierarchy_builder.store.shards import shard_name, write_shard
from hierarchy_builder.store.statistics import moments_of, per_channel, scatter_of
from hierarchy_builder.store.stored import Stored, fitted_vocabulary
from hierarchy_builder.store.units import stored_source, usable_rows
from hierarchy_builder.vocabulary.prototypes import NO_REGION, load_vocabulary, part_prototypes

PHOTO = ("path", "width", "height")
"""Columns of the index that say which label map belongs to a photo."""


class Stage(Protocol):
    """A stage, loaded in a worker."""

    def run(self, unit: Block, threads: int) -> dict[str, Any]:
        """Run one unit on up to `threads` threads and write it; returns its marker, with at least `images`."""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread inside the block.

    The last bits of a sum depend on the number of threads, and the bytes of a result must not depend on the machine.
    Units, images and tokens are distributed over threads instead.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def perform(stage: Stage, unit: Block, threads: int, ledger: Ledger) -> dict[str, Any]:
    """Run one unit and mark it as done when everything it wrote is on disk; returns what a progress bar shows.

    The rest is in the marker: the driver of a thousand workers cannot hold thousands of them.
    Raises LeaseLostError if another process has taken the build over.
    """
    ledger.check()
    started = time.perf_counter()
    result = stage.run(unit, threads)
    result["seconds"] = round(time.perf_counter() - started, 3)
    ledger.finish(unit.number, result)
    return {"images": result["images"], "failed": count_failed(result), "seconds": result["seconds"]}


def asked_encoder(config: ExtractConfig) -> Encoder:
    """Load the encoder of a configuration."""
    return load_encoder(config.encoder, weights=config.weights, precision=config.precision)


def image_encoder(
    folder: BuildFolder, source: str, config: ExtractConfig, encoder: Encoder | None
) -> ImageEncoder:
    """What encodes the images of `source`, if the encoder has the probe value that the build began with."""
    encoder = encoder or asked_encoder(config)
    check_probe(encoder, probe_value(encoder), config.precision, stage_entry(folder, "extract")["probe"])
    return ImageEncoder(encoder, open_reader(source), config.batch_size, config.max_pixels)


@dataclass(slots=True)
class ExtractStage:
    """A block of images → features, status and statistics of features.zarr; the marker keeps the outcomes.

    Of a unit that was reopened, rows that are ok keep their features and outcome; only the others are done.
    """

    folder: BuildFolder
    images: ImageEncoder
    index: StoredIndex

    @classmethod
    def load(
        cls, folder: BuildFolder, source: str, config: ExtractConfig, encoder: Encoder | None = None
    ) -> ExtractStage:
        """Raises ConfigMismatchError if the probe value of the encoder differs from the one the stage began with."""
        images = image_encoder(folder, source, config, encoder)
        return cls(folder, images, StoredIndex(folder.listing, COLUMNS))

    def run(self, unit: Block, threads: int) -> dict[str, Any]:
        records = list(ImageTable(self.index.rows(unit.start, unit.stop)))
        features, status, outcomes = self._kept(unit)
        with ThreadPoolExecutor(threads) as pool:
            for batch in self.images.batches(records, outcomes, pool):
                features[batch.rows] = batch.features
                status[batch.rows] = np.where(batch.finite, Status.OK, Status.NONFINITE)
        set_status(outcomes, status)
        moments = stores.moment_arrays(moments_of(features[status == Status.OK], threads))
        arrays = {"features": features, "status": status, **moments}
        written = stores.write_block(self.folder.features, unit, arrays)
        return {"images": len(unit), "outcomes": outcomes, **written, "batch_size": self.images.batch_size}

    def _kept(self, unit: Block) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Features, status and outcomes of the block to begin with; pending outcomes are empty."""
        encoder = self.images.encoder
        features = np.zeros((len(unit), *encoder.grid, encoder.width), FEATURE_DTYPE)
        status = np.full(len(unit), Status.SKIPPED, np.uint8)
        outcomes: list[dict[str, Any]] = [{} for _ in range(len(unit))]
        try:
            marker = Ledger(self.folder.ledger("extract"), REOPENED).result(unit.number)
            known = marker["outcomes"]
            before = replace(unit, stop=unit.start + len(known))
            kept, digest = stores.read_written(stores.open_store(self.folder.features), "features", before)
        except BuilderError:
            return features, status, outcomes
        if digest == marker["digests"].get("features"):
            for row in (
                row for row, outcome in enumerate(known) if outcome["status"] == status_name(Status.OK)
            ):
                features[row], status[row], outcomes[row] = kept[row], Status.OK, dict(known[row])
        return features, status, outcomes


@dataclass(slots=True)
class ClusterStage:
    """A block of features → regions, merges, flags and scores of regions.zarr."""

    folder: BuildFolder
    recipe: HierarchyRecipe
    image_size_px: int
    masks: MaskFolder | None
    index: StoredIndex

    @classmethod
    def load(cls, folder: BuildFolder, recipe: HierarchyRecipe, image_size_px: int) -> ClusterStage:
        masks = None if recipe.masks is None else open_masks(Path(recipe.masks))
        return cls(folder, recipe, image_size_px, masks, StoredIndex(folder.index, PHOTO))

    def run(self, unit: Block, threads: int) -> dict[str, Any]:
        usable, features = Stored(self.folder).usable(unit, "features")
        photos = self.index.rows(unit.start, unit.stop).filter(pa.array(usable))
        labels = label_maps(self.masks, photos.to_pylist(), self.image_size_px, features.shape[1:3])
        from hierarchy_builder.hierarchy import build_hierarchy  # loads numba, which a driver does not need

        hierarchy = build_hierarchy(features, self.recipe, labels, threads=threads)
        parts = {name: getattr(hierarchy, name) for name in ("regions", "merges", "flags", "scores")}
        rows = {name: scatter_rows(values, usable) for name, values in parts.items()}
        written = stores.write_block(self.folder.regions, unit, rows)
        return {**count_regions(hierarchy.regions, hierarchy.flags), **written}


def label_maps(
    masks: MaskFolder | None,
    photos: Sequence[Mapping[str, Any]],
    image_size_px: int,
    grid: tuple[int, int],
) -> np.ndarray | None:
    """Label maps on the tokens of these photos, int64 [n,H,W], or None where the recipe asks for none.

    photos: `path`, `width` and `height` of each.
    """
    if masks is None:
        return None
    maps = [masks.tokens(**photo, image_size_px=image_size_px, grid=grid) for photo in photos]
    return np.stack(maps) if maps else np.zeros((0, *grid), np.int64)


@dataclass(slots=True)
class LinkStage:
    """A block of parts → the nearest dataset-wide prototype of each, `prototypes` of regions.zarr."""

    folder: BuildFolder
    level: int
    centroids: np.ndarray

    @classmethod
    def load(cls, folder: BuildFolder, level: int) -> LinkStage:
        return cls(folder, level, load_vocabulary(fitted_vocabulary(folder))[0].centroids[-1])

    def run(self, unit: Block, threads: int) -> dict[str, Any]:
        usable, features, regions = Stored(self.folder).usable(unit, "features", "regions")
        found, distances = part_prototypes(features, regions, self.centroids, level=self.level)
        rows = {
            "prototypes": scatter_rows(found, usable, fill=NO_REGION),
            "prototype_distances": scatter_rows(distances, usable, fill=np.nan),
        }
        return {"images": int(usable.sum()), **stores.write_block(self.folder.regions, unit, rows)}


@dataclass(slots=True)
class CovarianceStage:
    """A block of features → the scatter matrix of its tokens, `block_scatter` of features.zarr."""

    folder: BuildFolder

    def run(self, unit: Block, threads: int) -> dict[str, Any]:
        stored = Stored(self.folder)
        _, features = stored.usable(unit, "features")
        scatter = scatter_of(features, per_channel(stored.moments(unit)).mean, threads)
        return {
            "images": len(unit),
            **stores.write_block(self.folder.features, unit, {"block_scatter": scatter[None]}),
        }


@dataclass
class ShardStage:
    """A range of usable rows → one tar. `start` and `stop` of a unit count usable rows, not rows of the index."""

    folder: BuildFolder
    config: ShardConfig
    stage_hash: str

    def run(self, unit: Block, threads: int) -> dict[str, Any]:
        tar = self.folder.shards / shard_name(self.config.split, unit.number)
        facts = write_shard(tar, self._samples(unit), config_hash=self.stage_hash)
        return {"images": facts["count"], **facts}

    @cached_property
    def usable_rows(self) -> np.ndarray:
        """Rows of the index that go into shards, in rising order."""
        return usable_rows(self.folder)

    @cached_property
    def index(self) -> StoredIndex:
        return StoredIndex(self.folder.index)

    @cached_property
    def _stored(self) -> Stored:
        return Stored(self.folder)

    def _samples(self, unit: Block) -> Iterator[Sample]:
        rows = self.usable_rows[unit.start : unit.stop]
        names = ("features", *self._stored.region_arrays)
        step = stores.ROWS_PER_CHUNK * 16
        for some in (rows[i : i + step] for i in range(0, len(rows), step)):
            span = slice(int(some[0]), int(some[-1]) + 1)
            table = self.index.rows(span.start, span.stop)
            arrays = {name: self._stored.rows(name, span) for name in names}
            records = list(ImageTable(table))
            outcomes, hashes = table.select(FACTS).to_pylist(), table.column("file_hash").to_pylist()
            for offset in (some - span.start).tolist():
                row = {name: values[offset] for name, values in arrays.items()}
                image = self._jpeg(records[offset], hashes[offset], unit) if self.config.images else None
                yield make_sample(records[offset], outcomes[offset], row, self.config, image)

    def _refuse_changed(self, unit: Block) -> None:
        """Raise ConfigMismatchError naming the photos of a unit that changed after they were encoded."""
        usable = self.usable_rows[unit.start : unit.stop]
        rows = self.index.rows(usable[0], usable[-1] + 1).take(pa.array(usable - usable[0]))
        refuse_changed(
            self._source, changed_images(rows.column("path").to_pylist(), rows.to_pylist(), self._reader)
        )

    def _jpeg(self, record: ImageRecord, expected: str | None, unit: Block) -> bytes:
        try:
            data = self._reader.read(record.path)
            if expected is not None and file_hash(data) != expected:
                self._refuse_changed(unit)
            image, _ = decode_image(data, max_pixels=self._extracted["config"]["max_pixels"])
        except ImageError as error:
            raise BuilderError(
                f"{record.path} of {self._source}: {error}; restore it, or shard with --no-images"
            ) from None
        return picture_of(image, self._extracted["encoder"]["image_size_px"], self.config)

    @cached_property
    def _extracted(self) -> dict[str, Any]:
        return stage_entry(self.folder, "extract")["inputs"]

    @cached_property
    def _source(self) -> str:
        return stored_source(self.folder)

    @cached_property
    def _reader(self) -> Reader:
        return open_reader(self._source)


def count_regions(regions: np.ndarray, flags: np.ndarray) -> dict[str, Any]:
    """Counts for the marker of a block: images, regions on each level, images with each flag."""
    from hierarchy_builder.hierarchy import Flag

    counts = regions.max(axis=(2, 3), initial=0).astype(int) + 1
    return {
        "images": len(regions),
        "regions": counts.sum(axis=0).tolist(),
        "flags": {flag.name.lower(): int(((flags & flag) != 0).sum()) for flag in Flag if flag.name},
    }


def scatter_rows(values: np.ndarray, usable: np.ndarray, fill: float = 0) -> np.ndarray:
    """Put the rows of usable images at their places in the block; other rows are `fill`."""
    block = np.full((len(usable), *values.shape[1:]), fill, values.dtype)
    block[usable] = values
    return block


def set_status(outcomes: list[dict[str, Any]], status: np.ndarray) -> None:
    """Write the status name of each row, and the reason if its features are not finite, into `outcomes`."""
    for outcome, value in zip(outcomes, status.tolist(), strict=True):
        outcome["status"] = status_name(Status(value))
        if value == Status.NONFINITE:
            outcome["reason"] = "features are not finite in float16"


def count_failed(result: Mapping[str, Any]) -> int:
    """Number of images that could not be used, from the marker of a unit."""
    return sum(outcome["status"] != status_name(Status.OK) for outcome in result.get("outcomes", ()))
