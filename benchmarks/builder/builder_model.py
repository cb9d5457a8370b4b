"""What one GPU and its cores would reach from images to shards: a queueing model fed with measured times.

    python -m benchmarks.builder.builder_model --record builder_model

Every step of a unit is measured here, in processor milliseconds of one core an image, on drawn photographs of
ImageNet's size (500×375 pixels, about 110 kB). The time of the GPU is the prediction of benchmarks/gpu.py. The model
then runs the threads of `build --fused` on a simulated clock: in each worker, threads of a pool that load images and
divide batches, a thread that writes, and batches on the device; all workers share cores and GPU. It is deterministic:
every image takes the mean time. Not in it: the lock of Python's interpreter, the bandwidth of memory and disk, and the
cores being faster or slower than those that measured.
"""

from __future__ import annotations

import argparse
import heapq
import tempfile
import time
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import records
from hierarchy_builder.build.workers import threads_per_worker

UNIT, BATCH = 1024, 128
"""Images of a unit and of a batch, as a build takes them on a GPU."""
ENCODE_MS = 1e3 / 6363
"""DINOv2-B in bfloat16, see `encoder: DINOv2-B bfloat16 eager, 128 images` in benchmarks/gpu.py."""
HANDING_MS = 0.03
"""Of the thread that gives a batch to the GPU: crops into one array and into page-locked memory."""
CORES = 16
ROUNDS = 5
"""Times that every step is measured; the shortest counts, since other work runs on a machine."""
TAILS = {
    "alone": "on one thread after each unit",
    "spread": "on all threads after each unit",
    "beside": "on one thread beside the next unit",
}
PLACES = 256
"""Tokens of an image, whose statistics the threads share."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Processor milliseconds of an image on one core, and milliseconds of the GPU."""

    load: float
    divide: float
    write: float
    tail: float
    encode: float = ENCODE_MS

    @property
    def core(self) -> float:
        """All of one image's time on cores."""
        return self.load + HANDING_MS + self.divide + self.write + self.tail


@dataclass
class Resource:
    """Some equal places, taken in the order of asking."""

    places: int
    waiting: deque[tuple[Generator[Any, Any, None], float]] = field(default_factory=deque)


class Event:
    """Happens once; processes wait for it."""

    def __init__(self) -> None:
        self.done, self.waiting = False, list[Generator[Any, Any, None]]()


class Clock:
    """Runs processes: generators that yield (resource, milliseconds) to use it, or an event to wait for."""

    def __init__(self) -> None:
        self.now, self._turn, self._heap = 0.0, count(), list[Any]()

    def start(self, process: Generator[Any, Any, None]) -> None:
        """Begin a process."""
        try:
            wish = next(process)
        except StopIteration:
            return
        if isinstance(wish, Event):
            if wish.done:
                self.start(process)
            else:
                wish.waiting.append(process)
            return
        resource, milliseconds = wish
        resource.waiting.append((process, milliseconds))
        self._serve(resource)

    def happen(self, event: Event) -> None:
        """Let an event happen, and go on with who waited for it."""
        event.done = True
        for process in event.waiting:
            self.start(process)

    def run(self) -> None:
        """Run until nothing is left to do."""
        while self._heap:
            self.now, _, resource, process = heapq.heappop(self._heap)
            resource.places += 1
            self.start(process)
            self._serve(resource)

    def _serve(self, resource: Resource) -> None:
        while resource.places and resource.waiting:
            process, milliseconds = resource.waiting.popleft()
            resource.places -= 1
            heapq.heappush(self._heap, (self.now + milliseconds, next(self._turn), resource, process))


