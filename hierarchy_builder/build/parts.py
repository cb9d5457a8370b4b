"""Parts of a fused build: the output of its units, and how tars are assembled from it.

A part holds the usable rows of one block as a tar. Rows that cannot be used are left out, so the place where a shard
begins is known only when all earlier parts are done. Shards are cut from the parts in order by copying bytes, or by
renaming if a part is exactly one shard. A part is removed when all its samples are in shards. Before anything is copied
from it, a part is compared with the SHA-256 in its marker, since it may have waited there for days.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hierarchy_builder.errors import VerificationError, or_none
from hierarchy_builder.files.remote import is_remote
from hierarchy_builder.files.whole import atomic_file, move, sha256_file, write_json
from hierarchy_builder.records import Block
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.ledger import Ledger
from hierarchy_builder.store.shards import TarWriter, shard_name, sidecar
from hierarchy_builder.store.statistics import read_part_moments


@dataclass(frozen=True, slots=True)
class _Span:
    """Place of a sample in a part."""

    part: int
    offset: int
    size: int


@dataclass
class Assembly:
    """Cuts shards of `samples_per_shard` samples from the finished parts, in order."""

    folder: BuildFolder
    split: str
    samples_per_shard: int
    blocks: Sequence[Block]
    parts: Ledger
    shards: Ledger
    _next_part: int = 0
    _next_shard: int = 0
    _waiting: list[_Span] = field(default_factory=list)
    _compared: set[int] = field(default_factory=set)

    def forget_lost(self) -> None:
        """Remove the markers of missing or changed parts that a shard still needs, and of parts without statistics."""
        start: int | None = 0  # samples before a part; unknown after an unfinished one
        for block in self.blocks:
            if not self.parts.is_done(block.number):
                start = None
                continue
            marker = self.parts.result(block.number)
            needed = True
            if start is not None:
                stop = start + marker["count"]
                needed = stop > start and any(
                    not self._is_whole(shard)
                    for shard in range(start // self.samples_per_shard, -(-stop // self.samples_per_shard))
                )
                start = stop
            has_moments = or_none(read_part_moments, self.folder, block.number, marker) is not None
            if not has_moments or (needed and not self._is_as_written(block.number)):
                self.folder.remove(self.parts.marker(block.number))

    def advance(self) -> None:
        """Cut every missing shard whose parts are done."""
        while self._next_part < len(self.blocks) and self.parts.is_done(self._next_part):
            offset, sizes = 0, self.parts.result(self._next_part)["sizes"]
            if not sizes:  # no shard contains it, so no shard would remove it
                self.folder.remove(self.folder.part(self._next_part))
            for size in sizes:
                self._waiting.append(_Span(self._next_part, offset, size))
                offset += size
            self._next_part += 1
            while len(self._waiting) >= self.samples_per_shard:
                self._cut(self.samples_per_shard)
        if self._next_part == len(self.blocks) and self._waiting:
            self._cut(len(self._waiting))

    def results(self) -> Sequence[Mapping[str, Any]]:
        """Contents of the markers of the shards, when all are cut."""
        return list(self.shards.results(self._next_shard))

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
        if not is_remote(tar):
            tar.parent.mkdir(parents=True, exist_ok=True)
        by_part = {part: list(own) for part, own in itertools.groupby(spans, lambda span: span.part)}
        for part in by_part:
            if not self._is_as_written(part):
                self.folder.remove(self.parts.marker(part))
                raise VerificationError(
                    f"{self.folder.part(part)} was changed after it was written: the same command makes it again"
                )
        marker = self.parts.result(spans[0].part)
        if len(by_part) == 1 and marker["count"] == len(spans):
            move(self.folder.part(spans[0].part), tar)
            facts = {name: marker[name] for name in ("count", "bytes", "sha256")}
        else:
            with atomic_file(tar) as file:
                writer = TarWriter(file)
                for part, own in by_part.items():
                    with self.folder.part(part).open("rb") as source:
                        source.seek(own[0].offset)
                        for span in own:
                            writer.copy(source.read(span.size))
                facts = writer.close()
        facts["config_hash"] = self.shards.stage_hash
        write_json(sidecar(tar), facts)
        return facts

    def _is_as_written(self, part: int) -> bool:
        """Whether a part has the SHA-256 of its marker; it is read once."""
        if part not in self._compared:
            tar, marker = self.folder.part(part), self.parts.result(part)
            if (
                not tar.is_file()
                or tar.stat().st_size != marker["bytes"]
                or sha256_file(tar) != marker["sha256"]
            ):
                return False
            self._compared.add(part)
        return True

    def _is_whole(self, shard: int) -> bool:
        tar = self.folder.shards / shard_name(self.split, shard)
        if not self.shards.is_done(shard) or not tar.is_file() or not sidecar(tar).is_file():
            return False
        return bool(tar.stat().st_size == self.shards.result(shard)["bytes"])
