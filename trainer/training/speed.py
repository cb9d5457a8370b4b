"""Time and memory of a GPU: the share of its peak, the images of a backward pass, and advice at its errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from hierarchy_builder.errors import TrainerError
from hierarchy_builder.terminal import counted

PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
}
"""Dense bfloat16 operations per second by a part of the device's name. Source: data sheets of NVIDIA."""
USABLE = 0.8
"""Share of the memory of a GPU that is planned; the rest is for the allocator and the kernels."""


@contextmanager
def float32_products(device: torch.device, precision: str) -> Iterator[None]:
    """Choose inside the block how a GPU multiplies what stays float32; the setting of the process comes back after it.

    A run of bfloat16 takes TF32 products there, as JAX and so the release do.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "bfloat16" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def peak_of(name: str) -> float | None:
    """Operations per second of the device called `name`, None for one that is not in `PEAKS`."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def counted_flops(call: Callable[[], object]) -> int:
    """Floating-point operations of a call, of its backward pass too if it runs one, as torch counts them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # torch does not count every fused kernel of attention, so attention runs as plain products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def images_that_fit(share: int, each: float, free: float) -> int:
    """Images of a backward pass: the whole share, or else its half, quarter, … of `each` bytes, that fit in `free`."""
    images = share
    while images > 1 and images * each > USABLE * free:
        images = -(-images // 2)
    return images


@contextmanager
def explained(images_of: Callable[[], int]) -> Iterator[None]:
    """Turn errors of the device in a step into TrainerError with advice; images_of: images in a backward pass."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason, images = " ".join(str(error).split())[:200], images_of()
        less = (
            f"--set micro_batch_size={images // 2}" if images > 1 else "--set activation_checkpointing=true"
        )
        raise TrainerError(
            f"the device has no memory left for {counted(images, 'image')} in one backward pass: repeat the command "
            f"with {less}, which takes the same steps; it goes on from the last checkpoint ({reason})"
        ) from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        # Errors of CUDA have a class of their own in newer releases of torch only.
        if not reason.startswith(("CUDA error", "CUDNN", "CUBLAS", "cuDNN")):
            raise
        raise TrainerError(
            f"the device failed: {reason}; look at `nvidia-smi` and `dmesg` for its errors; the same command goes on "
            "from the last checkpoint, on another device if this one stays broken"
        ) from None
