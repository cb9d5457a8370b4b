"""`build --fused`: images → shards in one pass, without stores of features and regions.

A unit decodes, encodes, clusters and writes a block of rows while its batches are in memory; `parts.py` cuts the
shards from the output of the units. The shards equal those of the single stages byte for byte. The manifest therefore
holds the inputs of each stage, and their hashes.

    n images of a block, b of a batch, H×W grid, C channels, L levels
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hierarchy_builder.build.clustering import stage_inputs
from hierarchy_builder.build.inputs import (
    begin_images,
    end_images,
    extract_inputs,
    list_images,
    probe_of,
    refuse_changed_images,
    settle_rows,
)
from hierarchy_builder.build.parts import Assembly
from hierarchy_builder.build.session import BuildPlan, Session, StageSummary, do_units
from hierarchy_builder.build.space import check_space, later_bytes
from hierarchy_builder.build.stages import asked_encoder, count_regions, image_encoder, label_maps, set_status
from hierarchy_builder.config import HierarchyRecipe, ShardConfig
from hierarchy_builder.encoders import Encoder
from hierarchy_builder.encoders.encoding import EncodedBatch, ImageEncoder, Outcome
from hierarchy_builder.errors import UsageError
from hierarchy_builder.fields import from_mapping, to_mapping
from hierarchy_builder.files.whole import atomic_file, size_on_disk
from hierarchy_builder.images.masks import MaskFolder, open_masks
from hierarchy_builder.images.sources import ImageSource
from hierarchy_builder.images.table import COLUMNS, ImageTable
from hierarchy_builder.machine.process import ahead
from hierarchy_builder.records import FEATURE_DTYPE, REGION_DTYPE, Block, Status, blocks_of
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import StoredIndex
from hierarchy_builder.store.ledger import Ledger, hash_of, stage_entry, with_licence
from hierarchy_builder.store.samples import make_sample, picture_of
from hierarchy_builder.store.shard_set import publish_shards
from hierarchy_builder.store.shards import TarWriter, encode_sample
from hierarchy_builder.store.statistics import moments_of, per_channel, scatter_of, write_part_moments
from hierarchy_builder.store.units import samples_per_shard


@dataclass(slots=True)
class FuseStage:
    """A block of images → a tar of the samples of its usable rows, and the statistics of their features."""

    folder: BuildFolder
    recipe: HierarchyRecipe
    config: ShardConfig
    images: ImageEncoder
    index: StoredIndex
    masks: MaskFolder | None

    @classmethod
    def load(
        cls,
        folder: BuildFolder,
        source: str,
        plan: BuildPlan,
        encoder: Encoder | None = None,
    ) -> FuseStage:
        """Raises ConfigMismatchError if the probe value of the encoder differs from the one the build began with."""
        images = image_encoder(folder, source, plan.extract, encoder)
        recipe, config = plan.hierarchy, plan.shard
        if config.images:
            px = images.encoder.image_size_px
            images.keep = lambda image, crop: picture_of(image, px, config, crop)
        masks = None if recipe.masks is None else open_masks(Path(recipe.masks))
        return cls(folder, recipe, config, images, StoredIndex(folder.listing, COLUMNS), masks)

    def run(self, unit: Block, threads: int) -> dict[str, Any]:
        # They load numba, which a driver does not need.
        from hierarchy_builder.hierarchy import build_hierarchy
        from hierarchy_builder.hierarchy.similarity import single_threaded_blas

        records = list(ImageTable(self.index.rows(unit.start, unit.stop)))
        outcomes: list[Outcome] = [{} for _ in records]
        encoder, num_levels = self.images.encoder, self.recipe.num_levels
        features = np.zeros((len(unit), *encoder.grid, encoder.width), FEATURE_DTYPE)
        regions = np.zeros((len(unit), num_levels - 1, *encoder.grid), REGION_DTYPE)
        flags, status = np.zeros(len(unit), np.uint8), np.full(len(unit), Status.SKIPPED, np.uint8)

        def divide(batch: EncodedBatch) -> list[tuple[str, dict[str, bytes]]]:
            status[batch.rows] = np.where(batch.finite, Status.OK, Status.NONFINITE)
            features[batch.rows] = batch.features
            pictures = dict(zip(batch.rows, batch.pictures, strict=True))
            rows = np.array(batch.rows)[batch.finite]
            photos = [
                {"path": records[row].path, **{side: outcomes[row][side] for side in ("width", "height")}}
                for row in rows
            ]
            drawn = label_maps(self.masks, photos, encoder.image_size_px, encoder.grid)
            hierarchy = build_hierarchy(batch.features[batch.finite], self.recipe, drawn, threads=1)
            regions[rows], flags[rows] = hierarchy.regions, hierarchy.flags
            samples = []
            for row in rows.tolist():
                arrays = {"features": features[row], "regions": regions[row], "flags": flags[row]}
                sample = make_sample(records[row], outcomes[row], arrays, self.config, pictures[row])
                samples.append((sample.key, encode_sample(sample)))
            return samples

        # Every thread enters and leaves the limit of build_hierarchy at its own time; this limit always holds.
        with (
            single_threaded_blas(),
            ThreadPoolExecutor(threads) as pool,
            atomic_file(self.folder.part(unit.number)) as file,
        ):
            writer = TarWriter(file)
            for samples in ahead(pool, divide, self.images.batches(records, outcomes, pool), 2):
                for key, members in samples:
                    writer.add(key, members)
            facts = writer.close()
        set_status(outcomes, status)
        usable = status == Status.OK
        kept = features if usable.all() else features[usable]
        moments, scatter = moments_of(kept, threads), None
        if self.config.covariance:
            scatter = scatter_of(kept, per_channel(moments).mean, threads)
        return {
            **count_regions(regions[usable], flags[usable]),
            **facts,
            "images": len(unit),
            "sizes": writer.sizes,
            "outcomes": outcomes,
            "moments_sha256": write_part_moments(self.folder, unit.number, moments, scatter),
            "batch_size": self.images.batch_size,
        }


def fuse(
    folder: BuildFolder,
    source: str | ImageSource | None,
    plan: BuildPlan,
    session: Session,
    *,
    class_map: str | None = None,
) -> StageSummary:
    """Images → shards; the same call resumes. Without `source`, the source in the manifest is used.

    Raises what `extract` raises, and UsageError for options that need stored features.
    """
    if plan.shard.feature_dtype == "int8":
        raise UsageError("--fused keeps no features to measure what int8 costs: build without --fused")
    images = list_images(folder, source, plan.extract, class_map)
    for warning in images.warnings:
        session.reporter.say(f"warning: {warning}")
    images, extract = settle_rows(folder, images, plan.extract, session, fused=plan.shard)
    config = with_licence(folder, plan.shard, fresh=session.fresh)
    plan = replace(plan, extract=extract, shard=config)
    if not session.fresh:
        refuse_changed_images(folder, images, extract)
    records = images.records
    assert extract.block_rows is not None
    encoder = asked_encoder(extract)
    inputs = stage_inputs(extract_inputs(images, extract, encoder), plan, records)
    needed = later_bytes(plan, len(records), encoder.describe())
    check_space(folder, {"shards": needed["shards"]}, force=session.force)
    asked = {"extract": extract, "cluster": plan.hierarchy, "shard": config}
    facts = {
        "request": {stage: to_mapping(part) for stage, part in asked.items()},
        "probe": probe_of(folder, encoder, extract, session),
    }
    ledger = begin_images(folder, "fuse", images, inputs, facts, session)
    blocks = blocks_of(len(records), extract.block_rows)
    per_shard = samples_per_shard(config, inputs["extract"], inputs["cluster"])
    shards = Ledger(folder.ledger("shard"), hash_of("shard", inputs["shard"]))
    assembly = Assembly(folder, config.split, per_shard, blocks, ledger, shards)
    assembly.forget_lost()
    del encoder
    load = partial(FuseStage.load, folder, images.location, plan)
    apart, cut = partial(asked_encoder, extract), assembly.advance
    summary = do_units(load, ledger, blocks, session, encoder=apart, after_unit=cut)
    assembly.advance()
    notes = end_images(folder, ledger, blocks, records, extract, session)
    publish_shards(folder, config, assembly.results())
    folder.remove_leftovers(folder.parts)
    notes["shards"] = len(assembly.results())
    return replace(summary, num_bytes=size_on_disk(folder.shards), notes=notes)


def fuse_again(folder: BuildFolder, session: Session) -> StageSummary:
    """Run the missing units of a fused build with the configuration in its manifest."""
    asked = stage_entry(folder, "fuse")["request"]
    plan = BuildPlan(
        extract=session.asked_to_extract(asked["extract"]),
        hierarchy=from_mapping(HierarchyRecipe, asked["cluster"], "cluster"),
        shard=from_mapping(ShardConfig, asked["shard"], "shard"),
    )
    return fuse(folder, None, plan, session)
