"""Photographs → shards → a small network → its figures, over several seeds.

    python benchmarks/tiny_model.py PHOTOS --record caltech

Runs the command lines that a user would run: one build, then training and evaluation for each seed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import records

METRICS = {
    "class_mean_accuracy": "class accuracy of samples",
    "class_mean_accuracy_real": "class accuracy of held-out photographs",
    "roughness": "roughness of level 0 (a teacher's canvas has 0)",
    "flatness": "flatness of level 0 (a teacher's canvas has 1)",
    "frechet_tokens_3": "Fréchet distance of tokens, last level",
    "precision": "precision",
    "recall": "recall",
}
"""Names that `trainer evaluate` prints, and the rows of the table."""


def main() -> None:
    options = make_parser().parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        build = Path(scratch) / "build"
        made = ["hierarchy-builder", "build", options.photos, "--encoder", options.encoder, "--images"]
        run([*made, "--workers", str(options.workers), "--out", str(build)])
        found = [
            figures(build, Path(scratch) / f"run-{seed}", seed, options) for seed in range(options.seeds)
        ]
    names = [name for name in METRICS if all(name in each for each in found)]
    rows = [[METRICS[name], *(f"{each[name]:.3g}" for each in found)] for name in names]
    for row in rows:
        print(*row, sep="\t")
    records.write(
        options.record,
        columns=["", *(f"seed {seed}" for seed in range(options.seeds))],
        rows=rows,
        seeds=range(options.seeds),
        figures={str(seed): each for seed, each in enumerate(found)},
    )


def figures(build: Path, out: Path, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train one network and evaluate it: the metrics by name, and the seconds of training."""
    start = time.monotonic()
    preset = ["--preset", options.preset, "--seed", str(seed), *options.train]
    run(["trainer", "train", str(build), "--out", str(out), *preset])
    seconds = time.monotonic() - start
    printed = run(["trainer", "evaluate", str(out), "--shards", str(build), "--json", *options.evaluate])
    return {row["name"]: row["value"] for row in json.loads(printed)} | {"seconds": seconds}


def run(command: list[str]) -> str:
    """What a command prints on stdout; its progress goes to stderr."""
    print("$", shlex.join(command), file=sys.stderr, flush=True)
    module = {"hierarchy-builder": "hierarchy_builder.cli", "trainer": "trainer.cli"}[command[0]]
    line = [sys.executable, "-m", module, *command[1:]]
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", help="a folder of class folders, or any other source that a build takes")
    parser.add_argument("--encoder", default="dct")
    parser.add_argument("--preset", default="tiny-cpu")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0")
    parser.add_argument("--workers", type=int, default=2, help="workers of the build")
    parser.add_argument("--train", type=shlex.split, default=[], help="further options of `trainer train`")
    parser.add_argument(
        "--evaluate", type=shlex.split, default=[], help="further options of `trainer evaluate`"
    )
    parser.add_argument("--scratch", help="folder for what is built and removed; the system's by default")
    records.add_option(parser)
    return parser


if __name__ == "__main__":
    main()
