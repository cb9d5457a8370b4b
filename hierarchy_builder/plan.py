"""`plan`: what a build would make, take and resume, before it is begun; nothing of the build is written.

Sizes and times come from a rehearsal with some of the images (`rehearsal.py`) and are carried over to all of them.

    N images, H×W grid, C channels, T = H·W tokens
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hierarchy_builder.artefacts import BuildFolder, json_text, size_on_disk
from hierarchy_builder.build import BuildPlan
from hierarchy_builder.config import VocabularyConfig, identity
from hierarchy_builder.encoders import load_encoder
from hierarchy_builder.extraction import extract_inputs, list_images, settle
from hierarchy_builder.forecast import Plan, StagePlan
from hierarchy_builder.images import ImageSource
from hierarchy_builder.index import in_build_order, status_name, write_index
from hierarchy_builder.kmeans import sum_clusters
from hierarchy_builder.ledger import Ledger, differences, hash_of, read_manifest
from hierarchy_builder.masks import open_masks
from hierarchy_builder.records import Block, ImageRecord, Status, blocks_of
from hierarchy_builder.rehearsal import Findings, Pace, rehearse
from hierarchy_builder.samples import PART_LEVEL
from hierarchy_builder.session import Session
from hierarchy_builder.shards import shard_name
from hierarchy_builder.space import fitting_bytes, free_bytes
from hierarchy_builder.stages import one_thread
from hierarchy_builder.units import samples_per_shard, usable_rows

REHEARSAL_S = 60.0
"""Seconds a rehearsal goes on after its first round, where sizes need it."""
TAR_RECORD, TAR_END = 10_240, 1_024
"""A tar ends in two empty blocks and is filled up to whole records."""
TRIED_TOKENS = 4_096
"""Tokens that are clustered to see how fast a vocabulary is fitted."""


def make_plan(
    folder: BuildFolder,
    source: str,
    plan: BuildPlan,
    session: Session,
    *,
    class_map: str | None = None,
    seconds: float = REHEARSAL_S,
) -> Plan:
    """List the images, compare with what `folder` holds, rehearse for some `seconds`, and foretell the rest.

    Raises UsageError and BuilderError as the build would for images, encoder or configuration it cannot use.
    """
    images = list_images(folder, source, plan.extract, class_map)
    records = in_build_order(images.records, plan.extract.order)
    config = settle(folder, plan.extract.for_images(len(records)), session)
    assert config.block_rows is not None
    plan = replace(plan, extract=config)
    found = rehearse(folder, images, records, plan, session, seconds=seconds)
    inputs = _inputs(folder, images, plan, session)
    blocks = blocks_of(len(records), config.block_rows)
    usable = _usable(folder, found, len(records), hash_of("extract", inputs["extract"]), blocks)
    per_shard = samples_per_shard(plan.shard, {"inputs": inputs["extract"]}, {"inputs": inputs["cluster"]})
    tars = blocks_of(usable, per_shard)
    sizes = _sizes(images, records, plan, found, blocks, tars)
    encoder = inputs["extract"]["encoder"]
    stages = _stages(folder, plan, inputs, found, session, blocks, tars)
    names = [shard_name(plan.shard.split, tar.number) for tar in tars]
    return Plan(
        source=images.location,
        num_images=len(records),
        input_bytes=sum(record.num_bytes for record in records),
        classes=_classes(images),
        warnings=images.warnings,
        tried=found.num_images,
        unreadable=_unreadable(found),
        usable=usable,
        sizes=sizes,
        uncertainty=2 * max(found.errors(len(records)).values()),
        shards={
            "count": len(tars),
            "first": names[0],
            "last": names[-1],
            "samples": per_shard,
            "bytes": _tar_bytes(min(per_shard, usable), found),
        },
        stages=stages,
        present=sum(size_on_disk(folder.root / name) for name in sizes),
        scratch=_scratch(stages, plan.vocabulary, usable * math.prod(encoder["grid"]), encoder["width"]),
        free=free_bytes(folder.root),
    )


def _classes(images: ImageSource) -> dict[str, int]:
    """Images of each class, also of those without any."""
    counts = Counter(record.class_name for record in images.records)
    return {name: counts[name] for name in images.class_map}


def _unreadable(found: Findings) -> dict[str, str]:
    ok = status_name(Status.OK)
    return {path: row["reason"] or "" for path, row in sorted(found.outcomes.items()) if row["status"] != ok}


def _usable(
    folder: BuildFolder, found: Findings, num_images: int, extract_hash: str, blocks: Sequence[Block]
) -> int:
    """Usable images: counted where all are extracted, else expected from those tried, at least one."""
    ledger = Ledger(folder.ledger("extract"), extract_hash)
    if folder.features.exists() and all(ledger.is_done(block.number) for block in blocks):
        return len(usable_rows(folder))
    return max(1, round(num_images * len(found.samples) / found.num_images))


# Sizes


def _sizes(
    images: ImageSource,
    records: Sequence[ImageRecord],
    plan: BuildPlan,
    found: Findings,
    blocks: Sequence[Block],
    tars: Sequence[Block],
) -> dict[str, int]:
    """Bytes of every artefact by its place in the build folder."""
    rows, files = plan.extract.block_rows, found.files
    assert rows is not None
    sizes = {
        "manifest.json": files["manifest.json"],
        "class_map.json": len(json_text(images.class_map)),
        "index.parquet": _index_bytes(records, found),
        "features.zarr": round(found.store_bytes("features.zarr", len(records), rows)),
        "regions.zarr": round(found.store_bytes("regions.zarr", len(records), rows)),
    }
    if plan.vocabulary is not None:
        sizes["vocabulary.npz"] = _vocabulary_bytes(plan.vocabulary, found)
    units = {"vocabulary": 1, "shard": len(tars)}
    markers = sum(size * units.get(stage, len(blocks)) for stage, size in found.markers.items())
    listings = _index_bytes(records, None) * sum(name.endswith(".parquet") for name in files)
    copies = sum(
        size for name, size in files.items() if name.startswith("ledger/") and name.endswith(".json")
    )
    outcomes = round(found.outcome_bytes / found.num_images * len(records))
    sizes["ledger"] = markers + outcomes + listings + copies
    beside = {name: size for name, size in files.items() if name.startswith("shards/")}
    sidecars = [name for name in beside if name.startswith(f"shards/{plan.shard.split}-")]
    sidecar = max(beside.pop(name) for name in sidecars)
    beside["shards/index.json"] = _shard_index_bytes(found, len(tars))
    beside["shards/class_map.json"] = sizes["class_map.json"]
    if plan.vocabulary is not None:
        beside["shards/vocabulary.npz"] = sizes["vocabulary.npz"]
    sizes["shards"] = (
        sum(_tar_bytes(len(tar), found) for tar in tars) + sidecar * len(tars) + sum(beside.values())
    )
    return sizes


def _index_bytes(records: Sequence[ImageRecord], found: Findings | None) -> int:
    """Write the index as it is before anything is done, or will be: images not tried with the outcome of any other."""
    outcomes = None
    if found is not None:
        known = list(found.outcomes.values())
        drawn = np.random.default_rng(0).integers(0, len(known), len(records)).tolist()
        outcomes = [
            found.outcomes.get(record.path, known[any_]) for record, any_ in zip(records, drawn, strict=True)
        ]
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "index.parquet"
        write_index(path, records, outcomes)
        return path.stat().st_size


def _vocabulary_bytes(config: VocabularyConfig, found: Findings) -> int:
    """Arrays of a known shape, and the same headers as in the rehearsal."""
    assert found.vocabulary is not None
    return found.files["vocabulary.npz"] + sum(
        sign * (sum(sizes) * (found.index["width"] * 4 + 8) + sum(sizes[1:]) * 2)
        for sign, sizes in ((1, config.sizes), (-1, found.vocabulary.sizes))
    )


def _shard_index_bytes(found: Findings, num_tars: int) -> int:
    entry = found.index["shardlist"][0]
    return len(json_text({**found.index, "shardlist": [entry] * num_tars}))


def _tar_bytes(num_samples: int, found: Findings) -> int:
    content = num_samples * float(found.samples.mean()) + TAR_END
    return math.ceil(content / TAR_RECORD) * TAR_RECORD


def _scratch(
    stages: Sequence[StagePlan], config: VocabularyConfig | None, num_tokens: int, width: int
) -> int:
    is_fitted = any(stage.stage == "vocabulary" and stage.state != "done" for stage in stages)
    return fitting_bytes(config, num_tokens, width) if config is not None and is_fitted else 0


# Stages


def _inputs(
    folder: BuildFolder, images: ImageSource, plan: BuildPlan, session: Session
) -> dict[str, dict[str, Any]]:
    """What each stage would be made with, in order, as the manifest holds it."""
    config = plan.extract
    encoder = load_encoder(config.encoder, weights=config.weights, precision=config.precision)
    found = {"extract": extract_inputs(images, config, encoder)}

    def made(stage: str) -> str:
        return hash_of(stage, found[stage])

    if plan.vocabulary is not None:
        found["vocabulary"] = {"config": identity(plan.vocabulary), "extract": made("extract")}
    found["cluster"] = {"config": identity(plan.hierarchy), "extract": made("extract")}
    if plan.hierarchy.masks is not None:
        found["cluster"]["masks"] = open_masks(Path(plan.hierarchy.masks)).digest()
    if plan.vocabulary is not None:
        level = min(PART_LEVEL, len(plan.hierarchy.cuts))
        found["link"] = {
            "config": {"level": level},
            "vocabulary": made("vocabulary"),
            "cluster": made("cluster"),
        }
    linked = {} if session.fresh else read_manifest(folder)["stages"].get("link", {})
    found["shard"] = {
        "config": identity(plan.shard),
        "cluster": made("cluster"),
        "link": made("link") if "link" in found else linked.get("hash"),
    }
    return found


def _stages(
    folder: BuildFolder,
    plan: BuildPlan,
    inputs: Mapping[str, Mapping[str, Any]],
    found: Findings,
    session: Session,
    blocks: Sequence[Block],
    tars: Sequence[Block],
) -> list[StagePlan]:
    stored = read_manifest(folder)["stages"]
    usable, grid = sum(map(len, tars)), inputs["extract"]["encoder"]["grid"]
    stages = []
    for stage, asked in inputs.items():
        units = {"vocabulary": [Block(number=0, start=0, stop=usable)], "shard": tars}.get(stage, blocks)
        ledger = Ledger(folder.ledger(stage), hash_of(stage, asked))
        is_begun = any(ledger.folder.glob("*.json"))
        differs = []
        if is_begun and not session.fresh:
            differs = differences(stored.get(stage, {}).get("inputs", {}), asked)
        todo = [unit for unit in units if session.fresh or not ledger.is_done(unit.number)]
        seconds = _seconds(found.paces[stage], todo, session)
        if stage == "vocabulary" and todo and plan.vocabulary is not None:
            width = inputs["extract"]["encoder"]["width"]
            seconds += _fitting_seconds(plan.vocabulary, usable * math.prod(grid), width, session)
        stages.append(
            StagePlan(
                stage=stage,
                units=len(units),
                units_done=len(units) - len(todo),
                images=sum(map(len, todo)),
                state=_state(is_begun, session.fresh, bool(differs), len(todo), len(units)),
                seconds=round(seconds, 1),
                differs=tuple(f"{name}: {before!r} there, {now!r} now" for name, before, now in differs),
            )
        )
    return stages


def _state(is_begun: bool, is_fresh: bool, is_other: bool, num_todo: int, num_units: int) -> str:
    if is_fresh and is_begun:
        return "starts over"
    if is_other:
        return "refused"
    if not num_todo:
        return "done"
    return "goes on" if num_todo < num_units else "to do"


def _seconds(pace: Pace, todo: Sequence[Block], session: Session) -> float:
    """Time for the units of `todo`, as many at once as there are workers."""
    if not todo:
        return 0.0
    workers = _num_workers(session) or pace.units
    more = max(1.0, min(workers, len(todo)) / min(workers, pace.units))
    return pace.startup + sum(map(len, todo)) * pace.per_image / (pace.at_once * more)


def _num_workers(session: Session) -> int | None:
    """Processes that do units; None on a cluster, which is not asked."""
    if session.workers.address:
        return None
    return 1 if session.workers.count == 0 else session.workers.count or os.cpu_count() or 1


def _fitting_seconds(config: VocabularyConfig, num_tokens: int, width: int, session: Session) -> float:
    """Time of all iterations, from one over a few tokens here; k-means++ takes about as long as one of them."""
    tokens = np.random.default_rng(0).standard_normal((TRIED_TOKENS, width), np.float32)
    centroids = tokens[: min(config.num_prototypes, TRIED_TOKENS)]
    with one_thread():
        started = time.perf_counter()
        sum_clusters(tokens, centroids, threads=1)
        spent = time.perf_counter() - started
    products = min(config.sampled_tokens or num_tokens, num_tokens) * config.num_prototypes
    each = spent * products / (len(tokens) * len(centroids))
    return (config.iterations + 1) * each / (_num_workers(session) or 1)
