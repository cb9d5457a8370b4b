"""Map a stage over units: in this process, or on Ray. The only file of this package that imports ray.

A stage is described by a picklable function that loads it; a worker loads it once and calls the same `perform` the
in-process path calls, so results depend neither on the number of workers nor on restarts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hierarchy_builder.errors import BuilderError
from hierarchy_builder.ledger import Ledger
from hierarchy_builder.records import Block
from hierarchy_builder.stages import Stage, perform

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """Where units run."""

    count: int | None = None
    """Processes; 0 runs in this process, None takes one per CPU of the machine or cluster."""
    address: str | None = None
    """Address of a Ray cluster (`auto` for the one this machine belongs to); without it a local Ray starts."""
    gpus_per_worker: float | None = None
    """GPUs a worker reserves in a stage that can use them; None takes one when the cluster has any."""


def map_units(
    load: Callable[[], Stage],
    ledger: Ledger,
    units: Sequence[Block],
    workers: Workers,
    *,
    uses_gpu: bool = False,
) -> Iterator[dict[str, Any]]:
    """Do all `units` and mark each; yields what the markers keep, in the order of completion.

    Raises what a unit raises; finished units stay finished.
    """
    if not units:
        return
    if workers.count == 0:
        stage = load()
        for unit in units:
            yield perform(stage, ledger, unit, os.cpu_count() or 1)
        return
    # Ray tells of lost workers on stdout, which belongs to the results.
    with contextlib.redirect_stdout(sys.stderr):
        yield from _on_ray(load, ledger, units, workers, uses_gpu)


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


def _on_ray(
    load: Callable[[], Stage], ledger: Ledger, units: Sequence[Block], workers: Workers, uses_gpu: bool
) -> Iterator[dict[str, Any]]:
    _start_ray(workers)
    import ray

    resources = ray.cluster_resources()
    cpus = int(resources.get("CPU", 0))
    gpus = _gpus_per_worker(workers, uses_gpu, resources.get("GPU", 0))
    count = min(
        workers.count or cpus, len(units), cpus, int(resources.get("GPU", 0) / gpus) if gpus else cpus
    )
    if count < 1:
        raise BuilderError(
            f"the Ray cluster has {cpus} CPUs and {resources.get('GPU', 0):g} GPUs, a worker needs 1 CPU"
            f" and {gpus:g} GPUs: add a node, or use --workers 0"
        )
    threads = max(1, cpus // count)
    actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=-1, max_task_retries=UNIT_RETRIES)(_Worker)
    pool: list[Any] = [actor.remote(load, ledger, threads) for _ in range(count)]
    try:
        yield from _drive(pool, units)
    finally:
        for worker in pool:
            ray.kill(worker)


def _drive(pool: list[Any], units: Sequence[Block]) -> Iterator[dict[str, Any]]:
    """Keep two units at every worker, so that none waits for the driver; yield results as they come."""
    import ray

    waiting = list(reversed(units))
    running: dict[Any, Any] = {}
    for worker in pool * 2:
        if waiting:
            running[worker.run.remote(waiting.pop())] = worker
    while running:
        done, _ = ray.wait(list(running), timeout=SILENCE_S)
        if not done:
            logging.getLogger(__name__).warning(
                "no unit ended in %d s; %d wait, resources free: %s",
                SILENCE_S,
                len(running),
                ray.available_resources(),
            )
        for reference in done:
            worker = running.pop(reference)
            try:
                result = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayActorError as error:
                raise BuilderError(
                    f"a worker was lost for good: {error}; run the same command again"
                ) from None
            if waiting:
                running[worker.run.remote(waiting.pop())] = worker
            yield result


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


class _Worker:
    """A Ray actor: loads the stage once, then does units."""

    def __init__(self, load: Callable[[], Stage], ledger: Ledger, threads: int) -> None:
        self.stage, self.ledger, self.threads = load(), ledger, threads

    def run(self, unit: Block) -> dict[str, Any]:
        return perform(self.stage, self.ledger, unit, self.threads)
