"""Which unit runs on which worker: decisions alone, without processes, a clock or Ray.

`workers` calls this with Ray's actors. `benchmarks/builder/scale.py` calls it with actors that exist only in a
simulation, so that what is simulated for a thousand workers is what runs on them.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from hierarchy_builder.errors import BuilderError

UNIT_RETRIES = 5
"""Times a unit is tried again after its worker or node died."""

UNITS_AHEAD = 4
"""Units per worker that may be running or finished ahead of the next result; the driver holds them in memory."""


@dataclass(eq=False, slots=True)
class WorkerQueue:
    """A worker that has loaded, and its queue of units: the first one runs, the next one waits."""

    actor: Any
    units: list[int] = field(default_factory=list)


class Schedule:
    """Units, each given to a worker until it has a result; results come in the order of the units.

    num_units: they are numbered from 0. ahead: how far the results may run ahead of the next one. queues: the workers
    that are there; others `join` and `leave`.
    """

    def __init__(self, num_units: int, ahead: int, queues: Iterable[WorkerQueue] = ()) -> None:
        self.num_units, self.ahead = num_units, ahead
        self.taken = 0
        """Results that were given out, and so the number of the next one."""
        self._waiting = list(range(num_units))  # a heap
        self._done = dict[int, Any]()
        self._losses = Counter[int]()
        self._by_load: tuple[dict[WorkerQueue, None], ...] = ({}, {}, {})
        """The workers with no, one and two units, each group in the order in which they came to it."""
        for queue in queues:
            self.join(queue)

    def join(self, queue: WorkerQueue) -> None:
        """A worker can be given units."""
        self._by_load[len(queue.units)][queue] = None

    def leave(self, queue: WorkerQueue) -> None:
        """A worker is given none any more."""
        for group in self._by_load:
            group.pop(queue, None)

    def next_call(self) -> tuple[int, WorkerQueue] | None:
        """The next unit to start and where; None if every worker has enough or nothing waits.

        Workers have two units while there are more units than workers, so that none waits for the driver. At the end
        they have one, so that a slow worker keeps none that an idle one could do.
        """
        idle, busy, _ = self._by_load
        if not self._waiting or self._waiting[0] >= self.taken + self.ahead:
            return None
        if not idle and (not busy or len(self._waiting) <= sum(map(len, self._by_load))):
            return None
        queue = next(iter(idle or busy))
        number = heapq.heappop(self._waiting)
        self._move(queue, lambda: queue.units.append(number))
        return number, queue

    def _move(self, queue: WorkerQueue, change: Callable[[], None]) -> None:
        """Change the units of a worker, and its group with them if it is still there."""
        is_there = queue in self._by_load[len(queue.units)]
        self.leave(queue)
        change()
        if is_there:
            self.join(queue)

    def finish(self, number: int, queue: WorkerQueue, result: Any) -> None:
        """Take the result of a unit."""
        self._move(queue, lambda: queue.units.remove(number))
        self._done[number] = result

    def lose(self, number: int, queue: WorkerQueue, why: object, *, is_first: bool, name: object) -> None:
        """A unit ended with its worker, which has left; it waits again.

        is_first: whether this unit was the first to tell of the loss, so that the loss counts against the unit that
        the worker was running. name: of the unit, for people. Raises BuilderError if too many workers were lost on it.
        """
        if is_first:
            self._losses[queue.units[0]] += 1
        if self._losses[number] > UNIT_RETRIES:
            raise BuilderError(
                f"unit {name} was running on {self._losses[number]} workers that were lost: {why}"
            )
        queue.units.remove(number)
        heapq.heappush(self._waiting, number)

    def results(self) -> Iterator[Any]:
        """The results that are next in order."""
        while self.taken in self._done:
            yield self._done.pop(self.taken)
            self.taken += 1

    @property
    def is_over(self) -> bool:
        """Whether every result was given out."""
        return self.taken == self.num_units
