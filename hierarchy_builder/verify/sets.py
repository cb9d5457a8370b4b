"""Check a finished shard set by itself, wherever it lies: each file against what vouches for it, and every sample.

`_SUCCESS` vouches for itself and for the files beside the tars, index.json for the tars. Tars at a URL pass through a
temporary file, one at a time. A set that was made to deceive can vouch for anything, so what the files say is checked
too: names stay in the folder, arrays have the shapes and labels the ids that index.json and class_map.json name.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from hierarchy_builder.build.publish import SHARD_FILE, answers_of, open_url
from hierarchy_builder.errors import BuilderError, VerificationError
from hierarchy_builder.files.remote import PART_BYTES
from hierarchy_builder.files.untrusted.documents import read_object
from hierarchy_builder.files.whole import decoding, parse_json
from hierarchy_builder.records import FORMAT_VERSION
from hierarchy_builder.store.folder import MARKS
from hierarchy_builder.store.shard_set import ABOUT, SUCCESS
from hierarchy_builder.store.shards import sidecar
from hierarchy_builder.verify.checks import Layout, arrays_of, sample_problems
from hierarchy_builder.verify.quick import size_problems

EARLIER = {"count", "index_sha256"}
"""Fields of `_SUCCESS` in sets of earlier releases, which has no seal and vouches for index.json alone."""
STATISTICS_BYTES = 2**32
AGAIN = "copy the set again, or publish it again from its build"


def is_set(place: str) -> bool:
    """Whether a place holds a shard set, finished or not; a build is none."""
    with answers_of(place):
        fs, root = open_url(place)
        return any(bool(fs.exists(f"{root.rstrip('/')}/{name}")) for name in (SUCCESS, "index.json"))


def find_set_problems(place: str, *, quick: bool = False) -> Iterator[str]:
    """Check every file of the shard set at a path or URL; yields one line per problem. Nothing is changed.

    quick: of tars and their sidecars, see only that they are there with their size. Raises BuilderError if its file
    system does not answer.
    """
    with answers_of(place):
        fs, root = open_url(place)
        try:
            yield from (f"{place}: {text}" for text in _problems(_Set(fs, root.rstrip("/")), quick))
        except VerificationError as error:
            yield f"{place}: {error}"


class _Set:
    """The files of a set by name."""

    def __init__(self, fs: AbstractFileSystem, root: str) -> None:
        self.fs, self.root = fs, root

    def read(self, name: str) -> bytes:
        """Read a file beside the tars. Raises VerificationError if it is missing or of no reasonable size."""
        try:
            return read_object(self.fs, f"{self.root}/{name}", STATISTICS_BYTES)
        except FileNotFoundError:
            raise VerificationError(f"{name} is missing: {AGAIN}") from None
        except ValueError as error:
            raise VerificationError(f"{name} is damaged ({error}): {AGAIN}") from None

    def json(self, name: str, *, sealed: bool = False) -> dict[str, Any]:
        """Read a JSON object. Raises VerificationError if it is missing or damaged."""
        data = self.read(name)
        with decoding(Path(name), AGAIN):
            return parse_json(data, sealed)

    def names(self) -> set[str]:
        """The names of all files in the folder; none where the file system cannot tell."""
        try:
            found = self.fs.ls(self.root, detail=True)
        except (FileNotFoundError, NotImplementedError):
            return set()
        return {entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in found if entry["type"] == "file"}

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of those of some files that are there."""
        found = dict[str, int]()
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found[name] = int(self.fs.size(f"{self.root}/{name}"))
        return found

    @contextlib.contextmanager
    def opened(self, name: str, most: int) -> Iterator[BinaryIO]:
        """A tar open for reading it more than once. Raises VerificationError if it has more than `most` bytes."""
        with contextlib.ExitStack() as held:
            if isinstance(self.fs, LocalFileSystem) and not Path(self.root, name).is_file():
                raise VerificationError(f"{name} is missing, or no regular file: {AGAIN}")
            try:
                source = held.enter_context(self.fs.open(f"{self.root}/{name}", "rb"))
            except FileNotFoundError:
                raise VerificationError(f"{name} is missing: {AGAIN}") from None
            if isinstance(self.fs, LocalFileSystem):
                yield source
                return
            copy = held.enter_context(tempfile.TemporaryFile())
            while part := source.read(PART_BYTES):
                copy.write(part)
                if copy.tell() > most:
                    raise VerificationError(f"{name} has more than the {most:,} bytes of index.json: {AGAIN}")
            copy.seek(0)
            yield copy


