"""The same edit over many classes, seeds, levels and strengths, each beside what happens without it.

An edited trajectory differs from another one for three reasons: the edit, other noise, and rounding. So each edit
comes with two arms without it: `no edit`, the same trajectory resumed from the same level with the same noise, and
`other noise`, resumed with that of another seed. Edits are measured against the first.

    K classes, ℓ* edited level, ℓ measured level
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from trainer.compare import Encode, encoder_of, locality
from trainer.edit import Source
from trainer.errors import UsageError
from trainer.metrics.spread import spread
from trainer.pipeline import TrajectoryPipeline
from trainer.selection import Selection
from trainer.trajectory import Trajectory

Kind = Literal["features", "shape"]
KINDS: tuple[Kind, ...] = ("features", "shape")
EDIT, NO_EDIT, OTHER_NOISE = "edit", "no edit", "other noise"
OTHER_SEED = 2**31
"""Added to (or, of large seeds, taken from) a seed for the noise of `other noise`."""
UNIT = ("label", "class", "seed")
SETTING = ("kind", "level", "strength", "arm", "measured")
SHOWN = ("lis", "gain", "pixel_outside")
"""Measures in the table of a summary."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """What is edited, and how."""

    labels: tuple[int, ...]
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    levels: tuple[int, ...] | None = None
    """Levels to edit; None all of them."""
    strengths: tuple[float, ...] = (1.0,)
    """Of feature edits; a shape edit grows the region by this many tokens, rounded up."""
    kind: Kind = "features"
    num_steps: int = 1
    """Network evaluations per level."""


def sweep(
    pipe: TrajectoryPipeline,
    config: SweepConfig,
    selection: Selection | None = None,
    encode: Encode | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of numbers, one for each class, seed, edited level, strength, arm and measured level ≥ the edited one.

    What is edited is `selection` taken at each level, else the largest region of the object (`main_region`). A feature
    edit puts in the mean of the largest region of the object that the next class draws with the same seed.
    Columns: those of `compare.locality`, and label, class, seed, kind, level, strength, arm, measured, tokens.
    An edit that cannot be made, such as growing a region that is the whole canvas, gives no rows.
    Raises UsageError for levels or a kind there are none of.
    """
    num_levels, num_classes = pipe.model.config.num_levels, pipe.model.config.num_classes
    levels = tuple(range(num_levels)) if config.levels is None else config.levels
    if wrong := [level for level in levels if not 0 <= level < num_levels]:
        raise UsageError(f"level {wrong[0]}, expected 0 to {num_levels - 1}")
    if config.kind not in KINDS:
        raise UsageError(f"kind {config.kind!r}, expected one of {', '.join(KINDS)}")
    for label in config.labels:
        for seed in config.seeds:
            start, donor = (pipe(each, seed, config.num_steps) for each in (label, (label + 1) % num_classes))
            judge = encode or encoder_of(start)
            unit = {"label": start.label, "class": start.class_name, "seed": seed}
            for level in levels:
                chosen = main_region(start, level) if selection is None else selection.at(level)
                for row in _arms(start, donor, chosen, config, judge):
                    yield {**unit, **row}


def main_region(trajectory: Trajectory, level: int) -> Selection:
    """The largest region of a level that is not the background (the lowest id of several)."""
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
    """A summary to be read: a row for each edited level, strength, arm and measure, a column for each measured level.

    Cells are the mean and half the width of its interval.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    columns = sorted({line["measured"] for line in summary})
    for line in summary:
        for name in SHOWN:
            mean, high = line.get(f"{name}_mean", math.nan), line.get(f"{name}_high", math.nan)
            if math.isnan(mean):
                continue
            place = {
                "level": line["level"],
                "strength": line["strength"],
                "arm": line["arm"],
                "measure": name,
            }
            row = rows.setdefault(tuple(place.values()), place | dict.fromkeys(map(_column, columns), ""))
            row[_column(line["measured"])] = f"{mean:.2g}±{high - mean:.1g}"
    return list(rows.values())


def _column(measured: int) -> str:
    return f"→{measured}"


def _arms(
    start: Trajectory, donor: Trajectory, chosen: Selection, config: SweepConfig, encode: Encode | None
) -> Iterator[dict[str, Any]]:
    """Rows of one class, seed and level."""
    level, seed = chosen.level, start.seeds[-1]
    unedited = start.resume(level)
    others = start.resume(level, seed + OTHER_SEED if seed < OTHER_SEED else seed - OTHER_SEED)
    for strength in config.strengths:
        try:
            edited, touched, source = _edited(start, donor, chosen, config.kind, strength)
        except UsageError:
            continue
        pairs = {
            EDIT: (unedited, edited.resume(level)),
            NO_EDIT: (start, unedited),
            OTHER_NOISE: (unedited, others),
        }
        for arm, (before, after) in pairs.items():
            setting = {"kind": config.kind, "level": level, "strength": strength, "arm": arm}
            for measured, values in locality(before, after, touched, source, encode).items():
                yield {**setting, "measured": measured, "tokens": touched.count, **values}


def _edited(
    start: Trajectory, donor: Trajectory, chosen: Selection, kind: Kind, strength: float
) -> tuple[Trajectory, Selection, Source]:
    """The edit, the tokens it touched, and the features it put in."""
    if kind == "features":
        source = donor.mean_of(main_region(donor, chosen.level))
        return start.edit_features(chosen, source, strength), chosen, source
    ring = chosen.grow(max(1, int(-(-strength // 1)))) - chosen
    ids = start.regions()[chosen.level].long()
    region = int(ids[chosen.mask].mode().values)
    inside = Selection.from_region(ids, region, level=chosen.level)
    return start.edit_shape(ring, region), ring, start.mean_of(inside)
