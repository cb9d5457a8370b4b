"""The chains of states that a normalizing trajectory has: growing noise on one canvas, or levels of a hierarchy.

    B batch, T transitions, L levels, H×W grid, C channels, N = H·W tokens

State 0 is the cleanest and t = 0 is data, t = 1 noise: x_t = (1−t)·x₀ + t·e, with fresh noise in every transition

    x_t = α·x_s + σ·e,  α = (1−t)/(1−s),  σ² = t² − α²s²,  s < t

Source: Normalizing Trajectory Models (2026), arXiv 2605.08078, §2.1–2.2, A.4, A.6 and C.4. The coefficients A, B and C
printed in its Table 3 disagree with its formulas, which are what stands here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hierarchy_builder.errors import UsageError


class Posterior(NamedTuple):
    """q(x_s | x_t, x₀) = N(a·x_t + b·x₀, c²); each shaped as the times."""

    a: Tensor
    b: Tensor
    c: Tensor


def posterior(t: Tensor, s: Tensor) -> Posterior:
    """Mean and deviation of the state at s, given those at t and at 0; 0 ≤ s < t ≤ 1. Source: Proposition 2."""
    # (t + s − 2ts) = t(1−s) + s(1−t): a sum, so that nothing cancels near the ends
    span = (t - s) * (t * (1 - s) + s * (1 - t))
    a = s.square() * (1 - t) / (t.square() * (1 - s))
    return Posterior(a, span / (t.square() * (1 - s)), s * span.sqrt() / (t * (1 - s)))


def step_times(num_steps: int, num_tokens: int) -> Tensor:
    """t_1 … t_T, float64 [T], the last one 1: even times, shifted towards noise the more tokens there are.

    Source: C.4 and Table 5.
    """
    shift = math.exp(0.5 + 0.65 * (num_tokens - 256) / (4096 - 256))
    k = torch.arange(1, num_steps + 1, dtype=torch.float64)
    return shift * k / (shift * k + (num_steps - k))  # exactly 1 at the end, unlike e^μ/(e^μ + T/k − 1)


def noise_times(t_min: Tensor, num_steps: int, num_tokens: int) -> Tensor:
    """t_0 … t_T of samples with `t_min` [B], below t_1 (`check_first_step`): [B, T + 1] of its type."""
    times = step_times(num_steps, num_tokens).to(t_min)
    return torch.cat([t_min[:, None], times.expand(len(t_min), -1)], dim=1)


def check_first_step(t_min: float, num_steps: int, num_tokens: int) -> None:
    """Raise UsageError if the step from t_1 to the largest `t_min` is no step."""
    first = float(step_times(num_steps, num_tokens)[0])
    if t_min >= first:
        raise UsageError(
            f"t_min is up to {t_min:.3g}, the first of {num_steps} steps on {num_tokens} tokens is {first:.3g}: "
            "expected t_min below it; lower method.t_min or method.sampling_t_min, or take fewer steps"
        )


def noise_chain(x: Tensor, times: Tensor, noise: Tensor) -> Tensor:
    """States [B, T + 1, H, W, C] of clean canvases x [B, H, W, C] at `times` [B, T + 1].

    noise: N(0, 1) [B, T + 1, H, W, C]; each state adds its own. The last state, at t = 1, is its noise.
    """
    times = times[..., None, None, None]
    states = [(1 - times[:, 0]) * x + times[:, 0] * noise[:, 0]]
    for k in range(1, times.shape[1]):
        s, t = times[:, k - 1], times[:, k]
        alpha = (1 - t) / (1 - s)
        sigma = (t.square() - (alpha * s).square()).clamp(min=0).sqrt()
        states.append(alpha * states[-1] + sigma * noise[:, k])
    return torch.stack(states, dim=1)


def noise_covariance(times: Tensor) -> Tensor:
    """Covariance of states 0 … T−1 given the clean canvas, [..., T, T] of times [..., T + 1].

    Source: Proposition 3. The last state, pure noise, is correlated with none of the others.
    """
    times = times[..., :-1]
    low = torch.minimum(times[..., :, None], times[..., None, :])
    high = torch.maximum(times[..., :, None], times[..., None, :])
    return low.square() * (1 - high) / (1 - low)


def chain_entropy(times: Tensor) -> Tensor:
    """Entropy in nats per number of states 1 … T, given state 0: Σ ½ ln(2πe σ²), [...] of times [..., T + 1]."""
    s, t = times[..., :-1], times[..., 1:]
    variance = t.square() - ((1 - t) / (1 - s) * s).square()
    return (0.5 * torch.log(2 * math.pi * math.e * variance)).sum(dim=-1)


def level_times(num_levels: int, batch: int, like: Tensor) -> Tensor:
    """Numbers that tell levels apart, [B, L + 1] typed as `like`: 0 for the tokens, 1 for what is before level 0."""
    return torch.linspace(0, 1, num_levels + 1, dtype=like.dtype, device=like.device).expand(batch, -1)


def level_chain(canvases: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """States [B, L + 1, H, W, C] of canvases [B, L, H, W, C]: levels fine → coarse, each with σ·noise, then zeros.

    noise: N(0, 1) [B, L + 1, H, W, C], of which the last entry is not used.
    """
    states = canvases.flip(1) + sigma * noise[:, :-1]
    return torch.cat([states, torch.zeros_like(states[:, :1])], dim=1)
