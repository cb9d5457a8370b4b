"""What starting Ray costs: a build that has next to no work, in its process and on two workers of a local Ray.

    python -m benchmarks.builder.ray_start

`RAY_START_S` of `hierarchy_builder/build/workers.py` stands for this: a small build leaves its process for Ray only
where that pays. The 16 images are noise, in units of 4, so that nearly all the difference is starting. The medians over
repeats are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import records

STAGES = ("extract", "cluster", "shard")
WORKERS = (0, 2)


def main() -> None:
    arguments = make_parser().parse_args()
    seconds: dict[int, list[dict[str, float]]] = {workers: [] for workers in WORKERS}
    with tempfile.TemporaryDirectory() as place:
        photos = draw_images(Path(place) / "photos")
        build(photos, Path(place) / "first", 0)  # compiles what the others load
        for number in range(arguments.repeats):
            for workers in WORKERS:
                seconds[workers].append(build(photos, Path(place) / f"{number}-{workers}", workers))
    rows = []
    for stage in STAGES:
        here, ray = (statistics.median(run[stage] for run in seconds[workers]) for workers in WORKERS)
        rows.append([stage, f"{here:.1f}", f"{ray:.1f}", f"{ray - here:.1f}"])
        print(" | ".join(rows[-1]), flush=True)
    columns = ["stage", "seconds in the process", "seconds on Ray, two workers", "longer by"]
    figures = {f"workers {workers}": runs for workers, runs in seconds.items()}
    records.write(arguments.record, columns=columns, rows=rows, figures=figures)


def draw_images(folder: Path) -> Path:
    """16 images of noise in two classes."""
    random = np.random.default_rng(0)
    for number in range(16):
        path = folder / ("a", "b")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    return folder


def build(photos: Path, out: Path, workers: int) -> dict[str, float]:
    """Seconds of each stage of a build in a process of its own."""
    words = [
        "build",
        photos,
        "--out",
        out,
        "--encoder",
        "dct",
        "--block-rows",
        "4",
        "--samples-per-shard",
        "4",
    ]
    command = [
        sys.executable,
        "-m",
        "hierarchy_builder",
        *words,
        "--workers",
        str(workers),
        "--json",
        "--quiet",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return {row["stage"]: row["seconds"] for row in json.loads(done.stdout)}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    records.add_option(parser)
    return parser


if __name__ == "__main__":
    main()
