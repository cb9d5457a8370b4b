"""Lists the images and classes of a data set: a folder tree, a tar, or a CSV, TSV or parquet table.

A listing is read as a stream. Of the images that belong to other partitions, their number and classes are kept, and the
few keys that one of this partition must not get; of a tar, the places of all members as well.
"""

from __future__ import annotations

import csv
import io
import os
import posixpath
import re
import sys
import tarfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from operator import itemgetter
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from hierarchy_builder.config import Partition
from hierarchy_builder.errors import BuilderError, UsageError, UserError, some
from hierarchy_builder.files.paths import printable
from hierarchy_builder.files.untrusted.pictures import OTHER_SUFFIXES, missing_plugin, picture_suffixes
from hierarchy_builder.images.table import AT_ONCE, Collected, Size, give_back, in_batches, sorted_by_path
from hierarchy_builder.terminal import counted

UNLABELLED = "unlabelled"
"""Class name of all images in a folder without class folders."""
SYSTEM_FOLDERS = {"lost+found", "found.000", "__macosx", "$recycle.bin", "system volume information"}
SYSTEM_FOLDERS |= {"#recycle", "@recycle", "@eadir", "@tmp", "#snapshot"}
"""Folders that operating systems and file servers make, in lower case; they hold no photographs of the data set."""
SYSTEM_FILES = frozenset(("thumbs.db", "desktop.ini", "ehthumbs.db"))
TABLES = (".csv", ".tsv", ".parquet")
COLUMNS = ("path", "class", "label", "split")
PATH_COLUMNS = ("path", "file_name", "filename", "filepath", "image_path", "image")
"""Names of the column of paths; the first that a table has is taken."""
EMPTY = ("", "nan", "NaN", "<NA>")
"""A cell without a value, and how programs write one."""
SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test"))
STAT_THREADS = 16
MAX_LABEL = 999_999
"""Largest class id that is accepted; larger numbers in a column `label` are hardly class ids."""
MAX_LABEL_BYTES = 1_000
"""Largest member `cls` of a webdataset sample, in bytes."""
NAMED = 5
"""Names or kinds of files that a warning lists, at most."""


@dataclass
class Listing:
    """Images, all class names, and their ids if the source defines them."""

    images: Collected
    classes: list[str] = field(default_factory=list)
    ids: dict[str, int] | None = None
    warnings: list[str] = field(default_factory=list)

    @cached_property
    def table(self) -> pa.Table:
        """The images, by path. Raises BuilderError if there are none, or for a path that comes twice."""
        table, again = self.in_order()
        if again.any():
            path = table.column("path")[int(again.argmax())]
            raise BuilderError(
                f"{printable(str(path))} comes twice in the listing of its folder, perhaps as a link of the folder to "
                "itself: copy the images to another folder, or name them in a table"
            )
        return table

    def in_order(self) -> tuple[pa.Table, np.ndarray]:
        """The collected images in the order of their paths, and which of them have the path of the one before."""
        table = sorted_by_path(self.images.table())
        give_back()
        if not len(table):
            raise BuilderError(
                f"partition {self.images.partition} holds none of the {self.images.total:,} images: build in fewer "
                "partitions"
            )
        paths, again = table.column("path"), np.zeros(len(table), bool)
        again[1:] = pc.equal(paths[1:], paths[:-1]).to_numpy()
        return table, again


def list_folder(
    fs: AbstractFileSystem, root: str, source: str, split: str | None, partition: Partition | None = None
) -> Listing:
    """List a tree of class folders or one folder of images; hidden files and folders are ignored."""
    base = posixpath.join(root, split) if split else root
    if not fs.isdir(base):
        present = sorted(posixpath.basename(p.rstrip("/")) for p in fs.ls(root, detail=False))[:10]
        raise UsageError(f"no split {split!r} under {source}: found {', '.join(present) or 'nothing'}")
    folders: set[str] = set()
    files = _walk(base, "", (), folders) if isinstance(fs, LocalFileSystem) else _found(fs, base)
    return _from_tree(files, folders, f"{split}/" if split else "", source, split, partition)