def _problems(given: _Set, quick: bool) -> Iterator[str]:
    success = given.json(SUCCESS)
    is_earlier = success.keys() == EARLIER
    if not is_earlier:
        success = given.json(SUCCESS, sealed=True)
    with decoding(Path(SUCCESS), AGAIN):
        digests = {"index.json": success["index_sha256"], **({} if is_earlier else success["files"])}
        if not digests.keys() <= set(ABOUT):
            raise ValueError(f"it vouches for {', '.join(sorted(digests.keys() - set(ABOUT)))}")
    for name, digest in digests.items():
        try:
            if hashlib.sha256(given.read(name)).hexdigest() != digest:
                yield f"{name} was changed after the set was finished: {AGAIN}"
        except VerificationError as error:
            yield str(error)
    index, ids = given.json("index.json"), given.json("class_map.json")
    with decoding(Path("index.json"), AGAIN):
        layout, entries = _layout_of(index, ids), [_entry(entry) for entry in index["shardlist"]]
        total, vocabulary = index["num_samples"], index.get("vocabulary")
    if not entries or len({name for name, *_ in entries}) < len(entries):
        yield "index.json lists no tars, or one twice"
    if not total == success.get("count") == sum(count for _, count, *_ in entries):
        yield f"index.json tells of {total} samples, {SUCCESS} of {success.get('count')}, expected the sum of its tars"
    if vocabulary is not None and "vocabulary.npz" not in digests and not is_earlier:
        yield f"{SUCCESS} does not vouch for vocabulary.npz, which index.json tells of"
    seen, listed = set[str](), sorted(given.names())  # stores then know the sizes of all files
    for entry in entries:
        if quick:
            tar = Path(entry[0])
            there = given.sizes((tar.name, sidecar(tar).name))
            yield from (f"{text}: {AGAIN}" for text in size_problems(tar, entry[2], there))
        else:
            yield from _tar_problems(given, entry, layout, seen, index.get("config_hash"))
    tars = {name for name, *_ in entries}
    for name in listed:
        if SHARD_FILE.fullmatch(name) and Path(name).with_suffix(".tar").name not in tars:
            yield f"{name} is not in index.json: {AGAIN}"
        if not is_earlier and name in ABOUT and name not in digests | MARKS:
            yield f"{name} is not among the files that {SUCCESS} vouches for: {AGAIN}"


def _layout_of(index: Mapping[str, Any], ids: Mapping[str, Any]) -> Layout:
    """What index.json says of the arrays of a sample. Raises errors of many kinds if it says no such thing."""
    if index["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format version {index['format_version']}, this program reads {FORMAT_VERSION}")
    if not ids or not all(type(label) is int and label >= 0 for label in ids.values()):
        raise ValueError("class_map.json has no classes, or ids that are no numbers")
    if len(set(ids.values())) < len(ids):
        raise ValueError("class_map.json gives one id to two classes")
    arrays = arrays_of(index["grid"], index["width"], index["num_levels"], index["feature_dtype"])
    return Layout(arrays, max(ids.values()) + 1)


def _entry(entry: Mapping[str, Any]) -> tuple[str, int, int, str]:
    """(name, samples, bytes, SHA-256) of a tar in index.json. Raises ValueError for a name outside of the folder."""
    name, digest, sizes = entry["url"], entry["sha256"], (entry["nsamples"], entry["filesize"])
    if not (SHARD_FILE.fullmatch(name) and name.endswith(".tar")) or not re.fullmatch(
        r"[0-9a-f]{64}", digest
    ):
        raise ValueError(f"a tar called {name!r} with SHA-256 {digest!r}")
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"{name} has {sizes[0]} samples in {sizes[1]} bytes")
    return name, *sizes, digest


def _tar_problems(
    given: _Set, entry: tuple[str, int, int, str], layout: Layout, seen: set[str], config_hash: Any
) -> Iterator[str]:
    """Check one tar and its sidecar. seen: keys of the tars before it; those of this tar are added."""
    name, count, size, digest = entry
    found, keys = {"count": count, "bytes": size, "sha256": digest, "config_hash": config_hash}, list[str]()
    try:
        if given.json(sidecar(Path(name)).name) != found:
            yield f"{sidecar(Path(name)).name} belongs to another tar: {AGAIN}"
        with given.opened(name, size) as file:
            if hashlib.file_digest(cast(Any, file), "sha256").hexdigest() != digest:
                yield f"{name} is not the tar of index.json, its SHA-256 differs: {AGAIN}"
            yield from sample_problems(Path(name), file, layout, seen, keys)
            if len(keys) != count:
                yield f"{name}: {len(keys)} samples, index.json says {count}"
    except BuilderError as error:
        yield str(error)
