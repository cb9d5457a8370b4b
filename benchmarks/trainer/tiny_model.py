"""Photographs → shards → a small network → its figures, over several seeds.

    python -m benchmarks.trainer.tiny_model PHOTOS --record caltech

Every fifth photograph of a class, by name, is held out and judges the samples. Runs the command lines that a user would
run: two builds, then training and evaluation for each seed.
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

from benchmarks import records

HELD_OUT = 5
"""One of so many photographs is kept from the network."""
METRICS = {
    **{f"variety_{level}": f"variety of level {level}" for level in range(4)},
    "precision": "precision",
    "recall": "recall",
    "precision_real": "precision of one half of the held-out photographs against the other",
    "recall_real": "recall, likewise",
    "class_mean_accuracy": "class accuracy of samples",
    "class_mean_accuracy_real": "class accuracy of held-out photographs",
    "frechet_tokens_3": "Fréchet distance of tokens, last level",
    "frechet_tokens_3_real": "Fréchet distance of tokens, of the two halves",
    "roughness": "roughness of level 0 (a teacher's canvas has 0)",
    "flatness": "flatness of level 0 (a teacher's canvas has 1)",
    "seconds": "seconds of training",
}
"""Names that `trainer evaluate` prints, and the rows of the table."""


def main() -> None:
    options = make_parser().parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        build, pictures = Path(scratch) / "build", Path(scratch) / "photos"
        split_photographs(Path(options.photos), pictures)
        for split in ("train", "val"):
            made = [
                "hierarchy-builder",
                "build",
                str(pictures / split),
                "--encoder",
                options.encoder,
                "--images",
            ]
            run([*made, "--split", split, "--workers", str(options.workers), "--out", str(build / split)])
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


def split_photographs(photos: Path, out: Path) -> None:
    """Link the photographs of class folders, in folders of the same names in `train` and `val`."""
    for folder in sorted(path for path in photos.iterdir() if path.is_dir()):
        for number, photo in enumerate(sorted(folder.iterdir())):
            split = "val" if number % HELD_OUT == HELD_OUT - 1 else "train"
            target = out / split / folder.name / photo.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.is_symlink():
                target.symlink_to(photo.resolve())


def figures(build: Path, out: Path, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train one network and evaluate it: the metrics by name, and the seconds of training."""
    start = time.monotonic()
    preset = ["--preset", options.preset, "--seed", str(seed), *options.train]
    run(["trainer", "train", str(build / "train"), "--out", str(out), *preset])
    seconds = time.monotonic() - start
    printed = run(["trainer", "evaluate", str(out), "--shards", str(build), "--json", *options.evaluate])
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
        (options.keep / f"{seed}.json").write_text(printed)
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
    parser.add_argument("photos", help="a folder of class folders")
    parser.add_argument("--encoder", default="dct")
    parser.add_argument("--preset", default="tiny-cpu")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0")
    parser.add_argument("--workers", type=int, default=2, help="workers of the build")
    parser.add_argument("--train", type=shlex.split, default=[], help="further options of `trainer train`")
    parser.add_argument(
        "--evaluate", type=shlex.split, default=[], help="further options of `trainer evaluate`"
    )
    parser.add_argument("--scratch", help="folder for what is built and removed; the system's by default")
    parser.add_argument("--keep", type=Path, help="folder for what `evaluate` prints of each seed, SEED.json")
    records.add_option(parser)
    return parser


if __name__ == "__main__":
    main()
