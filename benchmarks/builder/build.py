"""Time a build with an encoder that costs next to nothing: what is left is reading, dividing and writing.

    python -m benchmarks.builder.build IMAGES --workers 1 2 --rounds 3 images/s, steady and with start-up, and the ratio
    python -m benchmarks.builder.build IMAGES --shares                 CPU ms per image of every step, one thread
    python -m benchmarks.builder.build --memory 1000 20000             peak memory of builds of drawn images

A run with W workers may use W cores (0 works in one process, on all). Steady counts from the moment each worker has
done its first unit. Rounds alternate between the runs and medians are printed, since other load comes and goes; one
line of JSON at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import records
from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build import workers as pools
from hierarchy_builder.build.session import Session
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig
from hierarchy_builder.progress import Meter, Reporter
from hierarchy_builder.store.folder import BuildFolder

ENCODER = "benchmarks.builder.pixel_encoder:load"
DISTINCT = 200
"""Drawn images of the memory test; the others are further names of the same files."""


class Timed(Reporter):
    """Says nothing, and notes when how many images were done, stage by stage."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.stages: list[list[tuple[float, int]]] = []

    @contextlib.contextmanager
    def stage(self, name: str, total: int, done: int = 0, live: Path | None = None) -> Iterator[Meter]:
        events: list[tuple[float, int]] = []
        self.stages.append(events)

        class Noted(Meter):
            def advance(self, images: int, failed: int = 0) -> None:
                super().advance(images, failed)
                events.append((time.perf_counter(), images))

        yield Noted(name, total - done)


