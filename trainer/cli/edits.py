"""From options of a command to an edited trajectory: which tokens, which features, what then."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hierarchy_builder.errors import MismatchError, TrainerError, UsageError
from hierarchy_builder.files.untrusted.pictures import UNREADABLE, open_picture
from hierarchy_builder.terminal import show_value
from trainer.cli.options import SHAPE, SOURCE, names_given
from trainer.trajectories.edit import Source, mean_of, prototype, tokens_of
from trainer.trajectories.pipeline import TrajectoryPipeline
from trainer.trajectories.selection import Selection
from trainer.trajectories.trajectory import Trajectory

NOT_SHOWN = ("edit", "level", "first_level", "seeds_before")
"""Entries of a step that have a column of their own, or that only `undo` needs."""


def select(trajectory: Trajectory, level: int, given: Mapping[str, Any]) -> Selection | None:
    """The tokens of a level that the options of `SELECTION` name, all ways united; None where none of them is given."""
    parts = []
    if given.get("region"):
        parts.append(trajectory.region(given["region"], level=level))
    if given["tokens"]:
        places = [parse_place(text) for text in given["tokens"].split()]
        parts.append(Selection.from_coordinates(places, grid=trajectory.grid, level=level))
    if given.get("near"):
        cosine, connected = given["cosine"], given["connected"]
        place = parse_place(given["near"])
        parts.append(trajectory.neighbours(place, level=level, cosine=cosine, connected=connected))
    if given["mask"]:
        parts.append(Selection.from_painting(_painting(given["mask"]), grid=trajectory.grid, level=level))
    if not parts:
        return None
    joined = functools.reduce(operator.or_, parts)
    return ~joined if given.get("invert") else joined


def edited(trajectory: Trajectory, level: int | None, given: Mapping[str, Any]) -> Trajectory:
    """Take back --undo edits, then change the tokens that are selected; the trajectory itself where none are.

    given: values of the options of `edit` by name. Raises UsageError for tokens without a change or a level, a change
    without tokens, or two changes at once.
    """
    for _ in range(given["undo"]):
        trajectory = trajectory.undo_edit()
    changes = names_given(SHAPE, given) + ["source"] * bool(names_given(SOURCE, given))
    if not any(given[name] for name in ("region", "tokens", "near", "mask")):
        if changes:
            raise UsageError("nothing is selected: name tokens by --region, --tokens, --near or --mask")
        return trajectory
    if level is None:
        raise UsageError("tokens belong to a level: give --level, 0 the coarsest")
    selection = select(trajectory, level, given)
    assert selection is not None
    if len(changes) != 1:
        raise UsageError(
            f"one edit at a time, {'found several' if changes else 'found tokens, but none'}: features (--from, "
            "--from-region, --prototype), --to-region, --to-neighbours, --grow or --shrink"
        )
    if changes == ["source"]:
        return trajectory.edit_features(selection, _source(trajectory, selection, given), given["strength"])
    if changes[0] in ("to_region", "to_neighbours"):
        return trajectory.edit_shape(selection, given["to_region"])
    ids = trajectory.regions()[level][selection.mask].unique().tolist()
    if len(ids) != 1:
        raise UsageError(f"--grow and --shrink take one region, the selection lies in {ids}")
    change = trajectory.grow_region if given["grow"] else trajectory.shrink_region
    return change(ids[0], level=level, steps=given["grow"] or given["shrink"])


def _source(trajectory: Trajectory, selection: Selection, given: Mapping[str, Any]) -> Source:
    """The features that the selected tokens take."""
    if given["prototype"] is not None:
        if given["vocabulary"] is None:
            raise UsageError("--prototype needs --vocabulary FILE, the vocabulary.npz of a build")
        return prototype(given["vocabulary"], given["prototype"])
    if given["by"] not in ("mean", "tokens"):
        raise UsageError(f"--by {given['by']}, expected mean or tokens")
    donor = trajectory if given["donor"] is None else Trajectory.load(given["donor"])
    level = selection.level if given["from_level"] is None else given["from_level"]
    if not 0 <= level < donor.num_levels:
        raise UsageError(f"--from-level {level}, expected 0 to {donor.num_levels - 1}")
    if given["from_region"] is None:
        chosen = selection.at(level)
    else:
        chosen = donor.region(given["from_region"], level=level)
    return (mean_of if given["by"] == "mean" else tokens_of)(donor.levels[level], chosen)


def region_rows(trajectory: Trajectory, level: int | None = None) -> list[dict[str, Any]]:
    """Regions of one level or of all but the last, one row each: level, region, tokens, first token, bounding box."""
    levels = range(trajectory.num_levels - 1) if level is None else [level]
    rows = []
    for number in levels:
        regions = trajectory.regions_of(number).numpy()
        for region in np.unique(regions):
            places = np.argwhere(regions == region)
            (top, left), (bottom, right) = places.min(axis=0).tolist(), places.max(axis=0).tolist()
            rows.append(
                {
                    "level": number,
                    "region": int(region),
                    "tokens": len(places),
                    "first": ",".join(map(str, places[0].tolist())),
                    "rows": f"{top}-{bottom}",
                    "columns": f"{left}-{right}",
                }
            )
    return rows


def history_rows(trajectory: Trajectory) -> list[dict[str, Any]]:
    """What was done to a trajectory, oldest first, one row for each step."""
    rows = []
    for number, entry in enumerate(trajectory.history, start=1):
        shown = {name: value for name, value in entry.items() if name not in NOT_SHOWN}
        if tokens := entry.get("tokens"):
            shown["tokens"] = len(tokens)
        rows.append(
            {
                "step": number,
                "what": "drawn again" if entry.get("edit") == "resume" else f"edit of {entry.get('edit')}",
                "level": entry.get("level"),
                "details": show_value({name.replace("_", " "): value for name, value in shown.items()}),
            }
        )
    return rows


def region_map(trajectory: Trajectory, level: int) -> str:
    """The ids of a level as text, one character a token: 0-9, a-z, then +."""
    signs = "0123456789abcdefghijklmnopqrstuvwxyz"
    ids = trajectory.regions_of(level).tolist()
    return "\n".join(" ".join(signs[each] if each < len(signs) else "+" for each in row) for row in ids)


def model_of(trajectory: Trajectory, run: Path | None = None, weak: Path | None = None) -> TrajectoryPipeline:
    """The pipeline that drew a trajectory. run: where it lies now; None where the file says.

    Raises UsageError if nothing says where, MismatchError if other weights drew it.
    """
    folder = str(run) if run is not None else trajectory.model.get("folder")
    if folder is None:
        raise UsageError("the trajectory does not say what drew it: give --run RUN")
    drawn_by = trajectory.model.get("folder")
    if run is not None and drawn_by is not None:
        # The checkpoint of that name, where the run still has it.
        same = run / "checkpoints" / Path(drawn_by).name
        folder = str(same) if same.exists() else folder
    try:
        return TrajectoryPipeline.from_pretrained(folder, trajectory.model.get("ema", "auto"), weak=weak)
    except MismatchError:
        raise
    except TrainerError as error:
        hint = "" if run is not None else "; if the run has moved, give --run RUN"
        raise TrainerError(f"{error}{hint}") from None


def parse_place(text: str) -> tuple[int, int]:
    """`row,column` → two numbers. Raises UsageError."""
    parts: Sequence[str] = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"token {text!r}, expected row,column such as 3,12")
    return int(parts[0]), int(parts[1])


def _painting(path: Path) -> np.ndarray:
    """bool [h, w]: what is neither transparent nor black."""
    try:
        with open_picture(path) as picture:
            rgba = np.asarray(picture.convert("RGBA"))
    except UNREADABLE as error:
        raise TrainerError(f"{path} is not a picture that can be read: {error}") from None
    return (rgba[..., 3] > 0) & (rgba[..., :3].max(axis=2) > 0)
