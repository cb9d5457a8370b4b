"""Presets of Trajectory Forcing and of decoders; grid, channels, classes and levels come from the shards.

TF-S is for one GPU and 10,000 to 200,000 images, and is no size of the release; its hours and scores are unmeasured.
TF-B, TF-L and TF-H are the sizes of the release. They need 8 GPUs of 80 GB; hours and scores are unmeasured. Train
them with `torchrun --nproc-per-node 8 -m trainer.cli train SHARDS --out RUN --preset NAME`. On CUDA all of these
compute in bfloat16, with TF32 products in what stays float32, and are compiled; on a CPU they compute in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from hierarchy_builder.errors import UsageError
from trainer.decode.config import DecoderConfig, DecoderSize
from trainer.methods.trajectory_forcing.config import MethodConfig, TrainConfig
from trainer.networks.config import ModelConfig
from trainer.training.config import OptimConfig


def tiny_cpu() -> TrainConfig:
    """A model small enough to learn something in minutes on two CPU cores.

    An image takes about 0.02 core seconds on a 16×16 grid of `dct` features, since squares of 2×2 tokens are joined. It
    starts from Gaussian canvases, since a network of this size learns in minutes little more than means.
    """
    return TrainConfig(
        preset="tiny-cpu",
        normalise="auto",
        model=ModelConfig(
            width=128,
            depth=3,
            head_depth=1,
            num_heads=4,
            num_class_tokens=4,
            num_time_tokens=2,
            num_level_tokens=2,
            patch_size=2,
            start="gaussian",
        ),
        # Small networks learn one step from noise to data only if many draws lie between: a third of the times is
        # uniform. The region loss counts only where the image can be known.
        method=MethodConfig(time_shift=None, uniform_fraction=0.3, region_timing="signal"),
        # A short run cannot average its noise away, so it takes a high rate and a long cooldown.
        optim=OptimConfig(lr=0.04, cooldown_fraction=0.6, ema_halflives_kimg=(1.0,)),
        total_images=30_000,
        batch_size=16,
        loader_workers=0,
        checkpoint_images=10_000,
        sample_images=10_000,
        log_images=960,
    )


def TF_S() -> TrainConfig:  # noqa: N802 (named like TF-B)
    """For one GPU and 10,000 to 200,000 photos: 12 blocks of width 384; not of the release."""
    model = ModelConfig(width=384, depth=12, head_depth=6, num_heads=6)
    # A run of a twelfth of the release's length: averages and checkpoints follow, and a cooldown ends it. Unmeasured.
    return TrainConfig(
        preset="TF-S",
        model=model,
        method=MethodConfig(time_shift=None, region_timing="signal"),
        normalise="auto",
        optim=OptimConfig(cooldown_fraction=0.2, ema_halflives_kimg=(250.0, 1000.0)),
        precision="auto",
        compile=None,
        total_images=8_000_000,
        batch_size=256,
        checkpoint_images=800_000,
        sample_images=800_000,
    )


def TF_B() -> TrainConfig:  # noqa: N802 (the name in the paper)
    """TF-B of the release on DINOv2-B features of ImageNet: 16 blocks of width 768, 80 epochs."""
    return _of_release("TF-B", ModelConfig(), micro_batch_size=64)


def TF_L() -> TrainConfig:  # noqa: N802 (the name in the paper)
    """TF-L of the release: 32 blocks of width 1024."""
    model = ModelConfig(width=1024, depth=32, num_heads=16)
    return _of_release("TF-L", model, micro_batch_size=16)


def TF_H() -> TrainConfig:  # noqa: N802 (the name in the paper)
    """TF-H of the release: 48 blocks of width 1280, batches of 512."""
    model = ModelConfig(width=1280, depth=48, num_heads=16)
    return _of_release("TF-H", model, batch_size=512, micro_batch_size=16)


def _of_release(name: str, model: ModelConfig, **fields: Any) -> TrainConfig:
    """A size of the release; its units and time shift are the release's on canvases of DINOv2-B, and follow others."""
    return TrainConfig(
        preset=name,
        model=model,
        method=MethodConfig(time_shift=None),
        normalise="auto",
        precision="auto",
        compile=None,
        **fields,
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "tiny-cpu": tiny_cpu,
    "TF-S": TF_S,
    "TF-B": TF_B,
    "TF-L": TF_L,
    "TF-H": TF_H,
}


def decoder_preset(size: str) -> DecoderConfig:
    """Return the configuration of a decoder's training: RAE's for B, L and XL; `tiny` takes minutes on two CPU cores.

    Raises UsageError with the known sizes for an unknown one.
    """
    if size not in get_args(DecoderSize):
        raise UsageError(f"decoder size {size!r}, known are {', '.join(get_args(DecoderSize))}")
    if size != "tiny":
        return DecoderConfig(size=size, precision="auto", micro_batch_size=16)  # type: ignore[arg-type]
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
