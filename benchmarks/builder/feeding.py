"""Three ways to feed an encoder on the same number of cores: images/s of reading, encoding and handing over features.

    python -m benchmarks.builder.feeding IMAGES --encoder onnx:vit_small_9.onnx --images 512

- every worker reads, encodes and writes: the way on machines without GPUs
- other processes encode: `--encoding-workers`, fed by workers that read and write
- Ray Data: tasks that read, decode and crop, and a pool of actors that encode; its features are dropped, not written

Without a GPU the encoder takes the cores that the readers could have, so this shows what handing over costs, and not
what other nodes would bring. Steady counts from the first finished unit, or the first batch of Ray Data. Rounds
alternate between the ways, and medians are shown.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import records
from benchmarks.builder.build import Timed
from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build import workers as pools
from hierarchy_builder.build.session import Session
from hierarchy_builder.build.stages import asked_encoder
from hierarchy_builder.config import ExtractConfig
from hierarchy_builder.encoders import encode
from hierarchy_builder.images.sources import open_source
from hierarchy_builder.store.folder import BuildFolder

BATCH = 16


def main() -> None:
    arguments = make_parser().parse_args()
    cores = arguments.cores
    ways = {
        f"{cores} workers that read, encode and write": partial(
            extracted, pools.Workers(count=cores, encoding=0)
        ),
        f"{cores - 1} that read and write, 1 that encodes": partial(
            extracted, pools.Workers(count=cores - 1, encoding=1)
        ),
        "Ray Data: tasks that read, 1 actor that encodes; nothing is written": by_ray_data,
    }
    rounds = [{name: way(arguments) for name, way in ways.items()} for _ in range(arguments.rounds)]
    rows = []
    for name in ways:
        steady, total = (statistics.median(row[name][place] for row in rounds) for place in (0, 1))
        rows.append([name, f"{steady:.1f}", f"{total:.1f}"])
        print(" | ".join(rows[-1]), flush=True)
    columns = ["way", "images/s, steady", "with the start of Ray"]
    figures = {"rounds": rounds, "images": arguments.images, "batch": BATCH}
    records.write(arguments.record, columns=columns, rows=rows, figures=figures)


def listing(arguments: argparse.Namespace, place: str) -> str:
    """A table of the first images."""
    found = open_source(arguments.source).records[: arguments.images]
    path = Path(place) / "list.csv"
    lines = (f"{Path(arguments.source).resolve() / record.path},{record.class_name}" for record in found)
    path.write_text("path,class\n" + "\n".join(lines) + "\n")
    return str(path)


def extracted(workers: pools.Workers, arguments: argparse.Namespace) -> tuple[float, float]:
    """Images per second of the stage `extract`, steady and with the start of Ray."""
    config = ExtractConfig(encoder=arguments.encoder, block_rows=arguments.block, batch_size=BATCH)
    reporter = Timed()
    with tempfile.TemporaryDirectory() as place:
        started = time.perf_counter()
        folder, session = BuildFolder(Path(place) / "out"), Session(workers=workers, reporter=reporter)
        steps.extract(folder, listing(arguments, place), config, session)
        pools.shutdown()
    return _rates(started, reporter.stages[0])


def by_ray_data(arguments: argparse.Namespace) -> tuple[float, float]:
    """The same of Ray Data's streaming executor."""
    import ray

    config = ExtractConfig(encoder=arguments.encoder)
    size = asked_encoder(config).image_size_px
    with tempfile.TemporaryDirectory() as place:
        source = listing(arguments, place)
        paths = [{"path": record.path} for record in open_source(source).records]
        started = time.perf_counter()
        pools.start_local(num_cpus=arguments.cores, log_to_driver=False)
        data = (
            ray.data.from_items(paths)
            .map(partial(read_crop, source, size), num_cpus=1)
            .map_batches(Encode, fn_constructor_args=(config,), batch_size=BATCH, concurrency=1, num_cpus=1)
        )
        events = []
        for batch in data.iter_batches(batch_size=BATCH):
            events.append((time.perf_counter(), len(batch["features"])))
        pools.shutdown()
    return _rates(started, events)


def read_crop(source: str, size: int, row: dict[str, Any]) -> dict[str, Any]:
    """Read, decode and crop an image."""
    from hierarchy_builder.images.decoding import crop_square, decode_image
    from hierarchy_builder.images.sources import open_reader

    image, _ = decode_image(open_reader(source).read(row["path"]), 10**9)
    return {"crop": crop_square(image, size)}


class Encode:
    """An actor of Ray Data."""

    def __init__(self, config: ExtractConfig) -> None:
        self.encoder = asked_encoder(config)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        features = encode(self.encoder, np.ascontiguousarray(batch["crop"]), half=True)
        return {"features": features.astype(np.float16)}


def _rates(started: float, events: list[tuple[float, int]]) -> tuple[float, float]:
    total, (first, done) = sum(images for _, images in events), events[0]
    return (total - done) / (events[-1][0] - first), total / (events[-1][0] - started)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="IMAGES", help="folder of class folders")
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--block", type=int, default=32, help="images of a unit")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    records.add_option(parser)
    return parser


if __name__ == "__main__":
    main()