def run(images: str, workers: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Build once; returns images/s, steady and with start-up, and CPU ms per image of this process."""
    plan = steps.BuildPlan(
        extract=ExtractConfig(encoder=ENCODER, block_rows=arguments.block, batch_size=arguments.batch),
        hierarchy=HierarchyRecipe.paper(),
        shard=ShardConfig(samples_per_shard=arguments.block),
    )
    reporter, cores = Timed(), os.sched_getaffinity(0)
    session = Session(workers=pools.Workers(count=workers), reporter=reporter)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        os.sched_setaffinity(0, sorted(cores)[: workers or len(cores)])
        started, used = time.perf_counter(), time.process_time()
        steps.build(BuildFolder(Path(scratch) / "out"), images, plan, session, fused=not arguments.staged)
        seconds, used = time.perf_counter() - started, time.process_time() - used
        pools.shutdown()
        os.sched_setaffinity(0, cores)
    per_image = sum(_seconds_per_image(events, max(1, workers)) for events in reporter.stages)
    total = sum(images for _, images in reporter.stages[0])
    return {"steady": 1 / per_image, "total": total / seconds, "cpu_ms": 1e3 * used / total}


def _seconds_per_image(events: list[tuple[float, int]], skipped: int) -> float:
    counted = events[skipped:]
    return (events[-1][0] - events[skipped - 1][0]) / sum(images for _, images in counted)


def compare_workers(arguments: argparse.Namespace) -> dict[str, Any]:
    run(arguments.images, 0, arguments)  # compile, fill the page cache
    alone = run(arguments.images, 0, arguments)
    rounds = [
        {count: run(arguments.images, count, arguments) for count in arguments.workers}
        for _ in range(arguments.rounds)
    ]
    found = {
        count: {name: statistics.median(row[count][name] for row in rounds) for name in ("steady", "total")}
        for count in arguments.workers
    }
    print(
        f"{'by stages' if arguments.staged else 'one pass'}, 16×16×768, {arguments.rounds} rounds; images/s"
    )
    for count, rates in found.items():
        best = max(row[count]["steady"] for row in rounds)
        print(
            f"{count} workers   steady {rates['steady']:6.1f} (best {best:6.1f})   with start-up {rates['total']:6.1f}"
        )
    first, last = arguments.workers[0], arguments.workers[-1]
    ratio = statistics.median(row[last]["steady"] / row[first]["steady"] for row in rounds)
    print(f"{first} → {last} workers: {ratio:.2f} times as fast (median of rounds)")
    print(f"in one process {alone['cpu_ms']:.2f} ms of CPU an image, all threads and start-up")
    rows = [
        [f"images per second, {n} workers, steady", f"{rates['steady']:.0f}"] for n, rates in found.items()
    ]
    rows += [
        [f"images per second, {n} workers, with the start", f"{rates['total']:.0f}"]
        for n, rates in found.items()
    ]
    rows.append([f"{first} → {last} workers: speed-up", f"{ratio:.2f}"])
    rows.append(["CPU time an image, one process, with the start", f"{alone['cpu_ms']:.2f} ms"])
    records.write(
        arguments.record,
        columns=["measurement", "value"],
        rows=rows,
        figures={"rates": found, "ratio": ratio, "cpu_ms": alone["cpu_ms"]},
    )
    return {"rates": found, "ratio": ratio, "cpu_ms": alone["cpu_ms"]}


def shares(arguments: argparse.Namespace) -> dict[str, float]:
    """CPU milliseconds per image of every step of a unit, one after another on one thread."""
    import torch

    from benchmarks.builder.pixel_encoder import load
    from hierarchy_builder.encoders.encoding import finite_rows
    from hierarchy_builder.hierarchy.recipe import build_hierarchy
    from hierarchy_builder.images.decoding import crop_square, decode_image
    from hierarchy_builder.images.sources import open_source
    from hierarchy_builder.store.samples import FACTS, make_sample
    from hierarchy_builder.store.shards import TarWriter, encode_sample
    from hierarchy_builder.store.statistics import moments_of

    torch.set_num_threads(1)
    source, encoder, config = open_source(arguments.images), load(), ShardConfig()
    records = source.records[:: max(1, len(source.records) // 256)][:256]
    facts = dict.fromkeys(FACTS, 1)
    totals: dict[str, float] = {}
    kept: list[np.ndarray] = []

    def timed(name: str, call: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = call()
        totals[name] = totals.get(name, 0.0) + time.process_time() - started
        return result

    def unit(some: list[Any], file: Any) -> None:
        data = timed("read", lambda: [source.read(record.path) for record in some])
        pictures = timed("decode", lambda: [decode_image(content)[0] for content in data])
        crops = timed("resize and crop", lambda: np.stack([crop_square(p, 224) for p in pictures]))
        values = timed("encode", lambda: encoder.encode(crops))
        features = timed("to float16, check", lambda: values.astype(np.float16))
        timed("to float16, check", lambda: finite_rows(features))
        tree = timed("hierarchy", lambda: build_hierarchy(features, HierarchyRecipe.paper(), threads=1))
        rows = [
            {"features": features[n], "regions": tree.regions[n], "flags": tree.flags[n]}
            for n in range(len(some))
        ]
        samples = timed(
            "sample to bytes",
            lambda: [
                encode_sample(make_sample(record, facts, row, config))
                for record, row in zip(some, rows, strict=True)
            ],
        )
        writer = TarWriter(file)
        timed("write and sha256", lambda: [writer.add(str(n), sample) for n, sample in enumerate(samples)])
        timed("write and sha256", lambda: os.fsync(file.fileno()))
        kept.append(features)

    with tempfile.TemporaryFile(dir=arguments.scratch) as file:
        unit(records[:32], file)
        totals.clear()
        kept.clear()
        for start in range(0, len(records), 32):
            unit(records[start : start + 32], file)
    block = np.concatenate(kept)  # of as many images at once as there are, as of a unit
    timed("statistics", lambda: moments_of(block))
    found = {name: 1e3 * seconds / len(records) for name, seconds in totals.items()}
    for name, ms in sorted(found.items(), key=lambda item: -item[1]):
        print(f"{name:18} {ms:6.3f} ms   {ms / sum(found.values()):6.1%}")
    print(f"{'together':18} {sum(found.values()):6.3f} ms an image and core")
    return found


def measure_memory(arguments: argparse.Namespace) -> dict[int, float]:
    """Peak MiB of a process that builds so many drawn images, each count in a process of its own."""
    found = {}
    for count in arguments.memory:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            photos = draw(Path(scratch) / "photos", count)
            command = [
                sys.executable,
                "-m",
                "benchmarks.builder.build",
                str(photos),
                "--scratch",
                scratch,
                "--once",
            ]
            command += ["--block", str(arguments.block), *(["--staged"] if arguments.staged else [])]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[count] = json.loads(told)["peak_mib"]
        print(f"{count:7,} images: peak {found[count]:7.1f} MiB", flush=True)
    records.write(
        arguments.record,
        columns=["drawn images", "peak memory of one process, MiB"],
        rows=[[f"{count:,}", f"{peak:.0f}"] for count, peak in found.items()],
        seeds=[0],
        figures={"peak_mib": found},
    )
    return found


def draw(folder: Path, count: int) -> Path:
    """`count` JPEGs of 256×320 pixels in 10 classes, smooth noise."""
    random = np.random.default_rng(0)
    drawn: list[bytes] = []
    for _ in range(min(count, DISTINCT)):
        coarse = Image.fromarray(random.integers(0, 256, (20, 16, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((256, 320), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        drawn.append(buffer.getvalue())
    for number in range(count):
        path = folder / f"class-{number % 10}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < len(drawn):
            path.write_bytes(drawn[number])
        else:
            os.link(folder / f"class-{number % 10}" / f"{number % DISTINCT:06d}.jpg", path)
    return folder


def main() -> None:
    parser = make_parser()
    arguments = parser.parse_args()
    places = [str(records.ROOT), os.environ.get("PYTHONPATH")]  # where workers find the encoder
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    if arguments.memory:
        print(json.dumps(measure_memory(arguments)))
    elif arguments.images is None:
        parser.error("IMAGES is missing")
    elif arguments.once:
        run(arguments.images, 0, arguments)
        print(json.dumps({"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
    elif arguments.shares:
        print(json.dumps(shares(arguments)))
    else:
        print(json.dumps(compare_workers(arguments)))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="?", help="any source a build takes")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--block", type=int, default=50, help="images in a unit, and in a shard")
    parser.add_argument("--batch", type=int, default=16, help="images in one evaluation of the encoder")
    parser.add_argument("--staged", action="store_true", help="stage by stage instead of in one pass")
    parser.add_argument("--shares", action="store_true")
    parser.add_argument("--memory", type=int, nargs="+")
    parser.add_argument("--scratch", default=None, help="folder for what is built and removed")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    records.add_option(parser)
    return parser


if __name__ == "__main__":
    main()
