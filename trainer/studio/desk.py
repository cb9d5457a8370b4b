"""What the controls of the studio share: components used by several tabs, and how a step is taken and shown."""

from __future__ import annotations

import itertools
import json
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
NO_STEPS = "No edits yet."
DRAWING = "Drawing… **Stop** ends it."
UNSAVED = "● not saved"
"""Shown while the trajectory has edits that are in no file; the page then asks before it is left."""
Done = str | Callable[[Workbench, Workbench], str]
"""What is said after a step, or a function of the workbenches before and after it."""
WARNING = "⚠ "
"""Marks a message that says what could not be done and what to do instead."""
JOINS = [
    ("replace it", "replace"),
    ("add to it", "add"),
    ("remove from it", "remove"),
    ("keep the overlap", "intersect"),
]


class Seat:
    """What one browser session holds: its workbench, a queue of its own actions, and its way to stop them."""

    def __init__(self) -> None:
        self.bench = Workbench()
        self.turn = threading.Lock()
        """Held by the action that runs; the others of this session wait for it, those of other sessions do not."""
        self.stops = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Seat:
        """A fresh seat: Gradio copies the state of the page for each session."""
        return Seat()


class Desk:
    """The page of one model. The state of each user is a Seat, which the browser session holds.

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
        self._work = threading.local()
        pipe.model.register_forward_pre_hook(self._check_stop)
        self.seat = gr.State(Seat())
        self.unsaved = gr.Markdown("", elem_id="unsaved", render=False)
        self.status = gr.Markdown(WELCOME, elem_id="status", render=False)
        self.history = gr.Markdown(NO_STEPS, render=False)
        self.label = gr.Dropdown(
            names,
            value=names[0],
            label="Class (name or id)",
            allow_custom_value=True,
            scale=2,
            min_width=130,
            render=False,
            elem_id="class",
        )
        self.join = gr.Radio(
            JOINS,
            value="replace",
            label="The selection so far",
            scale=3,
            render=False,
            elem_id="join",
        )
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
        return [self.board, self.status, self.history, self.unsaved]

    def stop(self, seat: Seat) -> Any:
        """End what this user is drawing or waits to draw, at the next evaluation of the network.

        Returns the text for the status line, which what is stopped writes itself.
        """
        if not seat.turn.locked():
            return "Nothing is being drawn."
        seat.stops += 1
        return gr.skip()

    def wait(self, button: gr.Button, text: str = DRAWING) -> None:
        """Show a text as soon as a button is pressed, until the answer comes."""
        button.click(None, None, self.status, js=f"() => {json.dumps(text)}")

    @contextmanager
    def _turn(self, seat: Seat) -> Iterator[None]:
        """Wait for the actions of this user before this one; what is drawn then ends when `stop` is called."""
        stops, outer = seat.stops, getattr(self._work, "now", (None, 0))
        with seat.turn:
            self._work.now = seat, stops
            try:
                self._check_stop()
                yield
            finally:
                self._work.now = outer

    def _check_stop(self, *unused: Any) -> None:
        seat, stops = getattr(self._work, "now", (None, 0))
        if seat is not None and seat.stops != stops:
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
        done: Done = "",
    ) -> None:
        """Take a step of the workbench at an event. If it raises, the page shows the error and does not change."""

        def act(seat: Seat, *values: Any) -> tuple[Any, ...]:
            return self.take(seat, lambda bench: step(bench, *values), done)

        event(act, [self.seat, *inputs], self.shows, show_progress="minimal", show_progress_on=self.board)

    def button(
        self,
        text: str,
        step: Callable[..., Workbench],
        inputs: Sequence[Any] = (),
        done: Done = "",
        *,
        draws: bool = False,
        **look: Any,
    ) -> None:
        """A button that takes a step, see `on`. draws: whether it takes its time. look: options of `gr.Button`."""
        button = gr.Button(text, **look)
        if draws:
            self.wait(button)
        self.on(button.click, step, inputs, done)

    def attempt(
        self, seat: Seat, work: Callable[[Workbench], tuple[Any, ...]], outputs: Sequence[Any]
    ) -> tuple[Any, ...]:
        """Values for `outputs`, of which the last is the status line; if `work` raises, only that line changes."""
        try:
            with self._turn(seat):
                return work(seat.bench)
        except (TrainerError, OSError) as error:
            return (*[gr.skip()] * (len(outputs) - 1), f"{WARNING}{quoted(error)}")

    def take(self, seat: Seat, step: Callable[[Workbench], Workbench], done: Done = "") -> tuple[Any, ...]:
        """Values for `shows` after a step; if it raises, those before the step, with the error."""
        try:
            with self._turn(seat):
                before, seat.bench = seat.bench, step(seat.bench)
                return self.shown(seat.bench, done if isinstance(done, str) else done(before, seat.bench))
        except (TrainerError, OSError) as error:
            return self.shown(seat.bench, f"{WARNING}{quoted(error)}")

    def shown(self, bench: Workbench, message: str = "") -> tuple[Any, ...]:
        """Values for `shows`."""
        if bench.trajectory is None:
            return None, message or WELCOME, NO_STEPS, ""
        picture = draw_board(bench.trajectory, bench.selection, bench.reference).picture
        lines = enumerate(history_lines(bench.trajectory), start=1)
        steps = "\n".join(f"{number}. {quoted(line)}" for number, line in lines) or NO_STEPS
        said = f"{message}  \n{_state_line(bench)}" if message else _state_line(bench)
        return picture, said, steps, UNSAVED if bench.is_unsaved else ""


def what_was_undone(before: Workbench, after: Workbench) -> str:
    """The message after an undo: the edit or drawing that is gone."""
    lines, left = (history_lines(each.current()) for each in (before, after))
    gone = [line for line, other in itertools.zip_longest(lines, left) if line and line != other]
    return f"Undone: {quoted(gone[0])}." if gone else "Back to the trajectory that was open before."


def _state_line(bench: Workbench) -> str:
    trajectory = bench.current()
    parts = [f"class **{quoted(trajectory.class_name)}**, seed {trajectory.seeds[0]}"]
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
