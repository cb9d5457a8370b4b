"""Commands of the builder that die, as by SIGKILL, just before the n-th change that they make below a folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drill import DEADLINE_S, command, forks

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
"""Audit events before which a command may die; every file of a build takes its name by `os.rename`."""
KILLED = 137


def _die_at(words: Sequence[str], log: str, root: str, at: int) -> None:
    seen = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in CHANGES and os.fspath(arguments[0]).startswith(root):
            seen += 1
            if seen == at:
                os._exit(KILLED)

    sys.addaudithook(count)
    try:
        command(words, log, None, {})
    finally:
        Path(log).with_suffix(".count").write_text(str(seen))


def run(words: Sequence[str], root: Path, log: Path, at: int = 0) -> tuple[int, int]:
    """Run a command, which dies before change number `at` below `root`, from 1; returns its exit code and all changes.

    With 0 it runs to its end. The number of changes is 0 if it died.
    """
    counted = log.with_suffix(".count")
    counted.unlink(missing_ok=True)
    process = forks.Process(target=_die_at, args=(tuple(words), str(log), str(root), at))
    process.start()
    process.join(DEADLINE_S)
    assert process.exitcode is not None, f"{words} hangs"
    return process.exitcode, int(counted.read_text()) if counted.exists() else 0
