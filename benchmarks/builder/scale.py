"""How a build behaves on many nodes that fail: a simulation of `build/schedule.py`, and what large sets cost.

    python -m benchmarks.builder.scale --record scale_simulated
    python -m benchmarks.builder.scale --costs --record scale_costs
    python -m benchmarks.builder.scale --driver --record scale_driver

The simulation calls the scheduling code of the builder with actors that exist only as entries of a heap of events:
units end, nodes are lost with all their actors, replacements load and join, some nodes are slow. Time is that of the
events, so a week on a thousand actors takes seconds. The driver handles one event after the other and is busy
meanwhile, as a process of Python is.

`--driver` measures what the driver spends on a unit, with Ray on this machine. `--costs` multiplies unit costs.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from benchmarks import records
from hierarchy_builder.build.schedule import Schedule, WorkerQueue

HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of equal size, and what goes wrong on them."""

    nodes: int = 125
    actors_per_node: int = 8
    units: int = 500_000
    unit_s: float = 5.3
    """Median time of a unit."""
    spread: float = 0.15
    """Standard deviation of the logarithm of that time."""
    between_losses_h: float = 24.0
    """Mean time until a node is lost; hardware fails more seldom, spot machines are taken back as often."""
    replaced_s: float = 300.0
    """Time until another node is there."""
    load_s: float = 40.0
    """Time in which an actor loads the encoder."""
    slow_share: float = 0.02
    slow_factor: float = 3.0
    driver_s: float = 0.0005
    """Time of the driver for each result that it takes."""
    ahead: int = 64
    """Units per actor that may be finished ahead of the next result, as `workers.BRIEF_AHEAD`."""
    seed: int = 0

    @property
    def actors(self) -> int:
        """Actors on all nodes."""
        return self.nodes * self.actors_per_node


@dataclass(kw_only=True)
class Outcome:
    """What a simulated build took."""

    seconds: float = 0.0
    useful_s: float = 0.0
    """Actor seconds in units whose result was taken."""
    wasted_s: float = 0.0
    """Actor seconds in units that were lost with their node."""
    paid_s: float = 0.0
    """Actor seconds for which a node was there, those of loading included."""
    losses: int = 0
    again: int = 0
    """Units that were begun again."""
    driver_s: float = 0.0
    """Time for which the driver was busy."""
    results: list[int] = field(default_factory=list)
    """The results as they were given out: the numbers of the units."""
    decided_s: float = 0.0
    """Real time that the scheduling code itself took."""

    @property
    def utilisation(self) -> float:
        """Share of the paid time that made results."""
        return self.useful_s / self.paid_s


@dataclass(eq=False)
class Node:
    """A node that exists from `since`; its actors take `factor` of the usual time."""

    since: float
    factor: float
    queues: list[WorkerQueue] = field(default_factory=list)
    is_lost: bool = False


@dataclass(eq=False)
class Actor:
    """An actor runs the units that it was given, one after the other, from `began` on."""

    node: Node
    given: deque[int] = field(default_factory=deque)
    began: float = 0.0


def simulate(cluster: Cluster) -> Outcome:
    """Build all units on the cluster; see the head of this file."""
    generator = np.random.default_rng(cluster.seed)
    plan = Schedule(cluster.units, cluster.ahead * cluster.actors)
    found, nodes = Outcome(), list[Node]()
    events, order = list[tuple[float, int, str, Any]](), itertools.count()
    now = free_at = 0.0  # the driver is busy until `free_at`

    def later(when: float, kind: str, what: Any) -> None:
        heapq.heappush(events, (when, next(order), kind, what))

    def add_node(when: float) -> None:
        is_slow = generator.random() < cluster.slow_share
        nodes.append(Node(when, cluster.slow_factor if is_slow else 1.0))
        later(when + cluster.load_s, "loaded", nodes[-1])
        later(when + generator.exponential(cluster.between_losses_h) * HOUR, "lost", nodes[-1])

    def begin(queue: WorkerQueue, when: float) -> None:
        queue.actor.began = when
        spread = math.exp(cluster.spread * generator.standard_normal())
        later(when + cluster.unit_s * queue.actor.node.factor * spread, "ended", queue)

    def lose(node: Node) -> None:
        node.is_lost = True
        found.losses += 1
        found.paid_s += (now - node.since) * cluster.actors_per_node
        for queue in node.queues:
            plan.leave(queue)
            found.wasted_s += now - queue.actor.began if queue.actor.given else 0.0
            found.again += len(queue.units)
            for place, number in enumerate(list(queue.units)):
                plan.lose(number, queue, "its node was lost", is_first=place == 0, name=number)
        later(now + cluster.replaced_s, "replaced", None)

    for _ in range(cluster.nodes):
        add_node(0.0)
    while not plan.is_over:
        now, _, kind, what = heapq.heappop(events)
        if kind == "replaced":
            add_node(now)
        elif kind == "lost":
            lose(what)
        elif kind == "loaded" and not what.is_lost:
            what.queues = [WorkerQueue(Actor(what)) for _ in range(cluster.actors_per_node)]
            for queue in what.queues:
                plan.join(queue)
        elif kind == "ended" and not what.actor.node.is_lost:
            number = what.actor.given.popleft()
            found.useful_s += now - what.actor.began
            if what.actor.given:
                begin(what, now)
            free_at = max(free_at, now) + cluster.driver_s
            found.driver_s += cluster.driver_s
            later(free_at, "taken", (what, number))
            continue
        elif kind == "taken" and not what[0].actor.node.is_lost:
            plan.finish(what[1], what[0], what[1])
            found.results += plan.results()
        started = time.perf_counter()
        while (call := plan.next_call()) is not None:
            number, queue = call
            queue.actor.given.append(number)
            if len(queue.actor.given) == 1:
                begin(queue, now)
        found.decided_s += time.perf_counter() - started
    found.seconds = now
    found.paid_s += sum((now - node.since) * cluster.actors_per_node for node in nodes if not node.is_lost)
    return found