def _found(fs: AbstractFileSystem, base: str) -> Iterator[tuple[str, int]]:
    """Yield the files below a folder of another file system as (relative path, size), one of its folders at a time."""
    for entry in fs.ls(base, detail=True):
        # a link of an index page, or the placeholder of an object store
        if entry["name"].rstrip("/") == base:
            continue
        found = {entry["name"]: entry}
        if entry["type"] == "directory":
            found = fs.find(entry["name"], detail=True)
            fs.invalidate_cache(entry["name"])  # some file systems keep every listing
        for path, info in found.items():
            yield path[len(base) :].lstrip("/"), int(info["size"] or 0)


def _walk(
    folder: str, prefix: str, above: tuple[tuple[int, int], ...], folders: set[str]
) -> Iterator[tuple[str, Size]]:
    """Yield the files below `folder` as (relative path, size in bytes), which is asked for where it is used.

    Links are followed, except those that lead back to a parent folder. A dangling link is listed with size 0, so that
    it is counted as skipped when reading it fails.
    """
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    try:
        with os.scandir(folder) as found:
            entries = [
                (entry.name + "/" * _is_folder(entry), entry) for entry in found if entry.name[0] != "."
            ]
    except OSError as error:
        raise BuilderError(f"{folder} cannot be listed: {error.strerror}; let this user read it") from None
    # Files come by path, so that no listing has to be sorted.
    for name, entry in sorted(entries, key=itemgetter(0)):
        if not name.endswith("/"):
            yield prefix + name, partial(_size, entry)
        elif entry.name.lower() not in SYSTEM_FOLDERS:
            if not prefix:
                folders.add(entry.name)
            yield from _walk(entry.path, prefix + name, (*above, here), folders)


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


@dataclass(frozen=True, slots=True)
class TarContent:
    """A scanned tar: its files as name → (offset, size), the names of its folders, and messages about the rest."""

    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)


def scan_tar(fs: AbstractFileSystem, path: str) -> TarContent:
    """Read the headers of a tar, also of tars that were appended to it. A link is the file that it leads to.

    Raises BuilderError if it is compressed or incomplete.
    """
    content, links, others = TarContent(), dict[str, str](), list[str]()
    for member in _tar_members(fs, path):
        name = posixpath.normpath(member.name).lstrip("/")
        if member.isdir():
            content.folders.add(name)
            continue
        content.members.pop(name, None)  # the last member of a name counts
        links.pop(name, None)
        if member.isreg() and not member.issparse():
            content.members[name] = (member.offset_data, member.size)
        elif member.islnk() or member.issym():
            folder = posixpath.dirname(name) if member.issym() else ""
            links[name] = posixpath.normpath(posixpath.join(folder, member.linkname)).lstrip("/")
        else:
            others.append(name)
    for name in links:
        target, seen = name, set[str]()
        while target in links and target not in seen:
            seen.add(target)
            target = links[target]
        if target in content.members:
            content.members[name] = content.members[target]
        else:
            others.append(name)
    if lost := list(filter(_is_listed, others)):
        content.warnings.append(
            f"left out: {counted(len(lost), 'member')} of the tar that are no files or lead to none in it: "
            f"{_some(lost)}"
        )
    return content


def _tar_members(fs: AbstractFileSystem, path: str) -> Iterator[tarfile.TarInfo]:
    try:
        with fs.open(path, "rb") as file:
            start: int | None = 0
            while start is not None:
                file.seek(start)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    yield from tar
                    end = tar.offset
                # tarfile mistakes a file that was truncated inside a header for the end of the archive.
                file.seek(end)
                if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("no end-of-archive block")
                start = _next_block(file)
    except (tarfile.TarError, EOFError) as error:
        raise BuilderError(
            f"{path} is not a complete, uncompressed tar: {error}; unpack it, or copy it again"
        ) from None


def _next_block(file: BinaryIO) -> int | None:
    """Offset of the next block that is not empty, or None if only padding follows."""
    start = file.tell()
    while data := file.read(2048 * tarfile.BLOCKSIZE):
        padding = len(data) - len(data.lstrip(tarfile.NUL))
        if padding < len(data):
            return start + padding // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        start += len(data)
    return None


