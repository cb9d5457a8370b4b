"""Lists the images and classes of a data set: a folder tree, a tar, or a CSV, TSV or parquet table."""

from __future__ import annotations

import csv
import io
import os
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from hierarchy_builder.errors import BuilderError, UsageError
from hierarchy_builder.terminal import counted

UNLABELLED = "unlabelled"
"""Class name of all images in a folder without class folders."""
SUFFIXES = frozenset(
    f".{name}"
    for names in ("jpg jpeg jpe jfif png webp gif bmp dib tif tiff", "ppm pgm pbm pnm jp2 j2k avif tga")
    for name in names.split()
)
TABLES = (".csv", ".tsv", ".parquet")
COLUMNS = ("path", "class", "label", "split")
SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test"))
STAT_THREADS = 16
MAX_LABEL = 999_999
"""Largest class id that is accepted; larger numbers in a column `label` are hardly class ids."""


@dataclass(slots=True)
class Listing:
    """Images as (path, class name, size in bytes), all class names, and their ids if the source defines them."""

    images: list[tuple[str, str, int]] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    ids: dict[str, int] | None = None
    warnings: list[str] = field(default_factory=list)


def list_folder(fs: AbstractFileSystem, root: str, source: str, split: str | None) -> Listing:
    """List a tree of class folders or one folder of images; hidden files and folders are ignored."""
    base = posixpath.join(root, split) if split else root
    if not fs.isdir(base):
        present = sorted(posixpath.basename(p.rstrip("/")) for p in fs.ls(root, detail=False))[:10]
        raise UsageError(f"no split {split!r} under {source}: found {', '.join(present) or 'nothing'}")
    folders: set[str] = set()
    if isinstance(fs, LocalFileSystem):
        files = dict(_walk(base, "", (), folders))
    else:
        found = fs.find(base, detail=True)
        files = {path[len(base) :].lstrip("/"): int(info["size"] or 0) for path, info in found.items()}
    return _from_tree(files, folders, f"{split}/" if split else "", source, split)


def _walk(
    folder: str, prefix: str, above: tuple[tuple[int, int], ...], folders: set[str]
) -> Iterator[tuple[str, int]]:
    """Yield the files below `folder` as (relative path, size in bytes).

    Links are followed, except those that lead back to a parent folder. A dangling link is listed with size 0, so that
    it is counted as skipped when reading it fails.
    """
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    try:
        with os.scandir(folder) as found:
            entries = list(found)
    except OSError as error:
        raise BuilderError(f"{folder} cannot be listed: {error.strerror}; let this user read it") from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            if not prefix:
                folders.add(entry.name)
            yield from _walk(entry.path, f"{prefix}{entry.name}/", (*above, here), folders)
        else:
            yield f"{prefix}{entry.name}", _size(entry) if _is_image(entry.name) else 0


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return 0


def scan_tar(fs: AbstractFileSystem, path: str) -> tuple[dict[str, tuple[int, int]], set[str]]:
    """Return the regular members of a tar as name → (offset, size), and the names of its folders."""
    members: dict[str, tuple[int, int]] = {}
    folders: set[str] = set()
    try:
        with fs.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name = posixpath.normpath(member.name).lstrip("/")
                if member.isdir():
                    folders.add(name)
                elif member.isreg() and not member.issparse():
                    members[name] = (member.offset_data, member.size)
            # tarfile mistakes a file that was truncated inside a header for the end of the archive.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("no end-of-archive block")
    except (tarfile.TarError, EOFError) as error:
        raise BuilderError(f"{path} is not a complete, uncompressed tar: {error}") from None
    return members, folders


def list_tar(
    members: dict[str, tuple[int, int]], folders: set[str], source: str, split: str | None
) -> Listing:
    """List the tree in a tar; one folder around everything, as `tar cf photos.tar photos` adds, is no class."""
    names = [name for name in members if _is_image(name)]
    around = posixpath.commonpath(names) if names else ""
    prefix = f"{around.split('/')[0]}/" if around and all(name.count("/") > 1 for name in names) else ""
    if split:
        places = [f"{prefix}{split}/", f"{split}/"]
        inside = [place for place in places if any(name.startswith(place) for name in names)]
        if not inside:
            raise UsageError(f"no split {split!r} in {source}: no image lies under {split}/")
        prefix = inside[0]
    files = {
        name.removeprefix(prefix): size for name, (_, size) in members.items() if name.startswith(prefix)
    }
    below = {name.removeprefix(prefix) for name in folders if name.startswith(prefix)}
    classes = {name for name in below if "/" not in name and not _is_hidden(name)}
    return _from_tree(files, classes, prefix, source, split)


def _from_tree(
    files: Mapping[str, int], folders: set[str], prefix: str, source: str, split: str | None
) -> Listing:
    """List files by class, the first folder of their path. `prefix` is put before the paths in the listing."""
    images = {path: size for path, size in files.items() if _is_image(path) and not _is_hidden(path)}
    unnamable = [path for path in images if not _is_utf8(path)]
    for path in unnamable:
        del images[path]
    if not images:
        raise BuilderError(
            f"no images under {source}{'/' + split if split else ''} ({len(files)} other files): expected one "
            f"folder per class, or images ending in {', '.join(sorted(SUFFIXES))}"
        )
    nested = [path for path in images if "/" in path]
    if not nested:
        return Listing([(prefix + path, UNLABELLED, size) for path, size in images.items()], [UNLABELLED])
    used = {path.split("/")[0] for path in nested}
    if split is None and used <= SPLITS and any(path.count("/") > 1 for path in nested):
        raise UsageError(f"{source} holds {', '.join(sorted(used))}: choose one with --split")
    # Empty class folders get ids too, so that an incomplete copy of a data set keeps the ids of its classes.
    found = Listing([(prefix + p, p.split("/")[0], images[p]) for p in nested], sorted(used | folders))
    empty = [name for name in found.classes if name not in used]
    if empty:
        found.warnings.append(
            f"{counted(len(empty), 'class', 'classes')} without images, which keep their ids: {', '.join(empty[:10])}"
        )
    if len(nested) < len(images):
        found.warnings.append(
            f"left out: {counted(len(images) - len(nested), 'image')} outside the class folders"
        )
    if unnamable:
        found.warnings.append(f"left out: {counted(len(unnamable), 'image')} with a name that is not UTF-8")
    return found