CASES = {
    "1 node, nothing fails": Cluster(
        nodes=1, units=4_000, between_losses_h=1e9, slow_share=0.0, driver_s=0.0
    ),
    "1,000 actors, nothing fails": Cluster(between_losses_h=1e9, slow_share=0.0),
    "1,000 actors, hardware fails (5,000 h a node)": Cluster(between_losses_h=5000.0, slow_share=0.0),
    "1,000 actors, spot machines (24 h)": Cluster(slow_share=0.0),
    "1,000 actors, spot machines (4 h)": Cluster(between_losses_h=4.0, slow_share=0.0),
    "1,000 actors, 2 % of nodes 3 times as slow": Cluster(between_losses_h=1e9),
    "1,000 actors, spot (24 h) and slow nodes": Cluster(),
    "the same, results at most 4 units ahead": Cluster(ahead=4),
    "the same, units of 1.4 s (4 actors share a GPU)": Cluster(unit_s=1.4),
    "the same, units of 1.4 s, four times as many": Cluster(unit_s=1.4, units=2_000_000),
    "the same, units of 1.4 s, driver 2 ms a unit": Cluster(unit_s=1.4, driver_s=0.002),
    "the same, units of 22 s (16,384 images), driver 2 ms a unit": Cluster(
        unit_s=22.0, driver_s=0.002, units=250_000
    ),
    "10,000 actors, spot and slow nodes, units of 22 s": Cluster(nodes=1250, unit_s=22.0, units=1_000_000),
    "the same, three times as many units": Cluster(nodes=1250, unit_s=22.0, units=3_000_000),
}


def simulated(name: str | None) -> None:
    """Simulate every case, three times."""
    rows = []
    for title, cluster in CASES.items():
        runs = [simulate(replace(cluster, seed=seed)) for seed in range(3)]
        assert all(run.results == list(range(cluster.units)) for run in runs)
        worst = min(runs, key=lambda run: run.utilisation)
        rows.append(
            [
                title,
                f"{worst.utilisation:.1%}",
                f"{max(run.driver_s / run.seconds for run in runs):.0%}",
                f"{worst.wasted_s / worst.paid_s:.2%}",
                f"{worst.losses:,}",
                f"{worst.again:,}",
                "0",
                f"{1e6 * worst.decided_s / cluster.units:.0f}",
            ]
        )
        print(" | ".join(rows[-1]), flush=True)
    columns = [
        *("case", "useful share of paid actor time", "driver busy", "lost with nodes"),
        *("nodes lost", "units begun again", "units lost", "decisions, µs a unit"),
    ]
    records.write(name, columns=columns, rows=rows, seeds=[0, 1, 2])


