"""One-step samples of small networks, trained on distributions whose modes and variances are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import pytest
import torch
from torch import Tensor

from trainer.methods.trajectory_forcing import objective
from trainer.methods.trajectory_forcing.config import MethodConfig
from trainer.methods.trajectory_forcing.network import TrajectoryTransformer
from trainer.methods.trajectory_forcing.sample import sample_levels
from trainer.methods.trajectory_forcing.train import chosen_time_shift
from trainer.networks.config import ModelConfig
from trainer.seeds import StepRows
from trainer.training.config import OptimConfig
from trainer.training.optim import MuonAdam
from trainer.training.schedules import learning_rate
from trainer.training.weights import WeightAverages

GRID, CHANNELS, MODES, RADIUS = (2, 2), 2, 8, 1.4
STEPS, BATCH = 600, 64
SAMPLES = 2_000
Examples = Callable[[int, torch.Generator], tuple[Tensor, Tensor, Tensor]]
"""(n, generator) → values float32 [n, L, C] of each level, level int64 [n] to train, label int64 [n]."""


def ring(n: int, generator: torch.Generator, modes: Tensor | None = None) -> Tensor:
    """Points [n, 2] near one of 8 places on a circle of radius 1.4, with standard deviation 0.05."""
    if modes is None:
        modes = torch.randint(0, MODES, (n,), generator=generator)
    angle = 2 * math.pi * modes / MODES
    centre = RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)
    return centre + 0.05 * torch.randn(n, 2, generator=generator)


def on_grid(values: Tensor) -> Tensor:
    """Canvases [n, L, H, W, C] whose tokens all have the values [n, L, C]."""
    return values[:, :, None, None].expand(-1, -1, *GRID, -1)


def trained(
    examples: Examples,
    num_classes: int = 1,
    scale: float = 1.0,
    steps: int = STEPS,
    start: Literal["zeros", "gaussian"] = "zeros",
    **method: object,
) -> TrajectoryTransformer:
    """Train a network on canvases of one region, whose tokens are all equal, and return its weight average."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    sizes = {"width": 48, "depth": 3, "head_depth": 1, "num_heads": 3, "num_class_tokens": 2}
    tokens = {"num_time_tokens": 2, "num_level_tokens": 2}
    model = TrajectoryTransformer(
        ModelConfig(
            grid=GRID,
            in_channels=CHANNELS,
            num_classes=num_classes,
            num_levels=3,
            start=start,
            **sizes,
            **tokens,
        )
    )
    if model.start is not None:
        values, _, label = examples(2_000, generator)
        model.start.fit(lambda: [(on_grid(scale * values), label)], 1.0)
    config = MethodConfig(
        **{"time_shift": chosen_time_shift(GRID, CHANNELS), "region_timing": "signal"} | method  # type: ignore[arg-type]
    )
    optim = OptimConfig(lr=0.02, cooldown_fraction=0.5, ema_halflives_kimg=(2.0,))
    optimizer = MuonAdam(model.named_parameters(), optim)
    averages = WeightAverages(model, optim.ema_halflives_kimg, optim.ema_ramp)
    for step in range(steps):
        values, level, label = examples(BATCH, generator)
        canvases = on_grid(scale * values)
        rows = torch.arange(BATCH)
        prev = canvases[rows, (level - 1).clamp(min=0)] * (level > 0)[:, None, None, None]
        draws = objective.draw_batch(StepRows(batch_size=BATCH, seed=0, step=step), (*GRID, CHANNELS), config)
        terms = objective.loss(
            model, canvases[rows, level], prev=prev, level=level, label=label,
            regions=torch.zeros(BATCH, *GRID, dtype=torch.int64), t=draws.t, r=draws.r, noise=draws.noise,
            region_timing=config.region_timing,
        )  # fmt: skip
        terms["loss"].backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step * BATCH, steps * BATCH, optim.lr, optim.cooldown_fraction)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        averages.update(model, (step + 1) * BATCH, BATCH)
    model.load_state_dict(averages.averages[2.0], strict=False)
    return model


