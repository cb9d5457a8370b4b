"""One writer for a folder, with and without locks of the file system: who is alive, who died, and who was replaced."""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from object_store import Store, served

from hierarchy_builder.errors import InterruptedRunError, UserError
from hierarchy_builder.files import exclusion
from hierarchy_builder.files.exclusion import (
    BusyError,
    Lease,
    LeaseLostError,
    exclusive,
    held_lease,
    is_taken,
)
from hierarchy_builder.files.paths import a_folder
from hierarchy_builder.files.whole import write_bytes
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.ledger import Ledger

forks = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with served() as found:
        yield found


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on a file system that refuses locks, and one of an object store; leases run out in three seconds."""
    monkeypatch.setattr(exclusion, "LEASE_S", 3.0)  # the store counts whole seconds
    if request.param == "s3":
        return a_folder(f"{request.getfixturevalue('store').bucket(f'bucket-{os.urandom(4).hex()}')}/folder")

    def refused(file: Any, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refused)
    return tmp_path


def lease_of(place: Path, number: int, **holder: Any) -> None:
    """The lease of another process."""
    content = {"holder": holder, "token": f"of {number}", "time": 0}
    if not exclusion.is_remote(place):
        (place / ".lease").mkdir(exist_ok=True)
        (place / ".lock").touch()
    write_bytes(place / ".lease" / f"{number:08d}.json", json.dumps(content).encode())


def grow_old(place: Path, number: int, seconds: float) -> None:
    """Let a lease have been written so long ago, by the clock of its store."""
    path = place / ".lease" / f"{number:08d}.json"
    if not exclusion.is_remote(place):
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))
        return
    from moto.s3.models import s3_backends

    bucket, _, key = str(path).removeprefix("s3://").partition("/")
    for backends in s3_backends.values():
        if bucket in backends["aws"].buckets:
            found = backends["aws"].buckets[bucket].keys[key]
            found.last_modified -= datetime.timedelta(seconds=seconds)


def numbers(place: Path) -> list[int]:
    return exclusion._numbers(place)


def test_a_lease_is_taken_and_released(place: Path) -> None:
    assert not is_taken(place)
    with exclusive(place):
        assert is_taken(place)
        assert held_lease(place / "ledger" / "extract") is not None
    assert not is_taken(place)
    assert held_lease(place) is None
    with exclusive(place):
        assert numbers(place) == [1, 2]
    assert numbers(place) == [2]  # a number is never given twice


def test_a_live_holder_is_named(place: Path) -> None:
    heard = list[str]()
    named = pytest.raises(BusyError, match=f"process {os.getpid()} of {socket.gethostname()}")
    with exclusive(place), named, exclusive(place, heard.append):
        pytest.fail("two writers")
    assert "waiting for at most" in heard[0]


def _hold(place: str, ready: Connection) -> None:
    with exclusive(Path(place)):
        ready.send(None)
        signal.pause()


def test_a_killed_holder_of_this_machine_is_followed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(file: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    here, there = forks.Pipe()
    holder = forks.Process(target=_hold, args=(str(tmp_path), there))
    holder.start()
    here.recv()
    assert is_taken(tmp_path)
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with exclusive(tmp_path, pytest.fail):  # without waiting for LEASE_S, which is a minute here
        assert numbers(tmp_path) == [1, 2]


def test_a_silent_holder_of_another_machine_is_replaced_and_stops(place: Path) -> None:
    lease_of(place, 7, host="elsewhere", process=1, started="")
    grow_old(place, 7, 1)
    assert is_taken(place)
    heard = list[str]()
    with exclusive(place, heard.append):
        assert "by process 1 of elsewhere" in heard[0]
        with pytest.raises(LeaseLostError, match="was taken over"):
            Lease(place, 7, "of 7").check()
        assert numbers(place) == [7, 8]


def test_a_writer_that_was_replaced_writes_no_marker(place: Path) -> None:
    ledger = Ledger(BuildFolder(place).ledger("extract"), "hash")
    with exclusive(place):
        ledger.finish(0, {"images": 1})
        work = Ledger(ledger.folder, "hash", held_lease(ledger.folder))  # as a worker gets it
        lease_of(place, 2, host="elsewhere")
        for each in (ledger, work):
            with pytest.raises(InterruptedRunError):
                each.finish(1, {"images": 1})
    assert [ledger.is_done(unit) for unit in (0, 1)] == [True, False]
    assert numbers(place) == [1, 2]  # the lease of the other stays


def test_of_two_that_take_over_one_wins(place: Path) -> None:
    first, second = Lease(place, 1), Lease(place, 1)
    assert first.create()
    assert not second.create()
    assert first.read()["token"] == first.token


def test_a_lease_that_ran_out_holds_nobody_up(place: Path) -> None:
    lease_of(place, 3, host="elsewhere", process=1, started="")
    grow_old(place, 3, 9)
    assert not is_taken(place)
    with exclusive(place, pytest.fail):
        assert numbers(place) == [3, 4]


def test_who_looked_too_early_does_not_write_beside_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = iter([1, 5, 5])  # between the first two looks, others took the leases up to 5 and left
    lease_of(tmp_path, 5)
    (tmp_path / ".lease" / "00000005.json").write_text('{"holder": null}')
    monkeypatch.setattr(exclusion, "_highest", lambda folder: next(seen, None) or max(numbers(folder)))
    lease = exclusion._taken(tmp_path, pytest.fail)
    assert (lease.number, numbers(tmp_path)) == (6, [5, 6])


def test_a_lost_answer_is_no_other_writer(store: Store) -> None:
    lease = Lease(a_folder(f"{store.bucket('lost')}/folder"), 1)
    write_bytes(lease.path, lease.content())  # the request that was answered by silence
    assert lease.create()


def test_a_store_that_is_away_at_the_end_changes_no_outcome(store: Store) -> None:
    place, heard = a_folder(f"{store.bucket('away')}/folder"), list[str]()
    with store.failing(lambda environ: None):
        with pytest.raises(ZeroDivisionError), exclusive(place, heard.append):  # noqa: PT012 (the end matters)
            store.door.fault = lambda environ: ("403 Forbidden", "AccessDenied")
            raise ZeroDivisionError
        assert "stays marked as being written" in heard[0]
    with exclusive(place, pytest.fail):  # by the same process, without waiting
        assert is_taken(place)


@pytest.mark.parametrize(
    ("process", "start", "is_dead"),
    [(None, None, False), (None, "1", True), (2**22 + 7, "1", True)],
)
def test_a_process_is_dead_if_its_number_is_free_or_anothers(
    process: int | None, start: str | None, is_dead: bool
) -> None:
    boot, _, own = exclusion._process_start().rpartition("/")
    holder = {
        "host": socket.gethostname(),
        "process": process or os.getpid(),
        "started": f"{boot}/{start or own}",
    }
    assert exclusion._is_dead(holder) is is_dead


def test_a_process_that_cannot_be_seen_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    started = exclusion._process_start()
    hidden = f"{started.rpartition('/')[0]}/"  # as under hidepid
    monkeypatch.setattr(exclusion, "_process_start", lambda process=None: hidden if process else started)
    assert not exclusion._is_dead({"host": socket.gethostname(), "process": os.getpid(), "started": started})


def test_locks_are_used_where_there_are_some(tmp_path: Path) -> None:
    with exclusive(tmp_path):
        assert is_taken(tmp_path)
        with pytest.raises(BusyError, match="is being written by another process"), exclusive(tmp_path):
            pytest.fail("two writers")
    assert os.listdir(tmp_path) == [".lock"]


def test_a_pipe_in_place_of_a_lock_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / exclusion.LOCK)
    assert not is_taken(tmp_path)
    with pytest.raises(UserError, match="no regular file"), exclusive(tmp_path):
        pass
