"""What edits look like on a page: before, after and change of each, and sweeps with their intervals.

L levels (coarse → fine), H×W grid of tokens
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hierarchy_builder.canvases.gallery import Gallery, LevelViewer, Plots, Section, Table, View
from hierarchy_builder.canvases.plots import Plot, Series
from hierarchy_builder.canvases.views import latent_views, level_names, shared_palette
from hierarchy_builder.errors import TrainerError
from hierarchy_builder.files import without_nan
from trainer.evaluation.sweep import BASELINES, SETTING, summary_table
from trainer.metrics.edit_locality import token_change
from trainer.trajectories.compare import compare, encoder_of, heat_map
from trainer.trajectories.trajectory import Trajectory

EDITS_TEXT = (
    "Before and after an edit, and how far each token moved (1 − cos, as light as its share of the largest change of "
    "the card). Levels before the edited one are equal bit for bit; LIS is the mean change of tokens that were not "
    "edited."
)
SWEEP_TEXT = (
    "The same edit over classes and seeds, beside the same trajectories without it (no edit) and with other noise: "
    "what lies above both is the edit's own effect. Bands are 95 % intervals of the mean. Curves are of the greatest "
    "strength; the table has all."
)
PLOTTED = {"lis": "LIS, tokens not edited", "inside": "change of edited tokens"}
COMPARED = ("level", "change", "changed_share", "lis", "inside")


def unedited(trajectory: Trajectory) -> Trajectory:
    """As it was first made. Raises TrainerError where nothing was done to it."""
    if not trajectory.replaced:
        raise TrainerError(
            f"the trajectory of {trajectory.class_name} was not edited: give files that `trainer edit` or the studio "
            "wrote"
        )
    before = trajectory
    while before.replaced:
        before = before.undo()
    return before


def edits_section(edited: Sequence[Trajectory]) -> Section:
    """A card and a few rows of numbers for each edited trajectory, against what it was first."""
    pairs = [(unedited(trajectory), trajectory) for trajectory in edited]
    rows = [
        {"edit": f"{after.class_name}, seed {after.seeds[0]}"} | {name: row[name] for name in COMPARED}
        for before, after in pairs
        for row in without_nan(compare(before, after, encode=encoder_of(after)))
    ]
    cards = Gallery(viewers=[_card(before, after) for before, after in pairs], start=-1)
    return Section(
        title="Edits",
        text=EDITS_TEXT,
        blocks=[cards, Table(rows=rows, caption="Against what was first drawn.")],
    )


def read_sweep(path: Path) -> list[dict[str, Any]]:
    """The summary of what `trainer sweep --out` wrote. Raises TrainerError for another file."""
    try:
        summary = json.loads(path.read_text())["summary"]
        if not summary or any(name not in row for row in summary for name in SETTING):
            raise KeyError("summary")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainerError(f"{path} is not what `trainer sweep --out` writes: {error!r}") from None
    nothing = float("nan")
    return [{name: nothing if value is None else value for name, value in row.items()} for row in summary]


def sweep_section(summary: Sequence[Mapping[str, Any]]) -> Section:
    """Curves over the measured levels, one plot for each measure and edited level, and the table of a sweep."""
    strongest = max(row["strength"] for row in summary)
    plots = [
        _plot(
            [row for row in summary if row["level"] == level and row["strength"] == strongest],
            name,
            title,
            level,
        )
        for level in sorted({row["level"] for row in summary})
        for name, title in PLOTTED.items()
        if f"{name}_mean" in summary[0]
    ]
    return Section(
        title="Sweep of edits",
        text=SWEEP_TEXT,
        blocks=[Plots(plots=plots), Table(rows=summary_table(summary), caption=BASELINES)],
    )


def _card(before: Trajectory, after: Trajectory) -> LevelViewer:
    change = token_change(before.levels, after.levels).numpy()
    palette = shared_palette([before.levels.numpy()])
    is_decoded = before.can_decode and after.can_decode
    first, second = (
        each.decode() if is_decoded else latent_views(each.levels.numpy(), None, palette)[0].layers
        for each in (before, after)
    )
    layers = {"before": first, "after": second, "change": heat_map(change, float(change.max()))}
    return LevelViewer(
        title=after.class_name,
        subtitle=f"seed {after.seeds[0]}",
        level_names=level_names(after.num_levels),
        views=[View(name=name, layers=pictures) for name, pictures in layers.items()],
        notes={"steps": len(after.history)},
    )


def _plot(rows: Sequence[Mapping[str, Any]], name: str, title: str, level: int) -> Plot:
    series = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        values = {part: [row[f"{name}_{part}"] for row in own] for part in ("mean", "low", "high")}
        series.append(
            Series(
                name=arm,
                x=[row["measured"] for row in own],
                y=values["mean"],
                low=values["low"],
                high=values["high"],
            )
        )
    return Plot(title=f"{title}; level {level} edited", x_label="measured level", series=series)
