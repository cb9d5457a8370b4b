"""What a model in training makes: one sheet of trajectories, always of the same labels and seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from trainer.data.normalisation import Normaliser
from trainer.evaluation.run_page import trajectory_views
from trainer.methods.trajectory_forcing.network import TrajectoryTransformer
from trainer.trajectories.pipeline import TrajectoryPipeline
from trainer.trajectories.view import trajectory_grid_png

SHOWN_CLASSES = 8
"""Rows of the sheet, classes spread evenly over the class map; seed 0 of each."""


def preview_sheet(
    model: TrajectoryTransformer,
    class_names: Sequence[str],
    encoder: Mapping[str, Any],
    normaliser: Normaliser,
    decoder: Callable[[Tensor], Tensor] | None,
) -> Image.Image:
    """Sample every level of a few classes, decoded where there is a decoder, else in colours of the features.

    Draws from no shared random state, so training goes on as if it had not been called.
    """
    return pipeline_sheet(TrajectoryPipeline(model, class_names, dict(encoder), decoder, normaliser))


def pipeline_sheet(pipe: TrajectoryPipeline) -> Image.Image:
    """The same of a pipeline, whatever its method."""
    num_classes = pipe.model.config.num_classes
    labels = np.unique(np.linspace(0, num_classes - 1, min(SHOWN_CLASSES, num_classes)).astype(int))
    return trajectory_grid_png(trajectory_views(pipe(labels.tolist())))
