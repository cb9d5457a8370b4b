"""What all controls of the studio share: common parts of the page, and how a step is taken and shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from hierarchy_builder.errors import MismatchError, TrainerError
from trainer.studio.board import draw_board
from trainer.studio.folder import StudioFolder
from trainer.studio.workbench import Workbench, history_lines
from trainer.trajectories.edit import prototype
from trainer.trajectories.pipeline import TrajectoryPipeline

WELCOME = "Choose a class and a seed, then press **Generate**."
WARNING = "⚠ "
"""Before what could not be done, and what to do instead."""
JOINS = [
    ("select only that", "replace"),
    ("add", "add"),
    ("remove", "remove"),
    ("keep what is in both", "intersect"),
]


class Desk:
    """The page of one model; everything of one person is in the Workbench that the browser session holds.

    Made inside `gr.Blocks`; its components are rendered where the page wants them.
    """

    def __init__(self, pipe: TrajectoryPipeline, folder: StudioFolder, vocabulary: Path | None) -> None:
        self.pipe = pipe
        self.folder = folder
        self.vocabulary = vocabulary
        if vocabulary is not None:
            _check_vocabulary(vocabulary, pipe)
        self.levels = list(range(pipe.drawn_levels))
        names = pipe.class_names or [str(number) for number in range(pipe.model.config.num_classes)]
        self.bench = gr.State(Workbench())
        self.status = gr.Markdown(WELCOME, elem_id="status", render=False)
        self.history = gr.Markdown("no steps yet", render=False)
        self.label = gr.Dropdown(
            names, value=names[0], label="Class (name or id)", allow_custom_value=True, scale=3, render=False
        )
        self.join = gr.Radio(JOINS, value="replace", label="and then", scale=3, render=False)
        self.board = gr.Image(
            show_label=False,
            interactive=False,
            format="png",
            buttons=["download", "fullscreen"],
            elem_id="board",
            alt_text="Every level of the trajectory, coarse → fine; click to select",
            render=False,
        )

    @property
    def shows(self) -> list[Any]:
        """What `shown` and `take` give values for."""
        return [self.bench, self.board, self.status, self.history]

    def on(
        self,
        event: Callable[..., Any],
        step: Callable[..., Workbench],
        inputs: Sequence[Any] = (),
        done: str = "",
    ) -> None:
        """Take a step of the workbench at an event; what it raises is said, and nothing changes."""

        def act(bench: Workbench, *values: Any) -> tuple[Any, ...]:
            return self.take(lambda: step(bench, *values), bench, done)

        event(act, [self.bench, *inputs], self.shows)

    def take(self, step: Callable[[], Workbench], before: Workbench, done: str = "") -> tuple[Any, ...]:
        """Values of `shows` after a step, or as before it with what it raised."""
        try:
            after = step()
        except TrainerError as error:
            return self.shown(before, f"{WARNING}{error}")
        return self.shown(after, done)

    def shown(self, bench: Workbench, message: str = "") -> tuple[Any, ...]:
        """Values of `shows`."""
        if bench.trajectory is None:
            return bench, None, message or WELCOME, "no steps yet"
        picture = draw_board(bench.trajectory, bench.selection, bench.reference).picture
        lines = history_lines(bench.trajectory) or ["as it was first made"]
        steps = "\n".join(f"{number}. {line}" for number, line in enumerate(lines, start=1))
        return bench, picture, f"{message}  \n{_state_line(bench)}" if message else _state_line(bench), steps


def _state_line(bench: Workbench) -> str:
    trajectory = bench.current()
    parts = [f"**{trajectory.class_name}**, seed {trajectory.seeds[0]}"]
    if bench.selection is not None:
        count = bench.selection.count
        parts.append(f"{count} token{'' if count == 1 else 's'} of level {bench.selection.level} selected")
    if bench.taken_from:
        parts.append(f"taken: {bench.taken_from}")
    return " · ".join(parts)


def _check_vocabulary(vocabulary: Path, pipe: TrajectoryPipeline) -> None:
    """Raise what `prototype` raises, and MismatchError for prototypes of other features, before anything is served."""
    width = prototype(vocabulary, 0).features.shape[1]
    if width != pipe.model.config.in_channels:
        raise MismatchError(
            f"vocabulary {vocabulary} has prototypes of {width} channels, the model's features "
            f"{pipe.model.config.in_channels}: give one of the same encoder"
        )
