"""Image sources: a tree of class folders, a tar, or a CSV, TSV or parquet table, local or at an fsspec URL.

A source is listed once, which gives records in the order of their paths. A worker process only needs a reader, which
it opens from `ImageSource.location` without listing again; for a tar it reads the headers.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from hierarchy_builder.config import Partition
from hierarchy_builder.errors import ImageError, UsageError
from hierarchy_builder.fields import nearest
from hierarchy_builder.files.paths import a_folder, filesystem_of
from hierarchy_builder.files.remote import store_error, without_secrets
from hierarchy_builder.files.untrusted.documents import parse_json, read_document
from hierarchy_builder.images.keys import composed, unique_keys
from hierarchy_builder.images.listings import MAX_LABEL, TABLES, list_folder, list_table, list_tar, scan_tar
from hierarchy_builder.images.reading import read_file
from hierarchy_builder.images.table import Collected, ImageTable, give_back, in_batches
from hierarchy_builder.records import ImageRecord
from hierarchy_builder.terminal import counted


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSource:
    """A listed data set.

    records: sorted by path. class_map: class name → id, including classes without images. listing_hash: SHA-256 over
    keys, paths, sizes and labels. location: argument for `open_reader`. warnings: messages to print.
    """

    records: ImageTable
    class_map: dict[str, int]
    listing_hash: str
    location: str
    reader: Reader
    warnings: tuple[str, ...] = ()

    @property
    def left_out(self) -> list[str]:
        """The warnings about files that are not listed."""
        return [text for text in self.warnings if text.startswith("left out")]

    def read(self, path: str) -> bytes:
        """See `FileReader.read`."""
        return self.reader.read(path)


@dataclass(frozen=True, slots=True)
class FileReader:
    """Reads files below `root`; absolute paths and URLs in a table are used as they are."""

    fs: AbstractFileSystem
    root: str

    def read(self, path: str) -> bytes:
        """The bytes of the image whose record has this `path`. Raises ImageError; see `read_file`."""
        try:
            fs, place = self.locate(path)
        except (OSError, ValueError, ImportError) as error:
            raise ImageError("unreadable", without_secrets(str(error))) from None
        return read_file(fs, place)

    def size(self, path: str) -> int | None:
        """Size of a file in bytes, 0 if its file system does not tell, or None if it cannot be found."""
        try:
            fs, place = self.locate(path)
            return int(fs.size(place) or 0)
        except FileNotFoundError as error:  # fsspec raises it for every answer of a web server
            answer = getattr(error.__cause__, "status", None)
            return None if answer in (None, 404, 410) else 0
        except (OSError, ValueError, ImportError):
            return None
        except Exception:  # every file system has its own exceptions; reading the file tells more
            return 0

    def locate(self, path: str) -> tuple[AbstractFileSystem, str]:
        """File system of a listed path, and the path on it.

        A name with accents that is not there is looked for as other systems write it: é as one letter or as two.
        """
        if "://" in path:
            return filesystem_of(path)
        place = posixpath.join(self.root, path)
        if isinstance(self.fs, LocalFileSystem) and not path.isascii() and not os.path.lexists(place):
            forms = [posixpath.join(self.root, unicodedata.normalize(form, path)) for form in ("NFC", "NFD")]
            place = next(filter(os.path.lexists, forms), place)
        return self.fs, place


@dataclass(frozen=True, slots=True)
class TarReader:
    """Reads members of an uncompressed tar by their (offset, size)."""

    fs: AbstractFileSystem
    path: str
    members: dict[str, tuple[int, int]]

    def read(self, path: str) -> bytes:
        """See `FileReader.read`."""
        if path not in self.members:
            raise ImageError("missing", f"{self.path} has no such member")
        return read_file(self.fs, self.path, *self.members[path])

    def locate(self, path: str) -> tuple[AbstractFileSystem, str]:
        """File system and path of the tar, which holds all images."""
        return self.fs, self.path


Reader = FileReader | TarReader
"""What reads the images of a source."""


def open_source(
    source: str,
    split: str | None = None,
    class_map: str | Mapping[str, int] | None = None,
    partition: str | None = None,
) -> ImageSource:
    """List a data set.

    source: path or fsspec URL of a folder of class folders (or of images, which then form one class `unlabelled`), of
    a `.tar` of such a folder or of webdataset samples with `cls`, or of a `.csv`, `.tsv` or `.parquet` table with the
    column `path` (relative to the table) and optionally `class` (names) and `label` (ids or names).
    split: sub-folder to use, or for a table the value of its column `split`.
    class_map: class name → id, as a mapping or a JSON file; by default ids follow the sorted class names.
    partition: the part of the images to take, for example `3/64`, see `config.Partition`; the ids of classes are those
    of the whole listing.
    Raises UsageError if the source is of none of these kinds, and BuilderError if it contains no images.
    """
    source = str(source)
    if not source.strip():
        raise UsageError("the path of the images is empty, expected a folder, a .tar or a table")
    fs, place = _filesystem(source)
    reader: Reader
    part = None if partition is None else Partition.parse(partition)
    if fs.isdir(place):
        reader = FileReader(fs, place)
        found = list_folder(fs, place, source, split, part)
    elif not fs.exists(place):
        raise UsageError(f"{source} does not exist: expected a folder, a .tar or a table {', '.join(TABLES)}")
    elif place.lower().endswith(".tar"):
        content = scan_tar(fs, place)
        reader = TarReader(fs, place, content.members)
        found = list_tar(content, reader.read, source, split, part)
    elif place.lower().endswith(TABLES):
        reader = files = FileReader(fs, posixpath.dirname(place))
        found = list_table(fs, place, files.size, source, split, part)
    else:
        raise UsageError(
            f"{source} is a file: expected a folder of class folders, an uncompressed .tar, or a table "
            f"{', '.join(TABLES)}"
        )
    if class_map is None:
        ids = found.ids or _numbered(found.classes)
    else:
        ids = _read_class_map(class_map)
    spelled = _as_spelled(found.images.classes, ids)
    if unknown := sorted({*spelled.values()} - {*ids}):
        where = f" {class_map}" if isinstance(class_map, str) else ""
        raise UsageError(
            f"{counted(len(unknown), 'class', 'classes')} missing in the class map{where}, the first is "
            f"{unknown[0]!r}: {nearest(unknown[0], ids)}"
        )
    table = _renamed(found.table, spelled)
    keys = unique_keys(table.column("key"), table.column("path"), found.images.elsewhere)
    no_labels = pa.array(np.zeros(len(table), np.int32))
    records = ImageTable(table.set_column(0, "key", keys).append_column("label", no_labels)).relabelled(ids)
    give_back()
    return ImageSource(
        records=records,
        class_map=ids,
        listing_hash=listing_hash(records),
        location=source,
        reader=reader,
        warnings=tuple(found.warnings),
    )


def open_reader(location: str) -> Reader:
    """Open a reader for a source that was listed before."""
    fs, place = _filesystem(location)
    if place.lower().endswith(".tar") and not fs.isdir(place):
        return TarReader(fs, place, scan_tar(fs, place).members)
    table = place.lower().endswith(TABLES) and not fs.isdir(place)
    return FileReader(fs, posixpath.dirname(place) if table else place)


def _filesystem(source: str) -> tuple[AbstractFileSystem, str]:
    try:
        fs, place = filesystem_of(source)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{source}: {error}") from None
    return fs, place.rstrip("/") or "/"


def _numbered(classes: Iterable[str]) -> dict[str, int]:
    """Ids of classes by their sorted names; names that differ only in how accents are composed are one class."""
    spelled = {composed(name): name for name in sorted(classes)}
    return {name: number for number, name in enumerate(sorted(spelled.values()))}


def _as_spelled(names: Iterable[str], ids: Mapping[str, int]) -> dict[str, str]:
    """The names of classes as `ids` has them, where those differ only in how accents are composed."""
    spelled = {composed(name): name for name in ids}
    return {name: name if name in ids else spelled.get(composed(name), name) for name in names}


def _renamed(table: pa.Table, spelled: Mapping[str, str]) -> pa.Table:
    """The images with other names of their classes, and the keys that follow from these."""
    if all(name == written for name, written in spelled.items()):
        return table
    found = Collected(None)
    columns = (table.column(name).to_pylist() for name in ("path", "class_name", "bytes"))
    for path, name, size in zip(*columns, strict=True):
        found.add(path, spelled[name], size)
    return found.table()


def _read_class_map(class_map: str | Mapping[str, int]) -> dict[str, int]:
    where = "class map"
    content: Any = class_map
    if isinstance(class_map, str):
        where = f"class map {class_map}"
        try:
            content = parse_json(read_document(a_folder(class_map)))
        except (OSError, ValueError) as error:
            if told := store_error(error):
                raise told from error
            raise UsageError(f"{where}: {error}") from None
    valid = isinstance(content, Mapping) and all(
        type(n) is int and 0 <= n <= MAX_LABEL for n in content.values()
    )
    if not valid or not content or len(set(content.values())) < len(content):
        raise UsageError(
            f"{where}: expected JSON of class names and different ids from 0 to {MAX_LABEL}, for example "
            '{"cat": 0, "dog": 1}'
        )
    return dict(content)


def listing_hash(records: Iterable[ImageRecord]) -> str:
    """SHA-256 over keys, paths, sizes and labels; the order of the records plays no role."""
    digest = hashlib.sha256()
    table = ImageTable.of(records).by_path().table.select(["key", "path", "bytes", "label"])
    encode = json.JSONEncoder().encode
    for batch in in_batches(table):
        rows = zip(*(column.to_pylist() for column in batch.columns), strict=True)
        digest.update("".join(f"{encode(row)}\n" for row in rows).encode())
    return digest.hexdigest()
