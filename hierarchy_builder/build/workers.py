"""Workers that load a thing once and call functions of it: in this process, or on Ray. Only this file imports ray.

What is loaded is described by a picklable function; the workers call the same functions the in-process path calls,
one unit at a time, so results depend neither on the number of workers nor on restarts.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from hierarchy_builder.build.stages import Stage, count_failed, one_thread, perform
from hierarchy_builder.errors import BuilderError
from hierarchy_builder.records import Block
from hierarchy_builder.store.ledger import Ledger

ResultT = TypeVar("ResultT")

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Environment of a local Ray: no usage reports. Set values win."""

SILENCE_S = 300
"""Seconds without a finished unit after which the free resources are logged."""

PATIENCE = 6
"""Times that long after which a run without any worker gives up."""

UNIT_RETRIES = 5
"""Times a unit is tried again after its worker or node died."""

UNITS_AHEAD = 4
"""Units per worker that may be done or running while an earlier one is not: what the driver has to hold."""


KNOCK_S = 20
"""Seconds a cluster has to take a connection."""

TOKEN_PLACES = (
    "put the token that the cluster was started with into RAY_AUTH_TOKEN, or the path of a file that holds it into "
    "RAY_AUTH_TOKEN_PATH (Ray also reads ~/.ray/auth_token)"
)
"""The next step after an error of authentication."""


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
        pool = _start_workers(load, workers, num_units, uses_gpu)
        try:
            yield pool
        finally:
            pool.close()


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


