"""Loads a run of any method, and draws a trajectory, every level of it, for a class and a seed.

    pipe = TrajectoryPipeline.from_pretrained("runs/demo")
    trajectory = pipe(label="panda", seed=3)
    pictures = trajectory.decode()

The class here knows no method: the registry names the subclass that draws the samples of a run.

    L levels (coarse → fine), H×W grid of tokens, C channels
"""

from __future__ import annotations

import difflib
import math
import shutil
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypedDict, Unpack, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hierarchy_builder.errors import MismatchError, UsageError
from hierarchy_builder.records import spread_evenly
from hierarchy_builder.terminal import counted
from trainer.data.normalisation import RAW, Normaliser
from trainer.decode.rae import RUN_DECODER, ConditionalDecoder, decoder_for
from trainer.methods import registry
from trainer.networks.gaussian_start import GaussianStart
from trainer.seeds import check_seed, level_noise
from trainer.training import checkpoint as saved
from trainer.training.weights import average_of, best_device, check_weak, fill, weights_note
from trainer.trajectories.hub import PICTURE, card, folder_of, push
from trainer.trajectories.trajectory import Decoder, Sampling, Trajectory
from trainer.trajectories.view import trajectory_grid_png

__all__ = ["Decoder", "Trajectory", "TrajectoryPipeline"]

GuidanceLike = float | tuple[float, float, float] | None
SAMPLED_TOGETHER = 32
"""Images that pass through the network in one batch."""
SHEET_CLASSES = 8
"""Rows of a sheet."""
FEW_CLASSES = 20
"""Up to so many classes a message lists all of them."""


class SamplingArguments(TypedDict, total=False):
    """The arguments of a call that say how to sample; see `TrajectoryPipeline.__call__`."""

    num_steps: int
    guidance: GuidanceLike
    weak_scale: float
    temperature: float


