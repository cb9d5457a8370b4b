"""One image from noise to raw tokens, every level in between, and what was done to it since.

    L levels (coarse → fine), H×W grid of tokens, C channels, h×w pixels

A trajectory is never changed in place: edits, resuming and undoing return another one. Level ℓ depends on level ℓ−1
alone, so levels before an edited one keep their bits, and those after it show the edit once they are drawn again
(`resume`). What a step replaced is kept with the trajectory, so undoing is exact and needs no model.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hierarchy_builder.canvases.gallery import render, write_page
from hierarchy_builder.errors import TrainerError, UsageError
from hierarchy_builder.files.whole import target_of
from hierarchy_builder.terminal import counted
from trainer.decode.rae import ConditionalDecoder, decoder_from_spec, to_uint8
from trainer.trajectories.edit import Source, as_source, mean_of, move_tokens, replace_features, tokens_of
from trainer.trajectories.file import ENTRIES, read_trajectory, write_trajectory
from trainer.trajectories.selection import Selection
from trainer.trajectories.view import TrajectoryView, trajectories_page

Decoder = Callable[[Tensor], Tensor]
"""[B, H, W, C] on the CPU → RGB [B, 3, h, w] in [0, 1], on any device."""
Seeds = int | Sequence[int] | Mapping[int, int] | None
"""Seeds of levels to draw again: None for the same as before, one for all, one each, or some of them by level."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How levels are drawn from noise; the fields mean what they mean in `Trajectory`."""

    num_steps: int = 1
    guidance: tuple[float, float, float] | None = None
    weak_scale: float = 0.0
    temperature: float = 1.0


