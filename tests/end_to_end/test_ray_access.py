"""Nobody but a build itself can use the Ray that it starts."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import processes_below

from hierarchy_builder.build.workers import Workers, open_pool, shutdown
from hierarchy_builder.records import Block

LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
"""127.0.0.1, the same inside IPv6, and ::1, as /proc/net writes them."""

INTRUDER = """
import os, sys
import ray
ray.init(address=sys.argv[1], log_to_driver=False)
task = ray.remote(num_cpus=0)(lambda: os.getppid())
print("ran below", ray.get(task.remote(), timeout=60))
"""


JOINING = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_NUM_REDIS_GET_RETRIES": "1"}
"""With the first variable Ray connects to a loopback address as it is; with the second it asks once, not for 20 s."""


def intruder(address: str, home: Path, **variables: str) -> subprocess.Popen[str]:
    """Another process that joins the Ray at `address` and runs a task there."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    return subprocess.Popen(
        [sys.executable, "-c", INTRUDER, address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**own, "HOME": str(home), **JOINING, **variables},
    )


def listeners(processes: list[int]) -> dict[str, list[str]]:
    """Addresses on which these processes listen for TCP connections, each with their ports."""
    inodes = set[str]()
    for process in processes:
        with contextlib.suppress(FileNotFoundError):  # a process may have ended, or closed a file
            for descriptor in Path(f"/proc/{process}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if found := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(descriptor)):
                        inodes.add(found[1])
    addresses = dict[str, list[str]]()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and inode in inodes:  # LISTEN
                address, port = local.split(":")
                addresses.setdefault(address, []).append(port)
    return addresses


@pytest.mark.timeout(280)
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="the listening sockets are read from /proc")
def test_another_process_cannot_use_the_ray_of_a_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/proc/none")  # nothing can be written there

    def look(loaded: None, unit: Block, threads: int) -> dict[str, str]:
        """Where the worker's Ray is and which token it has, in place of the work of a unit."""
        import ray

        return {"address": ray.get_runtime_context().gcs_address, "token": os.environ["RAY_AUTH_TOKEN"]}

    home = tmp_path / "home"
    home.mkdir()
    try:
        units = [Block(number=0, start=0, stop=1)]
        with open_pool(lambda: None, Workers(count=1), units) as pool:
            (worker,) = pool.map(look, units)
            assert len(worker["token"]) == 64
            wrong, right = (
                {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} for token in ("0" * 64, worker["token"])
            )
            # All at once, since most of their time is spent waiting.
            *refused, entered = [
                intruder(worker["address"], home, **variables) for variables in ({}, wrong, right)
            ]
            for process in refused:
                said, complained = process.communicate(timeout=100)
                assert process.returncode != 0
                assert "ran below" not in said
                assert "Unauthenticated" in complained, complained
            said, complained = entered.communicate(timeout=100)
            assert "ran below" in said, complained  # the token is what the others lacked
            import ray

            processes = processes_below(os.getpid())
            addresses = listeners(processes)
            assert sum(map(len, addresses.values())) >= 5  # the driver, the worker, and three of Ray at least
            assert addresses.keys() <= LOOPBACK, addresses
            for process in processes:
                with contextlib.suppress(FileNotFoundError):  # it may have ended
                    assert worker["token"].encode() not in Path(f"/proc/{process}/cmdline").read_bytes()
            session = Path(ray._private.worker._global_node.get_session_dir_path())
            assert session.parent.parent.stat().st_mode & 0o077 == 0, "other users could replace its sockets"
            for path in session.rglob("*"):
                assert not path.is_file() or worker["token"].encode() not in path.read_bytes(), path
    finally:
        shutdown()
    left = {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")}
    assert not left, "the token must not outlive the Ray it was made for"
