"""Turns teacher hierarchies and level canvases into cards of a page.

L levels (coarse → fine), H×W grid of tokens, C channels, S×S pixels
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hierarchy_builder.canvases.colours import (
    FIT_TOKENS,
    Palette,
    finite_tokens,
    fit_palette,
    hierarchy_colours,
)
from hierarchy_builder.canvases.gallery import LevelViewer, View
from hierarchy_builder.canvases.means import level_canvases
from hierarchy_builder.fields import brief
from hierarchy_builder.terminal import counted

REGIONS, LATENT, DECODED = "regions", "latent (PCA)", "decoded"


@dataclass(frozen=True, kw_only=True, slots=True)
class HierarchyView:
    """One image with its teacher hierarchy, as a report shows it.

    regions: uint8 [L−1, H, W]. features: float [H, W, C], or ready canvases: float [L, H, W, C].
    photo: uint8 [S, S, 3] or None. decoded: uint8 [L, S, S, 3] or None. notes: short values shown on the card.
    """

    __repr__ = brief

    key: str
    class_name: str
    regions: np.ndarray
    features: np.ndarray | None = None
    canvases: np.ndarray | None = None
    photo: np.ndarray | None = None
    decoded: np.ndarray | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def tokens(self) -> np.ndarray | None:
        """The raw tokens [H, W, C], or None if neither features nor canvases are given."""
        return self.features if self.canvases is None else self.canvases[-1]

    def levels(self) -> np.ndarray | None:
        """The level canvases float32 [L, H, W, C], built from the features if they are not given."""
        if self.canvases is not None:
            return np.asarray(self.canvases, dtype=np.float32)
        if self.features is None:
            return None
        features = np.asarray(self.features, dtype=np.float32)
        return np.asarray(level_canvases(features[None], self.regions[None])[0])


def level_names(num_levels: int) -> tuple[str, ...]:
    """Names of the levels, coarse → fine, as in the publication; levels of more than two cuts are numbered."""
    if num_levels == 1:
        return ("tokens",)
    cuts = num_levels - 2
    parts = ("parts", "subparts")[:cuts] if cuts <= 2 else tuple(f"parts {i + 1}" for i in range(cuts))
    return ("object/background", *parts, "tokens")


def shared_palette(feature_maps: Iterable[np.ndarray | None]) -> Palette | None:
    """Fit one palette for all images of a page to tokens from all parts of each map [..., C].

    Returns None if no map has a finite token.
    """
    maps = [features for features in feature_maps if features is not None]
    share = -(-FIT_TOKENS // max(len(maps), 1))
    sampled = [finite_tokens(features, share, seed) for seed, features in enumerate(maps)]
    return fit_palette(np.concatenate(sampled)) if any(map(len, sampled)) else None


def hierarchy_viewers(views: Sequence[HierarchyView], palette: Palette | None) -> list[LevelViewer]:
    """One card per image with its region map and, if given, its features in palette colours and its decoded levels."""
    return [
        LevelViewer(
            title=view.class_name,
            subtitle=view.key,
            level_names=level_names(len(view.regions) + 1),
            captions=region_captions(view.regions),
            views=[
                View(name=REGIONS, layers=hierarchy_colours(view.regions)),
                *latent_views(view.levels(), view.decoded, palette),
            ],
            reveal=view.photo,
            notes=view.notes,
        )
        for view in views
    ]


def region_captions(regions: np.ndarray) -> tuple[str, ...]:
    """Captions with the number of regions of object and divided background per level; regions uint8 [L−1, H, W]."""
    is_object, captions = regions[0] > 0, list[str]()
    for level_HW in regions:
        behind = len(np.unique(level_HW[~is_object]))
        caption = counted(len(np.unique(level_HW[is_object])), "region")
        captions.append(f"{caption}, background {behind}" if behind > 1 else caption)
    height, width = regions.shape[1:]
    return (*captions, f"{height} × {width}")


def latent_views(
    canvases: np.ndarray | None, decoded: np.ndarray | None, palette: Palette | None
) -> list[View]:
    """Views of canvases [L, H, W, C] in palette colours and of decoded levels uint8 [L, S, S, 3], if given.

    The palette is None if no token was finite; canvases are then shown in black.
    """
    views = []
    if canvases is not None:
        black = np.zeros((*np.shape(canvases)[:-1], 3), dtype=np.uint8)
        views.append(View(name=LATENT, layers=black if palette is None else palette.apply(canvases)))
    if decoded is not None:
        views.append(View(name=DECODED, layers=decoded))
    return views
