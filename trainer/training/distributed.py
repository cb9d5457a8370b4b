"""Data-parallel training: the ranks, and the sums of gradients over them.

Gradients are summed explicitly, because `torch.func.jvp` bypasses the hooks of DistributedDataParallel: a wrapped
model would train on unsynchronised gradients without any error. As a check, the norms of the summed gradients and of
the weights must be equal on all ranks (`check_equal`).
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib import import_module
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from hierarchy_builder.errors import TrainerError, UsageError

BUCKET_ELEMENTS = 1 << 24
"""Gradient elements summed in one call (64 MiB of float32)."""

QUIET_SECONDS = 10.0
"""After this time a process says whom it waits for."""
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""Signs in errors of gloo, which has no class for them, that a process of the group is gone."""
ALONE = "start all of them with torchrun, or unset WORLD_SIZE to train in one process"


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """This process's rank among all; rank 0 also writes files and prints."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def gather(self, values: Tensor) -> Tensor:
        """Collect `values` [n] of all processes in the order of ranks: [size, n]."""
        if self.size == 1:
            return values[None]
        rows = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(rows, values)
        return torch.stack(rows)

    def sum(self, values: Tensor) -> Tensor:
        """Add up `values`, of any shape, of all processes in the order of ranks, so that every one gets the same."""
        return values if self.size == 1 else self.gather(values.flatten()).sum(dim=0).view_as(values)

    def join(self, rows: Tensor) -> Tensor:
        """Join `rows` [n, …] of all processes, equally many in each, in the order of ranks."""
        return rows if self.size == 1 else self.gather(rows.flatten()).view(-1, *rows.shape[1:])


def check_equal(values: Tensor, what: str) -> None:
    """Raise TrainerError unless `values` [size], one number per process, are all equal."""
    if not torch.equal(values, values[:1].expand_as(values)):
        raise TrainerError(
            f"{what} differs between processes: {values.tolist()}; stop and resume from a checkpoint"
        )


class GradientSum:
    """Replaces gradients by their sums over all ranks, in buckets, each of which may begin during the backward pass.

    DistributedDataParallel cannot do this, since its hooks do not see forward-mode derivatives. Of a compiled loss all
    gradients come at the end of the backward pass, so that the buckets overlap with each other only.
    """

    def __init__(self, world: World, parameters: Iterable[Tensor]) -> None:
        self._world = world
        # A backward pass makes the last gradients first; the order of buckets must be the same on all ranks.
        self._buckets = list(_buckets(list(parameters)[::-1]))
        self._missing = [len(bucket) for bucket in self._buckets]
        self._begun: list[tuple[Tensor, dist.Work]] = []

    @contextmanager
    def during(self) -> Iterator[None]:
        """Begin inside the block with each bucket whose gradients are made; it holds the last backward pass alone."""
        hooks = []
        for number, bucket in enumerate(self._buckets if self._world.size > 1 else []):
            hooks += [each.register_post_accumulate_grad_hook(partial(self._made, number)) for each in bucket]
        try:
            yield
        except BaseException:
            self._begun.clear()  # see `finish`
            raise
        finally:
            for hook in hooks:
                hook.remove()

    def finish(self) -> None:
        """Begin with the buckets that are left, and wait for all; a missing gradient counts as 0."""
        for parameter in chain.from_iterable(self._buckets):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._missing = [0] * len(self._buckets)
        self._begin()
        # No sum is kept: one that outlives the process group can abort the process as it exits.
        begun, self._begun = self._begun, []
        for bucket, (flat, work) in zip(self._buckets, begun, strict=False):
            work.wait()
            parts = flat.split([each.numel() for each in bucket])
            torch._foreach_copy_(_gradients(bucket), list(map(Tensor.view_as, parts, bucket)))

    def _made(self, number: int, parameter: Tensor) -> None:
        self._missing[number] -= 1
        self._begin()

    def _begin(self) -> None:
        """Begin with the next buckets as far as they are complete."""
        while self._world.size > 1 and (done := len(self._begun)) < len(self._buckets):
            if self._missing[done]:
                break
            flat = torch.cat([gradient.flatten() for gradient in _gradients(self._buckets[done])])
            self._begun.append((flat, dist.all_reduce(flat, async_op=True)))


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [each.grad for each in parameters if each.grad is not None]


def _buckets(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    filled = 0
    for parameter in parameters:
        if bucket and filled + parameter.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket, filled = [], 0
        bucket.append(parameter)
        filled += parameter.numel()
    if bucket:
        yield bucket


@contextmanager
def joined_world(join_s: float = 600.0, timeout_s: float = 1800.0) -> Iterator[World]:
    """Join the process group that `torchrun` started (gloo on CPU, nccl on CUDA), or use a single process.

    join_s: how long the other processes are waited for; timeout_s: the same within a step. Raises UsageError for
    variables of the environment that name no such group, TrainerError when the others do not come.
    """
    size, rank = environment_number("WORLD_SIZE", 1, least=1), environment_number("RANK", 0)
    local_rank = environment_number("LOCAL_RANK", 0)
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"LOCAL_RANK is {local_rank}, but this machine shows {torch.cuda.device_count()} CUDA devices: start "
                "one process for each device"
            )
        torch.cuda.set_device(device)
    if size == 1:
        yield World(device=device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    is_ours = not dist.is_initialized()  # or of the program that started this process, for example Ray Train
    if is_ours:
        own = device if backend == "nccl" else None  # with it, nccl connects now, and to the right device
        _meet(rank, size, join_s, backend=backend, timeout=timedelta(seconds=timeout_s), device_id=own)
    try:
        yield World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)
    except Exception as error:
        # To destroy a group of nccl is a call of all ranks: one that failed alone would wait in it before it says
        # why. The end of the process aborts the group. What all ranks agree to stop for is no Exception.
        is_ours = is_ours and backend == "gloo"
        reason = " ".join(str(error).split())[:200]
        of_gloo = type(error) is RuntimeError and any(sign in reason for sign in LOST)
        if not isinstance(error, dist.DistError) and not of_gloo:
            raise
        raise TrainerError(
            f"another process of this run has ended: its own message says why, or if it was killed, torchrun's summary "
            f"and `dmesg` ({reason}); the same command goes on from the last checkpoint"
        ) from None
    finally:
        if is_ours:
            dist.destroy_process_group()


def environment_number(name: str, default: int, least: int = 0) -> int:
    """Read a variable of the environment; one that is empty counts as not set."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal() or int(text) < least:
        raise UsageError(f"{name} is {text!r}, expected a number from {least}; {ALONE}")
    return int(text)


