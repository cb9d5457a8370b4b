"""The same edit over many classes, seeds, levels and strengths, with two controls.

An edited trajectory can differ from the original for three reasons: the edit, other noise, and rounding. So each edit
has two controls: `no edit`, the same trajectory resumed from the same level with the same noise, and `other noise`,
resumed with the noise of another seed. Edits are compared with `no edit`. Controls do not depend on the strength: they
are measured once, on the tokens that the edit touches, and are repeated for every strength.

    K classes, ℓ* edited level, ℓ measured level
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from hierarchy_builder.errors import UsageError
from hierarchy_builder.progress import Follow, unseen
from trainer.evaluation.definitions import FIGURES
from trainer.metrics.spread import spread
from trainer.trajectories.compare import encoder_of, locality
from trainer.trajectories.edit import Source
from trainer.trajectories.pipeline import TrajectoryPipeline
from trainer.trajectories.selection import Selection
from trainer.trajectories.trajectory import Trajectory

Kind = Literal["features", "shape"]
KINDS: tuple[Kind, ...] = get_args(Kind)
EDIT, NO_EDIT, OTHER_NOISE = "edit", "no edit", "other noise"
OTHER_SEED = 2**31
"""Added to a seed, or subtracted from a large one, to get the seed of `other noise`."""
UNIT = ("label", "class", "seed")
SETTING = ("kind", "level", "strength", "arm", "measured")
BASELINES = (
    "Rows of “edit” and “other noise” are compared with the unedited trajectory, drawn again after the edited level "
    "from equal noise; rows of “no edit” compare that one with the original. The two controls do not depend on the "
    "strength."
)
"""Explains in tables what the numbers of a sweep are compared with."""
SHOWN = ("lis", "gain", "pixel_outside")
"""Measures that `summary_table` shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """The edits of a sweep."""

    labels: tuple[int, ...]
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    levels: tuple[int, ...] | None = None
    """Levels to edit; None means all."""
    strengths: tuple[float, ...] = (1.0,)
    """Strengths of feature edits; a shape edit grows the region by this many tokens, rounded up."""
    kind: Kind = "features"
    num_steps: int = 1
    """Network evaluations per level."""
    classes: tuple[int, ...] | None = None
    """Classes that inserted features may come from, such as those with real images; None means those of the run."""


def sweep(
    pipe: TrajectoryPipeline,
    config: SweepConfig,
    selection: Selection | None = None,
    follow: Follow = unseen,
) -> Iterator[dict[str, Any]]:
    """Rows of numbers, one for each class, seed, edited level, strength, arm and measured level ≥ the edited one.

    Each level is edited at `selection`, by default at the largest region of the object (`main_region`). A feature edit
    inserts the mean of the largest region of the object that the next class draws with the same seed.
    Columns: those of `compare.locality`, and label, class, seed, kind, level, strength, arm, measured, tokens.
    An impossible edit, such as growing a region that covers the whole canvas, gives no rows.
    Raises UsageError for an unknown level or kind.
    """
    num_levels = pipe.drawn_levels
    levels = tuple(range(num_levels)) if config.levels is None else config.levels
    if wrong := [level for level in levels if not 0 <= level < num_levels]:
        raise UsageError(f"level {wrong[0]}, expected 0 to {num_levels - 1}")
    if config.kind not in KINDS:
        raise UsageError(f"kind {config.kind!r}, expected one of {', '.join(KINDS)}")
    units = list(itertools.product(config.labels, config.seeds))
    classes = sorted(config.classes or pipe.classes)
    for label, seed in follow(units, "editing", len(units)):
        following = next((each for each in classes if each > label), classes[0])
        start, donor = (pipe(each, seed, num_steps=config.num_steps) for each in (label, following))
        unit = {"label": start.label, "class": start.class_name, "seed": seed}
        for level in levels:
            chosen = main_region(start, level) if selection is None else selection.at(level)
            for row in _arms(start, donor, chosen, config):
                yield {**unit, **row}


def parse_strengths(text: str) -> tuple[float, ...]:
    """Numbers separated by commas. Raises UsageError for anything else."""
    try:
        strengths = tuple(float(part) for part in text.split(","))
    except ValueError:
        strengths = (math.nan,)
    if not all(map(math.isfinite, strengths)):
        raise UsageError(f"strengths are {text!r}, expected numbers separated by commas such as 0.5,1")
    return strengths


def main_region(trajectory: Trajectory, level: int) -> Selection:
    """The largest region of a level except the background; of equally large ones, that with the lowest id."""
    ids = trajectory.regions()[level].long()
    sizes = torch.bincount(ids.flatten())
    if len(sizes) > 1:
        sizes[0] = 0
    return Selection.from_region(ids, int(sizes.argmax()), level=level)


