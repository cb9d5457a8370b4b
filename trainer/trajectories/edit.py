"""Edits of one canvas: tokens take other features, or move to another region.

    H×W grid of tokens, C channels, n selected tokens (row-major)

Two edits, as in Trajectory Forcing (arXiv 2606.22527, "Editing"): a feature edit replaces the features of selected
tokens by those of a source, a shape edit gives tokens to another region, whose mean they take. Both act on one
canvas, without levels, networks or files; `trajectory.Trajectory` applies them and draws the finer levels again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hierarchy_builder.errors import TrainerError, UsageError
from hierarchy_builder.fields import brief
from hierarchy_builder.files.untrusted.arrays import parse_npz
from trainer.trajectories.selection import Selection


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Source:
    """The features that selected tokens take."""

    __repr__ = brief

    features: Tensor
    """float32 [n, C], one row for each of `places`, or [1, C] for all tokens."""
    places: Tensor | None = None
    """int64 [n, 2]: row and column that each feature was taken from; None for a single feature."""
    note: Mapping[str, Any] = field(default_factory=dict)
    """Where the features come from, as plain data for the history."""

    def over(self, selection: Selection) -> Tensor:
        """Return the feature that each selected token takes, float32 [n, C] in row-major order.

        The bounding boxes of source and target are laid over each other, and each token takes the nearest token of the
        source. Regions of equal shape therefore match one to one, wherever they lie.
        """
        if self.places is None:
            return self.features.expand(selection.count, -1)
        distance = torch.cdist(_in_box(selection.mask.nonzero()), _in_box(self.places))
        return self.features[distance.argmin(dim=1)]


def mean_of(canvas: Tensor, selection: Selection) -> Source:
    """Return the mean of the selected tokens. canvas: float [H, W, C] of the selection's level."""
    return Source(
        features=_selected(canvas, selection).mean(dim=0, keepdim=True),
        note={"source": "mean", **selection.to_json()},
    )


def tokens_of(canvas: Tensor, selection: Selection) -> Source:
    """Return the selected tokens one by one. canvas: float [H, W, C] of the selection's level."""
    return Source(
        features=_selected(canvas, selection),
        places=selection.mask.nonzero(),
        note={"source": "tokens", **selection.to_json()},
    )


def prototype(vocabulary: str | Path, number: int, *, level: int = -1) -> Source:
    """Read one prototype of a vocabulary.npz that the builder fitted to features of the same encoder.

    level: of the vocabulary, coarse → fine, −1 the finest. Raises TrainerError for a file that is no vocabulary,
    UsageError for a prototype it does not hold.
    """
    try:
        with open(vocabulary, "rb") as file:
            content = parse_npz(file)
        found = [f"centroids_{number}" for number in range(len(content)) if f"centroids_{number}" in content]
        if not found or any(content[name].ndim != 2 or content[name].dtype.kind != "f" for name in found):
            raise ValueError("it holds no centroids_0 [K, C]; expected a vocabulary.npz of the builder")
    except (OSError, ValueError) as error:
        raise TrainerError(f"vocabulary {vocabulary} cannot be read: {error}") from None
    levels = len(found)
    if not -levels <= level < levels:
        raise UsageError(f"{vocabulary} has levels 0 to {levels - 1}, not {level}")
    centroids = content[found[level]]
    if not 0 <= number < len(centroids):
        raise UsageError(f"{vocabulary} has prototypes 0 to {len(centroids) - 1} on that level, not {number}")
    features = torch.from_numpy(np.asarray(centroids[number : number + 1], dtype=np.float32))
    return Source(features=features, note={"source": "prototype", "number": number, "level": level})


