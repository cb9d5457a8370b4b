"""Reads the bytes of one image: from regular files only, up to a number of bytes, within a time, with another try.

What goes wrong with one image is an ImageError, which becomes the outcome of its row. An object store that does not
answer, or that refuses whatever is asked, is a StoreError, which ends the command.
"""

from __future__ import annotations

import os
import queue
import stat
import threading
import time
from collections.abc import Callable

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from hierarchy_builder.errors import ImageError
from hierarchy_builder.files.remote import of_all_objects, whole, without_secrets

MAX_BYTES = 2**30
"""Largest file that is read, in bytes."""
TIMEOUT_S = 60.0
"""Seconds after which one try to read a file is given up."""
PAUSES_S = (0.5, 2.0)
"""Seconds before the second and before the third try."""
NOT_AGAIN = range(400, 500)
"""Answers of a web server that another try does not change, except those in BUSY."""
BUSY = (408, 425, 429)


def read_file(fs: AbstractFileSystem, place: str, start: int = 0, size: int | None = None) -> bytes:
    """Return the bytes of a file, or `size` bytes of it from `start` on.

    Raises ImageError with reason `missing`, `not_a_file` (a folder, device or pipe), `too_large`, `timeout` or
    `unreadable`. An error that may pass is tried again. Raises StoreError for an object store that fails as a whole.
    """
    read = _local if isinstance(fs, LocalFileSystem) else _remote
    for pause in (*PAUSES_S, None):
        try:
            return _within(TIMEOUT_S, lambda: read(fs, place, start, size))
        except ImageError:
            raise
        except FileNotFoundError:
            raise ImageError("missing", "the file no longer exists") from None
        except MemoryError:
            raise ImageError("too_large", "reading it needs more memory than there is") from None
        except Exception as error:  # every file system has its own exceptions
            if pause is None or not _may_pass(error):
                if told := of_all_objects(fs, error):
                    raise told from error
                tries = "" if pause is not None else f" ({1 + len(PAUSES_S)} tries)"
                raise ImageError("unreadable", f"{_text_of(error)}{tries}") from None
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _local(fs: AbstractFileSystem, place: str, start: int, size: int | None) -> bytes:
    # Without O_NONBLOCK, opening a named pipe would wait for somebody to write into it.
    descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ImageError("not_a_file", f"found {_kind(status.st_mode)}, expected a regular file")
    with open(descriptor, "rb") as file:
        _check_size(status.st_size if size is None else size)
        file.seek(start)
        return _limited(file.read(MAX_BYTES + 1 if size is None else size))


def _remote(fs: AbstractFileSystem, place: str, start: int, size: int | None) -> bytes:
    if size is not None:
        _check_size(size)
        return fs.cat_file(place, start=start, end=start + size) if size else b""
    if "http" in fs.protocol:  # a web server may send without end; its class cannot be named without aiohttp
        with fs.open(place, "rb", block_size=0, size=1) as file:
            return _limited(file.read(MAX_BYTES + 1))
    return _limited(whole(fs, place))


def _limited(data: bytes) -> bytes:
    _check_size(len(data))
    return data


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_BYTES:
        raise ImageError("too_large", f"more than {MAX_BYTES:,} bytes")


def _within(seconds: float, read: Callable[[], bytes]) -> bytes:
    """The result of `read`, or ImageError `timeout`; a read that hangs stays behind in a thread that ends with us."""
    ended: queue.SimpleQueue[bytes | BaseException] = queue.SimpleQueue()

    def run() -> None:
        try:
            ended.put(read())
        except BaseException as error:
            ended.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        result = ended.get(timeout=seconds)
    except queue.Empty:
        raise ImageError("timeout", f"reading it took more than {seconds:g} s") from None
    if isinstance(result, BaseException):
        raise result
    return result


def _may_pass(error: Exception) -> bool:
    answer = getattr(error, "status", None)  # of a web server
    if isinstance(answer, int):
        return answer in BUSY or answer not in NOT_AGAIN
    never = (PermissionError, IsADirectoryError, NotADirectoryError, ValueError, ImportError, TypeError)
    return not isinstance(error, never)


def _text_of(error: Exception) -> str:
    answer = getattr(error, "status", None)
    if isinstance(answer, int):
        return f"the server answers {answer} {getattr(error, 'message', '')}".rstrip()
    strerror = getattr(error, "strerror", None)
    return without_secrets(str(strerror or error or type(error).__name__))


def _kind(mode: int) -> str:
    kinds = {"d": "a folder", "p": "a named pipe", "c": "a device", "b": "a device", "s": "a socket"}
    return kinds.get(stat.filemode(mode)[0], "something else")
