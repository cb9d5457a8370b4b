"""The chains of states of a normalizing trajectory: growing noise on one canvas, or the levels of a hierarchy.

    B batch, T transitions, L levels, H×W grid, C channels, N = H·W tokens

State 0 is the cleanest; t = 0 is data and t = 1 is noise: x_t = (1−t)·x₀ + t·e, with new noise in every transition

    x_t = α·x_s + σ·e,  α = (1−t)/(1−s),  σ² = t² − α²s²,  s < t

Source: Normalizing Trajectory Models (2026), arXiv 2605.08078, §2.1–2.2, A.4, A.6 and C.4. The coefficients A, B and C
printed in its Table 3 disagree with its formulas; this module follows the formulas.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hierarchy_builder.errors import UsageError
from hierarchy_builder.machine.transfers import sent


class Posterior(NamedTuple):
    """Coefficients of q(x_s | x_t, x₀) = N(a·x_t + b·x₀, c²), each of the shape of the times."""

    a: Tensor
    b: Tensor
    c: Tensor


def posterior(t: Tensor, s: Tensor) -> Posterior:
    """Return the distribution of the state at s given the states at t and 0; 0 ≤ s < t ≤ 1. Source: Proposition 2."""
    # (t + s − 2ts) is written as t(1−s) + s(1−t), a sum of positive terms, to avoid cancellation near 0 and 1.
    span = (t - s) * (t * (1 - s) + s * (1 - t))
    a = s.square() * (1 - t) / (t.square() * (1 - s))
    return Posterior(a, span / (t.square() * (1 - s)), s * span.sqrt() / (t * (1 - s)))


def step_times(num_steps: int, num_tokens: int) -> Tensor:
    """Return t_1 … t_T = 1, float64 [T]: even times, shifted towards noise, by more for more tokens.

    Source: C.4 and Table 5.
    """
    shift = math.exp(0.5 + 0.65 * (num_tokens - 256) / (4096 - 256))
    k = torch.arange(1, num_steps + 1, dtype=torch.float64)
    return shift * k / (shift * k + (num_steps - k))  # exactly 1 at the end, unlike e^μ/(e^μ + T/k − 1)


def noise_times(t_min: Tensor, num_steps: int, num_tokens: int) -> Tensor:
    """Return t_0 … t_T, [B, T + 1], with t_0 = `t_min` [B], which must be below t_1 (see `check_first_step`)."""
    times = sent(step_times(num_steps, num_tokens).to(t_min.dtype), t_min.device)
    return torch.cat([t_min[:, None], times.expand(len(t_min), -1)], dim=1)


def check_first_step(t_min: float, num_steps: int, num_tokens: int) -> None:
    """Raise UsageError unless `t_min`, the largest t_0, is below t_1."""
    first = float(step_times(num_steps, num_tokens)[0])
    if t_min >= first:
        raise UsageError(
            f"t_min is up to {t_min:.3g}, the first of {num_steps} steps on {num_tokens} tokens is at {first:.3g}: "
            "expected t_min below it; lower method.t_min or method.sampling_t_min, or take fewer steps"
        )


def noise_chain(x: Tensor, times: Tensor, noise: Tensor) -> Tensor:
    """Add noise to clean canvases x [B, H, W, C]: states [B, T + 1, H, W, C] at `times` [B, T + 1].

    noise: N(0, 1) [B, T + 1, H, W, C], one for each state. The last state, at t = 1, equals its noise.
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
    """Return the covariance of states 0 … T−1 given the clean canvas: [..., T, T] for times [..., T + 1].

    Source: Proposition 3. The last state is pure noise and uncorrelated with the others.
    """
    times = times[..., :-1]
    low = torch.minimum(times[..., :, None], times[..., None, :])
    high = torch.maximum(times[..., :, None], times[..., None, :])
    return low.square() * (1 - high) / (1 - low)


def chain_entropy(times: Tensor) -> Tensor:
    """Return the entropy of states 1 … T given state 0, in nats per element: Σ ½ ln(2πe σ²), [...]."""
    s, t = times[..., :-1], times[..., 1:]
    variance = t.square() - ((1 - t) / (1 - s) * s).square()
    return (0.5 * torch.log(2 * math.pi * math.e * variance)).sum(dim=-1)


def level_times(num_levels: int, batch: int, like: Tensor) -> Tensor:
    """Return the numbers that stand for levels, [B, L + 1]: from 0 for the tokens to 1 for the state before level 0."""
    return torch.linspace(0, 1, num_levels + 1, dtype=like.dtype, device=like.device).expand(batch, -1)
