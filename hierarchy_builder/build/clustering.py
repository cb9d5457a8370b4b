"""The steps from features to regions: clustering, other levels of the same trees, the vocabulary, and links to it.

`recut` makes the new `regions` array in a store of its own, block by block, and replaces the old array when the new
one is complete. If the process ends in between, either the old levels remain, or the manifest already asks for the
new ones and `settle_recut` finishes the replacement.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from hierarchy_builder.build.session import BuildPlan, Session, StageSummary, do_units
from hierarchy_builder.build.stages import ClusterStage, LinkStage, count_regions, scatter_rows
from hierarchy_builder.build.vocabulary import fit_vocabulary
from hierarchy_builder.config import HierarchyRecipe, VocabularyConfig
from hierarchy_builder.errors import BuilderError
from hierarchy_builder.fields import from_mapping, identity, to_mapping
from hierarchy_builder.files.whole import move, sha256_file, size_on_disk
from hierarchy_builder.images.masks import open_masks
from hierarchy_builder.images.table import ImageTable
from hierarchy_builder.records import Block
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import read_index, settle_index
from hierarchy_builder.store.ledger import (
    Ledger,
    begin_stage,
    hash_of,
    open_ledger,
    read_manifest,
    read_marker,
    replace_regions,
    stage_entry,
    write_manifest,
)
from hierarchy_builder.store.samples import PART_LEVEL
from hierarchy_builder.store.stored import Stored
from hierarchy_builder.store.units import (
    finished_stage,
    layout_of,
    outcomes_so_far,
    stage_units,
    store_layout,
    usable_rows,
)
from hierarchy_builder.vocabulary.prototypes import save_vocabulary


def cluster(folder: BuildFolder, recipe: HierarchyRecipe, session: Session) -> StageSummary:
    """features.zarr → regions.zarr."""
    extracted = finished_stage(folder, "extract")
    settle_index(folder.index, folder.listing, outcomes_so_far(folder))
    if not len(usable_rows(folder)):
        raise BuilderError(f"{folder.root}: no image could be used; {folder.index.name} says why")
    paths = read_index(folder.index, ["path"]).column("path")
    inputs = cluster_inputs(recipe, extracted["hash"], paths)
    ledger = begin_stage(folder, "cluster", inputs, {"request": to_mapping(recipe)}, fresh=session.fresh)
    settle_recut(folder)
    stores.create(*layout_of(folder, "cluster"))
    blocks = stage_units(folder, "cluster")
    image_size_px = extracted["inputs"]["encoder"]["image_size_px"]
    load = partial(ClusterStage.load, folder, recipe, image_size_px)
    return _with_regions(do_units(load, ledger, blocks, session), folder)


def cluster_inputs(recipe: HierarchyRecipe, extract_hash: str, paths: pa.ChunkedArray) -> dict[str, Any]:
    """Everything that decides the regions. Raises UsageError where the label maps do not fit the images `paths`."""
    inputs: dict[str, Any] = {"config": identity(recipe), "extract": extract_hash}
    if recipe.masks is not None:
        masks = open_masks(Path(recipe.masks))
        masks.check_photos(paths.to_pylist())
        inputs["masks"] = masks.digest()
    return inputs


def stage_inputs(
    extracted: Mapping[str, Any],
    plan: BuildPlan,
    images: ImageTable,
    link_hash: str | None = None,
) -> dict[str, dict[str, Any]]:
    """What each stage of a build would be made with, in order, as the manifest would hold it.

    extracted: that of `extract`. link_hash: that of links which are there already.
    """
    extract_hash = hash_of("extract", extracted)
    clustered = cluster_inputs(plan.hierarchy, extract_hash, images.column("path"))
    found, cluster_hash = {"extract": dict(extracted)}, hash_of("cluster", clustered)
    if plan.vocabulary is not None:
        found["vocabulary"] = {"config": identity(plan.vocabulary), "extract": extract_hash}
    found["cluster"] = clustered
    if plan.vocabulary is not None:
        level = min(PART_LEVEL, len(plan.hierarchy.cuts))
        fitted_hash = hash_of("vocabulary", found["vocabulary"])
        found["link"] = {"config": {"level": level}, "vocabulary": fitted_hash, "cluster": cluster_hash}
        link_hash = hash_of("link", found["link"])
    found["shard"] = {"config": identity(plan.shard), "cluster": cluster_hash, "link": link_hash}
    return found


def recut(folder: BuildFolder, cuts: Sequence[float], session: Session) -> StageSummary:
    """Make other levels of regions.zarr from its stored trees, without reading features."""
    settle_recut(folder)
    write_manifest(folder, read_manifest(folder))  # its copy may be missing where an earlier call was stopped
    clustered = finished_stage(folder, "cluster")
    recipe = from_mapping(HierarchyRecipe, {**clustered["request"], "cuts": list(cuts)}, "--recut")
    inputs = {**clustered["inputs"], "config": identity(recipe)}
    blocks, summary = stage_units(folder, "cluster"), StageSummary(stage="cluster", images=0)
    if inputs != clustered["inputs"]:
        ledger = Ledger(folder.ledger("recut"), hash_of("cluster", inputs))
        if not any(ledger.finished(blocks)):  # levels of an unfinished run with other cuts
            folder.remove(folder.recut)
            folder.remove(ledger.folder)
        shape = store_layout(stage_entry(folder, "extract"))
        layout = stores.stage_layout("cluster", *shape, recipe.num_levels)
        stores.create(folder.recut, {"regions": layout["regions"]})
        summary = do_units(partial(RecutStage, folder, recipe), ledger, blocks, session)
        replace_regions(folder, inputs, {"request": to_mapping(recipe)})
        settle_recut(folder)
    return _with_regions(summary, folder)


def _with_regions(summary: StageSummary, folder: BuildFolder) -> StageSummary:
    """The summary of `cluster` or `recut`, with bytes and counts of regions from the markers."""
    results = list(open_ledger(folder, "cluster").results(len(stage_units(folder, "cluster"))))
    images = sum(result["images"] for result in results)
    totals = [sum(level) for level in zip(*(result["regions"] for result in results), strict=True)]
    flagged = {name: sum(result["flags"][name] for result in results) for name in results[0]["flags"]}
    return replace(
        summary,
        stage="cluster",
        images=images,
        num_bytes=size_on_disk(folder.regions),
        notes={
            "regions_per_image": [round(total / max(images, 1), 2) for total in totals],
            **{name: count for name, count in flagged.items() if count or name == "degenerate"},
        },
    )


def vocabulary(folder: BuildFolder, config: VocabularyConfig, session: Session) -> StageSummary:
    """features.zarr → vocabulary.npz, independent of the regions; an interrupted fit resumes."""
    inputs = {"config": identity(config), "extract": finished_stage(folder, "extract")["hash"]}
    ledger = begin_stage(folder, "vocabulary", inputs, {"request": to_mapping(config)}, fresh=session.fresh)
    images, is_new, started = len(usable_rows(folder)), not ledger.is_done(0), time.perf_counter()
    if is_new:
        fitted = fit_vocabulary(folder, config, session.workers, session.reporter)
        save_vocabulary(folder.vocabulary, fitted, config, config_hash=ledger.stage_hash)
        folder.remove(folder.vocabulary_work)
        seconds = round(time.perf_counter() - started, 3)
        facts = {
            "tokens": int(fitted.counts[-1].sum()),
            "inertia": fitted.inertia[-1],
            "sha256": sha256_file(folder.vocabulary),
        }
        ledger.finish(0, {"images": images, "seconds": seconds, **facts})
    result = ledger.result(0)
    return StageSummary(
        stage="vocabulary",
        images=images,
        new_images=images if is_new else 0,
        seconds=time.perf_counter() - started,
        num_bytes=size_on_disk(folder.vocabulary),
        notes={"sizes": list(config.sizes), "tokens": result["tokens"], "inertia": result["inertia"]},
    )


def link(folder: BuildFolder, session: Session) -> StageSummary:
    """vocabulary.npz and regions.zarr → the prototype of each part; after `recut` only this is repeated."""
    fitted, clustered = finished_stage(folder, "vocabulary"), finished_stage(folder, "cluster")
    level = min(PART_LEVEL, len(clustered["inputs"]["config"]["cuts"]))
    inputs = {"config": {"level": level}, "vocabulary": fitted["hash"], "cluster": clustered["hash"]}
    ledger = begin_stage(folder, "link", inputs, {}, fresh=session.fresh)
    stores.create(*layout_of(folder, "link"))
    blocks = stage_units(folder, "link")
    summary = do_units(partial(LinkStage.load, folder, level), ledger, blocks, session)
    images = sum(result["images"] for result in ledger.results(len(blocks)))
    return replace(summary, images=images, num_bytes=size_on_disk(folder.regions / "prototypes"))


@dataclass(slots=True)
class RecutStage:
    """A block of objects and merges → regions of other cuts, in the store `regions.zarr.recut`."""

    folder: BuildFolder
    recipe: HierarchyRecipe

    def run(self, unit: Block, threads: int) -> dict[str, Any]:
        from hierarchy_builder.hierarchy.recipe import cut_levels, given_levels

        usable, objects, merges, flags = Stored(self.folder).usable(unit, "regions", "merges", "flags")
        regions = cut_levels(objects[:, 0], merges, self.recipe.cuts, given_levels(flags, self.recipe))
        written = stores.write_block(self.folder.recut, unit, {"regions": scatter_rows(regions, usable)})
        return {**count_regions(regions, flags), **written}


def settle_recut(folder: BuildFolder) -> None:
    """Replace the old levels by finished new ones, if the manifest asks for them already."""
    stage_hash = stage_entry(folder, "cluster")["hash"]
    done, units = Ledger(folder.ledger("recut"), stage_hash), stage_units(folder, "cluster")
    if done.missing(units):
        return
    if (folder.recut / "regions" / "zarr.json").exists():
        folder.remove(folder.regions / "regions")
        if (folder.regions / "regions").exists():
            raise BuilderError(
                f"{folder.regions / 'regions'} holds files that no build wrote: move them away and repeat the command"
            )
        move(folder.recut / "regions", folder.regions / "regions")
    clustered = Ledger(folder.ledger("cluster"), stage_hash)
    for unit, result in zip(units, done.results(len(units)), strict=True):
        before = read_marker(clustered.marker(unit.number))
        # Markers of earlier releases have no `files`; those of the other arrays are then not known here either.
        both = {name: {**before[name], **result.pop(name)} for name in ("digests", "files") if name in before}
        result.pop("files", None)
        clustered.finish(unit.number, {**result, **both})
    folder.remove(folder.recut)
    folder.remove(done.folder)
