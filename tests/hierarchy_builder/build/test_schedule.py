"""The schedule of units: every unit once, in order, on clusters that lose nodes; slow workers hold up nobody."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.builder import scale
from hierarchy_builder.build.schedule import UNIT_RETRIES, UNITS_AHEAD, Schedule, WorkerQueue
from hierarchy_builder.build.stages import perform
from hierarchy_builder.build.workers import BRIEF_AHEAD, _ended, _RayPool
from hierarchy_builder.errors import BuilderError, InterruptedRunError
from hierarchy_builder.records import blocks_of


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


def test_results_run_ahead_of_a_slow_unit_by_no_more_than_the_bound() -> None:
    slow, fast = WorkerQueue("slow"), WorkerQueue("fast")
    plan = Schedule(1000, ahead=8, queues=[slow, fast])
    began = list[int]()
    while (call := plan.next_call()) is not None:
        number, queue = call
        began.append(number)
        if queue is fast or number > 0:  # all but unit 0 end at once
            plan.finish(number, queue, number)
            assert list(plan.results()) == []
    assert began == list(range(8)), "and then they wait for it"
    plan.finish(0, slow, 0)
    assert list(plan.results()) == began
    assert plan.next_call() == (8, fast)


@pytest.mark.parametrize(
    ("function", "ahead"), [(perform, 2 * BRIEF_AHEAD), (lambda *_: None, 2 * UNITS_AHEAD)]
)
def test_workers_stop_where_results_are_not_taken(
    monkeypatch: pytest.MonkeyPatch, function: Any, ahead: int
) -> None:
    """Of two workers, whose other calls end at once, one has a first unit that ends when nothing else runs."""
    began = list[int]()

    def call(function: Any, unit: Any, *shared: Any) -> str:
        began.append(unit.number)
        return f"result {unit.number}"

    def wait(references: list[str], **_: Any) -> tuple[list[str], list[str]]:
        return [each for each in references if each != "result 0"] or references, []

    ray = SimpleNamespace(put=lambda value: value, get=lambda reference: reference, wait=wait)
    monkeypatch.setitem(sys.modules, "ray", ray)
    loads = iter(("load 0", "load 1"))
    remote = SimpleNamespace(
        load=SimpleNamespace(remote=lambda load: next(loads)), call=SimpleNamespace(remote=call)
    )
    pool, most = _RayPool(lambda: None, lambda: remote, 2), 0
    for taken, result in enumerate(pool.map(function, blocks_of(1000, 1))):
        assert result == f"result {taken}"
        most = max(most, len(began) - taken)
    assert (len(began), most) == (1000, ahead)


@pytest.mark.parametrize("cause", [InterruptedRunError("stopped"), KeyboardInterrupt(), None])
def test_a_signal_that_ray_turns_into_another_error_keeps_its_meaning(
    monkeypatch: pytest.MonkeyPatch, cause: BaseException | None
) -> None:
    def wait(references: list[str], **_: Any) -> None:
        raise SystemError("CoreWorker.wait returned a result with an exception set") from cause

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(wait=wait))
    with pytest.raises(SystemError if cause is None else type(cause)):
        _ended(["a call"], timeout=0)
