"""Draws the samples of runs of Latent Forcing, and the pixels of trajectories of other methods.

    pipe = LatentPipeline.from_pretrained("runs/latent")
    trajectory = pipe(label="panda", seed=3)
    pictures = trajectory.decode()

The levels of a trajectory are the K canvases that are latents; its pictures come from the same network, which is its
own decoder. Where the network was trained with `pixel_stage`, the levels are all of the hierarchy, object → parts →
tokens → pixels, and level ℓ is drawn given all before it.

    B images, K canvases, H×W grid, C channels, h×w pixels
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hierarchy_builder.errors import MismatchError, UsageError
from trainer.methods.latent_forcing.clocks import sampling_grid
from trainer.methods.latent_forcing.config import CASCADED, LatentMethodConfig
from trainer.methods.latent_forcing.network import PixelLatentTransformer
from trainer.methods.latent_forcing.pixel_stage import (
    STEPS_PER_STAGE,
    Drawn,
    PixelStage,
    apart,
    pixel_noise,
    side_by_side,
)
from trainer.methods.latent_forcing.sample import ClockGuidance, sample_pixels
from trainer.trajectories.pipeline import Decoder, TrajectoryPipeline
from trainer.trajectories.trajectory import Sampling, Trajectory

PIXELS_LAST = (*CASCADED, "independent")
"""Schedules whose networks draw pictures of canvases they are given: they saw pixels as noise beside clean ones."""
SHIFTED = ("shifted", "independent")
WEAK_LAST = 0.001
"""Time that all latents have to come to before a weak network takes part that guides the pixels alone."""


class LatentPipeline(TrajectoryPipeline):
    """A trained network of Latent Forcing with its class names: `pipe(label=…, seed=…) -> Trajectory`.

    num_steps of a call counts steps of Heun's method per stage; 1 stands for STEPS_PER_STAGE. guidance (scale, low,
    high) acts on both clocks between those times. weak_scale s moves away from the weak network, which sees no class:
    guidance of scale 1 + s; with both, guidance acts on the latents and the weak network on the pixels. A network
    trained without classes (label dropout 1) draws the null class whatever is asked. A decoder that is given takes the
    place of the pixel stage, for comparison.
    """

    network_type = PixelLatentTransformer
    method_type = LatentMethodConfig
    default_steps = STEPS_PER_STAGE
    draws_pixels = True
    weak_fields = ("grid", "patch_px", "in_channels", "num_canvases", "num_classes")
    model: PixelLatentTransformer

    def _take_options(self, shift: float | None = None) -> None:
        """shift: how far ahead latents are, see `clocks.sampling_grid`, in place of the one in `method`.

        A schedule other than a cascade draws latents and pixels together. Raises UsageError for a shift where the
        schedule has none.
        """
        if shift is None:
            return
        if self.method.schedule not in SHIFTED:
            raise UsageError(
                f"--shift {shift:g}: schedule {self.method.schedule} has none, expected one of {', '.join(SHIFTED)}"
            )
        if not 0 < shift < math.inf:
            raise UsageError(
                f"--shift {shift:g}, expected above 0, and finite: 1 draws latents and pixels together"
            )
        self.method = dataclasses.replace(self.method, shift=shift)

    @classmethod
    def _check_weak_method(cls, path: Path, method: LatentMethodConfig) -> None:
        if not method.label_dropout:
            raise UsageError(
                f"weak model {path}: it guides without class, but was trained without label dropout; take another, or "
                "train one with method.label_dropout=0.1"
            )

    @classmethod
    def no_gradient(cls, config: Any) -> str:
        """Why samples have no gradient that could be kept."""
        return (
            "one of its samples takes dozens of evaluations of the network, one after the other, and a gradient "
            "through all of them would have to keep their activations"
        )

    def pixel_stage(self, num_steps: int = STEPS_PER_STAGE) -> PixelStage:
        """The decoder that this network is, for trajectories of any method on the same features."""
        return PixelStage(
            network=self.model,
            normaliser=self.normaliser,
            num_steps=num_steps,
            time_floor=self.method.time_floor,
            knows_classes=self._knows_classes,
        )

    def decoder_of_canvases(self, encoder: dict[str, Any]) -> PixelStage:
        """The pixel stage, for canvases of `encoder`.

        Raises MismatchError when the network was trained on features of another encoder, or never saw noisy pixels
        together with clean canvases.
        """
        folder = self.weights.get("folder", "of this pipeline")
        if self.method.schedule not in PIXELS_LAST:
            raise MismatchError(
                f"pixel stage {folder}: trained with schedule {self.method.schedule}, expected "
                f"{', '.join(CASCADED)} or independent, which draw pixels after the canvases"
            )
        for name in ("name", "weights_hash", "grid", "width"):
            here, wanted = self.encoder.get(name), encoder.get(name)
            if here != wanted:
                raise MismatchError(
                    f"pixel stage {folder}: its encoder has {name} {here!r}, that of the canvases {wanted!r}; train "
                    "one on shards of the same encoder"
                )
        return self.pixel_stage()

    def _sample(self, ids: list[int], seeds: list[int], how: Sampling) -> list[Trajectory]:
        c = self.model.config
        latents = side_by_side(self._noise(seeds, how).transpose(0, 1)).to(self.device)
        pixels = torch.stack([pixel_noise(seed, c.image_px) for seed in seeds])
        pixels = how.temperature * pixels.to(self.device)
        # A cascade ends with its latents here: its pixel stage draws pictures when they are asked for.
        is_cascade = self.method.schedule in CASCADED
        has_pictures = not is_cascade and self.method.schedule != "latents-only"
        end = c.num_canvases * how.num_steps + 1 if is_cascade else None
        pixels, latents = self._flow(ids, pixels, latents, slice(end), how)
        pictures = (pixels.permute(0, 3, 1, 2).cpu() + 1) / 2
        levels = self.normaliser.undo(apart(latents, c.num_canvases)).cpu()
        found = []
        for row, (label, seed) in enumerate(zip(ids, seeds, strict=True)):
            trajectory = self._trajectory(levels[row], label, seed, how)
            if self.decoder is None and has_pictures:
                drawn = Drawn(trajectory.levels, pictures[row : row + 1], self._stage(how))
                trajectory = dataclasses.replace(trajectory, decoder=drawn)
            found.append(trajectory)
        return found

    def _after(
        self, trajectory: Trajectory, level: int, seeds: tuple[int, ...], noise: Tensor, how: Sampling
    ) -> Tensor:
        c = self.model.config
        given = (level + 1) * c.in_channels
        levels = side_by_side(self.normaliser.apply(trajectory.levels.to(self.device))[None])
        latents = torch.cat([levels[..., :given], side_by_side(noise.transpose(0, 1))[..., given:]], -1)
        part = slice((level + 1) * how.num_steps, c.num_canvases * how.num_steps + 1)
        pixels = how.temperature * pixel_noise(seeds[-1], c.image_px)[None].to(self.device)
        _, latents = self._flow([trajectory.label], pixels, latents, part, how)
        return self.normaliser.undo(apart(latents, c.num_canvases))[:, level + 1 :]

    def _decoder_of(self, how: Sampling) -> Decoder | None:
        """This network's pixel stage, where it has one and no decoder was given."""
        return self.decoder or self._stage(self._settled(how))

    def _stage(self, how: Sampling) -> PixelStage | None:
        if self.method.schedule not in PIXELS_LAST:
            return None
        return dataclasses.replace(
            self.pixel_stage(how.num_steps), guidance=self._guidance(how)[0], weak=self._weak_for(how)
        )

    @property
    def _knows_classes(self) -> bool:
        return self.method.label_dropout < 1

    def _guidance(self, how: Sampling) -> tuple[ClockGuidance, ClockGuidance]:
        """(of the pixels, of the latents). Raises UsageError where a network without null class would guide itself."""
        scale, low, high = how.guidance or (1.0, 0.0, 1.0)
        if scale != 1 and not self.method.label_dropout:
            raise UsageError(
                "guidance was asked of a model trained without label dropout: leave it out, or train with "
                "method.label_dropout=0.1"
            )
        own, weak = ClockGuidance(scale=scale, low=low, high=high), ClockGuidance(scale=1 + how.weak_scale)
        if not how.weak_scale:
            return own, own
        return weak, own if how.guidance else weak

    def _flow(
        self, ids: list[int], pixels: Tensor, latents: Tensor, part: slice, how: Sampling
    ) -> tuple[Tensor, Tensor]:
        """Pixels and latents after a part of the sampling grid."""
        K = self.model.config.num_canvases
        steps, method = how.num_steps * (K + 1), self.method
        t_pixels, t_latents = sampling_grid(
            method.schedule, steps, num_canvases=K, shift=method.shift, offset=method.offset
        )
        for_pixels, for_latents = self._guidance(how)
        labels = ids if self._knows_classes else [self.model.config.num_classes] * len(ids)
        return sample_pixels(
            self.model,
            torch.tensor(labels, device=self.device),
            pixels,
            latents,
            (t_pixels[part], t_latents[part]),
            pixel_guidance=for_pixels,
            latent_guidance=for_latents,
            weak_network=self._weak_for(how),
            weak_from=WEAK_LAST if how.guidance else 1.0,
            clean_ends=True,
            time_floor=method.time_floor,
        )
