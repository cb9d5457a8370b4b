"""Where pictures come from: a tree of class folders, a tar, or a CSV or parquet listing, local or by URL.

Listing happens once and gives records in the order of their paths. Reading needs only a reader, which a
worker process opens from `ImageSource.location` without listing again (of a tar it reads the headers).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from hierarchy_builder.errors import ImageError, UsageError
from hierarchy_builder.images.decoding import ImageFacts, crop_square, decode_image
from hierarchy_builder.images.keys import assign_keys
from hierarchy_builder.images.listings import MAX_LABEL, TABLES, list_folder, list_table, list_tar, scan_tar
from hierarchy_builder.records import ImageRecord

__all__ = [
    "ImageFacts",
    "ImageSource",
    "Reader",
    "crop_square",
    "decode_image",
    "open_reader",
    "open_source",
]


class Reader(Protocol):
    """Reads the bytes of one picture by the path of its record."""

    def read(self, path: str) -> bytes:
        """Raises ImageError with reason `missing` or `unreadable`."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSource:
    """A listed data set.

    records: sorted by path. class_map: name → id, classes without pictures included. listing_hash: SHA-256
    over keys, paths, sizes and labels. location: what `open_reader` takes. warnings: lines for people.
    """

    records: list[ImageRecord]
    class_map: dict[str, int]
    listing_hash: str
    location: str
    reader: Reader
    warnings: tuple[str, ...] = ()

    def read(self, path: str) -> bytes:
        """Bytes of the picture at `path` of a record. Raises ImageError `missing` or `unreadable`."""
        return self.reader.read(path)


@dataclass(frozen=True, slots=True)
class FileReader:
    """Files below `root`; absolute paths and URLs of a listing are followed as they are."""

    fs: AbstractFileSystem
    root: str

    def read(self, path: str) -> bytes:
        """Bytes of one file. Raises ImageError with reason `missing` or `unreadable`."""
        try:
            fs, place = self.locate(path)
            return fs.cat_file(place)
        except FileNotFoundError:
            raise ImageError("missing", "the file is no longer there") from None
        except (OSError, ValueError, ImportError) as error:
            raise ImageError("unreadable", str(error)) from None

    def size(self, path: str) -> int | None:
        """Size in bytes, None where there is no such file."""
        try:
            fs, place = self.locate(path)
            return int(fs.size(place) or 0)
        except (OSError, ValueError, ImportError):
            return None

    def locate(self, path: str) -> tuple[AbstractFileSystem, str]:
        """File system and place behind a path of the listing."""
        return url_to_fs(path) if "://" in path else (self.fs, posixpath.join(self.root, path))


@dataclass(frozen=True, slots=True)
class TarReader:
    """Members of an uncompressed tar, read by their (offset, size)."""

    fs: AbstractFileSystem
    path: str
    members: dict[str, tuple[int, int]]

    def read(self, path: str) -> bytes:
        """Bytes of one member. Raises ImageError with reason `missing` or `unreadable`."""
        if path not in self.members:
            raise ImageError("missing", f"not in {self.path}")
        start, size = self.members[path]
        try:
            return self.fs.cat_file(self.path, start=start, end=start + size) if size else b""
        except OSError as error:
            raise ImageError("unreadable", str(error)) from None


