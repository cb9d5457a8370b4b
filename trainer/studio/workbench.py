"""What a person does with trajectories in the studio, as steps from one state to the next; knows no browser.

A state is never changed: every step returns a new one or raises UsageError with what to do instead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor

from hierarchy_builder.errors import UsageError
from trainer.trajectories.compare import compare, comparison_png, encoder_of
from trainer.trajectories.edit import Source, mean_of, tokens_of
from trainer.trajectories.selection import Selection
from trainer.trajectories.trajectory import Seeds, Trajectory

Pick = Literal["region", "token", "similar"]
"""What a click means: the whole region, one token, or all connected tokens that resemble it."""
Join = Literal["replace", "add", "remove", "intersect"]
"""What becomes of the tokens selected before."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Workbench:
    """A trajectory in work, what is selected, what was taken for use elsewhere, and what it is compared with."""

    trajectory: Trajectory | None = None
    reference: Trajectory | None = None
    """As it was generated or loaded, or when it was last pinned; comparisons are against it."""
    selection: Selection | None = None
    source: Source | None = None
    """Features taken with `take`, for feature edits of any trajectory."""
    taken: Tensor | None = None
    """bool [H, W], where they were taken, and `taken_from`: of what; for the person to read."""
    taken_from: str = ""
    undone: tuple[Trajectory, ...] = ()
    """Steps that can be done again, the last undone one last."""

    def open(self, trajectory: Trajectory) -> Workbench:
        """Start with a generated or loaded trajectory; what was taken stays."""
        return replace(self, trajectory=trajectory, reference=trajectory, selection=None, undone=())

    def current(self) -> Trajectory:
        """The trajectory. Raises UsageError where there is none."""
        if self.trajectory is None:
            raise UsageError("there is no trajectory yet: choose a class and a seed and press Generate")
        return self.trajectory

    def pin(self) -> Workbench:
        """Compare with the trajectory as it is now from here on."""
        return replace(self, reference=self.current())

    def click(
        self,
        level: int,
        row: int,
        column: int,
        pick: Pick = "region",
        join: Join = "replace",
        cosine: float = 0.9,
    ) -> Workbench:
        """Select by a click on a token of a level."""
        trajectory = self.current()
        if pick == "similar":
            found = trajectory.neighbours((row, column), level=level, cosine=cosine, connected=True)
        elif pick == "region" and level < trajectory.num_levels - 1:
            found = trajectory.region(int(trajectory.regions()[level, row, column]), level=level)
        else:  # tokens of the last level are no regions
            found = Selection.from_coordinates([(row, column)], grid=trajectory.grid, level=level)
        return self.select(found, join)

    def select(self, found: Selection, join: Join = "replace") -> Workbench:
        """Take a selection, alone or joined with that before; one of another level starts anew with `add`."""
        before = self.selection
        if join == "replace" or before is None or (join == "add" and before.level != found.level):
            joined = found - found if before is None and join in ("remove", "intersect") else found
        elif join == "add":
            joined = before | found
        else:
            joined = before - found if join == "remove" else before & found
        return replace(self, selection=joined)

    def paint(self, painting: np.ndarray | None, level: int, join: Join = "replace") -> Workbench:
        """Select the tokens that were painted over. painting: [h, w, 4], painted where alpha is not 0."""
        grid = self.current().grid
        if painting is None or not painting[..., 3].any():
            raise UsageError("nothing is painted: draw over the tokens you mean, then press Use painting")
        return self.select(Selection.from_painting(painting, grid=grid, level=level), join)

    def reshape_selection(self, how: Literal["grow", "shrink", "invert", "clear"]) -> Workbench:
        """Grow or shrink the selection by one token all round, invert it or let go of it."""
        if how == "clear":
            return replace(self, selection=None)
        before = self.chosen()
        changes: dict[str, Callable[[], Selection]] = {
            "grow": before.grow,
            "shrink": before.shrink,
            "invert": before.__invert__,
        }
        return replace(self, selection=changes[how]())

    def chosen(self) -> Selection:
        """The selection. Raises UsageError where there is none."""
        if self.selection is None or not self.selection.count:
            raise UsageError("nothing is selected: click a token or a region on the board, or paint one")
        return self.selection

    def take(self, how: Literal["mean", "tokens"] = "mean") -> Workbench:
        """Remember the features of the selected tokens, their mean or one by one."""
        trajectory, selection = self.current(), self.chosen()
        take = mean_of if how == "mean" else tokens_of
        return replace(
            self,
            source=take(trajectory.levels[selection.level], selection),
            taken=selection.mask,
            taken_from=f"{how} of {selection.count} token{'' if selection.count == 1 else 's'} of level "
            f"{selection.level}, {trajectory.class_name}, "
            f"seed {trajectory.seeds[selection.level]}",
        )

    def use(self, source: Source, what: str) -> Workbench:
        """Remember features from elsewhere, such as a prototype."""
        return replace(self, source=source, taken=None, taken_from=what)

    def apply_features(self, strength: float = 1.0) -> Workbench:
        """Give the remembered features to the selected tokens."""
        trajectory, selection = self.current(), self.chosen()
        if self.source is None:
            raise UsageError(
                "no features were taken yet: select what they shall look like, in this or another trajectory, and "
                "press Take features; then select where they shall go"
            )
        return self._step(trajectory.edit_features(selection, self.source, strength))

    def apply_shape(self, region: int | None = None) -> Workbench:
        """Give the selected tokens to a region of their level, or to the one beside each."""
        return self._step(self.current().edit_shape(self.chosen(), region))

    def reshape_region(self, how: Literal["grow", "shrink"]) -> Workbench:
        """Move the border of the region that most selected tokens are of by one token; the selection follows."""
        trajectory, selection = self.current(), self.chosen()
        ids = trajectory.regions()[selection.level]
        region = int(ids[selection.mask].mode().values)
        inside = trajectory.region(region, level=selection.level)
        edit = trajectory.grow_region if how == "grow" else trajectory.shrink_region
        edited = edit(region, level=selection.level)
        return replace(self._step(edited), selection=inside.grow() if how == "grow" else inside.shrink())

    def resume(self, level: int | None = None, seeds: Seeds = None) -> Workbench:
        """Draw the levels after `level` again; None for the coarsest one edited since they were drawn last."""
        trajectory = self.current()
        if level is None:
            edits = itertools.takewhile(lambda entry: entry["edit"] != "resume", reversed(trajectory.history))
            level = min((entry["level"] for entry in edits), default=None)
        if level is None:
            raise UsageError(
                "nothing was edited since the levels were drawn: edit first, or choose which to keep"
            )
        return self._step(trajectory.resume(level, seeds))

    def undo(self) -> Workbench:
        """Take the last edit or resume back."""
        before = self.current()
        return replace(self, trajectory=before.undo(), undone=(*self.undone, before))

    def redo(self) -> Workbench:
        """Do what was undone last again. Raises UsageError where there is nothing."""
        if not self.undone:
            raise UsageError(
                "nothing to redo: what was undone is done again, or something else was done since"
            )
        return replace(self, trajectory=self.undone[-1], undone=self.undone[:-1])

    def comparison(self) -> tuple[Image.Image, list[dict[str, Any]]]:
        """The reference and the trajectory side by side, and a row of numbers for each level."""
        trajectory, reference = self.current(), self.reference
        assert reference is not None  # there is one as soon as there is a trajectory
        rows = compare(reference, trajectory, encode=encoder_of(trajectory))
        return comparison_png(reference, trajectory), rows

    def _step(self, trajectory: Trajectory) -> Workbench:
        return replace(self, trajectory=trajectory, undone=())


