"""Flip single bits of files, and put them back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def flip(data: bytes, bit: int) -> bytes:
    """The bytes with one bit changed."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def bits_of(size: int, count: int, seed: int = 0) -> list[int]:
    """Numbers of at most `count` bits of a file, drawn at random, a third of them among its first 512 bytes."""
    draw = random.Random(seed)
    near = min(size, 512)
    wanted = {draw.randrange(8 * near) for _ in range(count // 3)} if size else set()
    wanted |= {draw.randrange(8 * size) for _ in range(count - len(wanted))} if size else set()
    return sorted(wanted)


@contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    """The file has one changed bit inside the block."""
    before = path.read_bytes()
    path.write_bytes(flip(before, bit))
    try:
        yield
    finally:
        path.write_bytes(before)


def files_below(folder: Path) -> list[Path]:
    """All files that are not empty."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
