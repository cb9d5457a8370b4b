"""Draws the samples of runs of Normalizing Trajectory Models.

    pipe = NormalizingPipeline.from_pretrained("runs/ntm", ending="score")
    trajectory = pipe(label="panda", seed=3)

Where the network models tokens alone, they are the one level of a trajectory; else a trajectory has the levels of the
hierarchy, to be edited and resumed as those of Trajectory Forcing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.methods.normalizing_trajectory.config import Ending, NormalizingMethodConfig
from trainer.methods.normalizing_trajectory.network import NormalizingNetwork
from trainer.methods.normalizing_trajectory.sample import (
    HowToSample,
    check_ending,
    num_noises,
    sample_canvases,
)
from trainer.trajectories.pipeline import LevelPipeline
from trainer.trajectories.trajectory import Sampling


class NormalizingPipeline(LevelPipeline):
    """A trained network of Normalizing Trajectory Models with its class names and decoder.

    num_steps of a call is T, one of the numbers of transitions that were trained; 1 stands for the first of them.
    guidance is w of the guided Gaussian, 0 for none, at all times. There is no autoguidance.
    """

    network_type = NormalizingNetwork
    method_type = NormalizingMethodConfig
    model: NormalizingNetwork

    def _take_options(self, ending: Ending | None = None) -> None:
        """ending: without it `denoiser` where the network has one, else `score`.

        Raises UsageError for an ending that the network does not have, see `check_ending`.
        """
        self.ending: Ending = ending or ("score" if self.model.denoiser is None else "denoiser")
        check_ending(self.model, self.ending)

    @property
    def drawn_levels(self) -> int:
        """Levels of the trajectories it draws: one where the network models tokens alone."""
        return self.model.config.drawn_levels

    @property
    def default_steps(self) -> int:
        """The first number of transitions that was trained."""
        return self.model.config.num_steps[0]

    def _num_noises(self, how: Sampling) -> int:
        return num_noises(self.model, how.num_steps)

    def _levels(self, ids: list[int], noise: Tensor, how: Sampling, **start: Any) -> Tensor:
        self._weak_for(how)
        return sample_canvases(
            self.model,
            self.method,
            torch.tensor(ids, device=self.device),
            noise,
            HowToSample(
                num_steps=how.num_steps,
                ending=self.ending,
                guidance=0.0 if how.guidance is None else how.guidance[0],
            ),
            normaliser=self.normaliser,
            **start,
        )
