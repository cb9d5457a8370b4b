"""Which folders a user names: one or several paths and URLs, patterns such as `s3://bucket/set-*`, or files of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from hierarchy_builder.errors import TrainerError, UsageError
from hierarchy_builder.files.paths import a_place, filesystem_of

Places = str | Path | Sequence[str | Path]
"""One place of shards or several, as `folders_at` reads them."""
PATTERN = re.compile(r"[*?[]")
MOST_BYTES = 2**24
"""Largest file of folders that is read."""
LISTS = ".txt"
"""Extension of a file that lists folders."""


def folders_at(places: Places) -> list[str]:
    """The folders that these places name, as paths and URLs; whether they hold shards is not asked.

    places: one or several. A name with `*`, `?` or `[…]` stands for the folders that it matches. A file `.txt` names
    a folder or a pattern in each line, relative to its own folder; empty lines and those that begin with `#` are left
    out. Raises UsageError for a pattern that matches nothing, for a file without folders or a remote one of local
    paths, and where nothing is named.
    """
    if not isinstance(places, str | Path) and not places:
        raise UsageError("no shards are named, expected a folder, several, a pattern or a file of folders")
    named = [places] if isinstance(places, str | Path) else places
    return [folder for place in named for folder in _folders_at(str(place))]


def _folders_at(place: str) -> Iterator[str]:
    filesystem, path = filesystem_at(place)
    if path.endswith(LISTS) and filesystem.isfile(path):
        lines = _lines(filesystem, path, place)
        base = place.rpartition("/")[0] if "://" in place else os.path.dirname(os.path.abspath(place))
        for line in lines:
            if line.startswith("/") and "://" in place:
                raise UsageError(
                    f"{place} names {line}, which is no place there: write the whole URL, or a path relative to the "
                    "folder of the list"
                )
            yield from _matches(line if "://" in line or line.startswith("/") else f"{base}/{line}")
    else:
        yield from _matches(place)


def _matches(pattern: str) -> list[str]:
    """The folders that a name with `*`, `?` or `[…]` matches, or the one folder of that name."""
    filesystem, path = filesystem_at(pattern)
    if not PATTERN.search(pattern) or filesystem.exists(path):
        return [pattern]
    entries = filesystem.glob(path, detail=True)
    folders = sorted(
        each
        for each, entry in entries.items()
        if entry["type"] == "directory" or (entry["type"] != "file" and filesystem.isdir(each))  # or a link
    )
    if not folders:
        raise UsageError(f"{pattern} matches no folder, expected folders of shards: check the pattern")
    is_local = isinstance(filesystem, LocalFileSystem)
    return folders if is_local else [str(filesystem.unstrip_protocol(folder)) for folder in folders]


def _lines(filesystem: AbstractFileSystem, path: str, place: str) -> list[str]:
    """The folders that a file lists."""
    if filesystem.size(path) > MOST_BYTES:
        raise UsageError(f"{place} has more than {MOST_BYTES:,} bytes, expected one folder in a line")
    try:
        lines = [line.strip() for line in filesystem.cat_file(path).decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise UsageError(
            f"{place} is no text, expected a folder of shards, or a file of one in a line"
        ) from None
    found = [a_place(line) for line in lines if line and not line.startswith("#")]
    if not found:
        raise UsageError(f"{place} names no folder, expected one in a line")
    return found


def filesystem_at(place: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a place and the path on it. Raises TrainerError for a URL that is not understood."""
    try:
        return filesystem_of(place)
    except (ImportError, ValueError) as error:
        raise TrainerError(f"{place}: {error}") from None
