"""The public face: load a run, ask for a class and a seed, look at every level.

pipe = TrajectoryPipeline.from_pretrained("runs/demo")
trajectory = pipe(label="panda", seed=3)
pictures = trajectory.decode()

L levels (coarse → fine), H×W grid of tokens, C channels, h×w pixels
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from hierarchy_builder.errors import MismatchError, UsageError
from hierarchy_builder.hierarchy.recipe import build_hierarchy
from trainer.data.normalisation import RAW, Normaliser
from trainer.decode.rae import decoder_for
from trainer.methods.trajectory_forcing.config import from_mapping
from trainer.methods.trajectory_forcing.network import TrajectoryTransformer
from trainer.methods.trajectory_forcing.sample import sample_levels
from trainer.seeds import check_seed, level_noise
from trainer.training import checkpoint as saved
from trainer.training.weights import average_of, best_device, check_weak, fill, weights_note
from trainer.trajectories.trajectory import Decoder, Trajectory

__all__ = ["Decoder", "Trajectory", "TrajectoryPipeline"]

GuidanceLike = float | tuple[float, float, float] | None
SAMPLED_TOGETHER = 32
"""Images that pass the network at once."""


class TrajectoryPipeline:
    """A trained model with its class names and decoder: `pipe(label=…, seed=…) -> Trajectory`."""

    def __init__(
        self,
        model: TrajectoryTransformer,
        class_names: Sequence[str] = (),
        encoder: dict[str, Any] | None = None,
        decoder: Decoder | None = None,
        normaliser: Normaliser = RAW,
        weights: dict[str, str] | None = None,
        weak: TrajectoryTransformer | None = None,
    ) -> None:
        """weights: checkpoint folder and average the model was loaded from, noted in its trajectories.

        weak: a worse model of the same levels, such as an early checkpoint, that autoguidance moves away from.
        """
        self.model = model.eval()
        self.class_names = list(class_names)
        self.encoder = encoder or {}
        self.decoder = decoder
        self.normaliser = normaliser
        self.weights = weights or {}
        self.weak = weak if weak is None else weak.eval()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        ema: float | str | None = "auto",
        decoder: Decoder | str | Path | None = None,
        device: str | torch.device | None = None,
        weak: str | Path | None = None,
    ) -> TrajectoryPipeline:
        """Load a run folder (its newest checkpoint) or one checkpoint folder.

        ema: half-life in thousands of images, `auto` for the first one trained, None or `raw` for the raw weights.
        decoder: a function, or a folder with the weights and config.json of an RAE decoder; without it the
        encoder's own, where it has one. weak: a run or checkpoint folder for autoguidance, see `__call__`.
        Raises TrainerError or UsageError when a part is not there, MismatchError for weights that do not fit.
        """
        path = saved.find_checkpoint(folder)
        state = saved.load_state(path)
        model, name = _load_model(path, state, ema)
        weaker = None if weak is None else _load_weak(saved.find_checkpoint(weak), path, model, ema)
        device, encoder = best_device(device), state.shards["encoder"]
        return cls(
            model.to(device),
            state.shards["class_names"],
            encoder,
            decoder_for(path, encoder, decoder, device),
            saved.load_normaliser(path).to(device),
            weights_note(path, name),
            weaker if weaker is None else weaker.to(device),
        )

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is also a sequence of str
        self,
        label: int | str,
        seed: int = 0,
        num_steps: int = 1,
        guidance: GuidanceLike = None,
        weak_scale: float = 0.0,
    ) -> Trajectory: ...

    @overload
    def __call__(
        self,
        label: Sequence[int | str],
        seed: int | Sequence[int] = 0,
        num_steps: int = 1,
        guidance: GuidanceLike = None,
        weak_scale: float = 0.0,
    ) -> list[Trajectory]: ...

    @overload
    def __call__(
        self,
        label: int | str,
        seed: Sequence[int],
        num_steps: int = 1,
        guidance: GuidanceLike = None,
        weak_scale: float = 0.0,
    ) -> list[Trajectory]: ...

    def __call__(
        self,
        label: int | str | Sequence[int | str],
        seed: int | Sequence[int] = 0,
        num_steps: int = 1,
        guidance: GuidanceLike = None,
        weak_scale: float = 0.0,
    ) -> Trajectory | list[Trajectory]:
        """Sample one Trajectory, or a list of them when label or seed is a list (the other is repeated).

        label: id or class name. An image depends on its own label and seed only. guidance: scale omega, or
        (omega, t_min, t_max), for models trained with it. weak_scale: strength of autoguidance, for pipelines with a
        weak model. Raises UsageError for an unknown label, or guidance that the pipeline has no model for.
        """
        is_single = np.ndim(label) == np.ndim(seed) == 0
        found = list(self.stream(label, seed, num_steps, guidance, weak_scale))
        return found[0] if is_single else found

    def stream(
        self,
        label: int | str | Sequence[int | str],
        seed: int | Sequence[int] = 0,
        num_steps: int = 1,
        guidance: GuidanceLike = None,
        weak_scale: float = 0.0,
    ) -> Iterator[Trajectory]:
        """The same trajectories one after the other, with only a few of them in memory at a time."""
        labels, seeds = _listed(label), _listed(seed)
        count = max(len(labels), len(seeds))
        labels, seeds = _repeated(labels, count, "labels"), _repeated(seeds, count, "seeds")
        ids = [self.label_id(each) for each in labels]
        scale = (float(guidance), 0.0, 1.0) if isinstance(guidance, int | float) else guidance
        if not np.isfinite([weak_scale, *(scale or ())]).all():
            raise UsageError(f"guidance is {scale}, weak_scale {weak_scale}: expected finite numbers")
        how = {"num_steps": num_steps, "guidance": scale, "weak_scale": weak_scale}
        for start in range(0, count, SAMPLED_TOGETHER):
            part = slice(start, start + SAMPLED_TOGETHER)
            yield from self._sample(ids[part], seeds[part], how)

    def label_id(self, label: int | str) -> int:
        """The id of a class given by id or name. Raises UsageError naming the nearest class."""
        last = self.model.config.num_classes - 1
        if isinstance(label, str) and label in self.class_names:
            return self.class_names.index(label)
        try:
            number = int(label)
        except ValueError:
            close = difflib.get_close_matches(str(label), self.class_names, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]!r}?" if close else f"expected a class name or 0 to {last}"
            raise UsageError(f"unknown class {label!r}, {hint}") from None
        if not 0 <= number <= last:
            raise UsageError(f"label {number}, expected 0 to {last}")
        return number

    def label_ids(self, text: str) -> list[int]:
        """Ids of a list of classes separated by commas, which names may hold too; see `label_id` for errors."""
        parts, ids = text.split(","), []
        while parts:
            tried = (",".join(parts[:count]).strip() for count in range(len(parts), 0, -1))
            known = next((name for name in tried if name in self.class_names), None)
            ids.append(self.label_id(parts[0].strip() if known is None else known))
            del parts[: 1 if known is None else known.count(",") + 1]
        return ids

    @property
    def drawn_levels(self) -> int:
        """Levels of the trajectories it draws."""
        return self.model.config.num_levels

    def from_features(
        self,
        features: np.ndarray | Tensor,
        regions: np.ndarray | Tensor | None = None,
        *,
        label: int | str,
        seed: int = 0,
        origin: dict[str, Any] | None = None,
    ) -> Trajectory:
        """A trajectory that starts from a photograph: its hierarchy in place of sampled levels, to edit and resume.

        features: float [H, W, C] of the model's encoder. regions: integer [L−1, H, W]; None finds them by the recipe
        of the paper; a model that draws tokens alone takes any. label, seed: class and noise that levels drawn later
        get. origin: where it comes from, plain data.
        Raises MismatchError if features or regions do not fit the model, UsageError for an unknown label or seed.
        """
        check_seed(seed)
        config, label_id = self.model.config, self.label_id(label)
        tokens = torch.as_tensor(features).float()
        if tuple(tokens.shape) != (expected := (*config.grid, config.in_channels)):
            raise MismatchError(
                f"features have shape {tuple(tokens.shape)}, the model was trained on {expected}: "
                f"encode the photograph with {self.encoder.get('name', 'its encoder')!r}"
            )
        if self.drawn_levels == 1:
            ids = torch.empty(0, *config.grid, dtype=torch.uint8)
        else:
            ids = torch.as_tensor(build_hierarchy(tokens[None]).regions[0] if regions is None else regions)
        if tuple(ids.shape) != (wanted := (self.drawn_levels - 1, *config.grid)):
            raise MismatchError(
                f"regions have shape {tuple(ids.shape)}, the model has levels {wanted}: "
                "pass regions of the recipe it was trained with"
            )
        levels = self.normaliser.to("cpu").teacher_canvases(tokens[None], ids[None])[0]
        return self._trajectory(levels, label_id, seed, origin=origin or {"source": "features"})

    def adopt(self, trajectory: Trajectory) -> Trajectory:
        """A trajectory from a file, with this pipeline's model to resume with and its decoder.

        Raises MismatchError if its levels are not the model's, or other weights drew them.
        """
        config = self.model.config
        expected = (self.drawn_levels, *config.grid, config.in_channels)
        if tuple(trajectory.levels.shape) != expected:
            raise MismatchError(
                f"levels have shape {tuple(trajectory.levels.shape)}, the model draws {expected}"
            )
        drawn = {name: Path(value).name for name, value in trajectory.model.items()}
        here = {name: Path(value).name for name, value in self.weights.items()}
        if drawn and here and drawn != here:
            raise MismatchError(
                f"the trajectory was drawn by {_weights_text(drawn)}, this is {_weights_text(here)}: load those, or "
                "draw it again"
            )
        return replace(trajectory, decoder=self.decoder or trajectory.decoder, sampler=self._after)

    def _after(self, trajectory: Trajectory, level: int, seeds: tuple[int, ...]) -> Tensor:
        """Canvases after `level`, float32 [L−1−level, H, W, C], drawn as the trajectory's own were."""
        config = self.model.config
        if level + 1 == config.num_levels:
            return trajectory.levels[:0]
        device = next(self.model.parameters()).device
        noise = level_noise(seeds, config.num_levels, config.grid, config.in_channels)
        own = noise[torch.arange(config.num_levels), torch.arange(config.num_levels)]
        return sample_levels(
            self.model,
            torch.tensor([trajectory.label], device=device),
            own[:, None].to(device),
            trajectory.num_steps,
            start_level=level + 1,
            previous=trajectory.levels[level : level + 1].to(device),
            guidance=trajectory.guidance,
            weak_model=self._weak_for(trajectory.weak_scale),
            weak_scale=trajectory.weak_scale,
            normaliser=self.normaliser,
        )[0].cpu()

    def _weak_for(self, weak_scale: float) -> TrajectoryTransformer | None:
        if weak_scale and self.weak is None:
            raise UsageError(
                f"autoguidance of strength {weak_scale:g} needs a weak model: pass weak=FOLDER to from_pretrained, "
                "or --weak FOLDER, for example an early checkpoint"
            )
        return self.weak if weak_scale else None

    def _sample(self, ids: list[int], seeds: list[int], how: dict[str, Any]) -> list[Trajectory]:
        """how: num_steps, guidance and weak_scale."""
        config = self.model.config
        device = next(self.model.parameters()).device
        noise = level_noise(seeds, config.num_levels, config.grid, config.in_channels)
        levels = sample_levels(
            self.model,
            torch.tensor(ids, device=device),
            noise.to(device),
            weak_model=self._weak_for(how["weak_scale"]),
            normaliser=self.normaliser,
            **how,
        )
        return [
            self._trajectory(canvases, label, seed, **how)
            for canvases, label, seed in zip(levels.cpu(), ids, seeds, strict=True)
        ]

    def _trajectory(self, levels: Tensor, label: int, seed: int, **fields: Any) -> Trajectory:
        return Trajectory(
            levels=levels,
            label=label,
            class_name=self.class_names[label] if label < len(self.class_names) else str(label),
            seeds=(seed,) * len(levels),
            encoder=self.encoder,
            model=self.weights,
            decoder=self.decoder,
            sampler=self._after,
            **fields,
        )


