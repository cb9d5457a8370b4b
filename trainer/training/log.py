"""Logging of a run: metrics.jsonl, sheets of samples, trackers, and a progress bar or plain lines on stderr."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hierarchy_builder.errors import TrainerError, UsageError
from hierarchy_builder.fields import to_mapping
from hierarchy_builder.files.untrusted.documents import read_document
from hierarchy_builder.files.whole import parse_json, whole_file, write_bytes
from hierarchy_builder.machine.installing import install_extras
from hierarchy_builder.progress import as_duration
from hierarchy_builder.terminal import say, stderr
from trainer.training.config import RunConfig

METRICS = "metrics.jsonl"
CHECK = "crc32"
"""Last field of each of its rows."""
SAMPLES = "samples"
"""Folder for sheets of samples, in the run folder."""
TENSORBOARD = "tensorboard"
"""Folder for event files, in the run folder."""


def truncate_metrics(run: Path, step: int) -> None:
    """Remove the lines of metrics.jsonl after `step`, so that a resumed run writes no step twice."""
    path = run / METRICS
    if not path.exists():
        return
    kept = [row for row in read_metrics(run) if row["step"] <= step]
    write_bytes(path, b"".join(map(metrics_line, kept)))


def metrics_line(row: Mapping[str, Any]) -> bytes:
    """A line of metrics.jsonl: the row, and as its last field the CRC-32 of the line without that field."""
    text = json.dumps(row)
    return f'{text[:-1]}, "{CHECK}": "{zlib.crc32(text.encode()):08x}"}}\n'.encode()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read the rows of metrics.jsonl in order; a line that is incomplete, damaged or not a row is left out."""
    try:
        lines = read_document(run / METRICS).split(b"\n")
    except ValueError as error:
        raise TrainerError(f"{run / METRICS}: {error}; move it away") from None
    return [row for row in map(parse_metrics_line, lines) if row is not None]


def parse_metrics_line(line: bytes) -> dict[str, Any] | None:
    """The row of a line, or None for a damaged one. Lines of earlier releases have no CHECK."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    is_damaged = row.pop(CHECK, None) is not None and metrics_line(row) != line + b"\n"
    return row if type(row.get("step")) is int and not is_damaged else None


class TensorBoard:
    """Event files in RUN/tensorboard; entries after `images_seen`, from an interrupted run, are hidden."""

    def __init__(self, run: Path, images_seen: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / TENSORBOARD), purge_step=images_seen + 1)

    def scalars(self, values: Mapping[str, float], images_seen: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, images_seen)

    def picture(self, name: str, picture: Image.Image, images_seen: int) -> None:
        pixels = np.asarray(picture.convert("RGB"))
        self._writer.add_image(name, pixels, images_seen, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run in a Weights & Biases project, identified by the name of the run folder, so that it can be resumed."""

    def __init__(self, run: Path, project: str, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UsageError(
                f"wandb_project is {project!r}, and wandb is not installed: {install_extras('wandb')}, "
                "or leave wandb_project out"
            ) from None
        self._module = wandb
        name = run.resolve().name
        self._run = wandb.init(
            project=project, id=name, name=name, dir=str(run), config=config, resume="allow"
        )

    def scalars(self, values: Mapping[str, float], images_seen: int) -> None:
        self._run.log({**values, "images": images_seen})

    def picture(self, name: str, picture: Image.Image, images_seen: int) -> None:
        self._run.log({name: self._module.Image(picture), "images": images_seen})

    def close(self) -> None:
        self._run.finish()


def open_trackers(
    run: Path, images_seen: int, config: RunConfig, quiet: bool = False
) -> list[TensorBoard | WeightsAndBiases]:
    """Open the trackers of a configuration. Raises UsageError if wandb is configured but not installed.

    If TensorBoard is not installed the run continues with a notice on stderr, because metrics.jsonl has the same data.
    """
    trackers: list[TensorBoard | WeightsAndBiases] = []
    if config.wandb_project is not None:
        trackers.append(WeightsAndBiases(run, config.wandb_project, to_mapping(config)))
    if config.tensorboard:
        try:
            trackers.append(TensorBoard(run, images_seen))
        except ImportError:
            say("tensorboard is not installed: numbers go to metrics.jsonl only", quiet)
    return trackers


class RunLog:
    """Writes rows to metrics.jsonl and trackers, and shows them in a progress bar on a terminal or as plain lines."""

    def __init__(
        self, run: Path, config: RunConfig, images_seen: int, quiet: bool, shown: Sequence[str]
    ) -> None:
        self._run, self._total, self._quiet, self._shown = run, config.total_images, quiet, shown
        self._trackers = open_trackers(run, images_seen, config, quiet)
        self._file = open(run / METRICS, "ab")  # noqa: SIM115 (closed in `close`)
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=stderr, disable=quiet or not stderr.is_terminal)
        self._task = self._bar.add_task("images", total=self._total, completed=images_seen)
        self._bar.start()

    def advance(self, images_seen: int) -> None:
        """Advance the progress bar."""
        self._bar.update(self._task, completed=images_seen)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row and show it."""
        self._file.write(metrics_line(row))
        self._file.flush()
        if "loss" not in row:
            return
        for tracker in self._trackers:
            tracker.scalars({k: v for k, v in row.items() if k not in ("images", "time")}, row["images"])
        numbers = "  ".join(f"{name} {row[name]:.4f}" for name in self._shown if name in row)
        text = f"{numbers}  {row['images_per_second']:.0f} images/s"
        self._bar.update(self._task, description=text)
        if self._bar.disable:
            left = (self._total - row["images"]) / row["images_per_second"]
            text += f"  {as_duration(left)} left" * (left > 0)
            say(f"step {row['step']}  {row['images']}/{self._total} images  {text}", self._quiet)

    def show_samples(self, sheet: Image.Image, step: int, images_seen: int) -> None:
        """Save a sheet as RUN/samples/step-NNNNNNNN.png and send it to the trackers."""
        with whole_file(self._run / SAMPLES / f"step-{step:08d}.png") as partial:
            sheet.save(partial, "PNG")
        for tracker in self._trackers:
            tracker.picture(SAMPLES, sheet, images_seen)

    def close(self) -> None:
        """Write all pending data and close."""
        if not self._bar.disable:  # it would print an empty line
            self._bar.stop()
        self._file.close()
        for tracker in self._trackers:
            tracker.close()