class Worker:
    """One worker of `build --fused`: a pool of threads, a thread that writes, and batches on the device."""

    def __init__(
        self,
        clock: Clock,
        cores: Resource,
        gpu: Resource,
        costs: Costs,
        threads: int,
        at_once: int,
        tail: str,
    ) -> None:
        self.clock, self.cores, self.gpu, self.costs = clock, cores, gpu, costs
        self.pool, self.device, self.tail = Resource(threads), at_once, tail
        self.ended: list[float] = []

    def units(self, number: int, after: float) -> Generator[Any, Any, None]:
        """The thread that writes: it asks for images, batches and divided batches as `ahead` does."""
        yield Resource(1), after
        before: Event | None = None
        for _ in range(number):
            loads: deque[Event] = deque()
            encodes: deque[Event] = deque()
            divides: deque[Event] = deque()
            asked = 0
            for _ in range(UNIT // BATCH):
                while asked < UNIT and len(loads) < 3 * BATCH:
                    loads.append(self._in_pool(self.costs.load))
                    asked += 1
                for _ in range(BATCH):
                    yield loads.popleft()
                encodes.append(self._on_device())
                if len(encodes) > self.device:
                    yield encodes.popleft()
                    divides.append(self._in_pool(BATCH * self.costs.divide))
                if len(divides) > 2:
                    yield divides.popleft()
                    yield self.cores, BATCH * self.costs.write
            for encoded in encodes:
                yield encoded
                divides.append(self._in_pool(BATCH * self.costs.divide))
            for divided in divides:
                yield divided
                yield self.cores, BATCH * self.costs.write
            if before is not None:
                yield before
            before = self._statistics()
            if self.tail != "beside":
                yield before

    def _in_pool(self, milliseconds: float) -> Event:
        """Work of one thread of the pool, which needs a core as well."""
        done = Event()

        def task() -> Generator[Any, Any, None]:
            yield self.pool, 0.0
            self.pool.places -= 1  # held until the work is done
            yield self.cores, milliseconds
            self.pool.places += 1
            self.clock.happen(done)
            self.clock._serve(self.pool)

        self.clock.start(task())
        return done

    def _statistics(self) -> Event:
        """The statistics of a unit: `alone` on the thread that writes, or `spread` over the pool."""
        done, milliseconds = Event(), UNIT * self.costs.tail

        def task() -> Generator[Any, Any, None]:
            if self.tail == "spread":
                yield from [self._in_pool(milliseconds / PLACES) for _ in range(PLACES)]
            else:
                yield self.cores, milliseconds
            self.ended.append(self.clock.now)
            self.clock.happen(done)

        self.clock.start(task())
        return done

    def _on_device(self) -> Event:
        done = Event()

        def task() -> Generator[Any, Any, None]:
            yield self.cores, BATCH * HANDING_MS
            yield self.gpu, BATCH * self.costs.encode
            self.clock.happen(done)

        self.clock.start(task())
        return done


def simulate(
    costs: Costs, workers: int, at_once: int = 2, units: int = 8, cores: int = CORES, tail: str = "spread"
) -> dict[str, float]:
    """Images per second, and the share of cores and GPU that they keep busy.

    tail: whether the statistics of a unit are made `alone` by one thread, `spread` over the pool as a build does, or
    by one thread `beside` the next unit.

    Workers begin one after another, so that not all of them end their units at the same time, and the first two units
    of each and its last do not count.
    """
    clock, places, gpu = Clock(), Resource(cores), Resource(1)
    threads = threads_per_worker(cores, workers, uses_gpu=True)
    found = [Worker(clock, places, gpu, costs, threads, at_once, tail) for _ in range(workers)]
    for number, worker in enumerate(found):
        clock.start(worker.units(units, number * UNIT * costs.core / cores))
    clock.run()
    rate = sum(1e3 * UNIT * (units - 3) / (worker.ended[-2] - worker.ended[1]) for worker in found)
    return {
        "images_per_second": rate,
        "cores": rate * costs.core / cores / 1e3,
        "gpu": rate * costs.encode / 1e3,
        "threads": threads,
    }


def binding(costs: Costs, cores: int = CORES) -> tuple[str, float]:
    """What binds where nothing ever waits, and its images per second."""
    limits = {"cores": 1e3 * cores / costs.core, "GPU": 1e3 / costs.encode}
    return min(limits.items(), key=lambda item: item[1])


def measure(scratch: Path, photos: int) -> dict[str, float]:
    """Processor milliseconds of every step of an image on this machine, and of its Gram matrix, a part of one."""
    from benchmarks.builder.build import shares
    from benchmarks.gpu import draw_photos
    from hierarchy_builder.hierarchy.similarity import similarities, single_threaded_blas

    draw_photos(scratch / "photos", photos)
    found = shares(argparse.Namespace(images=str(scratch / "photos"), scratch=str(scratch)))
    features = np.random.default_rng(0).standard_normal((8, 16, 16, 768)).astype(np.float16)
    with single_threaded_blas():
        similarities(features)
        started = time.process_time()
        for _ in range(16):
            similarities(features)
        found["Gram matrix, of the hierarchy"] = 1e3 * (time.process_time() - started) / (16 * len(features))
    return found


def costs_of(found: dict[str, float]) -> Costs:
    """Sort measured steps by the thread that does them; the GPU encodes, converts and checks."""
    return Costs(
        load=found["read"] + found["decode"] + found["resize and crop"],
        divide=found["hierarchy"] + found["sample to bytes"],
        write=found["write and sha256"],
        tail=found["statistics"],
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=int, default=256, help="Drawn photographs that are measured.")
    records.add_option(parser)
    return parser


def main() -> None:
    options = make_parser().parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rounds = [measure(Path(scratch) / str(number), options.photos) for number in range(ROUNDS)]
    found = {name: min(each[name] for each in rounds) for name in rounds[0]}
    costs, gram = costs_of(found), found["Gram matrix, of the hierarchy"]
    crops = replace(costs, load=found["read"] + found["decode"])
    gram_on_gpu = replace(costs, divide=costs.divide - gram, encode=ENCODE_MS + 0.007)
    variants: dict[str, tuple[Costs, dict[str, Any]]] = {
        f"{workers} workers": (costs, {"workers": workers}) for workers in (1, 2, 4, 6)
    }
    for name, each in (
        ("Gram matrices on the GPU", gram_on_gpu),
        ("resize on the GPU", crops),
        ("JPEG decoder on the GPU", replace(costs, load=costs.load - found["decode"])),
        ("JPEG decoder and resize on the GPU", replace(costs, load=found["read"])),
    ):
        variants[f"6 workers, {name}"] = each, {"workers": 6}
    variants["6 workers, one batch on the GPU at a time"] = costs, {"workers": 6, "at_once": 1}
    for cores, workers in ((3, 1), (6, 2), (12, 4), (16, 6), (24, 6)):
        for tail, name in TAILS.items():
            setting = {"workers": workers, "cores": cores, "tail": tail}
            variants[f"{cores} cores, {workers} workers, statistics {name}"] = costs, setting
    rows, figures = [], {"milliseconds": found, "rates": {}}
    for name, ms in sorted(found.items(), key=lambda item: -item[1]):
        rows.append([f"measured: {name}", f"{ms:.2f} ms", "", ""])
    for name, (each, setting) in variants.items():
        reached = simulate(each, **setting)
        what, most = binding(each, setting.get("cores", CORES))
        rows.append(
            [
                f"modelled: {name}",
                f"{reached['images_per_second']:,.0f} images/s",
                f"{reached['cores']:.0%} and {reached['gpu']:.0%}",
                f"{what}, {most:,.0f} images/s",
            ]
        )
        figures["rates"][name] = reached
    columns = ["step or setting", "value", "cores and GPU busy", "what binds, at most"]
    for row in rows:
        print("  ".join(row))
    records.write(options.record, columns=columns, rows=rows, figures=figures)


if __name__ == "__main__":
    main()
