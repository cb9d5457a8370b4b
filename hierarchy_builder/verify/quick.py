"""What `verify --quick` looks at: whether files are there with their sizes, and records as sealed; it reads no payload.

Of the file of a block, its length and the checksums of its chunks are read, a few bytes each; at a URL, names alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from hierarchy_builder.config import ShardConfig
from hierarchy_builder.errors import VerificationError
from hierarchy_builder.fields import from_mapping
from hierarchy_builder.files import remote
from hierarchy_builder.files.remote import is_remote
from hierarchy_builder.files.whole import decoding, read_json, sizes_in
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.ledger import open_ledger
from hierarchy_builder.store.shard_set import success_problems
from hierarchy_builder.store.shards import shard_name, sidecar
from hierarchy_builder.store.stored import is_as_written
from hierarchy_builder.store.units import layout_of, stage_units

NOTHING = hashlib.sha256().hexdigest()
"""What a marker tells of the file of a block whose values are all 0: there is none."""


def missing_files(
    folder: BuildFolder, stage: str, stages: Mapping[str, Any]
) -> Iterator[tuple[int | None, str]]:
    """Yield the unit and a line for each output of a stage that is missing or has another size."""
    if stage in ("extract", "fuse"):
        for path in (folder.listing, folder.index):
            if text := _listing_problem(path, stages["extract"]["inputs"]["num_images"]):
                yield None, text
    if stage in ("extract", "cluster", "link"):
        yield from _missing_blocks(folder, stage)
    if stage == "vocabulary" and not folder.vocabulary.is_file():
        yield 0, f"{folder.vocabulary} is missing"
    if stage == "fuse":
        there = sizes_in(folder.parts)
        for unit in stage_units(folder, "fuse"):
            if not there.get(folder.part_moments(unit.number).name):
                yield unit.number, f"{folder.part_moments(unit.number)} is missing or empty"
    if stage in ("shard", "fuse"):
        yield from ((None, text) for text in _missing_tars(folder, stages["shard"]["request"]))


def _missing_tars(folder: BuildFolder, request: Mapping[str, Any]) -> Iterator[str]:
    config, ledger = from_mapping(ShardConfig, request), open_ledger(folder, "shard")
    units, shards, there = stage_units(folder, "shard"), folder.shards, sizes_in(folder.shards)
    if ledger.missing(units):
        for unit, marker in ledger.finished(units):
            tar = shards / shard_name(config.split, unit.number)
            yield from size_problems(tar, marker["bytes"], there)
        return
    index = read_json(shards / "index.json")
    yield from success_problems(shards, index)
    listed = {entry["url"]: entry["filesize"] for entry in index["shardlist"]}
    for name, size in listed.items():
        yield from size_problems(shards / name, size, there)
    for name in sorted(there.keys() - listed.keys()):
        if name.startswith(f"{index['split']}-") and name.endswith(".tar"):
            yield f"{shards / name} is not in index.json"


def size_problems(tar: Path, expected: int, there: Mapping[str, int]) -> Iterator[str]:
    """Compare a tar, and that it has a sidecar, with the bytes of the files that are there."""
    if tar.name not in there:
        yield f"{tar} is missing"
    elif there[tar.name] != expected:
        yield f"{tar} has {there[tar.name]:,} bytes, expected {expected:,}"
    if not there.get(sidecar(tar).name):
        yield f"{sidecar(tar)} is missing or empty"


def _listing_problem(path: Path, num_images: int) -> str | None:
    try:
        with decoding(path), path.open("rb") as file:
            found = pq.ParquetFile(file).metadata.num_rows
    except VerificationError as error:
        return str(error)
    return None if found == num_images else f"{path} has {found:,} rows, expected {num_images:,}"


def _missing_blocks(folder: BuildFolder, stage: str) -> Iterator[tuple[int, str]]:
    ledger, (path, layout) = open_ledger(folder, stage), layout_of(folder, stage)
    group = stores.open_store(path)
    there = remote.files_below(path) if is_remote(path) else None
    for block, marker in ledger.finished(stage_units(folder, stage)):
        for name in layout:
            written = marker.get("files", {}).get(name)
            if written is None:  # by an earlier release, whose markers do not tell
                continue
            if there is None:
                is_there = is_as_written(group, name, block, marker)
            else:
                is_there = written == NOTHING or stores.shard_file(path, name, block.number) in there
            if not is_there:
                text = f"{path}, block {block.number}: the file of {name} is missing or not the one that was written"
                yield block.number, text
