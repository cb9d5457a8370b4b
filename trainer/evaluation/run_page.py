"""The page of a run: its teachers, what it generates level by level, its scores and its curves."""

from __future__ import annotations

import io
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from hierarchy_builder.canvases.colours import Palette
from hierarchy_builder.canvases.gallery import Code, Gallery, Page, Plots, Section, Table
from hierarchy_builder.canvases.plots import Plot, Series
from hierarchy_builder.canvases.views import HierarchyView, hierarchy_viewers
from trainer.data.normalisation import RAW, Normaliser
from trainer.data.reader import ShardReader
from trainer.data.shards import ShardIndex
from trainer.decode.rae import to_uint8
from trainer.evaluation.likelihood_page import likelihood_metrics, likelihood_sections
from trainer.evaluation.tables import metric_tables
from trainer.methods import registry
from trainer.methods.normalizing_trajectory.pipeline import NormalizingPipeline
from trainer.training import checkpoint as saved
from trainer.training.log import METRICS, read_metrics
from trainer.training.run_folder import read_config, read_kept
from trainer.trajectories.pipeline import Decoder, Trajectory, TrajectoryPipeline
from trainer.trajectories.view import TrajectoryView, facts_section, page_palette, samples_section

EVALUATION = "evaluation.json"
SHOWN_CLASSES = 12
SHOWN_TEACHERS = 12
TEACHER_TEXT = (
    "What the model was shown. Children share the hues of their parent region; latent colours are the same on "
    "every card of this page, teachers and samples alike."
)
CURVES_TEXT = "Long curves are means of equal runs of points; the band spans least to greatest."
LOSSES = ("loss", "loss_u", "loss_v", "region")
LOSS_TITLE = "losses"
PER_LEVEL = re.compile(r"(.+?)[_/](?:level_?)?(\d+)")
NOT_PLOTTED = frozenset({"step", "images", "seed", "time", "epoch"})
LOG_RATIO = 20.0


def teacher_views(
    index: ShardIndex, limit: int, decoder: Decoder | None = None, normaliser: Normaliser = RAW
) -> list[HierarchyView]:
    """Samples of the shards spread evenly over them, with their regions and, where stored, photographs.

    normaliser: that of the run whose teachers they are.
    """
    reader = ShardReader(index)
    chosen = np.unique(np.linspace(0, index.num_samples - 1, min(limit, index.num_samples)).astype(int))
    views = []
    for number in chosen:
        sample = reader.read(int(number), extras=True)
        features = torch.from_numpy(sample.features[None]).float()
        canvases = normaliser.teacher_canvases(features, torch.from_numpy(sample.regions[None]))[0]
        views.append(
            HierarchyView(
                key=sample.key,
                class_name=index.class_names[sample.label],
                regions=sample.regions,
                canvases=canvases.numpy(),
                photo=None if sample.image is None else np.asarray(Image.open(io.BytesIO(sample.image))),
                decoded=None if decoder is None else to_uint8(decoder(canvases)).cpu().numpy(),
            )
        )
    reader.close()
    return views


