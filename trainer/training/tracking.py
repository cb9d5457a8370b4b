"""Scalars and pictures of a run for those who watch it: TensorBoard by default, Weights & Biases if asked.

metrics.jsonl is the record; what is sent from here can be made again from it. The horizontal axis is images seen.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from hierarchy_builder.errors import UsageError

FOLDER = "tensorboard"
"""Event files, in the run folder."""


class Tracker(Protocol):
    """Takes what a run reports."""

    def scalars(self, values: Mapping[str, float], images_seen: int) -> None:
        """Note numbers by name."""

    def picture(self, name: str, picture: Image.Image, images_seen: int) -> None:
        """Note a picture."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Event files in RUN/tensorboard; what an interrupted run wrote after `images_seen` is hidden."""

    def __init__(self, run: Path, images_seen: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / FOLDER), purge_step=images_seen + 1)

    def scalars(self, values: Mapping[str, float], images_seen: int) -> None:
        """Note numbers by name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, images_seen)

    def picture(self, name: str, picture: Image.Image, images_seen: int) -> None:
        """Note a picture."""
        pixels = np.asarray(picture.convert("RGB"))
        self._writer.add_image(name, pixels, images_seen, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run of the project in Weights & Biases, found again by the name of the run folder."""

    def __init__(self, run: Path, project: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UsageError(
                f"wandb_project is {project!r}, and wandb is not installed: pip install "
                '"trajectory-hierarchies[wandb]", or leave wandb_project out'
            ) from None
        self._module = wandb
        name = run.resolve().name
        self._run = wandb.init(
            project=project, id=name, name=name, dir=str(run), config=dict(config), resume="allow"
        )

    def scalars(self, values: Mapping[str, float], images_seen: int) -> None:
        """Note numbers by name."""
        self._run.log({**values, "images": images_seen})

    def picture(self, name: str, picture: Image.Image, images_seen: int) -> None:
        """Note a picture."""
        self._run.log({name: self._module.Image(picture), "images": images_seen})

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()


def open_trackers(
    run: Path,
    images_seen: int,
    *,
    tensorboard: bool,
    wandb_project: str | None,
    config: Mapping[str, Any],
    quiet: bool = False,
) -> list[Tracker]:
    """Those that were asked for. Raises UsageError when wandb was and is not installed.

    Without TensorBoard the run goes on, since metrics.jsonl holds the same numbers; a line on stderr says so.
    """
    trackers: list[Tracker] = []
    if wandb_project is not None:
        trackers.append(WeightsAndBiases(run, wandb_project, config))
    if tensorboard:
        try:
            trackers.append(TensorBoard(run, images_seen))
        except ImportError:
            if not quiet:
                print("tensorboard is not installed: numbers go to metrics.jsonl only", file=sys.stderr)
    return trackers
