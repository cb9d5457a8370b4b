"""Files at URLs: an object is whole or absent, it is made by one request or not at all, and nothing is renamed.

A place at a URL is a `UPath` of universal-pathlib, which has the methods of `pathlib.Path`, so most code knows neither
which of the two it holds. What an object store does in another way than a disk is here, and `files.py` chooses.
"""

from __future__ import annotations

import contextlib
import errno
import io
import re
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, cast

from hierarchy_builder.errors import InterruptedRunError, UserError

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

OPTIONS: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": False}
"""Options of every file system: listings are not kept, since other machines write there too."""

PART_BYTES = 16 * 2**20
"""Bytes of a part of a multipart upload; object stores take 10,000 parts, so a file may have 160 GB."""

LIBRARIES = (
    *("botocore", "aiobotocore", "aiohttp", "fsspec", "gcsfs", "google.auth", "google.api_core", "azure"),
    *("requests", "urllib3"),
)
"""Packages whose errors tell of an object store or of the way to it."""

RAISES_PLAIN = ("s3fs", "gcsfs", "adlfs")
"""Packages that also raise an OSError without a number for what a store answered."""

ON_THE_WAY = (
    *("Connect", "Timeout", "Transport", "Payload", "Streaming", "IncompleteRead", "Disconnected"),
    *("ServiceRequest", "ServiceResponse"),
)
"""Parts of the names of errors that tell of the way to a store, which may be there again later."""

MOST_KEPT = 64 * 2**20
"""Bytes of objects that are kept inside `keeping`."""
_KEPT, _KEEPING = dict[str, bytes](), list[bool]()

AT_ONCE = 16
"""Requests for objects that are made at once."""

PASSING = {errno.EBUSY, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.EPIPE, errno.EAGAIN}
PASSING |= {errno.ENETUNREACH, errno.EHOSTUNREACH, getattr(errno, "EREMOTEIO", errno.EIO)}
"""Error numbers of a store that may be gone when the same command is given again."""

WORDS = {
    "ExpiredToken": ("the credentials have expired: renew them", True),
    "TokenRefreshRequired": ("the credentials have expired: renew them", True),
    "RequestTimeTooSkewed": ("the clock of this machine differs from that of the store: set it", False),
    "RequestTimeout": ("the store waited too long for this machine", True),
    "NoCredentials": ("this machine has no credentials: set them in the environment or a profile", False),
    "InvalidToken": ("the store does not know these credentials: check them", False),
    "InvalidAccessKeyId": ("the store does not know these credentials: check them", False),
    "SignatureDoesNotMatch": ("the store does not accept these credentials: check them", False),
    "NoSuchBucket": ("there is no such bucket: create it, or correct the URL", False),
    **dict.fromkeys(
        (
            *("PermanentRedirect", "301", "AuthorizationHeaderMalformed"),
            *("IllegalLocationConstraint", "IllegalLocationConstraintException"),
        ),
        ("the bucket lies in another region: set AWS_DEFAULT_REGION to it", False),
    ),
    "AccessDenied": ("these credentials have no permission for that: grant it", False),
    "Forbidden": ("these credentials have no permission for that: grant it", False),
    "403": (
        "these credentials have no permission for that or have expired, or the clock of this machine is wrong: grant "
        "it, renew them, or set it",
        False,
    ),
    "400": (
        "the store refused the request, as it does when credentials have expired or the bucket lies in another "
        "region: renew them, or set AWS_DEFAULT_REGION",
        True,
    ),
}
"""What a store means by the code of an error, with the next step, and whether the same command then continues.

The answer to a question for an object without its content has no other code than the number of its status.
"""

OF_ALL = {
    "NoCredentials",
    "InvalidToken",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "RequestTimeTooSkewed",
}
"""Codes of what is wrong with every request of this machine, whatever it asks for."""

PASSING_CODES = {"SlowDown", "InternalError", "ServiceUnavailable", "ServerBusy", "OperationTimedOut"}
"""Codes of a store that is overloaded."""


SECRETS = re.compile(
    r"(?<=://)[^\s/@]*@|(?<=[?&])(?:X-Amz-\w+|AWSAccessKeyId|Signature|sig|token)=[^\s&'\"]*&?", re.I
)
"""Parts of URLs that let their reader in: user and password, and signatures."""


class StoreError(OSError):
    """A store did not do what was asked; the message holds the next step. `exit_code` tells whether to try again."""

    exit_code = 1
    code = ""
    """What the store calls it, if it is known."""
    place = ""
    """URL of what was asked for, without secrets, which the message has; empty where it is not known."""


class StoreRetryError(StoreError):
    """The same command continues later. Exit code 75."""

    exit_code = InterruptedRunError.exit_code