def start_local(**options: Any) -> None:
    """`ray.init` of a Ray that only this process and its workers can use; it ends with `shutdown`.

    It listens on the loopback interface and accepts only calls that carry a token. The token is a new random one,
    and only the environment of the Ray processes holds it, unless RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH names one.
    Raises BuilderError where the named token cannot be read.
    """
    import ray
    from ray._private import ray_constants

    values = {"RAY_AUTH_MODE": "token"}
    if not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        values["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Ray replaces 127.0.0.1 by the address of the network interface unless this constant is false. Ray reads its
    # environment variable at import, which may lie in the past, and `ray start --address` refuses to run with it.
    before = ray_constants.ENABLE_RAY_CLUSTER
    with _authentication(values):
        ray_constants.ENABLE_RAY_CLUSTER = before and ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR in os.environ
        try:
            ray.init(address="local", include_dashboard=False, **options)
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = before


def join(address: str, **options: Any) -> None:
    """`ray.init` of a cluster that is running, with the token that the user has for it.

    Raises BuilderError where no cluster answers, and where it rejects the token.
    """
    import ray
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    host, colon, port = address.removeprefix("ray://").rpartition(":")
    is_reached = False
    try:
        if colon and port.isdecimal():  # where nothing listens Ray itself would wait for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()
            is_reached = True
        with _authentication({}):
            has_token = AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
        with _authentication({"RAY_AUTH_MODE": "token"} if has_token else {}), _held_stderr():
            ray.init(address=address, **options)
    except (OSError, ValueError, RuntimeError) as error:
        if is_reached:
            raise BuilderError(
                f"the Ray cluster at {address!r} did not accept this connection: {error}; {TOKEN_PLACES}"
            ) from None
        raise BuilderError(
            f"no Ray cluster answers at {address!r}: {error}; expected the HOST:PORT that `ray start --head` printed"
        ) from None


@contextlib.contextmanager
def _held_stderr() -> Iterator[None]:
    """Write what this process sends to stderr only when the block has succeeded.

    Ray repeats a call that was rejected for 20 s and writes a line each time, below Python; the error says it once.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
        held.seek(0)
        os.write(2, held.read())


@contextlib.contextmanager
def _authentication(values: Mapping[str, str]) -> Iterator[None]:
    """Let a Ray that starts or is joined inside see `values` in the environment, where the user set none.

    Ray reads the mode and the token once; both are read anew here, since this process may have used another Ray.
    """
    import ray
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    added = {name: os.environ.get(name) for name in values if not os.environ.get(name)}
    os.environ.update({name: values[name] for name in added})
    try:
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
        yield
    except ray.exceptions.AuthenticationError as error:
        raise BuilderError(f"Ray has no token: {error.message}; {TOKEN_PLACES}") from None
    finally:
        for name, value in added.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


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


@dataclass(eq=False, slots=True)
class _Hand:
    """A worker that has loaded, and the units it was given: the first is being done, the next waits with it."""

    actor: Any
    units: list[int] = field(default_factory=list)


class _OnRay:
    """Ray actors. A lost one is replaced where there is room, and what it had is given to those that are left.

    Ray's own retries wait for ever for the CPU of a node that is gone, whoever else is free.
    """

    def __init__(self, load: Callable[[], Any], start: Callable[[], Any], count: int) -> None:
        self.load, self.start, self.count = load, start, count
        self.hands: list[_Hand] = []
        self.loading: dict[Any, Any] = {}
        self.lost_loading = 0
        for _ in range(count):
            self._hire()

    def map(
        self, function: Callable[..., ResultT], units: Sequence[Block], *shared: Any
    ) -> Iterator[ResultT]:
        """Keep two units at every worker, so that none waits for the driver."""
        import ray

        stored = [ray.put(value) for value in shared]
        waiting, running = list(range(len(units))), dict[Any, tuple[int, _Hand]]()  # waiting: a heap
        done, losses = dict[int, ResultT](), Counter[int]()
        taken = 0
        while taken < len(units):
            while waiting and waiting[0] < taken + UNITS_AHEAD * self.count and (hand := self._free()):
                number = heapq.heappop(waiting)
                hand.units.append(number)
                running[hand.actor.call.remote(function, units[number], *stored)] = (number, hand)
            for reference in self._wait([*running, *self.loading]):
                if reference in self.loading:
                    self._welcome(reference)
                    continue
                number, hand = running.pop(reference)
                try:
                    done[number] = _result(reference)
                except _LostError as error:
                    self._dismiss(hand, losses)
                    if losses[number] > UNIT_RETRIES:
                        raise BuilderError(
                            f"unit {units[number].number} took {losses[number]} workers down with it: {error}"
                        ) from None
                    heapq.heappush(waiting, number)
                hand.units.remove(number)
            while taken in done:
                yield done.pop(taken)
                taken += 1

    def close(self) -> None:
        """End all workers."""
        import ray

        for actor in [*self.loading.values(), *(hand.actor for hand in self.hands)]:
            ray.kill(actor)

    def _hire(self) -> None:
        actor = self.start()
        self.loading[actor.load.remote(self.load)] = actor

    def _welcome(self, reference: Any) -> None:
        """Take in a worker that has loaded. Raises what loading raised."""
        actor = self.loading.pop(reference)
        try:
            _result(reference)
        except _LostError as error:
            self.lost_loading += 1
            if self.lost_loading > UNIT_RETRIES:
                raise BuilderError(f"{self.lost_loading} workers ended while they loaded: {error}") from None
            self._hire()
            return
        self.lost_loading = 0
        self.hands.append(_Hand(actor))

    def _dismiss(self, hand: _Hand, losses: Counter[int]) -> None:
        """Replace a worker at the first news of its end, and count that against the unit it was doing."""
        import ray

        if hand in self.hands:
            self.hands.remove(hand)
            losses[hand.units[0]] += 1
            ray.kill(hand.actor)  # it may only be out of reach
            logging.getLogger(__name__).warning("a worker was lost, %d are left", len(self.hands))
            self._hire()

    def _free(self) -> _Hand | None:
        hand = min(self.hands, key=lambda hand: len(hand.units), default=None)
        return hand if hand is not None and len(hand.units) < 2 else None

    def _wait(self, references: list[Any]) -> list[Any]:
        """References of calls that ended; says so when none does for long, and gives up without a worker."""
        import ray

        for _ in range(PATIENCE):
            ended, _ = ray.wait(references, timeout=SILENCE_S)
            if ended:
                return ended
            logging.getLogger(__name__).warning(
                "no unit ended in %d s; %d workers, %d more wait for room or load, resources free: %s",
                SILENCE_S,
                len(self.hands),
                len(self.loading),
                ray.available_resources(),
            )
            if self.hands:
                return []
        raise BuilderError(
            f"no worker could start for {PATIENCE * SILENCE_S} s, the cluster has {ray.cluster_resources()}: add a "
            "node, or end what else runs there; then the same command goes on"
        )


class _Worker:
    """A Ray actor: loads once, then does units."""

    def __init__(self, threads: int) -> None:
        self.loaded, self.threads, self.metrics = None, threads, _Metrics()

    def load(self, load: Callable[[], Any]) -> None:
        self.loaded = load()

    def call(self, function: Callable[..., Any], unit: Block, *shared: Any) -> Any:
        with one_thread():
            result = function(self.loaded, unit, self.threads, *shared)
        if function is perform:
            self.metrics.count(type(self.loaded).__name__, result)
        return result


class _Metrics:
    """What a worker has done, for the metrics page of the cluster; nobody reads it where there is none."""

    def __init__(self) -> None:
        from ray.util import metrics

        tags = {"tag_keys": ("stage",)}
        self.images = metrics.Counter("hierarchy_builder_images", "Images done.", **tags)
        self.failed = metrics.Counter(
            "hierarchy_builder_failed_images", "Images that could not be used.", **tags
        )
        self.seconds = metrics.Histogram(
            "hierarchy_builder_unit_seconds",
            "Seconds of a unit.",
            boundaries=[1, 3, 10, 30, 100, 300],
            **tags,
        )

    def count(self, stage: str, result: Mapping[str, Any]) -> None:
        """Add what the marker of a unit keeps."""
        tags, failed = {"stage": stage}, count_failed(result)
        if result["images"]:
            self.images.inc(result["images"], tags)
        if failed:
            self.failed.inc(failed, tags)
        self.seconds.observe(result["seconds"], tags)


def _start_workers(load: Callable[[], Any], workers: Workers, num_units: int, uses_gpu: bool) -> _OnRay:
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
    actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, max_task_retries=0)(_Worker)
    return _OnRay(load, partial(actor.remote, max(1, cpus // count)), count)


class _LostError(Exception):
    """A worker or its node ended, with the call it was doing or the result of it."""


def _result(reference: Any) -> Any:
    """Raises what the call raised, or _LostError."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise _LostError(str(error)) from None


def _start_ray(workers: Workers) -> None:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return
    address = workers.address or os.environ.get("RAY_ADDRESS")
    handler = signal.getsignal(signal.SIGTERM)
    if address:
        join(address, log_to_driver=False, logging_level=logging.ERROR)
    else:
        start_local(
            num_cpus=max(workers.count or 0, os.cpu_count() or 1),
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
