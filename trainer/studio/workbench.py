"""The actions of the studio, as steps from one state to the next, without any browser code.

States are immutable: every step returns a new state, or raises UsageError that says what to do instead.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from hierarchy_builder.errors import UsageError
from hierarchy_builder.terminal import counted
from trainer.trajectories.compare import compare, comparison_png, encoder_of
from trainer.trajectories.edit import Source, mean_of, tokens_of
from trainer.trajectories.selection import Selection
from trainer.trajectories.trajectory import Seeds, Trajectory

Pick = Literal["region", "token", "similar"]
"""What a click selects: the whole region, one token, or all connected tokens that resemble it."""
Join = Literal["replace", "add", "remove", "intersect"]
"""How a new selection is combined with the one before."""


MOST_EARLIER = 10
"""Opened trajectories that undo can lead back to."""
MARKS = re.compile(r"([\\`*_{}\[\]()#|!~$&@]|:(?=//)|(?<=www)\.)", re.IGNORECASE)
"""Characters that Markdown reads as marks, also of a plain address; all but `<`, which is written as an entity."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Workbench:
    """The edited trajectory, the selection, the features taken for later use, and the reference of comparisons."""

    trajectory: Trajectory | None = None
    reference: Trajectory | None = None
    """The trajectory as it was generated, loaded or last pinned; comparisons are with it."""
    selection: Selection | None = None
    source: Source | None = None
    """Features that `take` or `use` stored for feature edits of any trajectory."""
    taken_from: str = ""
    """Where `source` comes from, shown to the user."""
    undone: tuple[Trajectory, ...] = ()
    """Steps that redo can repeat, in the order they were undone."""
    kept: Trajectory | None = None
    """The trajectory as it was opened or last saved; what differs from it is not saved."""
    earlier: tuple[Workbench, ...] = ()
    """What was on the bench before other trajectories were opened, so that undo leads back to it."""

    def open(self, trajectory: Trajectory) -> Workbench:
        """Start with a generated or loaded trajectory; taken features are kept."""
        before = () if self.trajectory is None else (replace(self, earlier=()),)
        return replace(
            self,
            trajectory=trajectory,
            reference=trajectory,
            selection=None,
            undone=(),
            kept=trajectory,
            earlier=(*self.earlier, *before)[-MOST_EARLIER:],
        )

    def saved(self) -> Workbench:
        """Note that the current trajectory is in a file now."""
        return replace(self, kept=self.current())

    @property
    def is_unsaved(self) -> bool:
        """Whether the trajectory has edits that are in no file."""
        return (
            self.trajectory is not None
            and self.kept is not None
            and self.trajectory.history != self.kept.history
        )

    def current(self) -> Trajectory:
        """The trajectory. Raises UsageError if there is none."""
        if self.trajectory is None:
            raise UsageError("there is no trajectory yet: choose a class and a seed and press Generate")
        return self.trajectory

    def pin(self) -> Workbench:
        """Make the current trajectory the reference of comparisons."""
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
        """Select what a click on a token of a level means, see `Pick` and `Join`."""
        trajectory = self.current()
        if pick == "similar":
            found = trajectory.neighbours((row, column), level=level, cosine=cosine, connected=True)
        elif pick == "region" and level < trajectory.num_levels - 1:
            found = trajectory.region(int(trajectory.regions()[level, row, column]), level=level)
        else:  # on the last level every token is its own region
            found = Selection.from_coordinates([(row, column)], grid=trajectory.grid, level=level)
        return self.select(found, join)

    def select(self, found: Selection, join: Join = "replace") -> Workbench:
        """Combine a selection with the one before; `add` on another level replaces it."""
        before = self.selection
        if join == "replace" or before is None or (join == "add" and before.level != found.level):
            joined = found - found if before is None and join in ("remove", "intersect") else found
        elif join == "add":
            joined = before | found
        else:
            joined = before - found if join == "remove" else before & found
        return replace(self, selection=joined)

    def paint(self, painting: np.ndarray | None, level: int, join: Join = "replace") -> Workbench:
        """Select the tokens under a painting. painting: [h, w, 4], painted where alpha is not 0."""
        grid = self.current().grid
        if painting is None or not painting[..., 3].any():
            raise UsageError("nothing is painted: paint over the tokens to select, then press Use painting")
        return self.select(Selection.from_painting(painting, grid=grid, level=level), join)

    def reshape_selection(self, how: Literal["grow", "shrink", "invert", "clear"]) -> Workbench:
        """Grow or shrink the selection by one token on all sides, invert it, or clear it."""
        if how == "clear":
            return replace(self, selection=None)
        changes = {"grow": Selection.grow, "shrink": Selection.shrink, "invert": Selection.__invert__}
        return replace(self, selection=changes[how](self.chosen()))

    def chosen(self) -> Selection:
        """The selection. Raises UsageError if no token is selected."""
        if self.selection is None or not self.selection.count:
            raise UsageError("nothing is selected: click a token or a region on the board, or paint one")
        return self.selection

    def take(self, how: Literal["mean", "tokens"] = "mean") -> Workbench:
        """Store the features of the selected tokens: their mean, or one by one."""
        trajectory, selection = self.current(), self.chosen()
        take = mean_of if how == "mean" else tokens_of
        return replace(
            self,
            source=take(trajectory.levels[selection.level], selection),
            taken_from=f"{how} of {counted(selection.count, 'token')} of level {selection.level} "
            f"(class {trajectory.class_name}, seed {trajectory.seeds[selection.level]})",
        )

    def use(self, source: Source, what: str) -> Workbench:
        """Store features from elsewhere, such as a prototype."""
        return replace(self, source=source, taken_from=what)

    def apply_features(self, strength: float = 1.0) -> Workbench:
        """Replace the features of the selected tokens by the stored ones."""
        trajectory, selection = self.current(), self.chosen()
        if self.source is None:
            raise UsageError(
                "no features were taken yet: select tokens, in this or another trajectory, and press Take mean or Take "
                "token by token; then select the tokens to change"
            )
        return self._step(trajectory.edit_features(selection, self.source, strength))

    def apply_shape(self, region: int | None = None) -> Workbench:
        """Merge the selected tokens into a region of their level, or each into its neighbouring region."""
        return self._step(self.current().edit_shape(self.chosen(), region))

    def reshape_region(self, how: Literal["grow", "shrink"]) -> Workbench:
        """Move the border of the region that holds most selected tokens by one token; the selection follows."""
        trajectory, selection = self.current(), self.chosen()
        ids = trajectory.regions()[selection.level]
        region = int(ids[selection.mask].mode().values)
        inside = trajectory.region(region, level=selection.level)
        edit = trajectory.grow_region if how == "grow" else trajectory.shrink_region
        edited = edit(region, level=selection.level)
        return replace(self._step(edited), selection=inside.grow() if how == "grow" else inside.shrink())

    def resume(self, level: int | None = None, seeds: Seeds = None) -> Workbench:
        """Draw the levels after `level` again; None for the coarsest level edited since the last drawing."""
        trajectory = self.current()
        if level is None:
            edits = itertools.takewhile(lambda entry: entry["edit"] != "resume", reversed(trajectory.history))
            level = min((entry["level"] for entry in edits), default=None)
        if level is None:
            raise UsageError(
                "no level was edited since the last drawing: edit first, or choose the levels to keep"
            )
        return self._step(trajectory.resume(level, seeds))

    def undo(self) -> Workbench:
        """Undo the last edit or resume; before the first one, go back to the trajectory that was open before."""
        before = self.current()
        if not before.replaced and self.earlier:
            *others, last = self.earlier
            return replace(last, earlier=tuple(others), source=self.source, taken_from=self.taken_from)
        return replace(self, trajectory=before.undo(), undone=(*self.undone, before))

    def redo(self) -> Workbench:
        """Repeat the step that was undone last. Raises UsageError if there is none."""
        if not self.undone:
            raise UsageError("nothing to redo: no step was undone since the last edit")
        return replace(self, trajectory=self.undone[-1], undone=self.undone[:-1])

    def comparison(self) -> tuple[Image.Image, list[dict[str, Any]]]:
        """The reference and the trajectory side by side, and a row of numbers for each level."""
        trajectory, reference = self.current(), self.reference
        assert reference is not None  # every trajectory is opened with one
        rows = compare(reference, trajectory, encode=encoder_of(trajectory))
        return comparison_png(reference, trajectory), rows

    def _step(self, trajectory: Trajectory) -> Workbench:
        return replace(self, trajectory=trajectory, undone=())


