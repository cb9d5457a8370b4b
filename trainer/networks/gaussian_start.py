"""The flow from noise to Gaussian canvases in closed form, as the start of a network that predicts velocities.

    B batch, K classes, L levels, H×W grid, C channels, F×F lowest spatial frequencies

A small network first learns the mean of what it cannot tell apart, so for a long time its one-step samples are all
alike. With this start, the untrained network already draws Gaussian canvases with the means and the spectrum of the
data, around the canvas of the previous level, and training changes what a Gaussian gets wrong. It extends the
preconditioning of EDM (Karras et al. 2022, arXiv 2206.00364) from one scale of the data to one for each level, spatial
frequency and channel, and from the instantaneous velocity to the average one.

For x ~ N(m, s²) and z_t = (1−t)·x + t·e, the deviation of z_t is σ_t = sqrt((1−t)²·s² + t²), and the flow scales
z_t − (1−t)·m by σ_r/σ_t on its way from t to r. Its average velocity is

    u = (z_t − z_r)/(t − r) = g·(z_t − (1−t)·m) − m,   g = (t + r − s²·(2 − t − r)) / (σ_t·(σ_t + σ_r))

which has a limit at r = t, the instantaneous velocity, and becomes (z_t − m)/t for s = 0. It is applied to the
coefficients of the orthonormal cosine transform over the grid, along the principal axes of a level's channels; noise
is white there as well. m is the canvas of the previous level plus the mean step of the class from there, smooth enough
to consist of the F×F lowest frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

LEAST_DEVIATION = 0.05
"""Lower limit of s, which keeps velocities near t = 0 as small as those of a network without this start."""
LOWEST = 4
"""F, at most. A class has F²·L·C means, which a few dozen images determine."""


class GaussianStart(nn.Module):
    """The average velocity of the flow from noise to Gaussian canvases; see the head of this file.

    Its tensors are fitted to shards and stored with the network's weights, but not trained. `axes`: principal axes of
    the channels as columns, float32 [L, C, C]. `deviation`: s along them, float32 [L, H, W, C], by frequency. `steps`:
    mean coefficients of a class's step from the previous level, float32 [K + 1, L, F, F, C]; the last row is for no
    class.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, grid: tuple[int, int], channels: int, num_classes: int, num_levels: int) -> None:
        super().__init__()
        lowest = min(LOWEST, *grid)
        self.deviation = nn.Parameter(torch.ones(num_levels, *grid, channels), requires_grad=False)
        self.axes = nn.Parameter(torch.eye(channels).repeat(num_levels, 1, 1), requires_grad=False)
        steps = torch.zeros(num_classes + 1, num_levels, lowest, lowest, channels)
        self.steps = nn.Parameter(steps, requires_grad=False)
        self.register_buffer("rows", _cosines(grid[0]), persistent=False)
        self.register_buffer("columns", _cosines(grid[1]), persistent=False)

    def forward(
        self, z: Tensor, *, t: Tensor, r: Tensor, label: Tensor, level: Tensor, prev: Tensor
    ) -> Tensor:
        """Return u at z, float32 [B, H, W, C].

        z, prev: float32 [B, H, W, C]. t, r: float32 [B], r ≤ t. label, level: int64 [B].
        """
        t, r = t[:, None, None, None], r[:, None, None, None]
        lowest = self.steps.shape[2]
        step = self.steps[label, level]
        mean = prev + self._canvas(step, self.rows[:lowest], self.columns[:lowest])
        variance = self.deviation[level].square()
        sigma_t, sigma_r = (((1 - time).square() * variance + time.square()).sqrt() for time in (t, r))
        g = (t + r - variance * (2 - t - r)) / (sigma_t * (sigma_t + sigma_r))
        axes = self.axes[level][:, None]
        scaled = g * (self._frequencies(z - (1 - t) * mean) @ axes)
        return self._canvas(scaled @ axes.mT, self.rows, self.columns) - mean

    @torch.no_grad()
    def fit(self, read: Callable[[], Iterable[tuple[Tensor, Tensor]]], share: float) -> None:
        """Fit axes, means and deviations to examples.

        read: called twice, returns the same batches each time: canvases float32 [b, L, H, W, C] in the network's units,
        and labels int64 [b]. share: how much of the variance around the means is kept. A class's mean is drawn towards
        the mean of all classes by the share of its variance that chance explains (empirical Bayes), so a class without
        examples has the mean of all.
        """
        lowest = self.steps.shape[2]
        counts = torch.zeros(len(self.steps), dtype=torch.float64)
        sums = torch.zeros(self.steps.shape, dtype=torch.float64)
        products = torch.zeros(self.axes.shape, dtype=torch.float64)
        for canvases, label in read():
            found = self._steps_of(canvases)
            counts.index_add_(0, label, torch.ones(len(label), dtype=torch.float64))
            sums.index_add_(0, label, found[:, :, :lowest, :lowest].double())
            flat = found.transpose(0, 1).flatten(1, 3)
            products += (flat.mT @ flat).double()
        self.axes.copy_(torch.linalg.eigh(products).eigenvectors)
        total, squares = (torch.zeros(self.deviation.shape, dtype=torch.float64) for _ in range(2))
        for canvases, _ in read():
            along = (self._steps_of(canvases) @ self.axes[:, None]).double()
            total += along.sum(dim=0)
            squares += along.square().sum(dim=0)
        count = counts.sum()
        variance = squares / count - (total / count).square()
        axes = self.axes[:, None].double()
        overall, of_class = sums.sum(dim=0) / count, sums / counts.clamp(min=1)[:, None, None, None, None]
        seen = counts > 0
        n, classes = counts[seen][:, None, None, None, None], int(seen.sum())
        away = (of_class[seen] - overall) @ axes
        between = (away.square() * n).sum(dim=0) / count
        low = variance[:, :lowest, :lowest]
        low -= between
        low *= count / (count - classes).clamp(min=1)
        spread = (between - low * (classes - 1) / count).clamp(min=0)
        kept = spread / (spread + low / n).clamp(min=1e-12)
        self.steps.copy_(overall.expand_as(self.steps))
        self.steps[seen] += ((kept * away) @ axes.mT).to(self.steps.dtype)
        self.deviation.copy_((share * variance).clamp(min=LEAST_DEVIATION**2).sqrt())

    def _steps_of(self, canvases: Tensor) -> Tensor:
        """Coefficients [b, L, H, W, C] of what each level adds to the one before; of level 0 the canvas itself."""
        added = torch.cat([canvases[:, :1], canvases.diff(dim=1)], dim=1)
        return self._frequencies(added.flatten(0, 1)).unflatten(0, added.shape[:2])

    def _frequencies(self, canvas: Tensor) -> Tensor:
        return torch.einsum("fh,bhwc,gw->bfgc", self.rows, canvas, self.columns)

    def _canvas(self, coefficients: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return torch.einsum("fh,bfgc,gw->bhwc", rows, coefficients, columns)


def _cosines(n: int) -> Tensor:
    """Return the orthonormal cosine transform of n places as a matrix [frequency, place] (DCT-II)."""
    angle = math.pi / n * torch.outer(torch.arange(n), torch.arange(n) + 0.5)
    scale = torch.full((n, 1), math.sqrt(2 / n))
    scale[0] = math.sqrt(1 / n)
    return scale * angle.cos()