def run_page(
    run: Path,
    pipe: TrajectoryPipeline,
    trajectories: Sequence[Trajectory],
    index: ShardIndex | None = None,
    stages: Sequence[Mapping[str, Any]] = (),
    more: Sequence[Section] = (),
) -> Page:
    """The page of a run: samples, curves, scores of `trainer evaluate`, and teachers where shards are given.

    stages: rows of a table of what led to the run, column → value. more: sections after the samples.

    Raises TrainerError if `run` is not a run folder.
    """
    content = read_config(run)
    state = saved.load_state(saved.find_checkpoint(run))
    normaliser = pipe.normaliser.to("cpu")
    seen = state.shards.get("num_samples")
    num_images = "unknown" if seen is None else f"{seen:,}"  # an imported checkpoint does not say
    method = registry.method_in(state.config, run)
    title = method.name.replace("-", " ").title()
    facts = {
        "preset": state.config["preset"],
        "parameters": f"{sum(p.numel() for p in pipe.model.parameters()):,}",
        "images seen": f"{state.images_seen:,}",
        "steps": f"{state.step:,}",
        "training time": f"{state.seconds / 60:.1f} min",
        "encoder": state.shards["encoder"].get("name", "unknown"),
        "training images": num_images,
        "classes": len(state.shards["class_names"]),
    }
    page = training_page(
        title=f"{title}: {state.config['preset']} on {num_images} image{'' if seen == 1 else 's'}",
        facts=facts,
        trajectories=[trajectory.view() for trajectory in trajectories],
        teachers=[] if index is None else teacher_views(index, SHOWN_TEACHERS, pipe.decoder, normaliser),
        metrics=[
            Table(rows=rows, caption=f"{topic.title}. {topic.note}".rstrip())
            for topic, rows in metric_tables(read_evaluation(run) + likelihood_metrics(run)).items()
        ],
        log=[row for row in (read_metrics(run) if (run / METRICS).exists() else []) if "loss" in row],
        stages=stages,
        more=more,
        config=content["config"],
        losses_text=method.losses_text,
    )
    if index is None or not isinstance(pipe, NormalizingPipeline):
        return page
    *sections, configuration = page.sections
    return replace(page, sections=[*sections, *likelihood_sections(run, pipe, index), configuration])


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
    losses_text: str = "",
) -> Page:
    """The page of a run; parts that are empty are left out.

    facts: name → value. metrics: tables, one below the other. stages: rows of column → value. log: the rows of
    metrics.jsonl (`images`, or else `step`, is the x axis; every other number is a curve). config: plain data, shown as
    YAML. more: sections after the samples. palette: where it is not given, it is fitted on the tokens of the teachers
    if there are any, since early samples may lie anywhere. losses_text: what the method says about its losses.
    `canvases.gallery.write_page` writes it.
    """
    palette = palette or page_palette(trajectories, teachers)
    teacher_gallery = Gallery(viewers=hierarchy_viewers(teachers, palette), start=1)
    configuration = yaml.safe_dump(dict(config or {}), sort_keys=False, allow_unicode=True)
    code = Code(summary="Resolved configuration", text=configuration)
    plots = training_plots(log)
    curves_text = " ".join(filter(None, ("From metrics.jsonl.", losses_text, CURVES_TEXT)))
    after_samples = [
        (teachers, Section(title="Teacher hierarchies", text=TEACHER_TEXT, blocks=[teacher_gallery])),
        *((section, section) for section in more),
        (metrics, Section(title="Metrics", blocks=metrics)),
        (plots, Section(title="Curves", text=curves_text, blocks=[Plots(plots=plots)])),
        (stages, Section(title="Stages", blocks=[Table(rows=stages)])),
        (config, Section(title="Configuration", blocks=[code])),
    ]
    sections = [*facts_section(facts), *samples_section(trajectories, palette)]
    sections += [section for content, section in after_samples if content]
    return Page(title=title, intro=intro, sections=sections)


def training_plots(log: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """One plot of the losses, one per measure that has a curve for each level, and one per remaining number."""
    x_name = "images" if any("images" in row for row in log) else "step"
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for row in log for name in row):
        if name not in NOT_PLOTTED and any(_is_number(row.get(name)) for row in log):
            groups.setdefault(_group(name), []).append(name)
    ordered = sorted(groups.items(), key=lambda item: item[0] != LOSS_TITLE)
    return [_plot(title, names, log, x_name) for title, names in ordered]


def read_evaluation(run: Path) -> list[dict[str, Any]]:
    """Rows name/value of the last `trainer evaluate`, empty before the first."""
    path = run / EVALUATION
    return read_kept(path)["metrics"]


def shown_labels(num_classes: int) -> list[int]:
    """Classes of a report, spread evenly."""
    return np.unique(np.linspace(0, num_classes - 1, min(SHOWN_CLASSES, num_classes)).astype(int)).tolist()


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
