"""Hosts on one machine that share no folder: namespaces of Linux, each with a network, a name, and files of its own.

All file systems are read-only in a host but for the folder of the `Network`, which has the same path in each of them
and other files, and for /dev/shm, which is also its own. So a host sees the installed packages, and nothing that
another host writes. A switch connects the hosts. It is one more namespace: the network of the machine stays as it is.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

PREFIX = "10.77.0."
GATEWAY = 1
"""The number of the switch, where tests put their object store."""
KERNEL = "proc sysfs devtmpfs devpts cgroup cgroup2 mqueue"
BEGIN = f"""
set -e
hostname "$1"
mount -t tmpfs -o size=4g own /dev/shm
mount -t tmpfs -o size=8g own "$2"
while read -r device place kind options rest; do
    case " {KERNEL} " in *" $kind "*) continue;; esac
    case "$place" in "$2"|/dev/shm) continue;; esac
    case "$options" in rw*) mount -o remount,bind,ro "$place" ;; esac
done < /proc/mounts
ip link set lo up
mkdir "$2/home" "$2/tmp"
echo begun
read -r line || true
"""
"""The first process of a host, which ends with the test, and all others of the host with it."""


class Host:
    """One host. address: how the others reach it; folder: where it can write."""

    def __init__(self, number: int, folder: Path, environment: Mapping[str, str]) -> None:
        self.name, self.address, self.folder = f"host{number}", f"{PREFIX}{number}", folder
        self.environment = environment
        flags = ("--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
        self.process = subprocess.Popen(
            ["unshare", *flags, "bash", "-c", BEGIN, "bash", self.name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "begun\n":
            self.lose()
            assert self.process.stderr is not None
            pytest.skip(f"namespaces are not allowed here: {self.process.stderr.read().strip()}")

    def start(
        self, *words: object, environment: Mapping[str, str] | None = None, log: Path | None = None
    ) -> subprocess.Popen[str]:
        """Start `python WORDS` in the host; its output is captured, or goes into `log`."""
        own = {
            "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder / "tmp"),
            "RAY_TMPDIR": str(self.folder / "tmp"),
            "TRAINER_CACHE": str(self.folder / "cache"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "NO_COLOR": "1",
            "COLUMNS": "200",
        }
        there = self._enter("net", "mount", "uts", "ipc", "pid_for_children")
        output = subprocess.PIPE if log is None else log.open("a")
        try:
            return subprocess.Popen(
                [*there, sys.executable, *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.PIPE if log is None else subprocess.STDOUT,
                text=True,
                env={**os.environ, **own, **self.environment, **(environment or {})},
            )
        finally:
            if log is not None:
                output.close()  # type: ignore[union-attr]

    def run(
        self, *words: object, code: int = 0, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `python WORDS` in the host; it has to end with `code`."""
        process = self.start(*words, environment=environment)
        try:
            out, err = process.communicate(timeout=560)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"{words} hangs on {self.name}: {process.communicate()}") from None
        assert process.returncode == code, f"{words} on {self.name}: {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def seen(self, path: Path) -> Path:
        """Where this process finds what the host has at a path."""
        return Path(f"/proc/{self.process.pid}/root{path}")

    def lose(self) -> None:
        """End the host with all of its processes, as a loss of power does."""
        self.process.kill()
        self.process.wait()

    def _enter(self, *kinds: str) -> list[str]:
        names = {"mount": "mnt", "pid_for_children": "pid_for_children"}
        of = f"/proc/{self.process.pid}/ns"
        flags = [f"--{kind.partition('_')[0]}={of}/{names.get(kind, kind)}" for kind in kinds]
        return ["nsenter", *flags, f"--wd={os.getcwd()}"]

    def ip(self, *words: object) -> None:
        """Configure the network of the host."""
        subprocess.run([*self._enter("net"), "ip", *map(str, words)], check=True)


class Network:
    """Hosts, and the switch that connects them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.hosts, self.environment = folder, list[Host](), dict[str, str]()
        """Variables that all hosts have."""

    @property
    def switch(self) -> Host:
        return self.hosts[0]

    def begin(self) -> None:
        """Make the switch."""
        self.hosts.append(Host(GATEWAY, self.folder, self.environment))
        self.switch.ip("link", "add", "switch", "type", "bridge")
        self.switch.ip("addr", "add", f"{self.switch.address}/24", "dev", "switch")
        self.switch.ip("link", "set", "switch", "up")

    def add(self) -> Host:
        """One more host."""
        host = Host(len(self.hosts) + 1, self.folder, self.environment)
        self.hosts.append(host)
        cable = f"to{host.name}"
        self.switch.ip(
            *("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", host.process.pid)
        )
        self.switch.ip("link", "set", cable, "master", "switch", "up")
        host.ip("addr", "add", f"{host.address}/24", "dev", "eth0")
        host.ip("link", "set", "eth0", "up")
        host.ip("route", "add", "default", "via", self.switch.address)
        return host

    def listening(self) -> socket.socket:
        """A socket of this process on which the hosts reach it, at the address of the switch."""

        def inside() -> socket.socket:
            libc = ctypes.CDLL(None, use_errno=True)
            with open(f"/proc/{self.switch.process.pid}/ns/net") as space:
                if libc.setns(space.fileno(), 0):  # for this thread alone
                    raise OSError(ctypes.get_errno(), "setns")
            return socket.create_server((self.switch.address, 0))

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(inside).result()


@contextmanager
def network() -> Iterator[Network]:
    """A network without hosts; the test is skipped where this process may not make namespaces."""
    for program in ("unshare", "nsenter", "ip"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is missing, which makes hosts of namespaces")
    if os.geteuid() != 0:
        pytest.skip("hosts are made of namespaces, for which this process must be root")
    folder = Path(tempfile.mkdtemp(prefix="hosts-"))  # a short path, for the sockets of Ray
    made = Network(folder)
    try:
        made.begin()
        yield made
    finally:
        for host in made.hosts:
            host.lose()
        shutil.rmtree(folder)
