"""`--retry-failed`: images that could not be used, tried again once they are mended.

The listing may differ from the one a build began with in the sizes of failed files and in nothing else. Their rows
are done again and all others are kept, after which the build is the one it would have been had they been fine from
the start: the new listing is recorded, markers of untouched units are carried over to it, those of touched units
are taken back, and the stages that follow do just these again. The vocabulary, what is linked to it, and the tars
depend on all images and are made anew.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from hierarchy_builder.errors import ConfigMismatchError, ImageError
from hierarchy_builder.files import read_json, write_json
from hierarchy_builder.images.decoding import decode_image
from hierarchy_builder.images.sources import ImageSource
from hierarchy_builder.records import ImageRecord, Status
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import read_index, records_of, status_name
from hierarchy_builder.store.ledger import STAGES, Ledger, hash_of, read_manifest, write_manifest
from hierarchy_builder.store.shard_set import SUCCESS
from hierarchy_builder.store.shards import shard_name, sidecar
from hierarchy_builder.store.units import finished_stage

BY_BLOCK = ("extract", "cluster", "covariance")
"""Ledgers whose units depend on a block of rows."""
BY_SET = ("vocabulary", "link", "shard")
"""Those whose units depend on all images: a tar begins where the one before ends."""


def reopen_failed(
    folder: BuildFolder, records: Sequence[ImageRecord], images: ImageSource, inputs: Mapping[str, Any]
) -> int:
    """Take back the blocks of failed images that can be read now; returns how many of these there are.

    records: the images as listed now, in build order. inputs: what `extract` would be made with now.
    Raises BuilderError where extract is not finished, ConfigMismatchError where an image that was fine has changed.
    """
    entry = finished_stage(folder, "extract")
    table = read_index(folder.index)
    before, statuses = records_of(table), table.column("status").to_pylist()
    listed = {"listing_hash": "", "num_images": 0}
    if {**entry["inputs"], **listed} != {**inputs, **listed}:
        return 0  # another configuration or encoder: the ledger refuses it, key by key
    failed = [row for row, status in enumerate(statuses) if status != status_name(Status.OK)]
    _refuse_other_changes(folder, before, records, set(failed))
    mended = _readable(failed, before, records, images, inputs["config"]["max_pixels"])
    block_rows = inputs["config"]["block_rows"]
    if mended or inputs != entry["inputs"]:
        carry_over(folder, inputs, {row // block_rows for row in mended})
    return len(mended)


def _refuse_other_changes(
    folder: BuildFolder, before: Sequence[ImageRecord], now: Sequence[ImageRecord], failed: Collection[int]
) -> None:
    old = {record.path: (row, record) for row, record in enumerate(before)}
    new = {record.path: record for record in now}
    changed = sorted(old.keys() ^ new.keys())
    changed += [path for path, (row, was) in old.items() if row not in failed and new.get(path, was) != was]
    if changed:
        raise ConfigMismatchError(
            f"{folder.root}: {len(changed)} images beside the failed ones came, went or changed, the first is "
            f"{changed[0]}: --retry-failed mends failed images only; bring the others back, or start over with --fresh"
        )


def _readable(
    failed: Sequence[int],
    before: Sequence[ImageRecord],
    now: Sequence[ImageRecord],
    images: ImageSource,
    max_pixels: int,
) -> list[int]:
    """Failed rows whose file has another size than it had, or decodes."""

    def is_worth_it(row: int) -> bool:
        if before[row].num_bytes != now[row].num_bytes:
            return True
        try:
            decode_image(images.read(now[row].path), max_pixels=max_pixels)
        except (ImageError, OSError):
            return False
        return True

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        worth = list(pool.map(is_worth_it, failed))
    return np.asarray(failed, np.int64)[np.asarray(worth, bool)].tolist()


def carry_over(
    folder: BuildFolder, inputs: Mapping[str, Any], blocks: Collection[int], *, kept_tars: int = 0
) -> None:
    """Give every stage the hash that follows from `inputs` of extract, and take back what `blocks` decide.

    kept_tars: tars at the beginning of the set that stay as they are.
    A process that ends in between leaves markers of another hash, which count as not done: more is done again.
    """
    manifest = read_manifest(folder)
    _take_back(folder, blocks, kept_tars)
    stages = followed(manifest["stages"], inputs)
    renamed = {name: (manifest["stages"][name]["hash"], entry["hash"]) for name, entry in stages.items()}
    renamed["covariance"] = renamed["extract"]
    write_manifest(folder, {**manifest, "stages": stages})
    for name in (*BY_BLOCK, "shard"):
        if name in renamed:
            _rename_markers(folder, name, *renamed[name])
    if "shard" in renamed:
        for number in range(kept_tars):
            tar = folder.shards / shard_name(stages["shard"]["inputs"]["config"]["split"], number)
            _rename_sidecar(tar, Ledger(folder.ledger("shard"), renamed["shard"][1]), number)


def followed(stages: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Entries of a manifest with the hashes that follow from other `inputs` of extract."""
    found: dict[str, dict[str, Any]] = {}
    renamed: dict[str, str] = {}
    for stage in (name for name in STAGES if name in stages):
        entry = stages[stage]
        new = {
            name: renamed.get(value, value) if isinstance(value, str) else value
            for name, value in (inputs if stage == "extract" else entry["inputs"]).items()
        }
        found[stage] = {**entry, "inputs": new, "hash": hash_of(stage, new)}
        renamed[entry["hash"]] = found[stage]["hash"]
    return found


def _take_back(folder: BuildFolder, blocks: Collection[int], kept_tars: int) -> None:
    for name in BY_SET:
        for marker in folder.markers(name):
            if name != "shard" or int(marker.stem) >= kept_tars:
                folder.remove(marker)
    folder.remove(folder.vocabulary_work)
    folder.remove(folder.shards / SUCCESS)
    for name in BY_BLOCK:
        for block in blocks:
            folder.remove(Ledger(folder.ledger(name), "").marker(block))


def _rename_sidecar(tar: Path, ledger: Ledger, number: int) -> None:
    """Marker and sidecar of a tar that stays name the configuration it belongs to now."""
    if ledger.is_done(number) and sidecar(tar).exists():
        write_json(sidecar(tar), {**read_json(sidecar(tar)), "config_hash": ledger.stage_hash})
        ledger.finish(number, {**ledger.results([number])[0], "config_hash": ledger.stage_hash})


def _rename_markers(folder: BuildFolder, name: str, old: str, new: str) -> None:
    if old == new:
        return
    for marker in folder.markers(name):
        result = read_json(marker)
        if result.get("stage_hash") == old:
            write_json(marker, {**result, "stage_hash": new})