def open_source(
    source: str, split: str | None = None, class_map: str | Mapping[str, int] | None = None
) -> ImageSource:
    """List a data set.

    source: folder of class folders (or of pictures: one class `unlabelled`), `.tar` of such a tree, or a
    `.csv`, `.tsv` or `.parquet` with column `path` (relative to the listing) and optionally `class` (names)
    and `label` (ids, or names); a path or any fsspec URL.
    split: sub-folder to take, or value of column `split` of a listing.
    class_map: class name → id, as a mapping or a JSON file; without it ids follow the sorted names.
    Raises UsageError for a source that is not understood, BuilderError when it holds no images.
    """
    source = str(source)
    if not source.strip():
        raise UsageError("the images are named by an empty text: expected a folder, a .tar or a listing")
    fs, place = _filesystem(source)
    reader: Reader
    if fs.isdir(place):
        reader = FileReader(fs, place)
        found = list_folder(fs, place, source, split)
    elif not fs.exists(place):
        raise UsageError(
            f"{source} does not exist: expected a folder, a .tar or a listing {', '.join(TABLES)}"
        )
    elif place.lower().endswith(".tar"):
        members, folders = scan_tar(fs, place)
        reader = TarReader(fs, place, members)
        found = list_tar(members, folders, source, split)
    elif place.lower().endswith(TABLES):
        reader = files = FileReader(fs, posixpath.dirname(place))
        found = list_table(fs, place, files.size, source, split)
    else:
        raise UsageError(
            f"{source} is a file: expected a folder of class folders, an uncompressed .tar, or a listing "
            f"{', '.join(TABLES)}"
        )
    ids = found.ids or {name: number for number, name in enumerate(sorted(found.classes))}
    if class_map is not None:
        ids = _read_class_map(class_map)
        _check_classes(sorted({name for _, name, _ in found.images}), ids, class_map)
    records = _records(found.images, ids)
    return ImageSource(
        records=records,
        class_map=ids,
        listing_hash=listing_hash(records),
        location=source,
        reader=reader,
        warnings=tuple(found.warnings),
    )


def open_reader(location: str) -> Reader:
    """The reader of a source that was listed before; paths are those of its records."""
    fs, place = _filesystem(location)
    if place.lower().endswith(".tar") and not fs.isdir(place):
        return TarReader(fs, place, scan_tar(fs, place)[0])
    table = place.lower().endswith(TABLES) and not fs.isdir(place)
    return FileReader(fs, posixpath.dirname(place) if table else place)


def _filesystem(source: str) -> tuple[AbstractFileSystem, str]:
    try:
        fs, place = url_to_fs(source)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{source}: {error}") from None
    return fs, place.rstrip("/") or "/"


def _read_class_map(class_map: str | Mapping[str, int]) -> dict[str, int]:
    where = "class map"
    content: Any = class_map
    if isinstance(class_map, str):
        where = f"class map {class_map}"
        try:
            with open(class_map, encoding="utf-8") as file:
                content = json.load(file)
        except (OSError, ValueError) as error:
            raise UsageError(f"{where}: {error}") from None
    valid = isinstance(content, Mapping) and all(
        type(n) is int and 0 <= n <= MAX_LABEL for n in content.values()
    )
    if not valid or not content or len(set(content.values())) < len(content):
        raise UsageError(
            f"{where}: expected JSON of names and ids from 0 to {MAX_LABEL}, each of one class, for example "
            '{"cat": 0, "dog": 1}'
        )
    return dict(content)


def _check_classes(classes: list[str], ids: Mapping[str, int], class_map: str | Mapping[str, int]) -> None:
    unknown = [name for name in classes if name not in ids]
    where = f" {class_map}" if isinstance(class_map, str) else ""
    if unknown:
        close = difflib.get_close_matches(unknown[0], ids, n=1)
        raise UsageError(
            f"{len(unknown)} classes are not in the class map{where}, the first is {unknown[0]!r}"
            + (f"; near it is {close[0]!r}" if close else "")
        )


def _records(images: list[tuple[str, str, int]], ids: Mapping[str, int]) -> list[ImageRecord]:
    images = sorted(images)
    keys = assign_keys((path, name) for path, name, _ in images)
    return [
        ImageRecord(key=key, path=path, label=ids[name], class_name=name, num_bytes=size)
        for key, (path, name, size) in zip(keys, images, strict=True)
    ]


def listing_hash(records: Iterable[ImageRecord]) -> str:
    """SHA-256 over keys, paths, sizes and labels, whatever the order of the rows."""
    digest = hashlib.sha256()
    for record in sorted(records, key=lambda record: record.path):
        line = json.dumps([record.key, record.path, record.num_bytes, record.label])
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()
