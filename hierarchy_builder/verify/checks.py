"""Does a finished build hold what its manifest promises? Every artefact is read whole; nothing is changed.

Markers hold the SHA-256 of what their unit wrote, so a block that came from elsewhere is found as surely as a
flipped bit. What can be told from other artefacts is checked against them besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hierarchy_builder.config import HierarchyRecipe
from hierarchy_builder.errors import BuilderError
from hierarchy_builder.fields import from_mapping
from hierarchy_builder.files import read_json, sha256_file
from hierarchy_builder.hierarchy.recipe import check_nesting, cut_levels, given_levels
from hierarchy_builder.images.sources import listing_hash
from hierarchy_builder.records import Block, Status
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.damage import MANIFEST, Damage
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import OUTCOME_COLUMNS, read_index, records_of, status_name
from hierarchy_builder.store.ledger import VERBS, Ledger, check_manifest, is_fused, open_ledger, stage_entry
from hierarchy_builder.store.statistics import read_part_moments
from hierarchy_builder.store.units import layout_of, spread_rows, stage_units, state_of
from hierarchy_builder.terminal import counted
from hierarchy_builder.verify.shard_checks import check_shards
from hierarchy_builder.vocabulary.prototypes import NO_REGION, load_vocabulary

SAMPLED_ROWS = 16
"""Rows of a block whose regions are cut again from their trees."""


def find_problems(folder: BuildFolder) -> Iterator[str]:
    """Check everything the manifest names, in the order of the data; yields one line per problem."""
    return (damage.text for damage in find_damage(folder))


def find_damage(folder: BuildFolder) -> Iterator[Damage]:
    """The same with the stage and unit each problem belongs to.

    Raises UsageError when this is not the folder of a build.
    """
    folder.require(damaged=True)
    try:
        stages = check_manifest(folder.manifest)["stages"]
    except BuilderError as error:
        yield Damage(stage=MANIFEST, text=f"{error}; nothing else was checked")
        return
    doubted = set[int | None]()  # blocks that cannot bear witness against a tar
    checks: dict[str, Check] = {
        "extract": _check_extract,
        "vocabulary": _check_vocabulary,
        "cluster": _check_regions,
        "link": _check_links,
        "shard": partial(check_shards, doubted=doubted),
        "fuse": _check_fused,
    }
    for stage in (name for name in checks if name in stages):
        if state_of(folder, stage, 0) == "out of date":
            again = f"hierarchy-builder {VERBS[stage]} {folder.root} --fresh"
            text = f"{stage} is out of date, what it was made from has changed since: run `{again}`"
            yield Damage(stage=stage, text=text, is_stale=True)
            continue
        for damage in _check_stage(folder, stages, stage, checks[stage]):
            if stage != "shard":
                doubted.add(damage.unit)
            yield damage


Check = Callable[[BuildFolder, Mapping[str, Any]], Iterator[Damage]]


def _check_stage(
    folder: BuildFolder, stages: Mapping[str, Any], stage: str, check: Check
) -> Iterator[Damage]:
    try:
        yield from _check_layout(folder, stage)
        yield from _check_markers(folder, stage)
        yield from check(folder, stages)
    except BuilderError as error:
        yield Damage(stage=stage, text=f"{stage}: {error}")


def _check_layout(folder: BuildFolder, stage: str) -> Iterator[Damage]:
    """The descriptions of the arrays a stage writes."""
    path, layout = layout_of(folder, stage)
    for name in stores.damaged_layout(path, layout) if layout else []:
        yield Damage(stage=stage, text=f"{path / name / 'zarr.json'} is not as it was made")


def _check_markers(folder: BuildFolder, stage: str) -> Iterator[Damage]:
    ledger, units = open_ledger(folder, stage), stage_units(folder, stage)
    names = {ledger.marker(unit.number).name for unit in units}
    for stray in (path for path in folder.markers(stage) if path.name not in names):
        yield Damage(
            stage=stage, unit=int(stray.stem), text=f"{stray} marks a unit that {stage} does not have"
        )
    done = [ledger.is_done(unit.number) for unit in units]
    for unit, is_done in zip(units, done, strict=True):
        if not is_done and ledger.marker(unit.number).exists():
            yield Damage(
                stage=stage,
                unit=unit.number,
                text=f"{ledger.marker(unit.number)} is damaged or of another configuration",
            )
    if not all(done):
        yield Damage(
            stage=stage,
            text=f"{folder.root}: {stage} has done {sum(done)} of {len(units)} units: "
            f"run `hierarchy-builder {VERBS[stage]} {folder.root}` again to finish it",
        )


BlockCheck = Callable[[Block, Mapping[str, np.ndarray], Mapping[str, Any]], Iterator[str]]


def _each_block(
    folder: BuildFolder, stage: str, check: BlockCheck, ledger: Ledger | None = None
) -> Iterator[Damage]:
    """The SHA-256 of all that each finished block wrote, then `check(block, arrays, marker)`."""
    ledger = ledger or open_ledger(folder, stage)
    path, layout = layout_of(folder, stage)
    for block in stage_units(folder, "extract"):
        if not ledger.is_done(block.number):
            continue
        marker = read_json(ledger.marker(block.number))
        for text in _block_problems(path, layout, block, marker, check):
            yield Damage(stage=stage, unit=block.number, text=f"{path}, block {block.number}: {text}")


def _block_problems(
    path: Path, layout: stores.Layout, block: Block, marker: Mapping[str, Any], check: BlockCheck
) -> Iterator[str]:
    arrays: dict[str, np.ndarray] = {}
    for name in layout:
        try:
            arrays[name], digest = stores.read_written(path, block, name)
        except BuilderError as error:
            yield str(error)
            continue
        if marker.get("digests", {}).get(name, digest) != digest:
            yield f"{name} are not those that were written"
    if len(arrays) == len(layout):
        try:
            yield from check(block, arrays, marker)
        except BuilderError as error:
            yield str(error)


def _check_extract(folder: BuildFolder, stages: Mapping[str, Any]) -> Iterator[Damage]:
    entry = stages["extract"]
    yield from _check_listing(folder, entry)

    def check(block: Block, arrays: Mapping[str, np.ndarray], marker: Mapping[str, Any]) -> Iterator[str]:
        features, status = arrays["features"], arrays["status"]
        told = [outcome["status"] for outcome in marker["outcomes"]]
        if [status_name(Status(value)) for value in status.tolist()] != told:
            yield "status differs from the marker"
        usable = features[status == Status.OK]
        if not np.isfinite(usable).all():
            yield "values that are not finite"
        if len(usable) and not usable.reshape(len(usable), -1).any(axis=1).all():
            yield "usable rows that hold only zeros"

    yield from _each_block(folder, "extract", check)
    if stores.is_store(folder.features) and stores.has_scatter(folder.features):
        ledger = Ledger(folder.ledger("covariance"), entry["hash"])
        yield from _each_block(folder, "covariance", lambda *_: iter(()), ledger)


def _check_fused(folder: BuildFolder, stages: Mapping[str, Any]) -> Iterator[Damage]:
    """A build in one pass: its listing, the statistics of its blocks, its shards."""
    made = {name: stage_entry(folder, name) for name in stages["fuse"]["inputs"]}
    yield from _check_listing(folder, made["extract"])
    lost = list[Damage]()
    for block in stage_units(folder, "fuse"):
        try:
            read_part_moments(folder, block.number)
        except BuilderError as error:
            lost.append(Damage(stage="fuse", unit=block.number, text=str(error)))
    yield from lost or check_shards(folder, made)


def _check_listing(folder: BuildFolder, entry: Mapping[str, Any]) -> Iterator[Damage]:
    """The listing, the index and the class map against the manifest and the markers."""
    inputs, outcomes = entry["inputs"], _outcomes(folder)
    for path in (folder.listing, folder.index):
        try:
            table = read_index(path)
            if listing_hash(records_of(table)) != inputs["listing_hash"]:
                yield Damage(stage="extract", text=f"{path} is not the listing the build was made from")
        except (BuilderError, ValueError) as error:
            yield Damage(stage="extract", text=f"{path}: {error}")
            continue
        if path == folder.index and outcomes is not None:
            if table.select(OUTCOME_COLUMNS).to_pylist() != outcomes:
                yield Damage(stage="extract", text=f"{path}: outcomes differ from those of the markers")
            if records_of(table) != records_of(read_index(folder.listing)):
                yield Damage(
                    stage="extract", text=f"{path}: rows in another order than {folder.listing.name}"
                )
    class_map = entry.get("class_map")
    try:
        if class_map is not None and read_json(folder.class_map) != class_map:
            yield Damage(
                stage="extract", text=f"{folder.class_map} is not the class map the build was made with"
            )
    except BuilderError as error:
        yield Damage(stage="extract", text=str(error))


def _outcomes(folder: BuildFolder) -> list[dict[str, Any]] | None:
    """Outcome columns of the index as the markers have them, or None where markers are missing."""
    stage = "fuse" if is_fused(folder) else "extract"
    try:
        results = open_ledger(folder, stage).results([unit.number for unit in stage_units(folder, stage)])
    except BuilderError:
        return None
    rows = (row for result in results for row in result["outcomes"])
    return [{name: row.get(name) for name in OUTCOME_COLUMNS} for row in rows]


def _check_regions(folder: BuildFolder, stages: Mapping[str, Any]) -> Iterator[Damage]:
    recipe = from_mapping(HierarchyRecipe, stages["cluster"]["request"])

    def check(block: Block, arrays: Mapping[str, np.ndarray], marker: Mapping[str, Any]) -> Iterator[str]:
        usable = stores.read_block(folder.features, "status", block) == Status.OK
        regions, merges, flags = (arrays[name][usable] for name in ("regions", "merges", "flags"))
        violations = np.asarray(check_nesting(regions))
        if violations.any():
            yield f"{counted(int((violations > 0).sum()), 'image')} with ids that are not dense or not nested"
            return
        some = spread_rows(len(regions), SAMPLED_ROWS)
        if not len(some):
            return
        again = cut_levels(regions[some, 0], merges[some], recipe.cuts, given_levels(flags[some], recipe))
        if not np.array_equal(again, regions[some]):
            yield "regions that do not follow from their trees"

    yield from _each_block(folder, "cluster", check)


def _check_links(folder: BuildFolder, stages: Mapping[str, Any]) -> Iterator[Damage]:
    num_prototypes = stages["vocabulary"]["inputs"]["config"]["sizes"][-1]

    def check(block: Block, arrays: Mapping[str, np.ndarray], marker: Mapping[str, Any]) -> Iterator[str]:
        prototypes, distances = arrays["prototypes"], arrays["prototype_distances"]
        if ((prototypes >= num_prototypes) & (prototypes != NO_REGION)).any():
            yield f"prototypes of {num_prototypes} or more"
        if not np.array_equal(np.isfinite(distances), prototypes != NO_REGION):
            yield "prototypes without a distance, or the reverse"

    yield from _each_block(folder, "link", check)


def _check_vocabulary(folder: BuildFolder, stages: Mapping[str, Any]) -> Iterator[Damage]:
    ledger = open_ledger(folder, "vocabulary")
    if ledger.is_done(0):
        for text in _vocabulary_problems(folder, stages, read_json(ledger.marker(0))):
            yield Damage(stage="vocabulary", unit=0, text=f"{folder.vocabulary}: {text}")


def _vocabulary_problems(
    folder: BuildFolder, stages: Mapping[str, Any], marker: Mapping[str, Any]
) -> Iterator[str]:
    try:
        vocabulary, config, config_hash = load_vocabulary(folder.vocabulary)
    except BuilderError as error:
        yield str(error)
        return
    width = stages["extract"]["inputs"]["encoder"]["width"]
    if sha256_file(folder.vocabulary) != marker.get("sha256", sha256_file(folder.vocabulary)):
        yield "not the one that was fitted"
    if config_hash != stages["vocabulary"]["hash"]:
        yield f"configuration {config_hash[:12]} is not the manifest's"
    shapes = [level.shape for level in vocabulary.centroids]
    if shapes != [(size, width) for size in config.sizes]:
        yield f"prototypes of shape {shapes}, expected sizes {config.sizes} of width {width}"
    if not all(np.isfinite(level).all() for level in vocabulary.centroids):
        yield "prototypes that are not finite"
    for coarse, fine, parents in zip(
        vocabulary.counts, vocabulary.counts[1:], vocabulary.parents, strict=False
    ):
        if not np.array_equal(np.bincount(parents, fine, len(coarse)), coarse):
            yield "prototypes do not have the tokens of those below them"
