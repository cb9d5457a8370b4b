"""The public face of Latent Forcing, and the pixel stage it lends to Trajectory Forcing.

    pipe = LatentPipeline.from_pretrained("runs/latent")
    trajectory = pipe(label="panda", seed=3)
    pictures = trajectory.decode()

A trajectory's levels are the K canvases that are latents; its pictures come from the same network, which is its own
decoder. Of a network trained with `pixel_stage` the levels are all of the hierarchy, object → parts → tokens →
pixels, and level ℓ is drawn given all before it.

    B images, K canvases, H×W grid, C channels, h×w pixels
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hierarchy_builder.canvases import level_canvases
from hierarchy_builder.errors import MismatchError, UsageError
from trainer.data.normalisation import RAW, Normaliser
from trainer.methods.latent_forcing.clocks import sampling_grid
from trainer.methods.latent_forcing.config import LatentMethodConfig, LatentTrainConfig
from trainer.methods.latent_forcing.network import PixelLatentTransformer
from trainer.methods.latent_forcing.pixel_stage import (
    STEPS_PER_STAGE,
    Drawn,
    PixelStage,
    apart,
    latent_noise,
    pixel_noise,
    side_by_side,
)
from trainer.methods.latent_forcing.sample import ClockGuidance, sample_pixels
from trainer.seeds import level_noise
from trainer.training import checkpoint as saved
from trainer.training.config import checked
from trainer.training.weights import average_of, best_device, check_weak, fill, weights_note
from trainer.trajectories.pipeline import Decoder, TrajectoryPipeline
from trainer.trajectories.trajectory import Trajectory

CASCADED = ("cascaded", "cascaded-noised")
PIXELS_LAST = (*CASCADED, "independent")
"""Schedules whose networks draw pictures of canvases they are given: they saw pixels as noise beside clean ones."""
SHIFTED = ("shifted", "independent")
WEAK_LAST = 0.001
"""Time that all latents have to come to before a weak network takes part that guides the pixels alone."""


def latents_of(features: Tensor, regions: Tensor | None, normaliser: Normaliser) -> Tensor:
    """Raw features float32 [B, H, W, C] as the network sees them, [B, H, W, K·C].

    regions: integer [B, L−1, H, W], for every level's canvas (K = L); None for the features alone (K = 1).
    """
    tokens = normaliser.apply(features)
    return tokens if regions is None else side_by_side(level_canvases(tokens, regions))


class LatentPipeline(TrajectoryPipeline):
    """A trained network of Latent Forcing with its class names: `pipe(label=…, seed=…) -> Trajectory`.

    num_steps of a call counts steps of Heun's method per stage; 1 stands for STEPS_PER_STAGE. guidance (scale, low,
    high) acts on both clocks between those times. weak_scale s moves away from the weak network, which sees no class:
    guidance of scale 1 + s; with both, guidance is of the latents and the weak network of the pixels. A network trained
    without classes (label dropout 1) draws the null class whatever is asked.
    """

    model: PixelLatentTransformer  # type: ignore[assignment]
    weak: PixelLatentTransformer | None  # type: ignore[assignment]

    def __init__(
        self,
        model: PixelLatentTransformer,
        class_names: Sequence[str] = (),
        encoder: dict[str, Any] | None = None,
        decoder: Decoder | None = None,
        normaliser: Normaliser = RAW,
        weights: dict[str, str] | None = None,
        weak: PixelLatentTransformer | None = None,
        method: LatentMethodConfig | None = None,
    ) -> None:
        """decoder: takes the place of the pixel stage, for comparison. method: as trained; the path of sampling.

        weights, weak: as for `TrajectoryPipeline`. A schedule other than a cascade draws latents and pixels together.
        """
        super().__init__(model, class_names, encoder, decoder, normaliser, weights, weak)  # type: ignore[arg-type]
        self.method = method or LatentMethodConfig()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        ema: float | str | None = "auto",
        decoder: Decoder | str | Path | None = None,
        device: str | torch.device | None = None,
        weak: str | Path | None = None,
        shift: float | None = None,
    ) -> LatentPipeline:
        """Load a run folder of Latent Forcing (its newest checkpoint) or one checkpoint folder.

        Arguments and errors as for `TrajectoryPipeline.from_pretrained`; decoder may be a function only. shift: how
        far ahead latents are, see `clocks.sampling_grid`, in place of the one the run was trained with.
        Raises UsageError for a shift where the schedule has none.
        """
        if isinstance(decoder, str | Path):
            raise UsageError(f"decoder {decoder}: a run of Latent Forcing draws its own pixels; leave it out")
        path = saved.find_checkpoint(folder)
        state = saved.load_state(path)
        config = checked(LatentTrainConfig, state.config, str(path))
        method = config.method if shift is None else _shifted(config.method, shift)
        model, name = _load_network(path, config, ema)
        weaker = None if weak is None else _load_weak(saved.find_checkpoint(weak), path, model, ema)
        device = best_device(device)
        return cls(
            model.to(device),
            state.shards["class_names"],
            state.shards["encoder"],
            decoder,
            saved.load_normaliser(path).to(device),
            weights_note(path, name),
            weaker if weaker is None else weaker.to(device),
            method,
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

    def _sample(self, ids: list[int], seeds: list[int], how: dict[str, Any]) -> list[Trajectory]:
        c = self.model.config
        steps = _steps(how["num_steps"])
        how = {**how, "num_steps": steps}
        latents = latent_noise(seeds, c, self._device)
        pixels = torch.stack([pixel_noise(seed, c.image_px) for seed in seeds]).to(self._device)
        # The pixel stage of a cascade comes on demand.
        is_cascade = self.method.schedule in CASCADED
        has_pictures = not is_cascade and self.method.schedule != "latents-only"
        end = c.num_canvases * steps + 1 if is_cascade else None
        pixels, latents = self._flow(ids, pixels, latents, slice(end), how)
        pictures = (pixels.permute(0, 3, 1, 2).cpu() + 1) / 2
        levels = self.normaliser.undo(apart(latents, c.num_canvases)).cpu()
        found = []
        for row, (label, seed) in enumerate(zip(ids, seeds, strict=True)):
            trajectory = self._trajectory(levels[row], label, seed, **how)
            if self.decoder is None and has_pictures:
                drawn = Drawn(trajectory.levels, pictures[row : row + 1], self._stage(how))
                trajectory = dataclasses.replace(trajectory, decoder=drawn)
            found.append(trajectory)
        return found

    def _after(self, trajectory: Trajectory, level: int, seeds: tuple[int, ...]) -> Tensor:
        """Canvases after `level`, float32 [K−1−level, H, W, C], given all up to it."""
        c = self.model.config
        if level + 1 == c.num_canvases:
            return trajectory.levels[:0]
        how = _drawn_how(trajectory)
        steps, given = _steps(trajectory.num_steps), (level + 1) * c.in_channels
        levels = self.normaliser.apply(trajectory.levels.to(self._device))
        own = level_noise(seeds, c.num_canvases, c.grid, c.in_channels)
        noise = own[torch.arange(c.num_canvases), torch.arange(c.num_canvases)].to(self._device)
        latents = torch.cat(
            [side_by_side(levels[None])[..., :given], side_by_side(noise[None])[..., given:]], -1
        )
        part = slice((level + 1) * steps, c.num_canvases * steps + 1)
        pixels = pixel_noise(seeds[-1], c.image_px)[None].to(self._device)
        _, latents = self._flow([trajectory.label], pixels, latents, part, how)
        return self.normaliser.undo(apart(latents, c.num_canvases))[0, level + 1 :].cpu()

    def adopt(self, trajectory: Trajectory) -> Trajectory:
        """As `TrajectoryPipeline.adopt`; its pictures are drawn by this network's pixel stage, where it has one.

        Raises UsageError for a trajectory of autoguidance where there is no weak network.
        """
        return self._decoded(super().adopt(trajectory))

    def _trajectory(self, levels: Tensor, label: int, seed: int, **fields: Any) -> Trajectory:
        return self._decoded(super()._trajectory(levels, label, seed, **fields))

    def _decoded(self, trajectory: Trajectory) -> Trajectory:
        """With the pixel stage where no decoder was given."""
        decoder = self.decoder or self._stage(_drawn_how(trajectory)) or trajectory.decoder
        return dataclasses.replace(trajectory, decoder=decoder)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _stage(self, how: dict[str, Any]) -> PixelStage | None:
        if self.method.schedule not in PIXELS_LAST:
            return None
        stage = self.pixel_stage(_steps(how["num_steps"]))
        return dataclasses.replace(
            stage, guidance=self._guidance(how)[0], weak=self._weak_for(how["weak_scale"])
        )

    @property
    def _knows_classes(self) -> bool:
        return self.method.label_dropout < 1

    def _guidance(self, how: dict[str, Any]) -> tuple[ClockGuidance, ClockGuidance]:
        """(of the pixels, of the latents). Raises UsageError where a network without null class would guide itself."""
        scale, low, high = how["guidance"] or (1.0, 0.0, 1.0)
        if scale != 1 and not self.method.label_dropout:
            raise UsageError(
                "guidance was asked of a model trained without label dropout: leave it out, or train with "
                "method.label_dropout=0.1"
            )
        own, weak = ClockGuidance(scale=scale, low=low, high=high), ClockGuidance(scale=1 + how["weak_scale"])
        if not how["weak_scale"]:
            return own, own
        return weak, own if how["guidance"] else weak

    def _flow(
        self, ids: list[int], pixels: Tensor, latents: Tensor, part: slice, how: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Pixels and latents after a part of the sampling grid."""
        K = self.model.config.num_canvases
        steps = _steps(how["num_steps"]) * (K + 1)
        method = self.method
        t_pixels, t_latents = sampling_grid(
            method.schedule, steps, num_canvases=K, shift=method.shift, offset=method.offset
        )
        for_pixels, for_latents = self._guidance(how)
        labels = ids if self._knows_classes else [self.model.config.num_classes] * len(ids)
        return sample_pixels(
            self.model,
            torch.tensor(labels, device=self._device),
            pixels,
            latents,
            (t_pixels[part], t_latents[part]),
            pixel_guidance=for_pixels,
            latent_guidance=for_latents,
            weak_network=self._weak_for(how["weak_scale"]),
            weak_from=WEAK_LAST if how["guidance"] else 1.0,
            clean_ends=True,
            time_floor=method.time_floor,
        )


