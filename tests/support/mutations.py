"""Bytes that were changed at random, as a hostile or broken writer could have changed them, and single flipped bits."""

from __future__ import annotations

import random
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

NUMBERS = (
    b"-1",
    b"0",
    b"1",
    b"4294967295",
    b"1000000000000000",
    b"1e999",
    b"-0000001",
    b"null",
    b'"x"',
    b"[]",
)
SECONDS = 30
"""An input that takes longer is an endless loop."""
MEMORY_KIB = 512 * 2**10


def mutated(data: bytes, draw: random.Random) -> bytes:
    """The bytes after one to three changes."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(changed) + 1)
        match draw.randrange(9):
            case 0 | 1 if changed:
                changed[at % len(changed)] ^= 1 << draw.randrange(8)
            case 2 if changed:
                changed[at % len(changed)] = draw.choice((0, 1, 127, 128, 255, 45, 91, 123))
            case 3:
                del changed[at : at + draw.choice((1, 8, 512))]
            case 4:
                changed[at:at] = draw.randbytes(draw.choice((1, 4, 64)))
            case 5:
                changed[at:at] = changed[at : at + draw.choice((8, 128, 512))]
            case 6:
                del changed[at:]
            case 7:
                changed[at:at] = draw.choice((b"[", b"{", b"(", b"&a [*a]", b"\x81")) * draw.choice((1, 400))
            case _:
                digits = (
                    [n for n, byte in enumerate(changed) if 48 <= byte <= 57] if len(changed) < 2**16 else []
                )
                if digits:
                    start = draw.choice(digits)
                    changed[start : start + 1] = draw.choice(NUMBERS)
    return bytes(changed)


@contextmanager
def bounded() -> Iterator[None]:
    """Fail where the block takes more than SECONDS, or the memory of the process grows by more than MEMORY_KIB."""

    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"no answer within {SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handler = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_KIB


def read_mutated(
    read: Callable[[bytes], object],
    examples: Sequence[bytes],
    count: int,
    expected: tuple[type[Exception], ...],
    seed: int = 0,
) -> int:
    """Read `count` mutated examples; returns how many were refused. Any error but `expected` is raised as a failure."""
    draw, refused = random.Random(seed), 0
    for number in range(count):
        data = mutated(draw.choice(examples), draw)
        try:
            with bounded():
                read(data)
        except expected:
            refused += 1
        except BaseException as error:
            raise AssertionError(
                f"input {number}, {data[:200]!r}…: {type(error).__name__}: {error}"
            ) from error
    return refused


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
