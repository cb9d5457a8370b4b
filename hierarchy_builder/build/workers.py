"""Workers that load an object once and call functions on it: in this process or as Ray actors.

Where the user does not say how many, a small set begins in this process, and Ray starts when that saves time.

Only this file of the package imports ray. A picklable function says what a worker loads. Workers call the same
functions as the in-process path, one unit at a time, so results depend neither on the number of workers nor on
restarts.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from hierarchy_builder.build.schedule import UNIT_RETRIES, UNITS_AHEAD, Schedule, WorkerQueue
from hierarchy_builder.build.stages import Stage, one_thread, perform
from hierarchy_builder.encoders import Encoder, encode
from hierarchy_builder.errors import BuilderError, UsageError
from hierarchy_builder.files.exclusion import LeaseLostError, held_lease
from hierarchy_builder.files.remote import store_error
from hierarchy_builder.machine.process import num_cpus, private_folder, socket_folder
from hierarchy_builder.records import Block
from hierarchy_builder.store.ledger import Ledger
from hierarchy_builder.terminal import counted

ResultT = TypeVar("ResultT")

RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Environment of Ray: it sends no usage reports. Variables that the user has set are kept."""

IDLE_WARNING_S = 300
"""Seconds without a finished unit after which the free resources are logged."""

MAX_IDLE_INTERVALS = 6
"""Intervals of that length after which a run without any worker stops."""

BRIEF_AHEAD = 64
"""UNITS_AHEAD of stages, whose results are markers on disk: the driver holds a few numbers of each, and a slow unit
does not keep the others waiting."""

CONNECT_TIMEOUT_S = 20
"""Timeout of the connection to a Ray cluster, in seconds."""

CPUS_PER_WORKER, WORKERS_PER_GPU, THREADS_PER_CPU = 3, 6, 1.5
"""Cores that decode and cluster for one worker on a GPU, most workers on one GPU, and threads of all of them for each
core, since a worker between two units leaves its own idle: benchmarks/builder/builder_model.py."""

ENCODING_PER_GPU = 2
"""Processes on one GPU that only encode: one computes while the other takes crops and gives features."""

ADD_A_NODE = "add a node, or stop other jobs; then repeat the same command to continue"
"""What a user can do where nothing can start."""

FEW_IMAGES = 2048
"""Up to so many images, work begins in this process if the user does not say where."""

RAY_START_S = 12.0
"""Seconds that a stage takes longer for starting Ray and workers: benchmarks/builder/ray_start.py; see `_Here`."""

MAX_WORKERS_PER_CPU = 16
"""Workers of a local Ray for each CPU; it starts a process for each, and with far more it never answers."""

TOKEN_PLACES = (
    "put the token that the cluster was started with into RAY_AUTH_TOKEN, or the path of a file that holds it into "
    "RAY_AUTH_TOKEN_PATH (Ray also reads ~/.ray/auth_token)"
)
"""What a user can do after an authentication error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """Where units run."""

    count: int | None = None
    """Processes; 0 runs in this process. None takes one per CPU of the machine or cluster, and for few images
    begins in this process; see `begins_here`."""
    address: str | None = None
    """Address of a Ray cluster (`auto` for the one this machine belongs to); without it a local Ray starts."""
    gpus_per_worker: float | None = None
    """GPUs a worker reserves in a stage that can use them; None lets up to six share one, with about 3 CPUs each."""
    encoding: int | None = None
    """Processes that only encode, fed by the workers, which then need no GPU; with 0 every worker encodes. None takes
    two for each GPU of a cluster that has more CPUs than those beside its GPUs, and else 0."""

    def __post_init__(self) -> None:
        for flag, asked in (("--encoding-workers", self.encoding), ("--workers", self.count)):
            if asked is not None and asked < 0:
                raise UsageError(f"{flag} is {asked}, expected 0 or more")
        most = MAX_WORKERS_PER_CPU * num_cpus()
        if self.count is not None and self.count > most and self.cluster is None:
            raise UsageError(
                f"--workers is {self.count:,}, expected at most {most:,}: this process may use "
                f"{counted(num_cpus(), 'CPU')}, and more workers than CPUs gain nothing"
            )

    @property
    def cluster(self) -> str | None:
        """Address of the Ray cluster to join, also where only the environment names it."""
        return self.address or os.environ.get("RAY_ADDRESS")

    def that_see(self, place: Path) -> Workers:
        """Workers that can write to a place; memory:// is that of one process, so UsageError if others are asked."""
        if not str(place).startswith("memory://") or self.count == 0:
            return self
        if self.count is not None or self.cluster is not None:
            raise UsageError(
                f"{place} is seen by this process alone: add --workers 0, or choose another place"
            )
        return replace(self, count=0)

    def begins_here(self, num_images: int) -> bool:
        """Whether a stage over so many images begins in this process, because nobody asked for workers."""
        return self.count is None and self.cluster is None and num_images <= FEW_IMAGES


