"""Files at URLs: an object is whole or absent, it is made by one request or not at all, and nothing is renamed.

A place at a URL is a `UPath` of universal-pathlib, which has the methods of `pathlib.Path`, so most code knows neither
which of the two it holds. What an object store does in another way than a disk is here, and `files.py` chooses.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from hierarchy_builder.errors import InterruptedRunError, UsageError
from hierarchy_builder.installing import install_extras

CLIENTS = {
    "s3": ("s3fs", "remote"),
    "s3a": ("s3fs", "remote"),
    "gs": ("gcsfs", "gcs"),
    "gcs": ("gcsfs", "gcs"),
    "az": ("adlfs", "azure"),
    "abfs": ("adlfs", "azure"),
    "abfss": ("adlfs", "azure"),
    "memory": ("fsspec", "remote"),
}
"""Package of each scheme that artefacts may be written to, and the extra of this project that installs it."""

PART_BYTES = 16 * 2**20
"""Bytes of a part of a multipart upload; object stores take 10,000 parts, so a file may have 160 GB."""

LIBRARIES = (
    "botocore",
    "aiobotocore",
    "aiohttp",
    "fsspec",
    "gcsfs",
    "google",
    "azure",
    "requests",
    "urllib3",
)
"""Packages whose errors tell of an object store or of the way to it."""

PASSING = {errno.EBUSY, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.EPIPE, errno.EAGAIN}
PASSING |= {errno.ENETUNREACH, errno.EHOSTUNREACH, getattr(errno, "EREMOTEIO", errno.EIO)}
"""Error numbers of a store that may be gone when the same command is given again."""

WORDS = {
    "ExpiredToken": ("the credentials have expired: renew them", True),
    "TokenRefreshRequired": ("the credentials have expired: renew them", True),
    "RequestTimeTooSkewed": ("the clock of this machine differs from that of the store: set it", False),
    "NoCredentials": ("this machine has no credentials: set them in the environment or a profile", False),
    "InvalidAccessKeyId": ("the store does not know these credentials: check them", False),
    "SignatureDoesNotMatch": ("the store does not accept these credentials: check them", False),
    "NoSuchBucket": ("there is no such bucket: create it, or correct the URL", False),
    "PermanentRedirect": ("the bucket lies in another region: set AWS_DEFAULT_REGION to it", False),
    "AuthorizationHeaderMalformed": (
        "the bucket lies in another region: set AWS_DEFAULT_REGION to it",
        False,
    ),
    "IllegalLocationConstraint": ("the bucket lies in another region: set AWS_DEFAULT_REGION to it", False),
    "AccessDenied": ("these credentials have no permission for that: grant it", False),
    "Forbidden": ("these credentials have no permission for that: grant it", False),
    "403": ("these credentials have no permission for that, or have expired: grant it or renew them", False),
}
"""What a store means by the code of an error, with the next step, and whether the same command then continues."""


class StoreError(OSError):
    """A store did not do what was asked; the message holds the next step. `exit_code` tells whether to try again."""

    exit_code = 1


class StoreRetryError(StoreError):
    """The same command continues later. Exit code 75."""

    exit_code = InterruptedRunError.exit_code


def is_remote(path: Path) -> bool:
    """Whether a place is at a URL."""
    return not isinstance(path, Path)


def remote_place(url: str) -> Path:
    """The place at a URL. Raises UsageError for an unknown scheme and where the package of a known one is missing."""
    scheme, _, rest = url.partition("://")
    if scheme == "file":
        return Path(rest)
    if scheme not in CLIENTS:
        raise UsageError(
            f"{url}: nothing can be written at {scheme}://, expected a path or a URL that begins with "
            f"{', '.join(f'{name}://' for name in ('s3', 'gs', 'az', 'memory', 'file'))}"
        )
    if not rest.strip("/"):
        raise UsageError(f"{url} names no folder, expected for example {scheme}://bucket/folder")
    package, extra = CLIENTS[scheme]
    try:
        importlib.import_module(package)
        from upath import UPath
    except ImportError as error:
        raise UsageError(
            f"{url}: {error.name or package} is not installed: {install_extras(extra)}"
        ) from None
    return cast(Path, UPath(url.rstrip("/"), **options()))


def options() -> dict[str, Any]:
    """Options of every file system: listings are not kept, since other machines write there too."""
    return {"use_listings_cache": False, "skip_instance_cache": False}


def put(path: Path, data: bytes) -> None:
    """Write an object with one request."""
    _fs(path).pipe_file(_key(path), data)


def get(path: Path) -> bytes:
    """Read an object with one request. Raises FileNotFoundError where there is none."""
    fs = _fs(path)
    # s3fs would ask for the size first, to read large objects in parts at once
    at_once = {"max_concurrency": 1} if "s3" in fs.protocol else {}
    return cast(bytes, fs.cat_file(_key(path), **at_once))


def create(path: Path, data: bytes) -> bool:
    """Write an object if there is none, in one conditional request; returns whether it was written."""
    try:
        _fs(path).pipe_file(_key(path), data, mode="create")
    except FileExistsError:
        return False
    return True


@contextlib.contextmanager
def upload(path: Path) -> Iterator[BinaryIO]:
    """A file open for writing, sent part by part; the object appears when the block ends without an exception."""
    file = _fs(path).open(_key(path), "wb", block_size=PART_BYTES, autocommit=False)
    try:
        yield cast(BinaryIO, file)
        file.close()
        file.commit()
    except BaseException:
        file.closed = True  # nothing more is sent, also where the object is collected later
        with contextlib.suppress(Exception):  # parts that stay behind are what a lifecycle rule removes
            file.discard()
        raise


def files_below(path: Path) -> dict[Path, int]:
    """All objects below a place and their sizes, or the object itself, in the order of names."""
    root = _key(path).rstrip("/")
    found = _fs(path).find(root, detail=True)
    names = {name: int(entry["size"] or 0) for name, entry in sorted(found.items())}
    return {path / name[len(root) + 1 :] if name != root else path: size for name, size in names.items()}


def remove(paths: Iterable[Path]) -> None:
    """Remove objects; those that are not there count as removed."""
    paths = list(paths)
    for start in range(0, len(paths), 1000):
        some = paths[start : start + 1000]
        try:
            _fs(some[0]).rm([_key(path) for path in some])
        except FileNotFoundError:
            for path in some:
                path.unlink(missing_ok=True)


def move(source: Path, target: Path) -> None:
    """Copy an object, or all below a place, inside its store; then remove the originals, the last name first."""
    files = list(files_below(source))
    for path in files:
        _fs(path).copy(_key(path), _key(target / path.relative_to(source) if path != source else target))
    remove(files[-1:])
    remove(files[:-1])


def send(local: Path, target: Path) -> None:
    """Copy a local file to an object, which appears when it is whole."""
    _fs(target).put_file(str(local), _key(target))


def modified(path: Path) -> float:
    """When an object was written, in seconds since 1970, by the clock of the store."""
    return cast(float, _fs(path).modified(_key(path)).timestamp())


def store_error(error: BaseException) -> StoreError | None:
    """What an exception tells of an object store, in one line with the next step; None where it tells of none.

    An error of the file system is one of a store if a library of stores raised it or caused it.
    """
    if isinstance(error, StoreError):
        return error
    chain = list[BaseException]()
    each: BaseException | None = error
    while each is not None and each not in chain:
        chain.append(each)
        each = each.__cause__ or each.__context__
    told = [one for one in chain if type(one).__module__.partition(".")[0] in LIBRARIES]
    if not told:
        return None
    code = _code(told[-1])
    text = next((str(one) for one in chain if str(one)), type(error).__name__).partition("\n")[0]
    if code in WORDS:
        advice, passes = WORDS[code]
        kind = StoreRetryError if passes else StoreError
        more = "; then the same command continues" if passes else ""
        return kind(f"{text} ({code}): {advice}{more}")
    numbers = {getattr(one, "errno", None) for one in chain}
    status = getattr(told[-1], "response", None)
    status = status.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(status, dict) else None
    passes = bool(numbers & PASSING) or status is None or status >= 500 or status == 429
    kind = StoreRetryError if passes else StoreError
    advice = "the same command continues" if passes else "check URL, network and permissions"
    return kind(f"{text}{f' ({code})' if code and code not in text else ''}; {advice}")


def _code(error: BaseException) -> str:
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code", ""))
    return type(error).__name__.removesuffix("Error")


def _fs(path: Path) -> Any:
    return cast(Any, path).fs


def _key(path: Path) -> str:
    return str(cast(Any, path).path)
