"""Lists the images and classes of a data set: a folder tree, a tar, or a CSV, TSV or parquet table."""

from __future__ import annotations

import csv
import io
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from hierarchy_builder.errors import BuilderError, UsageError
from hierarchy_builder.pictures import OTHER_SUFFIXES, missing_plugin, picture_suffixes
from hierarchy_builder.places import printable
from hierarchy_builder.terminal import counted

UNLABELLED = "unlabelled"
"""Class name of all images in a folder without class folders."""
SYSTEM_FOLDERS = frozenset(
    (
        *("lost+found", "found.000", "__macosx", "$recycle.bin", "system volume information"),  # of computers
        *("#recycle", "@recycle", "@eadir", "@tmp", "#snapshot"),  # of file servers
    )
)
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
            if entry.name.lower() in SYSTEM_FOLDERS:
                continue
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
    try:
        with fs.open(path, "rb") as file:
            start: int | None = 0
            while start is not None:
                file.seek(start)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in tar:
                        _add_member(member, content, links, others)
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
    for name in links:
        target, seen = name, set[str]()
        while target in links and target not in seen:
            seen.add(target)
            target = links[target]
        if target in content.members:
            content.members[name] = content.members[target]
        else:
            others.append(name)
    if lost := [name for name in others if _is_image(name) and not _is_hidden(name)]:
        content.warnings.append(
            f"left out: {counted(len(lost), 'member')} of the tar that are no files or lead to none in it: "
            f"{_some(lost)}"
        )
    return content


def _add_member(
    member: tarfile.TarInfo, content: TarContent, links: dict[str, str], others: list[str]
) -> None:
    name = posixpath.normpath(member.name).lstrip("/")
    if member.isdir():
        content.folders.add(name)
        return
    content.members.pop(name, None)  # the last member of a name counts
    links.pop(name, None)
    if member.isreg() and not member.issparse():
        content.members[name] = (member.offset_data, member.size)
    elif member.islnk():
        links[name] = posixpath.normpath(member.linkname).lstrip("/")
    elif member.issym():
        links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname)).lstrip("/")
    else:
        others.append(name)


def _next_block(file: BinaryIO) -> int | None:
    """Offset of the next block that is not empty, or None if only padding follows."""
    start = file.tell()
    while data := file.read(2048 * tarfile.BLOCKSIZE):
        padding = len(data) - len(data.lstrip(tarfile.NUL))
        if padding < len(data):
            return start + padding // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        start += len(data)
    return None


def list_tar(content: TarContent, read: Callable[[str], bytes], source: str, split: str | None) -> Listing:
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
        found = _from_samples(files, samples, lambda name: read(prefix + name), prefix, source)
    else:
        below = {name.removeprefix(prefix) for name in content.folders if name.startswith(prefix)}
        classes = {name for name in below if "/" not in name and not _is_hidden(name)}
        found = _from_tree(files, classes, prefix, source, split)
    found.warnings += content.warnings
    return found


def _samples_of(files: Mapping[str, int]) -> dict[str, str]:
    """Image → its member `cls`, of webdataset samples; a key ends at the first dot of the file name."""
    labels = {name.removesuffix(".cls") for name in files if name.endswith(".cls") and not _is_hidden(name)}
    images = (name for name in files if _is_image(name) and not _is_hidden(name)) if labels else ()
    return {
        name: f"{posixpath.splitext(name)[0]}.cls" for name in images if posixpath.splitext(name)[0] in labels
    }