def history_lines(trajectory: Trajectory) -> list[str]:
    """One line for each edit and resume, first to last."""
    return [_line(entry) for entry in trajectory.history]


def _line(entry: Mapping[str, Any]) -> str:
    if entry["edit"] == "resume":
        seeds = ", ".join(map(str, entry["seeds"][entry["level"] + 1 :]))
        return f"drew the levels after {entry['level']} again, seeds {seeds or 'none'}"
    where = f"{counted(len(entry['tokens']), 'token')} of level {entry['level']}"
    if entry["edit"] == "shape":
        region = entry["region"]
        return f"merged {where} into {'neighbouring regions' if region is None else f'region {region}'}"
    source = entry["from"].get("source", "features")
    return f"replaced the features of {where} ({source}), strength {entry['strength']:g}"


def markdown_report(bench: Workbench) -> str:
    """A report in Markdown: how the trajectory was generated, its edits, and what they changed."""
    trajectory = bench.current()
    _, rows = bench.comparison()
    model = Path(trajectory.model.get("folder", "unknown")).name
    lines = [
        f"# {quoted(trajectory.class_name)}, seed {trajectory.seeds[0]}",
        "",
        f"- encoder: {quoted(trajectory.encoder.get('name', 'unknown'))}",
        f"- model: {quoted(model)}, weights {trajectory.model.get('ema', 'raw')}",
        f"- seeds of the levels: {', '.join(map(str, trajectory.seeds))}",
        f"- network evaluations per level: {trajectory.num_steps}, temperature {trajectory.temperature:g}",
        "",
        "## Steps",
        "",
        *(
            f"{number}. {quoted(line)}"
            for number, line in enumerate(history_lines(trajectory) or ["none"], start=1)
        ),
        "",
        "## Compared with the pinned trajectory",
        "",
        "Changes are 1 − cos of tokens; LIS is the mean over tokens that were not edited (docs/metrics.md).",
        "",
    ]
    return "\n".join([*lines, *markdown_table(rows), ""])


def quoted(text: object) -> str:
    """Text as Markdown that shows it as it is: names and messages may hold what would be a picture or a link."""
    return MARKS.sub(r"\\\1", " ".join(str(text).split())).replace("<", "&lt;")


def markdown_table(rows: Sequence[Mapping[str, Any]], digits: int = 4) -> list[str]:
    """Rows as the lines of a table in Markdown. No cell may hold what a user wrote."""

    def text(value: Any) -> str:
        if isinstance(value, float):
            return "–" if math.isnan(value) else f"{value:.{digits}g}"
        return str(value)

    head = [f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])]
    return [*head, *(f"| {' | '.join(map(text, row.values()))} |" for row in rows)]