def without_secrets(text: str) -> str:
    """A text without the passwords and signatures in its URLs."""
    return SECRETS.sub("", text)


def is_remote(path: Path) -> bool:
    """Whether a place is at a URL."""
    return not isinstance(path, Path)


def put(path: Path, data: bytes) -> None:
    """Write an object with one request."""
    _fs(path).pipe_file(_key(path), data)


def get(path: Path) -> bytes:
    """Read an object with one request. Raises FileNotFoundError where there is none."""
    if (kept := _KEPT.get(str(path))) is not None:
        return kept
    data = whole(_fs(path), _key(path))
    if _KEEPING and len(data) + sum(map(len, _KEPT.values())) <= MOST_KEPT:
        _KEPT[str(path)] = data
    return data


def whole(fs: Any, key: str) -> bytes:
    """What `get` does, for any file system of fsspec."""
    # s3fs would ask for the size first, to read large objects in parts at once
    at_once = {"max_concurrency": 1} if "s3" in fs.protocol else {}
    return cast(bytes, fs.cat_file(key, **at_once))


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """Let `get` fetch an object once inside the block, for a command that changes nothing and reads markers often."""
    _KEEPING.append(True)
    try:
        yield
    finally:
        _KEEPING.pop()
        _KEPT.clear()


def create(path: Path, data: bytes) -> None:
    """Write an object if there is none, in one conditional request. Read what is there to know whose it is.

    The answer to a request that wrote it may have been lost, and the repeated one is then refused.
    """
    try:
        _fs(path).pipe_file(_key(path), data, mode="create")
    except FileExistsError:
        pass
    except OSError as error:  # 409: another request for the same object came in between
        if store_error(error) is None or all(_status(one) != 409 for one in _chain(error)):
            raise


def upload(path: Path) -> AbstractContextManager[BinaryIO]:
    """A file open for writing, sent part by part; the object appears when the block ends without an exception."""
    return upload_to(_fs(path), _key(path))


@contextlib.contextmanager
def upload_to(fs: Any, key: str) -> Iterator[BinaryIO]:
    """What `upload` does, for any file system of fsspec."""
    if "memory" in fs.protocol:  # it would show the object from its first byte on
        yield (collected := io.BytesIO())
        fs.pipe_file(key, collected.getvalue())
        return
    file = fs.open(key, "wb", block_size=PART_BYTES, autocommit=False)
    try:
        yield cast(BinaryIO, file)
        file.close()
        file.commit()
    except BaseException:
        file.closed = True  # nothing more is sent, also where the object is collected later
        with contextlib.suppress(Exception):  # parts that stay behind are what a lifecycle rule removes
            file.discard()
        raise


def info(path: Path) -> dict[str, Any] | None:
    """What the store tells of an object or of a name that objects lie below; None where there is neither."""
    try:
        return cast(dict[str, Any], _fs(path).info(_key(path)))
    except (FileNotFoundError, NotADirectoryError):
        return None


def files_below(path: Path) -> dict[Path, int]:
    """All objects below a place and their sizes, or the object itself, in the order of names.

    Raises UserError for a name that would lead out of a folder which the objects are copied to.
    """
    root, fs = _key(path).rstrip("/"), _fs(path)
    found = fs.find(root, detail=True)
    if not isinstance(found, dict):  # adlfs gives a list where the place is an object
        found = {name: fs.info(name) for name in found}
    sizes = {
        name: int(entry["size"] or 0) for name, entry in sorted(found.items()) if entry["type"] == "file"
    }
    if leading := [name for name in sizes if ".." in name[len(root) :].split("/")]:
        raise UserError(
            f"{path} holds an object named {leading[0]!r}, and `..` leads out of its folder: remove the object, or "
            "choose another place"
        )
    return {path / name[len(root) + 1 :] if name != root else path: size for name, size in sizes.items()}


def remove(paths: Iterable[Path]) -> None:
    """Remove objects of one bucket; those that are not there count as removed. Names are taken literally.

    Raises StoreError if the store keeps one of them.
    """
    paths = list(paths)
    if not paths:
        return
    fs = _fs(paths[0])
    if "s3" not in fs.protocol:
        with ThreadPoolExecutor(min(AT_ONCE, len(paths))) as pool:
            list(pool.map(_remove, paths))
        return
    keys = [fs.split_path(_key(path))[:2] for path in paths]
    for start in range(0, len(keys), 1000):
        some = [{"Key": key} for _, key in keys[start : start + 1000]]
        answer = fs.call_s3("delete_objects", Bucket=keys[0][0], Delete={"Objects": some, "Quiet": True})
        for refused in answer.get("Errors", [])[:1]:  # the answer as a whole is a success
            text = f"not removed: {refused.get('Message', '')}"
            place = f"s3://{keys[0][0]}/{refused.get('Key', '')}"
            raise _told(text, str(refused.get("Code", "")), place=place)


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        _fs(path).rm_file(_key(path))


