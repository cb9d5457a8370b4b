"""Processes that others started, read from /proc."""

import contextlib
from pathlib import Path


def processes_below(root: int) -> list[int]:
    """Process ids of `root` and of all its descendants."""
    parents = dict[int, int]()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])

    def is_below(process: int) -> bool:
        while process in parents and process != root:
            process = parents[process]
        return process == root

    return [process for process in parents if is_below(process)]
