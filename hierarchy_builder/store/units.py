"""The units of every stage of a build and their progress, from manifest and markers alone; nothing is changed."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hierarchy_builder.config import ShardConfig
from hierarchy_builder.errors import BuilderError
from hierarchy_builder.files.remote import is_remote
from hierarchy_builder.files.whole import decoding, readable_json, size_on_disk
from hierarchy_builder.records import Block, Status, blocks_of
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import joined, outcomes_of, status_name
from hierarchy_builder.store.ledger import (
    REOPENED,
    STAGES,
    VERBS,
    Ledger,
    is_fused,
    open_ledger,
    outputs_of,
    read_manifest,
    stage_entry,
)
from hierarchy_builder.store.shards import sample_bytes

if TYPE_CHECKING:
    from hierarchy_builder.store.arrays import Layout


def finished_stage(folder: BuildFolder, stage: str) -> dict[str, Any]:
    """Return the manifest's entry of a finished stage.

    Raises BuilderError naming the next step if units are missing, or if a fused build did not store the stage's output.
    """
    entry = stage_entry(folder, stage)
    if stage in ("extract", "cluster"):
        refuse_fused(folder, stage)
    ledger = open_ledger(folder, stage)
    units = stage_units(folder, stage)
    missing = ledger.missing(units)
    require_all(folder, stage, len(units) - len(missing), len(units))
    return entry


def refuse_fused(folder: BuildFolder, stage: str) -> None:
    """Raise BuilderError if this is a fused build, which has no output of this stage."""
    if is_fused(folder):
        raise BuilderError(
            f"{folder.root} is a fused build, which does not store what {stage} makes: for that, build without --fused "
            "in another folder; to finish this one, repeat the command that made it"
        )


def require_all(folder: BuildFolder, stage: str, num_done: int, num_units: int) -> None:
    """Raise BuilderError naming the next step if units of a stage are missing."""
    if num_done < num_units:
        raise BuilderError(
            f"{folder.root}: {stage} has done {num_done} of {num_units} units: "
            f"run `hierarchy-builder {VERBS['fuse' if is_fused(folder) else stage]} {folder.root}` again to finish it"
        )


def stage_units(folder: BuildFolder, stage: str) -> list[Block]:
    """Return every unit of a stage that is in the manifest, finished or not."""
    extracted = stage_entry(folder, "extract")
    num_rows, block_rows, _ = store_layout(extracted)
    if stage == "vocabulary":
        return [Block(number=0, start=0, stop=num_rows)]
    if stage != "shard":
        return blocks_of(num_rows, block_rows)
    config = ShardConfig(**stage_entry(folder, "shard")["inputs"]["config"])
    return blocks_of(
        len(usable_rows(folder, unfinished=True)),
        samples_per_shard(config, extracted["inputs"], stage_entry(folder, "cluster")["inputs"]),
    )


def progress_of(folder: BuildFolder) -> list[dict[str, Any]]:
    """Return one row per stage: units, finished ones, images, seconds summed over units, bytes on disk and state."""
    rows = []
    for stage in (name for name in STAGES if name in read_manifest(folder)["stages"]):
        ledger, units = open_ledger(folder, stage), stage_units(folder, stage)
        results = list(ledger.glances(units))
        rows.append(
            {
                "stage": stage,
                "units": len(units),
                "units_done": len(results),
                "images": sum(int(result["images"]) for result in results),
                "seconds": round(sum(result["seconds"] for result in results), 3),
                "bytes": size_on_disk(outputs_of(folder, stage)[1]),
                "state": state_of(folder, stage, len(units) - len(results)),
            }
        )
    return rows


def state_of(folder: BuildFolder, stage: str, num_missing: int) -> str:
    """Return `done`, `unfinished`, or `out of date` if a stage it was made from has changed since."""
    stages = read_manifest(folder)["stages"]
    inputs = stages[stage]["inputs"] if stage != "fuse" else {}  # made from no other stage
    made_from = {name: value for name, value in inputs.items() if name in STAGES and value}
    is_linked_since = stage == "shard" and not inputs.get("link") and "link" in stages
    if is_linked_since or any(
        name not in stages or stages[name]["hash"] != value for name, value in made_from.items()
    ):
        return "out of date"
    return "unfinished" if num_missing else "done"


def stored_source(folder: BuildFolder) -> str:
    """Return the folder or URL of the images; the manifest holds local paths relative to the build folder."""
    source = stage_entry(folder, "extract")["source"]
    return source if "://" in source or is_remote(folder.root) else os.path.normpath(folder.root / source)


def relative_source(folder: BuildFolder, source: str) -> str:
    """Return `source` as the manifest holds it: a URL unchanged, a local path relative to the build folder.

    A build at a URL holds a local path as it is on this machine.
    """
    if is_remote(folder.root) and "://" not in source:
        return str(Path(source).resolve())
    return source if "://" in source else os.path.relpath(Path(source).resolve(), folder.root.resolve())


def gathered(ledger: Ledger, units: Sequence[Block]) -> tuple[pa.Table, list[int]]:
    """Return the outcomes of all rows of finished units, and the batch sizes that their markers tell."""
    batch_sizes = list[int]()

    def told() -> Iterator[pa.RecordBatch]:
        for unit, marker in zip(units, ledger.results(len(units)), strict=True):
            with decoding(marker.path):
                batch = outcomes_of(marker["outcomes"], len(unit))
            yield batch
            batch_sizes.extend([marker["batch_size"]] if "batch_size" in marker else [])

    return joined(told()), batch_sizes


def outcomes_so_far(folder: BuildFolder) -> pa.Table:
    """Return the outcome of every row as the markers tell it, null for rows that are not done."""
    batches = {unit.number: outcomes_of([], len(unit)) for unit in stage_units(folder, "extract")}
    for block, told in told_blocks(folder):
        batches[block.number] = told
    return joined(batches.values())


def told_blocks(folder: BuildFolder) -> Iterator[tuple[Block, pa.RecordBatch]]:
    """Yield the blocks of which a marker tells, with the outcomes of their rows as columns.

    Those of units that were reopened (`ledger.REOPENED`) come last.
    """
    ledger = open_ledger(folder, "extract")
    blocks = {unit.number: unit for unit in stage_units(folder, "extract")}
    for each in (ledger, Ledger(ledger.folder, REOPENED)):
        for block, marker in each.finished(list(blocks.values())):
            with contextlib.suppress(BuilderError), decoding(marker.path):
                told = outcomes_of(marker["outcomes"], len(block))
                yield blocks.pop(block.number), told


def usable_rows(folder: BuildFolder, *, unfinished: bool = False) -> np.ndarray:
    """Return the rows of the index whose features are usable, from the markers of their blocks: int64, rising.

    unfinished: leave out blocks without a whole marker; otherwise they raise BuilderError.
    """
    ledger, units = open_ledger(folder, "extract"), stage_units(folder, "extract")
    usable, ok = list[np.ndarray](), status_name(Status.OK)
    for block, marker in ledger.finished(units):
        with decoding(marker.path):
            outcomes = enumerate(marker["outcomes"], block.start)
            rows = [row for row, outcome in outcomes if outcome["status"] == ok]
            usable.append(np.array(rows, np.int64))
    if len(usable) < len(units) and not unfinished:
        if not is_fused(folder):
            finished_stage(folder, "extract")  # says how to finish it
        list(ledger.results(len(units)))  # says what is wrong with the first that is not whole
    return np.concatenate(usable) if usable else np.empty(0, np.int64)


def store_layout(extracted: Mapping[str, Any]) -> tuple[int, int, dict[str, Any]]:
    """Return rows, rows per block and the description of the encoder, from the manifest's entry of extract."""
    inputs = extracted["inputs"]
    return inputs["num_images"], inputs["config"]["block_rows"], inputs["encoder"]