def driver(name: str | None) -> None:
    """What the driver spends on a unit whose work is nothing, with Ray on this machine."""
    from hierarchy_builder.build import workers
    from hierarchy_builder.records import blocks_of

    rows = []
    for outstanding in (4, 200, 2000):
        units = blocks_of(4000, 1)
        with workers.open_pool(nothing, workers.Workers(count=2), units) as pool:
            assert isinstance(pool, workers._RayPool)
            while len(pool.queues) < 2:
                list(pool.map(done, units[:4]))
            real, pool.count = pool.queues, outstanding // 2
            # as if so many workers were there, each with two units
            pool.queues = [WorkerQueue(real[number % 2].actor) for number in range(pool.count)]
            began = time.process_time()
            assert sum(1 for _ in pool.map(done, units)) == len(units)
            spent = time.process_time() - began
            pool.queues = real
        rows.append([f"{outstanding:,}", f"{1e3 * spent / len(units):.2f}"])
        print(" | ".join(rows[-1]), flush=True)
    workers.shutdown()
    records.write(name, columns=["calls outstanding", "driver, CPU ms a unit"], rows=rows)


def nothing() -> None:
    """What a worker loads that has nothing to do."""


def done(loaded: None, unit: object, threads: int) -> int:
    """A unit without work."""
    return 0


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Assumptions, list prices of November 2026 in US dollars, not quotations."""

    gpu_hour: float = 3.0
    core_hour: float = 0.04
    thousand_gets: float = 0.0004
    thousand_puts: float = 0.005
    gigabyte_month: float = 0.023


SETS = {"1.28 M": 1_281_167, "100 M": 100_000_000, "5 B": 5_000_000_000}
PHOTO_BYTES = 110_000
"""Bytes of a photograph, those of ImageNet on average."""
GPU_IMAGES = 3000.0
"""Images per second and GPU, predicted in the table of GPU figures and unmeasured."""
CORE_S = 0.0053
"""Seconds of a core for an image, from the same table: decode, crop, hierarchy, write and the rest."""
PER_TAR, PART_BYTES, BLOCK_ROWS = 1000, 2**26, 1024
IN_PARTITION = 20_000_000
"""Images in one partition: its driver then takes about as much memory as measured per million images, 20 times."""


def costs(name: str | None) -> None:
    """Bytes, units, requests and dollars of sets, from unit costs."""
    from hierarchy_builder.config import ShardConfig
    from hierarchy_builder.store.shards import sample_bytes

    prices, columns = Prices(), ["", *SETS]
    encoder = {"grid": (16, 16), "width": 768, "image_size_px": 224}
    kinds = ("float16", "int8")
    each = {kind: sample_bytes(ShardConfig(feature_dtype=kind), encoder, num_levels=4) for kind in kinds}
    table: dict[str, list[str]] = {}
    for images in SETS.values():
        tars = math.ceil(images / PER_TAR)
        parts = math.ceil(PER_TAR * each["float16"] / PART_BYTES)
        puts = tars * (parts + 4)  # begin and end of the upload, sidecar and marker
        gpu_hours, core_hours = images / GPU_IMAGES / 3600, images * CORE_S / 3600
        stored = images * each["float16"] / 1e9
        dollars = {
            "GPU hours": gpu_hours * prices.gpu_hour,
            "core hours": core_hours * prices.core_hour,
            "requests": (images * prices.thousand_gets + puts * prices.thousand_puts) / 1000,
        }
        cells = {
            "photographs": _bytes(images * PHOTO_BYTES),
            "shards, float16": _bytes(images * each["float16"]),
            "shards, int8": _bytes(images * each["int8"]),
            f"units of {BLOCK_ROWS:,} images": f"{math.ceil(images / BLOCK_ROWS):,}",
            f"tars of {PER_TAR:,}": f"{tars:,}",
            f"partitions of at most {IN_PARTITION // 10**6} M images": f"{math.ceil(images / IN_PARTITION):,}",
            "GPU hours (predicted)": f"{gpu_hours:,.1f}",
            "core hours": f"{core_hours:,.1f}",
            "GET requests, one a photograph": f"{images:,}",
            "PUT requests": f"{puts:,}",
            "dollars: GPUs": f"{dollars['GPU hours']:,.0f}",
            "dollars: cores": f"{dollars['core hours']:,.0f}",
            "dollars: requests": f"{dollars['requests']:,.0f}",
            "dollars a month: shards in float16": f"{stored * prices.gigabyte_month:,.0f}",
        }
        for title, cell in cells.items():
            table.setdefault(title, []).append(cell)
    rows = [[title, *cells] for title, cells in table.items()]
    for row in rows:
        print(" | ".join(row))
    records.write(name, columns=columns, rows=rows, figures={"bytes of a sample": each, **vars(prices)})


def _bytes(count: float) -> str:
    power = int(math.log(count, 1000))
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--costs", action="store_true", help="print the table of costs instead")
    parser.add_argument("--driver", action="store_true", help="measure the driver with Ray instead")
    records.add_option(parser)
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    chosen = costs if arguments.costs else driver if arguments.driver else simulated
    chosen(arguments.record)


if __name__ == "__main__":
    main()
