"""One writer for a folder: a lock of the kernel where there is one, and a lease at URLs and on other file systems.

The lock (`flock` on `.lock`) ends with its process. A lease is a file in `.lease/` whose name is a number. Who creates
the next number, in one request that fails where it exists, is the writer; the highest number is never removed, so
an earlier holder always sees a later one. The holder writes its file again every few seconds. One that did not for
LEASE_S has died or is cut off: the next command waits until then, and takes over. Ages are differences of times of the
store alone, so the clocks of machines do not matter.

Before it writes a marker, a process looks whether its number is still the highest (`still_ours`), and stops if it is
not. What remains is a holder that is suspended between that look and the write of one marker for longer than LEASE_S.
Units are functions of their inputs and a marker names its configuration, so the marker it then writes is equal to that
of the other writer, or is ignored.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from hierarchy_builder.errors import InterruptedRunError, UserError
from hierarchy_builder.files import remote
from hierarchy_builder.files.remote import is_remote, store_error
from hierarchy_builder.files.untrusted.documents import parse_json
from hierarchy_builder.files.whole import json_text, read_bytes, target_of, write_bytes

LOCK, LEASES = ".lock", ".lease"
NUMBERED = re.compile(r"\d{8}\.json")
LEASE_S = 60.0
"""Seconds after which a lease that was not renewed counts as left."""
RENEWALS = 6
"""How often a lease is renewed in that time."""
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
"""What file systems without locks answer: Lustre without -o flock, NFS without lockd, some in user space."""


class BusyError(UserError):
    """Another process writes there."""


class LeaseLostError(InterruptedRunError):
    """Another process has taken over what this one was writing. Exit code 75."""


@contextlib.contextmanager
def exclusive(folder: Path, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Be the one writer of a folder, which exists unless it is at a URL. Raises BusyError if there is another.

    say: is told when a lease has to be waited for.
    """
    with contextlib.ExitStack() as held:
        if is_remote(folder) or not _lock(folder, held.enter_context(open(target_of(folder / LOCK), "a"))):
            held.enter_context(_leased(folder, say))
        yield


