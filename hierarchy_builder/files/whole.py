"""Files that are whole or absent: on a disk they are written under a temporary name, synchronised, then renamed.

At a URL (see `files/remote.py`) an object is sent in one piece or in parts, and appears when it is whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from hierarchy_builder.errors import UserError, VerificationError
from hierarchy_builder.files import remote
from hierarchy_builder.files.remote import is_remote, store_error
from hierarchy_builder.files.untrusted import documents

SEAL = "document_sha256"
"""Field of a sealed JSON object: the checksum of the whole document, see `sealed_text`."""
BLANK = "0" * 64

OF_BUILDS = frozenset({"ledger", "features.zarr", "regions.zarr", "manifest.json", "index.parquet"})
"""Names that only the folder of a build has in it."""
REPAIR_UNNAMED = "run `hierarchy-builder repair` on its build"

RECORD_VERSION = 2
"""Version of manifests and markers; those of version 1 have no seal."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; the file written there is synchronised and takes the name `path`.

    The folder of `path` is made. On any exception nothing new is left, and `path` stays as it was. A link stays a
    link: the file it leads to is written. Raises UserError where `path` is a folder, a device or a pipe.
    """
    path = target_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(path)
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a write does not say where it failed
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """What `whole_file` does, as a file that is open for writing bytes; at a URL it is sent as it is written."""
    if is_remote(path):
        with remote.upload(path) as file:
            yield file
        return
    with whole_file(path) as partial, open(partial, "wb") as file:
        yield file


def target_of(path: Path) -> Path:
    """Where a file that shall be found at `path` is written: there, or where a link there leads.

    Raises UserError where that is something a file may not replace, and for a link out of a guarded folder.
    """
    if is_remote(path):
        return path
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "no regular file (a device or a pipe)"
        raise UserError(
            f"{path} is {what}, expected the name of a file to write; choose another, or remove it"
        )
    if not path.is_symlink():
        return path
    for folder in _GUARDED & set(map(str, Path(os.path.abspath(path)).parents)):
        _refuse_link(path, folder)
    return Path(os.path.realpath(path))


_GUARDED = set[str]()
"""Builds and runs that this process has opened."""


def guard(folder: Path) -> None:
    """Refuse from now on to write through a link in `folder`, or in a folder below, that leads out of it.

    Whoever made the folder may be a stranger, and what is written there would go through the link to any file of the
    one who writes. Links to folders are followed, as people put large stores on other disks.
    """
    if not is_remote(folder):
        _GUARDED.add(os.path.abspath(folder))


def refuse_links(folder: Path, names: Collection[str] | None = None) -> None:
    """Refuse what `guard` would refuse later, for files directly in `folder`, of these names or of any."""
    if is_remote(folder) or not folder.is_dir():
        return
    for path in folder.iterdir() if names is None else map(folder.joinpath, names):
        if path.is_symlink() and not path.is_dir():
            _refuse_link(path, str(folder))


def _refuse_link(path: Path, folder: str) -> None:
    home, target = os.path.realpath(folder), os.path.realpath(path)
    if os.path.commonpath([home, target]) != home:
        raise UserError(
            f"{path} is a link to {target}, which would be overwritten: remove the link, or put the file itself in its "
            "place"
        )


def partial_name(path: Path) -> Path:
    """The temporary name under which this process writes `path`."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def sync(path: Path) -> None:
    """Wait until the bytes of a file, or the entries of a folder, are on disk; an object is when it was sent."""
    if is_remote(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bytes(path: Path) -> bytes:
    """The bytes of a file, with one request for those of an object. Raises VerificationError for a pipe or a device."""
    if is_remote(path):
        return remote.get(path)
    require_regular(path)
    return path.read_bytes()


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write `data` under its final name, whole or not at all; an equal file is left untouched."""
    if is_remote(path):
        remote.put(path, bytes(data))
        return
    if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return
    with atomic_file(path) as file:
        file.write(data)


def write_json(path: Path, content: Any) -> None:
    """Write JSON (UTF-8, two spaces, NaN as null), whole or not at all."""
    write_bytes(path, json_text(content))


def json_text(content: Any, *, sort_keys: bool = True, indent: int | None = 2) -> bytes:
    """The bytes that `write_json` writes."""
    text = json.dumps(without_nan(content), indent=indent, sort_keys=sort_keys, ensure_ascii=False)
    return f"{text}\n".encode()


def write_sealed_json(path: Path, content: Mapping[str, Any], *, sort_keys: bool = True) -> None:
    """Write a JSON object with a checksum of itself, whole or not at all; `read_json` checks it."""
    write_bytes(path, sealed_text(content, sort_keys=sort_keys))


def sealed_text(content: Mapping[str, Any], *, sort_keys: bool = True, indent: int | None = 2) -> bytes:
    """The bytes that `write_sealed_json` writes.

    The field SEAL is the SHA-256 of these bytes with zeros in place of its own 64 digits, so that every changed byte is
    found, and anybody can compute it without this program.
    """
    return seal(json_text({**content, SEAL: BLANK}, sort_keys=sort_keys, indent=indent))


def seal(blank: bytes, colon: bytes = b": ") -> bytes:
    """Put into bytes that hold SEAL with zeros their checksum. colon: what stands between name and digits."""
    return blank.replace(_field(BLANK, colon), _field(hashlib.sha256(blank).hexdigest(), colon), 1)


def check_seal(data: bytes, digits: Any, colon: bytes = b": ") -> None:
    """Raise ValueError unless the bytes are those that `seal` returned. digits: what they name SEAL."""
    field = _field(digits, colon) if isinstance(digits, str) and digits else b""
    if not field or hashlib.sha256(data.replace(field, _field(BLANK, colon), 1)).hexdigest() != digits:
        raise ValueError(f"its bytes do not have the checksum {SEAL} that it was written with")


def _field(digits: str, colon: bytes) -> bytes:
    return f'"{SEAL}"'.encode() + colon + f'"{digits}"'.encode()


def parse_json(data: bytes, sealed: bool = False) -> dict[str, Any]:
    """Parse a JSON object and take off its seal, which is checked where there is one.

    sealed: whether a missing seal is damage too. Raises ValueError, and nothing else, for whatever is wrong.
    """
    content = documents.parse_json(data)
    if not isinstance(content, dict):
        raise ValueError(f"found {type(content).__name__}, expected an object")
    digits = content.pop(SEAL, None)
    if digits is not None or sealed:
        check_seal(data, digits)
    return content


def without_nan(content: Any) -> Any:
    """Plain data with None for NaN, which JSON cannot express."""
    if isinstance(content, float):
        return None if math.isnan(content) else content
    if isinstance(content, Mapping):
        return {name: without_nan(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    return content


def read_json(path: Path, *, sealed: bool = False) -> dict[str, Any]:
    """Read a JSON object, without its seal; raises VerificationError naming the file when it is missing or damaged.

    A seal is checked wherever there is one. sealed: whether a missing seal is damage too.
    """
    try:
        return parse_json(remote.get(path) if is_remote(path) else documents.read_document(path), sealed)
    except FileNotFoundError:
        raise MissingFileError(f"{path} is missing: {repair_of(path)}") from None
    except ValueError as error:
        raise VerificationError(f"{path} is damaged ({error}): {repair_of(path)}") from None


class MissingFileError(VerificationError):
    """A file that was to be read is not there."""


def readable_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or return an empty one when the file is missing, damaged or not readable."""
    try:
        return read_json(path)
    except UserError:
        return {}
    except OSError:
        if is_remote(path):  # the store did not answer, which tells nothing of the file
            raise
        return {}


def read_record(path: Path) -> dict[str, Any]:
    """Read a manifest or marker: sealed from format version 2 on; before, neither a version nor a seal is needed.

    Raises VerificationError naming the file when it is missing or damaged.
    """
    try:
        return read_json(path, sealed=True)
    except UserError:
        content = read_json(path)
        if content.get("format_version", 1) == RECORD_VERSION:
            raise
    return content


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write a manifest or marker, sealed and of the present format version; `read_record` reads it."""
    write_sealed_json(path, {**content, "format_version": RECORD_VERSION})


def repair_of(place: Path | str) -> str:
    """Advise the command that repairs the build which a file belongs to, as far as its path tells the build."""
    paths = [place, *place.parents] if isinstance(place, Path) else []
    builds = [
        path.parent
        for path in paths
        # Shards may have been copied away from their build.
        if path.name in OF_BUILDS or (path.name == "shards" and (path.parent / "ledger").is_dir())
    ]
    return f"run `hierarchy-builder repair {builds[-1]}`" if builds else REPAIR_UNNAMED


@contextmanager
def decoding(place: Path | str, advice: str | None = None) -> Iterator[None]:
    """Turn whatever a decoder says of damaged bytes into one VerificationError that names the file.

    place: the file, or the beginning of a sentence about what is read, such as `FILE: rows are`.
    A missing file counts as damaged; other errors of the operating system tell nothing of the bytes and pass.
    """
    what = place if isinstance(place, str) else f"{place} is"
    advice = advice or repair_of(place)
    if isinstance(place, Path):
        require_regular(place)
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            raise VerificationError(f"{what} missing: {advice}") from None
        if told := store_error(error):
            raise told from error
        if error.errno not in (None, errno.EINVAL):  # a decoder that seeks beyond the file gets EINVAL
            raise
        raise VerificationError(f"{what} damaged ({error}): {advice}") from None
    except Exception as error:  # each decoder raises what its bytes lead it to
        if told := store_error(error):
            raise told from error
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        raise VerificationError(f"{what} damaged ({reason}): {advice}") from None


def sha256_file(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_regular(path: Path) -> None:
    """Raise VerificationError for a pipe or a device, reading which may never end."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise VerificationError(f"{path} is no regular file: remove it, then {repair_of(path)}")


@contextmanager
def fetched(path: Path) -> Iterator[BinaryIO]:
    """A file open for reading it more than once; an object is first copied to the temporary folder, in one go.

    Raises VerificationError for a pipe or a device, which would never end.
    """
    if not is_remote(path):
        require_regular(path)
        with path.open("rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as copy:
        with path.open("rb") as source:
            shutil.copyfileobj(source, copy, remote.PART_BYTES)
        copy.seek(0)
        yield copy


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; 0 when it does not exist."""
    if is_remote(path):
        return sum(remote.files_below(path).values())
    if path.is_file():
        return path.stat().st_size
    return _bytes_below(path) if path.is_dir() else 0


def _bytes_below(folder: Path | str) -> int:
    with os.scandir(folder) as entries:
        return sum(
            _bytes_below(entry.path) if entry.is_dir(follow_symlinks=False) else entry.stat().st_size
            for entry in entries
            if entry.is_file() or entry.is_dir(follow_symlinks=False)
        )


def sizes_in(folder: Path) -> dict[str, int]:
    """Bytes of the files directly in a folder, by name; at a URL from one listing."""
    if is_remote(folder):
        found = remote.files_below(folder).items()
        return {path.name: size for path, size in found if path.parent == folder}
    if not folder.is_dir():
        return {}
    return {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()}


def is_there(path: Path) -> bool:
    """Whether anything has this name, also a link that leads nowhere."""
    return path.exists() if is_remote(path) else os.path.lexists(path)


def move(source: Path, target: Path) -> None:
    """Give a file or folder another name. At a URL all is there under both names until the last is removed.

    Objects are copied in the order of their names and removed in the other, so the last one tells whether all is there.
    """
    if is_remote(source):
        remote.move(source, target)
    else:
        os.replace(source, target)
