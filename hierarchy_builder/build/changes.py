"""Changes of a build that exists: failed images are tried again, and new images are appended.

`--retry-failed`: the listing may differ from the one of the build in the sizes of failed files and in nothing else.
The blocks of failed images that can be read now are done again, and all others are kept.

`--accept-new-files`: new images become rows after the existing rows. Existing rows keep their place, key and label;
new classes get the next free ids. Whole blocks stay as they are, and the last block grows. The manifest keeps the
size of each addition (`parts`), so that the plain command resumes later.

In both cases the new listing is recorded, markers of unchanged units are carried over to it, and markers of changed
units are removed, so that the later stages repeat only these. The result equals a build that had all images from the
start. The vocabulary and the links to it depend on all images and are made again, and so are tars after the first
change.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import operator
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hierarchy_builder.build.clustering import settle_recut
from hierarchy_builder.config import ExtractConfig, ShardConfig
from hierarchy_builder.errors import ConfigMismatchError, ImageError
from hierarchy_builder.files.whole import read_json, write_json
from hierarchy_builder.images.decoding import decode_image
from hierarchy_builder.images.sources import ImageSource, listing_hash
from hierarchy_builder.images.table import ImageTable
from hierarchy_builder.machine.process import num_cpus
from hierarchy_builder.records import ImageRecord, Status, blocks_of
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import in_build_order, read_images, status_name, write_index
from hierarchy_builder.store.ledger import (
    REOPENED,
    STAGES,
    hash_of,
    open_ledger,
    read_manifest,
    read_marker,
    rewrite_marker,
    stage_entry,
    write_manifest,
)
from hierarchy_builder.store.shard_set import SUCCESS
from hierarchy_builder.store.shards import shard_name, sidecar
from hierarchy_builder.store.units import outcomes_so_far, samples_per_shard, usable_rows
from hierarchy_builder.terminal import counted

BY_BLOCK = ("extract", "cluster", "covariance")
"""Stages whose units depend on one block of rows."""
BY_SET = ("vocabulary", "link", "shard")
"""Stages whose units depend on all images: a tar begins where the previous one ends."""


def reopen_failed(
    folder: BuildFolder, records: Sequence[ImageRecord], images: ImageSource, inputs: Mapping[str, Any]
) -> int:
    """Remove the markers of blocks with failed images that can be read now; returns the number of such images.

    records: the images as listed now, in build order. inputs: what `extract` would be made with now.
    Units that are not done, for example because an earlier call was killed, are done in any case.
    Raises BuilderError if extract never began, ConfigMismatchError if a usable image has changed.
    """
    entry = stage_entry(folder, "extract")
    before, outcomes = read_images(folder.listing), outcomes_so_far(folder)
    listed = {"listing_hash": "", "num_images": 0}
    if {**entry["inputs"], **listed} != {**inputs, **listed}:
        return 0  # another configuration or encoder: the ledger refuses it, key by key
    statuses, ok = outcomes.column("status").to_pylist(), status_name(Status.OK)
    now = {record.path: record for record in records}
    changed = sorted({record.path for record in before} ^ now.keys())
    changed += [
        was.path
        for was, status in zip(before, statuses, strict=True)
        if status == ok and now.get(was.path, was) != was
    ]
    _refuse(
        folder,
        changed,
        "besides the failed ones (added, removed or changed)",
        "--retry-failed only repeats failed images; restore the others",
    )
    failed = [row for row, status in enumerate(statuses) if status not in (None, ok)]
    readable = _readable(failed, before, records, images, inputs["config"]["max_pixels"])
    block_rows = inputs["config"]["block_rows"]
    if readable or inputs != entry["inputs"]:
        carry_over(folder, inputs, {row // block_rows for row in readable})
    return len(readable)


def _refuse(folder: BuildFolder, changed: Sequence[str], which: str, advice: str) -> None:
    if changed:
        raise ConfigMismatchError(
            f"{folder.root}: found changes of {counted(len(changed), 'image')} {which}, for example {changed[0]}: "
            f"{advice}, or start over with --fresh"
        )


def _readable(
    failed: Sequence[int],
    before: Sequence[ImageRecord],
    now: Sequence[ImageRecord],
    images: ImageSource,
    max_pixels: int,
) -> list[int]:
    """Failed rows whose file now has another size, or can be decoded."""

    def is_worth_it(row: int) -> bool:
        if before[row].num_bytes != now[row].num_bytes:
            return True
        try:
            decode_image(images.read(now[row].path), max_pixels=max_pixels)
        except (ImageError, OSError):
            return False
        return True

    with ThreadPoolExecutor(num_cpus()) as pool:
        return list(itertools.compress(failed, pool.map(is_worth_it, failed)))


def carry_over(
    folder: BuildFolder, inputs: Mapping[str, Any], blocks: Collection[int], *, kept_tars: int = 0
) -> None:
    """Give every stage the hash that follows from new `inputs` of extract, and remove the markers of `blocks`.

    kept_tars: number of tars at the beginning of the set that stay as they are.
    The manifest names the markers that get another hash until all have it; `finish_carrying` goes on from there.
    """
    manifest = read_manifest(folder)
    _remove_markers(folder, blocks, kept_tars)
    stages = followed(manifest["stages"], inputs)
    carried = {name: [manifest["stages"][name]["hash"], entry["hash"]] for name, entry in stages.items()}
    carried["covariance"] = carried["extract"]
    write_manifest(folder, {**manifest, "stages": stages, "carried": carried, "kept_tars": kept_tars})
    finish_carrying(folder)


def finish_carrying(folder: BuildFolder) -> None:
    """Give the markers of kept units the hashes that `carry_over` has recorded, if it was stopped before it did."""
    manifest = read_manifest(folder)
    carried = manifest.pop("carried", {})
    kept_tars = manifest.pop("kept_tars", 0)
    if not carried:
        return
    for name in (name for name in (*BY_BLOCK, "shard") if name in carried):
        _rename_markers(folder, name, *carried[name])
    if "shard" in carried:
        split = manifest["stages"]["shard"]["inputs"]["config"]["split"]
        for number in range(kept_tars):
            side, ledger = sidecar(folder.shards / shard_name(split, number)), open_ledger(folder, "shard")
            if ledger.is_done(number) and side.exists():
                write_json(side, {**read_json(side), "config_hash": ledger.stage_hash})
                ledger.finish(number, {**ledger.result(number), "config_hash": ledger.stage_hash})
    write_manifest(folder, manifest)


def followed(stages: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries of a manifest with the hashes that follow from new `inputs` of extract."""
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


