"""Trajectory Forcing's loss: improved mean flow on the canvases of a hierarchy, each given the level before.

    t = 1 is noise, t = 0 is data, z_t = (1−t)·x + t·e, z_r = z_t − (t−r)·u, and r ≤ t

u is the average velocity over [r, t] and v the instantaneous one; both point from data to noise. Published
implementations disagree on the direction of t and on the order of (t, r), so networks are called by keyword.

    B batch, H×W grid, C channels, N = H·W tokens, K regions

Sources: Trajectory Forcing (2026); improved mean flow (2025), arXiv 2512.02012; x-prediction from pixel mean flow
(2026), arXiv 2601.22158.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from trainer.methods.trajectory_forcing.config import MethodConfig
from trainer.methods.trajectory_forcing.network import Guidance, Prediction, as_guidance, velocity
from trainer.networks.layers import make_dual, per_sample, unpack_dual
from trainer.seeds import StepRows
from trainer.training.schedules import plateau_logit_normal

ADAPTIVE_FLOOR = 0.01
SHORTEST = 0.1
"""The region loss divides by the length of a prediction, but never by less than this share of the target's length."""


def loss(
    model: Any,
    x: Tensor,
    *,
    prev: Tensor,
    level: Tensor,
    label: Tensor,
    regions: Tensor | None,
    t: Tensor,
    r: Tensor,
    noise: Tensor,
    guidance: Guidance | None = None,
    region_weight: float = 1.0,
    region_timing: Literal["uniform", "signal"] = "uniform",
    direction: Literal["network", "data"] = "network",
) -> dict[str, Tensor]:
    """Compute the loss of a batch that may mix levels; call `backward` on `["loss"]`.

    model: a module, or any function called as model(z, t=, r=, label=, level=, prev=, guidance=) → Prediction.
    Its attribute `config` gives the number of levels (read with `regions`) and of classes (read with `guidance`).
    x, prev, noise: float32 [B, H, W, C], the clean canvas of `level`, the clean canvas of the level before (zeros
    at level 0), and e ~ N(0, I). level, label: int64 [B]. regions: uint8 or int64 [B, H, W], region ids of `level`,
    dense from 0; ignored at the last level. t, r: float32 [B], r ≤ t. guidance: only for networks that take it; a
    label equal to the null class counts as dropped. region_timing, direction: see `MethodConfig`.

    Returns scalars: loss = loss_u + loss_v + region_weight·region; loss_u and loss_v are adaptively weighted, so
    each stays near 1; raw_mse_u and raw_mse_v are the unweighted mean squared errors.
    Source: improved mean flow, arXiv 2512.02012, with its v-loss; Trajectory Forcing adds the region term.
    """
    z = _mix(x, noise, t)
    inputs = {"label": label, "level": level, "prev": prev}
    with torch.no_grad():
        v_t = velocity(z, x, t)
        if direction == "data" and guidance is None:
            v_c, target = v_t, v_t
        else:
            v_c, target = _directions(model, z, v_t, t, r, guidance, inputs)
    prediction, du_dt = _with_derivative(model, z, v_c, t=t, r=r, guidance=guidance, **inputs)
    V = prediction.u + per_sample(t - r) * du_dt
    squares_u, squares_v = (V - target).square(), (prediction.v - target).square()
    terms = {
        "loss_u": _adaptive(squares_u).mean(),
        "loss_v": _adaptive(squares_v).mean(),
        "region": x.new_zeros(()),
        "raw_mse_u": squares_u.detach().mean(),
        "raw_mse_v": squares_v.detach().mean(),
    }
    if region_weight and regions is not None:
        has_regions = level < model.config.num_levels - 1
        with torch.autocast(x.device.type, enabled=False):
            known = signal_share(t) if region_timing == "signal" else torch.ones_like(t)
            distances = region_distances(prediction.x, x, regions)
            terms["region"] = (distances * known * has_regions).sum() / has_regions.sum().clamp(min=1)
    total = terms["loss_u"] + terms["loss_v"] + region_weight * terms["region"]
    return {"loss": total, **terms}


