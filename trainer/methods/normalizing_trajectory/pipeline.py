"""Draws the samples of runs of Normalizing Trajectory Models.

    pipe = NormalizingPipeline.from_pretrained("runs/ntm", ending="score")
    trajectory = pipe(label="panda", seed=3)

Where the network models tokens alone, they are the one level of a trajectory; else a trajectory has the levels of the
hierarchy, to be edited and resumed as those of Trajectory Forcing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trainer.data.normalisation import RAW, Normaliser
from trainer.methods.normalizing_trajectory.config import Ending, NormalizingMethodConfig
from trainer.methods.normalizing_trajectory.network import NormalizingNetwork
from trainer.methods.normalizing_trajectory.sample import (
    HowToSample,
    check_ending,
    num_noises,
    sample_canvases,
)
from trainer.trajectories.pipeline import Decoder, TrajectoryPipeline
from trainer.trajectories.trajectory import Sampling, Trajectory


class NormalizingPipeline(TrajectoryPipeline):
    """A trained network of Normalizing Trajectory Models with its class names and decoder.

    num_steps of a call is T, one of the numbers of transitions that were trained; 1 stands for the first of them.
    guidance is w of the guided Gaussian, 0 for none, at all times. There is no autoguidance.
    """

    network_type = NormalizingNetwork
    model: NormalizingNetwork

    def __init__(
        self,
        model: NormalizingNetwork,
        class_names: Sequence[str] = (),
        encoder: dict[str, Any] | None = None,
        decoder: Decoder | None = None,
        normaliser: Normaliser = RAW,
        weights: dict[str, str] | None = None,
        method: NormalizingMethodConfig | None = None,
        ending: Ending | None = None,
    ) -> None:
        """method: as trained. ending: without it `denoiser` where the network has one, else `score`.

        Raises UsageError for an ending that the network does not have, see `check_ending`.
        """
        method = method or NormalizingMethodConfig()
        super().__init__(model, class_names, encoder, decoder, normaliser, weights, method=method)
        self.ending: Ending = ending or ("score" if model.denoiser is None else "denoiser")
        check_ending(model, self.ending)

    @property
    def drawn_levels(self) -> int:
        """Levels of the trajectories it draws: one where the network models tokens alone."""
        config = self.model.config
        return 1 if config.trajectory == "tokens" else config.num_levels

    def _num_noises(self, how: Sampling) -> int:
        return num_noises(self.model, self._taken(how).num_steps)

    def _sample(self, ids: list[int], seeds: list[int], how: Sampling) -> list[Trajectory]:
        how = self._taken(how)
        levels = self._canvases(ids, self._noise(seeds, how).to(self.device), how).cpu()
        return [self._trajectory(*each, how) for each in zip(levels, ids, seeds, strict=True)]

    def _after(
        self, trajectory: Trajectory, level: int, seeds: tuple[int, ...], noise: Tensor, how: Sampling
    ) -> Tensor:
        previous = trajectory.levels[level : level + 1].to(self.device)
        return self._canvases([trajectory.label], noise, how, start_level=level + 1, previous=previous)

    def _canvases(self, ids: list[int], noise: Tensor, how: Sampling, **start: Any) -> Tensor:
        self._weak_for(how)
        return sample_canvases(
            self.model,
            self.method,
            torch.tensor(ids, device=self.device),
            noise,
            HowToSample(
                num_steps=self._taken(how).num_steps,
                ending=self.ending,
                guidance=0.0 if how.guidance is None else how.guidance[0],
            ),
            normaliser=self.normaliser,
            **start,
        )

    def _taken(self, how: Sampling) -> Sampling:
        """With the number of transitions that 1 stands for."""
        return replace(how, num_steps=self.model.config.num_steps[0]) if how.num_steps == 1 else how
