"""Presets of Latent Forcing, each a full configuration; grid, channels, classes and canvases come from the shards.

The paper trains 80 epochs of ImageNet for its ablations and 200 for its best network, at batches of 1,024 and a
learning rate of 2e-4, in bfloat16, on crops of 256 px that are mirrored at random. Here nothing is mirrored, because
the features in the shards were computed from unmirrored crops. Only `tiny-latent` was run here; hours and scores of
the others are unmeasured.
"""

from __future__ import annotations

from collections.abc import Callable

from trainer.methods.latent_forcing.config import (
    LatentModelConfig,
    LatentOptimConfig,
    LatentTrainConfig,
)


def tiny_latent() -> LatentTrainConfig:
    """A network that learns colours and layouts of its classes on two CPU cores, from 64 px pictures on a 16×16 grid.

    The shards must be built with `--images`; for times see docs/results.md.
    """
    return LatentTrainConfig(
        preset="tiny-latent",
        model=LatentModelConfig(
            patch_px=4,
            width=96,
            depth=3,
            num_heads=3,
            pixel_bottleneck=48,
            latent_bottleneck=48,
            num_class_tokens=4,
            class_tokens_at=1,
            expert_depth=1,
            expert_width=96,
        ),
        optim=LatentOptimConfig(
            rule="muon",
            lr=0.02,
            warmup_images=800,
            cooldown_fraction=0.5,
            ema_halflives_kimg=(0.5,),
            ema_ramp=0.1,
        ),
        total_images=16_000,
        batch_size=16,
        loader_workers=1,
        checkpoint_images=4_000,
        sample_images=16_000,
        log_images=480,
    )


def LF_S() -> LatentTrainConfig:  # noqa: N802 (the name in the paper)
    """LF-S/16: 12 blocks of width 384; trained for 40 epochs it is the paper's weak network of autoguidance."""
    return _sized("LF-S", width=384, depth=12, num_heads=6, class_tokens_at=4)


def LF_B() -> LatentTrainConfig:  # noqa: N802 (the name in the paper)
    """LF-B/16: 12 blocks of width 768."""
    return _sized("LF-B", width=768, depth=12, num_heads=12, class_tokens_at=4)


def LF_L() -> LatentTrainConfig:  # noqa: N802 (the name in the paper)
    """LF-L/16: 24 blocks of width 1024, and the experts' two each on top."""
    return _sized("LF-L", width=1024, depth=24, num_heads=16, class_tokens_at=8)


def LF_LM() -> LatentTrainConfig:  # noqa: N802 (the name in the paper)
    """LF-LM/16, the paper's L: 20 blocks of width 1024, 24 counting the two of each expert; 465 million parameters."""
    return _sized("LF-LM", width=1024, depth=20, num_heads=16, class_tokens_at=8)


def LF_H() -> LatentTrainConfig:  # noqa: N802 (the name in the paper)
    """LF-H/16: 32 blocks of width 1280, pixels through a bottleneck of 256."""
    # Heads are 80 wide and 1024, the expert width of the other sizes, is no multiple of 80.
    wide = {"pixel_bottleneck": 256, "expert_width": 1280}
    return _sized("LF-H", width=1280, depth=32, num_heads=16, class_tokens_at=10, **wide)


def _sized(preset: str, **model: int) -> LatentTrainConfig:
    sizes = LatentModelConfig(**model)  # type: ignore[arg-type]
    return LatentTrainConfig(preset=preset, model=sizes, precision="auto", compile=None, micro_batch_size=32)


LATENT_PRESETS: dict[str, Callable[[], LatentTrainConfig]] = {
    "tiny-latent": tiny_latent,
    "LF-S": LF_S,
    "LF-B": LF_B,
    "LF-L": LF_L,
    "LF-LM": LF_LM,
    "LF-H": LF_H,
}
