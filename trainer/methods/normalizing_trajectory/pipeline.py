"""The public face of Normalizing Trajectory Models: load a run, ask for a class and a seed.

    pipe = NormalizingPipeline.from_pretrained("runs/ntm", ending="score")
    trajectory = pipe(label="panda", seed=3)

Where tokens alone are modelled they are a trajectory's one level; else it has those of the hierarchy, to be edited and
resumed as with Trajectory Forcing.

T transitions, L levels, H×W grid, C channels
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hierarchy_builder.errors import UsageError
from trainer.data.normalisation import RAW, Normaliser
from trainer.decode.rae import decoder_for
from trainer.methods.normalizing_trajectory.config import (
    Ending,
    NormalizingMethodConfig,
    NormalizingTrainConfig,
)
from trainer.methods.normalizing_trajectory.network import NormalizingNetwork
from trainer.methods.normalizing_trajectory.sample import (
    HowToSample,
    check_ending,
    num_noises,
    sample_canvases,
)
from trainer.seeds import level_noise
from trainer.training import checkpoint as saved
from trainer.training.config import checked
from trainer.training.weights import average_of, best_device, fill, weights_note
from trainer.trajectories.pipeline import Decoder, TrajectoryPipeline
from trainer.trajectories.trajectory import Trajectory


class NormalizingPipeline(TrajectoryPipeline):
    """A trained network with its class names and decoder: `pipe(label=…, seed=…) -> Trajectory`.

    num_steps of a call is T, one of those trained; 1 stands for the first of them. guidance is w of the guided
    Gaussian, 0 for none, at all times. There is no autoguidance.
    """

    model: NormalizingNetwork  # type: ignore[assignment]

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
        """method: as trained. ending: `denoiser` where the network has one, else `score`, if it is not given.

        Raises UsageError for an ending that the network has not, see `check_ending`.
        """
        super().__init__(model, class_names, encoder, decoder, normaliser, weights)  # type: ignore[arg-type]
        self.method = method or NormalizingMethodConfig()
        self.ending: Ending = ending or ("score" if model.denoiser is None else "denoiser")
        check_ending(model, self.ending)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        ema: float | str | None = "auto",
        decoder: Decoder | str | Path | None = None,
        device: str | torch.device | None = None,
        weak: str | Path | None = None,
        ending: Ending | None = None,
    ) -> NormalizingPipeline:
        """Load a run folder (its newest checkpoint) or one checkpoint folder.

        Arguments and errors as for `TrajectoryPipeline.from_pretrained`; a weak model is refused.
        """
        if weak is not None:
            raise UsageError(
                "a weak model guides Trajectory Forcing; here use guidance, of a model with label dropout"
            )
        path = saved.find_checkpoint(folder)
        state = saved.load_state(path)
        config = checked(NormalizingTrainConfig, state.config, str(path))
        model, name = NormalizingNetwork(config.model), average_of(config, ema)
        fill(model, path, name)
        device, encoder = best_device(device), state.shards["encoder"]
        return cls(
            model.to(device),
            state.shards["class_names"],
            encoder,
            decoder_for(path, encoder, decoder, device),
            saved.load_normaliser(path).to(device),
            weights_note(path, name),
            config.method,
            ending,
        )

    @property
    def drawn_levels(self) -> int:
        """Levels of the trajectories it draws: one where the network is of tokens alone."""
        config = self.model.config
        return 1 if config.trajectory == "tokens" else config.num_levels

    def _sample(self, ids: list[int], seeds: list[int], how: dict[str, Any]) -> list[Trajectory]:
        asked = self._how(how["num_steps"], how["guidance"], how["weak_scale"])
        config, device = self.model.config, next(self.model.parameters()).device
        noise = level_noise(seeds, num_noises(self.model, asked.num_steps), config.grid, config.in_channels)
        label = torch.tensor(ids, device=device)
        levels = sample_canvases(
            self.model, self.method, label, noise.to(device), asked, normaliser=self.normaliser
        ).cpu()
        how = {**how, "num_steps": asked.num_steps}
        return [self._trajectory(*each, **how) for each in zip(levels, ids, seeds, strict=True)]

    def _after(self, trajectory: Trajectory, level: int, seeds: tuple[int, ...]) -> Tensor:
        """Canvases after `level`, float32 [L−1−level, H, W, C], drawn as the trajectory's own were."""
        config, device = self.model.config, next(self.model.parameters()).device
        if level + 1 == trajectory.num_levels:
            return trajectory.levels[:0]
        how = self._how(trajectory.num_steps, trajectory.guidance, trajectory.weak_scale)
        count = num_noises(self.model, how.num_steps)
        noise = level_noise(seeds, count, config.grid, config.in_channels)
        own = noise[torch.arange(count), torch.arange(count) // (count // config.num_levels)]
        return sample_canvases(
            self.model,
            self.method,
            torch.tensor([trajectory.label], device=device),
            own[:, None].to(device),
            how,
            start_level=level + 1,
            previous=trajectory.levels[level : level + 1].to(device),
            normaliser=self.normaliser,
        )[0].cpu()

    def _how(
        self, num_steps: int, guidance: tuple[float, float, float] | None, weak_scale: float
    ) -> HowToSample:
        if weak_scale:
            raise UsageError(
                "autoguidance is of Trajectory Forcing; here use guidance, of a model with label dropout"
            )
        steps = self.model.config.num_steps[0] if num_steps == 1 else num_steps
        return HowToSample(
            num_steps=steps, ending=self.ending, guidance=0.0 if guidance is None else guidance[0]
        )
