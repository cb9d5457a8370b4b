"""What can go wrong, each with the exit code that the command lines of both packages return for it.

A message says what was found, what was expected, where, and the next step. The exit code tells a scheduler whether
repeating the same command can help.
"""

import errno
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")


class UserError(Exception):
    """Any failure that a user can cause or cure. Exit code 1."""

    exit_code = 1


BuilderError = UserError
"""The name by which hierarchy_builder raises and catches it."""
TrainerError = UserError
"""The name by which trainer raises and catches it."""


class UsageError(UserError):
    """A flag, configuration field, label, seed or argument is not understood. Exit code 2."""

    exit_code = 2


class TooManySkippedError(UserError):
    """More images were skipped than `max_bad_fraction` allows. Exit code 3."""

    exit_code = 3


class VerificationError(UserError):
    """A finished artefact does not hold what its manifest promises. Exit code 4."""

    exit_code = 4


class MismatchError(UserError):
    """Configuration, weights, checkpoint or input differ from what the output was made with. Exit code 5."""

    exit_code = 5


ConfigMismatchError = MismatchError
"""The name by which hierarchy_builder raises and catches it."""


class InterruptedRunError(BaseException):
    """The run was asked to stop, and the same command continues it. Exit code 75 (EX_TEMPFAIL).

    Like KeyboardInterrupt it is no Exception, since code that handles failures must not catch it.
    """

    exit_code = 75


class ImageError(UserError):
    """One image cannot be used; `reason` is the short word stored in index.parquet."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class DamagedShardError(UserError):
    """A shard is missing, truncated or corrupt; a run may be allowed to continue without a few of them."""


class NonFiniteLossError(UserError):
    """The loss or a gradient became NaN or infinite; the message names step, seed and sample keys."""


def or_none(read: Callable[..., ResultT], *given: Any) -> ResultT | None:
    """What a call returns, or None where it raises UserError."""
    try:
        return read(*given)
    except UserError:
        return None


ADVICE = {
    errno.EEXIST: "expected a folder there; choose another",
    errno.ENOTDIR: "expected a folder there; choose another",
    errno.EISDIR: "expected a file there; choose another",
    errno.EACCES: "choose another place, or let this user read and write there",
    errno.EPERM: "choose another place, or let this user read and write there",
    errno.EROFS: "choose another place",
    errno.ENOENT: "check the path for a mistake",
    errno.ENOSPC: "make room, then give the same command again",
    errno.EDQUOT: "make room, then give the same command again",
    errno.EFBIG: "make room, then give the same command again",
}
"""The next step after an error of the operating system."""


FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk without room; those of a write do not say which file it was."""
LITTLE_BYTES = 2**20


def some(names: Sequence[str], most: int = 5) -> str:
    """`a, b and 1,204 more`: the first names, at most so many, and the number of the others."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def given_words() -> list[str]:
    """The arguments of the command line, and the values of the options in it."""
    words = (word.partition("=")[2] if word.startswith("--") else word for word in sys.argv[1:])
    return list(filter(None, words))


def full_places(error: OSError) -> str | None:
    """The places among those on the command line, and the temporary folder, whose disk is full; None if unknown."""
    if error.errno not in FULL:
        return None
    found = []
    for place in [*given_words(), tempfile.gettempdir()]:
        folder = os.path.abspath(os.path.expanduser(place))
        while not os.path.exists(folder):
            folder = os.path.dirname(folder)
        status = os.statvfs(folder)
        if status.f_bavail * status.f_frsize < LITTLE_BYTES or (not status.f_favail and status.f_files):
            found.append(place)
    return ", ".join(dict.fromkeys(found)) or None


def explained(error: OSError) -> str:
    """The message for an error of the operating system: where it happened, what it is, and the next step."""
    where = error.filename2 or error.filename or full_places(error)
    advice = ADVICE.get(error.errno or 0)
    what = str(error) if where is None else f"{where}: {error.strerror}"
    return what + (f"; {advice}" if advice else "")
