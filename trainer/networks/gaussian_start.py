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

which has a limit at r = t, the instantaneous velocity, and becomes (z_t − m)/t for s = 0. It is applied to each
coefficient of the orthonormal cosine transform over the grid, which leaves noise white. m is the canvas of the
previous level plus the mean step of the class from there, smooth enough to consist of the F×F lowest frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

LEAST_DEVIATION = 0.05
"""Lower limit of s, which keeps velocities near t = 0 as small as those of a network without this start."""
LOWEST = 4
"""F, at most. A class has F²·L·C means, which a few dozen images determine."""
SHARE = 0.65
"""Share of the data's variance that the start draws; what the network makes of the image adds to it."""


class GaussianStart(nn.Module):
    """The average velocity of the flow from noise to Gaussian canvases; see the head of this file.

    Its two tensors are fitted to shards and stored with the network's weights, but not trained. `deviation`: s, float32
    [L, H, W, C], by frequency. `steps`: mean coefficients of a class's step from the previous level, float32
    [K + 1, L, F, F, C]; the last row is for no class.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, grid: tuple[int, int], channels: int, num_classes: int, num_levels: int) -> None:
        super().__init__()
        lowest = min(LOWEST, *grid)
        self.deviation = nn.Parameter(torch.ones(num_levels, *grid, channels), requires_grad=False)
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
        return self._canvas(g * self._frequencies(z - (1 - t) * mean), self.rows, self.columns) - mean

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Fit means and deviations to examples.

        batches: canvases float32 [b, L, H, W, C] in the network's units, and labels int64 [b]. A class's mean is drawn
        towards the mean of all classes by the share of its variance that chance explains (empirical Bayes), so a class
        without examples has the mean of all.
        """
        table, lowest = self.steps, self.steps.shape[2]
        counts = torch.zeros(len(table), dtype=torch.float64)
        sums = torch.zeros(table.shape, dtype=torch.float64)
        total, squares = (torch.zeros(self.deviation.shape, dtype=torch.float64) for _ in range(2))
        for canvases, label in batches:
            changes = torch.cat([canvases[:, :1], canvases.diff(dim=1)], dim=1)
            found = self._frequencies(changes.flatten(0, 1)).unflatten(0, changes.shape[:2]).double()
            counts.index_add_(0, label, torch.ones(len(label), dtype=torch.float64))
            sums.index_add_(0, label, found[:, :, :lowest, :lowest])
            total += found.sum(dim=0)
            squares += found.square().sum(dim=0)
        count = counts.sum()
        mean = total / count
        variance = squares / count - mean.square()
        low, overall = (slice(None), slice(lowest), slice(lowest)), mean[:, :lowest, :lowest]
        seen = counts > 0
        n = counts[seen][:, None, None, None, None]
        of_class = sums[seen] / n
        between = ((of_class - overall).square() * n).sum(dim=0) / count
        classes = int(seen.sum())
        variance[low] = (variance[low] - between) * count / (count - classes).clamp(min=1)
        by_chance = variance[low] / n
        spread = (between - variance[low] * (classes - 1) / count).clamp(min=0)
        kept = spread / (spread + by_chance).clamp(min=1e-12)
        table[:] = overall
        table[seen] = (overall + kept * (of_class - overall)).to(table.dtype)
        self.deviation.copy_((SHARE * variance).clamp(min=LEAST_DEVIATION**2).sqrt())

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
