"""The flow from noise to Gaussian canvases in closed form, as the start of a network that predicts velocities.

    B batch, K classes, L levels, H×W grid of P = H·W places, C channels, M places that tell classes apart

A small network first learns the mean of what it cannot tell apart, so for a long time its one-step samples are all
alike. With this start, the untrained network already draws Gaussian canvases with the means of the data's classes and
levels and with its variances, around the canvas of the previous level, and training changes what a Gaussian gets wrong.

The network looks at the Gaussian canvas that z leads to, which has the data's scale at every t, instead of at z, and
what it returns is added in units of s/σ_t, where s is the deviation of a place and channel: large where images of that
level vary, small in the ground around an object. Since that canvas hides how noisy z is, the network is told t. This
extends the preconditioning of EDM (Karras et al. 2022, arXiv 2206.00364) from one scale of the data to one for each
level and principal component, and from the instantaneous velocity to the average one.

For x ~ N(m, s²) and z_t = (1−t)·x + t·e, the deviation of z_t is σ_t = sqrt((1−t)²·s² + t²), and the flow scales
z_t − (1−t)·m by σ_r/σ_t on its way from t to r. Its average velocity is

    u = (z_t − z_r)/(t − r) = g·(z_t − (1−t)·m) − m,   g = (t + r − s²·(2 − t − r)) / (σ_t·(σ_t + σ_r))

which has a limit at r = t, the instantaneous velocity, and becomes (z_t − m)/t for s = 0. It is applied to the
coefficients along the principal components of a level, products of one pattern over the places and one direction of
the channels (the eigenvectors of the two covariances); noise is white there as well. Patterns follow where images
vary, for example in the middle and not in the ground around an object, which spatial frequencies cannot. m is the
canvas of the previous level plus the mean step from there, of all classes and of the class along the M patterns that
vary most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

LEAST_DEVIATION = 0.05
"""Lower limit of s, which keeps velocities near t = 0 as small as those of a network without this start."""
CLASS_PLACES = 32
"""M, at most. A class has M·L·C means; those that its images do not determine are drawn towards the mean of all."""

BLOCK_ROWS = 64
"""Rows of a symmetric product that are made at once, none of them far beyond the diagonal."""


class Seen(NamedTuple):
    """A canvas z taken apart into the components of its level; float32."""

    components: Tensor
    """z − (1−t)·m along the principal components, [B, P, C]."""
    mean: Tensor
    """m, [B, P, C]."""
    t: Tensor
    """[B, 1, 1]."""
    places: Tensor
    """Patterns of the level as columns, [B, P, P]."""
    axes: Tensor
    """Axes of the level as columns, [B, C, C]."""
    deviation: Tensor
    """s of the components, [B, P, C]."""
    sigma: Tensor
    """σ_t of the components, [B, P, C]."""
    unit: Tensor
    """s/σ_t of the places and channels, [B, P, C]."""


class GaussianStart(nn.Module):
    """The average velocity of the flow from noise to Gaussian canvases; see the head of this file.

    Its tensors are fitted to shards and stored with the network's weights, but not trained. `mean`: mean step from the
    previous level, float32 [L, P, C]. `places`: principal patterns as columns, those that vary most first, float32
    [L, P, P]. `axes`: principal axes of the channels as columns, float32 [L, C, C]. `deviation`: s along both, float32
    [L, P, C]. `spread`: s of the places and channels themselves, float32 [L, P, C]. `steps`: coefficients of a class's
    mean step less the mean of all, float32 [K + 1, L, M, C]; the last row is for no class.
    """

    def __init__(self, grid: tuple[int, int], channels: int, num_classes: int, num_levels: int) -> None:
        super().__init__()
        self.grid = grid
        places, shape = math.prod(grid), (num_levels, math.prod(grid), channels)
        self.mean = _fitted(torch.zeros(shape))
        self.places = _fitted(torch.eye(places).repeat(num_levels, 1, 1))
        self.axes = _fitted(torch.eye(channels).repeat(num_levels, 1, 1))
        self.deviation, self.spread = _fitted(torch.ones(shape)), _fitted(torch.ones(shape))
        self.steps = _fitted(torch.zeros(num_classes + 1, num_levels, min(CLASS_PLACES, places), channels))

    def see(self, z: Tensor, *, t: Tensor, label: Tensor, level: Tensor, prev: Tensor) -> Seen:
        """Take z apart.

        z, prev: float32 [B, H, W, C]. t: float32 [B]. label, level: int64 [B].
        """
        t = t[:, None, None]
        places, axes, step = self.places[level], self.axes[level], self.steps[label, level]
        mean = prev.flatten(1, 2) + self.mean[level] + places[..., : step.shape[1]] @ step
        components = places.mT @ (z.flatten(1, 2) - (1 - t) * mean) @ axes
        deviation, spread = self.deviation[level], self.spread[level]
        sigma, unit = _noisy(deviation, t), spread / _noisy(spread, t)
        return Seen(components, mean, t, places, axes, deviation, sigma, unit)

    def drawn(self, seen: Seen) -> Tensor:
        """Return the canvas at t = 0 that the Gaussian flow leads to, float32 [B, H, W, C]."""
        clean = seen.components * (seen.deviation / seen.sigma)
        return self._canvas(seen, clean, seen.mean)

    def velocity(self, seen: Seen, r: Tensor, learned: Tensor) -> Tensor:
        """Return u at z from t to r, float32 [B, H, W, C].

        r: float32 [B], r ≤ t. learned: what the network adds to the clean canvas, float32 [B, H, W, C].
        """
        t, r, variance = seen.t, r[:, None, None], seen.deviation.square()
        g = (t + r - variance * (2 - t - r)) / (seen.sigma * (seen.sigma + _noisy(seen.deviation, r)))
        return self._canvas(seen, g * seen.components, -seen.mean - seen.unit * learned.flatten(1, 2))

    def _canvas(self, seen: Seen, components: Tensor, besides: Tensor) -> Tensor:
        return (seen.places @ components @ seen.axes.mT + besides).unflatten(1, self.grid)

    @torch.no_grad()
    def fit(self, read: Callable[[], Iterable[tuple[Tensor, Tensor]]], share: float) -> None:
        """Fit means, patterns, axes and deviations to examples.

        read: called twice, returns the same batches each time: canvases float32 [b, L, H, W, C] in the network's units,
        and labels int64 [b]. share: how much of the variance around the means is kept. A class's mean is drawn towards
        the mean of all classes by the share of its variance that chance explains (empirical Bayes), so a class without
        examples has the mean of all.
        """
        count = 0
        total, squares = (torch.zeros(self.mean.shape, dtype=torch.float64) for _ in range(2))
        of_places, of_channels = (
            torch.zeros(matrix.shape, dtype=torch.float64) for matrix in (self.places, self.axes)
        )
        for canvases, _ in read():
            found = _steps_between(canvases)
            count += len(canvases)
            total += found.sum(dim=2, dtype=torch.float64)
            by_place, by_channel = found.flatten(2), found.transpose(1, 2).flatten(1, 2)  # einsum copies more
            _add_squares(of_places, by_place)
            _add_squares(of_channels, by_channel.mT)
        mean = total / count
        self.mean.copy_(mean)
        self.places.copy_(torch.linalg.eigh(of_places / count - mean @ mean.mT).eigenvectors.flip(-1))
        self.axes.copy_(torch.linalg.eigh(of_channels / count - mean.mT @ mean).eigenvectors)
        numbers = torch.zeros(len(self.steps), dtype=torch.float64)
        sums = torch.zeros(self.steps.shape, dtype=torch.float64)
        known = self.steps.shape[2]
        for canvases, label in read():
            away = _steps_between(canvases).sub_(self.mean[:, :, None])
            along = (self.places.mT @ away.flatten(2)).reshape(len(away), -1, away.shape[3]) @ self.axes
            along = along.double().view(away.shape)
            numbers.index_add_(0, label, torch.ones(len(label), dtype=torch.float64))
            sums.index_add_(0, label, along[:, :known].permute(2, 0, 1, 3))
            squares += along.square_().sum(dim=2)
        variance = squares / count
        seen = numbers > 0
        n, classes = numbers[seen][:, None, None, None], int(seen.sum())
        away = sums[seen].div_(n)
        between = away.square().mul_(n).sum(dim=0) / count
        within = variance[:, :known]
        within -= between
        within *= count / max(1, count - classes)
        spread = (between - within * (classes - 1) / count).clamp(min=0)
        kept = spread / (within / n).add_(spread).clamp_(min=1e-12)
        self.steps.zero_()
        self.steps[seen] = (kept.mul_(away) @ self.axes.mT.double()).to(self.steps.dtype)
        variance = (share * variance).clamp(min=LEAST_DEVIATION**2)
        self.deviation.copy_(variance.sqrt())
        squares = self.places.square() @ variance.float() @ self.axes.square().mT
        self.spread.copy_(squares.sqrt())


def _noisy(s: Tensor, t: Tensor) -> Tensor:
    """Return σ_t."""
    return ((1 - t).square() * s.square() + t.square()).sqrt()


def _add_squares(total: Tensor, rows: Tensor) -> None:
    """Add rows·rowsᵀ to a float64 total [L, n, n], of which `eigh` looks only at the lower triangle."""
    for start in range(0, rows.shape[1], BLOCK_ROWS):
        stop = start + BLOCK_ROWS
        total[:, start:stop, :stop] += (rows[:, start:stop] @ rows[:, :stop].mT).double()


def _fitted(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _steps_between(canvases: Tensor) -> Tensor:
    """Return what each level adds to the one before, [L, P, b, C]; of level 0 the canvas itself."""
    canvases = canvases.flatten(2, 3).permute(1, 2, 0, 3)
    steps = torch.empty_like(canvases, memory_format=torch.contiguous_format)
    steps[0] = canvases[0]
    torch.sub(canvases[1:], canvases[:-1], out=steps[1:])
    return steps