def _load_model(
    path: Path, state: saved.RunState, ema: float | str | None
) -> tuple[TrajectoryTransformer, str | None]:
    """The network of a checkpoint with the weights asked for, and the name of their average."""
    config = from_mapping(state.config, str(path))
    model, name = TrajectoryTransformer(config.model), average_of(config, ema)
    fill(model, path, name)
    return model, name


def _load_weak(
    path: Path, strong: Path, model: TrajectoryTransformer, ema: float | str | None
) -> TrajectoryTransformer:
    """A weak model for autoguidance; see `check_weak`."""
    weak, _ = _load_model(path, saved.load_state(path), ema)
    fields = ("grid", "in_channels", "num_levels", "num_classes", "guidance")
    check_weak(path, strong, weak.config, model.config, fields)
    return weak


def _listed(value: Any) -> list[Any]:
    return [value] if np.ndim(value) == 0 else list(value)


def _repeated(values: list[Any], count: int, what: str) -> list[Any]:
    if len(values) not in (1, count):
        raise UsageError(f"{len(values)} {what}, expected 1 or {count}")
    return values * count if len(values) == 1 else values


def _weights_text(weights: dict[str, str]) -> str:
    return f"{weights.get('folder', 'other weights')} (ema {weights.get('ema', 'unknown')})"
