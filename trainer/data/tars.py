"""Random access to one tar of a shard folder: check it, list members, and read them by position.

Tars are uncompressed, so one pass over the headers finds every member, and a sample needs only a few positioned reads.
"""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from fsspec.callbacks import Callback

from hierarchy_builder.errors import DamagedShardError
from hierarchy_builder.files.whole import sha256_file

HEADER_BYTES = 512
READ_BYTES = 9 * HEADER_BYTES
"""Bytes that are read at once in search of headers: all small members of a sample, and the next header."""
PLAIN_FILE = (b"0", b"\0")
"""Type flags of a regular file, the only kind of member that the builder writes."""

Members = dict[str, tuple[int, int]]
"""(offset, size) in the tar of each member of a sample, by the part of its name after the key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One tar as index.json lists it."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str
    folder: str
    """Path or URL of the shard set that the tar belongs to."""

    @property
    def place(self) -> str:
        """Path or URL of the tar."""
        return f"{self.folder}/{self.name}"


class OpenTar:
    """An open tar with the key and the members of each sample. Raises DamagedShardError if the tar is incomplete."""

    def __init__(self, path: str, entry: ShardEntry) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 (closed with this object)
        try:
            self.samples = _samples(self._file)
        except Exception as error:  # tarfile raises errors of many kinds for damaged headers
            self._file.close()
            raise DamagedShardError(
                f"{path}: {error}; the shard is damaged, copy or build it again"
            ) from None
        if len(self.samples) != entry.num_samples:
            raise DamagedShardError(
                f"{path}: {len(self.samples)} samples, index.json says {entry.num_samples}; "
                "run `hierarchy-builder verify`"
            )

    def read(self, offset: int, size: int) -> bytes:
        """Read bytes at `offset` with a positioned read, so that threads can share the file."""
        return os.pread(self._file.fileno(), size, offset)

    def read_into(self, buffers: list[np.ndarray], offset: int) -> int:
        """Read from `offset` into one uint8 buffer after the other; returns the number of bytes read."""
        return os.preadv(self._file.fileno(), [buffer.data for buffer in buffers], offset)


class AtMost(Callback):
    """Ends a download that brings more bytes than the index lists, before it fills the disk."""

    def __init__(self, entry: ShardEntry) -> None:
        super().__init__()
        self.entry = entry

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.value > self.entry.num_bytes:
            raise DamagedShardError(
                f"{self.entry.name}: more than the {self.entry.num_bytes:,} bytes that index.json lists were sent; "
                "the shard was changed, copy or build it again"
            )


def check_size(path: str, entry: ShardEntry) -> None:
    """Raise DamagedShardError unless the tar exists with the size listed in the index."""
    try:
        size = os.path.getsize(path)
    except OSError:
        raise DamagedShardError(f"{path} is missing, index.json lists it; copy or build it again") from None
    if size != entry.num_bytes:
        raise DamagedShardError(
            f"{path}: {size} bytes, index.json says {entry.num_bytes}; "
            "the shard is truncated or changed, copy or build it again"
        )


def check_sha256(path: str, entry: ShardEntry) -> None:
    """Raise DamagedShardError unless the tar has the SHA-256 listed in the index."""
    found = sha256_file(Path(path))
    if found != entry.sha256:
        raise DamagedShardError(
            f"{path}: SHA-256 {found[:12]}…, index.json says {entry.sha256[:12]}…; "
            "the shard is corrupt, copy or build it again"
        )


def _samples(file: BinaryIO) -> list[tuple[str, Members]]:
    """Keys with their members, in the order of the tar."""
    samples: list[tuple[str, Members]] = []
    for path, offset, size in _members(file):
        folder, _, name = path.rpartition("/")
        stem, _, suffix = name.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if not samples or samples[-1][0] != key:
            samples.append((key, {}))
        samples[-1][1][suffix] = (offset, size)
    return samples


def _members(file: BinaryIO) -> list[tuple[str, int, int]]:
    """(name, offset, size) of every member.

    Eight times as fast as tarfile, which matters because a reader opens every tar once per epoch. Tars with anything
    but regular files with short names are left to tarfile.
    """
    offset, end = 0, os.fstat(file.fileno()).st_size
    found = list[tuple[str, int, int]]()
    part, start = b"", 0
    while True:
        if offset + HEADER_BYTES > start + len(part):
            part, start = os.pread(file.fileno(), READ_BYTES, offset), offset
        header = part[offset - start : offset - start + HEADER_BYTES]
        if not any(header):
            return found
        if len(header) < HEADER_BYTES or not _is_plain(header):
            return _members_by_tarfile(file)
        digits = header[124:136].strip(b"\0 ")
        size = int(digits, 8) if digits.isdigit() else -1
        if size < 0:
            raise tarfile.ReadError(f"a member of {digits!r} (octal) bytes at {offset}")
        found.append((header[:100].rstrip(b"\0").decode(), offset + HEADER_BYTES, size))
        offset += HEADER_BYTES + -(-size // HEADER_BYTES) * HEADER_BYTES
        if offset > end:
            raise tarfile.ReadError("unexpected end of data")


def _is_plain(header: bytes) -> bool:
    """Whether this is the header of a regular file with a name in the first field and an octal size."""
    return header[156:157] in PLAIN_FILE and header[345] == 0 and header[124] < 128


def _members_by_tarfile(file: BinaryIO) -> list[tuple[str, int, int]]:
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        found, end = list[tuple[str, int, int]](), os.fstat(file.fileno()).st_size
        reached = 0
        for member in tar:
            # tarfile goes where the sizes in the headers lead it, also backwards.
            last = member.offset_data + member.size
            if not member.isreg() or member.issparse() or not reached < member.offset_data <= last <= end:
                raise tarfile.ReadError(f"member {member.name!r} is no regular file inside the tar")
            found.append((member.name, member.offset_data, member.size))
            reached = last
        return found