def load_pixel_stage(
    folder: str | Path, encoder: dict[str, Any], ema: float | str | None = "auto"
) -> PixelStage:
    """The pixel stage of a run of Latent Forcing, for canvases of `encoder`.

    Raises MismatchError when the run was trained on features of another encoder, or never saw pixels as noise beside
    clean canvases.
    """
    pipe = LatentPipeline.from_pretrained(folder, ema)
    if pipe.method.schedule not in PIXELS_LAST:
        raise MismatchError(
            f"pixel stage {folder}: trained with schedule {pipe.method.schedule}, expected {', '.join(CASCADED)} or "
            "independent, which draw pixels after the canvases"
        )
    for name in ("name", "weights_hash", "grid", "width"):
        here, wanted = pipe.encoder.get(name), encoder.get(name)
        if here != wanted:
            raise MismatchError(
                f"pixel stage {folder}: its encoder has {name} {here!r}, that of the canvases {wanted!r}; train one on "
                "shards of the same encoder"
            )
    return pipe.pixel_stage()


def _shifted(method: LatentMethodConfig, shift: float) -> LatentMethodConfig:
    if method.schedule not in SHIFTED:
        raise UsageError(
            f"--shift {shift:g}: schedule {method.schedule} has none, expected one of {', '.join(SHIFTED)}"
        )
    if not 0 < shift < math.inf:
        raise UsageError(
            f"--shift {shift:g}, expected above 0, and finite: 1 draws latents and pixels together"
        )
    return dataclasses.replace(method, shift=shift)


