"""The loss of Normalizing Trajectory Models: every transition is a conditional flow with an exact likelihood.

    B batch, T transitions of a chain, K of them processed at a time, H×W grid, C channels

State 0 is the cleanest, state T is the one at t = 1. With u = f(x, t) by the transporter and (μ, σ) by the predictor,

    −log p(x_s | x_t) = Σ ½z² + log σ + ½ ln 2π − log|det ∂u_s/∂x_s|,   z = (u_s − μ(u_t))/σ(u_t)

At t = 1 there is no transporter: u_T = x_T, which is pure noise (or zeros, if the states are the levels themselves).
All transitions are folded into the batch, so a trajectory trains in parallel.

Source: Normalizing Trajectory Models (2026), arXiv 2605.08078, Algorithms 1–3, equation 3.5 and C.5. The paper's text
also mentions a predictor that sees all levels; its likelihood would not be exact, so this is Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.methods.normalizing_trajectory import chains
from trainer.methods.normalizing_trajectory.config import NormalizingMethodConfig, Trajectory
from trainer.methods.normalizing_trajectory.network import Gaussian, Given, NormalizingNetwork
from trainer.networks.layers import per_sample
from trainer.seeds import StepRows

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
SCORED_TOGETHER = 16
"""States whose scores are computed in one pass; with 16 blocks of width 768 each takes half a GB of memory."""


class Chain(NamedTuple):
    """States of a batch, the cleanest first, and their conditions; part of a chain has K states for T."""

    states: Tensor
    """float32 [B, T+1, H, W, C]."""
    times: Tensor
    """float32 [B, T+1]; the last one is 1."""
    given: Given
    covariance: Tensor
    """float32 [B, T, T], covariance of states 0 … T−1 given the clean canvases."""
    scale: Tensor
    """float32 [B, T], factor of the clean canvas in each state."""


def build_chain(
    canvases: Tensor,
    label: Tensor,
    level: Tensor,
    *,
    noise: Tensor,
    t_min: Tensor,
    trajectory: Trajectory,
    level_noise: float,
) -> Chain:
    """Build the chain of T transitions on which a sample is trained or measured.

    canvases: float32 [B, L, H, W, C], normalised; trajectory `tokens` only uses the last. label, level: int64 [B];
    trajectory `canvases` uses the canvas of `level`. noise: N(0, 1) [B, T+1, H, W, C]. t_min: [B].
    """
    B, L, H, W, _ = canvases.shape
    if trajectory == "levels":  # from fine to coarse, and zeros before the coarsest
        noisy = canvases.flip(1) + level_noise * noise[:, :-1]
        states = torch.cat([noisy, torch.zeros_like(noisy[:, :1])], dim=1)
        times = chains.level_times(L, B, canvases)
        given = Given(label, torch.zeros_like(label), torch.zeros_like(canvases[:, 0]))
        covariance = level_noise**2 * torch.eye(L, device=canvases.device).expand(B, L, L)
        return Chain(states, times, given, covariance, torch.ones_like(times[:, 1:]))
    level = torch.full_like(level, L - 1) if trajectory == "tokens" else level
    row = torch.arange(B, device=label.device)
    prev = canvases[row, (level - 1).clamp(min=0)].masked_fill(per_sample(level == 0), 0.0)
    times = chains.noise_times(t_min, noise.shape[1] - 1, H * W)
    states = chains.noise_chain(canvases[row, level], times, noise)
    return Chain(states, times, Given(label, level, prev), chains.noise_covariance(times), 1 - times[:, :-1])


class Transitions(NamedTuple):
    """K transitions of a batch, the cleanest first."""

    z: Tensor
    """float32 [B, K, H, W, C], N(0, 1) under the model."""
    log_sigma: Tensor
    """float32 [B, K, H, W, C]."""
    log_det: Tensor
    """float32 [B, K, H, W], by token; only the sum over tokens is the log-determinant."""
    mean: Tensor
    """float32 [B, K, H, W, C], the predictor's mean of u_s."""

    def nats(self) -> Tensor:
        """Return −log p(x_s | x_t) by token, [B, K, H, W]; only the sum over tokens is exact."""
        terms = 0.5 * self.z.square() + self.log_sigma + HALF_LOG_2PI
        return terms.sum(dim=-1) - self.log_det


