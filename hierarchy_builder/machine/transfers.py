"""Arrays as tensors, and copies between a device and the memory of the host that wait for no other work of it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def as_tensor(array: np.ndarray) -> Tensor:
    """The array as a tensor in the same memory; read-only memory, of which torch warns, is copied."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def sent(values: Tensor, device: torch.device | str) -> Tensor:
    """Send values to `device`; a copy of ordinary memory would wait for all work that the device has."""
    if torch.device(device).type != "cpu":
        values = values.contiguous().pin_memory()
    return values.to(device, non_blocking=True)


def begin_fetch(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Begin to copy values to the host; they are there when the event has occurred, for values of a CPU at once."""
    if values.device.type == "cpu":
        return values, None
    there = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    there.copy_(values, non_blocking=True)
    return there, torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None