class TrajectoryPipeline(ABC):
    """A trained network with its class names and decoder: `pipe(label=…, seed=…) -> Trajectory`.

    A method's subclass sets `network_type`, `method_type` and `weak_fields`, and defines `_sample` and `_after`; one
    whose samples are their levels and no more derives from `LevelPipeline`, or from `DifferentiablePipeline` if they
    have a gradient.
    """

    network_type: ClassVar[type[nn.Module]]
    """The class of the network, which is made from the `model` of a run's configuration."""
    method_type: ClassVar[Callable[[], Any]] = lambda: None
    """The class of what the method adds to a run's configuration, whose defaults hold where none is given."""
    weak_fields: ClassVar[tuple[str, ...]] = ()
    """Fields of `model` that a weak network for autoguidance shares with the strong one; none: no autoguidance."""
    draws_pixels: ClassVar[bool] = False
    """Whether the network draws pictures itself, without a decoder."""

    def __init__(
        self,
        model: Any,
        class_names: Sequence[str] = (),
        encoder: dict[str, Any] | None = None,
        decoder: Decoder | None = None,
        normaliser: Normaliser = RAW,
        weights: dict[str, str] | None = None,
        weak: Any = None,
        method: Any = None,
        **options: Any,
    ) -> None:
        """model: the network, whose `config` gives its grid, channels, levels and classes.

        weights: checkpoint folder and average that the network was loaded from, noted in its trajectories. weak: a
        worse network of the same levels, such as an early checkpoint, that autoguidance moves away from. method: what
        the method itself adds to the configuration of a run. options: see `_take_options` of the method's pipeline.
        """
        self.model = model.eval()
        self.class_names = list(class_names)
        self.encoder = encoder or {}
        self.decoder = decoder
        self.normaliser = normaliser
        self.weights = weights or {}
        self.weak = weak if weak is None else weak.eval()
        self.method = type(self).method_type() if method is None else method
        self._take_options(**options)
        self.source: Path | None = None
        """The checkpoint folder that the network was loaded from."""
        self.classes: Sequence[int] = range(model.config.num_classes)
        """The classes that had images in training, as far as is known; the network has a row for every label."""

    def _take_options(self) -> None:  # noqa: B027 (most methods have none)
        """Take the options that `registry.Method.options` names; the base class has none."""

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        ema: float | str | None = "auto",
        decoder: Decoder | str | Path | None = None,
        device: str | torch.device | None = None,
        weak: str | Path | None = None,
        *,
        pixel_stage: str | Path | None = None,
        **options: Any,
    ) -> Self:
        """Load a run folder (its newest checkpoint) or one checkpoint folder, of any method, from here or from the hub.

        folder: a local one, `hf://owner/name[@revision][/folder]`, or `owner/name` where there is no folder `owner`.
        ema: half-life in thousands of images, `auto` for the first one trained, None or `raw` for the raw weights.
        decoder: a function, or a folder with the weights and config.json of an RAE decoder; without it the encoder's
        own, where it has one. weak: a run or checkpoint folder for autoguidance, see `__call__`. pixel_stage: a run of
        Latent Forcing that draws the pixels instead of a decoder. options: what the pipelines of one method take,
        see `trainer.methods.registry`: `shift` of Latent Forcing, `ending` of Normalizing Trajectory Models.
        Raises TrainerError or UsageError where a part is missing or the method does not take an option, MismatchError
        for weights that do not fit.
        """
        path, state = saved.read_checkpoint(folder_of(folder))
        method = registry.method_in(state.config, folder)
        kind = method.load("pipeline")
        if not issubclass(kind, cls):
            raise MismatchError(
                f"{folder}: found a run of {method.name}, which {cls.__name__} does not draw; "
                "TrajectoryPipeline.from_pretrained loads a run of any method"
            )
        own = registry.options_for(method, options, folder)
        config = registry.config_of(state.config, str(path))
        device, encoder = best_device(device), state.shards["encoder"]
        if pixel_stage is not None:
            stage = TrajectoryPipeline.from_pretrained(pixel_stage, device=device)
            decoder = stage.decoder_of_canvases(encoder)
        if not kind.draws_pixels:
            decoder = decoder_for(path, encoder, decoder, device)
        elif isinstance(decoder, str | Path):
            raise UsageError(f"decoder {decoder}: a run of {method.title} draws its own pixels; leave it out")
        name, kept = average_of(config, ema), saved.averages_of(path)
        if ema == "auto" and name not in kept and not state.optimizer:  # what save_pretrained left out
            name = next(iter(kept), None)
        pipe: Self = kind(
            kind._load_network(path, config, name).to(device),
            state.shards["class_names"],
            encoder,
            decoder,
            saved.load_normaliser(path).to(device),
            weights_note(path, name),
            method=config.method,
            **own,
        )
        pipe.source = path
        pipe.classes = state.shards.get("classes") or pipe.classes
        if weak is not None:
            pipe.weak = kind._load_weak(saved.find_checkpoint(weak), path, config, ema).to(device).eval()
        return pipe

    @classmethod
    def _load_network(cls, path: Path, config: Any, name: str | None) -> nn.Module:
        """The network of a checkpoint with the weight average of that name, or the raw weights."""
        network = cls.network_type(config.model)
        fill(network, path, name)
        return network

    @classmethod
    def _load_weak(cls, path: Path, strong: Path, config: Any, ema: float | str | None) -> nn.Module:
        """A weak network for autoguidance of the run `strong`, whose configuration is `config`."""
        if not cls.weak_fields:
            raise UsageError(
                f"weak model {path}: {strong} is of {registry.method_of(config).name}, which has no autoguidance; use "
                "guidance, with a model trained with label dropout"
            )
        theirs = registry.config_of(saved.load_state(path).config, str(path))
        if type(theirs) is not type(config):
            raise MismatchError(
                f"{path}: found a run of {registry.method_of(theirs).name}, expected one of "
                f"{registry.method_of(config).name}"
            )
        check_weak(path, strong, theirs.model, config.model, cls.weak_fields)
        cls._check_weak_method(path, theirs.method)
        return cls._load_network(path, theirs, average_of(theirs, ema))

    @classmethod
    def _check_weak_method(cls, path: Path, method: Any) -> None:
        """Raise UsageError for a weak network that was trained otherwise than autoguidance needs; any will do here."""
        return

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is also a sequence of str
        self, label: int | str, seed: int = 0, **how: Unpack[SamplingArguments]
    ) -> Trajectory: ...

    @overload
    def __call__(
        self, label: Sequence[int | str], seed: int | Sequence[int] = 0, **how: Unpack[SamplingArguments]
    ) -> list[Trajectory]: ...

    @overload
    def __call__(
        self, label: int | str, seed: Sequence[int], **how: Unpack[SamplingArguments]
    ) -> list[Trajectory]: ...

    def __call__(
        self,
        label: int | str | Sequence[int | str],
        seed: int | Sequence[int] = 0,
        num_steps: int = 1,
        guidance: GuidanceLike = None,
        weak_scale: float = 0.0,
        temperature: float = 1.0,
    ) -> Trajectory | list[Trajectory]:
        """Sample one Trajectory, or a list of them when label or seed is a list (the other is repeated).

        label: id or class name. An image depends on its own label and seed only. guidance: scale omega, or
        (omega, t_min, t_max), for models trained with it. weak_scale: strength of autoguidance, for pipelines with a
        weak model. temperature: factor of the noise; below 1, samples are cleaner and more alike (as in Glow, Kingma
        and Dhariwal 2018, arXiv 1807.03039). Raises UsageError for an unknown label, or guidance that the pipeline has
        no model for.
        """
        is_single = np.ndim(label) == np.ndim(seed) == 0
        found = list(self.stream(label, seed, num_steps, guidance, weak_scale, temperature))
        return found[0] if is_single else found

    def stream(
        self,
        label: int | str | Sequence[int | str],
        seed: int | Sequence[int] = 0,
        num_steps: int = 1,
        guidance: GuidanceLike = None,
        weak_scale: float = 0.0,
        temperature: float = 1.0,
    ) -> Iterator[Trajectory]:
        """Yield the trajectories that a call would return, with one batch of them in memory at a time."""
        labels, seeds = _listed(label), _listed(seed)
        count = max(len(labels), len(seeds))
        labels, seeds = _repeated(labels, count, "labels"), _repeated(seeds, count, "seeds")
        ids = [self.label_id(each) for each in labels]
        scale = (float(guidance), 0.0, 1.0) if isinstance(guidance, int | float) else guidance
        if not np.isfinite([weak_scale, *(scale or ())]).all():
            raise UsageError(f"guidance is {scale}, weak_scale {weak_scale}: expected finite numbers")
        if not 0 <= temperature < math.inf:
            raise UsageError(f"temperature is {temperature}, expected a finite number of 0 or more")
        asked = Sampling(num_steps=num_steps, guidance=scale, weak_scale=weak_scale, temperature=temperature)
        how = self._settled(asked)
        for start in range(0, count, SAMPLED_TOGETHER):
            part = slice(start, start + SAMPLED_TOGETHER)
            yield from self._sample(ids[part], seeds[part], how)

    def sheet(self) -> Image.Image:
        """One picture of what the network draws: seed 0 of up to SHEET_CLASSES classes with images, all levels.

        It takes nothing from the shared random state, so a training goes on as if it had not been called.
        """
        labels = [self.classes[number] for number in spread_evenly(len(self.classes), SHEET_CLASSES)]
        return trajectory_grid_png([trajectory.view() for trajectory in self.stream(labels)])

    def class_name(self, label: int) -> str:
        """The name of a class, or its number where it has none."""
        return self.class_names[label] if label < len(self.class_names) else str(label)

    def label_id(self, label: int | str) -> int:
        """The id of a class given by id or name. Raises UsageError naming the nearest class."""
        last = self.model.config.num_classes - 1
        if isinstance(label, str) and (known := self._named(label)) is not None:
            return known
        try:
            number = int(label)
        except ValueError:
            close = difflib.get_close_matches(str(label), self.class_names, n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
            expected = f"expected a class name or 0 to {last}"
            if 0 < len(self.class_names) <= FEW_CLASSES:
                expected = f"classes are {', '.join(self.class_names)}"
            raise UsageError(f"unknown class {label!r}: {hint}{expected}") from None
        if not 0 <= number <= last:
            raise UsageError(f"label {number}, expected 0 to {last}")
        return number

    def _named(self, name: str) -> int | None:
        """The id of the class called `name`, whose accents may be composed otherwise; None if there is none."""
        if name in self.class_names:
            return self.class_names.index(name)
        names = [unicodedata.normalize("NFC", each) for each in self.class_names]
        composed = unicodedata.normalize("NFC", name)
        return names.index(composed) if composed in names else None

    def label_ids(self, text: str) -> list[int]:
        """Ids of classes given as text separated by commas, which names may contain; errors are those of `label_id`."""
        parts, ids = text.split(","), []
        while parts:
            tried = ((count, ",".join(parts[:count]).strip()) for count in range(len(parts), 0, -1))
            count, name = next(
                (each for each in tried if self._named(each[1]) is not None), (1, parts[0].strip())
            )
            ids.append(self.label_id(name))
            del parts[:count]
        return ids

    @property
    def drawn_levels(self) -> int:
        """Number of levels of the trajectories that this pipeline draws."""
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
        """Make a trajectory from a photograph: its levels are the hierarchy of its features, to be edited and resumed.

        features: float [H, W, C] of the model's encoder. regions: integer [L−1, H, W]; None finds them by the recipe
        of the paper; a model that draws only tokens ignores them. label, seed: class and noise of levels that are
        drawn later. origin: plain data that say where the features come from.
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
            from hierarchy_builder.hierarchy import (
                build_hierarchy,  # loads numba, which drawing does not need
            )

            ids = torch.as_tensor(build_hierarchy(tokens[None]).regions[0] if regions is None else regions)
        if tuple(ids.shape) != (wanted := (self.drawn_levels - 1, *config.grid)):
            raise MismatchError(
                f"regions have shape {tuple(ids.shape)}, the model has levels {wanted}: "
                "pass regions of the recipe it was trained with"
            )
        levels = self.normaliser.to("cpu").teacher_canvases(tokens[None], ids[None])[0]
        return self._trajectory(levels, label_id, seed, origin=origin or {"source": "features"})

    def adopt(self, trajectory: Trajectory) -> Trajectory:
        """Return a trajectory that was read from a file with this pipeline's model, to resume it, and its decoder.

        Raises MismatchError if its levels have another shape than the model's, or were drawn by other weights, and
        UsageError where a network that draws pixels lacks the weak network that drew them.
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
        decoder = self._decoder_of(trajectory.sampling) or trajectory.decoder
        return replace(trajectory, decoder=decoder, sampler=self._draw_after)

    def decoder_of_canvases(self, encoder: dict[str, Any]) -> Decoder:
        """The network as a decoder of canvases of `encoder`; only Latent Forcing's pipelines have such a network.

        Raises MismatchError for a network that draws no pixels, or was trained on features of another encoder.
        """
        raise MismatchError(
            f"pixel stage {self.weights.get('folder', 'of this pipeline')}: its network draws canvases and no pixels; "
            "give a run of latent-forcing"
        )

    @property
    def default_steps(self) -> int:
        """The number of steps that 1 stands for."""
        return 1

    def _settled(self, how: Sampling) -> Sampling:
        """With the number of steps that 1 stands for."""
        return replace(how, num_steps=self.default_steps) if how.num_steps == 1 else how

    @classmethod
    def no_gradient(cls, config: Any) -> str | None:
        """Why the samples of a run have no gradient, so that it cannot be post-trained; None where they have one."""
        return "its pipeline draws no samples with a gradient"

    @abstractmethod
    def _sample(self, ids: list[int], seeds: list[int], how: Sampling) -> list[Trajectory]:
        """Draw trajectories of these classes and seeds, of the same number."""

    @abstractmethod
    def _after(
        self, trajectory: Trajectory, level: int, seeds: tuple[int, ...], noise: Tensor, how: Sampling
    ) -> Tensor:
        """Canvases after `level`, at least one of them, [1, L−1−level, H, W, C].

        seeds: of all levels. noise: [N, 1, H, W, C] on the network's device, where it is after `level`; zeros before.
        """

    def _num_noises(self, how: Sampling) -> int:
        """Canvases of noise that one trajectory takes, as many for each level."""
        return self.drawn_levels

    def _noise(self, seeds: Sequence[int], how: Sampling) -> Tensor:
        """All noise of trajectories of these seeds, float32 [N, B, H, W, C] on the CPU."""
        config = self.model.config
        noise = level_noise(seeds, self._num_noises(how), config.grid, config.in_channels)
        return how.temperature * noise

    def _draw_after(self, trajectory: Trajectory, level: int, seeds: tuple[int, ...]) -> Tensor:
        """Canvases after `level`, float32 [L−1−level, H, W, C], drawn as the trajectory's own were."""
        if level + 1 == trajectory.num_levels:
            return trajectory.levels[:0]
        how = self._settled(trajectory.sampling)
        config, each = self.model.config, self._num_noises(how) // trajectory.num_levels
        noise = torch.zeros(len(seeds) * each, 1, *config.grid, config.in_channels)
        # A generator's numbers depend on how many are drawn at once, so a seed's noise is drawn whole.
        whole = {seed: self._noise([seed], how) for seed in dict.fromkeys(seeds[level + 1 :])}
        for number in range(level + 1, len(seeds)):
            own = slice(number * each, (number + 1) * each)
            noise[own] = whole[seeds[number]][own]
        return self._after(trajectory, level, seeds, noise.to(self.device), how)[0].cpu()

    @property
    def num_parameters(self) -> int:
        """How many numbers of the network are trained; those that a Gaussian start is fitted to are not among them."""
        layers = (part for part in self.model.modules() if not isinstance(part, GaussianStart))
        return sum(each.numel() for part in layers for each in part.parameters(recurse=False))

    def __repr__(self) -> str:
        config = self.model.config
        shape = "×".join(map(str, (*config.grid, config.in_channels)))
        return (
            f"<{type(self).__name__}: {counted(len(self.classes), 'class', 'classes')}, {config.num_levels} levels of "
            f"{shape}, {self.num_parameters:,} parameters on {self.device}, from {_weights_text(self.weights)}>"
        )

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    def to(self, device: str | torch.device) -> Self:
        """Move the networks, the normaliser and the decoder to a device, and return the pipeline."""
        self.model.to(device)
        if self.weak is not None:
            self.weak.to(device)
        self.normaliser = self.normaliser.to(device)
        if isinstance(self.decoder, nn.Module | ConditionalDecoder):
            self.decoder.to(device)
        return self

    def save_pretrained(self, folder: str | Path, license: str = "unknown") -> Path:
        """Write the weights in use, without the optimiser's state, as a folder that `from_pretrained` loads.

        The decoder of the run comes along, and README.md, a card with a picture of samples. license: what the card says
        of it, an identifier of the hub. A weak network or a decoder given to `from_pretrained` is not written. Raises
        UsageError for a pipeline that was not loaded from a checkpoint, TrainerError if the folder exists.
        """
        if self.source is None:
            raise UsageError(
                "the pipeline was made from a network in memory; load it by from_pretrained(RUN) first"
            )
        folder, state = Path(folder), saved.load_state(self.source)
        name = self.weights["ema"]
        own = saved.MODEL if name == "raw" else f"ema-{name}.safetensors"
        normaliser = {"mean": self.normaliser.mean, "std": self.normaliser.std}
        written = replace(state, optimizer=[], files={}, checksums={}, format_version=saved.FORMAT_VERSION)
        decoder = saved.run_of(self.source) / RUN_DECODER
        method = registry.method_in(state.config, self.source)
        picture = self.sheet()
        text = card(pipe=self, state=state, method=method, license=license, has_decoder=decoder.is_dir())
        saved.write_folder(folder, written, [(own, self.model.state_dict()), (saved.NORMALISER, normaliser)])
        try:
            if decoder.is_dir():
                left = shutil.ignore_patterns("checkpoints", "tensorboard", "samples")
                shutil.copytree(decoder, folder / RUN_DECODER, ignore=left)
            picture.save(folder / PICTURE)
            (folder / "README.md").write_text(text, encoding="utf-8")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder

    def push_to_hub(
        self, repository: str, *, license: str = "unknown", private: bool = False, token: str | None = None
    ) -> str:
        """Send what `save_pretrained` writes to the repository `owner/name` of the hub, and return its address.

        token: without it the one of `hf auth login`. Raises TrainerError where the hub refuses or does not answer.
        """
        return push(
            lambda folder: self.save_pretrained(folder, license), repository, private=private, token=token
        )

    def _weak_for(self, how: Sampling) -> Any:
        """The weak network where autoguidance was asked for. Raises UsageError where there is none."""
        if how.weak_scale and not self.weak_fields:
            raise UsageError(
                f"weak_scale is {how.weak_scale:g}, but this method has no autoguidance: use guidance, with a model "
                "trained with label dropout"
            )
        if how.weak_scale and self.weak is None:
            raise UsageError(
                f"autoguidance of strength {how.weak_scale:g} needs a weak model: pass weak=FOLDER to "
                "from_pretrained, or --weak FOLDER, for example an early checkpoint"
            )
        return self.weak if how.weak_scale else None

    def _decoder_of(self, how: Sampling) -> Decoder | None:
        """What draws the pictures of trajectories that were sampled like this."""
        return self.decoder

    def _trajectory(
        self,
        levels: Tensor,
        label: int,
        seed: int,
        how: Sampling | None = None,
        origin: dict[str, Any] | None = None,
    ) -> Trajectory:
        how = how or Sampling()
        return Trajectory(
            levels=levels,
            label=label,
            class_name=self.class_name(label),
            seeds=(seed,) * len(levels),
            encoder=self.encoder,
            origin=origin or {},
            model=self.weights,
            decoder=self._decoder_of(how),
            sampler=self._draw_after,
            **asdict(how),
        )


class LevelPipeline(TrajectoryPipeline):
    """A pipeline whose samples are their levels and no more: a method's subclass defines `_levels`."""

    @abstractmethod
    def _levels(self, ids: list[int], noise: Tensor, how: Sampling, **start: Any) -> Tensor:
        """Draw canvases [B, L − start_level, H, W, C] of these classes, all levels or those from `start_level` on.

        noise: [N, B, H, W, C]. start: none, or `start_level` and `previous`, the canvas [B, H, W, C] before it.
        """

    def _sample(self, ids: list[int], seeds: list[int], how: Sampling) -> list[Trajectory]:
        levels = self._levels(ids, self._noise(seeds, how).to(self.device), how)
        return [self._trajectory(*each, how) for each in zip(levels.cpu(), ids, seeds, strict=True)]

    def _after(
        self, trajectory: Trajectory, level: int, seeds: tuple[int, ...], noise: Tensor, how: Sampling
    ) -> Tensor:
        previous = trajectory.levels[level : level + 1].to(self.device)
        return self._levels([trajectory.label], noise, how, start_level=level + 1, previous=previous)


class DifferentiablePipeline(LevelPipeline):
    """A pipeline whose samples have a gradient, so that its runs can be post-trained: `_next_canvas` draws a level."""

    @classmethod
    def no_gradient(cls, config: Any) -> str | None:
        return None

    @classmethod
    def noises_of(cls, network: Any) -> int:
        """Canvases of noise that `draw` takes for one image, as many for each level."""
        return int(network.config.num_levels)

    @classmethod
    def draw(
        cls, networks: Sequence[Any], method: Any, label: Tensor, noise: Tensor, detached: bool
    ) -> Tensor:
        """Draw canvases [B, L, H, W, C] in units of the network with their gradient, which post-training follows.

        networks: the network that draws each level; they may be one and the same. method: the method's configuration.
        label: int64 [B]. noise: float32 [noises_of, B, H, W, C]. detached: whether a level takes the one before as a
        constant, so that no gradient passes between levels.
        """
        levels, prev = [], torch.zeros_like(noise[0])
        for number, (network, own) in enumerate(zip(networks, noise.chunk(len(networks)), strict=True)):
            levels.append(cls._next_canvas(network, method, label, torch.full_like(label, number), prev, own))
            prev = levels[-1].detach() if detached else levels[-1]
        return torch.stack(levels, dim=1)

    @classmethod
    @abstractmethod
    def _next_canvas(
        cls, network: Any, method: Any, label: Tensor, level: Tensor, prev: Tensor, noise: Tensor
    ) -> Tensor:
        """Draw the canvas of one level, [B, H, W, C], from the one before; noise: [·, B, H, W, C], of this level."""


def _listed(value: Any) -> list[Any]:
    return [value] if np.ndim(value) == 0 else list(value)


def _repeated(values: list[Any], count: int, what: str) -> list[Any]:
    if len(values) not in (1, count):
        raise UsageError(f"{len(values)} {what}, expected 1 or {count}")
    return values * count if len(values) == 1 else values


def _weights_text(weights: dict[str, str]) -> str:
    return f"{weights.get('folder', 'other weights')} (ema {weights.get('ema', 'unknown')})"
