"""Read the stores of a build, and compare every block that is read with the marker of the unit that wrote it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from hierarchy_builder.errors import VerificationError
from hierarchy_builder.files.whole import repair_of, sha256_file
from hierarchy_builder.records import Block, Status
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.ledger import Ledger, Marker, open_ledger, recorded_stages
from hierarchy_builder.store.statistics import Moments, joint_moments
from hierarchy_builder.store.units import layout_of, stage_units


@dataclass
class Stored:
    """The arrays of features.zarr and regions.zarr of a build, as they are now.

    A block is compared once; open another `Stored` after units have run. Every method raises VerificationError for a
    block that is missing or not the one that its unit wrote.
    """

    folder: BuildFolder
    _ledgers: dict[str, Ledger] = field(default_factory=dict)
    _told: dict[str, Marker] = field(default_factory=dict)
    """By stage, the marker that was read last: the arrays of a block are mostly read one after the other."""
    _groups: dict[Path, zarr.Group] = field(default_factory=dict)
    _described: set[str] = field(default_factory=set)
    _compared: set[tuple[str, int]] = field(default_factory=set)

    def block(self, name: str, block: Block) -> np.ndarray:
        """Return the rows of a block of one array, one of a `block_` array."""
        self._compare(name, [block.number])
        return stores.read_rows(self._group(name), name, stores.rows_of(name, block))

    def usable(self, block: Block, *names: str) -> tuple[np.ndarray, ...]:
        """Return which rows of a block are usable, as bool, and these rows of each array."""
        is_usable = self.block("status", block) == Status.OK
        return is_usable, *(self.block(name, block)[is_usable] for name in names)

    def rows(self, name: str, rows: slice | np.ndarray) -> np.ndarray:
        """Return rows of one array; an index array must rise."""
        numbers = np.arange(*rows.indices(self._blocks[-1].stop)) if isinstance(rows, slice) else rows
        touched = np.unique(numbers // len(self._blocks[0]))
        self._compare(name, touched.tolist())
        return stores.read_rows(self._group(name), name, rows)

    def moments(self, block: Block, *, joint: bool = False) -> Moments:
        """Return the moments of the usable rows of a block; joint: as `joint_moments` of their tokens."""
        count, mean, m2 = (self.block(name, block)[0] for name in stores.MOMENTS)
        moments = Moments(int(count), mean, m2)
        return joint_moments(moments, self.block("block_scatter", block)[0]) if joint else moments

    @cached_property
    def region_arrays(self) -> list[str]:
        """The arrays of regions.zarr that a sample is made from."""
        return ["regions", "flags", *(["prototypes"] if "link" in recorded_stages(self.folder) else [])]

    @cached_property
    def _blocks(self) -> list[Block]:
        return stage_units(self.folder, "extract")

    def _path(self, name: str) -> Path:
        is_of_features = stores.ARRAYS[name].stage in ("extract", "covariance")
        return self.folder.features if is_of_features else self.folder.regions

    def _group(self, name: str) -> zarr.Group:
        path = self._path(name)
        if path not in self._groups:
            self._groups[path] = stores.open_store(path)
        return self._groups[path]

    def _compare(self, name: str, numbers: Iterable[int]) -> None:
        stage = stores.ARRAYS[name].stage
        if name not in self._described:
            path, layout = layout_of(self.folder, stage)
            if damaged := stores.damaged_layout(path, {name: layout[name]}, self._group(name)):
                described = path / damaged[0] / "zarr.json"
                raise VerificationError(f"{described} is missing or not as it was written: {repair_of(path)}")
            self._described.add(name)
        if stage not in self._ledgers:
            self._ledgers[stage] = open_ledger(self.folder, stage)
        for number in (number for number in numbers if (name, number) not in self._compared):
            marker = self._told.get(stage)
            if marker is None or marker["unit"] != number:
                marker = self._told[stage] = self._ledgers[stage].result(number)
            if not is_as_written(self._group(name), name, self._blocks[number], marker):
                raise VerificationError(
                    f"{stores.shard_file(self._path(name), name, number)} is missing or not the file that {stage} "
                    f"wrote: run `hierarchy-builder repair {self.folder.root}`"
                )
            self._compared.add((name, number))


def is_as_written(group: zarr.Group, name: str, block: Block, marker: Mapping[str, Any]) -> bool:
    """Whether the file of a block of one array is the one its marker tells of.

    A marker of an earlier release tells only the SHA-256 of the values, so the block is read as a whole.
    """
    if "files" in marker:
        return bool(marker["files"].get(name) == stores.file_digest(group, name, block.number))
    return bool(marker["digests"].get(name) == stores.read_written(group, name, block)[1])


def fitted_vocabulary(folder: BuildFolder) -> Path:
    """Return the vocabulary of a build. Raises VerificationError when it is not the file that was fitted."""
    path, marker = folder.vocabulary, open_ledger(folder, "vocabulary").result(0)
    if not path.is_file() or sha256_file(path) != marker["sha256"]:
        raise VerificationError(
            f"{path} is missing or not the one that was fitted: run `hierarchy-builder repair {folder.root}`"
        )
    return path
