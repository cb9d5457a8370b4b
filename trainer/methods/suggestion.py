"""Which network to train on given images with given hardware, for how long, and what that costs: a rule without torch.

The rule is a table of limits and a few formulas. It leans on these facts:

- Networks that learn to remove noise reproduce their training images when these are few, and draw new ones when they
  are many; the number at which this turns grows with the network. With photographs of faces at 80×80, two networks
  trained on different images agreed from about 10,000 to 100,000 images on, and copied below 1,000
  (Kadkhodaie et al. 2024, arXiv 2310.02557).
- EDM trained networks of about 60 million parameters on 15,220 to 70,000 images (AFHQv2, CIFAR-10, FFHQ), for 200
  million images seen, with augmentation (Karras et al. 2022, arXiv 2206.00364).
- Trajectory Forcing trains 175 million parameters and more on 1.28 million images of ImageNet for 80 epochs.

The limits between these points are ours, and unmeasured: no run here compared sizes on 10,000 to 100,000 images.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hierarchy_builder.errors import UsageError
from hierarchy_builder.terminal import counted

IMAGES_FOR = ((120_000_000, 0), (250_000_000, 200_000), (600_000_000, 1_000_000))
"""Most parameters of a network → images from which it is suggested. Larger ones are asked for by name."""
EPOCHS, LEAST_SEEN, MOST_EPOCHS, MOST_SEEN = 80, 5_000_000, 1_000, 102_400_000
"""On GPUs: epochs of the papers on ImageNet; fewer images are repeated until LEAST_SEEN, but not more often than
MOST_EPOCHS; MOST_SEEN is the length of the papers' runs."""
CPU_EPOCHS, MOST_SEEN_CPU = 10, 200_000
"""On CPU cores: epochs, and the images after which a run ends that would otherwise take days."""
STEPS = 15_000
"""Steps that a run on GPUs takes at least: batches are smaller where there are few images."""
BATCHES_PER_EPOCH = 8
"""Least number of batches in an epoch."""
USABLE = 0.8
"""Share of a GPU's memory that is planned; the rest is for the allocator and the kernels."""
CONDITION_TOKENS = 32
"""Tokens beside those of the grid: class, time, level."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What trains: one or several equal GPUs, or the cores of a CPU."""

    name: str
    count: int
    """GPUs, or CPU cores."""
    memory_bytes: int | None = None
    """Memory of one GPU; None on a CPU."""

    @property
    def is_gpu(self) -> bool:
        """Whether these are GPUs."""
        return self.memory_bytes is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """One network to choose from: its preset, fitted to the shards, and its parameters."""

    config: Any
    parameters: int
    has_tangents: bool = False
    """Whether the loss takes derivatives in forward mode, which computes and keeps a tangent beside each value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Suggestion:
    """A configuration to train, why, and what it costs."""

    config: Any
    reason: str
    parameters: int
    epochs: float
    memory_bytes: float
    """See `memory_bytes`."""
    flops: float
    """Floating-point operations of the whole run, see `flops_per_image`."""


def suggest(images: int, device: Device, sizes: Sequence[Size]) -> Suggestion:
    """Choose for shards of so many images among `sizes`, the network for CPU cores first; the others are for GPUs.

    On GPUs it is the largest network that fits and that the number of images allows (IMAGES_FOR), or else the smallest
    that fits, in bfloat16. Raises UsageError without images or sizes.
    """
    if images < 1 or not sizes:
        raise UsageError(f"{counted(images, 'image')} and {counted(len(sizes), 'size')} to choose from")
    small, *large = sizes
    # The most wanted first: those that the images allow from the largest down, then others from the smallest up.
    large = sorted(map(_in_short_numbers, large), key=lambda size: size.parameters)
    allowed = [size for size in large if images >= _images_for(size.parameters)]
    order = [*reversed(allowed), *(size for size in large if size not in allowed)]
    fitting = [size for size in order if _fits(size, device, 1)]
    if not fitting:
        return _on_few(small, images, device)
    return _on_gpu(fitting[0], images, device, fitting[0] in allowed)


def memory_bytes(size: Size, images: int) -> float:
    """Memory of one process that takes `images` images in one backward pass.

    Weights, gradients, two moments and the averages in float32, and for each block and image the activations
    s·w·(34 + 5·a·s/w) bytes at 16 bits (s tokens, width w, a heads), twice that at 32 bits and twice again with
    tangents. A block has 12·w² parameters, which gives the number of blocks.
    Source: Korthikanti et al. (2022), arXiv 2205.05198, eq. 2. It counts attention weights that fast kernels do not
    keep, so it is an upper estimate: 3.0 GiB for the network of docs/results.md that took 2.3 GiB.
    """
    model, optim = size.config.model, size.config.optim
    s, w = _tokens(size), model.width
    blocks = max(model.depth, size.parameters / (12 * w**2))
    each = s * w * (34 + 5 * model.num_heads * s / w)
    each *= (2 if size.config.precision == "float32" else 1) * (2 if size.has_tangents else 1)
    return 4 * size.parameters * (4 + len(optim.ema_halflives_kimg)) + images * blocks * each


def flops_per_image(size: Size) -> float:
    """Operations of one training step for each image: 6 for each parameter and token, 8 with tangents, and attention.

    Source: Kaplan et al. (2020), arXiv 2001.08361, sec. 2.1: 2 forward and 4 backward; a tangent takes 2 more.
    Attention adds the share s/(6·w).
    """
    s = _tokens(size)
    return (8 if size.has_tangents else 6) * size.parameters * s * (1 + s / (6 * size.config.model.width))


def _tokens(size: Size) -> int:
    return math.prod(size.config.model.grid) + CONDITION_TOKENS


def _on_few(size: Size, images: int, device: Device) -> Suggestion:
    """The network for CPU cores, as its preset has it, for longer where there are more images."""
    least = size.config.total_images
    total = max(least, min(CPU_EPOCHS * images, MOST_SEEN_CPU))
    batch = min(size.config.batch_size, _power_of_two(images // BATCHES_PER_EPOCH))
    why = "it trains on CPU" if not device.is_gpu else "no larger network fits into its memory"
    changes: dict[str, Any] = {} if total == least else _pace(size, total)
    return _suggestion(size, images, device, why, total_images=total, batch_size=batch, **changes)


def _on_gpu(size: Size, images: int, device: Device, is_allowed: bool) -> Suggestion:
    total = min(max(EPOCHS * images, LEAST_SEEN), MOST_EPOCHS * images, MOST_SEEN)
    most = min(images // BATCHES_PER_EPOCH, total // STEPS)
    share = max(1, min(size.config.batch_size, _power_of_two(most)) // device.count)
    micro = _power_of_two(share)
    while not _fits(size, device, micro):
        micro //= 2
    why = f"it is the largest that fits and whose size is for {counted(images, 'image')} or fewer"
    if not is_allowed:
        why = "it is the smallest of this method for GPUs, though its size is for more images"
    changes = {"batch_size": share * device.count, "micro_batch_size": micro, **_pace(size, total)}
    return _suggestion(size, images, device, why, total_images=total, **changes)


def _pace(size: Size, total: int) -> dict[str, int]:
    """Ten checkpoints, and ten sheets of samples where the preset draws any."""
    every = max(1, total // 10)
    return {"checkpoint_images": every} | ({"sample_images": every} if size.config.sample_images else {})


def _suggestion(size: Size, images: int, device: Device, why: str, **changes: int) -> Suggestion:
    config = dataclasses.replace(size.config, **changes)
    chosen = dataclasses.replace(size, config=config)
    at_once = config.micro_batch_size or max(1, config.batch_size // (device.count if device.is_gpu else 1))
    epochs = config.total_images / images
    shown = f"{epochs:,.0f}" if epochs >= 10 else f"{epochs:.2g}"
    hardware = counted(device.count, "CPU core")
    if device.memory_bytes is not None:
        hardware = f"{device.count} × {device.name} of {device.memory_bytes / 2**30:.0f} GiB"
    return Suggestion(
        config=config,
        reason=f"{counted(images, 'image')} and {hardware}: {config.preset} "
        f"({size.parameters / 1e6:,.1f} million parameters), because {why}. "
        f"It sees {counted(config.total_images, 'image')} ({shown} epochs) in batches of {config.batch_size}.",
        parameters=size.parameters,
        epochs=epochs,
        memory_bytes=memory_bytes(chosen, at_once),
        flops=flops_per_image(chosen) * config.total_images,
    )


def _in_short_numbers(size: Size) -> Size:
    """The same in bfloat16, which a GPU computes several times as fast as float32."""
    return dataclasses.replace(size, config=dataclasses.replace(size.config, precision="bfloat16"))


def _images_for(parameters: int) -> float:
    """Images from which a network of so many parameters is suggested."""
    return next((images for most, images in IMAGES_FOR if parameters <= most), float("inf"))


def _fits(size: Size, device: Device, images: int) -> bool:
    return memory_bytes(size, images) <= USABLE * (device.memory_bytes or 0)


def _power_of_two(most: int) -> int:
    """The largest power of two that is not above `most`, at least 1."""
    return int(2 ** (max(1, most).bit_length() - 1))
