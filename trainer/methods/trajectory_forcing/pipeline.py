"""Draws the samples of runs of Trajectory Forcing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.methods.trajectory_forcing.config import MethodConfig
from trainer.methods.trajectory_forcing.network import TrajectoryTransformer
from trainer.methods.trajectory_forcing.sample import sample_levels
from trainer.trajectories.pipeline import DifferentiablePipeline
from trainer.trajectories.trajectory import Sampling


class TrajectoryForcingPipeline(DifferentiablePipeline):
    """A trained network of Trajectory Forcing. num_steps of a call counts evaluations of the network per level."""

    network_type = TrajectoryTransformer
    method_type = MethodConfig
    weak_fields = ("grid", "in_channels", "num_levels", "num_classes", "guidance")
    model: TrajectoryTransformer

    def _levels(self, ids: list[int], noise: Tensor, how: Sampling, **start: Any) -> Tensor:
        return sample_levels(
            self.model,
            torch.tensor(ids, device=self.device),
            noise,
            how.num_steps,
            guidance=how.guidance,
            weak_model=self._weak_for(how),
            weak_scale=how.weak_scale,
            normaliser=self.normaliser,
            **start,
        )

    @classmethod
    def _next_canvas(
        cls, network: Any, method: Any, label: Tensor, level: Tensor, prev: Tensor, noise: Tensor
    ) -> Tensor:
        # At t = 1 the step z − (t − r)·u ends in the clean canvas that the u-head predicts.
        start, end = noise.new_ones(len(label)), noise.new_zeros(len(label))
        drawn = network(noise[0], t=start, r=end, label=label, level=level, prev=prev, heads="u")
        return drawn.x
