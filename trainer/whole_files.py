"""Files that are whole or absent: written under another name, fsynced, renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hierarchy_builder.errors import TrainerError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; the file written there is fsynced and takes the name `path`.

    The folder of `path` is made. On any exception nothing new is left, and `path` stays as it was. A link stays one:
    the file it leads to is written.
    Raises TrainerError where `path` is a folder, a device or a pipe, which no file may replace.
    """
    path = target_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(path)
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_free(path: Path) -> None:
    """Raise TrainerError where `path` is something that a file may not replace."""
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "no regular file (a device or a pipe)"
        raise TrainerError(f"{path} is {what}, expected the name of a file to write; choose another")


def target_of(path: Path) -> Path:
    """Where a file that shall be found at `path` is written: there, or where a link there leads; see `check_free`."""
    check_free(path)
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` under its final name, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_bytes(data)


def sync(path: Path) -> None:
    """Wait until the bytes of a file are on disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def partial_name(path: Path) -> Path:
    """Where this process writes what will be `path`."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")
