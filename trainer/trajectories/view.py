"""Sheets and pages of trajectories: every level, with its decoded picture if there is a decoder.

L levels (coarse → fine), H×W grid of tokens, C channels, S pixels a side
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hierarchy_builder.canvases.colours import Palette
from hierarchy_builder.canvases.gallery import Facts, Gallery, LevelViewer, Page, Section
from hierarchy_builder.canvases.views import HierarchyView, latent_views, level_names, shared_palette
from hierarchy_builder.fields import brief

TRAJECTORY_TEXT = (
    "Each card shows what the network draws for one class and seed: every level from noise and the level before it. "
    "“One level” shows a slider, which sweeps canvases and decoded pictures together."
)
ONE_LEVEL_TEXT = (
    "Each card shows what the network draws for one class and seed: a canvas, and the picture made of it."
)
CELL_PX, GAP_PX, MARGIN_PX, HEADER_PX, LABEL_PX = 112, 6, 16, 30, 150
PAPER, INK, MUTED = (252, 252, 250), (26, 27, 31), (92, 96, 105)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrajectoryView:
    """One generated trajectory, as reports show it.

    canvases: float [L, H, W, C]. decoded: uint8 [L, S, S, 3] or None. notes: short values to show below it.
    """

    __repr__ = brief

    label_name: str
    seed: int
    canvases: np.ndarray
    decoded: np.ndarray | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


def trajectories_page(
    *,
    title: str,
    facts: Mapping[str, Any],
    trajectories: Sequence[TrajectoryView],
    palette: Palette | None = None,
) -> Page:
    """Make a page of trajectories. facts: name → value. palette: by default it is fitted to their last levels."""
    palette = palette or page_palette(trajectories)
    return Page(title=title, sections=[*facts_section(facts), *samples_section(trajectories, palette)])


def facts_section(facts: Mapping[str, Any]) -> list[Section]:
    """Make the summary at the top of a page, if there are facts."""
    return [Section(title="Summary", blocks=[Facts(entries=facts)])] if facts else []


def samples_section(trajectories: Sequence[TrajectoryView], palette: Palette | None) -> list[Section]:
    """Make the gallery of the trajectories, if there are any."""
    if not trajectories:
        return []
    gallery = Gallery(viewers=[_viewer(trajectory, palette) for trajectory in trajectories], start=-1)
    text = TRAJECTORY_TEXT if any(len(each.canvases) > 1 for each in trajectories) else ONE_LEVEL_TEXT
    return [Section(title="Generated trajectories", text=text, blocks=[gallery])]


def page_palette(
    trajectories: Sequence[TrajectoryView], teachers: Sequence[HierarchyView] = ()
) -> Palette | None:
    """Fit the palette of a page to the teachers' tokens, or else to the generated ones; None without finite tokens."""
    teacher_palette = shared_palette(view.tokens() for view in teachers)
    return teacher_palette or shared_palette(trajectory.canvases[-1] for trajectory in trajectories)


def trajectory_grid_png(
    trajectories: Sequence[TrajectoryView], palette: Palette | None = None
) -> Image.Image:
    """Draw a contact sheet: rows are samples, columns are levels, each with its canvas next to its decoded picture.

    palette: colours of the canvases; by default it is fitted to the final canvases.
    Raises ValueError without trajectories, or if they differ in the number of levels.
    """
    counts = sorted({len(trajectory.canvases) for trajectory in trajectories})
    if len(counts) != 1:
        raise ValueError(
            f"contact sheet: found trajectories of {counts or 'no'} levels, expected one number of levels"
        )
    palette = palette or page_palette(trajectories)
    rows = [latent_views(trajectory.canvases, trajectory.decoded, palette) for trajectory in trajectories]
    num_views = max(len(views) for views in rows)
    column_px = num_views * CELL_PX + (num_views - 1) * 2 + 2 * GAP_PX
    sheet = Image.new(
        "RGB",
        (
            2 * MARGIN_PX + LABEL_PX + counts[0] * column_px,
            2 * MARGIN_PX + HEADER_PX + len(rows) * (CELL_PX + GAP_PX),
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    _draw_labels(draw, trajectories, level_names(counts[0]), column_px)
    for i, views in enumerate(rows):
        for j, view in enumerate(views):
            for level, picture in enumerate(view.layers):
                x = MARGIN_PX + LABEL_PX + level * column_px + j * (CELL_PX + 2)
                sheet.paste(tile(picture), (x, MARGIN_PX + HEADER_PX + i * (CELL_PX + GAP_PX)))
    return sheet


def _viewer(trajectory: TrajectoryView, palette: Palette | None) -> LevelViewer:
    decoded = trajectory.decoded
    return LevelViewer(
        title=trajectory.label_name,
        subtitle=f"seed {trajectory.seed}",
        level_names=level_names(len(trajectory.canvases)),
        views=latent_views(trajectory.canvases, decoded, palette),
        reveal=None if decoded is None else decoded[-1],
        reveal_name="final picture",
        notes=trajectory.notes,
    )


def _draw_labels(
    draw: ImageDraw.ImageDraw, trajectories: Sequence[TrajectoryView], names: Sequence[str], column_px: int
) -> None:
    bold, small = ImageFont.load_default(15), ImageFont.load_default(13)
    heading = _fitting(draw, max(names, key=len), column_px - GAP_PX)
    for level, name in enumerate(names):
        draw.text((MARGIN_PX + LABEL_PX + level * column_px, MARGIN_PX), name, INK, font=heading)
    for i, trajectory in enumerate(trajectories):
        y = MARGIN_PX + HEADER_PX + i * (CELL_PX + GAP_PX)
        lines = _wrapped(draw, trajectory.label_name, bold, LABEL_PX - 2 * GAP_PX)[:4]
        draw.multiline_text((MARGIN_PX, y), "\n".join(lines), INK, font=bold, spacing=3)
        draw.text((MARGIN_PX, y + 4 + 20 * len(lines)), f"seed {trajectory.seed}", MUTED, font=small)


def _fitting(draw: ImageDraw.ImageDraw, text: str, width_px: int) -> Any:
    """The largest font up to 15 pixels in which the text is at most so wide."""
    fonts = [ImageFont.load_default(size) for size in range(15, 5, -1)]
    return next((font for font in fonts if draw.textlength(text, font=font) <= width_px), fonts[-1])


def _wrapped(draw: ImageDraw.ImageDraw, text: str, font: Any, width_px: int) -> list[str]:
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(candidate, font=font) > width_px:
            lines.append(word)
        else:
            lines[-1] = candidate
    return lines


def tile(picture: np.ndarray, side_px: int = CELL_PX) -> Image.Image:
    """Resize a picture to a cell of a sheet; small ones keep sharp tokens."""
    enlarged = max(picture.shape[:2]) < side_px
    resampling = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    return Image.fromarray(np.ascontiguousarray(picture)).resize((side_px, side_px), resampling)