def as_source(features: Tensor | Source, selection: Selection) -> Source:
    """Make a source of features: [C] for all tokens, [n, C] for each selected one, or a canvas [H, W, C].

    A Source is returned as it is.
    """
    if isinstance(features, Source):
        return features
    features = features.detach().cpu().float()
    note = {"source": "features"}
    if features.ndim == 1:
        return Source(features=features[None], note=note)
    if features.ndim == 3 and tuple(features.shape[:2]) == selection.grid:
        features = features[selection.mask]
    if features.ndim != 2 or len(features) != selection.count:
        raise UsageError(
            f"source has shape {tuple(features.shape)}, expected [C], one feature for each of the {selection.count} "
            f"selected tokens, or a canvas of {selection.grid}"
        )
    return Source(features=features, places=selection.mask.nonzero(), note=note)


def replace_features(canvas: Tensor, selection: Selection, source: Source, strength: float = 1.0) -> Tensor:
    """Return a copy of canvas [H, W, C] whose selected tokens are (1 − strength)·token + strength·source.

    strength: 0 changes nothing, 1 takes the source, more extrapolates. Other tokens keep their bits.
    Raises UsageError for a strength that is not finite, or a source of another width.
    """
    if not math.isfinite(strength):
        raise UsageError(f"strength is {strength}, expected a number, 0 for no change and 1 for the source")
    features = source.over(selection)
    if features.shape[-1] != canvas.shape[-1]:
        raise UsageError(
            f"the source has {features.shape[-1]} channels, the canvas {canvas.shape[-1]}: take one of the same encoder"
        )
    edited = canvas.clone()
    # Written as a difference, so that strength 0 or a source equal to the token returns the token bit for bit.
    tokens = canvas[selection.mask]
    edited[selection.mask] = features if strength == 1 else tokens + strength * (features - tokens)
    return edited


def move_tokens(
    canvas: Tensor, regions: Tensor, selection: Selection, region: int | None = None
) -> tuple[Tensor, Tensor]:
    """Give the selected tokens to a region, whose mean over the canvas they take.

    canvas: float [H, W, C]. regions: integer [H, W], of that canvas. region: the new region; None moves each token to
    the other region that most of its four neighbours belong to (the lowest id of several), from the border inwards.
    Returns the edited canvas and regions; tokens that stay where they are keep their bits. Raises UsageError for a
    region that does not exist, and for tokens without another region next to them.
    """
    regions = regions.long()
    if region is None:
        moved = _to_neighbours(regions, selection)
    elif (regions == region).any():
        moved = torch.where(selection.mask, region, regions)
    else:
        raise UsageError(f"level {selection.level} has no region {region}, only 0 to {int(regions.max())}")
    edited = canvas.clone()
    is_moved = moved != regions
    for target in moved[is_moved].unique():
        edited[is_moved & (moved == target)] = canvas[regions == target].mean(dim=0)
    return edited, moved.to(torch.uint8)


def _to_neighbours(regions: Tensor, selection: Selection) -> Tensor:
    height, width = regions.shape
    moved = regions.clone()
    waiting = [divmod(token, width) for token in selection.tokens]
    while waiting:
        inside = set(waiting)
        targets = {}
        for y, x in waiting:
            around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            ids = [
                int(moved[place])
                for place in around
                if 0 <= place[0] < height and 0 <= place[1] < width and place not in inside
            ]
            others = [each for each in ids if each != int(regions[y, x])]
            if others:
                targets[y, x] = min(others, key=lambda each: (-others.count(each), each))
        if not targets:
            raise UsageError(
                f"{len(waiting)} of the selected tokens touch no other region: select tokens at a border, or name "
                "the region they shall join"
            )
        for place, target in targets.items():
            moved[place] = target
        waiting = [place for place in waiting if place not in targets]
    return moved


def _selected(canvas: Tensor, selection: Selection) -> Tensor:
    selection.require((canvas.shape[0], canvas.shape[1]), selection.level)
    return canvas.detach().cpu().float()[selection.mask]


def _in_box(places: Tensor) -> Tensor:
    """Return positions relative to their bounding box, from 0 to 1, and 0.5 where the box is one token wide."""
    low, high = places.amin(dim=0), places.amax(dim=0)
    relative = (places - low) / (high - low).clamp(min=1)
    return torch.where(high > low, relative, 0.5).double()
