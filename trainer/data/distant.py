"""Tars at a URL: copied to a cache folder if all of them fit into its limit, otherwise read where they lie.

In the cache, copies of other sets that were not used for longest make room. A tar that is read where it lies passes
through the cache once, to be checked and to find its members; only their positions stay, and then each sample takes one
request.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from bisect import bisect_right
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from hierarchy_builder.errors import UsageError
from hierarchy_builder.files.paths import filesystem_of
from hierarchy_builder.files.untrusted.documents import parse_json
from hierarchy_builder.files.whole import whole_file
from hierarchy_builder.machine.process import give_home
from trainer.data.tars import AtMost, Members, OpenTar, ShardEntry, check_sha256

CACHE_BYTES = "TRAINER_CACHE_BYTES"
"""Environment variable with the most bytes that copies of tars may take; without it FREE_SHARE of the free space."""
FREE_SHARE = 0.8
SAMPLES_KEPT = 16
"""Samples of a distant tar that are kept in memory after they were fetched."""


class DistantTar:
    """A tar that is read where it lies: what is read of a sample comes with all of its members in one request."""

    def __init__(self, place: str, positions: Path) -> None:
        self.samples: list[tuple[str, Members]] = parse_json(positions.read_bytes())
        self._starts = [min(offset for offset, _ in members.values()) for _, members in self.samples]
        self._fetched = lru_cache(SAMPLES_KEPT)(partial(_bytes_at, place))

    def read(self, offset: int, size: int) -> bytes:
        """Read bytes at `offset`, all of one sample; threads may do so at once."""
        number = bisect_right(self._starts, offset) - 1
        start, members = self._starts[number], self.samples[number][1]
        data = self._fetched(start, max(place + length for place, length in members.values()))
        return data[offset - start : offset - start + size]

    def read_into(self, buffers: list[np.ndarray], offset: int) -> int:
        """Read from `offset` into one uint8 buffer after the other; returns the number of bytes read."""
        lengths = [len(buffer) for buffer in buffers]
        data = np.frombuffer(self.read(offset, sum(lengths)), np.uint8)
        for buffer, part in zip(buffers, np.split(data, np.cumsum(lengths[:-1])), strict=True):
            buffer[: len(part)] = part
        return len(data)


def _bytes_at(place: str, start: int, end: int) -> bytes:
    filesystem, path = filesystem_of(place)  # its own in every process that was forked
    data: bytes = filesystem.cat_file(path, start=start, end=end)
    return data


def default_cache() -> Path:
    """Folder for copies of remote shards: `TRAINER_CACHE`, by default a folder in the user's cache folder."""
    give_home()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TRAINER_CACHE") or Path(base, "trajectory-hierarchies"))


def found_tar(entry: ShardEntry, all_bytes: int) -> str | DistantTar:
    """The path of a tar on this machine, for one at a URL after it was copied and checked; or the tar where it lies.

    all_bytes: all tars that are read with it. Raises DamagedShardError if the copy is not what the index lists.
    """
    filesystem, path = filesystem_of(entry.place)
    if isinstance(filesystem, LocalFileSystem):
        return path
    cache = default_cache()
    folder = cache / hashlib.sha256(entry.folder.encode()).hexdigest()[:16]
    local = folder / f"{entry.sha256[:16]}-{PurePosixPath(entry.name).name}"  # both checked in `shards`
    positions, fits = local.with_suffix(".json"), all_bytes <= cache_limit(cache)
    wanted = local if fits else positions
    if not wanted.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with open(f"{local}.lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process of the machine downloads, the others wait
            if not wanted.exists():
                if fits:
                    _make_room(cache, folder, entry.num_bytes)
                with whole_file(wanted) as copy:
                    filesystem.get_file(path, str(copy), callback=AtMost(entry))
                    check_sha256(str(copy), entry)
                    if not fits:
                        samples = OpenTar(str(copy), entry).samples
                        copy.write_text(json.dumps(samples, separators=(",", ":")))
    if not fits:
        return DistantTar(entry.place, positions)
    with contextlib.suppress(OSError):  # a cache of another user
        os.utime(local)  # the last use, by which `_make_room` chooses
    return str(local)


def cache_limit(cache: Path) -> int:
    """Bytes that copies of tars may take. Raises UsageError if the environment says no number."""
    if text := os.environ.get(CACHE_BYTES):
        if not text.isdecimal():
            raise UsageError(f"{CACHE_BYTES} is {text!r}, expected a number of bytes")
        return int(text)
    cache.mkdir(parents=True, exist_ok=True)
    return int(FREE_SHARE * (shutil.disk_usage(cache).free + _cached_bytes(cache)))


def _make_room(cache: Path, folder: Path, needed: int) -> None:
    """Remove copies of other sets than that in `folder`, the least recently used first, until `needed` bytes fit."""
    room = cache_limit(cache) - _cached_bytes(cache) - needed
    others = [path for path in cache.glob("*/*.tar") if path.parent != folder]
    for path in sorted(others, key=lambda path: path.stat().st_mtime):
        if room >= 0:
            return
        room += path.stat().st_size
        path.unlink(missing_ok=True)


def _cached_bytes(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.glob("*/*.tar"))