def list_table(
    fs: AbstractFileSystem, place: str, size_of: Callable[[str], int | None], source: str, split: str | None
) -> Listing:
    """List the rows of a CSV, TSV or parquet file with a column `path`; `size_of` returns None for a missing file."""
    columns = _read_table(fs, place, source)
    wanted = ["path", "split"] if split else ["path"]
    if missing := [name for name in wanted if name not in columns]:
        raise UsageError(
            f"{source}: no column {missing[0]!r}, found {', '.join(columns) or 'none'}; expected a first line naming "
            "path and optionally class, label, split"
        )
    rows = [
        row
        for row in zip(*(columns.get(name, [""] * len(columns["path"])) for name in COLUMNS), strict=True)
        if split is None or row[3] == split
    ]
    found = Listing()
    classes = _classes_of_rows(rows, found, source)
    if not classes:
        raise BuilderError(f"no images in {source}" + (f" with split {split!r}" if split else ""))
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        sizes = list(pool.map(size_of, classes))
    if all(size is None for size in sizes):
        raise BuilderError(
            f"none of the {len(sizes)} paths in {source} exists, the first is {next(iter(classes))!r}: "
            "paths are relative to the folder of the listing"
        )
    found.images = [
        (path, name, size or 0) for (path, name), size in zip(classes.items(), sizes, strict=True)
    ]
    if gone := sum(size is None for size in sizes):
        found.warnings.append(f"{gone} listed images do not exist")
    return found


def _classes_of_rows(rows: list[tuple[str, ...]], found: Listing, source: str) -> dict[str, str]:
    """Return path → class name; set the classes of `found`, and their ids if column `label` holds numbers."""
    numbered = bool(rows) and all(re.fullmatch(r"[0-9]+", label) for _, _, label, _ in rows)
    if not numbered and not any(name for _, name, _, _ in rows):
        _refuse_partly_numeric([label for _, _, label, _ in rows], source)
    classes: dict[str, str] = {}
    ids: dict[str, int] = {}
    for number, (path, name, label, _) in enumerate(rows, start=1):
        if not path:
            raise UsageError(f"{source}: row {number} has no path")
        name = name or label or UNLABELLED
        if classes.setdefault(path, name) != name:
            raise UsageError(f"{source}: {path} is listed as {classes[path]!r} and as {name!r}")
        if numbered and ids.setdefault(name, int(label)) != int(label):
            raise UsageError(f"{source}: class {name!r} has labels {ids[name]} and {label}")
    found.classes = sorted(set(classes.values()))
    if numbered:
        if max(ids.values()) > MAX_LABEL:
            raise UsageError(f"{source}: label {max(ids.values())}, expected class ids from 0 to {MAX_LABEL}")
        names = {label: name for name, label in ids.items()}
        if shared := [name for name, label in ids.items() if names[label] != name]:
            raise UsageError(
                f"{source}: classes {shared[0]!r} and {names[ids[shared[0]]]!r} share label {ids[shared[0]]}, "
                "expected one class per label"
            )
        unnamed = not any(name for _, name, _, _ in rows)
        found.ids = {str(n): n for n in range(max(ids.values()) + 1)} if unnamed else ids
        if unnamed:
            classes = {path: str(int(name)) for path, name in classes.items()}
            found.classes = list(found.ids)
    if len(classes) < len(rows):
        found.warnings.append(f"{counted(len(rows) - len(classes), 'repeated row')} of the listing ignored")
    return classes


def _refuse_partly_numeric(labels: list[str], source: str) -> None:
    """Refuse labels such as -1 or 3.0, and ids with gaps; taken as names they would silently get other ids."""
    if any(labels) and all(re.fullmatch(r"(-?[0-9]+(\.[0-9]*)?)?", label) for label in labels):
        number, label = next(
            (n, label) for n, label in enumerate(labels, start=1) if not re.fullmatch(r"[0-9]+", label)
        )
        raise UsageError(f"{source}: row {number} has label {label!r}, expected class ids 0, 1, …, or names")


def _read_table(fs: AbstractFileSystem, place: str, source: str) -> dict[str, list[str]]:
    """Return the columns of a listing as text; an absent value is an empty text."""
    try:
        with fs.open(place, "rb") as file:
            if place.lower().endswith(".parquet"):
                table = pyarrow.parquet.read_table(file)
                columns = [name for name in table.column_names if name in COLUMNS] or table.column_names
                return {
                    name: [value or "" for value in table[name].cast(pa.string()).to_pylist()]
                    for name in columns
                }
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            rows = csv.DictReader(text, delimiter="\t" if place.lower().endswith(".tsv") else ",")
            lines = list(rows)
            return {name: [(line[name] or "").strip() for line in lines] for name in rows.fieldnames or []}
    except (OSError, pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{source} cannot be read as a listing: {error}") from None


def _is_image(path: str) -> bool:
    return posixpath.splitext(path)[1].lower() in SUFFIXES


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