@dataclass(kw_only=True, slots=True, eq=False, repr=False)
class Trajectory:
    """The canvas of every level of one image, and what they were made from."""

    levels: Tensor
    """float32 [L, H, W, C] on the CPU, coarse → fine, in units of the encoder's features."""
    label: int
    class_name: str
    seeds: tuple[int, ...]
    """Noise seed of each level; level l takes slice l of the noise of its seed."""
    num_steps: int = 1
    """Steps that were taken: network evaluations of each level; in Latent Forcing, steps of each stage; in Normalizing
    Trajectory Models, transitions of the chain."""
    guidance: tuple[float, float, float] | None = None
    """Guidance scale omega, and the start and end of the interval of t in which it acts."""
    weak_scale: float = 0.0
    """Strength of autoguidance, which moves samples away from those of a weaker model."""
    temperature: float = 1.0
    """Factor of the noise that the levels were drawn from."""
    encoder: dict[str, Any] = field(default_factory=dict)
    """Description of the encoder whose features the levels are."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What the levels started from: empty for noise, or else facts about the photograph."""
    model: dict[str, str] = field(default_factory=dict)
    """Checkpoint folder and weight average that draw the levels; a file stores the folder relative to itself."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Edits and resumes in order, as plain data; empty for a fresh sample."""
    replaced: list[Tensor] = field(default_factory=list)
    """For each edit or resume, the levels that it replaced as they were before: float32 [l, H, W, C]."""
    decoder: Decoder | None = None
    """Turns canvases into pixels; it is not saved."""
    sampler: Callable[[Trajectory, int, tuple[int, ...]], Tensor] | None = None
    """(trajectory, level, seeds of all levels) → canvases after that level; the pipeline sets it, it is not saved."""

    _regions: Tensor | None = field(default=None, init=False, repr=False)
    """What `regions` found; levels never change."""

    def __post_init__(self) -> None:
        if not self.levels.isfinite().all():
            raise TrainerError(_not_finite(self))

    def __repr__(self) -> str:
        grid, edits = "×".join(map(str, self.levels.shape[1:])), len(self.history)
        seeds = f"seed {self.seeds[0]}" if len(set(self.seeds)) == 1 else f"seeds {list(self.seeds)}"
        steps = f", {counted(edits, 'edit or resume', 'edits and resumes')}" if edits else ""
        return f"<Trajectory of {self.class_name!r}, {seeds}: {self.num_levels} levels of {grid}{steps}>"

    def _repr_html_(self) -> str:
        """The page of `to_html` in a frame, which notebooks show."""
        page = html.escape(self.to_html())
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 30em; border: 0" sandbox="allow-scripts"></iframe>'

    @property
    def sampling(self) -> Sampling:
        """How the levels were drawn, and how `resume` draws them again."""
        return Sampling(**{each.name: getattr(self, each.name) for each in dataclasses.fields(Sampling)})

    @property
    def num_levels(self) -> int:
        """L."""
        return len(self.levels)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.levels.shape[1], self.levels.shape[2]

    @property
    def can_decode(self) -> bool:
        """Whether `decode` has a decoder."""
        return self._decoder is not None

    @property
    def _decoder(self) -> Decoder | None:
        """The decoder of the trajectory if it can draw these levels, or else that of the encoder."""
        given = self.decoder
        if given is None or (isinstance(given, ConditionalDecoder) and not given.draws(self.levels)):
            return decoder_from_spec(self.encoder.get("decoder"))
        return given

    @torch.no_grad()
    def decode(self, level: int | None = None) -> np.ndarray:
        """Decode every level, uint8 [L, h, w, 3], or one level, [h, w, 3]. Raises TrainerError without a decoder."""
        decoder = self._decoder
        if decoder is None:
            raise TrainerError(
                f"features of encoder {self.encoder.get('name', 'unknown')!r} have no decoder of their own; "
                "pass decoder=FOLDER (an RAE decoder) to from_pretrained, or --decoder FOLDER, or --pixel-stage RUN"
            )
        if isinstance(decoder, ConditionalDecoder):
            own = decoder.of(self.label, self.seeds[-1])
            if level is None:
                return to_uint8(own(self.levels)).cpu().numpy()
            return to_uint8(own.at(self.levels, self._level(level))[None])[0].cpu().numpy()
        if level is None:
            return to_uint8(decoder(self.levels)).cpu().numpy()
        return to_uint8(decoder(self.levels[self._level(level)][None]))[0].cpu().numpy()

    def view(self) -> TrajectoryView:
        """Return what pages and sheets show: canvases, and pictures where there is a decoder."""
        return TrajectoryView(
            label_name=self.class_name,
            seed=self.seeds[-1],
            canvases=self.levels.numpy(),
            decoded=self.decode() if self.can_decode else None,
            notes={"steps": self.num_steps},
        )

    def to_html(self, path: str | Path | None = None) -> str:
        """Return one self-contained HTML page of all levels, and write it to `path` if that is given."""
        facts = {"class": self.class_name, "seeds": ", ".join(map(str, self.seeds))}
        page = trajectories_page(title=self.class_name, facts=facts, trajectories=[self.view()])
        if path is not None:
            write_page(page, target_of(Path(path)))
        return render(page)

    def regions(self) -> Tensor:
        """Region ids found in the canvases, uint8 [L, H, W]; the last level repeats those before it.

        See `trainer.metrics.regions.extract_regions`; tokens of the last level are no regions of their own.
        A single level of tokens is divided as parts would be.
        """
        from trainer.metrics.regions import extract_regions  # loads scipy, which drawing does not need

        if self._regions is None:
            if self.num_levels == 1:
                self._regions = extract_regions(self.levels.expand(3, -1, -1, -1))[-1:]
            else:
                found = extract_regions(self.levels)
                self._regions = torch.cat([found, found[-1:]])
        return self._regions.clone()  # a caller may change what it gets

    def regions_of(self, level: int) -> Tensor:
        """Region ids of one level, uint8 [H, W]. Raises UsageError for a level that does not exist."""
        return self.regions()[self._level(level)]

    def region(self, region: int | Sequence[int], *, level: int) -> Selection:
        """Select the tokens of one region of `regions()`, or of several. Raises UsageError naming the known regions."""
        return Selection.from_region(self.regions_of(level), region, level=level)

    def neighbours(
        self, token: Sequence[int], *, level: int, cosine: float = 0.9, connected: bool = False
    ) -> Selection:
        """Select tokens of a level that resemble the one at (row, column), see `Selection.from_neighbours`."""
        canvas = self.levels[self._level(level)]
        return Selection.from_neighbours(canvas, token, level=level, cosine=cosine, connected=connected)

    def mean_of(self, selection: Selection) -> Source:
        """Return the mean of selected tokens, as a source for edits of any trajectory."""
        return mean_of(self.levels[self._level(selection.level)], selection)

    def tokens_of(self, selection: Selection) -> Source:
        """Return the selected tokens one by one, as a source for edits of any trajectory."""
        return tokens_of(self.levels[self._level(selection.level)], selection)

    def edit_features(
        self,
        selection: Selection,
        source: Source | Tensor,
        strength: float = 1.0,
        *,
        level: int | None = None,
    ) -> Trajectory:
        """Replace the features of the selected tokens, on their level; `resume` then draws those after it.

        source: what `mean_of` or `tokens_of` of any trajectory or `trainer.trajectories.edit.prototype` returns, or
        features: [C] for all tokens, [n, C] for one each, or a canvas [H, W, C]. strength: from 0, no change, to 1,
        the source itself. level: the level of the edit; a selection on another level is refused.
        Raises UsageError for a selection that is empty or of another level or grid, or a source that does not fit.
        """
        at = self._require(selection, level)
        source = as_source(source, selection)
        canvas = replace_features(self.levels[at], selection, source, strength)
        note = {
            "edit": "features",
            "level": at,
            "tokens": selection.tokens,
            "strength": strength,
            "from": dict(source.note),
        }
        return self._stepped(at, canvas[None], note)

    def edit_shape(
        self, selection: Selection, region: int | None = None, *, level: int | None = None
    ) -> Trajectory:
        """Move the selected tokens to a region of their level, whose mean they take; `resume` draws later levels.

        region: an id of `regions()` on that level; None moves each token to the neighbouring region. Arguments and
        errors otherwise as for `edit_features`, see also `trainer.trajectories.edit.move_tokens`.
        """
        at = self._require(selection, level)
        canvas, _ = move_tokens(self.levels[at], self.regions()[at], selection, region)
        note = {"edit": "shape", "level": at, "tokens": selection.tokens, "region": region}
        return self._stepped(at, canvas[None], note)

    def grow_region(self, region: int, *, level: int, steps: int = 1) -> Trajectory:
        """Give a region the tokens around it, `steps` deep. Raises as `edit_shape`."""
        inside = self._bordered(region, level)
        return self.edit_shape(inside.grow(steps) - inside, region)

    def shrink_region(self, region: int, *, level: int, steps: int = 1) -> Trajectory:
        """Give the outermost tokens of a region, `steps` deep, to the regions next to them. Raises as `edit_shape`."""
        inside = self._bordered(region, level)
        return self.edit_shape(inside - inside.shrink(steps))

    def resume(self, from_level: int, seeds: Seeds = None) -> Trajectory:
        """Keep levels 0 … from_level bit for bit and draw the levels after it again.

        seeds: None draws from the same noise as before; one number for all of them, one for each, or a mapping
        level → seed draws from other noise. Raises UsageError for a level that does not exist or seeds that do not
        fit, TrainerError without a model.
        """
        at = self._level(from_level)
        chosen = self._seeds(at, seeds)
        if self.sampler is None:
            raise TrainerError(
                "no model to resume with: take the trajectory from a pipeline, or pipe.adopt it"
            )
        note = {"edit": "resume", "level": at, "seeds": list(chosen)}
        return self._stepped(at + 1, self.sampler(self, at, chosen), note, chosen)

    def undo(self) -> Trajectory:
        """Take back the last edit or resume, bit for bit. Raises UsageError if there is nothing to undo."""
        if not self.replaced:
            raise UsageError("nothing to undo: the trajectory is as it was first made")
        number = max(n for n, entry in enumerate(self.history) if "first_level" in entry)
        last, before = self.history[number], self.replaced[-1]
        start = last["first_level"]
        levels = torch.cat([self.levels[:start], before, self.levels[start + len(before) :]])
        return dataclasses.replace(
            self,
            levels=levels,
            seeds=tuple(last["seeds_before"]),
            history=self.history[:number],
            replaced=self.replaced[:-1],
        )

    def undo_edit(self) -> Trajectory:
        """Take back the last edit together with what was drawn again after it. Raises UsageError as `undo`."""
        steps = [entry for entry in self.history if "first_level" in entry]
        before = self.undo()
        while steps.pop().get("edit") == "resume" and steps:
            before = before.undo()
        return before

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: levels, seeds and replaced levels as tensors, the rest as JSON in its metadata."""
        entries = {name: getattr(self, name) for name in ENTRIES}
        write_trajectory(Path(path), self.levels, self.seeds, self.replaced, entries)

    @classmethod
    def load(cls, path: str | Path) -> Trajectory:
        """Read a file that `save` wrote; see `read_trajectory` for errors."""
        return cls(**read_trajectory(Path(path)))

    def _level(self, level: int) -> int:
        if not 0 <= level < self.num_levels:
            raise UsageError(f"level {level}, expected 0 to {self.num_levels - 1}")
        return level

    def _require(self, selection: Selection, level: int | None) -> int:
        at = self._level(selection.level if level is None else level)
        selection.require(self.grid, at)
        return at

    def _bordered(self, region: int, level: int) -> Selection:
        inside = self.region(region, level=level)
        if inside.mask.all():
            raise UsageError(
                f"region {region} is the whole of level {level} and has no border to move: choose another level"
            )
        return inside

    def _seeds(self, level: int, seeds: Seeds) -> tuple[int, ...]:
        """Seeds of all levels, new ones after `level`."""
        after = range(level + 1, self.num_levels)
        if seeds is None:
            chosen: Mapping[int, int] = {}
        elif isinstance(seeds, int):
            chosen = dict.fromkeys(after, seeds)
        elif isinstance(seeds, Mapping):
            chosen = seeds
        elif len(seeds) == len(after):
            chosen = dict(zip(after, seeds, strict=True))
        else:
            raise UsageError(
                f"{len(seeds)} seeds for {len(after)} levels after level {level}, expected one each"
            )
        if wrong := sorted(set(chosen) - set(after)):
            raise UsageError(f"a seed for level {wrong[0]}, which is kept: levels after {level} are drawn")
        return tuple(chosen.get(number, seed) for number, seed in enumerate(self.seeds))

    def _stepped(
        self, start: int, levels: Tensor, note: dict[str, Any], seeds: tuple[int, ...] | None = None
    ) -> Trajectory:
        """Return a trajectory with `levels` from level `start` on and one more entry in the history."""
        stop = start + len(levels)
        entry = {**note, "first_level": start, "seeds_before": list(self.seeds)}
        return dataclasses.replace(
            self,
            levels=torch.cat([self.levels[:start], levels, self.levels[stop:]]),
            seeds=self.seeds if seeds is None else seeds,
            history=[*self.history, entry],
            replaced=[*self.replaced, self.levels[start:stop]],
        )


def _not_finite(trajectory: Trajectory) -> str:
    """What is wrong with levels that hold NaN, by what made them last: an encoder, an edit, or the network."""
    last = trajectory.history[-1].get("edit") if trajectory.history else None
    if last is None and (origin := trajectory.origin):
        image = origin.get("name") or origin.get("key") or "the photograph"
        encoder = origin.get("encoder") or trajectory.encoder.get("name", "unknown")
        return (
            f"features of {image} by the encoder {encoder!r} hold NaN or infinity: check the encoder and its weights, "
            "or take another image"
        )
    levels = f"levels of {trajectory.class_name}, seed {trajectory.seeds[-1]},"
    if last not in (None, "resume"):
        return f"{levels} hold NaN or infinity after an edit of {last}: lower the strength of the edit"
    return f"{levels} hold NaN or infinity: lower guidance, or use another checkpoint"


def decode_finest(trajectories: Sequence[Trajectory]) -> np.ndarray:
    """Decode the last level of several trajectories of one network: uint8 [N, h, w, 3].

    A decoder on a GPU takes them all at once; one on a CPU takes them one by one, to the same bits as `decode`.
    """
    decoder = trajectories[0]._decoder
    weight = next(decoder.parameters(), None) if isinstance(decoder, nn.Module) else None
    if weight is None or weight.device.type == "cpu":
        return np.stack([each.decode(level=len(each.levels) - 1) for each in trajectories])
    assert decoder is not None
    return to_uint8(decoder(torch.stack([each.levels[-1] for each in trajectories]))).cpu().numpy()
