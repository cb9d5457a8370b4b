"""Draws the samples of runs of the toy method."""

from __future__ import annotations

import torch
from torch import Tensor

from toy_method.config import ToyMethodConfig
from toy_method.network import ToyNetwork
from trainer.trajectories.pipeline import LevelPipeline
from trainer.trajectories.trajectory import Sampling


class ToyPipeline(LevelPipeline):
    """A trained network of the toy method."""

    network_type = ToyNetwork
    method_type = ToyMethodConfig

    @torch.no_grad()
    def _levels(
        self, ids: list[int], noise: Tensor, how: Sampling, start_level: int = 0, **start: Tensor
    ) -> Tensor:
        levels = self.model.canvases[ids] + self.method.noise * noise.transpose(0, 1)
        return self.normaliser.undo(levels)[:, start_level:]