def _meet(rank: int, size: int, join_s: float, **group: Any) -> None:
    """Wait for all processes of the group and connect to them; says on stderr what it waits for."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UsageError(f"WORLD_SIZE is {size}, but {' and '.join(missing)} not set: {ALONE}")
    if rank >= size:
        raise UsageError(f"RANK is {rank}, expected 0 to WORLD_SIZE − 1, {size - 1}; {ALONE}")
    environment_number("MASTER_PORT", 0)
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    others = f"the other {size - 1} of {size} processes (WORLD_SIZE) at {where}"
    said = f"this is rank {rank}; waiting at most {join_s:.0f} s for {others}; {ALONE}"
    notice = threading.Timer(QUIET_SECONDS, print, [said], {"file": sys.stderr, "flush": True})
    notice.daemon = True
    notice.start()
    # Functions of this module have the group that exists when it is imported as a default. Imported later, it would
    # keep the group, and so the threads of gloo, which abort the process if they free a tensor as Python ends.
    import_module("torch.distributed.nn.functional")
    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=timedelta(seconds=join_s)))
        store = dist.PrefixStore("default_pg", store)
        dist.init_process_group(store=store, rank=rank, world_size=size, **group)
    except (RuntimeError, ValueError) as error:  # torch has an error of its own for each way to fail
        reason = str(error).strip().partition("\n")[0][:200]
        raise TrainerError(
            f"this process did not meet {others} ({reason}): look whether one of them has ended; {ALONE}"
        ) from None
    finally:
        notice.cancel()
