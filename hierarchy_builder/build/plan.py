"""`plan`: what a build would make, take and resume, before it is begun; nothing of the build is written.

Sizes and times come from a rehearsal with some of the images (`rehearsal.py`) and are carried over to all of them.

    N images, H×W grid, C channels, T = H·W tokens
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hierarchy_builder.build.extraction import list_images, settle_rows
from hierarchy_builder.build.forecast import Plan, StagePlan
from hierarchy_builder.build.fused import settle_fused_rows
from hierarchy_builder.build.pipeline import BuildPlan, check_fused
from hierarchy_builder.build.plan_stages import stage_plans, standing_of
from hierarchy_builder.build.rehearsal import Findings, rehearse
from hierarchy_builder.build.session import Session
from hierarchy_builder.build.space import fitting_bytes, free_bytes
from hierarchy_builder.config import VocabularyConfig
from hierarchy_builder.files import json_text, size_on_disk
from hierarchy_builder.images.sources import ImageSource
from hierarchy_builder.records import Block, ImageRecord, Status, blocks_of
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import status_name, write_index
from hierarchy_builder.store.shards import shard_name
from hierarchy_builder.store.units import samples_per_shard

REHEARSAL_S = 60.0
"""Seconds a rehearsal goes on after its first round, where sizes need it."""
TAR_RECORD, TAR_END = 10_240, 1_024
"""A tar ends in two empty blocks and is filled up to whole records."""


def make_plan(
    folder: BuildFolder,
    source: str,
    plan: BuildPlan,
    session: Session,
    *,
    class_map: str | None = None,
    seconds: float = REHEARSAL_S,
    fused: bool = False,
    accept_new_files: bool = False,
) -> Plan:
    """List the images, compare with what `folder` holds, rehearse for some `seconds`, and foretell the rest.

    fused: in one pass. accept_new_files: images that are new are appended to what `folder` holds.
    Raises UsageError and BuilderError as the build would for images, encoder or configuration it cannot use.
    """
    images = list_images(folder, source, plan.extract, class_map)
    accept = accept_new_files and not session.fresh
    if fused:
        check_fused(plan, accept_new_files=accept_new_files)
        images, config = settle_fused_rows(folder, images, plan.extract, plan.shard, session)
    else:
        images, config = settle_rows(folder, images, plan.extract, session, accept=accept)
    records = images.records
    assert config.block_rows is not None
    plan = replace(plan, extract=config)
    found = rehearse(folder, images, records, plan, session, seconds=seconds, fused=fused)
    standing = standing_of(folder, images, plan, session, fused=fused, accept=accept)
    blocks = blocks_of(len(records), config.block_rows)
    usable = standing.usable(records, blocks, found)
    extracted = {"inputs": standing.extracted}
    per_shard = samples_per_shard(plan.shard, extracted, {"inputs": standing.clustered})
    tars = blocks_of(usable, per_shard)
    sizes = _sizes(images, plan, found, blocks, tars, standing.extracted)
    stages = stage_plans(standing, plan, found, session, blocks, tars)
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
        scratch=_scratch(stages, plan, found, standing.extracted["encoder"], usable, per_shard),
        free=free_bytes(folder.root),
    )


def _classes(images: ImageSource) -> dict[str, int]:
    """Images of each class, also of those without any."""
    counts = Counter(record.class_name for record in images.records)
    return {name: counts[name] for name in images.class_map}


def _unreadable(found: Findings) -> dict[str, str]:
    ok = status_name(Status.OK)
    return {path: row["reason"] or "" for path, row in sorted(found.outcomes.items()) if row["status"] != ok}


# Sizes


def _sizes(
    images: ImageSource,
    plan: BuildPlan,
    found: Findings,
    blocks: Sequence[Block],
    tars: Sequence[Block],
    extracted: Mapping[str, Any],
) -> dict[str, int]:
    """Bytes of every artefact by its place in the build folder; `extracted` are the inputs of extract."""
    rows, files, records = plan.extract.block_rows, found.files, images.records
    assert rows is not None
    grown = len(json_text({"stages": {"extract": {"inputs": {"parts": extracted.get("parts", [])}}}}))
    grown -= len(json_text({"stages": {"extract": {"inputs": {"parts": []}}}}))
    sizes = {
        "manifest.json": files["manifest.json"] + grown,
        "class_map.json": len(json_text(images.class_map)),
        "index.parquet": _index_bytes(records, found),
    }
    for store in found.chunks:
        sizes[store] = round(found.store_bytes(store, len(records), rows))
    if "parts" in found.once_per_block:
        sizes["parts"] = round(found.once_per_block["parts"] / found.num_blocks * len(blocks))
    if plan.vocabulary is not None:
        sizes["vocabulary.npz"] = _vocabulary_bytes(plan.vocabulary, found)
    units = {"vocabulary": 1, "shard": len(tars)}
    markers = sum(size * units.get(stage, len(blocks)) for stage, size in found.markers.items())
    listings = _index_bytes(records, None) * sum(name.endswith(".parquet") for name in files)
    copies = sum(
        size for name, size in files.items() if name.startswith("ledger/") and name.endswith(".json")
    )
    outcomes = round(found.outcome_bytes / found.num_images * len(records))
    sizes["ledger"] = markers + outcomes + listings + copies + grown
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
    stages: Sequence[StagePlan],
    plan: BuildPlan,
    found: Findings,
    encoder: Mapping[str, Any],
    usable: int,
    per_shard: int,
) -> int:
    """Bytes of files that are gone at the end: tokens a vocabulary is fitted to, rows copied from parts to a shard."""
    todo = {stage.stage for stage in stages if stage.state != "done"}
    if "vocabulary" in todo and plan.vocabulary is not None:
        return fitting_bytes(plan.vocabulary, usable * math.prod(encoder["grid"]), encoder["width"])
    if "fuse" in todo:
        rows = min(usable, per_shard + (plan.extract.block_rows or 0))
        return math.ceil(rows * float(found.samples.mean()))
    return 0