def layout_of(folder: BuildFolder, stage: str) -> tuple[Path, Layout]:
    """Return the store that a stage (or `covariance`) writes to and its arrays; none if it writes no arrays."""
    from hierarchy_builder.store import arrays as stores  # loads zarr, which `status` does not need

    shape = store_layout(stage_entry(folder, "extract"))
    cuts = stage_entry(folder, "cluster")["inputs"]["config"]["cuts"] if stage == "cluster" else ()
    path = folder.features if stage in ("extract", "covariance") else folder.regions
    return path, stores.stage_layout(stage, *shape, len(cuts) + 2)


def samples_per_shard(config: ShardConfig, extracted: Mapping[str, Any], clustered: Mapping[str, Any]) -> int:
    """Return the samples of every tar but the last: as configured, or estimated from the configured bytes of a tar.

    extracted, clustered: the inputs of these stages.
    """
    if config.shard_bytes is None:
        return config.samples_per_shard
    num_levels = len(clustered["config"]["cuts"]) + 2
    return max(1, config.shard_bytes // sample_bytes(config, extracted["encoder"], num_levels))


def running_stage(folder: BuildFolder) -> dict[str, Any] | None:
    """Return the progress that a running stage has last written (`Meter.as_row`), or None where no stage runs.

    `seconds` and `remaining_s` are as of now. The file of a killed run is ignored, since it holds no lock.
    """
    row = readable_json(folder.live) if folder.is_locked() else {}
    if not row:
        return None
    age = max(0.0, time.time() - row.pop("time", time.time()))
    remaining = row.get("remaining_s")
    row["seconds"] = round(row.get("seconds", 0.0) + age, 1)
    row["remaining_s"] = None if remaining is None else round(max(0.0, remaining - age), 1)
    return row
