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
from trainer.methods.normalizing_trajectory.sample import Sampler, check_ending, num_noises
from trainer.trajectories.pipeline import DifferentiablePipeline
from trainer.trajectories.trajectory import Sampling


class NormalizingPipeline(DifferentiablePipeline):
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
        sampler = Sampler(
            network=self.model,
            method=self.method,
            num_steps=how.num_steps,
            ending=self.ending,
            guidance=0.0 if how.guidance is None else how.guidance[0],
        )
        return sampler.canvases(
            torch.tensor(ids, device=self.device), noise, normaliser=self.normaliser, **start
        )

    @classmethod
    def no_gradient(cls, config: Any) -> str | None:
        """Why the levels of a run have no gradient: they have one where they end in the learned denoiser."""
        if not config.model.denoiser_depth:
            return (
                "without a denoiser its samples end in a score, which is itself a gradient of the network; train a "
                "denoiser with --set distil_from=RUN"
            )
        if config.model.trajectory == "tokens":
            return "it draws tokens alone and no levels; train with --set model.trajectory=canvases"
        return None

    @classmethod
    def noises_of(cls, network: NormalizingNetwork) -> int:
        """Canvases of noise that one image takes with the first number of transitions that was trained."""
        return num_noises(network, network.config.num_steps[0])

    @classmethod
    def _next_canvas(cls, network: NormalizingNetwork, method: Any, *given: Tensor) -> Tensor:
        T = network.config.num_steps[0]
        return Sampler(network=network, method=method, num_steps=T, ending="denoiser").next_canvas(*given)
