"""Networks that are small enough for one core, none of whose parameters is zero: every input reaches the output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.methods.normalizing_trajectory.config import NormalizingModelConfig
from trainer.methods.normalizing_trajectory.network import NormalizingNetwork
from trainer.methods.trajectory_forcing.network import TrajectoryTransformer
from trainer.networks.config import ModelConfig

SMALL = ModelConfig(grid=(3, 5), in_channels=6, num_classes=7, width=32, depth=3, head_depth=1, num_heads=2)
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


def awake(config: ModelConfig = SMALL, seed: int = 0) -> TrajectoryTransformer:
    """A network of Trajectory Forcing."""
    torch.manual_seed(seed)
    network = TrajectoryTransformer(config)
    _shake(network, 0.1)
    return network


def awake_chain(
    config: NormalizingModelConfig = TINY, seed: int = 0, size: float = 0.3
) -> NormalizingNetwork:
    """A network of Normalizing Trajectory Models, in float64."""
    torch.manual_seed(seed)
    network = NormalizingNetwork(config).double()
    _shake(network, size)
    return network


def _shake(network: nn.Module, size: float) -> None:
    with torch.no_grad():
        for p in network.parameters():
            p.add_(size * torch.randn_like(p))


def normal(*shape: int, seed: int = 1) -> Tensor:
    """Noise in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
