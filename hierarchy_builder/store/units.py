"""What a build consists of and how far it is, read from manifest and markers alone; nothing is changed here."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hierarchy_builder.config import ShardConfig
from hierarchy_builder.errors import BuilderError
from hierarchy_builder.files import read_json, size_on_disk
from hierarchy_builder.records import Block, Status, blocks_of
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import read_index, status_name
from hierarchy_builder.store.ledger import STAGES, VERBS, is_fused, open_ledger, read_manifest, stage_entry
from hierarchy_builder.store.shards import sample_bytes


def finished_stage(folder: BuildFolder, stage: str) -> dict[str, Any]:
    """The manifest's entry of a stage all of whose units are done. Raises BuilderError naming what to run."""
    entry = stage_entry(folder, stage)
    ledger = open_ledger(folder, stage)
    units = stage_units(folder, stage)
    missing = [unit.number for unit in units if not ledger.is_done(unit.number)]
    if missing:
        raise BuilderError(
            f"{folder.root}: {stage} has done {len(units) - len(missing)} of {len(units)} units: "
            f"run `hierarchy-builder {VERBS[stage]} {folder.root}` again to finish it"
        )
    return entry


def stage_units(folder: BuildFolder, stage: str) -> list[Block]:
    """Every unit of a stage that is in the manifest, done or not."""
    extracted = stage_entry(folder, "extract")
    num_rows, block_rows, _ = store_layout(extracted)
    if stage == "vocabulary":
        return [Block(number=0, start=0, stop=num_rows)]
    if stage != "shard":
        return blocks_of(num_rows, block_rows)
    config = ShardConfig(**stage_entry(folder, "shard")["inputs"]["config"])
    return blocks_of(
        len(usable_rows(folder)), samples_per_shard(config, extracted, stage_entry(folder, "cluster"))
    )


def progress_of(folder: BuildFolder) -> list[dict[str, Any]]:
    """Per stage in the manifest: units done and in all, images, summed seconds of the units, bytes on disk, state."""
    outputs = {
        "extract": folder.features,
        "vocabulary": folder.vocabulary,
        "cluster": folder.regions,
        "link": folder.regions / "prototypes",
        "shard": folder.shards,
        "fuse": folder.shards,
    }
    rows = []
    for stage in (name for name in STAGES if name in read_manifest(folder)["stages"]):
        ledger, units = open_ledger(folder, stage), stage_units(folder, stage)
        done = [unit.number for unit in units if ledger.is_done(unit.number)]
        results = ledger.results(done)
        rows.append(
            {
                "stage": stage,
                "units": len(units),
                "units_done": len(done),
                "images": sum(result["images"] for result in results),
                "seconds": round(sum(result["seconds"] for result in results), 3),
                "bytes": size_on_disk(outputs[stage]),
                "state": state_of(folder, stage, len(units) - len(done)),
            }
        )
    return rows


def state_of(folder: BuildFolder, stage: str, num_missing: int) -> str:
    """`done`, `unfinished`, or `out of date` where what the stage was made from has been made anew since."""
    stages = read_manifest(folder)["stages"]
    inputs = stages[stage]["inputs"] if stage != "fuse" else {}  # made from the images alone
    made_from = {name: value for name, value in inputs.items() if name in STAGES and value}
    if any(name not in stages or stages[name]["hash"] != value for name, value in made_from.items()):
        return "out of date"
    return "unfinished" if num_missing else "done"


def stored_source(folder: BuildFolder) -> str:
    """Where the images of a build come from; a local path is kept relative to the build folder."""
    source = stage_entry(folder, "extract")["source"]
    return source if "://" in source else os.path.normpath(folder.root / source)


def relative_source(folder: BuildFolder, source: str) -> str:
    """How `source` is written into the manifest: URLs as they are, local paths relative to the build folder."""
    return source if "://" in source else os.path.relpath(Path(source).resolve(), folder.root.resolve())


def usable_rows(folder: BuildFolder) -> np.ndarray:
    """int64 rows of the index whose features are usable, rising."""
    if is_fused(folder):
        words = read_index(folder.index).column("status").to_pylist()
        return np.flatnonzero(np.array(words) == status_name(Status.OK))
    status = stores.read_rows(stores.open_store(folder.features), "status", slice(None))
    return np.flatnonzero(status == Status.OK)


def store_layout(extracted: Mapping[str, Any]) -> tuple[int, int, dict[str, Any]]:
    """(rows, rows of a block, description of the encoder) of the stores, from the manifest's extract entry."""
    inputs = extracted["inputs"]
    return inputs["num_images"], inputs["config"]["block_rows"], inputs["encoder"]


def layout_of(folder: BuildFolder, stage: str) -> tuple[Path, stores.Layout]:
    """The store a stage (or `covariance`) writes to and its arrays there; none for what is written elsewhere."""
    num_rows, block_rows, encoder = store_layout(stage_entry(folder, "extract"))
    rows, grid = {"num_rows": num_rows, "block_rows": block_rows}, tuple(encoder["grid"])
    if stage == "extract":
        return folder.features, stores.features_layout(**rows, grid=grid, width=encoder["width"])
    if stage == "covariance":
        blocks = len(blocks_of(num_rows, block_rows))
        return folder.features, stores.scatter_layout(num_blocks=blocks, width=encoder["width"])
    if stage == "cluster":
        num_levels = len(stage_entry(folder, "cluster")["inputs"]["config"]["cuts"]) + 2
        return folder.regions, stores.regions_layout(**rows, grid=grid, num_levels=num_levels)
    return folder.regions, stores.prototypes_layout(**rows) if stage == "link" else {}


def spread_rows(count: int, limit: int) -> list[int]:
    """At most `limit` of the numbers below `count`, spread evenly."""
    return np.linspace(0, count - 1, min(count, limit)).astype(np.int64).tolist() if count else []


def samples_per_shard(config: ShardConfig, extracted: Mapping[str, Any], clustered: Mapping[str, Any]) -> int:
    """Samples in every tar but the last, from the number asked for or from the bytes a tar aims at."""
    if config.shard_bytes is None:
        return config.samples_per_shard
    encoder = extracted["inputs"]["encoder"]
    size = sample_bytes(
        grid=tuple(encoder["grid"]),
        width=encoder["width"],
        num_levels=len(clustered["inputs"]["config"]["cuts"]) + 2,
        canvases=config.canvases,
        image_size_px=config.stored_px(encoder["image_size_px"]),
        feature_dtype=config.feature_dtype,
    )
    return max(1, config.shard_bytes // size)


def running_stage(folder: BuildFolder) -> dict[str, Any] | None:
    """What the run that works on a build has last told of its stage (`Meter.as_row`), None where there is none.

    `seconds` and `remaining_s` are as of now; what a killed run left behind does not count.
    """
    if not folder.is_locked() or not folder.live.is_file():
        return None
    try:
        told = read_json(folder.live)
    except BuilderError:  # gone, or another release's
        return None
    age = max(0.0, time.time() - told.pop("time", time.time()))
    left = told.get("remaining_s")
    told["seconds"] = round(told.get("seconds", 0.0) + age, 1)
    told["remaining_s"] = None if left is None else round(max(0.0, left - age), 1)
    return told
