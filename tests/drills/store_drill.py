"""Faults on purpose, at an object store: drivers and workers are killed while the store fails now and then.

    python tests/drills/store_drill.py [--seed 0] [--driver-kills 18] [--worker-kills 12] [--record]

Every build goes to a server on loopback, which answers one request of `EVERY` with one of `KINDS`. Each build must end
with the bytes of an undisturbed one on a disk: no sample lost, and none doubled.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from hierarchy_builder.files.paths import a_folder
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.shards import read_shard

sys.path.extend(str(Path(__file__).resolve().parents[2] / part) for part in (".", "tests/support"))
from drill import STAGES, Drill
from object_store import ENVIRONMENT, Door, Store, refused, served

from benchmarks import records

EVERY = 40
READ_TIMEOUT_S = 3
KINDS = {
    "500 InternalError": "an upload is read to its half",
    "503 SlowDown": "an upload is read to its half",
    "torn": "the connection ends in the middle of the request",
    "lost answer": "the store does what was asked, and the connection ends before its answer",
    "slow": "the answer comes after a second",
    "timeout": f"no answer within the {READ_TIMEOUT_S} s that the client waits",
}


class Shaky(Door):
    """The door of a store that fails now and then."""

    def __init__(self, store: Any, seed: int) -> None:
        super().__init__(store)
        self.random, self.done, self.is_open = random.Random(seed), Counter[str](), threading.Event()

    def __call__(self, environ: dict[str, Any], start: Any) -> Any:
        with self.lock:
            kind = self.random.choice([*KINDS]) if self.random.random() < 1 / EVERY else ""
            self.done[kind] += 1
        if kind[:1] == "5":
            return refused(environ, start, f"{kind[:3]} Error", kind[4:])
        if kind in ("slow", "timeout"):
            self.is_open.wait(1 if kind == "slow" else READ_TIMEOUT_S + 1)
        elif kind == "lost answer":
            list(self.store(environ, lambda *words: None))
        elif kind == "torn":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
        if kind in ("torn", "lost answer"):
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError
        return self.store(environ, start)


class StoreDrill(Drill):
    """The drill with builds at URLs."""

    gives_up = frozenset((75,))
    deadline_s = 900

    def __init__(self, root: Path, seed: int, per_class: int, store: Store, endpoint: str) -> None:
        self.bucket, self.endpoint, self.numbers = store.bucket("drill"), endpoint, itertools.count()
        self.builds = self.samples = 0
        super().__init__(root, seed, per_class)
        folder = self.folder()
        for stage in STAGES:
            started = time.perf_counter()
            while not self._one_try(folder, stage, 9, "", is_last=True):
                pass
            self.seconds[stage] = time.perf_counter() - started
        self.compare(folder)

    def folder(self) -> BuildFolder:
        """A new place in the bucket."""
        return BuildFolder(a_folder(f"{self.bucket}/{next(self.numbers):03d}"))

    def environment(self) -> dict[str, str]:
        """The commands meet the faults, and the checks of this process do not."""
        patient = json.dumps({"config_kwargs": {"read_timeout": READ_TIMEOUT_S}})
        of_store = {**ENVIRONMENT, "AWS_ENDPOINT_URL": self.endpoint, "FSSPEC_S3": patient}
        return {**super().environment(), **of_store}

    def compare(self, folder: BuildFolder) -> None:
        """What the drill compares, and the count of what was compared."""
        super().compare(folder)
        self.builds += 1
        self.samples += sum(1 for tar in folder.shards.glob("*.tar") for _ in read_shard(tar))


def make_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--driver-kills", type=int, default=18)
    parser.add_argument("--worker-kills", type=int, default=12)
    records.add_option(parser)
    return parser


def main() -> None:
    """Do the drill and print what was injected."""
    asked = make_parser().parse_args()
    started = time.perf_counter()
    with served() as store, tempfile.TemporaryDirectory(prefix="drill-") as root:
        shaky = Shaky(store.door.store, asked.seed)
        with store.also_through(shaky) as endpoint:
            drill = StoreDrill(Path(root), asked.seed, 8, store, endpoint)
            drill.kill_drivers(asked.driver_kills)
            drill.kill_workers(asked.worker_kills)
    columns = ["fault", "injected"]
    rows = [
        [
            "SIGKILL of the driver at a random moment of extract, cluster or shard",
            drill.faults["driver killed"],
        ],
        ["SIGKILL of a Ray worker in a unit", drill.faults["worker killed"]],
        *([f"{kind}: {about}", shaky.done[kind]] for kind, about in KINDS.items()),
        ["requests without a fault", shaky.done[""]],
        ["builds with the bytes of an undisturbed one on a disk", drill.builds],
        ["samples in them; lost, doubled", f"{drill.samples:,}; 0, 0"],
    ]
    for row in rows:
        print(": ".join(map(str, row)))
    print(f"seed {asked.seed}, {time.perf_counter() - started:.0f} s")
    records.write(
        asked.record,
        columns=columns,
        rows=[[a, f"{b:,}" if isinstance(b, int) else b] for a, b in rows],
        seeds=[asked.seed],
    )


if __name__ == "__main__":
    main()
