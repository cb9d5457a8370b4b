"""The page of a run: its teachers, what it generates level by level, its scores and its curves.

L levels (coarse → fine), H×W grid of tokens, C channels, S pixels a side
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageFont

from hierarchy_builder.canvases.colours import Palette
from hierarchy_builder.canvases.gallery import Code, Facts, Gallery, LevelViewer, Page, Plots, Section, Table
from hierarchy_builder.canvases.plots import Plot, Series
from hierarchy_builder.canvases.views import (
    HierarchyView,
    hierarchy_viewers,
    latent_views,
    level_names,
    shared_palette,
)

TEACHER_TEXT = (
    "What the model was shown. Children share the hues of their parent region; latent colours are the same on "
    "every card of this page, teachers and samples alike."
)
TRAJECTORY_TEXT = (
    "What the model makes of a label and a seed: every level is drawn by the network from noise and the level "
    "before it. The slider sweeps a canvas and its decoded picture together."
)
ONE_LEVEL_TEXT = "What the model makes of a label and a seed: the canvas, and the picture it is decoded to."
CURVES_TEXT = "Long curves are means of equal runs of points; the band spans least to greatest."
LOSSES_TEXT = {
    "trajectory-forcing": "The losses of u and v are divided by their own size and stay near 1; the squared errors "
    "behind them are what falls.",
    "latent-forcing": "loss_pixels and loss_latents are squared errors of v, means over the whole batch: a "
    "sample that does not train one of the two counts as 0 in it.",
    "normalizing-trajectory": "bits are −log₂ of the density of chains of normalised features, per number of a "
    "canvas, and may fall below 0: fit + log_sigma − log_det, which are in nats as the loss is. The loss of a learned "
    "denoiser is its squared distance to what the scores say.",
}
"""Method → what the curves of its losses are."""
LOSSES = ("loss", "loss_u", "loss_v", "region")
LOSS_TITLE = "losses"
PER_LEVEL = re.compile(r"(.+?)[_/](?:level_?)?(\d+)")
NOT_PLOTTED = frozenset({"step", "images", "seed", "time", "epoch"})
LOG_RATIO = 20.0

CELL_PX, GAP_PX, MARGIN_PX, HEADER_PX, LABEL_PX = 112, 6, 16, 30, 150
PAPER, INK, MUTED = (252, 252, 250), (26, 27, 31), (92, 96, 105)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrajectoryView:
    """One generated trajectory, as a report shows it.

    canvases: float [L, H, W, C]. decoded: uint8 [L, S, S, 3] or None. notes: short values shown below.
    """

    label_name: str
    seed: int
    canvases: np.ndarray
    decoded: np.ndarray | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


def training_page(
    *,
    title: str,
    facts: Mapping[str, Any],
    trajectories: Sequence[TrajectoryView] = (),
    teachers: Sequence[HierarchyView] = (),
    metrics: Sequence[Table] = (),
    log: Sequence[Mapping[str, Any]] = (),
    stages: Sequence[Mapping[str, Any]] = (),
    config: Mapping[str, Any] | None = None,
    more: Sequence[Section] = (),
    intro: str = "",
    palette: Palette | None = None,
    method: str = "trajectory-forcing",
) -> Page:
    """The report of a run; parts that are empty are left out.

    facts: name → value. metrics: tables, one below the other. stages: rows of column → value. log: the rows of
    metrics.jsonl (`images`, or else `step`, is the x axis; every other number is a curve). config: plain data, shown as
    YAML. more: sections after the samples.
    palette: where it is not given, it is fitted on the teachers' tokens if there are any, since early samples may lie
    anywhere. method: whose losses the log holds.
    Write it with `canvases.gallery.write_page`.
    """
    palette = palette or page_palette(trajectories, teachers)
    teacher_gallery = Gallery(viewers=hierarchy_viewers(teachers, palette), start=1)
    sample_gallery = Gallery(viewers=[_viewer(trajectory, palette) for trajectory in trajectories], start=-1)
    configuration = yaml.safe_dump(dict(config or {}), sort_keys=False, allow_unicode=True)
    plots = training_plots(log)
    curves_text = f"From metrics.jsonl. {LOSSES_TEXT[method]} {CURVES_TEXT}"
    candidates = [
        (facts, Section(title="Summary", blocks=[Facts(entries=facts)])),
        (
            trajectories,
            Section(title="Generated trajectories", text=_text(trajectories), blocks=[sample_gallery]),
        ),
        (teachers, Section(title="Teacher hierarchies", text=TEACHER_TEXT, blocks=[teacher_gallery])),
        *((section, section) for section in more),
        (metrics, Section(title="Metrics", blocks=metrics)),
        (plots, Section(title="Curves", text=curves_text, blocks=[Plots(plots=plots)])),
        (stages, Section(title="Stages", blocks=[Table(rows=stages)])),
        (
            config,
            Section(
                title="Configuration", blocks=[Code(summary="Resolved configuration", text=configuration)]
            ),
        ),
    ]
    return Page(title=title, intro=intro, sections=[section for content, section in candidates if content])


def page_palette(
    trajectories: Sequence[TrajectoryView], teachers: Sequence[HierarchyView] = ()
) -> Palette | None:
    """The palette of a page: of the teachers' tokens, else of the generated ones; None without finite tokens."""
    teacher_palette = shared_palette(view.tokens() for view in teachers)
    return teacher_palette or shared_palette(trajectory.canvases[-1] for trajectory in trajectories)


