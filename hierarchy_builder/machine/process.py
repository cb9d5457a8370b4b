"""Prepares this process for the machine it runs on: encoding of its output, home folder, caches, CPUs, threads."""

from __future__ import annotations

import atexit
import gc
import getpass
import math
import os
import shutil
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, TypeVar

from hierarchy_builder.errors import BuilderError, explained
from hierarchy_builder.files.paths import home_folder

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def prepare() -> None:
    """Prepare a process for a command line; called before any module is imported that looks at the machine."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that cannot be printed must not end the command
            stream.reconfigure(errors="backslashreplace")
    threading.excepthook = _report_thread
    give_home()
    # Modules as large as torch make a million objects that stay. To look through them for garbage after every 700th,
    # and through all of them once more at the end, takes a sixth of the time of a short command.
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)


MAX_SOCKET_FOLDER = 29
"""Bytes in the path of the temporary folder: `/r-abcdefgh/t` is added, Ray adds up to 65, and a socket has 107."""
SHORT_FOLDER = "/tmp"
"""Used instead of a longer one."""


def socket_folder() -> str:
    """The folder for the sockets of Ray: the temporary folder, or another one if its path is too long for them.

    Raises BuilderError if there is no other place.
    """
    place = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(os.fsencode(place)) <= MAX_SOCKET_FOLDER:
        return place
    if os.environ.get("RAY_TMPDIR") or not os.access(SHORT_FOLDER, os.W_OK | os.X_OK):
        raise BuilderError(
            f"the temporary folder {place} has a path of {len(os.fsencode(place))} bytes, and the sockets of Ray need "
            f"one of at most {MAX_SOCKET_FOLDER}: set RAY_TMPDIR to a folder with a shorter path, or use --workers 0"
        )
    return SHORT_FOLDER


def give_home() -> None:
    """Where this user has no home folder or no name, as in many containers, set HOME to a new folder, and USER.

    Without it several libraries would write into a folder called `~`, or fail. The folder goes with the process.
    """
    if home_folder() is None:
        os.environ["HOME"] = private_folder()
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid{os.getuid()}"


def place_numba_cache(sources: Path) -> None:
    """Choose where numba keeps compiled code, if neither the folder `sources` nor the user's cache can be written.

    numba then refuses to compile at all. The new folder is private and goes with this process, since a folder that
    other users can write to would let them run code here.
    """
    home = home_folder()
    base = os.environ.get("XDG_CACHE_HOME") or (str(home / ".cache") if home else "")
    places = [sources / "__pycache__", *([Path(base) / "numba"] if base else [])]
    if os.environ.get("NUMBA_CACHE_DIR") or any(map(_can_be_written, places)):
        return
    os.environ["NUMBA_CACHE_DIR"] = private_folder()
    if (numba := sys.modules.get("numba")) is not None:
        numba.config.reload_config()


def num_cpus() -> int:
    """CPUs that this process may use: those of its affinity, or fewer if its control groups grant less time."""
    allowed, granted = len(os.sched_getaffinity(0)), granted_cpus(CONTROL_GROUPS, OWN_GROUPS)
    return max(1, math.ceil(min(allowed, granted)))


CONTROL_GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def granted_cpus(root: Path, own: Path) -> float:
    """CPU seconds per second that the control groups of this process grant; infinite without a limit.

    root: where the groups are mounted. own: names of the groups that the process is in. A container sees its own group
    as the root, and a group gets no more than those above it.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    groups = {Path()}
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "" or "cpu" in controllers.split(","):
            place = Path(name.lstrip("/"))
            groups |= {place, *place.parents}
    found = [math.inf]
    for group in groups:
        for folder in (root / group, root / "cpu" / group):
            quota = _first_words(folder / "cpu.max")  # version 2: quota and period
            if len(quota) < 2:
                names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                quota = [word for name in names for word in _first_words(folder / name)]
            if len(quota) == 2 and all(word.isdecimal() for word in quota) and int(quota[1]):
                found.append(int(quota[0]) / int(quota[1]))
    return min(found)


def _first_words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def private_folder(parent: str | None = None, prefix: str = "trajectory-hierarchies-") -> str:
    """A new temporary folder that only this user can open; it is removed when this process ends."""
    folder = tempfile.mkdtemp(prefix=prefix, dir=parent)
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a process that was forked from this one
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def _can_be_written(folder: Path) -> bool:
    """Whether files can be made in a folder, or the folder itself can be made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _report_thread(failed: Any) -> None:
    """Print one line for an error of the operating system in a thread, such as a full disk, instead of a traceback."""
    if isinstance(failed.exc_value, OSError):
        name = failed.thread.name if failed.thread is not None else "a thread"
        print(f"warning: {name}: {explained(failed.exc_value)}", file=sys.stderr)
    else:
        threading.__excepthook__(failed)


def ahead(
    pool: Executor, function: Callable[[ItemT], ResultT], items: Iterable[ItemT], depth: int
) -> Iterator[ResultT]:
    """Map `items` in a pool and yield results in order, with at most `depth` further results running or waiting."""
    waiting: deque[Future[ResultT]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
