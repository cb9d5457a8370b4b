"""Trajectory Forcing: improved mean flow on the canvases of a hierarchy, one level given the level before.

    t = 1 is noise, t = 0 is data, z_t = (1−t)·x + t·e, z_r = z_t − (t−r)·u, and r ≤ t

u is the average velocity over [r, t] and v the instantaneous one; both point from data to noise. Published codes
disagree on the direction of t and on the order of (t, r), so networks are called by keyword.

    B batch, H×W grid, C channels, N = H·W tokens, K regions

Sources: Trajectory Forcing (2026); improved mean flow (2025), arXiv 2512.02012; x-prediction from pixel mean flow
(2026), arXiv 2601.22158.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from trainer.methods.trajectory_forcing.config import MethodConfig
from trainer.methods.trajectory_forcing.network import Guidance, Prediction, as_guidance, velocity
from trainer.networks.config import ModelConfig
from trainer.networks.layers import make_dual, unpack_dual
from trainer.seeds import mixed_seed
from trainer.training.schedules import plateau_logit_normal

ADAPTIVE_FLOOR = 0.01
SHORTEST = 0.1
"""Share of the target's length below which the region loss stops dividing by the length of a prediction."""


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
) -> dict[str, Tensor]:
    """The objective on a batch that may mix levels; gradients flow from `["loss"]`.

    model: a plain module, or any function called as model(z, t=, r=, label=, level=, prev=, guidance=) →
    Prediction; `model.config` gives the number of levels and classes (without it: 4 levels). x, prev, noise:
    float32 [B, H, W, C], the clean canvas of `level`, that of the level before (zeros at level 0), and e ~ N(0, I).
    level, label: int64 [B]. regions: uint8 or int64 [B, H, W], ids of that level, dense from 0; not read at the
    last level. t, r: float32 [B], r ≤ t. guidance: for networks that take it; labels equal to the null class
    count as dropped.

    Returns scalars: loss = loss_u + loss_v + region_weight·region; loss_u and loss_v are adaptively weighted and
    hover near 1 each; raw_mse_u and raw_mse_v are the mean squared errors behind them.
    Source: improved mean flow, arXiv 2512.02012, with its v-loss; the region term is Trajectory Forcing's own.
    """
    z = _mix(x, noise, t)
    inputs = {"label": label, "level": level, "prev": prev}
    with torch.no_grad():
        v_t = velocity(z, x, t)
        v_c, target = _directions(model, z, v_t, t, r, guidance, inputs)
    prediction, du_dt = _with_derivative(model, z, v_c, t=t, r=r, guidance=guidance, **inputs)
    V = prediction.u + _per_sample(t - r) * du_dt
    squares_u, squares_v = (V - target).square(), (prediction.v - target).square()
    terms = {
        "loss_u": _adaptive(squares_u).mean(),
        "loss_v": _adaptive(squares_v).mean(),
        "region": x.new_zeros(()),
        "raw_mse_u": squares_u.detach().mean(),
        "raw_mse_v": squares_v.detach().mean(),
    }
    if region_weight and regions is not None:
        num_levels = getattr(model, "config", ModelConfig()).num_levels
        with torch.autocast(x.device.type, enabled=False):
            terms["region"] = region_variance(prediction.x, x, regions, sample_weight=level < num_levels - 1)
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
    """The tangent v_c of the derivative and the target velocity v_g, both at z and without graph.

    With guidance v_g = v_t + (1 − 1/ω)(v_c − v_u), where ω counts as 1 outside [t_min, t_max] unless r = t. The
    release evaluates v_c once more with ω also outside the interval, but only to use it where r = t; there the
    derivative has no weight, so one evaluation serves both.
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
    return v_c, v_t + _per_sample(strength) * (v_c - v_u)


def _instantaneous(model: Any, z: Tensor, t: Tensor, **inputs: Any) -> Tensor:
    """v at z, where h = t − r = 0; a network with separate heads evaluates only this one."""
    if hasattr(model, "forward_with_derivative"):
        inputs["heads"] = "v"
    return model(z, t=t, r=t, **inputs).v


def _with_derivative(
    model: Any, z: Tensor, direction: Tensor, *, t: Tensor, **inputs: Any
) -> tuple[Prediction, Tensor]:
    """Prediction, and du/dt along (direction, 1, 0) in (z, t, r) without graph."""
    if hasattr(model, "forward_with_derivative"):
        return model.forward_with_derivative(z, direction, t=t, **inputs)
    with forward_ad.dual_level():
        z_dual = make_dual(z, direction)
        t_dual = make_dual(t, torch.ones_like(t))
        duals = [unpack_dual(part) for part in model(z_dual, t=t_dual, **inputs)]
        du_dt = duals[1][1]
        du_dt = torch.zeros_like(z) if du_dt is None else du_dt.detach()
        return Prediction(*(value for value, _ in duals)), du_dt


def region_variance(
    predicted: Tensor, clean: Tensor, regions: Tensor, sample_weight: Tensor | None = None
) -> Tensor:
    """Region loss of the method: (1 − cos(predicted token, mean clean token of its region))².

    predicted, clean: float [B, H, W, C]. regions: uint8 or int64 [B, H, W], dense from 0. sample_weight: bool or
    float [B]. Averaged within each region, over the regions of a sample, then over samples by weight; 0 if all
    weights are.
    """
    members = _members(regions)
    clean_means = members @ (_average(members).mT @ clean.flatten(1, 2))
    distance = (1 - _cosine_to(clean_means, predicted.flatten(1, 2))).square()
    per_region = (_average(members).mT @ distance[..., None])[..., 0]
    return _over_regions(per_region, members, sample_weight)


def region_structure(
    predicted: Tensor, clean: Tensor, regions: Tensor, sample_weight: Tensor | None = None
) -> Tensor:
    """(1 − cos(mean predicted token, mean clean token))² per region; arguments and averages as `region_variance`.

    Weight 0 in the released configurations.
    """
    members = _members(regions)
    means = [_average(members).mT @ canvas.flatten(1, 2) for canvas in (predicted, clean)]
    return _over_regions((1 - _cosine_to(means[1], means[0])).square(), members, sample_weight)


def region_collapse(predicted: Tensor, regions: Tensor, sample_weight: Tensor | None = None) -> Tensor:
    """Mean squared cosine between the mean predicted tokens of different regions of a sample.

    Averaged over samples with at least two regions, by weight. Weight 0 in the released configurations.
    """
    members = _members(regions)
    means = F.normalize(_average(members).mT @ predicted.flatten(1, 2), dim=-1)
    squares = (means @ means.mT).square()
    num_regions = (members.sum(dim=1) > 0).sum(dim=1)
    off_diagonal = squares.sum(dim=(1, 2)) - squares.diagonal(dim1=1, dim2=2).sum(dim=1)
    per_sample = off_diagonal / (num_regions * (num_regions - 1)).clamp(min=1)
    return _weighted_mean(per_sample, _weights(sample_weight, per_sample) * (num_regions > 1))


def _members(regions: Tensor) -> Tensor:
    """One-hot float32 [B, N, K]: a product with it sums over regions, in the same order on every device."""
    ids = regions.flatten(1).long()
    return F.one_hot(ids, max(256, ids.shape[1])).float()


def _average(members: Tensor) -> Tensor:
    return members / members.sum(dim=1, keepdim=True).clamp(min=1)


def _over_regions(per_region: Tensor, members: Tensor, sample_weight: Tensor | None) -> Tensor:
    exists = members.sum(dim=1) > 0
    per_sample = (per_region * exists).sum(dim=1) / exists.sum(dim=1)
    return _weighted_mean(per_sample, _weights(sample_weight, per_sample))


def _weights(sample_weight: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like) if sample_weight is None else sample_weight.to(like.dtype)


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    total = weights.sum()
    return (values * weights).sum() / torch.where(total > 0, total, 1.0)


def _cosine_to(target: Tensor, predicted: Tensor) -> Tensor:
    """Cosine to a target; of a prediction shorter than SHORTEST · ‖target‖ it divides by that length instead.

    A fresh network predicts 0, where the gradient of a cosine has no bound: the first step would rule momentum
    for hundreds of steps. Predictions of any ordinary length are not touched.
    """
    length = torch.linalg.vector_norm(target, dim=-1).clamp_min(1e-12)
    shortest = (SHORTEST * length).square()
    squares = predicted.square().sum(dim=-1)
    return (predicted * target).sum(dim=-1) / (torch.maximum(squares, shortest).sqrt() * length)


def _adaptive(squares: Tensor) -> Tensor:
    """Per sample s/(s + 0.01) with the denominator held constant, s the sum of squares. MeanFlow, p = 1."""
    s = squares.flatten(1).sum(dim=1)
    return s / (s.detach() + ADAPTIVE_FLOOR)


def _mix(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return (1 - _per_sample(t)) * x + _per_sample(t) * noise


def _per_sample(t: Tensor) -> Tensor:
    return t[:, None, None, None]


class Draws(NamedTuple):
    """What one training step leaves to chance, for some rows of the global batch."""

    t: Tensor
    r: Tensor
    noise: Tensor
    guidance: Guidance
    drop_label: Tensor
    prev_noise: Tensor | None

    def noisy(self, prev: Tensor, level: Tensor) -> Tensor:
        """The canvases of the previous level [B, H, W, C] with the noise drawn for them; level 0 has none."""
        if self.prev_noise is None:
            return prev
        return prev + self.prev_noise * _per_sample(level > 0)


def draw_batch(
    global_batch_size: int,
    shape: tuple[int, ...],
    config: MethodConfig,
    *,
    seed: int,
    step: int,
    rows: slice = slice(None),
    device: torch.device | str = "cpu",
) -> Draws:
    """Draw t, r, noise [·, *shape], guidance and label dropout for `rows` of the batch of step `step`.

    A row's draws depend on (seed, step, row) alone, so any split of the batch over ranks trains the same run.
    Scalars are drawn for the whole batch on the CPU; noise per row on `device`, whose type it depends on.
    drop_label: bool, replace the label by the null class; meant, like `guidance`, for networks with guidance.
    prev_noise: None unless the configuration asks for noise on the previous level.
    """
    generator = torch.Generator().manual_seed(mixed_seed(seed, step))
    t, r = draw_times(global_batch_size, config, generator)
    guidance = draw_guidance(global_batch_size, config, generator)
    drop = torch.rand(global_batch_size, generator=generator) < config.label_dropout
    # Drawn after all else, here and in each row, so that the other draws do not depend on it.
    sigma = config.prev_noise * torch.rand(global_batch_size, generator=generator)
    on_device = torch.Generator(device)
    drawn: tuple[list[Tensor], list[Tensor]] = ([], [])
    for row in range(global_batch_size)[rows]:
        on_device.manual_seed(mixed_seed(seed, step, row))
        for noises in drawn[: 2 if config.prev_noise else 1]:
            noises.append(torch.randn(shape, generator=on_device, device=device))
    chosen = (values[rows].to(device) for values in (t, r, *guidance, drop, sigma))
    t, r, omega, t_min, t_max, drop, sigma = chosen
    prev_noise = _per_sample(sigma) * torch.stack(drawn[1]) if drawn[1] else None
    return Draws(t, r, torch.stack(drawn[0]), Guidance(omega, t_min, t_max), drop, prev_noise)


def draw_times(n: int, config: MethodConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw (t, r), float32 [n] with r ≤ t: both of the plateau law, or both uniform with `uniform_fraction`.

    A sample has r = t with probability `data_fraction`; the release fixes the share within each batch instead.
    """
    law = (config.time_mean, config.time_std, config.time_shift)
    plateau = torch.stack([plateau_logit_normal(n, *law, generator=generator) for _ in range(2)])
    uniform = torch.rand(2, n, generator=generator)
    take_uniform, take_equal = torch.rand(2, n, generator=generator)
    times = torch.where(take_uniform < config.uniform_fraction, uniform, plateau)
    t, r = times.amax(dim=0), times.amin(dim=0)
    return t, torch.where(take_equal < config.data_fraction, t, r)


def draw_guidance(n: int, config: MethodConfig, generator: torch.Generator) -> Guidance:
    """Draw omega log-uniform on [1, guidance_max], t_min uniform on [0, 0.5], t_max on [0.5, 1]; [n] each."""
    u = torch.rand(3, n, generator=generator)
    return Guidance(torch.exp(u[0] * math.log(config.guidance_max)), 0.5 * u[1], 0.5 + 0.5 * u[2])
