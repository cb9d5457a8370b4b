"""The whole build, and its last step: every stage is checked against the manifest and runs its missing units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from hierarchy_builder.build.clustering import cluster, link, vocabulary
from hierarchy_builder.build.extraction import extract
from hierarchy_builder.build.fused import fuse
from hierarchy_builder.build.inputs import refuse_lost_images
from hierarchy_builder.build.session import BuildPlan, Session, StageSummary, do_units
from hierarchy_builder.build.space import later_bytes
from hierarchy_builder.build.stages import CovarianceStage, ShardStage
from hierarchy_builder.config import ShardConfig
from hierarchy_builder.errors import UsageError
from hierarchy_builder.fields import identity, to_mapping
from hierarchy_builder.files.whole import sizes_in
from hierarchy_builder.images.masks import open_masks
from hierarchy_builder.images.sources import ImageSource
from hierarchy_builder.records import Block, blocks_of
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import settle_index
from hierarchy_builder.store.ledger import Ledger, begin_stage, open_ledger, read_manifest, with_licence
from hierarchy_builder.store.shard_set import publish_shards
from hierarchy_builder.store.shards import shard_name, sidecar
from hierarchy_builder.store.units import (
    finished_stage,
    layout_of,
    outcomes_so_far,
    samples_per_shard,
    stage_units,
    usable_rows,
)


def build(
    folder: BuildFolder,
    source: str | ImageSource,
    plan: BuildPlan,
    session: Session,
    *,
    class_map: str | None = None,
    retry_failed: bool = False,
    accept_new_files: bool = False,
    fused: bool = False,
) -> list[StageSummary]:
    """Run every step in order; `session.fresh` starts over, `retry_failed` tries failed images again.

    fused: run in one pass, without stores of features and regions; see `fused.py`.
    """
    if plan.hierarchy.masks is not None:
        open_masks(Path(plan.hierarchy.masks))  # refused before any image is read
    if fused:
        check_fused(plan, retry_failed=retry_failed, accept_new_files=accept_new_files)
        return [fuse(folder, source, plan, session, class_map=class_map)]
    summaries = [
        extract(
            folder,
            source,
            plan.extract,
            session,
            class_map=class_map,
            retry_failed=retry_failed,
            accept_new_files=accept_new_files,
            later=partial(later_bytes, plan),
        )
    ]
    session = replace(session, fresh=False)
    if plan.vocabulary is not None:
        summaries.append(vocabulary(folder, plan.vocabulary, session))
    summaries.append(cluster(folder, plan.hierarchy, session))
    if plan.vocabulary is not None:
        summaries.append(link(folder, session))
    summaries.append(shard(folder, plan.shard, session))
    return summaries


def check_fused(plan: BuildPlan, *, retry_failed: bool = False, accept_new_files: bool = False) -> None:
    """Raise UsageError for options that need the stores that a fused build does not keep."""
    given = {
        "--retry-failed": retry_failed,
        "--accept-new-files": accept_new_files,
        "--vocabulary": plan.vocabulary is not None,
    }
    if flags := [flag for flag, is_given in given.items() if is_given]:
        raise UsageError(
            f"{flags[0]} reads the stored features, which --fused does not keep: leave one of them out"
        )


def shard(folder: BuildFolder, config: ShardConfig, session: Session) -> StageSummary:
    """Stores → webdataset tars with their index, class map, statistics and card; `_SUCCESS` last."""
    clustered = finished_stage(folder, "cluster")
    extracted = finished_stage(folder, "extract")
    settle_index(folder.index, folder.listing, outcomes_so_far(folder))
    is_linked = "link" in read_manifest(folder)["stages"]
    config = with_licence(folder, config, fresh=session.fresh)
    inputs = {
        "config": identity(config),
        "cluster": clustered["hash"],
        "link": finished_stage(folder, "link")["hash"] if is_linked else None,
    }
    if config.images and session.fresh:  # said before anything is removed
        refuse_lost_images(folder)
    ledger = begin_stage(folder, "shard", inputs, {"request": to_mapping(config)}, fresh=session.fresh)
    units = blocks_of(
        len(usable_rows(folder)), samples_per_shard(config, extracted["inputs"], clustered["inputs"])
    )
    _forget_lost_tars(folder, config, ledger, units)
    load = partial(ShardStage, folder, config, ledger.stage_hash)
    summary = do_units(load, ledger, units, session)
    results = list(ledger.results(len(units)))
    if config.covariance:
        sum_covariance(folder, session)
    publish_shards(folder, config, results)
    return replace(
        summary, num_bytes=sum(result["bytes"] for result in results), notes={"shards": len(units)}
    )


def sum_covariance(folder: BuildFolder, session: Session) -> None:
    """Compute the missing scatter matrices of the blocks of features.zarr."""
    ledger = open_ledger(folder, "covariance")
    if not stores.has_scatter(folder.features):  # the features were rebuilt
        folder.remove(ledger.folder)
        stores.create(*layout_of(folder, "covariance"))
    do_units(partial(CovarianceStage, folder), ledger, stage_units(folder, "extract"), session)


def _forget_lost_tars(
    folder: BuildFolder, config: ShardConfig, ledger: Ledger, units: Sequence[Block]
) -> None:
    """Remove the markers of tars that are missing, truncated or without their sidecar."""
    sizes = sizes_in(folder.shards)
    for unit, marker in ledger.finished(units):
        tar = folder.shards / shard_name(config.split, unit.number)
        if sizes.get(tar.name) != marker["bytes"] or sidecar(tar).name not in sizes:
            folder.remove(marker.path)
