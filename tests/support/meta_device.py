"""A device that has shapes and no numbers, torch's `meta`, and a list of what a program would wait for on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default: 1, aten.equal.default: True}
"""Calls that return a number to Python, and the number that stands for it here."""
CHECKS = (aten._linalg_eigh.default,)
"""Calls on CUDA that wait inside, to see whether they failed."""


class Waits(TorchDispatchMode):
    """Lists the calls that wait for the device: numbers that are read, and copies that are not asynchronous.

    A copy is asynchronous if that is asked for and the memory of the host is page-locked. Calls whose results have a
    size that depends on numbers, which would wait too, are errors on `meta`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.locked: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:  # inference mode leaves such calls whole
                return func.decompose(*args, **kwargs)
        locks = kwargs.pop("pin_memory", None)
        if func is aten._pin_memory.default or locks:
            out = args[0].clone() if func is aten._pin_memory.default else func(*args, **kwargs)
            self.locked.append(out.untyped_storage())
            return out
        if func in (*READS, *CHECKS) and args[0].is_meta:
            self.found.append(str(func))
            return READS[func] if func in READS else func(*args, **kwargs)
        if func is aten._to_copy.default and "device" in kwargs:
            to = torch.device(kwargs["device"])
            if args[0].is_meta and to.type == "cpu":
                self.found.append(f"{func} to the host")
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            self._note_copy(args[0], to, args[0], kwargs.get("non_blocking", False))
        elif func is aten.copy_.default:
            into, source = args[:2]
            host = into if source.is_meta else source
            self._note_copy(source, into.device, host, (*args, False)[2])
            if source.is_meta and not into.is_meta:
                return into
        return func(*args, **kwargs)

    def _note_copy(self, source: Tensor, to: torch.device, host: Tensor, is_asynchronous: bool) -> None:
        is_locked = any(host.untyped_storage()._cdata == each._cdata for each in self.locked)
        if {source.device.type, to.type} == {"cpu", "meta"} and not (is_asynchronous and is_locked):
            self.found.append(f"copy of {tuple(source.shape)} {source.dtype} to {to.type}")


@contextmanager
def waits_on_meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """List inside the block what waits for `meta`, which has neither random numbers nor autocast of its own."""
    generator = torch.Generator
    with monkeypatch.context() as patch, Waits() as waits:
        patch.setattr(torch, "Generator", lambda device="cpu": generator())
        patch.setattr(torch, "autocast", lambda *args, **named: nullcontext())
        yield waits
