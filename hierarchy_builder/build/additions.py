"""`--accept-new-files`: images that came after a build began become rows after its rows.

Rows that are there keep their place, key and label; new classes get ids after those that are taken. Whole blocks
stay as they are, the last one grows. Tars of old rows stay too, unless a vocabulary is linked to the parts, which is
fitted to all images anew. The manifest holds the parts a listing grew by, so that the plain command goes on later.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hierarchy_builder.build.changes import BY_BLOCK, carry_over, followed
from hierarchy_builder.build.recut import settle_recut
from hierarchy_builder.config import ExtractConfig, ShardConfig
from hierarchy_builder.errors import ConfigMismatchError
from hierarchy_builder.images.sources import ImageSource, listing_hash
from hierarchy_builder.records import ImageRecord, Status, blocks_of
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import in_build_order, read_index, records_of, status_name, write_index
from hierarchy_builder.store.ledger import open_ledger, read_manifest
from hierarchy_builder.store.units import samples_per_shard, usable_rows

LISTING = ("listing_hash", "num_images", "num_classes", "parts")
"""Inputs of extract that change when images are added."""


def in_row_order(folder: BuildFolder, images: ImageSource, order: str, *, accept: bool) -> ImageSource:
    """The images with `records` in the order of rows: those of the build first where it may grow or has grown.

    accept: whether images may be added now. Raises ConfigMismatchError where one that was there changed or is gone.
    """
    began = read_manifest(folder)["stages"].get("extract")
    if began is None or not (accept or "parts" in began["inputs"]) or not folder.listing.exists():
        return dataclasses.replace(images, records=in_build_order(images.records, order))
    before = records_of(read_index(folder.listing))[: began["inputs"]["num_images"]]
    ids = _grown_classes(began["class_map"], images.class_map)
    named = [dataclasses.replace(record, label=ids[record.class_name]) for record in images.records]
    now = {record.path: record for record in named}
    if accept:
        _refuse_changes(folder, before, now)
    kept = [dataclasses.replace(now[old.path], key=old.key) for old in before if old.path in now]
    old_paths, taken = {old.path for old in before}, {old.key for old in before}
    new = [_with_free_key(record, taken) for record in named if record.path not in old_paths]
    records = kept + in_build_order(new, order)
    return dataclasses.replace(images, records=records, class_map=ids, listing_hash=listing_hash(records))


def parts_of(folder: BuildFolder, images: ImageSource, *, accept: bool) -> dict[str, Any]:
    """The input `parts`, number and listing hash of the images that came at each time; none before any were added."""
    began = read_manifest(folder)["stages"].get("extract", {"inputs": {}})["inputs"]
    if not (accept or "parts" in began) or not began:
        return {}
    sizes = [size for size, _ in began.get("parts", [[began["num_images"], ""]])]
    sizes.append(len(images.records) - sum(sizes))
    parts, start = [], 0
    for size in (size for size in sizes if size > 0):
        parts.append([size, listing_hash(images.records[start : start + size])])
        start += size
    return {"parts": parts} if len(parts) > 1 else {}


def same_blocks(folder: BuildFolder, config: ExtractConfig, *, accept: bool) -> ExtractConfig:
    """The same with the blocks of a build that may grow, whatever its new size."""
    began = read_manifest(folder)["stages"].get("extract")
    if began is None or config.block_rows is not None or not (accept or "parts" in began["inputs"]):
        return config
    return dataclasses.replace(config, block_rows=began["inputs"]["config"]["block_rows"])


def append(folder: BuildFolder, records: Sequence[ImageRecord], inputs: Mapping[str, Any]) -> int:
    """Make room for the rows after those the build has; returns how many there are.

    records: all rows. inputs: what `extract` is made with now. A process that ends in between has changed nothing a
    repetition would not change; other differences than in the listing are left for the ledger to refuse.
    """
    if growth_of(folder, inputs) is None:
        return 0
    stages = read_manifest(folder)["stages"]
    if "cluster" in stages:
        settle_recut(folder)  # levels that are being put in place, before their store grows
    num_before, block_rows = stages["extract"]["inputs"]["num_images"], inputs["config"]["block_rows"]
    outcomes = _outcomes_so_far(folder, num_before, block_rows)
    growth = growth_of(folder, inputs)
    assert growth is not None
    num_blocks = len(blocks_of(len(records), block_rows))
    for store in (folder.features, folder.regions):
        if store.exists():
            stores.grow(store, num_rows=len(records), num_blocks=num_blocks)
    pending = [{"status": status_name(Status.PENDING)}] * (len(records) - num_before)
    write_index(folder.listing, records)
    write_index(folder.index, records, outcomes + pending)
    carry_over(folder, inputs, growth.touched, kept_tars=growth.kept_tars)
    return len(records) - num_before


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """What becomes of a build when images are appended.

    stages: entries of its manifest as they will be. hashes: stage → what its markers carry before. touched: blocks
    that are done again. kept_tars: tars at the beginning that stay.
    """

    stages: Mapping[str, Mapping[str, Any]]
    hashes: Mapping[str, str]
    touched: Collection[int]
    kept_tars: int

    def keeps(self, stage: str, unit: int) -> bool:
        """Whether a unit that is done stays so."""
        return unit not in self.touched if stage in BY_BLOCK else stage == "shard" and unit < self.kept_tars


def growth_of(folder: BuildFolder, inputs: Mapping[str, Any]) -> Growth | None:
    """What `append` makes of a build; nothing is changed.

    inputs: what `extract` would be made with. None where nothing is appended: there is no build yet, it has these
    images, or more than its listing differs.
    """
    stages = read_manifest(folder)["stages"]
    began, listing = stages.get("extract"), dict.fromkeys(LISTING)
    if began is None or began["inputs"] == inputs or {**began["inputs"], **listing} != {**inputs, **listing}:
        return None
    num_before, block_rows = began["inputs"]["num_images"], inputs["config"]["block_rows"]
    return Growth(
        stages=followed(stages, inputs),
        hashes={stage: entry["hash"] for stage, entry in stages.items()},
        touched={num_before // block_rows} if num_before % block_rows else set(),
        kept_tars=_whole_tars(folder),
    )


def _grown_classes(before: Mapping[str, int], now: Mapping[str, int]) -> dict[str, int]:
    """Ids of the build, then of the source where they agree with them, else the next free ones by name."""
    if all(now.get(name, label) == label for name, label in before.items()):
        return {**before, **now}
    ids = dict(before)
    for name in sorted(now.keys() - before.keys()):
        ids[name] = max(ids.values()) + 1
    return ids


def _refuse_changes(
    folder: BuildFolder, before: Sequence[ImageRecord], now: Mapping[str, ImageRecord]
) -> None:
    def looks(record: ImageRecord | None) -> tuple[str, int, int] | None:
        return None if record is None else (record.class_name, record.label, record.num_bytes)

    changed = [old.path for old in before if looks(now.get(old.path)) != looks(old)]
    if changed:
        raise ConfigMismatchError(
            f"{folder.root}: {len(changed)} images the build has changed or are gone, the first is {changed[0]}: "
            "--accept-new-files only adds images; bring them back, or start over with --fresh"
        )


def _with_free_key(record: ImageRecord, taken: set[str]) -> ImageRecord:
    key, digest = record.key, hashlib.sha256(record.path.encode()).hexdigest()
    if key in taken:
        key = next(k for k in (f"{record.key}-{digest[:n]}" for n in range(8, 65)) if k not in taken)
    taken.add(key)
    return dataclasses.replace(record, key=key)


def _outcomes_so_far(folder: BuildFolder, num_rows: int, block_rows: int) -> list[dict[str, Any]]:
    """Outcome of every row the build has, pending where its block is not done."""
    ledger, outcomes = open_ledger(folder, "extract"), list[dict[str, Any]]()
    for block in blocks_of(num_rows, block_rows):
        if ledger.is_done(block.number):
            outcomes += ledger.results([block.number])[0]["outcomes"]
        else:
            outcomes += [{"status": status_name(Status.PENDING)}] * len(block)
    return outcomes


def _whole_tars(folder: BuildFolder) -> int:
    """Tars at the beginning that no added image changes."""
    stages = read_manifest(folder)["stages"]
    if "shard" not in stages or "link" in stages or stages["shard"]["inputs"]["link"]:
        return 0
    config = ShardConfig(**stages["shard"]["inputs"]["config"])
    return len(usable_rows(folder)) // samples_per_shard(config, stages["extract"], stages["cluster"])
