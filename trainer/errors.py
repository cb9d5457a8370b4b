"""What can go wrong while training, sampling and looking, each with its exit code on the command line."""


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