def training_plots(log: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """One plot of the losses, one per measure that has a curve for each level, and one per remaining number."""
    x_name = "images" if any("images" in row for row in log) else "step"
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for row in log for name in row):
        if name not in NOT_PLOTTED and any(_is_number(row.get(name)) for row in log):
            groups.setdefault(_group(name), []).append(name)
    ordered = sorted(groups.items(), key=lambda item: item[0] != LOSS_TITLE)
    return [_plot(title, names, log, x_name) for title, names in ordered]


def trajectory_grid_png(
    trajectories: Sequence[TrajectoryView], palette: Palette | None = None
) -> Image.Image:
    """A contact sheet: rows are samples, columns are levels, each with its canvas beside its decoded picture.

    palette: colours of the canvases, fitted on the final canvases where it is not given.
    Raises ValueError without trajectories or if they differ in the number of levels.
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
                sheet.paste(_tile(picture), (x, MARGIN_PX + HEADER_PX + i * (CELL_PX + GAP_PX)))
    return sheet


def _text(trajectories: Sequence[TrajectoryView]) -> str:
    return TRAJECTORY_TEXT if any(len(each.canvases) > 1 for each in trajectories) else ONE_LEVEL_TEXT


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


def _group(name: str) -> str:
    """Losses share one plot; `name_level_0`, `name/level1`, `name/0` share one per name."""
    if name in LOSSES:
        return LOSS_TITLE
    per_level = PER_LEVEL.fullmatch(name)
    return f"{per_level[1]} per level" if per_level else name


def _plot(title: str, names: Sequence[str], log: Sequence[Mapping[str, Any]], x_name: str) -> Plot:
    series = []
    for name in names:
        rows = [row for row in log if _is_number(row.get(name)) and _is_number(row.get(x_name))]
        per_level = PER_LEVEL.fullmatch(name)
        label = f"level {per_level[2]}" if per_level else name
        series.append(Series(name=label, x=[row[x_name] for row in rows], y=[row[name] for row in rows]))
    values = np.array([y for line in series for y in line.y if np.isfinite(y)])
    log_y = len(values) > 0 and values.min() > 0 and values.max() / values.min() > LOG_RATIO
    x_label = "images seen" if x_name == "images" else x_name
    return Plot(title=title.replace("_", " "), x_label=x_label, series=series, log_y=bool(log_y))


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _draw_labels(
    draw: ImageDraw.ImageDraw, trajectories: Sequence[TrajectoryView], names: Sequence[str], column_px: int
) -> None:
    bold, small = ImageFont.load_default(15), ImageFont.load_default(13)
    for level, name in enumerate(names):
        draw.text((MARGIN_PX + LABEL_PX + level * column_px, MARGIN_PX), name, INK, font=bold)
    for i, trajectory in enumerate(trajectories):
        y = MARGIN_PX + HEADER_PX + i * (CELL_PX + GAP_PX)
        lines = _wrapped(draw, trajectory.label_name, bold, LABEL_PX - 2 * GAP_PX)[:4]
        draw.multiline_text((MARGIN_PX, y), "\n".join(lines), INK, font=bold, spacing=3)
        draw.text((MARGIN_PX, y + 4 + 20 * len(lines)), f"seed {trajectory.seed}", MUTED, font=small)


def _wrapped(draw: ImageDraw.ImageDraw, text: str, font: Any, width_px: int) -> list[str]:
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(candidate, font=font) > width_px:
            lines.append(word)
        else:
            lines[-1] = candidate
    return lines


def _tile(picture: np.ndarray) -> Image.Image:
    enlarged = max(picture.shape[:2]) < CELL_PX
    resampling = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    return Image.fromarray(np.ascontiguousarray(picture)).resize((CELL_PX, CELL_PX), resampling)
