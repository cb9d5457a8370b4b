"""Workers that load a thing once and call functions of it: in this process, or on Ray. Only this file imports ray.

What is loaded is described by a picklable function; the workers call the same functions the in-process path calls,
one unit at a time, so results depend neither on the number of workers nor on restarts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from hierarchy_builder.errors import BuilderError
from hierarchy_builder.ledger import Ledger
from hierarchy_builder.records import Block
from hierarchy_builder.stages import Stage, one_thread, perform

ResultT = TypeVar("ResultT")

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Environment of a local Ray: no usage reports, no token file. Set values win."""

SILENCE_S = 300
"""Seconds without a finished unit after which the free resources are logged."""

UNIT_RETRIES = 5
"""Times a unit is tried again after its worker or node died."""

UNITS_AHEAD = 4
"""Units per worker that may be done or running while an earlier one is not: what the driver has to hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """Where units run."""

    count: int | None = None
    """Processes; 0 runs in this process, None takes one per CPU of the machine or cluster."""
    address: str | None = None
    """Address of a Ray cluster (`auto` for the one this machine belongs to); without it a local Ray starts."""
    gpus_per_worker: float | None = None
    """GPUs a worker reserves in a stage that can use them; None takes one when the cluster has any."""


class Pool(Protocol):
    """Workers that have loaded one thing each."""

    def map(
        self, function: Callable[..., ResultT], units: Sequence[Block], *shared: Any
    ) -> Iterator[ResultT]:
        """`function(loaded, unit, threads, *shared)` of each unit, in the order of `units`.

        Each call may use `threads` threads of its own; torch has one. Raises what a call raises.
        """


@contextlib.contextmanager
def open_pool(
    load: Callable[[], Any], workers: Workers, num_units: int, *, uses_gpu: bool = False
) -> Iterator[Pool]:
    """Start workers, at most `num_units`, that call `load` once; they end with the block.

    Raises BuilderError where the cluster has no room for a worker.
    """
    if workers.count == 0:
        yield _InProcess(load())
        return
    # Ray tells of lost workers on stdout, which belongs to the results.
    with contextlib.redirect_stdout(sys.stderr):
        actors = _start_actors(load, workers, num_units, uses_gpu)
        try:
            yield _OnRay(actors)
        finally:
            _kill(actors)


def map_units(
    load: Callable[[], Stage],
    ledger: Ledger,
    units: Sequence[Block],
    workers: Workers,
    *,
    uses_gpu: bool = False,
) -> Iterator[dict[str, Any]]:
    """Do all `units` and mark each; yields what the markers keep, in order.

    Raises what a unit raises; finished units stay finished.
    """
    if units:
        with open_pool(load, workers, len(units), uses_gpu=uses_gpu) as pool:
            yield from pool.map(perform, units, ledger)


def has_gpu(workers: Workers) -> bool:
    """Whether the workers have a GPU to encode on; starts or joins Ray where they are its."""
    if workers.count == 0:
        return torch.cuda.is_available()
    _start_ray(workers)
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0


def shutdown() -> None:
    """Stop a local Ray, or leave a cluster; nothing happens when none was started."""
    import ray

    if ray.is_initialized():
        ray.shutdown()


@dataclass(frozen=True, slots=True)
class _InProcess:
    loaded: Any

    def map(
        self, function: Callable[..., ResultT], units: Sequence[Block], *shared: Any
    ) -> Iterator[ResultT]:
        for unit in units:
            with one_thread():
                result = function(self.loaded, unit, os.cpu_count() or 1, *shared)
            yield result


@dataclass(frozen=True, slots=True)
class _OnRay:
    actors: Sequence[Any]

    def map(
        self, function: Callable[..., ResultT], units: Sequence[Block], *shared: Any
    ) -> Iterator[ResultT]:
        """Keep two units at every worker, so that none waits for the driver."""
        import ray

        stored = [ray.put(value) for value in shared]
        free, running = deque([*self.actors, *self.actors]), dict[Any, tuple[int, Any]]()
        done = dict[int, ResultT]()
        given = taken = 0
        while taken < len(units):
            while free and given < min(len(units), taken + UNITS_AHEAD * len(self.actors)):
                actor = free.popleft()
                running[actor.call.remote(function, units[given], *stored)] = (given, actor)
                given += 1
            for reference in _wait(running):
                number, actor = running.pop(reference)
                done[number] = _result(reference)
                free.append(actor)
            while taken in done:
                yield done.pop(taken)
                taken += 1


class _Worker:
    """A Ray actor: loads once, then does units."""

    def __init__(self, load: Callable[[], Any], threads: int) -> None:
        self.loaded, self.threads = load(), threads

    def call(self, function: Callable[..., Any], unit: Block, *shared: Any) -> Any:
        with one_thread():
            return function(self.loaded, unit, self.threads, *shared)


def _start_actors(load: Callable[[], Any], workers: Workers, num_units: int, uses_gpu: bool) -> list[Any]:
    _start_ray(workers)
    import ray

    resources = ray.cluster_resources()
    cpus = int(resources.get("CPU", 0))
    gpus = _gpus_per_worker(workers, uses_gpu, resources.get("GPU", 0))
    count = min(workers.count or cpus, num_units, cpus, int(resources.get("GPU", 0) / gpus) if gpus else cpus)
    if count < 1:
        raise BuilderError(
            f"the Ray cluster has {cpus} CPUs and {resources.get('GPU', 0):g} GPUs, a worker needs 1 CPU"
            f" and {gpus:g} GPUs: add a node, or use --workers 0"
        )
    threads = max(1, cpus // count)
    actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=-1, max_task_retries=UNIT_RETRIES)(_Worker)
    return [actor.remote(load, threads) for _ in range(count)]


def _kill(actors: Sequence[Any]) -> None:
    import ray

    for actor in actors:
        ray.kill(actor)


def _wait(running: dict[Any, tuple[int, Any]]) -> list[Any]:
    """References of calls that ended; says so when none does for long."""
    import ray

    ended, _ = ray.wait(list(running), timeout=SILENCE_S)
    if not ended:
        logging.getLogger(__name__).warning(
            "no unit ended in %d s; %d wait, resources free: %s",
            SILENCE_S,
            len(running),
            ray.available_resources(),
        )
    return ended


def _result(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayActorError as error:
        raise BuilderError(f"a worker was lost for good: {error}; run the same command again") from None


def _start_ray(workers: Workers) -> None:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return
    address = workers.address or os.environ.get("RAY_ADDRESS")
    handler = signal.getsignal(signal.SIGTERM)
    if address:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise BuilderError(f"no Ray cluster answers at {address!r}: {error}") from None
    else:
        ray.init(
            address="local",
            num_cpus=max(workers.count or 0, os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray put its own, which ends the process on the spot


def _gpus_per_worker(workers: Workers, uses_gpu: bool, available: float) -> float:
    if not uses_gpu:
        return 0.0
    if workers.gpus_per_worker is not None:
        return workers.gpus_per_worker
    return 1.0 if available >= 1 else 0.0
