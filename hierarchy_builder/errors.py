"""What can go wrong while hierarchies are built, each with the exit code the command line returns for it.

A message says what was found, what was expected, where, and the next step; the exit code says to a
scheduler whether repeating the same command can help.
"""


class BuilderError(Exception):
    """Any failure a user can cause or cure. Exit code 1."""

    exit_code = 1


class UsageError(BuilderError):
    """A flag, configuration field or argument is not understood. Exit code 2."""

    exit_code = 2


class TooManySkippedError(BuilderError):
    """More images were skipped than `max_bad_fraction` allows. Exit code 3."""

    exit_code = 3


class VerificationError(BuilderError):
    """A finished artefact does not hold what its manifest promises. Exit code 4."""

    exit_code = 4


class ConfigMismatchError(BuilderError):
    """Configuration, weights or input listing differ from what the output was made with. Exit code 5."""

    exit_code = 5


class InterruptedRunError(BaseException):
    """The run was asked to stop; the same command goes on. Exit code 75 (EX_TEMPFAIL).

    Like KeyboardInterrupt it comes at any moment, so nothing that mends other errors may catch it.
    """

    exit_code = 75


class ImageError(BuilderError):
    """One image cannot be used; `reason` is the short word stored in index.parquet."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