def list_tar(
    content: TarContent,
    read: Callable[[str], bytes],
    source: str,
    split: str | None,
    partition: Partition | None = None,
) -> Listing:
    """List the tree in a tar; one folder around everything, as `tar cf photos.tar photos` adds, is no class.

    The images of webdataset samples have the class of their member `cls`, which `read` returns.
    """
    names = [name for name in content.members if _is_image(name)]
    around = posixpath.commonpath(names) if names else ""
    prefix = f"{around.split('/')[0]}/" if around and all(name.count("/") > 1 for name in names) else ""
    if split:
        places = [f"{prefix}{split}/", f"{split}/"]
        inside = [place for place in places if any(name.startswith(place) for name in names)]
        if not inside:
            raise UsageError(f"no split {split!r} in {source}: no image lies under {split}/")
        prefix = inside[0]
    files = {
        name.removeprefix(prefix): size
        for name, (_, size) in content.members.items()
        if name.startswith(prefix)
    }
    samples = _samples_of(files)
    if samples:
        found = _from_samples(files, samples, lambda name: read(prefix + name), prefix, source, partition)
    else:
        below = {name.removeprefix(prefix) for name in content.folders if name.startswith(prefix)}
        classes = {name for name in below if "/" not in name and not _is_hidden(name)}
        found = _from_tree(files.items(), classes, prefix, source, split, partition)
    found.warnings += content.warnings
    return found


def _samples_of(files: Mapping[str, int]) -> dict[str, str]:
    """Image → its member `cls`, of webdataset samples."""
    members = ((name, f"{posixpath.splitext(name)[0]}.cls") for name in files)
    return {name: member for name, member in members if member in files and _is_listed(name)}


def _from_samples(
    files: Mapping[str, int],
    samples: Mapping[str, str],
    read: Callable[[str], bytes],
    prefix: str,
    source: str,
    partition: Partition | None,
) -> Listing:
    """List webdataset samples. Names of classes are the folders of the images, if each folder is of one class."""
    labels = dict[str, str]()
    for name, member in samples.items():
        if files[member] > MAX_LABEL_BYTES:
            raise UsageError(
                f"{source}: {member} has {files[member]:,} bytes, expected the text of a class id"
            )
        labels[name] = read(member).decode("utf-8", "replace").strip()
    folders = {(name.partition("/")[0], label) for name, label in labels.items()}
    is_named = all("/" in name for name in labels)
    is_named &= len({name for name, _ in folders}) == len({label for _, label in folders}) == len(folders)
    rows = [(name, name.partition("/")[0] if is_named else "", label) for name, label in labels.items()]
    found = Listing(Collected(partition))
    classes = _classes_of_rows(rows, found, source)
    for path, name, label in rows:
        found.images.add(prefix + path, classes[name, label], files[path])
    found.warnings.append(
        f"{counted(len(samples), 'image')} of webdataset samples have the classes of their members cls"
    )
    if without := [name for name in files if _is_listed(name) and name not in samples]:
        found.warnings.append(
            f"left out: {counted(len(without), 'image')} without a member cls: {_some(without)}"
        )
    return found