def drawn(model: TrajectoryTransformer, label: int = 0) -> Tensor:
    """Samples of every level in one step, averaged over the tokens of a canvas: [n, L, C]."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(model.config.num_levels, SAMPLES, *GRID, CHANNELS, generator=generator)
    return sample_levels(model, torch.full((SAMPLES,), label), noise).mean(dim=(2, 3))


def modes_found(points: Tensor) -> int:
    """How many of the 8 places of the ring hold at least a sixth of the samples that they should."""
    centres = ring(MODES, torch.Generator().manual_seed(2), torch.arange(MODES))
    distance, nearest = torch.cdist(points, centres).min(dim=1)
    counts = torch.bincount(nearest[distance < 0.4], minlength=MODES)
    return int((counts >= len(points) / MODES / 6).sum())


def variance_ratio(points: Tensor, real: Tensor) -> float:
    return float(points.var(dim=0).sum() / real.var(dim=0).sum())


def of_level_0(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    none = torch.zeros(len(values), dtype=torch.int64)
    return values[:, None].expand(-1, 3, -1), none, none


def one_ring(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    return of_level_0(ring(n, generator))


@pytest.mark.drill
def test_a_ring_of_8_modes_is_found_in_one_step() -> None:
    points = drawn(trained(one_ring))[:, 0]
    real = ring(SAMPLES, torch.Generator().manual_seed(3))
    assert modes_found(points) == MODES
    assert 0.8 < variance_ratio(points, real) < 1.2


@pytest.mark.drill
def test_the_ring_is_lost_at_a_small_scale_with_the_time_law_of_large_canvases() -> None:
    scale = 0.1
    points = drawn(trained(one_ring, scale=scale, time_shift=10.0, region_timing="uniform"))[:, 0] / scale
    real = ring(SAMPLES, torch.Generator().manual_seed(3))
    assert modes_found(points) < MODES // 2
    assert variance_ratio(points, real) < 0.5


def half_rings(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Label 0 has the modes 0 to 3 of the ring, label 1 the modes 4 to 7."""
    label = torch.randint(0, 2, (n,), generator=generator)
    modes = 4 * label + torch.randint(0, 4, (n,), generator=generator)
    values, level, _ = of_level_0(ring(n, generator, modes))
    return values, level, label


def test_two_classes_of_4_modes_each_are_kept_apart_in_one_step() -> None:
    model = trained(half_rings, num_classes=2, steps=300)
    by_class = [drawn(model, label)[:, 0] for label in (0, 1)]
    real = ring(SAMPLES, torch.Generator().manual_seed(3))
    assert 0.8 < variance_ratio(torch.cat(by_class), real) < 1.2
    for label, points in enumerate(by_class):
        angle = torch.atan2(points[:, 1], points[:, 0]).rad2deg() % 360
        wanted = angle.sub(67.5 + 180 * label).add(180).remainder(360).sub(180).abs() < 90
        assert wanted.float().mean() > 0.97
        assert modes_found(points) == MODES // 2


def two_levels(n: int, generator: torch.Generator, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Level 0 is near −1 or +1 in both channels, level 1 deviates from level 0 by `spread`."""
    sign = 2.0 * torch.randint(0, 2, (n, 1), generator=generator) - 1
    first = sign + 0.2 * torch.randn(n, CHANNELS, generator=generator)
    second = first + spread * torch.randn(n, CHANNELS, generator=generator)
    level = torch.randint(0, 2, (n,), generator=generator)
    return torch.stack([first, second, second], dim=1), level, torch.zeros(n, dtype=torch.int64)


def steps_by_sign(model: TrajectoryTransformer) -> list[Tensor]:
    """The change from level 0 to level 1 of samples whose level 0 is below and above 0: [n, C] each."""
    first, second, _ = drawn(model).unbind(dim=1)
    positive = first.mean(dim=1) > 0
    assert 0.3 < positive.float().mean() < 0.7
    return [(second - first)[chosen] for chosen in (~positive, positive)]


@pytest.mark.parametrize("spread", [0.6, pytest.param(1.0, marks=pytest.mark.drill)])
def test_level_1_follows_level_0_and_keeps_the_variance_of_its_own(spread: float) -> None:
    model = trained(partial(two_levels, spread=spread), steps=100, start="gaussian")
    for step in steps_by_sign(model):
        torch.testing.assert_close(step.mean(dim=0), torch.zeros(CHANNELS), atol=0.2, rtol=0)
        assert 0.8 < float(step.var(dim=0).mean()) / spread**2 < 1.2


@pytest.mark.drill
def test_level_1_loses_its_variance_from_the_start_of_the_release() -> None:
    spread = 0.6
    for step in steps_by_sign(trained(partial(two_levels, spread=spread))):
        assert float(step.var(dim=0).mean()) / spread**2 < 0.4
