"""How many requests the verbs of the builder make of an object store, counted by an S3 server on loopback.

    python -m benchmarks.builder.store_requests [--images 300] [--before CHECKOUT] [--record]

The build has units of 10 photographs, so that a few hundred of them make many units.
--before counts the same with the packages of another checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import records

sys.path.append(str(records.ROOT / "tests" / "support"))
from command_line import cli
from object_store import Store, served
from pictures import CLASSES, write_tree

UNIT = 10
WORDS = (
    "--encoder",
    "dct",
    "--block-rows",
    UNIT,
    "--batch-size",
    UNIT,
    "--samples-per-shard",
    UNIT,
    "--workers",
    0,
)


def counted(images: int) -> dict[str, int]:
    """Requests of each verb, in the order in which they are called."""
    with served() as store, tempfile.TemporaryDirectory() as folder:
        photos = write_tree(Path(folder) / "photos", images // len(CLASSES))
        url = f"{store.bucket('counted')}/build"
        verbs = {
            "`build`": ("build", photos, "--out", url, *WORDS),
            "`build` again, with nothing to do": ("build", photos, "--out", url, *WORDS),
            "`status`": ("status", url),
            "`verify`": ("verify", url),
        }
        return {name: of_one(store, *words) for name, words in verbs.items()}


def of_one(store: Store, *words: object) -> int:
    """Requests of one command."""
    store.door.requests.clear()
    ended = cli("hierarchy-builder", *words)
    assert ended.code == 0, ended.err
    return len(store.door.requests)


def make_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--before", metavar="CHECKOUT")
    parser.add_argument("--json", action="store_true", help="print the counts alone")
    records.add_option(parser)
    return parser


def main() -> None:
    """Count and print."""
    asked = make_parser().parse_args()
    now = counted(asked.images)
    if asked.json:
        print(json.dumps(now))
        return
    units = -(-asked.images // UNIT)
    columns = [f"{asked.images} photographs, {units} blocks, {units} tars", "requests"]
    rows = [[name, f"{count:,}"] for name, count in now.items()]
    if asked.before:
        again = [sys.executable, __file__, "--json", "--images", str(asked.images)]
        environment = {**os.environ, "PYTHONPATH": asked.before}
        done = subprocess.run(again, env=environment, check=True, capture_output=True, text=True)
        before = json.loads(done.stdout.splitlines()[-1])
        head = ["git", "-C", asked.before, "rev-parse", "--short=8", "HEAD"]
        commit = subprocess.run(head, check=True, capture_output=True, text=True).stdout.strip()
        columns.insert(1, f"at commit `{commit}`")
        rows = [[name, f"{before[name]:,}", count] for name, count in rows]
    for row in rows:
        print("  ".join(row))
    commands = [
        f"python -m benchmarks.builder.store_requests --images {asked.images} --before CHECKOUT --record"
    ]
    records.write(asked.record, columns=columns, rows=rows, commands=commands if asked.before else None)


if __name__ == "__main__":
    main()