def _lock(folder: Path, file: IO[str]) -> bool:
    """Lock the file; False where the file system has no locks. Raises BusyError if another process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(file.fileno()).st_nlink:
            raise BlockingIOError  # its owner has just removed the folder
    except BlockingIOError:
        raise BusyError(f"{folder} is being written by another process") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def is_taken(folder: Path) -> bool:
    """Whether a writer works in a folder now."""
    if not is_remote(folder) and (folder / LOCK).is_file():  # opening a pipe would never end
        try:
            with open(folder / LOCK) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                return False
    number = _highest(folder)
    if number is None or not _may_be_held((lease := Lease(folder, number)).read()):
        return False
    try:
        age = lease.age()
    except Exception as error:
        if not _is_of_files(error):
            raise
        age = time.time() - _modified(lease.path)  # who may only read asks the clock of this machine
    return age < LEASE_S


def of_exclusion(name: str) -> bool:
    """Whether a file or folder of this name belongs to the lock or the lease of the folder that it is in."""
    return name in (LOCK, LEASES)


def discard(folder: Path) -> None:
    """Remove lock and lease of a folder that shall not keep them, by the process that holds them."""
    if is_remote(folder):
        remote.remove(remote.files_below(folder / LEASES))
        return
    (folder / LOCK).unlink(missing_ok=True)
    shutil.rmtree(folder / LEASES, ignore_errors=True)


def held_lease(place: Path) -> Lease | None:
    """The lease of the folder that `place` lies in, if this process holds one."""
    is_around = (
        lease
        for lease in _HELD
        if is_remote(place) == is_remote(lease.folder) and place.is_relative_to(lease.folder)
    )
    return next(is_around, None)


def still_ours(place: Path) -> None:
    """Raise LeaseLostError if the folder that `place` lies in was taken over from this process."""
    if lease := held_lease(place):
        lease.check()


@dataclass(frozen=True, slots=True)
class Lease:
    """One number of a folder and its file; it can be sent to workers, which ask whether it is still held."""

    folder: Path
    number: int
    token: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def path(self) -> Path:
        return self.folder / LEASES / f"{self.number:08d}.json"

    def check(self) -> None:
        """Raise LeaseLostError if another process has taken over since."""
        if _highest(self.folder) != self.number or self.read().get("token") not in (self.token, None):
            raise LeaseLostError(
                f"{self.folder} was taken over by another process, since this one gave no sign of life for "
                f"{LEASE_S:.0f} s: it stops, and whatever it finished stays"
            )

    def content(self) -> bytes:
        return json_text({"holder": _about_us(), "token": self.token, "time": time.time()})

    def create(self) -> bool:
        """Write the file if there is none; whether it was this process that did."""
        if is_remote(self.path):
            remote.create(self.path, self.content())  # its answer may be that of a second try
            return bool(self.read().get("token") == self.token)
        self.path.parent.mkdir(exist_ok=True)
        try:
            with open(self.path, "xb") as file:
                file.write(self.content())
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            return False
        return True

    def release(self) -> None:
        """Say that nobody holds it; earlier numbers go."""
        write_bytes(self.path, json_text({"holder": None, "token": self.token}))
        for number in _numbers(self.folder):
            if number < self.number:
                Lease(self.folder, number).path.unlink(missing_ok=True)

    def read(self) -> dict[str, Any]:
        try:
            content = parse_json(read_bytes(self.path))
        except FileNotFoundError:
            return {}
        except ValueError:  # being written, on a disk
            return {"holder": {}}
        return content if isinstance(content, dict) else {}

    def age(self) -> float:
        """Seconds since it was written, by the clock of the store, which a second file tells."""
        probe = self.path.with_name(f"now-{self.token}")
        write_bytes(probe, self.token.encode())
        try:
            return _modified(probe) - _modified(self.path)
        except FileNotFoundError:
            return 0.0
        finally:
            probe.unlink(missing_ok=True)


_HELD: list[Lease] = []
"""Leases of this process."""


@contextlib.contextmanager
def _leased(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    lease = _taken(folder, say)
    stop = threading.Event()
    beats = threading.Thread(target=_keep, args=(lease, stop), name=f"lease of {folder}", daemon=True)
    beats.start()
    try:
        yield
    finally:
        stop.set()
        beats.join()
        _HELD.remove(lease)
        try:
            if _highest(folder) == lease.number:
                lease.release()
        except Exception as error:  # the outcome of the work stays what it is; the lease runs out by itself
            if not _is_of_files(error):
                raise
            say(f"{folder} stays marked as being written for up to {LEASE_S:.0f} s: {error}")


def _taken(folder: Path, say: Callable[[str], None]) -> Lease:
    """A new lease of a folder, when the last one was released or left. Raises BusyError if it is renewed meanwhile."""
    while True:
        number = _highest(folder)
        if number is not None:
            busy = Lease(folder, number)
            if _may_be_held(content := busy.read()):
                _wait_until_left(busy, content, say)
        lease = Lease(folder, (number or 0) + 1)
        _HELD.append(lease)
        try:
            if lease.create():
                if _highest(folder) == lease.number:
                    return lease
                lease.path.unlink(missing_ok=True)  # others came and went while this process looked
        except BaseException:
            _HELD.remove(lease)
            raise
        _HELD.remove(lease)


def _wait_until_left(lease: Lease, content: dict[str, Any], say: Callable[[str], None]) -> None:
    """Return when a lease was not renewed for LEASE_S. Raises BusyError as soon as it is renewed."""
    is_said = False
    while (age := lease.age()) < LEASE_S:
        if not is_said:
            say(
                f"{lease.folder} was being written by {_holder_of(content)} {max(age, 0):.0f} s ago: "
                f"waiting for at most {LEASE_S - age:.0f} s whether it still is"
            )
            is_said = True
        time.sleep(LEASE_S / RENEWALS / 2)
        now = lease.read()
        if now.get("holder") is None:
            return
        if now.get("time") != content.get("time"):
            raise BusyError(f"{lease.folder} is being written by {_holder_of(now)}")


def _holder_of(content: dict[str, Any]) -> str:
    about = content.get("holder") or {}
    return f"process {about.get('process', '?')} of {about.get('host', '?')}"


def _keep(lease: Lease, stop: threading.Event) -> None:
    """Renew a lease until it is released or lost; what fails is tried again, since `still_ours` tells what is lost."""
    while not stop.wait(LEASE_S / RENEWALS):
        try:
            lease.check()
            write_bytes(lease.path, lease.content())
        except LeaseLostError:
            return
        except Exception as error:
            if not _is_of_files(error):
                raise


def _is_of_files(error: Exception) -> bool:
    """Whether an exception tells of a file system or a store; every store has its own."""
    return isinstance(error, OSError) or store_error(error) is not None


def _about_us() -> dict[str, Any]:
    return {"host": socket.gethostname(), "process": os.getpid(), "started": _process_start()}


def _may_be_held(content: dict[str, Any]) -> bool:
    """Whether somebody may hold a lease: it was not released, and its holder is not known to have ended."""
    holder = content.get("holder")
    if holder is None or _is_dead(holder):
        return False
    # A lease that this process wrote and holds no more could not be released, as the store was away.
    return holder != _about_us() or content.get("token") in {held.token for held in _HELD}


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended; another machine cannot tell."""
    if holder.get("host") != socket.gethostname() or not holder.get("started"):
        return False
    boot, _, start = str(holder["started"]).rpartition("/")
    own_boot, _, _ = _process_start().rpartition("/")
    process = holder.get("process")
    if boot != own_boot or not isinstance(process, int) or process < 1:
        return False
    if now := _process_start(process).rpartition("/")[2]:
        return start != now
    try:  # where processes of other users are hidden, none of them has an entry in /proc
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _process_start(process: Any = None) -> str:
    """What tells a process of this machine from all others with its number: boot, process space, time of its start."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
    try:
        stat = Path(f"/proc/{process or os.getpid()}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return f"{boot}{space}/"
    return f"{boot}{space}/{'ended' if stat[0] == 'Z' else stat[19]}"


def _numbers(folder: Path) -> list[int]:
    place = folder / LEASES
    if is_remote(place):
        names = [path.name for path in remote.files_below(place)]
    else:
        names = os.listdir(place) if place.is_dir() else []
    return sorted(int(name[:8]) for name in names if NUMBERED.fullmatch(name))


def _highest(folder: Path) -> int | None:
    return max(_numbers(folder), default=None)


def _modified(path: Path) -> float:
    return remote.modified(path) if is_remote(path) else path.stat().st_mtime
