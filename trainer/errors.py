"""What can go wrong while training, sampling and looking, each with its exit code on the command line."""

import errno


class TrainerError(Exception):
    """Any failure a user can cause or cure. Exit code 1."""

    exit_code = 1


class UsageError(TrainerError):
    """A flag, configuration field, label or seed is not understood. Exit code 2."""

    exit_code = 2


class MismatchError(TrainerError):
    """Checkpoint, shards or configuration do not belong together. Exit code 5."""

    exit_code = 5


class DamagedShardError(TrainerError):
    """A shard is missing, truncated or corrupt; a run may be told to go on without a few of them."""


class InterruptedRunError(TrainerError):
    """Training was stopped by a signal or the wall clock after a checkpoint; the same command resumes. 75."""

    exit_code = 75


class NonFiniteLossError(TrainerError):
    """The loss or a gradient became NaN or infinite; the message names step, seed and sample keys."""


ADVICE = {
    errno.EEXIST: "expected a folder there; choose another",
    errno.ENOTDIR: "expected a folder there; choose another",
    errno.EISDIR: "expected a file there; choose another",
    errno.EACCES: "choose another place, or let this user read and write there",
    errno.EPERM: "choose another place, or let this user read and write there",
    errno.EROFS: "choose another place",
    errno.ENOENT: "look for a slip in the path",
    errno.ENOSPC: "make room, then give the same command again",
    errno.EDQUOT: "make room, then give the same command again",
    errno.EFBIG: "make room, then give the same command again",
}
"""What to do about what the system says."""


def explained(error: OSError) -> str:
    """An error of the system as a message: where, what, and what to do."""
    where = error.filename2 or error.filename
    if where is None or error.errno is None:
        return str(error)
    advice = ADVICE.get(error.errno)
    return f"{where}: {error.strerror}" + (f"; {advice}" if advice else "")
