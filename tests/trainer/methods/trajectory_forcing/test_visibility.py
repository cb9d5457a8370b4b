"""The signal-to-noise table that training prints, on canvases of known scale."""

from __future__ import annotations

import torch

from trainer.methods.trajectory_forcing.config import MethodConfig
from trainer.methods.trajectory_forcing.train import chosen_time_shift
from trainer.methods.trajectory_forcing.visibility import visibility, visibility_lines

UNIFORM = MethodConfig(uniform_fraction=1.0)


def samples(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of standard deviation `scale`, constant in each of two halves of 4×4 tokens, and those halves."""
    generator = torch.Generator().manual_seed(0)
    halves = torch.arange(2).repeat_interleave(8).view(1, 1, 4, 4).expand(64, 3, -1, -1)
    values = scale * torch.randn(64, 2, 5, generator=generator)
    return values[torch.arange(64)[:, None, None], halves[:, 0]], halves


def test_visible_times_follow_scale_and_region_size() -> None:
    first, *_, last = visibility(*samples(1.0), UNIFORM)
    assert (first.tokens_per_region, last.tokens_per_region) == (8, 1)
    assert max(abs(first.std - 1.0), abs(last.std - 1.0)) < 0.1
    # Both times are uniform and t is the larger, so P(t ≤ x) = x².
    for level in (first, last):
        amplitude = level.std * level.tokens_per_region**0.5
        assert abs(level.visible_below - amplitude / (1 + amplitude)) < 1e-6
        assert abs(level.visible_share - level.visible_below**2) < 0.02


def test_small_features_at_the_times_of_large_canvases_are_warned_of() -> None:
    lines = list(visibility_lines(*samples(0.02), MethodConfig(time_shift=10.0)))
    assert any(line.startswith("warning: level 3:") and "normalise=channel" in line for line in lines)
    assert not any("warning" in line for line in visibility_lines(*samples(1.0), UNIFORM))


def test_the_time_shift_is_the_release_s_on_its_canvases_and_never_below_1() -> None:
    assert chosen_time_shift((16, 16), 768) == 10.0
    assert chosen_time_shift((16, 16), 48) == 2.5
    assert chosen_time_shift((2, 2), 2) == 1.0
