"""Faults on purpose: builds are killed, stopped, starved and torn at random moments, and must end with the same bytes.

    python tests/drills/drill.py [--seed 0] [--driver-kills 50] [--stops 8] [--worker-kills 10] [--tears 30] …

prints the faults injected and survived; `tests/end_to_end/test_drill.py` does a few of each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from hierarchy_builder.build.workers import RAY_ENVIRONMENT
from hierarchy_builder.files.remote import files_below, is_remote
from hierarchy_builder.files.whole import read_json, sha256_file
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.shards import read_shard, sidecar
from hierarchy_builder.verify.checks import find_problems

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
from pictures import write_tree
from processes import processes_below

STAGES = ("extract", "cluster", "shard")
BLOCK_ROWS, PER_SHARD = 4, 5
DEADLINE_S = 240
"""Longest a single command may take, whatever was done to it."""
POLL_S = 0.02
HEAD = {"num_cpus": 1, "include_dashboard": False}
SMALL_CLUSTER = {
    **RAY_ENVIRONMENT,
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "2",
}
"""Environment of a Ray that says nothing, stays on this machine, and soon notices a lost node."""

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(
    ["hierarchy_builder.cli", "hierarchy_builder.verify.repair", "hierarchy_builder.encoders.dct"]
)


def command(words: Sequence[str], log: str, file_bytes: int | None, environment: Mapping[str, str]) -> None:
    """`hierarchy-builder WORDS` in this process, which ends with its exit code; output goes into `log`."""
    os.environ.update(environment)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["hierarchy-builder", *words]
    from hierarchy_builder.cli.app import main

    main()


class Drill:
    """Photographs, an undisturbed build of them, and how long each of its stages took."""

    gives_up = frozenset[int]()
    """Exit codes of a command that nothing hit, after which it is given again."""
    deadline_s = DEADLINE_S

    def __init__(self, root: Path, seed: int, per_class: int = 20) -> None:
        self.root, self.random, self.faults = root, random.Random(seed), Counter[str]()
        self.photos = write_tree(root / "photos", per_class=per_class)
        self.num_images = 3 * per_class
        self.reference, self.seconds = BuildFolder(root / "undisturbed"), {}
        for stage in STAGES:
            started = time.perf_counter()
            self.run(*self.words(stage, self.reference))
            self.seconds[stage] = time.perf_counter() - started
        self.tars = tars_of(self.reference)

    def words(self, stage: str, folder: BuildFolder) -> list[str]:
        """The command of one stage, in process."""
        flags = {
            "extract": [str(self.photos), "--out", str(folder.root), "--encoder", "dct"],
            "cluster": [str(folder.root)],
            "shard": [str(folder.root), "--samples-per-shard", str(PER_SHARD), "--images"],
        }[stage]
        blocks = ["--block-rows", str(BLOCK_ROWS)] if stage == "extract" else []
        return [stage, *flags, *blocks, "--workers", "0", "--quiet"]

    def build_words(self, folder: BuildFolder, *more: str) -> list[str]:
        """The command of a whole build."""
        flags = [
            "--block-rows",
            str(BLOCK_ROWS),
            "--samples-per-shard",
            str(PER_SHARD),
            "--images",
            "--quiet",
        ]
        return ["build", str(self.photos), "--out", str(folder.root), "--encoder", "dct", *flags, *more]

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    def start(self, *words: str, file_bytes: int | None = None) -> multiprocessing.process.BaseProcess:
        """Start a command; file_bytes: what the largest file may have."""
        process = forks.Process(target=command, args=(words, str(self.log), file_bytes, self.environment()))
        process.start()
        return process

    def environment(self) -> dict[str, str]:
        """Variables of every command."""
        return {name: value for name, value in os.environ.items() if name.startswith("RAY_")}

    def run(self, *words: str, expected: int = 0, file_bytes: int | None = None) -> None:
        """Run a command to its end, which must be `expected`."""
        process = self.start(*words, file_bytes=file_bytes)
        process.join(self.deadline_s)
        if process.exitcode is None:
            process.kill()
        self.require(
            process.exitcode == expected, f"{words[0]} ended with {process.exitcode}, not {expected}"
        )

    def require(self, is_so: bool, text: str) -> None:
        """Raise AssertionError with the end of the log."""
        if not is_so:
            raise AssertionError(f"{text}\n{self.log.read_text()[-3000:]}")

    def folder(self) -> BuildFolder:
        """A new place for a build."""
        return BuildFolder(Path(tempfile.mkdtemp(dir=self.root)) / "build")

    def compare(self, folder: BuildFolder) -> None:
        """The shards have the bytes of the undisturbed build, hold every sample once, and verify finds nothing."""
        self.require(tars_of(folder) == self.tars, f"{folder.root}: shards differ from the undisturbed build")
        keys = [sample.key for tar in sorted(folder.shards.glob("*.tar")) for sample in read_shard(tar)]
        self.require(len(set(keys)) == len(keys) == self.num_images, f"{folder.root}: {len(keys)} samples")
        problems = list(find_problems(folder))
        self.require(not problems, f"{folder.root}: {problems}")

    # Faults

    def kill_drivers(self, kills: int, number: int = signal.SIGKILL) -> None:
        """Kill (or stop) the command of each stage at random moments, over and over, until `kills` have hit."""
        name = {signal.SIGKILL: "driver killed", signal.SIGTERM: "driver stopped"}[signal.Signals(number)]
        goal = self.faults[name] + kills
        while self.faults[name] < goal:
            folder = self.folder()
            for stage in STAGES:
                while not self._one_try(folder, stage, number, name, is_last=self.faults[name] >= goal):
                    check_whole(folder)
            self.compare(folder)

    def _one_try(self, folder: BuildFolder, stage: str, number: int, name: str, *, is_last: bool) -> bool:
        """Start a stage and hit it; returns whether it finished before."""
        process = self.start(*self.words(stage, folder))
        process.join(self.deadline_s if is_last else self.random.uniform(0, self.seconds[stage]))
        if process.exitcode is None:
            os.kill(process.pid, number)
            process.join(self.deadline_s)
            # Before the command has begun, or after its end, a signal finds nothing to stop.
            self.faults[name] += process.exitcode in (-signal.SIGKILL, 75)
            allowed = {-number, 0, *self.gives_up, *(() if number == signal.SIGKILL else (75,))}
            self.require(
                process.exitcode in allowed, f"{stage} hit by {number} ended with {process.exitcode}"
            )
        else:
            self.require(process.exitcode in {0, *self.gives_up}, f"{stage} ended with {process.exitcode}")
        return process.exitcode == 0

    def kill_workers(self, kills: int) -> None:
        """Kill Ray workers of a running build, each after another unit was done."""
        goal = self.faults["worker killed"] + kills
        while self.faults["worker killed"] < goal:
            folder = self.folder()
            while (code := self._kill_workers_of(folder, goal)) in self.gives_up:
                pass
            self.require(code == 0, f"build ended with {code}")
            self.compare(folder)

    def _kill_workers_of(self, folder: BuildFolder, goal: int) -> int | None:
        """Build, and kill workers until `goal` of them were hit; returns the exit code of the build."""
        seen, process = 0, self.start(*self.build_words(folder, "--workers", "2"))
        for done in self._progress(folder, process):
            if done > seen and self.faults["worker killed"] < goal and (workers := workers_of(process.pid)):
                process.join(self.random.uniform(0, 0.2))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.random.choice(workers), signal.SIGKILL)
                    self.faults["worker killed"] += 1
                    seen = done
        return process.exitcode

    def stop_with_workers(self) -> None:
        """SIGTERM to a driver whose units run on Ray."""
        folder = self.folder()
        process = self.start(*self.build_words(folder, "--workers", "2"))
        for done in self._progress(folder, process):
            if done > 1:
                os.kill(process.pid, signal.SIGTERM)
                process.join(self.deadline_s)
                self.faults["driver stopped"] += 1
        self.require(process.exitcode == 75, f"build ended with {process.exitcode}")
        self.run(*self.build_words(folder, "--workers", "0"))
        self.compare(folder)

    def lose_node(self) -> None:
        """Kill the second of two nodes while units run on it."""
        from ray.cluster_utils import Cluster

        with mock.patch.dict(os.environ, SMALL_CLUSTER):
            self._lose_node(Cluster(initialize_head=True, head_node_args=HEAD))

    def _lose_node(self, cluster: Any) -> None:
        try:
            node = cluster.add_node(num_cpus=1)
            cluster.wait_for_nodes(timeout=60)
            folder, is_lost = self.folder(), False
            process = self.start(*self.build_words(folder, "--workers", "2", "--address", cluster.address))
            for done in self._progress(folder, process):
                if done > 1 and not is_lost:
                    cluster.remove_node(node, allow_graceful=False)
                    self.faults["node lost"] += 1
                    is_lost = True
            self.require(process.exitcode == 0, f"build ended with {process.exitcode}")
            self.compare(folder)
        finally:
            cluster.shutdown()

    def _progress(self, folder: BuildFolder, process: multiprocessing.process.BaseProcess) -> Iterator[int]:
        """Units done, again and again until the command ends; it is killed after the deadline."""
        deadline = time.monotonic() + self.deadline_s
        while process.exitcode is None and time.monotonic() < deadline:
            yield len(folder.markers("*"))
            process.join(POLL_S)
        if process.exitcode is None:
            process.kill()
            process.join()

    def tear(self, times: int) -> None:
        """Cut or flip a random file of a finished build, and repair."""
        folder = self.folder()
        for stage in STAGES:
            self.run(*self.words(stage, folder))
        for _ in range(times):
            files = sorted(p for p in folder.root.rglob("*") if p.is_file() and p.stat().st_size)
            path = self.random.choice(files)
            content = bytearray(path.read_bytes())
            if self.random.random() < 0.5:
                del content[self.random.randrange(len(content)) :]
            else:
                content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
            path.write_bytes(content)
            self.faults["file torn"] += 1
            self.run("repair", str(folder.root), "--workers", "0", "--quiet")
            self.compare(folder)

    def fill_disk(self, times: int) -> None:
        """Refuse to write beyond a random number of bytes, as a full disk does, then go on without the limit."""
        largest = max(path.stat().st_size for path in self.reference.root.rglob("*") if path.is_file())
        while self.faults["disk full"] < times:
            folder = self.folder()
            limit = self.random.randrange(4096, largest)
            process = self.start(*self.build_words(folder, "--workers", "0"), file_bytes=limit)
            process.join(self.deadline_s)
            self.require(process.exitcode in (1, 75), f"full disk ended with {process.exitcode}")
            check_whole(folder)
            self.faults["disk full"] += 1
            self.run(*self.build_words(folder, "--workers", "0"))
            self.compare(folder)


def tars_of(folder: BuildFolder) -> dict[str, str]:
    """SHA-256 of every file of the shards."""
    return {
        path.name: sha256_file(path) for path in sorted(folder.shards.iterdir()) if ".tmp-" not in path.name
    }


def check_whole(folder: BuildFolder) -> None:
    """Whatever has its final name is whole."""
    for path in files_below(folder.root) if is_remote(folder.root) else folder.root.rglob("*.json"):
        if path.suffix == ".json":
            json.loads(path.read_bytes())
    for tar in folder.shards.glob("*.tar"):
        assert not sidecar(tar).is_file() or read_json(sidecar(tar))["sha256"] == sha256_file(tar), tar


def workers_of(driver: int) -> list[int]:
    """Process ids of the Ray workers below a driver."""
    workers = list[int]()
    for process in processes_below(driver):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::_Worker"):
                workers.append(process)
    return workers


def main() -> None:
    """Do the whole drill and print the count of faults."""
    asked = make_parser().parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="drill-") as root:
        drill = Drill(Path(root), asked.seed)
        for fault, times in (
            (drill.kill_drivers, asked.driver_kills),
            (partial(drill.kill_drivers, number=signal.SIGTERM), asked.stops),
            (drill.tear, asked.tears),
            (drill.fill_disk, asked.disks),
            (drill.kill_workers, asked.worker_kills),
            (lambda times: [drill.stop_with_workers() for _ in range(times)], asked.stops_on_ray),
            (lambda times: [drill.lose_node() for _ in range(times)], asked.nodes),
        ):
            before = Counter(drill.faults)
            fault(times)
            for name, count in (drill.faults - before).items():
                print(f"{name:<16} {count:4} injected, {count:4} survived", flush=True)
    print(f"seed {asked.seed}, {time.perf_counter() - started:.0f} s; every build ended with the same bytes")


def make_parser() -> argparse.ArgumentParser:
    """The options of the drill."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    for name, count in {
        "driver-kills": 50,
        "stops": 8,
        "worker-kills": 10,
        "tears": 30,
        "disks": 5,
        "stops-on-ray": 1,
        "nodes": 1,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    return parser


if __name__ == "__main__":
    main()
