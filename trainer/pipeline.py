"""The public face: load a run, ask for a class and a seed, look at every level.

pipe = TrajectoryPipeline.from_pretrained("runs/demo")
trajectory = pipe(label="panda", seed=3)
pictures = trajectory.decode()

L levels (coarse → fine), H×W grid of tokens, C channels, h×w pixels
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer import checkpoint as saved
from trainer.config import from_mapping
from trainer.decode import RaeDecoder, decoder_from_spec, find_decoder, load_decoder, to_uint8
from trainer.errors import MismatchError, TrainerError, UsageError
from trainer.model import TrajectoryTransformer
from trainer.normalisation import RAW, Normaliser
from trainer.sample import level_noise, sample_levels

Decoder = Callable[[Tensor], Tensor]
"""[B, H, W, C] on the CPU → RGB [B, 3, h, w] in [0, 1], on any device."""
GuidanceLike = float | tuple[float, float, float] | None
FORMAT_VERSION = "1"
"""Version of a trajectory file; readers refuse another."""
SAMPLED_TOGETHER = 32
"""Images that pass the network at once."""


@dataclass(kw_only=True, slots=True)
class Trajectory:
    """One image from noise to raw tokens: the canvas of every level, and what it was made from."""

    levels: Tensor
    """float32 [L, H, W, C] on the CPU, coarse → fine, in units of the encoder's features."""
    label: int
    class_name: str
    seeds: tuple[int, ...]
    """Noise seed of each level; level l takes slice l of the noise of its seed."""
    num_steps: int = 1
    """Network evaluations per level."""
    guidance: tuple[float, float, float] | None = None
    """Guidance scale omega and the interval of t it acts in."""
    encoder: dict[str, Any] = field(default_factory=dict)
    """Description of the encoder whose features the levels are."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Edits in order, as plain data; empty for a fresh sample."""
    decoder: Decoder | None = None
    """Turns canvases into pixels; not saved."""

    @property
    def can_decode(self) -> bool:
        """Whether `decode` has a decoder."""
        return self.decoder is not None or bool(self.encoder.get("decoder"))

    @torch.no_grad()
    def decode(self) -> np.ndarray:
        """Every level as a picture: uint8 [L, h, w, 3]. Raises TrainerError without a decoder."""
        decoder = self.decoder or decoder_from_spec(self.encoder.get("decoder"))
        if decoder is None:
            raise TrainerError(
                f"features of encoder {self.encoder.get('name', 'unknown')!r} have no decoder of their own; "
                "pass decoder=FOLDER (an RAE decoder) to from_pretrained, or --decoder FOLDER"
            )
        return to_uint8(decoder(self.levels)).cpu().numpy()

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: levels and seeds as tensors, the rest as JSON in its metadata."""
        entries = ("label", "class_name", "num_steps", "guidance", "encoder", "history")
        metadata = {name: json.dumps(getattr(self, name)) for name in entries}
        tensors = {"levels": self.levels.contiguous(), "seeds": torch.tensor(self.seeds)}
        save_file(tensors, path, {"format_version": FORMAT_VERSION, **metadata})

    @classmethod
    def load(cls, path: str | Path) -> Trajectory:
        """Read what `save` wrote. Raises TrainerError if it is not a trajectory, MismatchError for its version."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                levels, seeds = file.get_tensor("levels"), file.get_tensor("seeds")
            found = metadata.pop("format_version")
            entries = {name: json.loads(value) for name, value in metadata.items()}
            if found != FORMAT_VERSION:
                raise MismatchError(f"{path}: trajectory format {found}, this program reads {FORMAT_VERSION}")
            guidance = entries.pop("guidance")
            return cls(
                levels=levels,
                seeds=tuple(seeds.tolist()),
                guidance=None if guidance is None else tuple(guidance),
                **entries,
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise TrainerError(f"{path} is not a trajectory: {error}") from None


class TrajectoryPipeline:
    """A trained model with its class names and decoder: `pipe(label=…, seed=…) -> Trajectory`."""

    def __init__(
        self,
        model: TrajectoryTransformer,
        class_names: Sequence[str] = (),
        encoder: dict[str, Any] | None = None,
        decoder: Decoder | None = None,
        normaliser: Normaliser = RAW,
    ) -> None:
        self.model = model.eval()
        self.class_names = list(class_names)
        self.encoder = encoder or {}
        self.decoder = decoder
        self.normaliser = normaliser

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        ema: float | str | None = "auto",
        decoder: Decoder | str | Path | None = None,
        device: str | torch.device | None = None,
    ) -> TrajectoryPipeline:
        """Load a run folder (its newest checkpoint) or one checkpoint folder.

        ema: half-life in thousands of images, `auto` for the first one trained, None or `raw` for the raw weights.
        decoder: a function, or a folder with the weights and config.json of an RAE decoder; without it the
        encoder's own, where it has one. Raises TrainerError or UsageError when a part is not there.
        """
        path = saved.find_checkpoint(folder)
        state = saved.load_state(path)
        config = from_mapping(state.config, str(path))
        if ema == "auto":
            ema = config.optim.ema_halflives_kimg[0] if config.optim.ema_halflives_kimg else None
        name = None if ema in (None, "raw") else str(ema) if isinstance(ema, str) else f"{ema:g}"
        model = TrajectoryTransformer(config.model)
        try:
            model.load_state_dict(saved.load_weights(path, name))
        except RuntimeError:
            raise MismatchError(
                f"{path}: the weights are not of the network in {saved.STATE}; use another checkpoint"
            ) from None
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        encoder = state.shards["encoder"]
        if isinstance(decoder, str | Path):
            decoder = load_decoder(Path(decoder), encoder).to(device)
        elif decoder is None:
            decoder = find_decoder(saved.run_of(path), encoder)
            decoder = decoder.to(device) if isinstance(decoder, RaeDecoder) else decoder
        normaliser = saved.load_normaliser(path).to(device)
        return cls(model.to(device), state.shards["class_names"], encoder, decoder, normaliser)

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is also a sequence of str
        self, label: int | str, seed: int = 0, num_steps: int = 1, guidance: GuidanceLike = None
    ) -> Trajectory: ...

    @overload
    def __call__(
        self,
        label: Sequence[int | str],
        seed: int | Sequence[int] = 0,
        num_steps: int = 1,
        guidance: GuidanceLike = None,
    ) -> list[Trajectory]: ...

    @overload
    def __call__(
        self, label: int | str, seed: Sequence[int], num_steps: int = 1, guidance: GuidanceLike = None
    ) -> list[Trajectory]: ...

    def __call__(
        self,
        label: int | str | Sequence[int | str],
        seed: int | Sequence[int] = 0,
        num_steps: int = 1,
        guidance: GuidanceLike = None,
    ) -> Trajectory | list[Trajectory]:
        """Sample one Trajectory, or a list of them when label or seed is a list (the other is repeated).

        label: id or class name. An image depends on its own label and seed only. guidance: scale omega, or
        (omega, t_min, t_max), for models trained with it. Raises UsageError for an unknown label.
        """
        labels, seeds = _listed(label), _listed(seed)
        is_single = np.ndim(label) == np.ndim(seed) == 0
        count = max(len(labels), len(seeds))
        labels, seeds = _repeated(labels, count, "labels"), _repeated(seeds, count, "seeds")
        ids = [self.label_id(each) for each in labels]
        scale = (float(guidance), 0.0, 1.0) if isinstance(guidance, int | float) else guidance
        found: list[Trajectory] = []
        for start in range(0, count, SAMPLED_TOGETHER):
            part = slice(start, start + SAMPLED_TOGETHER)
            found += self._sample(ids[part], seeds[part], num_steps, scale)
        return found[0] if is_single else found

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

    def _sample(
        self, ids: list[int], seeds: list[int], num_steps: int, guidance: tuple[float, float, float] | None
    ) -> list[Trajectory]:
        config = self.model.config
        device = next(self.model.parameters()).device
        noise = level_noise(seeds, config.num_levels, config.grid, config.in_channels)
        levels = sample_levels(
            self.model,
            torch.tensor(ids, device=device),
            noise.to(device),
            num_steps,
            guidance=guidance,
            normaliser=self.normaliser,
        )
        return [
            Trajectory(
                levels=canvases,
                label=label,
                class_name=self.class_names[label] if label < len(self.class_names) else str(label),
                seeds=(seed,) * config.num_levels,
                num_steps=num_steps,
                guidance=guidance,
                encoder=self.encoder,
                decoder=self.decoder,
            )
            for canvases, label, seed in zip(levels.cpu(), ids, seeds, strict=True)
        ]


def _listed(value: Any) -> list[Any]:
    return [value] if np.ndim(value) == 0 else list(value)


def _repeated(values: list[Any], count: int, what: str) -> list[Any]:
    if len(values) not in (1, count):
        raise UsageError(f"{len(values)} {what}, expected 1 or {count}")
    return values * count if len(values) == 1 else values
