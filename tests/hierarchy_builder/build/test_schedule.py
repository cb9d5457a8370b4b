"""The schedule of units: every unit once, in order, on clusters that lose nodes; slow workers hold up nobody."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks"))
import scale

from hierarchy_builder.build.schedule import UNIT_RETRIES, Schedule, WorkerQueue
from hierarchy_builder.errors import BuilderError


def test_a_cluster_that_loses_nodes_loses_no_unit() -> None:
    cluster = scale.Cluster(nodes=20, actors_per_node=4, units=8_000, between_losses_h=0.5)
    found = scale.simulate(cluster)
    assert found.results == list(range(8_000))
    assert found.losses > 3
    assert found.again >= found.losses
    assert found.useful_s + found.wasted_s < found.paid_s


def test_a_thousand_actors_are_used() -> None:
    found = scale.simulate(scale.Cluster(units=150_000))
    assert found.results == list(range(150_000))
    assert found.utilisation > 0.9  # of 15 minutes, of which one is that of loading


def test_at_the_end_a_slow_worker_keeps_no_unit_that_an_idle_one_could_do() -> None:
    slow, fast = WorkerQueue("slow"), WorkerQueue("fast")
    plan = Schedule(5, ahead=100, queues=[slow, fast])
    assert [plan.next_call() for _ in range(4)] == [(0, slow), (1, fast), (2, slow), None]
    plan.finish(1, fast, "done")
    assert plan.next_call() == (3, fast)
    plan.finish(3, fast, "done")
    assert plan.next_call() == (4, fast)
    assert [slow.units, fast.units] == [[0, 2], [4]]


def test_a_unit_that_kills_its_workers_is_named() -> None:
    plan = Schedule(1, ahead=1)
    for turn in range(UNIT_RETRIES + 1):
        queue = WorkerQueue(turn)
        plan.join(queue)
        assert plan.next_call() == (0, queue)
        plan.leave(queue)
        if turn < UNIT_RETRIES:
            plan.lose(0, queue, "gone", is_first=True, name=7)
    with pytest.raises(BuilderError, match=r"unit 7 was running on 6 workers that were lost: gone"):
        plan.lose(0, queue, "gone", is_first=True, name=7)