def move(source: Path, target: Path) -> None:
    """Copy an object, or all below a place, inside its store; then remove the originals, the last name first."""
    files = list(files_below(source))
    for path in files:
        _fs(path).cp_file(_key(path), _key(target / path.relative_to(source) if path != source else target))
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
    if isinstance(error, UserError):  # it says itself what is to be done
        return None
    chain = _chain(error)
    told = [one for one in chain if _is_of_store(one)]
    if not told:
        return None
    text = next((str(one) for one in chain if str(one)), type(error).__name__).partition("\n")[0]
    code, status = _code(told[-1]), _status(told[-1])
    if code not in WORDS and str(status) in WORDS and code not in PASSING_CODES:
        code = str(status)
    passes = any(getattr(one, "errno", None) in PASSING for one in chain)
    if status is None:
        passes |= any(map(_is_on_the_way, chain))
    else:
        passes |= status >= 500 or status == 429
    return _told(text, code, passes=passes, place=next(filter(None, map(_asked_for, chain)), ""))


def of_all_objects(fs: Any, error: BaseException) -> StoreError | None:
    """What an exception tells of the store as a whole, and not of the one object that was read; None for others.

    The files of a web server, or of servers, are left out: one that does not answer tells nothing of others.
    """
    if not CLIENTS.keys() & set([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol):
        return None
    told = store_error(error)
    return told if isinstance(told, StoreRetryError) or (told and told.code in OF_ALL) else None


def _told(text: str, code: str, *, place: str, passes: bool = False) -> StoreError:
    """The error of a store with the next step. place: what was asked for; passes: whether it may, whatever the code."""
    passes |= code in PASSING_CODES
    if code in WORDS:
        advice, passes = WORDS[code]
        advice = f": {advice}{'; then the same command continues' if passes else ''}"
    else:
        advice = f"; {'the same command continues' if passes else 'check URL, network and permissions'}"
    kind = StoreRetryError if passes else StoreError
    place, text = without_secrets(place), without_secrets(text)
    if place not in text:
        text = f"{place}: {text}"
    told = kind(f"{text}{f' ({code})' if code and (code in WORDS or code not in text) else ''}{advice}")
    told.code, told.place = code, place
    return told


def _asked_for(error: BaseException) -> str:
    """The URL that a file system was asked for when it failed, from its calls; libraries of stores do not tell it."""
    from fsspec import AbstractFileSystem

    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        names = frame.f_locals
        fs, path = names.get("self"), names.get("path", names.get("rpath"))
        if not isinstance(fs, AbstractFileSystem):  # perhaps an open file
            fs, path = getattr(fs, "fs", None), getattr(fs, "path", None)
        if isinstance(fs, AbstractFileSystem) and isinstance(path, str):
            found = str(fs.unstrip_protocol(path))
    return found


def _chain(error: BaseException) -> list[BaseException]:
    """An exception and what caused it."""
    chain = list[BaseException]()
    each: BaseException | None = error
    while each is not None and each not in chain:
        chain.append(each)
        each = each.__cause__ or each.__context__
    return chain


def _is_of_store(error: BaseException) -> bool:
    """Whether a library of stores made an exception, or raised an OSError of Python that has no number."""
    kind = f"{type(error).__module__}."
    if any(kind.startswith(f"{library}.") for library in LIBRARIES):
        return True
    if not isinstance(error, OSError) or error.errno is not None:
        return False
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].partition(".")[0] in RAISES_PLAIN


def _is_on_the_way(error: BaseException) -> bool:
    """Whether an exception tells of the connection, and not of what was asked."""
    names = (each.__name__ for each in type(error).__mro__)
    return any(part in name for name in names for part in ON_THE_WAY)


def _code(error: BaseException) -> str:
    """What the store calls an error; the name of the exception where it calls it nothing."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code", ""))
    told = getattr(error, "error_code", None) or getattr(error, "code", None)
    if isinstance(told, str | int):
        return str(getattr(told, "value", told))
    head, colon, _ = str(error).partition(":")  # gcsfs writes `Forbidden: what`
    return head if type(error) is OSError and colon else type(error).__name__.removesuffix("Error")


def _status(error: BaseException) -> int | None:
    """The number of the status of an answer over HTTP, if the exception tells of one."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return cast(int | None, response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    for name in ("status_code", "status", "code"):
        number = str(getattr(error, name, None))
        if number.isdecimal():
            return int(number)
    return None


def _fs(path: Path) -> Any:
    return cast(Any, path).fs


def _key(path: Path) -> str:
    return str(cast(Any, path).path)