def _directions(
    model: Any,
    z: Tensor,
    v_t: Tensor,
    t: Tensor,
    r: Tensor,
    guidance: Guidance | None,
    inputs: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the tangent v_c of the derivative and the target velocity v_g, both at z and without gradient.

    With guidance v_g = v_t + (1 − 1/ω)(v_c − v_u), where ω counts as 1 outside [t_min, t_max] unless r = t. The
    release evaluates v_c a second time with ω outside the interval too, but uses the result only where r = t. The
    derivative has weight 0 there, so a single evaluation is enough.
    """
    if guidance is None:
        return _instantaneous(model, z, t, guidance=None, **inputs), v_t
    omega, t_min, t_max = as_guidance(guidance, like=t)
    acts = (t == r) | ((t >= t_min) & (t <= t_max))
    omega = torch.where(acts, omega, 1.0)
    always = {"t_min": torch.zeros_like(t), "t_max": torch.ones_like(t)}
    null = torch.full_like(inputs["label"], model.config.num_classes)
    v_c = _instantaneous(model, z, t, guidance=Guidance(omega, **always), **inputs)
    unguided = Guidance(torch.ones_like(t), **always)
    v_u = _instantaneous(model, z, t, guidance=unguided, **{**inputs, "label": null})
    strength = torch.where(inputs["label"] == null, 0.0, 1 - 1 / omega)
    return v_c, v_t + per_sample(strength) * (v_c - v_u)


def _instantaneous(model: Any, z: Tensor, t: Tensor, **inputs: Any) -> Tensor:
    """Return v at z, with h = t − r = 0; a network with separate heads evaluates only its v-head."""
    if hasattr(model, "forward_with_derivative"):
        inputs["heads"] = "v"
    return model(z, t=t, r=t, **inputs).v


def _with_derivative(
    model: Any, z: Tensor, direction: Tensor, *, t: Tensor, **inputs: Any
) -> tuple[Prediction, Tensor]:
    """Return the prediction, and du/dt along (direction, 1, 0) in (z, t, r) without gradient."""
    if hasattr(model, "forward_with_derivative"):
        return model.forward_with_derivative(z, direction, t=t, **inputs)
    with forward_ad.dual_level():
        z_dual = make_dual(z, direction)
        t_dual = make_dual(t, torch.ones_like(t))
        duals = [unpack_dual(part) for part in model(z_dual, t=t_dual, **inputs)]
        du_dt = duals[1][1]
        du_dt = torch.zeros_like(z) if du_dt is None else du_dt.detach()
        return Prediction(*(value for value, _ in duals)), du_dt


def region_distances(predicted: Tensor, clean: Tensor, regions: Tensor) -> Tensor:
    """Compute the region loss of the paper, (1 − cos(predicted token, mean clean token of its region))²: float [B].

    predicted, clean: float [B, H, W, C]. regions: uint8 or int64 [B, H, W], dense from 0. The term is averaged within
    each region, then over the regions of a sample.
    """
    members = _members(regions)
    clean_means = members @ (_average(members).mT @ clean.flatten(1, 2))
    distance = (1 - _cosine_to(clean_means, predicted.flatten(1, 2))).square()
    per_region = (_average(members).mT @ distance[..., None])[..., 0]
    exists = members.sum(dim=1) > 0
    return (per_region * exists).sum(dim=1) / exists.sum(dim=1)


def signal_share(t: Tensor) -> Tensor:
    """Return the share of data in the variance of z_t, (1−t)²/((1−t)² + t²), for data of variance 1."""
    return (1 - t).square() / ((1 - t).square() + t.square())


def _members(regions: Tensor) -> Tensor:
    """Return one-hot float32 [B, N, K]; a product with it sums over regions in the same order on every device."""
    ids = regions.flatten(1).long()
    return (ids[..., None] == torch.arange(max(256, ids.shape[1]), device=ids.device)).float()


def _average(members: Tensor) -> Tensor:
    return members / members.sum(dim=1, keepdim=True).clamp(min=1)


def _cosine_to(target: Tensor, predicted: Tensor) -> Tensor:
    """Return the cosine of prediction and target, where a prediction counts as at least SHORTEST · ‖target‖ long.

    A new network predicts 0, where the gradient of a cosine is unbounded: the first step would dominate the
    optimiser's momentum for hundreds of steps. Predictions of ordinary length are unaffected.
    """
    length = torch.linalg.vector_norm(target, dim=-1).clamp_min(1e-12)
    shortest = (SHORTEST * length).square()
    squares = predicted.square().sum(dim=-1)
    return (predicted * target).sum(dim=-1) / (torch.maximum(squares, shortest).sqrt() * length)


def _adaptive(squares: Tensor) -> Tensor:
    """Return s/(s + 0.01) for each sample, where s is its sum of squares and the denominator carries no gradient.

    Source: MeanFlow's adaptive weight with p = 1.
    """
    s = squares.flatten(1).sum(dim=1)
    return s / (s.detach() + ADAPTIVE_FLOOR)


def _mix(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return (1 - per_sample(t)) * x + per_sample(t) * noise


class Draws(NamedTuple):
    """The random numbers of one training step, for some rows of the global batch."""

    t: Tensor
    r: Tensor
    noise: Tensor
    guidance: Guidance
    drop_label: Tensor
    prev_noise: Tensor | None

    def noisy(self, prev: Tensor, level: Tensor) -> Tensor:
        """Add the noise drawn for the canvases of the previous level [B, H, W, C]; at level 0 nothing is added."""
        if self.prev_noise is None:
            return prev
        return prev + self.prev_noise * per_sample(level > 0)


def draw_batch(rows: StepRows, shape: tuple[int, ...], config: MethodConfig) -> Draws:
    """Draw t, r, noise [·, *shape], guidance and label dropout for rows of a step.

    drop_label: bool, where to replace the label by the null class; meant, like `guidance`, for networks with guidance.
    prev_noise: None if `config.prev_noise` is 0.
    """
    n, generator = rows.batch_size, rows.generator()
    t, r = draw_times(n, config, generator)
    guidance = draw_guidance(n, config, generator)
    drop = torch.rand(n, generator=generator) < config.label_dropout
    # Drawn last, here and in each row, so that the other draws do not depend on it.
    sigma = config.prev_noise * torch.rand(n, generator=generator)
    noise, *prev = rows.noise(*([shape, shape] if config.prev_noise else [shape]))
    scalars = rows.own(torch.stack([t, r, *guidance, drop, sigma], dim=1))
    t, r, omega, t_min, t_max, dropped, sigma = scalars.T.contiguous()
    prev_noise = per_sample(sigma) * prev[0] if prev else None
    return Draws(t, r, noise, Guidance(omega, t_min, t_max), dropped > 0, prev_noise)


def draw_times(n: int, config: MethodConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw (t, r), float32 [n] with r ≤ t: both uniform with probability `uniform_fraction`, else both from the
    plateau logit-normal distribution.

    A sample has r = t with probability `data_fraction`; the release fixes the share within each batch instead.
    """
    assert config.time_shift is not None, "fit_to_shards chooses it"
    parameters = (config.time_mean, config.time_std, config.time_shift)
    plateau = torch.stack([plateau_logit_normal(n, *parameters, generator=generator) for _ in range(2)])
    uniform = torch.rand(2, n, generator=generator)
    take_uniform, take_equal = torch.rand(2, n, generator=generator)
    times = torch.where(take_uniform < config.uniform_fraction, uniform, plateau)
    t, r = times.amax(dim=0), times.amin(dim=0)
    return t, torch.where(take_equal < config.data_fraction, t, r)


def draw_guidance(n: int, config: MethodConfig, generator: torch.Generator) -> Guidance:
    """Draw omega log-uniform on [1, guidance_max], t_min uniform on [0, 0.5] and t_max on [0.5, 1]; [n] each."""
    u = torch.rand(3, n, generator=generator)
    return Guidance(torch.exp(u[0] * math.log(config.guidance_max)), 0.5 * u[1], 0.5 + 0.5 * u[2])