def transitions(network: Any, states: Tensor, times: Tensor, given: Given, num_steps: int) -> Transitions:
    """Evaluate the model on consecutive states.

    network: a NormalizingNetwork, or an object with its methods `transport` and `predict`. states: float32
    [B, K+1, H, W, C], the cleanest first: a whole chain (K = T) or part of one. times: float [B, K+1]. num_steps: T.
    """
    B, K = len(states), states.shape[1] - 1
    many = given.repeated(K)
    t, s = times[:, 1:].flatten(), times[:, :-1].flatten()
    u, log_det = network.transport(states[:, :-1].flatten(0, 1), s, many.level, num_steps)
    u = u.unflatten(0, (B, K))
    last = states[:, -1]  # in a whole chain this state is at t = 1, where there is no transporter
    last = last if num_steps == K else _carried(network, last, times[:, -1], given, num_steps)
    u_t = torch.cat([u[:, 1:], last[:, None]], dim=1)
    predicted = network.predict(u_t.flatten(0, 1), t, s, many, num_steps)
    mean, log_sigma = (part.unflatten(0, (B, K)) for part in predicted)
    z = (u - mean) * torch.exp(-log_sigma)
    return Transitions(z, log_sigma, log_det.unflatten(0, (B, K)), mean)


def _carried(network: Any, state: Tensor, t: Tensor, given: Given, num_steps: int) -> Tensor:
    """Return u of states at t ≤ 1; at t = 1 it is the state itself."""
    is_end = t >= 1
    u, _ = network.transport(state, torch.where(is_end, 0.5, t), given.level, num_steps)
    return torch.where(per_sample(is_end), state, u)


def loss(
    network: Any,
    states: Tensor,
    times: Tensor,
    given: Given,
    *,
    num_steps: int,
    pair: Tensor | None = None,
    flow: Any = None,
    flow_weight: float | Tensor = 0.0,
) -> dict[str, Tensor]:
    """Compute the loss of a batch of whole chains; call `backward` on `["loss"]`.

    states: float32 [B, T+1, H, W, C]; times: float32 [B, T+1]. pair: int64 [B], the only transition of each sample to
    train, weighted by T so that the expectation is the loss of all; None trains all. flow: frozen predictor of the
    flow-matching network, evaluated on the states x; the squared distance to its means has weight `flow_weight`.

    Returns scalars: loss in nats per element of a canvas, summed over the T transitions, including the distance to the
    flow; bits, the same without the distance and in bits; fit, log_sigma and log_det, its parts in nats; flow, the
    squared distance.
    """
    if pair is not None:
        row = torch.arange(len(states), device=states.device)
        states = torch.stack([states[row, pair], states[row, pair + 1]], dim=1)
        times = torch.stack([times[row, pair], times[row, pair + 1]], dim=1)
    found = transitions(network, states, times, given, num_steps)
    B, K, C = len(states), states.shape[1] - 1, states.shape[-1]
    per_pair = num_steps / K  # scales the sum over K transitions to one over all T
    parts = {
        "fit": per_pair * (0.5 * found.z.square() + HALF_LOG_2PI).mean(dim=(0, 2, 3, 4)).sum(),
        "log_sigma": per_pair * found.log_sigma.mean(dim=(0, 2, 3, 4)).sum(),
        "log_det": per_pair * found.log_det.mean(dim=(0, 2, 3)).sum() / C,
    }
    nats = parts["fit"] + parts["log_sigma"] - parts["log_det"]
    distance = states.new_zeros(())
    if flow is not None:
        many, t, s = given.repeated(K), times[:, 1:].flatten(), times[:, :-1].flatten()
        with torch.no_grad():
            target = flow(states[:, 1:].flatten(0, 1), t, s, many, num_steps).mean
        squares = (found.mean - target.unflatten(0, (B, K))).square()
        distance = per_pair * squares.mean(dim=(0, 2, 3, 4)).sum()
    return {"loss": nats + flow_weight * distance, "bits": nats / math.log(2), **parts, "flow": distance}


