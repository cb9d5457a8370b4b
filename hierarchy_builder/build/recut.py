"""New levels from the stored trees: other cuts, any number of them, without the features.

The new `regions` array is made beside the old one, block by block, and takes its place when all of it is there.
A process that ends in between leaves either the old levels or a manifest that asks for the new ones, and
`settle_recut` then does the rest.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from hierarchy_builder.build.stages import count_regions, scatter_rows
from hierarchy_builder.config import HierarchyRecipe
from hierarchy_builder.errors import BuilderError
from hierarchy_builder.files import read_json
from hierarchy_builder.hierarchy.recipe import cut_levels, given_levels
from hierarchy_builder.records import Block, Status
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.ledger import Ledger, stage_entry
from hierarchy_builder.store.units import stage_units


@dataclass(slots=True)
class RecutStage:
    """A block of objects and merges → regions of other cuts, in the store beside regions.zarr."""

    folder: BuildFolder
    recipe: HierarchyRecipe

    @classmethod
    def load(cls, folder: BuildFolder, recipe: HierarchyRecipe) -> RecutStage:
        return cls(folder, recipe)

    def run(self, unit: Block, threads: int) -> dict[str, Any]:
        usable = stores.read_block(self.folder.features, "status", unit) == Status.OK
        objects, merges, flags = (
            stores.read_block(self.folder.regions, name, unit)[usable]
            for name in ("regions", "merges", "flags")
        )
        regions = cut_levels(objects[:, 0], merges, self.recipe.cuts, given_levels(flags, self.recipe))
        digests = stores.write_block(self.folder.recut, unit, {"regions": scatter_rows(regions, usable)})
        return {**count_regions(regions, flags), "digests": digests}


def settle_recut(folder: BuildFolder) -> None:
    """Put finished new levels in the place of the old ones, where the manifest asks for them already."""
    stage_hash = stage_entry(folder, "cluster")["hash"]
    done, units = Ledger(folder.ledger("recut"), stage_hash), stage_units(folder, "cluster")
    if not all(done.is_done(unit.number) for unit in units):
        return
    if (folder.recut / "regions").exists():
        folder.remove(folder.regions / "regions")
        if (folder.regions / "regions").exists():
            raise BuilderError(
                f"{folder.regions / 'regions'} holds files that no build wrote: move them away and repeat the command"
            )
        os.replace(folder.recut / "regions", folder.regions / "regions")
    clustered = Ledger(folder.ledger("cluster"), stage_hash)
    for unit, result in zip(units, done.results([unit.number for unit in units]), strict=True):
        kept = read_json(clustered.marker(unit.number)).get("digests", {})
        clustered.finish(unit.number, {**result, "digests": {**kept, **result["digests"]}})
    folder.remove(folder.recut)
    folder.remove(done.folder)