def _load_network(
    path: Path, config: LatentTrainConfig, ema: float | str | None
) -> tuple[PixelLatentTransformer, str | None]:
    """The network of a checkpoint with the weights asked for, and the name of their average."""
    model, name = PixelLatentTransformer(config.model), average_of(config, ema)
    fill(model, path, name)
    return model, name


def _load_weak(
    path: Path, strong: Path, model: PixelLatentTransformer, ema: float | str | None
) -> PixelLatentTransformer:
    """A weak network for autoguidance; see `check_weak`. Raises UsageError for one that always saw a class."""
    config = checked(LatentTrainConfig, saved.load_state(path).config, str(path))
    fields = ("grid", "patch_px", "in_channels", "num_canvases", "num_classes")
    check_weak(path, strong, config.model, model.config, fields)
    if not config.method.label_dropout:
        raise UsageError(
            f"weak model {path}: it guides without class, but was trained without label dropout; take another, or "
            "train one with method.label_dropout=0.1"
        )
    return _load_network(path, config, ema)[0]


def _drawn_how(trajectory: Trajectory) -> dict[str, Any]:
    return {name: getattr(trajectory, name) for name in ("num_steps", "guidance", "weak_scale")}


def _steps(num_steps: int) -> int:
    return STEPS_PER_STAGE if num_steps == 1 else num_steps