class Pool(Protocol):
    """Workers that have loaded an object each."""

    def map(
        self, function: Callable[..., ResultT], units: Sequence[Block], *shared: Any
    ) -> Iterator[ResultT]:
        """Yield `function(loaded, unit, threads, *shared)` for each unit, in the order of `units`.

        A call may start up to `threads` threads; torch itself uses one. Raises what a call raises.
        """


@contextlib.contextmanager
def open_pool(
    load: Callable[..., Any],
    workers: Workers,
    units: Sequence[Block],
    *,
    uses_gpu: bool = False,
    encoder: Callable[[], Encoder] | None = None,
) -> Iterator[Pool]:
    """Start at most one worker for each of `units`, which call `load` once each; they end with the `with` block.

    encoder: loads what `load` may be given as `encoder`, where other processes encode for the workers.
    Raises BuilderError if the cluster cannot place a worker.
    """
    on_ray = partial(_ray_pool, load, workers, len(units), uses_gpu, encoder)
    with contextlib.ExitStack() as started:
        if workers.count == 0:
            yield _Here(load())
        elif workers.begins_here(sum(map(len, units))):
            yield _Here(load(), lambda: started.enter_context(on_ray()))
        else:
            yield started.enter_context(on_ray())


@contextlib.contextmanager
def _ray_pool(
    load: Callable[..., Any],
    workers: Workers,
    num_units: int,
    uses_gpu: bool,
    encoder: Callable[[], Encoder] | None,
) -> Iterator[_RayPool]:
    # Ray reports lost workers on stdout, which is reserved for results.
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as started:
        _start_ray(workers)
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus_and_gpus = [(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes]
        num_encoding = 0 if encoder is None else _num_encoding(workers, cpus_and_gpus)
        if encoder is not None and num_encoding:
            load = partial(load, encoder=started.enter_context(_encoding_apart(encoder, num_encoding)))
            uses_gpu = False
        resources = ray.cluster_resources()
        cpus, available = int(resources.get("CPU", 0)) - num_encoding, resources.get("GPU", 0)
        gpus = _gpus_per_worker(workers, uses_gpu, available, cpus)
        count = min(workers.count or cpus, num_units, cpus, _that_fit(available, gpus) if gpus else cpus)
        if count < 1:
            raise BuilderError(
                f"the Ray cluster has {cpus} CPUs and {available:g} GPUs, a worker needs 1 CPU"
                f" and {gpus:g} GPUs: add a node, or use --workers 0"
            )
        actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, max_task_retries=0)(_Worker)
        start = partial(actor.remote, threads_per_worker(cpus, count, uses_gpu and gpus > 0))
        pool = _RayPool(load, start, count)
        started.callback(pool.close)
        yield pool


def map_units(
    load: Callable[..., Stage],
    ledger: Ledger,
    units: Sequence[Block],
    workers: Workers,
    encoder: Callable[[], Encoder] | None = None,
) -> Iterator[dict[str, Any]]:
    """Run all `units` and mark each as done; yields what `perform` returns of each, in order.

    encoder: loads the one that the units need, if they do; see `open_pool`. Raises what a unit raises; finished units
    stay marked.
    """
    if units:
        workers = workers.that_see(ledger.folder)
        with open_pool(load, workers, units, uses_gpu=encoder is not None, encoder=encoder) as pool:
            yield from pool.map(perform, units, replace(ledger, lease=held_lease(ledger.folder)))