def summarise(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean, standard deviation and 95 % interval of every measure over classes and seeds, for each setting.

    Columns: kind, level, strength, arm, measured, units, and <measure>_mean, _std, _low, _high.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in SETTING), []).append(row)
    summary = []
    for setting, members in groups.items():
        line = {**dict(zip(SETTING, setting, strict=True)), "units": len(members)}
        for name in members[0]:
            if name not in (*UNIT, *SETTING, "tokens"):
                values = spread(row[name] for row in members)._asdict()
                line |= {f"{name}_{part}": value for part, value in values.items() if part != "n"}
        summary.append(line)
    return summary


def summary_table(summary: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A summary for people: a row for each edited level, measure, arm and strength, a column for each measured level.

    Cells hold the mean and half the width of its interval. The controls of a measure stand below its edits; those that
    are equal at every strength get one row, with strength "any".
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    columns = {level: f"on level {level}" for level in sorted({line["measured"] for line in summary})}
    for line in summary:
        for name in SHOWN:
            mean, high = line.get(f"{name}_mean", math.nan), line.get(f"{name}_high", math.nan)
            if math.isnan(mean):
                continue
            place = {
                "level": line["level"],
                "measure": name,
                "arm": line["arm"],
                "strength": line["strength"],
            }
            row = rows.setdefault(tuple(place.values()), place | dict.fromkeys(columns.values(), ""))
            row[columns[line["measured"]]] = f"{mean:.2g}±{high - mean:.1g}"
    arms = EDIT, NO_EDIT, OTHER_NOISE
    shown = _without_repeats(list(rows.values()))
    return sorted(shown, key=lambda row: (row["level"], SHOWN.index(row["measure"]), arms.index(row["arm"])))


def table_in_words(summary: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`summary_table` for pages: measures by their names in words, and headings that say what a column holds."""
    headings = {"level": "edited level", "arm": "what was drawn"}
    return FIGURES.in_words(
        {headings.get(name, name): value for name, value in row.items()} for row in summary_table(summary)
    )


def _without_repeats(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replace the rows of a control by one if they are equal at every strength."""
    num_strengths = len({row["strength"] for row in rows})
    merged = [{**row, "strength": "any"} for row in rows]
    is_merged = [row["arm"] != EDIT and merged.count(row) == num_strengths > 1 for row in merged]
    return [
        merged[number] if is_merged[number] else row
        for number, row in enumerate(rows)
        if not (is_merged[number] and merged[number] in merged[:number])
    ]


def _arms(
    start: Trajectory, donor: Trajectory, chosen: Selection, config: SweepConfig
) -> Iterator[dict[str, Any]]:
    """Rows of one class, seed and level."""
    level, seed = chosen.level, start.seeds[-1]
    unedited = start.resume(level)
    others = start.resume(level, seed + OTHER_SEED if seed < OTHER_SEED else seed - OTHER_SEED)
    baselines: dict[tuple[int, ...], dict[str, Any]] = {}  # by the tokens an edit touches
    for strength in config.strengths:
        try:
            edited, touched, source = _edited(start, donor, chosen, config.kind, strength)
        except UsageError:
            continue
        how = (touched, source, encoder_of(start))
        if (place := tuple(touched.tokens)) not in baselines:
            baselines[place] = {
                NO_EDIT: locality(start, unedited, *how),
                OTHER_NOISE: locality(unedited, others, *how),
            }
        arms = {EDIT: locality(unedited, edited.resume(level), *how), **baselines[place]}
        for arm, found in arms.items():
            setting = {"kind": config.kind, "level": level, "strength": strength, "arm": arm}
            for measured, values in found.items():
                yield {**setting, "measured": measured, "tokens": touched.count, **values}


def _edited(
    start: Trajectory, donor: Trajectory, chosen: Selection, kind: Kind, strength: float
) -> tuple[Trajectory, Selection, Source]:
    """The edited trajectory, the tokens that the edit touched, and the features that it inserted."""
    if kind == "features":
        source = donor.mean_of(main_region(donor, chosen.level))
        return start.edit_features(chosen, source, strength), chosen, source
    ring = chosen.grow(max(1, int(-(-strength // 1)))) - chosen
    ids = start.regions()[chosen.level].long()
    region = int(ids[chosen.mask].mode().values)
    inside = Selection.from_region(ids, region, level=chosen.level)
    return start.edit_shape(ring, region), ring, start.mean_of(inside)
