"""From arrays to cards: what a teacher hierarchy or a chain of level canvases looks like.

L levels (coarse → fine), H×W grid of tokens, C channels, S pixels a side
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hierarchy_builder.canvases.colours import (
    FIT_TOKENS,
    Palette,
    fit_palette,
    hierarchy_colours,
    spread_rows,
)
from hierarchy_builder.canvases.gallery import LevelViewer, View
from hierarchy_builder.canvases.means import level_canvases

REGIONS, LATENT, DECODED = "regions", "latent (PCA)", "decoded"


@dataclass(frozen=True, kw_only=True, slots=True)
class HierarchyView:
    """One image with its teacher hierarchy, as a report shows it.

    regions: uint8 [L−1, H, W]. features: float [H, W, C]; or canvases: float [L, H, W, C], taken as they are.
    photo: uint8 [S, S, 3] or None. decoded: uint8 [L, S, S, 3] or None. notes: short values shown below.
    """

    key: str
    class_name: str
    regions: np.ndarray
    features: np.ndarray | None = None
    canvases: np.ndarray | None = None
    photo: np.ndarray | None = None
    decoded: np.ndarray | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def tokens(self) -> np.ndarray | None:
        """The raw tokens [H, W, C], or None where neither features nor canvases were given."""
        if self.canvases is not None:
            return self.canvases[-1]
        return self.features

    def levels(self) -> np.ndarray | None:
        """The level canvases float32 [L, H, W, C], built from features where they were not given."""
        if self.canvases is not None:
            return np.asarray(self.canvases, dtype=np.float32)
        if self.features is None:
            return None
        features = np.asarray(self.features, dtype=np.float32)
        return np.asarray(level_canvases(features[None], self.regions[None])[0])


def level_names(num_levels: int) -> tuple[str, ...]:
    """What the levels are called, coarse → fine, in the method's words.

    More than two cuts are numbered; a single level is the tokens.
    """
    if num_levels == 1:
        return ("tokens",)
    cuts = num_levels - 2
    parts = ("parts", "subparts")[:cuts] if cuts <= 2 else tuple(f"parts {i + 1}" for i in range(cuts))
    return ("object/background", *parts, "tokens")


def shared_palette(feature_maps: Iterable[np.ndarray | None], max_tokens: int = FIT_TOKENS) -> Palette | None:
    """One palette for all pictures of a page, from tokens drawn from all parts of every map [..., C].

    Returns None where no map has a finite token.
    """
    maps = [features for features in feature_maps if features is not None]
    share = -(-max_tokens // max(len(maps), 1))
    sampled = []
    for number, features in enumerate(maps):
        tokens_MC = np.asarray(features).reshape(-1, np.shape(features)[-1])
        tokens_MC = tokens_MC[spread_rows(len(tokens_MC), share, seed=number)].astype(np.float32)
        sampled.append(tokens_MC[np.isfinite(tokens_MC).all(axis=1)])
    if not any(len(tokens) for tokens in sampled):
        return None
    return fit_palette(np.concatenate(sampled))


def hierarchy_viewers(views: Sequence[HierarchyView], palette: Palette | None) -> list[LevelViewer]:
    """One card per image: region map, latent colours where there are features, decoded levels where given."""
    return [_hierarchy_viewer(view, palette) for view in views]


def region_captions(regions: np.ndarray) -> tuple[str, ...]:
    """Regions of the object on each level, those of a divided background, and the grid; regions uint8 [L−1, H, W]."""
    is_object = regions[0] > 0
    height, width = regions.shape[1:]
    return (*(_count_regions(level_HW, is_object) for level_HW in regions), f"{height} × {width}")


def latent_views(
    canvases: np.ndarray | None, decoded: np.ndarray | None, palette: Palette | None
) -> list[View]:
    """Canvases [L, H, W, C] in the palette's colours beside decoded levels uint8 [L, S, S, 3]; either may miss.

    Without a palette no token was finite: canvases are black, and the page can still be read.
    """
    views = []
    if canvases is not None:
        black = np.zeros((*np.shape(canvases)[:-1], 3), dtype=np.uint8)
        views.append(View(name=LATENT, layers=black if palette is None else palette.apply(canvases)))
    if decoded is not None:
        views.append(View(name=DECODED, layers=decoded))
    return views


def _count_regions(level_HW: np.ndarray, is_object: np.ndarray) -> str:
    count, behind = len(np.unique(level_HW[is_object])), len(np.unique(level_HW[~is_object]))
    return f"{count} region{'' if count == 1 else 's'}{f', background {behind}' if behind > 1 else ''}"


def _hierarchy_viewer(view: HierarchyView, palette: Palette | None) -> LevelViewer:
    region_map = View(name=REGIONS, layers=hierarchy_colours(view.regions))
    return LevelViewer(
        title=view.class_name,
        subtitle=view.key,
        level_names=level_names(len(view.regions) + 1),
        captions=region_captions(view.regions),
        views=[region_map, *latent_views(view.levels(), view.decoded, palette)],
        reveal=view.photo,
        notes=view.notes,
    )