def _from_samples(
    files: Mapping[str, int],
    samples: Mapping[str, str],
    read: Callable[[str], bytes],
    prefix: str,
    source: str,
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
    rows: list[tuple[str, ...]] = [
        (name, name.partition("/")[0] if is_named else "", label, "") for name, label in labels.items()
    ]
    found = Listing()
    classes = _classes_of_rows(rows, found, source)
    found.images = [(prefix + name, classes[name], files[name]) for name in samples]
    found.warnings.append(
        f"{counted(len(samples), 'image')} of webdataset samples have the classes of their members cls"
    )
    if without := [
        name for name in files if _is_image(name) and not _is_hidden(name) and name not in samples
    ]:
        found.warnings.append(
            f"left out: {counted(len(without), 'image')} without a member cls: {_some(without)}"
        )
    return found


def _from_tree(
    files: Mapping[str, int], folders: set[str], prefix: str, source: str, split: str | None
) -> Listing:
    """List files by class, the first folder of their path. `prefix` is put before the paths in the listing."""
    shown = {path: size for path, size in files.items() if not _is_hidden(path)}
    unnamable = [path for path in shown if not _is_utf8(path)]
    unnamable += [f"{name}/" for name in folders if not _is_utf8(name)]
    images = {path: size for path, size in shown.items() if _is_image(path) and _is_utf8(path)}
    others = [path for path in shown if not _is_image(path)]
    if not images:
        left_out = f": {_by_suffix(others)}" if others else ""
        raise BuilderError(
            f"no images under {source}{'/' + split if split else ''} ({len(files)} other files{left_out}): expected "
            f"one folder per class, or images ending in {', '.join(sorted(picture_suffixes()))}"
        )
    nested = [path for path in images if "/" in path]
    if not nested:
        found = Listing([(prefix + path, UNLABELLED, size) for path, size in images.items()], [UNLABELLED])
        found.warnings.append(
            f"no class folders in {source}: all images form the one class {UNLABELLED!r}; if it is one class of a data "
            "set, pass the folder above it"
        )
        return _with_left_out(found, others, unnamable)
    used = {path.split("/")[0] for path in nested}
    if split is None and used <= SPLITS and any(path.count("/") > 1 for path in nested):
        raise UsageError(f"{source} holds {', '.join(sorted(used))}: choose one with --split")
    # Empty class folders get ids too, so that an incomplete copy of a data set keeps the ids of its classes.
    named = {name for name in folders if _is_utf8(name) and name.lower() not in SYSTEM_FOLDERS}
    found = Listing([(prefix + p, p.split("/")[0], images[p]) for p in nested], sorted(used | named))
    empty = [name for name in found.classes if name not in used]
    if empty:
        found.warnings.append(
            f"{counted(len(empty), 'class', 'classes')} without images, which keep their ids: {', '.join(empty[:10])}"
        )
    inner = {path.split("/")[1] for path in nested if path.count("/") > 1}
    if len(found.classes) == 1 and len(inner) > 1 and all(path.count("/") > 1 for path in nested):
        found.warnings.append(
            f"all images lie in the one folder {found.classes[0]!r} and form one class; if its "
            f"{counted(len(inner), 'folder')} are the classes, pass {posixpath.join(source, prefix, found.classes[0])}"
        )
    if in_text_order(found.classes):
        found.warnings.append(
            "the names of the classes are numbers and get ids in the order of text (1, 10, 2): the id of a class is "
            "not its number; --class-map gives other ids"
        )
    if len(nested) < len(images):
        found.warnings.append(
            f"left out: {counted(len(images) - len(nested), 'image')} outside the class folders"
        )
    return _with_left_out(found, others, unnamable)


def in_text_order(names: Sequence[str]) -> bool:
    """Whether all names are numbers whose order is not that of their texts, so that ids differ from the numbers."""
    return all(re.fullmatch(r"[0-9]+", name) for name in names) and sorted(names) != sorted(names, key=int)


def _with_left_out(found: Listing, others: Sequence[str], unnamable: Sequence[str]) -> Listing:
    """Add messages about files that are no images by their extension, and about names that are not UTF-8."""
    if others:
        found.warnings.append(f"left out: {_by_suffix(others)}")
    if unnamable:
        found.warnings.append(
            f"left out: {counted(len(unnamable), 'file or folder', 'files and folders')} with a name that is not "
            f"UTF-8: {_some(unnamable)}"
        )
    return found


def _by_suffix(paths: Sequence[str]) -> str:
    """`3 files .heic (install pillow-heif to read them), 1 file without extension, such as cat/1.heic`."""
    counts = Counter(posixpath.splitext(path)[1].lower() for path in paths)
    kinds = []
    for suffix, count in sorted(counts.items(), key=lambda each: (-_is_picture(each[0]), -each[1], each[0])):
        package = missing_plugin(suffix)
        advice = f" (to read them: pip install {package})" if package else ""
        kinds.append(f"{counted(count, 'file')} {printable(suffix) or 'without extension'}{advice}")
    more = f", and {len(kinds) - NAMED} other kinds" if len(kinds) > NAMED else ""
    first = min(paths, key=lambda path: (-_is_picture(posixpath.splitext(path)[1].lower()), path))
    return f"{', '.join(kinds[:NAMED])}{more}, such as {printable(first)}"


def _is_picture(suffix: str) -> bool:
    """Whether files with this extension are probably photographs that cannot be read here."""
    return suffix == "" or suffix in OTHER_SUFFIXES or missing_plugin(suffix) is not None


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(map(printable, sorted(names)[:NAMED])) + more


def list_table(
    fs: AbstractFileSystem, place: str, size_of: Callable[[str], int | None], source: str, split: str | None
) -> Listing:
    """List the rows of a CSV, TSV or parquet file with a column `path`; `size_of` returns None for a missing file."""
    columns = _read_table(fs, place, source)
    wanted = ["path", "split"] if split else ["path"]
    named = next((name for name in PATH_COLUMNS if name in columns), "path")
    if missing := [
        name for name in wanted if (name not in columns and name != "path") or named not in columns
    ]:
        raise UsageError(
            f"{source}: no column {missing[0]!r}, found {', '.join(columns) or 'none'}; expected a first line naming "
            f"path (or {', '.join(PATH_COLUMNS[1:])}) and optionally class, label, split"
        )
    columns["path"] = columns[named]
    rows = [
        row
        for row in zip(*(columns.get(name, [""] * len(columns["path"])) for name in COLUMNS), strict=True)
        if split is None or row[3] == split
    ]
    found = Listing()
    if named != "path":
        found.warnings.append(f"the paths are those of the column {named!r}")
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
    rows = _without_empty_classes(rows, source)
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


def _without_empty_classes(rows: Sequence[tuple[str, ...]], source: str) -> list[tuple[str, ...]]:
    """The rows with "" for a class or label without a value; raises UsageError if only some rows have a class."""
    cleared: list[tuple[str, ...]] = [
        (path, "" if name in EMPTY else name, "" if label in EMPTY else label, split)
        for path, name, label, split in rows
    ]
    is_empty = [not (name or label) for _, name, label, _ in cleared]
    if any(is_empty) and not all(is_empty):
        number = is_empty.index(True)
        path, *given, _ = rows[number]
        found = next((text for text in given if text), "")
        number_or_none = re.compile(r"(-?[0-9]+(\.[0-9]*)?)?")
        if all(not name and number_or_none.fullmatch(label) for _, name, label, _ in cleared):
            raise UsageError(
                f"{source}: row {number + 1} has label {found!r}, expected class ids 0, 1, …, or names in every row"
            )
        raise UsageError(
            f"{source}: row {number + 1} ({path}) has class {found!r}, which is no class, and others have one: "
            "fill the cell, or remove the row"
        )
    return cleared


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
                known = (*COLUMNS, *PATH_COLUMNS)
                columns = [
                    name for name in table.column_names if name in known and _is_scalar(table[name].type)
                ]
                if not {*PATH_COLUMNS} & {*columns}:
                    return {f"{name} ({table[name].type})": [] for name in table.column_names}
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


def _is_scalar(kind: pa.DataType) -> bool:
    """Whether cells of a table are texts or numbers, not pictures or lists."""
    return (
        not pa.types.is_nested(kind) and not pa.types.is_binary(kind) and not pa.types.is_large_binary(kind)
    )


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
