"""Tell whether a photograph is still the file that was encoded, by its hash and the time of its last change."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from hierarchy_builder.errors import ConfigMismatchError, ImageError, some
from hierarchy_builder.images.sources import Reader
from hierarchy_builder.machine.process import num_cpus
from hierarchy_builder.terminal import counted

HASH_DIGITS = 32
TOGETHER = 64
"""Images that a thread looks at before it takes the next ones; a call for each costs more than looking."""


def file_hash(content: bytes) -> str:
    """Return the first 32 hex digits of the SHA-256 of a file: half of them take half the space and are plenty."""
    return hashlib.sha256(content).hexdigest()[:HASH_DIGITS]


def modified_ns(reader: Reader, path: str) -> int | None:
    """Return when the file of an image, or its tar, last changed; None where it is not on a local disk."""
    try:
        fs, place = reader.locate(path)
        return os.stat(place).st_mtime_ns if isinstance(fs, LocalFileSystem) else None
    except (OSError, ValueError, ImportError):
        return None


def changed_images(paths: Iterable[str], outcomes: Iterable[Mapping[str, Any]], reader: Reader) -> list[str]:
    """Return the paths of usable images whose file is not the one that was encoded.

    outcomes: what became of each image; those of earlier releases hold no hash and are not compared. A file with the
    time it had is taken for unchanged (`modified`, where it is told); others are read and hashed. Images that are gone
    are left out.
    """

    def is_changed(path: str, outcome: Mapping[str, Any]) -> bool:
        if "modified" in outcome and outcome["modified"] == modified_ns(reader, path):
            return False
        try:
            return file_hash(reader.read(path)) != outcome["file_hash"]
        except ImageError:
            return False

    pairs = [
        (path, outcome)
        for path, outcome in zip(paths, outcomes, strict=True)
        if outcome.get("status") == "ok" and outcome.get("file_hash")
    ]
    parts = [pairs[start : start + TOGETHER] for start in range(0, len(pairs), TOGETHER)]
    with ThreadPoolExecutor(num_cpus()) as pool:
        found = pool.map(lambda part: [path for path, told in part if is_changed(path, told)], parts)
        return [path for changed in found for path in changed]


def refuse_changed(place: str, changed: Sequence[str]) -> None:
    """Raise ConfigMismatchError that names the images, if there are any."""
    if changed:
        raise ConfigMismatchError(describe_changed(place, changed))


def describe_changed(place: str, changed: Sequence[str]) -> str:
    """Return the message about changed images: how many, the first five of them, and what to do."""
    return (
        f"{place}: {counted(len(changed), 'image')} changed after being encoded: {some(changed)}; "
        "restore what was encoded, or repeat the `build` command with --fresh, which starts over"
    )