def _remove_markers(folder: BuildFolder, blocks: Collection[int], kept_tars: int) -> None:
    for name in BY_SET:
        for marker in folder.markers(name):
            if name != "shard" or int(marker.stem) >= kept_tars:
                folder.remove(marker)
    folder.remove(folder.vocabulary_work)
    folder.remove(folder.shards / SUCCESS)
    for name in BY_BLOCK:
        for block in blocks:
            marker = folder.marker(name, block)
            if name != "extract":
                folder.remove(marker)
            elif marker.exists():  # the rows that are usable stay, see ExtractStage
                rewrite_marker(marker, {**read_marker(marker), "stage_hash": REOPENED})


def _rename_markers(folder: BuildFolder, name: str, old: str, new: str) -> None:
    if old == new:
        return
    for marker in folder.markers(name):
        result = read_marker(marker)
        if result.get("stage_hash") == old:
            rewrite_marker(marker, {**result, "stage_hash": new})


LISTING = ("listing_hash", "num_images", "num_classes", "parts")
"""Inputs of extract that change when images are added."""


def _with_kept_rows(folder: BuildFolder, *, accept: bool) -> Mapping[str, Any] | None:
    """The manifest's entry of an extraction whose rows keep their place, since images may be or have been added."""
    began = read_manifest(folder)["stages"].get("extract")
    return began if began and (accept or "parts" in began["inputs"]) else None


def in_row_order(folder: BuildFolder, images: ImageSource, order: str, *, accept: bool) -> ImageSource:
    """The images with `records` in the order of rows; those that the build has come first if images may be added.

    accept: whether images may be added now. Raises ConfigMismatchError if an existing one changed or is missing.
    """
    began = _with_kept_rows(folder, accept=accept)
    if began is None or not folder.listing.exists():
        return dataclasses.replace(images, records=in_build_order(images.records, order))
    before = read_images(folder.listing)[: began["inputs"]["num_images"]]
    ids = _grown_classes(began["class_map"], images.class_map)
    named = images.records.relabelled(ids)
    now = {record.path: record for record in named}
    if accept:
        looks = operator.attrgetter("class_name", "label", "num_bytes")
        changed = [old.path for old in before if old.path not in now or looks(now[old.path]) != looks(old)]
        advice = "--accept-new-files only adds images; restore them"
        _refuse(folder, changed, "of this build (changed or missing)", advice)
    kept = [dataclasses.replace(now[old.path], key=old.key) for old in before if old.path in now]
    old_paths, taken = {old.path for old in before}, {old.key for old in before}
    new = [_with_free_key(record, taken) for record in named if record.path not in old_paths]
    records = ImageTable.of([*kept, *in_build_order(ImageTable.of(new), order)])
    return dataclasses.replace(images, records=records, class_map=ids, listing_hash=listing_hash(records))