def guided(law: Gaussian, unconditional: Gaussian, scale: float) -> Gaussian:
    """Return the Gaussian ∝ p^(1+w)·p_u^(−w), w = scale, with p_u at least as wide as p. Source: C.5."""
    w = scale
    share = torch.exp(2 * (law.log_sigma - unconditional.log_sigma)).clamp(max=1)
    precision = 1 + w - w * share
    mean = ((1 + w) * law.mean - w * share * unconditional.mean) / precision
    return Gaussian(mean, law.log_sigma - 0.5 * torch.log(precision))


def denoised(network: Any, chain: Chain, num_steps: int) -> Tensor:
    """Estimate E[clean canvas | trajectory] from each state with the score of the trajectory: float32 [B, K, H, W, C].

    chain: a whole one, or K + 1 states in a row with what belongs to them. With the exact density all K estimates of a
    noise chain are equal.
    Source: equation 3.5 and Algorithm 3, with −log p summed over dimensions.
    """
    together = max(1, SCORED_TOGETHER // chain.scale.shape[1])  # images are independent
    states, times, given, covariance, scale = chain
    found = []
    for part in zip(
        *(each.split(together) for each in (states, times, covariance, scale, *given)), strict=True
    ):
        states, times, covariance, scale, *conditions = part
        with torch.enable_grad():
            seen = states.detach()[:, :-1].requires_grad_()
            whole = torch.cat([seen, states[:, -1:].detach()], dim=1)
            nats = transitions(network, whole, times, Given(*conditions), num_steps).nats().sum()
            (score,) = torch.autograd.grad(nats, seen)
        moved = states[:, :-1] - torch.einsum("bij,bjhwc->bihwc", covariance, score)
        found.append((moved / scale[..., None, None, None]).detach())
    return torch.cat(found)


def denoiser_loss(network: NormalizingNetwork, chain: Chain, num_steps: int) -> Tensor:
    """Return the mean squared distance between the learned denoiser and `denoised` on real trajectories, a scalar.

    A noise chain trains its cleanest state; a chain of levels trains all states. Only the denoiser gets gradients.
    Source: §3.4 and C.3.
    """
    target = denoised(network, chain, num_steps)
    K = target.shape[1] if network.config.trajectory == "levels" else 1
    times, many = chain.times[:, :K].flatten(), chain.given.repeated(K)
    with torch.no_grad():
        u, _ = network.transport(chain.states[:, :K].flatten(0, 1), times, many.level, num_steps)
    return (network.denoise(u, times, many, num_steps) - target[:, :K].flatten(0, 1)).square().mean()


class Draws(NamedTuple):
    """The random numbers of one training step, for some rows of the global batch."""

    num_steps: int
    t_min: Tensor
    noise: Tensor
    pair: Tensor | None
    drop_label: Tensor


def draw_batch(
    rows: StepRows, shape: Sequence[int], config: NormalizingMethodConfig, num_steps: Sequence[int]
) -> Draws:
    """Draw T, noise of its T + 1 states, t_min, pairs and label dropout for rows of a step.

    The whole batch has the same T. noise: float32 [b, T+1, *shape].
    """
    n, generator = rows.batch_size, rows.generator()
    T = num_steps[int(torch.randint(len(num_steps), (), generator=generator))]
    low, high = config.t_min
    t_min = low + (high - low) * torch.rand(n, generator=generator)
    drop = torch.rand(n, generator=generator) < config.label_dropout
    pair = torch.randint(T, (n,), generator=generator)
    (noise,) = rows.noise((T + 1, *shape))
    return Draws(T, rows.own(t_min), noise, rows.own(pair) if config.pairs == "one" else None, rows.own(drop))
