"""Presets of Normalizing Trajectory Models; grid, channels, classes and levels come from the shards.

The paper trains 1.4 to 4 billion parameters at batches of 1,024 on 64 H100. NTM-B and NTM-L have the paper's layout,
two blocks of four layers before a deep predictor, at the widths of Trajectory Forcing. Their hours and scores are
unmeasured. Train them with `torchrun --nproc-per-node 8 -m trainer.cli train SHARDS --out RUN --preset NAME`.
"""

from __future__ import annotations

from collections.abc import Callable

from trainer.methods.normalizing_trajectory.config import (
    NormalizingMethodConfig,
    NormalizingModelConfig,
    NormalizingOptimConfig,
    NormalizingTrainConfig,
)


def tiny_normalizing() -> NormalizingTrainConfig:
    """A network that trains in minutes on two CPU cores, one transition of a sample per step; see docs/results.md.

    A transporter of little scale and states of more noise leave the work to the predictor: a small transporter that
    copies its neighbours' tokens carries every error on to the rest of the raster.
    """
    return NormalizingTrainConfig(
        preset="tiny-normalizing",
        model=NormalizingModelConfig(
            width=96,
            depth=3,
            num_heads=3,
            num_class_tokens=4,
            num_steps=(8,),
            flow_width=96,
            flow_depth=1,
            flow_heads=3,
            flow_max_log_scale=0.3,
        ),
        method=NormalizingMethodConfig(pairs="one", t_min=(0.05, 0.15), sampling_t_min=0.1),
        optim=NormalizingOptimConfig(
            rule="muon",
            lr=0.02,
            weight_decay=0.0,
            warmup_fraction=0.05,
            ema_halflives_kimg=(0.5,),
            ema_ramp=0.1,
        ),
        total_images=14_000,
        batch_size=16,
        loader_workers=1,
        checkpoint_images=7_000,
        sample_images=None,
        log_images=480,
    )


def NTM_B() -> NormalizingTrainConfig:  # noqa: N802 (named like TF-B)
    """16 blocks of width 768 behind a transporter of two blocks of four layers."""
    return NormalizingTrainConfig(precision="auto", compile=None, micro_batch_size=16)


def NTM_L() -> NormalizingTrainConfig:  # noqa: N802 (named like TF-L)
    """24 blocks of width 1024 behind a transporter of equal width."""
    model = NormalizingModelConfig(width=1024, depth=24, num_heads=16, flow_width=1024, flow_heads=16)
    return NormalizingTrainConfig(
        preset="NTM-L", model=model, precision="auto", compile=None, micro_batch_size=8
    )


NORMALIZING_PRESETS: dict[str, Callable[[], NormalizingTrainConfig]] = {
    "tiny-normalizing": tiny_normalizing,
    "NTM-B": NTM_B,
    "NTM-L": NTM_L,
}
