"""The stages as whole steps over a build folder: list, check against the manifest, do what is missing, sum up."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from hierarchy_builder import stores
from hierarchy_builder.artefacts import BuildFolder, read_json, remove, size_on_disk, write_json
from hierarchy_builder.config import (
    ExtractConfig,
    HierarchyRecipe,
    ShardConfig,
    VocabularyConfig,
    identity,
    to_mapping,
)
from hierarchy_builder.encoders import load_encoder
from hierarchy_builder.encoders.probe import probe_value
from hierarchy_builder.errors import BuilderError, TooManySkippedError
from hierarchy_builder.images import open_source
from hierarchy_builder.index import in_build_order, read_index, status_name, write_index
from hierarchy_builder.kmeans import fit_prototypes
from hierarchy_builder.ledger import Ledger, begin_stage, read_manifest, stage_entry
from hierarchy_builder.progress import Reporter
from hierarchy_builder.publish import publish_shards
from hierarchy_builder.records import Block, Status, blocks_of
from hierarchy_builder.shards import shard_name, sidecar
from hierarchy_builder.stages import (
    ClusterStage,
    ExtractStage,
    ShardStage,
    Stage,
    VocabularyStage,
)
from hierarchy_builder.units import (
    finished_stage,
    relative_source,
    samples_per_shard,
    store_layout,
    stored_source,
    usable_rows,
)
from hierarchy_builder.vocabulary import sample_tokens, save_vocabulary
from hierarchy_builder.workers import Workers, has_gpu, map_units


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSummary:
    """What one step did: images in the whole artefact, those done now, seconds of this run, bytes on disk."""

    stage: str
    images: int
    new_images: int
    seconds: float
    num_bytes: int
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def images_per_second(self) -> float:
        return self.new_images / self.seconds if self.seconds else 0.0

    def as_row(self) -> dict[str, Any]:
        """The summary as plain data."""
        return {**asdict(self), "images_per_second": round(self.images_per_second, 2)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """How steps are carried out, whatever they do."""

    workers: Workers = field(default_factory=Workers)
    reporter: Reporter = field(default_factory=Reporter)
    fresh: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildPlan:
    """The configuration of every step of one build."""

    extract: ExtractConfig
    hierarchy: HierarchyRecipe
    shard: ShardConfig
    vocabulary: VocabularyConfig | None = None

    def as_mapping(self) -> dict[str, Any]:
        """All sections as plain data, as a config file holds them."""
        return to_mapping(self)


def build(
    folder: BuildFolder, source: str, plan: BuildPlan, session: Session, *, class_map: str | None = None
) -> list[StageSummary]:
    """Every step in order; `session.fresh` starts over from the first."""
    summaries = [extract(folder, source, plan.extract, session, class_map=class_map)]
    session = replace(session, fresh=False)
    summaries.append(cluster(folder, plan.hierarchy, session))
    if plan.vocabulary is not None:
        summaries.append(vocabulary(folder, plan.vocabulary, session))
    summaries.append(shard(folder, plan.shard, session))
    return summaries


def extract(
    folder: BuildFolder,
    source: str | None,
    config: ExtractConfig,
    session: Session,
    *,
    class_map: str | None = None,
) -> StageSummary:
    """Images → index.parquet and features.zarr. Without `source` the one in the manifest is taken up again.

    Raises ConfigMismatchError when the folder holds another configuration, encoder or listing,
    TooManySkippedError when more images than allowed could not be used.
    """
    if source is None:
        source, class_map = stored_source(folder), str(folder.class_map)
    folder.check_apart(os.path.join(source, config.split or ""))
    images = open_source(source, split=config.split, class_map=class_map)
    for warning in images.warnings:
        session.reporter.say(f"warning: {warning}")
    records = in_build_order(images.records, config.order)
    config = _settled(folder, config.for_images(len(records)), session)
    assert config.block_rows is not None
    encoder = load_encoder(config.encoder, weights=config.weights, precision=config.precision)
    inputs = {
        "config": {**identity(config), "encoder": encoder.describe()["name"]},
        "encoder": encoder.describe(),
        "num_images": len(records),
        "num_classes": max(images.class_map.values()) + 1,
        "listing_hash": images.listing_hash,
    }
    facts = {
        "source": relative_source(folder, images.location),
        "probe": probe_value(encoder),
        "request": to_mapping(config),
    }
    ledger = begin_stage(folder, "extract", inputs, facts, fresh=session.fresh)
    write_json(folder.class_map, images.class_map)
    blocks = blocks_of(len(records), config.block_rows)
    if not folder.index.exists():
        write_index(folder.index, records)
    stores.create_features(
        folder.features,
        num_rows=len(records),
        block_rows=config.block_rows,
        grid=encoder.grid,
        width=encoder.width,
    )
    del encoder
    load = partial(ExtractStage.load, folder, images.location, config)
    done, seconds = _do(load, ledger, blocks, session, "extract", uses_gpu=True)
    outcomes = [row for result in ledger.results(range(len(blocks))) for row in result["outcomes"]]
    write_index(folder.index, records, outcomes)
    _check_skipped(folder, outcomes, config.max_bad_fraction)
    return StageSummary(
        stage="extract",
        images=len(records),
        new_images=done,
        seconds=seconds,
        num_bytes=size_on_disk(folder.features),
        notes=_count_statuses(outcomes),
    )


def cluster(folder: BuildFolder, recipe: HierarchyRecipe, session: Session) -> StageSummary:
    """features.zarr → regions.zarr."""
    extracted = finished_stage(folder, "extract")
    inputs = {"config": identity(recipe), "extract": extracted["hash"]}
    if not len(usable_rows(folder)):
        raise BuilderError(f"{folder.root}: no image could be used, {folder.index.name} says why")
    ledger = begin_stage(folder, "cluster", inputs, {"request": to_mapping(recipe)}, fresh=session.fresh)
    num_rows, block_rows, encoder = store_layout(extracted)
    stores.create_regions(
        folder.regions,
        num_rows=num_rows,
        block_rows=block_rows,
        grid=tuple(encoder["grid"]),
        num_levels=recipe.num_levels,
    )
    blocks = blocks_of(num_rows, block_rows)
    done, seconds = _do(partial(ClusterStage.load, folder, recipe), ledger, blocks, session, "cluster")
    results = ledger.results(range(len(blocks)))
    images = sum(result["images"] for result in results)
    totals = [sum(level) for level in zip(*(result["regions"] for result in results), strict=True)]
    return StageSummary(
        stage="cluster",
        images=images,
        new_images=done,
        seconds=seconds,
        num_bytes=size_on_disk(folder.regions),
        notes={
            "regions_per_image": [round(total / max(images, 1), 2) for total in totals],
            "degenerate": sum(result["degenerate"] for result in results),
        },
    )


def vocabulary(folder: BuildFolder, config: VocabularyConfig, session: Session) -> StageSummary:
    """features.zarr and regions.zarr → vocabulary.npz and the prototype of each part."""
    clustered = finished_stage(folder, "cluster")
    inputs = {"config": identity(config), "cluster": clustered["hash"]}
    ledger = begin_stage(folder, "vocabulary", inputs, {"request": to_mapping(config)}, fresh=session.fresh)
    num_rows, block_rows, _ = store_layout(stage_entry(folder, "extract"))
    blocks = blocks_of(num_rows, block_rows)
    notes: dict[str, Any] = {}
    if not folder.vocabulary.exists():
        session.reporter.say(f"vocabulary: fitting {config.num_prototypes} prototypes")
        tokens = sample_tokens(_usable_blocks(folder, blocks), len(usable_rows(folder)), config)
        fitted = fit_prototypes(tokens, config)
        save_vocabulary(folder.vocabulary, fitted, config)
        notes = {"backend": fitted.backend, "inertia": fitted.inertia[-1]}
    stores.create_prototypes(folder.regions, num_rows=num_rows, block_rows=block_rows)
    done, seconds = _do(partial(VocabularyStage.load, folder), ledger, blocks, session, "vocabulary")
    return StageSummary(
        stage="vocabulary",
        images=sum(result["images"] for result in ledger.results(range(len(blocks)))),
        new_images=done,
        seconds=seconds,
        num_bytes=size_on_disk(folder.vocabulary),
        notes=notes,
    )


def shard(folder: BuildFolder, config: ShardConfig, session: Session) -> StageSummary:
    """Stores → webdataset tars with their index, class map, statistics and card; `_SUCCESS` last."""
    clustered = finished_stage(folder, "cluster")
    extracted = stage_entry(folder, "extract")
    has_vocabulary = folder.vocabulary.exists()
    inputs = {
        "config": to_mapping(config),
        "cluster": clustered["hash"],
        "vocabulary": finished_stage(folder, "vocabulary")["hash"] if has_vocabulary else None,
    }
    ledger = begin_stage(folder, "shard", inputs, {"request": to_mapping(config)}, fresh=session.fresh)
    units = blocks_of(len(usable_rows(folder)), samples_per_shard(config, extracted, clustered))
    _forget_lost_tars(folder, config, ledger, units)
    load = partial(
        ShardStage.load,
        folder,
        stored_source(folder),
        config,
        extracted["inputs"]["encoder"]["image_size_px"],
        extracted["inputs"]["config"]["max_pixels"],
        ledger.stage_hash,
    )
    done, seconds = _do(load, ledger, units, session, "shard")
    results = ledger.results(range(len(units)))
    publish_shards(folder, config, results)
    return StageSummary(
        stage="shard",
        images=sum(result["images"] for result in results),
        new_images=done,
        seconds=seconds,
        num_bytes=sum(result["bytes"] for result in results),
        notes={"shards": len(units)},
    )


def _do(
    load: Callable[[], Stage],
    ledger: Ledger,
    units: Sequence[Block],
    session: Session,
    stage: str,
    *,
    uses_gpu: bool = False,
) -> tuple[int, float]:
    """Do the units that are not marked; returns (images done now, seconds)."""
    todo = [unit for unit in units if not ledger.is_done(unit.number)]
    total, waiting = sum(map(len, units)), sum(map(len, todo))
    with session.reporter.stage(stage, total, total - waiting) as meter:
        for result in map_units(load, ledger, todo, session.workers, uses_gpu=uses_gpu):
            meter.advance(result["images"])
        return meter.done, meter.seconds


def _settled(folder: BuildFolder, config: ExtractConfig, session: Session) -> ExtractConfig:
    """The same with precision `auto` settled, so that a build is never continued in another arithmetic."""
    if config.precision != "auto":
        return config
    began = {} if session.fresh else read_manifest(folder)["stages"].get("extract", {})
    if began:
        return replace(config, precision=began["inputs"]["config"]["precision"])
    return replace(config, precision="bfloat16" if has_gpu(session.workers) else "float32")


def _usable_blocks(folder: BuildFolder, blocks: Sequence[Block]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for block in blocks:
        usable = stores.read_block(folder.features, "status", block) == Status.OK
        features = stores.read_block(folder.features, "features", block)[usable]
        yield features, stores.read_block(folder.regions, "regions", block)[usable]


def _forget_lost_tars(
    folder: BuildFolder, config: ShardConfig, ledger: Ledger, units: Sequence[Block]
) -> None:
    """Take back the markers of tars that are gone, cut short or without their sidecar."""
    for unit in units:
        tar = folder.shards / shard_name(config.split, unit.number)
        if not ledger.is_done(unit.number):
            continue
        size = tar.stat().st_size if tar.is_file() else None
        if size != read_json(ledger.marker(unit.number))["bytes"] or not sidecar(tar).is_file():
            remove(ledger.marker(unit.number))


def _count_statuses(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    names = [outcome["status"] for outcome in outcomes]
    return {name: names.count(name) for name in sorted(set(names))}


def _check_skipped(folder: BuildFolder, outcomes: Sequence[Mapping[str, Any]], allowed: float) -> None:
    bad = [row for row, outcome in enumerate(outcomes) if outcome["status"] != status_name(Status.OK)]
    if len(bad) == len(outcomes):
        raise BuilderError(
            f"{folder.index}: no image could be used, the first failed with: {outcomes[0]['reason']}"
        )
    if len(bad) > allowed * len(outcomes):
        paths = read_index(folder.index).column("path")
        named = [f"{paths[row]} ({outcomes[row]['reason']})" for row in bad[:5]]
        raise TooManySkippedError(
            f"{len(bad)} of {len(outcomes)} images could not be used, allowed is {allowed:.2%}: {'; '.join(named)}"
            f"{' …' if len(bad) > 5 else ''}; see {folder.index}, mend them or raise --max-bad-fraction"
        )
