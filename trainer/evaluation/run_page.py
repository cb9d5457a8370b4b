"""From a run folder, shards and samples to what the pages of `trainer.trajectories.view` show."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hierarchy_builder.canvases.gallery import Page, Section, Table
from hierarchy_builder.canvases.views import HierarchyView
from trainer.data.normalisation import RAW, Normaliser
from trainer.data.reader import ShardReader
from trainer.data.shards import ShardIndex
from trainer.decode.rae import to_uint8
from trainer.evaluation.likelihood_page import likelihood_metrics, likelihood_sections
from trainer.evaluation.tables import metric_tables
from trainer.methods.normalizing_trajectory.pipeline import NormalizingPipeline
from trainer.training import checkpoint as saved
from trainer.training.log import METRICS, read_metrics
from trainer.training.run_folder import read_config, read_kept
from trainer.trajectories.pipeline import Decoder, Trajectory, TrajectoryPipeline
from trainer.trajectories.view import TrajectoryView, training_page

EVALUATION = "evaluation.json"
SHOWN_CLASSES = 12
SHOWN_TEACHERS = 12


def trajectory_views(trajectories: Sequence[Trajectory]) -> list[TrajectoryView]:
    """Trajectories as a page shows them, decoded where their encoder or the pipeline has a decoder."""
    return [trajectory.view() for trajectory in trajectories]


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
    method = state.config.get("method_name", "trajectory-forcing")
    title = method.replace("-", " ").title()
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
        trajectories=trajectory_views(trajectories),
        teachers=[] if index is None else teacher_views(index, SHOWN_TEACHERS, pipe.decoder, normaliser),
        metrics=[
            Table(rows=rows, caption=f"{topic.title}. {topic.note}".rstrip())
            for topic, rows in metric_tables(read_evaluation(run) + likelihood_metrics(run)).items()
        ],
        log=[row for row in (read_metrics(run) if (run / METRICS).exists() else []) if "loss" in row],
        stages=stages,
        more=more,
        config=content["config"],
        method=method,
    )
    if index is None or not isinstance(pipe, NormalizingPipeline):
        return page
    *sections, configuration = page.sections
    return replace(page, sections=[*sections, *likelihood_sections(run, pipe, index), configuration])


def read_evaluation(run: Path) -> list[dict[str, Any]]:
    """Rows name/value of the last `trainer evaluate`, empty before the first."""
    path = run / EVALUATION
    return read_kept(path)["metrics"]


def shown_labels(num_classes: int) -> list[int]:
    """Classes of a report, spread evenly."""
    return np.unique(np.linspace(0, num_classes - 1, min(SHOWN_CLASSES, num_classes)).astype(int)).tolist()