def _from_tree(
    files: Iterable[tuple[str, Size]],
    folders: set[str],
    prefix: str,
    source: str,
    split: str | None,
    partition: Partition | None,
) -> Listing:
    """List files by class, the first folder of their path. `prefix` is put before the paths in the listing.

    folders: those at the top, which may be found while `files` are.
    """
    count, unnamable, others = 0, list[str](), _LeftOut()
    plain, nested = Collected(partition), Collected(partition)
    inner, is_deep = set[str](), True
    for path, size in files:
        count += 1
        if _is_hidden(path):
            continue
        is_named, is_image = _is_utf8(path), _is_image(path)
        if not is_named:
            unnamable.append(path)
        if not is_image:
            others.add(path)
        elif is_named and "/" in path:
            name, _, below = path.partition("/")
            nested.add(prefix + path, name, size)
            folder, is_deeper, _ = below.partition("/")
            if is_deeper:
                inner.add(folder)
            is_deep &= bool(is_deeper)
        elif is_named:
            plain.add(prefix + path, UNLABELLED, size)
    unnamable += [f"{name}/" for name in folders if not _is_utf8(name)]
    if not plain.total and not nested.total:
        raise BuilderError(
            f"no images under {source}{'/' + split if split else ''} ({count} other files{others.shown()}): expected "
            f"one folder per class, or images ending in {', '.join(sorted(picture_suffixes()))}"
            + (f"; {_not_utf8(unnamable)}" if unnamable else "")
        )
    left_out = [f"left out{others.shown()}"] if others.counts else []
    if unnamable:
        left_out.append(f"left out: {_not_utf8(unnamable)}")
    if not nested.total:
        unlabelled = (
            f"no class folders in {source}: all images form the one class {UNLABELLED!r}; if it is one class of a data "
            "set, pass the folder above it"
        )
        return Listing(plain, [UNLABELLED], warnings=[unlabelled, *left_out])
    used = {*nested.classes}
    if split is None and used <= SPLITS and inner:
        raise UsageError(f"{source} holds {', '.join(sorted(used))}: choose one with --split")
    # Empty class folders get ids too, so that an incomplete copy of a data set keeps the ids of its classes.
    named = {name for name in folders if _is_utf8(name) and name.lower() not in SYSTEM_FOLDERS}
    found = Listing(nested, sorted(used | named))
    empty = [name for name in found.classes if name not in used]
    if empty:
        found.warnings.append(
            f"{counted(len(empty), 'class', 'classes')} without images, which keep their ids: {', '.join(empty[:10])}"
        )
    if len(found.classes) == 1 and len(inner) > 1 and is_deep:
        found.warnings.append(
            f"all images lie in the one folder {found.classes[0]!r} and form one class; if its "
            f"{counted(len(inner), 'folder')} are the classes, pass {posixpath.join(source, prefix, found.classes[0])}"
        )
    if in_text_order(found.classes):
        found.warnings.append(
            "the names of the classes are numbers and get ids in the order of text (1, 10, 2): the id of a class is "
            "not its number; --class-map gives other ids"
        )
    if plain.total:
        found.warnings.append(f"left out: {counted(plain.total, 'image')} outside the class folders")
    found.warnings += left_out
    return found


def in_text_order(names: Sequence[str]) -> bool:
    """Whether all names are numbers whose order is not that of their texts, so that ids differ from the numbers."""
    return all(re.fullmatch(r"[0-9]+", name) for name in names) and sorted(names) != sorted(names, key=int)


@dataclass(slots=True)
class _LeftOut:
    """Files that are no images by their extension: how many of each, and one of them."""

    counts: Counter[str] = field(default_factory=Counter)
    first: tuple[bool, str] | None = None

    def add(self, path: str) -> None:
        suffix = posixpath.splitext(path)[1].lower()
        self.counts[suffix] += 1
        place = (not _is_picture(suffix), path)
        self.first = min(place, self.first or place)

    def shown(self) -> str:
        """`: 3 files .heic (install pillow-heif to read them), 1 file without extension, such as cat/1.heic`."""
        if self.first is None:
            return ""
        kinds = []
        for suffix in sorted(self.counts, key=lambda kind: (not _is_picture(kind), -self.counts[kind], kind)):
            package = missing_plugin(suffix)
            advice = f" (to read them: pip install {package})" if package else ""
            kinds.append(
                f"{counted(self.counts[suffix], 'file')} {printable(suffix) or 'without extension'}{advice}"
            )
        more = f", and {len(kinds) - NAMED} other kinds" if len(kinds) > NAMED else ""
        return f": {', '.join(kinds[:NAMED])}{more}, such as {printable(self.first[1])}"


def _not_utf8(names: Sequence[str]) -> str:
    encoding = sys.getfilesystemencoding()
    advice = f"; Python takes names for {encoding} here: set PYTHONUTF8=1" if encoding != "utf-8" else ""
    return (
        f"{counted(len(names), 'file or folder', 'files and folders')} with a name that is not UTF-8: "
        f"{_some(names)}{advice}"
    )


def _is_picture(suffix: str) -> bool:
    """Whether files with this extension are probably photographs that cannot be read here."""
    return suffix == "" or suffix in OTHER_SUFFIXES or missing_plugin(suffix) is not None


def _some(names: Sequence[str]) -> str:
    return printable(some(sorted(names)))


