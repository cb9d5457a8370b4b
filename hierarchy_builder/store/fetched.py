"""A zarr store at a URL whose objects are fetched whole, with one request each, and kept while they are needed.

A block of an array is one object, which is read, compared with its marker and decoded. A request takes as long as some
megabytes, and zarr would make one for the index of a block and one for each of its chunks.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path
from typing import Any

import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, cpu
from zarr.storage import FsspecStore, WrapperStore

from hierarchy_builder.files import remote

KEPT = 2
"""Blocks of each array that are kept; descriptions are kept always."""


class Fetched(WrapperStore[FsspecStore]):
    """The store; `kept` holds what was fetched or written, by key, and None for what is not there."""

    def __init__(self, store: FsspecStore, root: Path) -> None:
        super().__init__(store)
        self.root, self.kept = root, dict[str, Buffer | None]()
        self.opened = dict[str, zarr.Array]()  # see `arrays.array_of`

    @classmethod
    def of(cls, place: Path) -> Fetched:
        """The store at a URL."""
        return cls(FsspecStore.from_url(str(place), storage_options=remote.OPTIONS), place)

    def with_read_only(self, read_only: bool = False) -> Fetched:
        """The same store, which may or may not be written to."""
        return type(self)(self._store.with_read_only(read_only), self.root)

    def __str__(self) -> str:
        return str(self.root)

    def content(self, file: Path) -> bytes | None:
        """The bytes of an object, or None where there is none."""
        key = self._key(file)
        if key not in self.kept:
            try:
                self._keep(key, cpu.Buffer.from_bytes(remote.get(file)))
            except FileNotFoundError:
                self._keep(key, None)
        found = self.kept[key]
        return None if found is None else found.to_bytes()

    def forget(self, file: Path) -> None:
        """Count an object as removed."""
        self._keep(self._key(file), None)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """What zarr asks for: an object or a part of one."""
        if key not in self.kept:
            if key.endswith("zarr.json"):  # small, so one request in a thread instead of two
                await asyncio.to_thread(self.content, self.root / key)
            else:
                self._keep(key, await self._store.get(key, prototype))
        found = self.kept[key]
        return found if found is None or byte_range is None else found[_slice(byte_range, len(found))]

    async def exists(self, key: str) -> bool:
        """Whether there is an object, which is then fetched."""
        return await self.get(key, cpu.buffer_prototype) is not None

    async def set(self, key: str, value: Buffer) -> None:
        """Write an object as a whole."""
        await self._store.set(key, value)
        self._keep(key, value)

    async def delete(self, key: str) -> None:
        """Remove an object."""
        # that of zarr takes the key for a pattern
        await asyncio.to_thread(remote.remove, [self.root / key])
        self._keep(key, None)

    def _keep(self, key: str, value: Any) -> None:
        self.kept.pop(key, None)
        self.kept[key] = value
        blocks = defaultdict[str, list[str]](list)
        for kept in self.kept:
            if not kept.endswith("zarr.json"):
                blocks[kept.partition("/")[0]].append(kept)
        for keys in blocks.values():
            for old in keys[:-KEPT]:
                del self.kept[old]

    def _key(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()


def _slice(part: ByteRequest, length: int) -> slice:
    match part:
        case RangeByteRequest(start, end):
            return slice(start, end)
        case OffsetByteRequest(offset):
            return slice(offset, length)
        case SuffixByteRequest(suffix):
            return slice(max(0, length - suffix), length)
    raise TypeError(f"{part!r} is no part of an object")
