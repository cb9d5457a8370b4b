"""One image from noise to raw tokens, every level in between, and what was done to it since.

    L levels (coarse → fine), H×W grid of tokens, C channels, h×w pixels

A trajectory is never changed in place: edits, resuming and undoing return another one. Level ℓ depends on level ℓ−1
alone, so levels before an edited one keep their bits, and those after it show the edit once they are drawn again
(`resume`). What a step replaced is kept with the trajectory, so undoing is exact and needs no model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hierarchy_builder.canvases.gallery import render, write_page
from hierarchy_builder.errors import TrainerError, UsageError
from hierarchy_builder.files import target_of
from trainer.decode.rae import ConditionalDecoder, decoder_from_spec, to_uint8
from trainer.metrics.regions import extract_regions
from trainer.trajectories.edit import Source, as_source, mean_of, move_tokens, replace_features, tokens_of
from trainer.trajectories.file import ENTRIES, read_trajectory, write_trajectory
from trainer.trajectories.selection import Selection
from trainer.trajectories.view import TrajectoryView, trajectories_page

Decoder = Callable[[Tensor], Tensor]
"""[B, H, W, C] on the CPU → RGB [B, 3, h, w] in [0, 1], on any device."""
Seeds = int | Sequence[int] | Mapping[int, int] | None
"""Of levels to draw again: None their own, a number for all of them, one each, or some by level."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a trajectory is drawn from noise; the fields of the same names of a `Trajectory`."""

    num_steps: int = 1
    guidance: tuple[float, float, float] | None = None
    weak_scale: float = 0.0


