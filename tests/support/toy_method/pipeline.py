"""Draws the samples of runs of the toy method."""

from __future__ import annotations

import torch
from torch import Tensor

from toy_method.network import ToyNetwork
from trainer.trajectories.pipeline import TrajectoryPipeline
from trainer.trajectories.trajectory import Sampling, Trajectory


class ToyPipeline(TrajectoryPipeline):
    """A trained network of the toy method."""

    network_type = ToyNetwork

    def _sample(self, ids: list[int], seeds: list[int], how: Sampling) -> list[Trajectory]:
        levels = self._canvases(ids, self._noise(seeds, how))
        return [self._trajectory(*each, how) for each in zip(levels, ids, seeds, strict=True)]

    def _after(
        self, trajectory: Trajectory, level: int, seeds: tuple[int, ...], noise: Tensor, how: Sampling
    ) -> Tensor:
        return self._canvases([trajectory.label], noise.cpu())[:, level + 1 :]

    @torch.no_grad()
    def _canvases(self, ids: list[int], noise: Tensor) -> Tensor:
        means = self.model.canvases[ids].cpu()
        return self.normaliser.to("cpu").undo(means + self.method.noise * noise.transpose(0, 1))
