"""Data-parallel training: the ranks, and the sums of gradients over them.

Gradients are summed explicitly, because `torch.func.jvp` bypasses the hooks of DistributedDataParallel: a wrapped
model would train on unsynchronised gradients without any error. As a check, the norms of the summed gradients and of
the weights must be equal on all ranks (`check_equal`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from hierarchy_builder.errors import TrainerError

BUCKET_ELEMENTS = 1 << 24
"""Gradient elements summed in one call (64 MiB of float32)."""


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

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its sum over all ranks, in buckets; a missing gradient counts as 0."""
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        if self.size == 1:
            return
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def gather(self, values: Tensor) -> Tensor:
        """Collect `values` [n] of all processes in the order of ranks: [size, n]."""
        if self.size == 1:
            return values[None]
        rows = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(rows, values)
        return torch.stack(rows)


def check_equal(values: Tensor, what: str) -> None:
    """Raise TrainerError unless `values` [size], one number per process, are all equal."""
    if not torch.equal(values, values[:1].expand_as(values)):
        raise TrainerError(
            f"{what} differs between processes: {values.tolist()}; stop and resume from a checkpoint"
        )


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    filled = 0
    for gradient in gradients:
        if bucket and filled + gradient.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket, filled = [], 0
        bucket.append(gradient)
        filled += gradient.numel()
    if bucket:
        yield bucket


@contextmanager
def joined_world(timeout_s: float = 1800.0) -> Iterator[World]:
    """Join the process group that `torchrun` started (gloo on CPU, nccl on CUDA), or use a single process."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World(device=device)
        return
    if dist.is_initialized():  # by the program that started this process, for example Ray Train
        yield World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)
    finally:
        dist.destroy_process_group()
