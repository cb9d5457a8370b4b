"""What the controls of the studio share: components used by several tabs, and how a step is taken and shown."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from hierarchy_builder.errors import MismatchError, TrainerError, UsageError
from hierarchy_builder.terminal import counted
from trainer.studio.board import draw_board
from trainer.studio.folder import StudioFolder
from trainer.studio.workbench import Workbench, history_lines, quoted
from trainer.trajectories.edit import prototype
from trainer.trajectories.pipeline import TrajectoryPipeline

WELCOME = "Choose a class and a seed, then press **Generate**."
WARNING = "⚠ "
"""Marks a message that says what could not be done and what to do instead."""
JOINS = [
    ("select only that", "replace"),
    ("add", "add"),
    ("remove", "remove"),
    ("keep the overlap", "intersect"),
]


class Desk:
    """The page of one model. The state of each user is a Workbench, which the browser session holds.

    Create it inside `gr.Blocks`; the page renders the components at their places.
    """

    def __init__(self, pipe: TrajectoryPipeline, folder: StudioFolder, vocabulary: Path | None) -> None:
        self.pipe = pipe
        self.folder = folder
        self.vocabulary = vocabulary
        if vocabulary is not None:
            _check_vocabulary(vocabulary, pipe)
        self.levels = list(range(pipe.drawn_levels))
        names = [pipe.class_name(label) for label in pipe.classes]
        self._stops, self._work = 0, threading.local()
        pipe.model.register_forward_pre_hook(self._check_stop)
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
        """The components that `shown` and `take` return values for."""
        return [self.bench, self.board, self.status, self.history]

    def stop(self) -> str:
        """End what is being drawn, at the next evaluation of the network. Returns the text for the status line."""
        self._stops += 1
        return "Stopped what was being drawn."

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """What the network draws in this block ends when `stop` is called."""
        self._work.stops = self._stops
        try:
            yield
        finally:
            del self._work.stops

    def _check_stop(self, *unused: Any) -> None:
        if getattr(self._work, "stops", self._stops) != self._stops:
            raise UsageError("stopped: nothing was changed")

    def chosen(self, label: Any) -> str:
        """The class in the list. Raises UsageError if it is empty."""
        if not isinstance(label, str) or not label.strip():
            raise UsageError("no class is chosen: choose one in the list, or type its name or id")
        return label

    def on(
        self,
        event: Callable[..., Any],
        step: Callable[..., Workbench],
        inputs: Sequence[Any] = (),
        done: str = "",
    ) -> None:
        """Take a step of the workbench at an event. If it raises, the page shows the error and does not change."""

        def act(bench: Workbench, *values: Any) -> tuple[Any, ...]:
            return self.take(lambda: step(bench, *values), bench, done)

        event(act, [self.bench, *inputs], self.shows)

    def button(
        self,
        text: str,
        step: Callable[..., Workbench],
        inputs: Sequence[Any] = (),
        done: str = "",
        **look: Any,
    ) -> None:
        """A button that takes a step, see `on`. look: options of `gr.Button`."""
        self.on(gr.Button(text, **look).click, step, inputs, done)

    def attempt(self, work: Callable[[], tuple[Any, ...]], outputs: Sequence[Any]) -> tuple[Any, ...]:
        """Values for `outputs`, of which the last is the status line; if `work` raises, only that line changes."""
        try:
            with self._stoppable():
                return work()
        except (TrainerError, OSError) as error:
            return (*[gr.skip()] * (len(outputs) - 1), f"{WARNING}{quoted(error)}")

    def take(self, step: Callable[[], Workbench], before: Workbench, done: str = "") -> tuple[Any, ...]:
        """Values for `shows` after a step; if it raises, those before the step, with the error."""
        try:
            with self._stoppable():
                after = step()
        except (TrainerError, OSError) as error:
            return self.shown(before, f"{WARNING}{quoted(error)}")
        return self.shown(after, done)

    def shown(self, bench: Workbench, message: str = "") -> tuple[Any, ...]:
        """Values for `shows`."""
        if bench.trajectory is None:
            return bench, None, message or WELCOME, "no steps yet"
        picture = draw_board(bench.trajectory, bench.selection, bench.reference).picture
        lines = history_lines(bench.trajectory) or ["not edited"]
        steps = "\n".join(f"{number}. {quoted(line)}" for number, line in enumerate(lines, start=1))
        return bench, picture, f"{message}  \n{_state_line(bench)}" if message else _state_line(bench), steps


def _state_line(bench: Workbench) -> str:
    trajectory = bench.current()
    parts = [f"**{quoted(trajectory.class_name)}**, seed {trajectory.seeds[0]}"]
    if bench.selection is not None:
        parts.append(f"{counted(bench.selection.count, 'token')} of level {bench.selection.level} selected")
    if bench.taken_from:
        parts.append(f"taken: {quoted(bench.taken_from)}")
    return " · ".join(parts)


def _check_vocabulary(vocabulary: Path, pipe: TrajectoryPipeline) -> None:
    """Check the vocabulary before the page is served. Raises MismatchError if it is of features of another width."""
    width = prototype(vocabulary, 0).features.shape[1]
    if width != pipe.model.config.in_channels:
        raise MismatchError(
            f"vocabulary {vocabulary} has prototypes of {width} channels, the model's features "
            f"{pipe.model.config.in_channels}: give one of the same encoder"
        )