def list_table(
    fs: AbstractFileSystem,
    place: str,
    size_of: Callable[[str], int | None],
    source: str,
    split: str | None,
    partition: Partition | None = None,
) -> Listing:
    """List the rows of a CSV, TSV or parquet file with a column `path`; `size_of` returns None for a missing file.

    The file is read twice: first the classes must be known. Raises UsageError if it changed meanwhile.
    """
    columns = _column_names(fs, place, source)
    named = next((name for name in PATH_COLUMNS if name in columns), "")
    if not named or (split and "split" not in columns):
        raise UsageError(
            f"{source}: no column {'split' if named else 'path'!r}, found {', '.join(columns) or 'none'}; expected a "
            f"first line naming path (or {', '.join(PATH_COLUMNS[1:])}) and optionally class, label, split"
        )
    read = [name for name in (named, "class", "label", "split") if name in columns]

    count = 0

    def rows() -> Iterator[tuple[str, str, str]]:
        nonlocal count
        for values in _rows_of(fs, place, source, read):
            row = dict(zip(read, values, strict=True))
            if split is None or row["split"] == split:
                count += 1
                yield row[named], row.get("class", ""), row.get("label", "")

    found = Listing(Collected(partition))
    if named != "path":
        found.warnings.append(f"the paths are those of the column {named!r}")
    classes = _classes_of_rows(rows(), found, source)
    if not classes:
        raise BuilderError(f"no images in {source}" + (f" with split {split!r}" if split else ""))
    first_time, first = count, ""
    for path, name, label in rows():
        if path and (name, label) in classes and found.images.add(path, classes[name, label], 0):
            first = first or path
    if not count - first_time == first_time == found.images.total:
        raise UsageError(
            f"{source} changed while it was read: repeat the command when nothing writes the table any more"
        )
    table, again = found.in_order()
    paths, names = (table.column(name) for name in ("path", "class_name"))
    for row in np.flatnonzero(again).tolist():
        before, now = sorted(names[each].as_py() for each in (row - 1, row))
        if before != now:
            raise UsageError(f"{source}: {paths[row]} is listed as {before!r} and as {now!r}")
    if again.any():
        found.warnings.append(f"{counted(int(again.sum()), 'repeated row')} of the listing ignored")
        table = table.filter(pa.array(~again))
    sizes, gone = array("q"), 0
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        for batch in in_batches(table.select(["path"])):
            for size in pool.map(size_of, batch.column(0).to_pylist()):
                sizes.append(size or 0)
                gone += size is None
    if gone == len(table):
        raise BuilderError(
            f"none of the {len(table)} paths in {source} exists"
            + ("" if partition is None else f" that belong to partition {partition}")
            + f", the first is {first!r}: paths are relative to the folder of the listing"
        )
    if gone:
        found.warnings.append(f"{gone} listed images do not exist")
    found.table = table.set_column(
        table.schema.get_field_index("bytes"), "bytes", pa.array(np.frombuffer(sizes, np.int64))
    )
    return found


Cells = tuple[str, str]
"""The cells `class` and `label` of a row, as they are written."""


