"""Parts of a build in one pass: what a unit leaves behind, and how the tars are put together from it.

A part holds the usable rows of one block, as a tar; where a shard begins in it is only known once all parts before it
are done, since rows that cannot be used are left out. Shards are cut from the parts in order, by copying bytes, or by
renaming where a part is a shard as it is; a part is removed once all of it is in shards.

    H×W grid, C channels
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hierarchy_builder.errors import BuilderError
from hierarchy_builder.files import atomic_file, read_json, write_bytes, write_json
from hierarchy_builder.records import Block
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.ledger import Ledger
from hierarchy_builder.store.shards import TarWriter, shard_name, sidecar
from hierarchy_builder.store.statistics import Moments


def write_part_moments(
    folder: BuildFolder, part: int, moments: Moments, scatter: np.ndarray | None = None
) -> None:
    """Keep count, mean and M2 (float64 [H,W,C]) of a part's rows; scatter: float64 [C,C] of its tokens."""
    arrays: dict[str, Any] = {"count": np.int64(moments.count), "mean": moments.mean, "m2": moments.m2}
    if scatter is not None:
        arrays["scatter"] = scatter
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_bytes(folder.part_moments(part), buffer.getvalue())


def read_part_moments(folder: BuildFolder, part: int) -> Moments:
    """What `write_part_moments` kept. Raises BuilderError where it is missing or damaged."""
    arrays = _read_arrays(folder, part, ("count", "mean", "m2"))
    return Moments(int(arrays["count"]), arrays["mean"], arrays["m2"])


def read_part_scatter(folder: BuildFolder, part: int) -> np.ndarray:
    """Scatter matrix [C,C] of a part's tokens. Raises BuilderError where the build began without --covariance."""
    return _read_arrays(folder, part, ("scatter",))["scatter"]


def _read_arrays(folder: BuildFolder, part: int, names: Sequence[str]) -> dict[str, np.ndarray]:
    path = folder.part_moments(part)
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in names}
    except KeyError as error:
        raise BuilderError(
            f"{path} has no {error.args[0]}: a build in one pass takes --covariance from its beginning, "
            "start it over with --fresh"
        ) from None
    except (OSError, ValueError, EOFError) as error:
        raise BuilderError(
            f"{path} is missing or damaged ({error}): remove it and run the same command again"
        ) from None


@dataclass(frozen=True, slots=True)
class _Span:
    """Where a sample lies."""

    part: int
    offset: int
    size: int


@dataclass
class Assembly:
    """Cuts shards of `samples_per_shard` samples from the parts, in order, as far as the parts are done."""

    folder: BuildFolder
    split: str
    samples_per_shard: int
    blocks: Sequence[Block]
    parts: Ledger
    shards: Ledger
    _next_part: int = 0
    _next_shard: int = 0
    _waiting: list[_Span] = field(default_factory=list)

    def forget_lost(self) -> None:
        """Take back the markers of shards that are not there, and of parts that are gone while a shard needs them."""
        start: int | None = 0  # samples before a part; not known behind one that is to be done
        for block in self.blocks:
            if not self.parts.is_done(block.number):
                start = None
                continue
            marker = read_json(self.parts.marker(block.number))
            needed = True
            if start is not None:
                stop = start + marker["count"]
                needed = stop > start and any(
                    not self._is_whole(shard)
                    for shard in range(start // self.samples_per_shard, -(-stop // self.samples_per_shard))
                )
                start = stop
            tar, moments = self.folder.part(block.number), self.folder.part_moments(block.number)
            is_there = tar.is_file() and tar.stat().st_size == marker["bytes"]
            if not moments.is_file() or (needed and not is_there):
                self.folder.remove(self.parts.marker(block.number))

    def advance(self) -> None:
        """Cut every shard whose parts are done and that is not there."""
        while self._next_part < len(self.blocks) and self.parts.is_done(self._next_part):
            offset, sizes = 0, read_json(self.parts.marker(self._next_part))["sizes"]
            if not sizes:  # no shard needs it, and so none would remove it
                self.folder.remove(self.folder.part(self._next_part))
            for size in sizes:
                self._waiting.append(_Span(self._next_part, offset, size))
                offset += size
            self._next_part += 1
            while len(self._waiting) >= self.samples_per_shard:
                self._cut(self.samples_per_shard)
        if self._next_part == len(self.blocks) and self._waiting:
            self._cut(len(self._waiting))

    def results(self) -> list[dict[str, Any]]:
        """Markers of the shards, once all are cut."""
        return self.shards.results(range(self._next_shard))

    def _cut(self, count: int) -> None:
        spans, self._waiting = self._waiting[:count], self._waiting[count:]
        if not self._is_whole(self._next_shard):
            self.shards.finish(self._next_shard, {**self._write(spans), "images": count, "seconds": 0.0})
        self._next_shard += 1
        first_needed = self._waiting[0].part if self._waiting else self._next_part
        for part in range(spans[0].part, first_needed):
            self.folder.remove(self.folder.part(part))

    def _write(self, spans: Sequence[_Span]) -> dict[str, Any]:
        tar = self.folder.shards / shard_name(self.split, self._next_shard)
        marker = read_json(self.parts.marker(spans[0].part))
        facts = {name: marker[name] for name in ("count", "bytes", "sha256")}
        tar.parent.mkdir(parents=True, exist_ok=True)
        if marker["count"] == len(spans) and spans[0].part == spans[-1].part:
            os.replace(self.folder.part(spans[0].part), tar)
        else:
            with atomic_file(tar) as file:
                writer = TarWriter(file)
                for part in range(spans[0].part, spans[-1].part + 1):
                    self._copy(writer, [span for span in spans if span.part == part])
                facts = writer.close()
        facts = {**facts, "config_hash": self.shards.stage_hash}
        write_json(sidecar(tar), facts)
        return facts

    def _copy(self, writer: TarWriter, spans: Sequence[_Span]) -> None:
        if not spans:
            return
        with open(self.folder.part(spans[0].part), "rb") as file:
            file.seek(spans[0].offset)
            for span in spans:
                writer.copy(file.read(span.size), [span.size])

    def _is_whole(self, shard: int) -> bool:
        tar = self.folder.shards / shard_name(self.split, shard)
        if not self.shards.is_done(shard) or not tar.is_file() or not sidecar(tar).is_file():
            return False
        return tar.stat().st_size == read_json(self.shards.marker(shard))["bytes"]
