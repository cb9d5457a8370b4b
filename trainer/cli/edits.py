"""From options of a command to an edited trajectory: which tokens, which features, what then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hierarchy_builder.errors import MismatchError, TrainerError, UsageError
from trainer.trajectories.edit import Source, mean_of, prototype, tokens_of
from trainer.trajectories.pipeline import TrajectoryPipeline
from trainer.trajectories.selection import Selection
from trainer.trajectories.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Tokens of one level by any of these ways; several are united."""

    regions: tuple[int, ...] = ()
    """Ids that `trainer edit --list` prints."""
    places: str | None = None
    """Tokens as `row,column` pairs separated by spaces."""
    near: str | None = None
    """One token as `row,column`; also those of a cosine of at least `cosine` with it."""
    cosine: float = 0.9
    connected: bool = False
    """Of those near, only those that reach it over others."""
    painting: Path | None = None
    """Picture laid over the grid: tokens at least half covered by what is not black or transparent."""
    invert: bool = False

    def of(self, trajectory: Trajectory, level: int) -> Selection | None:
        """The selection, or None where nothing was asked for. Raises UsageError."""
        parts = []
        if self.regions:
            parts.append(trajectory.region(self.regions, level=level))
        if self.places:
            places = [parse_place(text) for text in self.places.split()]
            parts.append(Selection.from_coordinates(places, grid=trajectory.grid, level=level))
        if self.near:
            parts.append(
                trajectory.neighbours(
                    parse_place(self.near), level=level, cosine=self.cosine, connected=self.connected
                )
            )
        if self.painting:
            parts.append(Selection.from_painting(_painting(self.painting), grid=trajectory.grid, level=level))
        if not parts:
            return None
        joined = parts[0]
        for part in parts[1:]:
            joined = joined | part
        return ~joined if self.invert else joined


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What happens to the tokens: features of a source, or another region."""

    donor: Path | None = None
    """Trajectory file the features come from; None the edited one."""
    donor_level: int | None = None
    """None the edited level."""
    donor_region: int | None = None
    """None takes the donor's tokens at the places edited."""
    by: str = "mean"
    """`mean` of the donor's tokens, or `tokens` one by one."""
    vocabulary: Path | None = None
    prototype: int | None = None
    """Of the vocabulary, instead of a donor's tokens."""
    strength: float = 1.0
    to_region: int | None = None
    """Shape edit: the tokens join this region."""
    to_neighbours: bool = False
    """Shape edit: each token joins the region beside it."""
    grow: int = 0
    """Shape edit: the selected region takes the tokens around it, this many deep."""
    shrink: int = 0
    """Shape edit: it gives its outermost tokens, this many deep, to the regions beside it."""

    @property
    def num_shapes(self) -> int:
        """Shape edits asked for."""
        return sum([self.to_region is not None, self.to_neighbours, self.grow > 0, self.shrink > 0])

    @property
    def has_source(self) -> bool:
        """Whether features were named."""
        named = (self.donor, self.donor_region, self.donor_level, self.prototype)
        return any(value is not None for value in named)

    def apply(self, trajectory: Trajectory, selection: Selection) -> Trajectory:
        """The edited trajectory, not resumed. Raises UsageError for what was not asked for, or two things at once."""
        if self.num_shapes + self.has_source != 1:
            found = "found several" if self.num_shapes + self.has_source else "found tokens, but none"
            raise UsageError(
                f"one edit at a time, {found}: features (--from, --from-region, --prototype), --to-region, "
                "--to-neighbours, --grow or --shrink"
            )
        if self.has_source:
            return trajectory.edit_features(selection, self.source(trajectory, selection), self.strength)
        if self.grow or self.shrink:
            ids = trajectory.regions()[selection.level][selection.mask].unique().tolist()
            if len(ids) != 1:
                raise UsageError(f"--grow and --shrink take one region, the selection lies in {ids}")
            if self.grow:
                return trajectory.grow_region(ids[0], level=selection.level, steps=self.grow)
            return trajectory.shrink_region(ids[0], level=selection.level, steps=self.shrink)
        return trajectory.edit_shape(selection, self.to_region)

    def source(self, trajectory: Trajectory, selection: Selection) -> Source:
        """The features that selected tokens take."""
        if self.prototype is not None:
            if self.vocabulary is None:
                raise UsageError("--prototype needs --vocabulary FILE, the vocabulary.npz of a build")
            return prototype(self.vocabulary, self.prototype)
        if self.by not in ("mean", "tokens"):
            raise UsageError(f"--by {self.by}, expected mean or tokens")
        donor = trajectory if self.donor is None else Trajectory.load(self.donor)
        level = selection.level if self.donor_level is None else self.donor_level
        if not 0 <= level < donor.num_levels:
            raise UsageError(f"--from-level {level}, expected 0 to {donor.num_levels - 1}")
        if self.donor_region is None:
            chosen = selection.at(level)
        else:
            chosen = donor.region(self.donor_region, level=level)
        return (mean_of if self.by == "mean" else tokens_of)(donor.levels[level], chosen)


def edited(
    trajectory: Trajectory, level: int | None, tokens: Tokens, change: Change, *, undo: int = 0
) -> Trajectory:
    """Take back `undo` steps, then change the tokens asked for; the trajectory itself where nothing was.

    Raises UsageError for tokens without a change or a level, or a change without tokens.
    """
    for _ in range(undo):
        trajectory = trajectory.undo()
    if tokens == Tokens():
        if change.num_shapes or change.has_source:
            raise UsageError("nothing is selected: name tokens by --region, --tokens, --near or --mask")
        return trajectory
    if level is None:
        raise UsageError("tokens belong to a level: give --level, 0 the coarsest")
    selection = tokens.of(trajectory, level)
    return trajectory if selection is None else change.apply(trajectory, selection)


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


def region_map(trajectory: Trajectory, level: int) -> str:
    """The ids of a level as text, one character a token: 0-9, a-z, then +."""
    signs = "0123456789abcdefghijklmnopqrstuvwxyz"
    ids = trajectory.regions_of(level).tolist()
    return "\n".join(" ".join(signs[each] if each < len(signs) else "+" for each in row) for row in ids)


def model_of(
    trajectory: Trajectory,
    run: Path | None = None,
    decoder: Path | None = None,
    weak: Path | None = None,
) -> TrajectoryPipeline:
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
        return TrajectoryPipeline.from_pretrained(
            folder, trajectory.model.get("ema", "auto"), decoder, weak=weak
        )
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
        with Image.open(path) as picture:
            rgba = np.asarray(picture.convert("RGBA"))
    except (OSError, ValueError) as error:
        raise TrainerError(f"{path} is not a picture that can be read: {error}") from None
    return (rgba[..., 3] > 0) & (rgba[..., :3].max(axis=2) > 0)
