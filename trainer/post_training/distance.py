"""The Fréchet distance of samples from real images, and its derivatives in closed form.

    D numbers that describe a sample, μ and Σ the mean and covariance of samples, μ_r and Σ_r those of real images

    FD      = ‖μ − μ_r‖² + tr Σ + tr Σ_r − 2·Σᵢ λᵢ^½,   λ the eigenvalues of M = Σ_r^½ Σ Σ_r^½ = V diag(λ) Vᵀ
    ∂FD/∂μ  = 2(μ − μ_r)
    ∂FD/∂Σ  = I − Σ_r^½ V diag(λ^−½) Vᵀ Σ_r^½

So one symmetric eigen-decomposition gives value and derivatives, in float64. λ^−½ is 0 where λ ≤ 1e-10·λ_max: there
the exact derivative grows without limit, and differentiating the square root would turn a number that never varies
among real images, or fewer samples than numbers, into NaN.

Source: Dowson and Landau (1982); as a loss: "Representation Fréchet Loss for Visual Generation", arXiv 2604.28190.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hierarchy_builder.errors import TrainerError

SMALLEST = 1e-10
"""Eigenvalues up to this share of the largest one have no derivative."""
ASYMMETRY = 1e-6
"""Largest difference of a covariance from its transpose, as a share of its largest entry, that counts as rounding."""


class Distance(NamedTuple):
    """A Fréchet distance and its derivatives, float64."""

    value: Tensor
    """[…]"""
    by_mean: Tensor
    """∂FD/∂μ […, D]"""
    by_covariance: Tensor
    """∂FD/∂Σ […, D, D], symmetric"""


class Target(NamedTuple):
    """Mean and covariance of real images, with the root of the covariance. Leading dimensions are several targets."""

    mean: Tensor
    """float64 […, D]"""
    root: Tensor
    """Σ_r^½, float64 […, D, D]"""
    trace: Tensor
    """tr Σ_r, float64 […]"""

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor, name: str) -> Target:
        """Take the root of a covariance. mean: […, D]. covariance: […, D, D]. name: what the errors call it.

        Raises TrainerError where the shapes do not fit each other, a number is not finite, or the covariance is not
        symmetric.
        """
        mean, covariance = mean.double(), covariance.double()
        if covariance.shape != (*mean.shape, mean.shape[-1]):
            raise TrainerError(
                f"{name}: mean {list(mean.shape)} and covariance {list(covariance.shape)} do not fit each other, "
                "expected [D] and [D, D]"
            )
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise TrainerError(
                f"{name}: mean or covariance holds NaN or infinity; compute the statistics again"
            )
        if (covariance - covariance.mT).abs().max() > ASYMMETRY * covariance.abs().max():
            raise TrainerError(f"{name}: the covariance is not symmetric; compute the statistics again")
        values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
        root = (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT
        return cls(mean, root, covariance.diagonal(dim1=-2, dim2=-1).sum(-1))

    @property
    def width(self) -> int:
        """D"""
        return self.mean.shape[-1]

    def rows(self, chosen: Tensor) -> Target:
        """Those of several targets that the indices `chosen` name."""
        return Target(*(each[chosen] for each in self))

    def to(self, device: torch.device) -> Target:
        """The same on `device`."""
        return Target(*(each.to(device) for each in self))

    def distance(self, mean: Tensor, covariance: Tensor) -> Distance:
        """The distance of samples with this mean […, D] and covariance […, D, D], and its derivatives."""
        inner = self.root @ covariance @ self.root
        values, vectors = torch.linalg.eigh((inner + inner.mT) / 2)
        roots = values.clamp(min=0).sqrt()
        away = mean - self.mean
        traces = covariance.diagonal(dim1=-2, dim2=-1).sum(-1) + self.trace
        value = (away.square().sum(-1) + traces - 2 * roots.sum(-1)).clamp(min=0)
        counts = values > SMALLEST * values.amax(dim=-1, keepdim=True).clamp(min=0)
        inverse = torch.where(counts, roots, 1.0).reciprocal() * counts
        half = self.root @ (vectors * inverse.sqrt()[..., None, :])
        identity = torch.eye(self.width, dtype=inner.dtype, device=inner.device)
        return Distance(value, 2 * away, identity - half @ half.mT)
