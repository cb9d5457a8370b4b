"""The network of the toy method."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from toy_method.config import ToyModelConfig


class ToyNetwork(nn.Module):
    """Keeps the mean canvas of every class and level."""

    def __init__(self, config: ToyModelConfig) -> None:
        super().__init__()
        self.config = config
        sizes = (config.num_classes, config.num_levels, *config.grid, config.in_channels)
        self.canvases = nn.Parameter(torch.zeros(sizes))

    def forward(self, label: Tensor, level: Tensor) -> Tensor:
        """Canvases [B, H, W, C]."""
        return self.canvases[label, level]