def parts_of(folder: BuildFolder, images: ImageSource, *, accept: bool) -> dict[str, Any]:
    """The input `parts`: number and listing hash of each addition; empty before images were added."""
    began = _with_kept_rows(folder, accept=accept)
    if began is None:
        return {}
    sizes = [size for size, _ in began["inputs"].get("parts", [[began["inputs"]["num_images"], ""]])]
    sizes.append(len(images.records) - sum(sizes))
    parts, start = [], 0
    for size in (size for size in sizes if size > 0):
        parts.append([size, listing_hash(images.records[start : start + size])])
        start += size
    return {"parts": parts} if len(parts) > 1 else {}


def same_blocks(folder: BuildFolder, config: ExtractConfig, *, accept: bool) -> ExtractConfig:
    """The configuration with the block size of the existing build, which must not change when images are added."""
    began = _with_kept_rows(folder, accept=accept)
    if began is None or config.block_rows is not None:
        return config
    return dataclasses.replace(config, block_rows=began["inputs"]["config"]["block_rows"])


def append(folder: BuildFolder, records: Sequence[ImageRecord], inputs: Mapping[str, Any]) -> int:
    """Extend the stores by the new rows; returns their number.

    records: all rows. inputs: what `extract` is made with now. The call can be repeated if the process ends in
    between. Differences other than in the listing are left for the ledger to refuse.
    """
    growth = growth_of(folder, inputs)
    if growth is None:
        return 0
    if "cluster" in growth.stages:
        settle_recut(folder)  # new levels that are not in place yet, before their store grows
    outcomes = outcomes_so_far(folder)
    num_blocks = len(blocks_of(len(records), inputs["config"]["block_rows"]))
    for store in (folder.features, folder.regions):
        if store.exists():
            stores.grow(store, num_rows=len(records), num_blocks=num_blocks)
    write_index(folder.listing, records)
    write_index(folder.index, records, outcomes)
    carry_over(folder, inputs, growth.touched, kept_tars=growth.kept_tars)
    return len(records) - len(outcomes)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """What appending images changes in a build.

    stages: the future entries of its manifest. touched: blocks that are done again. kept_tars: number of tars at the
    beginning that stay.
    """

    stages: Mapping[str, Mapping[str, Any]]
    touched: Collection[int]
    kept_tars: int

    def keeps(self, stage: str, unit: int) -> bool:
        """Whether a finished unit stays finished."""
        return unit not in self.touched if stage in BY_BLOCK else stage == "shard" and unit < self.kept_tars


def growth_of(folder: BuildFolder, inputs: Mapping[str, Any]) -> Growth | None:
    """What `append` would change in a build.

    inputs: what `extract` would be made with. Returns None if nothing is appended: there is no build yet, it has
    these images already, or more than the listing differs.
    """
    stages = read_manifest(folder)["stages"]
    began, listing = stages.get("extract"), dict.fromkeys(LISTING)
    if began is None or began["inputs"] == inputs or {**began["inputs"], **listing} != {**inputs, **listing}:
        return None
    num_before, block_rows = began["inputs"]["num_images"], inputs["config"]["block_rows"]
    return Growth(
        stages=followed(stages, inputs),
        touched={num_before // block_rows} if num_before % block_rows else set(),
        kept_tars=_whole_tars(folder),
    )


def _grown_classes(before: Mapping[str, int], now: Mapping[str, int]) -> dict[str, int]:
    """Class ids of the build, extended by those of the source if they agree, else by the next free ids by name."""
    if all(now.get(name, label) == label for name, label in before.items()):
        return {**before, **now}
    ids = dict(before)
    for name in sorted(now.keys() - before.keys()):
        ids[name] = max(ids.values()) + 1
    return ids


def _with_free_key(record: ImageRecord, taken: set[str]) -> ImageRecord:
    key, digest = record.key, hashlib.sha256(record.path.encode()).hexdigest()
    if key in taken:
        key = next(k for k in (f"{record.key}-{digest[:n]}" for n in range(8, 65)) if k not in taken)
    taken.add(key)
    return dataclasses.replace(record, key=key)


def _whole_tars(folder: BuildFolder) -> int:
    """Number of tars at the beginning that added images do not change."""
    stages = read_manifest(folder)["stages"]
    if "shard" not in stages or "link" in stages or stages["shard"]["inputs"]["link"]:
        return 0
    config = ShardConfig(**stages["shard"]["inputs"]["config"])
    return len(usable_rows(folder, unfinished=True)) // samples_per_shard(
        config, stages["extract"]["inputs"], stages["cluster"]["inputs"]
    )