def _classes_of_rows(rows: Iterable[tuple[str, str, str]], found: Listing, source: str) -> dict[Cells, str]:
    """Return the name of the class for each pair of cells; set the classes of `found`, and their ids if it has any.

    rows: path, class and label. Ids come from the column `label`, if it holds numbers.
    """
    firsts = dict[Cells, tuple[int, str]]()
    """Number and path of the first row with these cells, in the order of the rows."""
    for number, (path, name, label) in enumerate(rows, start=1):
        if not path:
            raise UsageError(f"{source}: row {number} has no path")
        firsts.setdefault((name, label), (number, path))
    cleared = {
        (name, label): ("" if name in EMPTY else name, "" if label in EMPTY else label)
        for name, label in firsts
    }
    unnamed = not any(name for name, _ in cleared.values())
    no_ids = [cells for cells, (_, label) in cleared.items() if not re.fullmatch(r"[0-9]+", label)]
    labels = [label for _, label in cleared.values() if label]
    # Labels such as -1 and 3.0, and ids with gaps, would silently get other ids if they were taken for names.
    if unnamed and labels and no_ids and all(re.fullmatch(r"-?[0-9]+(\.[0-9]*)?", each) for each in labels):
        (number, _), (name, label) = firsts[no_ids[0]], no_ids[0]
        raise UsageError(
            f"{source}: row {number} has label {label or name!r}, expected class ids 0, 1, …, or names in every row"
        )
    empty = [cells for cells in firsts if not any(cleared[cells])]
    if 0 < len(empty) < len(firsts):
        number, path = firsts[empty[0]]
        raise UsageError(
            f"{source}: row {number} ({path}) has class {next(filter(None, empty[0]), '')!r}, which is no class, and "
            "others have one: fill the cell, or remove the row"
        )
    numbered = bool(firsts) and not no_ids
    classes = {cells: name or label or UNLABELLED for cells, (name, label) in cleared.items()}
    found.classes = sorted(set(classes.values()))
    if not numbered:
        return classes
    ids: dict[str, int] = {}
    for cells, name in classes.items():
        number = int(cleared[cells][1])
        if ids.setdefault(name, number) != number:
            raise UsageError(f"{source}: class {name!r} has labels {ids[name]} and {cleared[cells][1]}")
    if max(ids.values()) > MAX_LABEL:
        raise UsageError(f"{source}: label {max(ids.values())}, expected class ids from 0 to {MAX_LABEL}")
    names = {label: name for name, label in ids.items()}
    if shared := [name for name, label in ids.items() if names[label] != name]:
        raise UsageError(
            f"{source}: classes {shared[0]!r} and {names[ids[shared[0]]]!r} share label {ids[shared[0]]}, "
            "expected one class per label"
        )
    found.ids = {str(n): n for n in range(max(ids.values()) + 1)} if unnamed else ids
    if unnamed:
        classes = {cells: str(int(name)) for cells, name in classes.items()}
        found.classes = list(found.ids)
    return classes


def _column_names(fs: AbstractFileSystem, place: str, source: str) -> list[str]:
    """The columns of a table that a listing may use; a parquet file without one for paths shows all, with types."""
    with _reading(source), fs.open(place, "rb") as file:
        if not place.lower().endswith(".parquet"):
            return next(_lines_of(file, place), [])
        schema = pyarrow.parquet.read_schema(file)
        known = {*COLUMNS, *PATH_COLUMNS}
        found = [each.name for each in schema if each.name in known and _is_scalar(each.type)]
        return found if {*PATH_COLUMNS} & {*found} else [f"{each.name} ({each.type})" for each in schema]


def _rows_of(
    fs: AbstractFileSystem, place: str, source: str, names: Sequence[str]
) -> Iterator[tuple[str, ...]]:
    """Yield these columns of a table row by row as text; an absent value is an empty text."""
    with _reading(source), fs.open(place, "rb") as file:
        if place.lower().endswith(".parquet"):
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(AT_ONCE, columns=list(names)):
                texts = [batch.column(name).cast(pa.string()).fill_null("").to_pylist() for name in names]
                yield from zip(*texts, strict=True)
            return
        lines = _lines_of(file, place)
        places = {name: number for number, name in enumerate(next(lines))}
        for line in lines:
            if line:
                cells = (line[at] if (at := places[name]) < len(line) else "" for name in names)
                yield tuple(cell.strip() for cell in cells)


def _lines_of(file: BinaryIO, place: str) -> Iterator[list[str]]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    return csv.reader(text, delimiter="\t" if place.lower().endswith(".tsv") else ",")


@contextmanager
def _reading(source: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # pyarrow raises errors of many kinds for damaged bytes
        raise UsageError(
            f"{source} cannot be read as a listing: {str(error) or type(error).__name__}"
        ) from None


def _is_scalar(kind: pa.DataType) -> bool:
    """Whether cells of a table are texts or numbers, not pictures or lists."""
    types = pa.types
    return not (types.is_nested(kind) or types.is_binary(kind) or types.is_large_binary(kind))


def _is_listed(path: str) -> bool:
    return _is_image(path) and not _is_hidden(path)


def _is_image(path: str) -> bool:
    return posixpath.splitext(path)[1].lower() in picture_suffixes()


def _is_hidden(path: str) -> bool:
    """Whether a file is hidden, or one that an operating system made."""
    *folders, name = path.split("/")
    return (
        any(part.startswith(".") for part in (*folders, name))
        or any(folder.lower() in SYSTEM_FOLDERS for folder in folders)
        or name.lower() in SYSTEM_FILES
    )


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