@dataclass(kw_only=True, slots=True, eq=False)
class Trajectory:
    """The canvas of every level of one image, and what they were made from."""

    levels: Tensor
    """float32 [L, H, W, C] on the CPU, coarse → fine, in units of the encoder's features."""
    label: int
    class_name: str
    seeds: tuple[int, ...]
    """Noise seed of each level; level l takes slice l of the noise of its seed."""
    num_steps: int = 1
    """Steps that were taken: evaluations of a level; of Latent Forcing those of a stage; transitions of a chain."""
    guidance: tuple[float, float, float] | None = None
    """Guidance scale omega and the interval of t it acts in."""
    weak_scale: float = 0.0
    """Strength of autoguidance, away from a weaker model."""
    encoder: dict[str, Any] = field(default_factory=dict)
    """Description of the encoder whose features the levels are."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What it started from: empty for noise, else the photograph."""
    model: dict[str, str] = field(default_factory=dict)
    """Checkpoint folder and weight average that draw its levels; in a file the folder is relative to it."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """What was done, in order, as plain data; empty for a fresh sample."""
    replaced: list[Tensor] = field(default_factory=list)
    """Levels that each entry of `history` replaced, as they were before it: float32 [l, H, W, C]."""
    decoder: Decoder | None = None
    """Turns canvases into pixels; not saved."""
    sampler: Callable[[Trajectory, int, tuple[int, ...]], Tensor] | None = None
    """(trajectory, level, seeds of all levels) → canvases after that level; of the pipeline, not saved."""

    _regions: Tensor | None = field(default=None, init=False, repr=False)
    """What `regions` found; levels never change."""

    def __post_init__(self) -> None:
        if not self.levels.isfinite().all():
            raise TrainerError(_not_finite(self))

    @property
    def sampling(self) -> Sampling:
        """How its levels were drawn, and levels drawn later are."""
        return Sampling(num_steps=self.num_steps, guidance=self.guidance, weak_scale=self.weak_scale)

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
        """Its decoder where that draws these levels, else the encoder's own."""
        given = self.decoder
        if given is None or (isinstance(given, ConditionalDecoder) and not given.draws(self.levels)):
            return decoder_from_spec(self.encoder.get("decoder"))
        return given

    @torch.no_grad()
    def decode(self, level: int | None = None) -> np.ndarray:
        """Every level as a picture: uint8 [L, h, w, 3]; or one, [h, w, 3]. Raises TrainerError without a decoder."""
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
        """What pages and sheets show of it: canvases, and pictures where there is a decoder."""
        return TrajectoryView(
            label_name=self.class_name,
            seed=self.seeds[-1],
            canvases=self.levels.numpy(),
            decoded=self.decode() if self.can_decode else None,
            notes={"steps": self.num_steps},
        )

    def to_html(self, path: str | Path | None = None) -> str:
        """One self-contained page of all levels, as text; written to `path` where that is given."""
        facts = {"class": self.class_name, "seeds": ", ".join(map(str, self.seeds))}
        page = trajectories_page(title=self.class_name, facts=facts, trajectories=[self.view()])
        if path is not None:
            write_page(page, target_of(Path(path)))
        return render(page)

    def regions(self) -> Tensor:
        """Region ids found in the canvases, uint8 [L, H, W]; the last level repeats those before it.

        See `trainer.metrics.regions.extract_regions`; tokens of the last level are no regions of their own.
        Tokens without any level before them are divided as parts would be.
        """
        if self._regions is None:
            if self.num_levels == 1:
                self._regions = extract_regions(self.levels.expand(3, -1, -1, -1))[-1:]
            else:
                found = extract_regions(self.levels)
                self._regions = torch.cat([found, found[-1:]])
        return self._regions

    def regions_of(self, level: int) -> Tensor:
        """Region ids of one level, uint8 [H, W]. Raises UsageError for another level than those there are."""
        return self.regions()[self._level(level)]

    def region(self, region: int | Sequence[int], *, level: int) -> Selection:
        """The tokens of a region of `regions()`, or of several. Raises UsageError naming those there are."""
        return Selection.from_region(self.regions_of(level), region, level=level)

    def neighbours(
        self, token: Sequence[int], *, level: int, cosine: float = 0.9, connected: bool = False
    ) -> Selection:
        """Tokens of a level that resemble the one at (row, column), see `Selection.from_neighbours`."""
        canvas = self.levels[self._level(level)]
        return Selection.from_neighbours(canvas, token, level=level, cosine=cosine, connected=connected)

    def mean_of(self, selection: Selection) -> Source:
        """The mean of tokens of this trajectory, as a source for edits of any trajectory."""
        return mean_of(self.levels[self._level(selection.level)], selection)

    def tokens_of(self, selection: Selection) -> Source:
        """Tokens of this trajectory one by one, as a source for edits of any trajectory."""
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

        source: of `mean_of` or `tokens_of` of any trajectory, `trainer.trajectories.edit.prototype`, or
        features [C], one for each
        token [n, C], or a canvas [H, W, C]. strength: 0 none, 1 the source itself. level: where the edit is meant to
        act; a selection of another level is refused.
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
        """Move the selected tokens to a region of their level, whose mean they take; `resume` draws those after it.

        region: an id of `regions()` on that level; None moves each token to the neighbouring region. Arguments and
        errors otherwise as for `edit_features`, see also `trainer.trajectories.edit.move_tokens`.
        """
        at = self._require(selection, level)
        canvas, _ = move_tokens(self.levels[at], self.regions()[at], selection, region)
        note = {"edit": "shape", "level": at, "tokens": selection.tokens, "region": region}
        return self._stepped(at, canvas[None], note)

    def grow_region(self, region: int, *, level: int, steps: int = 1) -> Trajectory:
        """Give a region the tokens around it, `steps` deep. Raises as `edit_shape`."""
        inside = self.region(region, level=level)
        return self.edit_shape(inside.grow(steps) - inside, region)

    def shrink_region(self, region: int, *, level: int, steps: int = 1) -> Trajectory:
        """Give a region's outermost tokens, `steps` deep, to the regions beside them. Raises as `edit_shape`."""
        inside = self.region(region, level=level)
        return self.edit_shape(inside - inside.shrink(steps))

    def resume(self, from_level: int, seeds: Seeds = None) -> Trajectory:
        """Keep levels 0 … from_level bit for bit and draw the ones after it again.

        seeds: None draws them from the noise they had; a number, one for each of them, or a mapping level → seed
        takes other noise. Raises UsageError for another level or seeds that do not fit, TrainerError without a model.
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
        """As it was before the last edit or resume, bit for bit. Raises UsageError where there is none to undo."""
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

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: levels, seeds and what edits replaced as tensors, the rest as JSON beside them."""
        entries = {name: getattr(self, name) for name in ENTRIES}
        write_trajectory(Path(path), self.levels, self.seeds, self.replaced, entries)

    @classmethod
    def load(cls, path: str | Path) -> Trajectory:
        """Read what `save` wrote; see `read_trajectory` for errors."""
        return cls(**read_trajectory(Path(path)))

    def _level(self, level: int) -> int:
        if not 0 <= level < self.num_levels:
            raise UsageError(f"level {level}, expected 0 to {self.num_levels - 1}")
        return level

    def _require(self, selection: Selection, level: int | None) -> int:
        at = self._level(selection.level if level is None else level)
        selection.require(self.grid, at)
        return at

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
        """With `levels` from level `start` on, and one more entry in the history."""
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