def history_lines(trajectory: Trajectory) -> list[str]:
    """Each step in words, first to last."""
    return [_line(entry) for entry in trajectory.history]


def _line(entry: Mapping[str, Any]) -> str:
    if entry["edit"] == "resume":
        seeds = ", ".join(map(str, entry["seeds"][entry["level"] + 1 :]))
        return f"drew the levels after {entry['level']} again, seeds {seeds or 'none'}"
    count = len(entry["tokens"])
    where = f"{count} token{'' if count == 1 else 's'} of level {entry['level']}"
    if entry["edit"] == "shape":
        region = entry["region"]
        return f"gave {where} to {'the regions beside them' if region is None else f'region {region}'}"
    source = entry["from"].get("source", "features")
    return f"gave {where} other features ({source}), strength {entry['strength']:g}"


def markdown_report(bench: Workbench) -> str:
    """What was made, what was done to it and what that changed, as Markdown."""
    trajectory = bench.current()
    _, rows = bench.comparison()
    model = Path(trajectory.model.get("folder", "unknown")).name
    lines = [
        f"# {trajectory.class_name}, seed {trajectory.seeds[0]}",
        "",
        f"- encoder: {trajectory.encoder.get('name', 'unknown')}",
        f"- model: {model}, weights {trajectory.model.get('ema', 'raw')}",
        f"- seeds of the levels: {', '.join(map(str, trajectory.seeds))}",
        f"- network evaluations per level: {trajectory.num_steps}",
        "",
        "## Steps",
        "",
        *(f"{number}. {line}" for number, line in enumerate(history_lines(trajectory) or ["none"], start=1)),
        "",
        "## Against the pinned trajectory",
        "",
        "1 − cos of tokens; LIS is its mean over tokens that were not edited (docs/metrics.md).",
        "",
    ]
    return "\n".join([*lines, *_table(rows), ""])


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    def text(value: Any) -> str:
        if isinstance(value, float):
            return "–" if math.isnan(value) else f"{value:.4g}"
        return str(value)

    head = [f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])]
    return [*head, *(f"| {' | '.join(map(text, row.values()))} |" for row in rows)]