def has_gpu(workers: Workers) -> bool:
    """Whether the workers have a GPU to encode on; joins the Ray cluster if they run there."""
    if workers.cluster is None or workers.count == 0:
        return torch.cuda.is_available()
    _start_ray(workers)
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0


def start_local(**options: Any) -> None:
    """Start a Ray that only this process and its workers can use; `shutdown` ends it.

    It listens on the loopback interface and accepts only calls that carry a token. The token is a new random one,
    and only the environment of the Ray processes holds it, unless RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH names one.
    Raises BuilderError if the named token cannot be read, or Ray does not start.
    """
    import ray
    from ray._private import ray_constants

    values = {"RAY_AUTH_MODE": "token"}
    options = {"_temp_dir": _private_session(), **options}
    if not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        values["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Ray replaces 127.0.0.1 by the address of the network interface unless this constant is false. Ray reads the
    # environment variable behind it only at import, and `ray start --address` refuses to run with that variable.
    before = ray_constants.ENABLE_RAY_CLUSTER
    with _authentication(values):
        ray_constants.ENABLE_RAY_CLUSTER = before and ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR in os.environ
        try:
            ray.init(address="local", include_dashboard=False, **options)
        except ray.exceptions.AuthenticationError:
            raise
        except Exception as error:  # Ray raises a plain Exception, or what the operating system said
            raise BuilderError(
                f"Ray did not start: {' '.join(str(error).split())}; look for room on the disk of "
                f"{options['_temp_dir']} and for memory (`hierarchy-builder doctor`), or use --workers 0"
            ) from None
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = before


def _private_session() -> str:
    """A new folder for the sockets and logs of a local Ray, which this process removes when it ends.

    Ray gives all users of the machine the right to write into its folders, this one too: they could put a socket of
    their own in place of one of Ray's. So it lies in a folder that nobody else can enter.
    """
    return private_folder(socket_folder(), "r-") + "/t"


def join(address: str, **options: Any) -> None:
    """Connect to a running cluster, with the token that the user has for it.

    Raises BuilderError if no cluster answers, or if it rejects the token.
    """
    import ray
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    host, colon, port = address.removeprefix("ray://").rpartition(":")
    is_reached = False
    try:
        if colon and port.isdecimal():  # Ray itself waits for minutes if nothing listens
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
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
    """Hold back everything that is written to stderr, and write it only if the block succeeds.

    Ray repeats a rejected call for 20 s and writes a line each time, from C++; our error reports it once.
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
    """Set environment variables that the user has not set, for a `ray.init` inside the block.

    Ray caches the mode and the token. They are read again here, since this process may have used another Ray before.
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
    """Stop a local Ray, or disconnect from a cluster; does nothing if Ray was not started."""
    import ray

    if ray.is_initialized():
        ray.shutdown()


class _Here:
    """Runs units in this process, and those that are left on Ray as soon as that is expected to end sooner.

    start: starts Ray; without it all units run here. The last unit says how long each of the others takes here, and how
    many seconds of CPUs, since it may use several threads: n workers share these seconds, after RAY_START_S. The first
    unit does not count, since libraries compile and warm up in it. Few images have units of at most 128 rows, so that
    no single unit keeps the other CPUs waiting for long. Where the work happens changes no result.
    """

    def __init__(self, loaded: Any, start: Callable[[], Pool] | None = None) -> None:
        self.loaded, self.start = loaded, start
        self.pool: Pool | None = None

    def map(
        self, function: Callable[..., ResultT], units: Sequence[Block], *shared: Any
    ) -> Iterator[ResultT]:
        done, since = 0, (time.perf_counter(), time.process_time())
        while self.pool is None and done < len(units):
            with one_thread():
                result = function(self.loaded, units[done], num_cpus(), *shared)
            yield result
            now = time.perf_counter(), time.process_time()
            done, spent, since = done + 1, (now[0] - since[0], now[1] - since[1]), now
            if self.start is not None and done > 1 and saves_time(*spent, len(units) - done):
                self.loaded = None
                if torch.cuda.is_initialized():
                    torch.cuda.empty_cache()  # for the workers that share the GPU
                self.pool = self.start()
        if self.pool is not None:
            yield from self.pool.map(function, units[done:], *shared)


def saves_time(seconds: float, cpu_seconds: float, num_units: int) -> bool:
    """Whether units end sooner on workers that have to be started.

    seconds, cpu_seconds: of one unit in this process, on the clock and of all its threads together.
    """
    shared = max(seconds, cpu_seconds) / max(1, min(num_cpus(), num_units))
    return num_units * (seconds - shared) > RAY_START_S


class _RayPool:
    """A pool of Ray actors. A lost actor is replaced if the cluster has capacity; others take over its units.

    The retries of Ray itself are not used: they wait forever for the CPU of a lost node, even if other actors are
    free.
    """

    def __init__(self, load: Callable[[], Any], start: Callable[[], Any], count: int) -> None:
        self.load, self.start, self.count = load, start, count
        self.queues: list[WorkerQueue] = []
        self.loading: dict[Any, Any] = {}
        self.failed_loads = 0
        for _ in range(count):
            self._start_worker()

    def map(
        self, function: Callable[..., ResultT], units: Sequence[Block], *shared: Any
    ) -> Iterator[ResultT]:
        """Keep two units in the queue of every worker, so that no worker waits for the driver."""
        import ray

        stored = [ray.put(value) for value in shared]
        ahead = BRIEF_AHEAD if function is perform else UNITS_AHEAD
        plan = Schedule(len(units), ahead * self.count, self.queues)
        running = dict[Any, tuple[int, WorkerQueue]]()
        while not plan.is_over:
            while (call := plan.next_call()) is not None:
                number, queue = call
                running[queue.actor.call.remote(function, units[number], *stored)] = call
            for reference in self._wait([*running, *self.loading]):
                if reference in self.loading:
                    if (loaded := self._add_loaded(reference)) is not None:
                        plan.join(loaded)
                    continue
                number, queue = running.pop(reference)
                try:
                    result = _result(reference)
                except _WorkerLostError as error:
                    plan.leave(queue)
                    is_first, name = self._replace(queue), units[number].number
                    plan.lose(number, queue, error, is_first=is_first, name=name)
                else:
                    plan.finish(number, queue, result)
            yield from plan.results()

    def close(self) -> None:
        """Stop all workers."""
        import ray

        for actor in [*self.loading.values(), *(queue.actor for queue in self.queues)]:
            ray.kill(actor)

    def _start_worker(self) -> None:
        actor = self.start()
        self.loading[actor.load.remote(self.load)] = actor

    def _add_loaded(self, reference: Any) -> WorkerQueue | None:
        """Add a worker that has finished loading, and return it. Raises what loading raised."""
        actor = self.loading.pop(reference)
        try:
            _result(reference)
        except _WorkerLostError as error:
            self.failed_loads += 1
            if self.failed_loads > UNIT_RETRIES:
                raise BuilderError(
                    f"{self.failed_loads} workers were lost while they loaded: {error}"
                ) from None
            self._start_worker()
            return None
        self.failed_loads = 0
        self.queues.append(WorkerQueue(actor))
        return self.queues[-1]

    def _replace(self, queue: WorkerQueue) -> bool:
        """Replace a worker when its loss is first seen; returns whether it was."""
        import ray

        if queue not in self.queues:
            return False
        self.queues.remove(queue)
        ray.kill(queue.actor)  # its node may only be unreachable
        logging.getLogger(__name__).warning("a worker was lost, %d are left", len(self.queues))
        self._start_worker()
        return True

    def _wait(self, references: list[Any]) -> list[Any]:
        """Return the calls that have ended; log while none does, and raise BuilderError if no worker can start."""
        import ray

        for _ in range(MAX_IDLE_INTERVALS):
            if _ended(references, timeout=IDLE_WARNING_S):
                # And all others that have, since a call with thousands of references takes a while.
                return _ended(references, num_returns=len(references), timeout=0)
            logging.getLogger(__name__).warning(
                "no unit finished in %d s; %d workers run, %d more are starting, free resources: %s",
                IDLE_WARNING_S,
                len(self.queues),
                len(self.loading),
                ray.available_resources(),
            )
            if self.queues:
                return []
        raise BuilderError(
            f"no worker could start for {MAX_IDLE_INTERVALS * IDLE_WARNING_S} s, the cluster has "
            f"{ray.cluster_resources()}: {ADD_A_NODE}"
        )


def _ended(references: list[Any], **how: Any) -> list[Any]:
    """Those of the calls that `ray.wait` finds ended. A signal that comes meanwhile raises what its handler raises.

    Rarely Ray returns although the handler has raised, and Python calls that a SystemError, caused by what was raised.
    """
    import ray

    try:
        return ray.wait(references, **how)[0]
    except SystemError as error:
        raise error.__cause__ or error from None


class _Worker:
    """A Ray actor: loads once, then runs units."""

    def __init__(self, threads: int) -> None:
        self.loaded, self.threads, self.metrics = None, threads, _Metrics()

    def load(self, load: Callable[[], Any]) -> None:
        with _told_to_the_driver():
            self.loaded = load()

    def call(self, function: Callable[..., Any], unit: Block, *shared: Any) -> Any:
        with _told_to_the_driver(), one_thread():
            result = function(self.loaded, unit, self.threads, *shared)
        if function is perform:
            self.metrics.count(type(self.loaded).__name__, result)
        return result


class _StoppedError(Exception):
    """LeaseLostError on its way to the driver; Ray carries only an Exception."""


@contextlib.contextmanager
def _told_to_the_driver() -> Iterator[None]:
    """Raise what means the same in the driver: errors of a store lose their cause there, or cannot be pickled.

    A process whose GPU has failed ends: every later call would fail, and another worker repeats the unit.
    """
    try:
        yield
    except LeaseLostError as error:
        raise _StoppedError(str(error)) from None
    except Exception as error:
        if is_broken_device(error):
            logging.getLogger(__name__).error("this worker ends, since its GPU failed: %s", error)
            os._exit(1)
        if told := store_error(error):
            raise told from None
        raise


def is_broken_device(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, has left the CUDA context of this process unusable."""
    while error is not None:
        if not isinstance(error, torch.OutOfMemoryError) and str(error).startswith("CUDA error"):
            return True
        error = error.__cause__
    return False


class _Metrics:
    """Counters of a worker for the metrics endpoint of the cluster."""

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
        """Count a finished unit by what `perform` returned."""
        tags, failed = {"stage": stage}, result["failed"]
        if result["images"]:
            self.images.inc(result["images"], tags)
        if failed:
            self.failed.inc(failed, tags)
        self.seconds.observe(result["seconds"], tags)


class _Encoding:
    """A Ray actor that only encodes; Ray starts it again where it is lost, and its calls can be repeated."""

    def __init__(self, load: Callable[[], Encoder]) -> None:
        self.load = load

    @cached_property
    def encoder(self) -> Encoder:
        with _told_to_the_driver():
            return self.load()

    def facts(self) -> dict[str, Any]:
        names = ("name", "image_size_px", "grid", "width", "weights_hash")
        return {**{name: getattr(self.encoder, name) for name in names}, "described": self.encoder.describe()}

    def encode(self, images: np.ndarray, half: bool) -> np.ndarray:
        with _told_to_the_driver(), one_thread():
            try:
                return encode(self.encoder, images, half=half)
            except BuilderError as error:
                if not isinstance(error.__cause__, torch.OutOfMemoryError):
                    raise
        torch.cuda.empty_cache()  # the caller halves its batches, see `ImageEncoder`
        raise torch.OutOfMemoryError(f"{len(images)} images at once")


@dataclass(kw_only=True, slots=True)
class _FarEncoder:
    """An encoder that other processes evaluate; crops and features go through the object store of Ray.

    A worker makes one call at a time, so no more batches wait for the encoders than there are workers.
    """

    actors: list[Any]
    name: str
    image_size_px: int
    grid: tuple[int, int]
    width: int
    weights_hash: str
    described: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        """See `Encoder`."""
        return self.described

    def encode(self, images: np.ndarray) -> np.ndarray:
        """See `Encoder`."""
        return self._evaluated(images, half=False)

    def begin_half(self, images: np.ndarray) -> np.ndarray:
        """The same as float16 where the encoder gives it; see `encoders.encode`."""
        return self._evaluated(images, half=True)

    def _evaluated(self, images: np.ndarray, half: bool) -> np.ndarray:
        until, lost = time.monotonic() + MAX_IDLE_INTERVALS * IDLE_WARNING_S, 0
        while True:
            self.actors.append(self.actors.pop(0))
            try:
                features: np.ndarray = _result(self.actors[-1].encode.remote(images, half))
                return features
            except _WorkerLostError as error:
                if time.monotonic() > until:
                    raise BuilderError(
                        f"no process that encodes has answered: {error}; {ADD_A_NODE}"
                    ) from None
            lost += 1
            if lost % len(self.actors) == 0:
                time.sleep(1)  # until Ray has started one again


@contextlib.contextmanager
def _encoding_apart(load: Callable[[], Encoder], count: int) -> Iterator[_FarEncoder]:
    """Start `count` processes that only encode, on the GPUs where there are any; they end with the `with` block."""
    import ray

    share = min(1.0, math.floor(10_000 * ray.cluster_resources().get("GPU", 0) / count) / 10_000)
    start: Any = ray.remote(num_cpus=1, num_gpus=share, max_restarts=-1, max_task_retries=0)(_Encoding)
    actors = [start.remote(load) for _ in range(count)]
    try:
        facts = actors[0].facts.remote()
        if not ray.wait([facts], timeout=MAX_IDLE_INTERVALS * IDLE_WARNING_S)[0]:
            raise BuilderError(f"no process that encodes could start; {ADD_A_NODE}")
        try:
            encoder = _FarEncoder(actors=actors, **_result(facts))
        except _WorkerLostError as error:
            raise BuilderError(f"the process that encodes was lost while it loaded: {error}") from None
        yield encoder
    finally:
        for actor in actors:
            ray.kill(actor)


def _num_encoding(workers: Workers, nodes: Sequence[tuple[float, float]]) -> int:
    """Processes that only encode. nodes: CPUs and GPUs of each."""
    if workers.encoding is not None:
        return workers.encoding
    is_fed_by_others = any(cpus and not gpus for cpus, gpus in nodes)
    return ENCODING_PER_GPU * int(sum(gpus for _, gpus in nodes)) if is_fed_by_others else 0


def threads_per_worker(cpus: int, workers: int, uses_gpu: bool) -> int:
    """Threads of each worker that decode and cluster."""
    return max(1, int((THREADS_PER_CPU if uses_gpu else 1) * cpus / workers))


class _WorkerLostError(Exception):
    """A worker or its node was lost, with the call that it was running or the result of that call."""


def _result(reference: Any) -> Any:
    """Return the result of a call. Raises what the call raised, or _WorkerLostError."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, _StoppedError):
            raise LeaseLostError(str(error.cause)) from None
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise _WorkerLostError(str(error)) from None


def _start_ray(workers: Workers) -> None:
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return
    address = workers.cluster
    handler = signal.getsignal(signal.SIGTERM)
    if address:
        join(address, log_to_driver=False, logging_level=logging.ERROR)
    else:
        start_local(
            num_cpus=max((workers.count or 1) + (workers.encoding or 0), num_cpus()),
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray installs one that ends the process at once


def _gpus_per_worker(workers: Workers, uses_gpu: bool, available: float, cpus: int) -> float:
    """Share of a GPU for a worker: a whole one only where there are few cores, since one process cannot feed it."""
    if not uses_gpu:
        return 0.0
    if workers.gpus_per_worker is not None:
        return workers.gpus_per_worker
    if available < 1:
        return 0.0
    asked = math.ceil((workers.count or cpus / CPUS_PER_WORKER) / available)
    return math.floor(10_000 / min(max(1, asked), WORKERS_PER_GPU)) / 10_000  # Ray counts in ten-thousandths


def _that_fit(available: float, each: float) -> int:
    """Workers that fit on the GPUs; none lies on two of them."""
    return int(available / each) if each >= 1 else int(available) * int(1 / each)
