"""The device at hand, what `suggestion` needs to know of shards and presets, and how long a suggested run takes."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch

from hierarchy_builder.machine.process import num_cpus
from trainer.data.folders import Places
from trainer.data.shards import ShardIndex
from trainer.methods import registry
from trainer.methods.registry import TRAJECTORY_FORCING, Method
from trainer.methods.suggestion import Device, Size, Suggestion, suggest
from trainer.training.distributed import environment_number
from trainer.training.log import read_metrics
from trainer.training.speed import PEAKS

PEAK = PEAKS | {"3090": 71e12, "A6000": 155e12, "T4": 65e12}
"""Operations per second of GPUs at 16 bits, dense, from their data sheets; by a part of their names."""
UNKNOWN_PEAK = 70e12
"""Assumed of a GPU that is not in PEAK."""
UTILISATION = 0.3
"""Share of the peak that is assumed; no GPU was measured."""
TIMED_STEPS = 3


def device_at_hand() -> Device:
    """All GPUs of the processes that torchrun started, by the first one; without CUDA the cores of this process."""
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        count = environment_number("WORLD_SIZE", 1, least=1)
        return Device(name=found.name, count=count, memory_bytes=found.total_memory)
    return Device(name="CPU", count=num_cpus())


def suggestion_for(method: Method, index: ShardIndex, device: Device) -> Suggestion:
    """What to train on these shards by this method; see `suggestion.suggest`."""
    return suggest(index.num_samples, device, sizes_of(method, index))


def sizes_of(method: Method, index: ShardIndex) -> list[Size]:
    """The presets of a method, that for CPU cores first, fitted to the shards; parameters are only counted."""
    presets = method.load("presets")
    network_type = method.load("pipeline").network_type
    sizes = []
    for name in sorted(presets, key=lambda name: name != method.small_preset):
        config = registry.fit_to_shards(presets[name](), index)
        with torch.device("meta"):
            network = network_type(config.model)
        count = sum(parameter.numel() for parameter in network.parameters())
        sizes.append(Size(config=config, parameters=count, has_tangents=method is TRAJECTORY_FORCING))
    return sizes


def hours_of(suggestion: Suggestion, device: Device, shards: Places | ShardIndex) -> tuple[float, str]:
    """Hours of a suggested run, and how they were found: timed on CPU cores, assumed on GPUs."""
    if device.is_gpu:
        peak = next((peak for part, peak in PEAK.items() if part in device.name), UNKNOWN_PEAK)
        seconds = suggestion.flops / (peak * UTILISATION * device.count)
        how = f"unmeasured: assumes {UTILISATION:.0%} of {peak / 1e12:.0f} TFLOP/s on each of {device.count}"
        return seconds / 3600, how
    each = _seconds_per_image(suggestion.config, shards)
    how = f"measured: {each:.3g} s an image over {TIMED_STEPS - 1} steps on this machine"
    return each * suggestion.config.total_images / 3600, how


def _seconds_per_image(config: Any, shards: Places | ShardIndex) -> float:
    """Train a few steps in a folder that is removed, and leave out the first, which warms up."""
    batch = config.batch_size
    short = dataclasses.replace(
        config,
        total_images=TIMED_STEPS * batch,
        log_images=batch,
        checkpoint_images=TIMED_STEPS * batch,
        sample_images=None,
        tensorboard=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        registry.train(short, shards, folder, quiet=True)
        rows = read_metrics(Path(folder))
    timed = [row for row in rows if "loss" in row]
    return float((timed[-1]["time"] - timed[0]["time"]) / (timed[-1]["images"] - timed[0]["images"]))
