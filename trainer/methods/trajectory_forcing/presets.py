"""Named starting points, each a full TrainConfig; grid, channels, classes and levels come from the shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, get_args

from hierarchy_builder.errors import UsageError
from hierarchy_builder.fields import named
from trainer.decode.config import DecoderConfig, DecoderSize
from trainer.methods.trajectory_forcing.config import TrainConfig
from trainer.networks.config import ModelConfig
from trainer.training.config import OptimConfig

Preset = TypeVar("Preset")


def tiny_cpu() -> TrainConfig:
    """A model small enough to learn something in minutes on two CPU cores: the demo.

    Command: `trainer train SHARDS --out RUN --preset tiny-cpu`, about 2,000 images of `dct` features.
    Hardware and time: 2 cores, about 2.5 minutes (0.07 core seconds an image). Score: unmeasured.
    """
    return TrainConfig(
        preset="tiny-cpu",
        model=ModelConfig(
            width=96,
            depth=3,
            head_depth=1,
            num_heads=3,
            num_class_tokens=4,
            num_time_tokens=2,
            num_level_tokens=2,
        ),
        # A short run has no time to average its noise away: a high rate, then a long cooldown. On Caltech photos
        # the class of samples is found in 39 % so, in 30 % at half the rate, in 10 % at 0.01 without cooldown.
        optim=OptimConfig(lr=0.04, cooldown_fraction=0.6, ema_halflives_kimg=(0.5, 2.0)),
        total_images=9_000,
        batch_size=16,
        loader_workers=0,
        checkpoint_images=4_500,
        sample_images=4_500,
        log_images=480,
    )


def TF_B() -> TrainConfig:  # noqa: N802 (the name in the paper)
    """TF-B of the release on DINOv2-B features of ImageNet: 16 blocks of width 768, 80 epochs, float32.

    Command: `torchrun --nproc-per-node 8 -m trainer.cli train SHARDS --out RUN --preset TF-B`.
    Hardware: 8 GPUs of 80 GB. Hours and score: unmeasured.
    """
    return TrainConfig(preset="TF-B", micro_batch_size=64)


def TF_L() -> TrainConfig:  # noqa: N802 (the name in the paper)
    """TF-L of the release: 32 blocks of width 1024, bfloat16.

    Command: `torchrun --nproc-per-node 8 -m trainer.cli train SHARDS --out RUN --preset TF-L`.
    Hardware: 8 GPUs of 80 GB. Hours and score: unmeasured.
    """
    model = ModelConfig(width=1024, depth=32, num_heads=16)
    return TrainConfig(preset="TF-L", model=model, precision="bfloat16", micro_batch_size=16)


def TF_H() -> TrainConfig:  # noqa: N802 (the name in the paper)
    """TF-H of the release: 48 blocks of width 1280, batches of 512, bfloat16.

    Command: `torchrun --nproc-per-node 8 -m trainer.cli train SHARDS --out RUN --preset TF-H`.
    Hardware: 8 GPUs of 80 GB. Hours and score: unmeasured.
    """
    model = ModelConfig(width=1280, depth=48, num_heads=16)
    return TrainConfig(preset="TF-H", model=model, batch_size=512, precision="bfloat16", micro_batch_size=16)


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "tiny-cpu": tiny_cpu,
    "TF-B": TF_B,
    "TF-L": TF_L,
    "TF-H": TF_H,
}


def preset(name: str) -> TrainConfig:
    """The preset called `name`. Raises UsageError naming the nearest for an unknown name."""
    return named(PRESETS, name, "preset")()


def decoder_preset(size: str) -> DecoderConfig:
    """The training of a decoder of one size: RAE's for B, L and XL, minutes on two CPU cores for tiny.

    Raises UsageError naming the sizes.
    """
    if size not in get_args(DecoderSize):
        raise UsageError(f"decoder size {size!r}, known are {', '.join(get_args(DecoderSize))}")
    if size != "tiny":
        return DecoderConfig(size=size, micro_batch_size=16)  # type: ignore[arg-type]
    return DecoderConfig(
        size="tiny",
        total_images=9_600,
        batch_size=16,
        lr=1e-3,
        noise=0.2,
        ema_halflife_kimg=0.5,
        loader_workers=1,
        checkpoint_images=4_800,
        sample_images=2_400,
        log_images=480,
    )
