"""A tiny network of Normalizing Trajectory Models that is no identity, and noise from seeds."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.methods.normalizing_trajectory.config import NormalizingModelConfig
from trainer.methods.normalizing_trajectory.network import NormalizingNetwork

GRID, C = (2, 3), 4
TINY = NormalizingModelConfig(
    grid=GRID,
    in_channels=C,
    num_classes=3,
    width=16,
    depth=2,
    num_heads=2,
    num_class_tokens=2,
    flow_width=16,
    flow_depth=2,
    flow_heads=2,
)


def awake(config: NormalizingModelConfig = TINY, seed: int = 0, size: float = 0.3) -> NormalizingNetwork:
    """A network in float64 none of whose weights are 0."""
    torch.manual_seed(seed)
    network = NormalizingNetwork(config).double()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(size * torch.randn_like(p))
    return network


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
