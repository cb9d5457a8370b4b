"""The studio: a trajectory in a browser, to look at, edit, resume and measure.

Every action is a step of `workbench.Workbench`; `desk` takes and shows steps, `tabs` holds the rest of the page. Gradio
comes with the extra `studio`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from hierarchy_builder.errors import TrainerError, UsageError
from hierarchy_builder.terminal import counted
from trainer.methods.registry import METHODS
from trainer.studio.board import draw_board
from trainer.studio.desk import Desk, Seat, what_was_undone
from trainer.studio.folder import StudioFolder
from trainer.studio.guard import Guard
from trainer.studio.tabs import compare_tab, edit_tab, files_tab, paint_tab, sweep_tab
from trainer.studio.workbench import Workbench, quoted
from trainer.training import checkpoint
from trainer.trajectories.pipeline import SamplingArguments, TrajectoryPipeline

LOOPBACK = "127.0.0.1"
MOST_STEPS = 1000
"""Most network evaluations per level that the page asks for."""
UPLOAD_LIMIT = "8mb"
"""Largest upload that the server accepts; browsers upload only paintings."""
USERS_AT_ONCE = 8
"""Sessions whose actions run side by side; those of one session run one after the other."""
FIRST = "This is a first trajectory: click a region to select it, or press **Generate** for another."
PICKS = [
    ("whole region", "region"),
    ("one token", "token"),
    ("similar tokens", "similar"),
    ("merge the selection into the clicked region", "give"),
]
KEYS_TEXT = (
    "**g** generate · **t** take mean · **a** apply features · **r** resume · **u** undo · **y** redo · **Esc** stop. "
    "The boxes below select a token without a mouse; the choices above say how."
)
CSS, SCRIPT = (
    files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("studio.css", "studio.js")
)
"""SCRIPT has the tooltips of all controls, by their `elem_id`, and the buttons that keys press."""


def build_studio(pipe: TrajectoryPipeline, folder: Path, vocabulary: Path | None = None) -> gr.Blocks:
    """The page for one model.

    folder: where trajectories, pages and reports are saved; no other folder is read or written. vocabulary: a
    vocabulary.npz of features of the same encoder, whose prototypes can then be sources of edits.
    """
    with gr.Blocks(title="Trajectory studio", fill_width=True, analytics_enabled=False) as page:
        desk = Desk(pipe, StudioFolder(folder), vocabulary)
        gr.Markdown(f"# Trajectory studio\n\n{about(pipe)}", elem_id="header")
        desk.unsaved.render()
        desk.status.render()
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                _generate_row(desk)
                gr.Markdown(
                    "Columns: levels, coarse to fine. Rows: regions, features as colours, decoded pictures."
                )
                desk.board.render()
                _selection_row(desk)
            with gr.Column(scale=2, min_width=320), gr.Tabs():
                edit_tab(desk)
                paint_tab(desk)
                compare_tab(desk)
                sweep_tab(desk)
                saved = files_tab(desk)
        page.load(lambda: gr.Dropdown(desk.folder.names()), None, saved, queue=False)
        desk.on(page.load, partial(_first, desk), [], FIRST)
        page.load(None, None, None, js=SCRIPT)
    page.queue(default_concurrency_limit=USERS_AT_ONCE)
    return page


def about(pipe: TrajectoryPipeline) -> str:
    """Model, method and preset as Markdown, as far as the pipeline knows them."""
    parts = [row.title for row in METHODS.values() if row.load("pipeline") is type(pipe)]
    folder = pipe.weights.get("folder")
    if folder:
        where = [name for name in Path(folder).parts[-3:] if name != "checkpoints"]
        half_life = pipe.weights.get("ema", "raw")
        averaged = f"weights averaged with a half-life of {quoted(half_life)} thousand images"
        weights = "raw weights" if half_life == "raw" else averaged
        parts = [f"model {quoted(' / '.join(where))}", weights, *parts]
        try:
            config = checkpoint.load_state(Path(folder)).config
        except (TrainerError, OSError):  # moved since it was loaded
            config = {}
        if config.get("preset"):
            parts.append(f"preset {quoted(config['preset'])}")
    parts.append(f"encoder {quoted(pipe.encoder.get('name', 'unknown'))}")
    parts.append(counted(pipe.num_parameters, "parameter"))
    return " · ".join(parts)


def launch(
    pipe: TrajectoryPipeline,
    folder: Path,
    vocabulary: Path | None = None,
    *,
    host: str = LOOPBACK,
    port: int | None = None,
    block: bool = True,
    allowed_hosts: Sequence[str] = (),
) -> tuple[gr.Blocks, str]:
    """Serve the studio until it is stopped; with block=False returns at once. Returns the page and its URL.

    allowed_hosts: more names under which browsers reach the server, for example that of a proxy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Gradio passes pictures and paintings through temporary files, which must stay inside the folder too.
    served = (folder / ".served").resolve()
    os.environ["GRADIO_TEMP_DIR"] = str(served)
    page = build_studio(pipe, folder, vocabulary)
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=not block,
        share=False,
        quiet=not block,
        footer_links=[],
        css=CSS,
        theme=gr.themes.Base(),
        max_file_size=UPLOAD_LIMIT,
        app_kwargs={"middleware": [Middleware(Guard, host=host, allowed=allowed_hosts, served=served)]},
    )
    return page, url


def _generate_row(desk: Desk) -> None:
    def generate(
        bench: Workbench, label: Any, seed: float | None, steps: float | None, temperature: float | None
    ) -> Workbench:
        steps = 1 if steps is None else steps
        if not 1 <= steps <= MOST_STEPS:
            raise UsageError(f"steps per level are {steps}, expected 1 to {MOST_STEPS:,}")
        how: SamplingArguments = {
            "num_steps": int(steps),
            "temperature": 1.0 if temperature is None else temperature,
        }
        return bench.open(desk.pipe(label=desk.chosen(label), seed=int(seed or 0), **how))

    with gr.Row(elem_id="drawing"):
        desk.label.render()
        seed = gr.Number(0, label="Seed", precision=0, scale=1, min_width=60, elem_id="seed")
        steps = gr.Number(1, label="Steps", precision=0, scale=1, min_width=60, elem_id="steps")
        temperature = gr.Number(
            1, label="Temperature", step=0.1, scale=1, min_width=105, elem_id="temperature"
        )
        inputs, done = [desk.label, seed, steps, temperature], "Click a region on the board to select it."
        look: dict[str, Any] = {"variant": "primary", "scale": 1, "min_width": 110, "elem_id": "generate"}
        desk.button("Generate", generate, inputs, done, draws=True, **look)
        stop = gr.Button("Stop", min_width=80, elem_id="stop")
        desk.wait(stop, "Stopping…")
        stop.click(desk.stop, desk.seat, desk.status, queue=False, show_progress="hidden")


def _first(desk: Desk, bench: Workbench) -> Workbench:
    """A trajectory to look at when the page opens."""
    return bench if bench.trajectory else bench.open(desk.pipe(label=desk.pipe.classes[0], seed=0))


def _selection_row(desk: Desk) -> None:
    with gr.Row(equal_height=True):
        pick = gr.Radio(PICKS, value="region", label="A click means", scale=3, elem_id="pick")
        desk.join.render()
        text = "Similarity threshold (cosine)"
        cosine = gr.Slider(0.0, 1.0, 0.9, step=0.01, label=text, scale=2, min_width=260, elem_id="cosine")
    with gr.Row():
        for how in ("invert", "grow", "shrink", "clear"):
            look: dict[str, Any] = {"size": "sm", "min_width": 90, "elem_id": f"{how}-selection"}
            step = partial(Workbench.reshape_selection, how=how)
            desk.button(f"{how.capitalize()} selection", step, **look)
        desk.button("Undo", Workbench.undo, (), what_was_undone, size="sm", min_width=70, elem_id="undo")
        desk.button("Redo", Workbench.redo, (), "Repeated.", size="sm", min_width=70, elem_id="redo")
    with gr.Accordion("Keys, and selection without a mouse", open=False):
        gr.Markdown(KEYS_TEXT)
        with gr.Row(elem_id="typed"):
            # No number has bounds of its own: Gradio would print a traceback for others, and the actions say more.
            look = {"precision": 0, "min_width": 80}
            level = gr.Number(0, label="Level", **look, elem_id="at-level")
            row = gr.Number(0, label="Row", **look, elem_id="at-row")
            column = gr.Number(0, label="Column", **look, elem_id="at-column")
            inputs = [level, row, column, pick, desk.join, cosine]
            desk.button("Select", _typed, inputs, min_width=90, elem_id="select-token")

    def click(seat: Seat, pick: str, join: str, cosine: float, event: gr.SelectData) -> tuple[Any, ...]:
        return desk.take(seat, lambda bench: _clicked(bench, event.index, pick, join, cosine))

    desk.board.select(click, [desk.seat, pick, desk.join, cosine], desk.shows, show_progress="hidden")


def _typed(
    bench: Workbench, level: Any, row: Any, column: Any, pick: Any, join: Any, cosine: float
) -> Workbench:
    place = int(level or 0), int(row or 0), int(column or 0)
    most = bench.current().num_levels - 1, *(side - 1 for side in bench.current().grid)
    if any(not 0 <= each <= last for each, last in zip(place, most, strict=True)):
        raise UsageError(f"level, row and column are {place}, expected at most {most} and at least 0")
    return _picked(bench, place, pick, join, cosine)


def _clicked(bench: Workbench, pixel: Any, pick: Any, join: Any, cosine: float) -> Workbench:
    place = draw_board(bench.current(), bench.selection, bench.reference).place(*pixel)
    if place is None:
        return bench
    return _picked(bench, place, pick, join, cosine)


def _picked(bench: Workbench, place: tuple[int, int, int], pick: Any, join: Any, cosine: float) -> Workbench:
    level, row, column = place
    if pick != "give":
        return bench.click(level, row, column, pick, join, cosine)
    selection = bench.chosen()
    if level != selection.level:
        raise UsageError(
            f"the selection is on level {selection.level}, the click on level {level}: click a region of the same level"
        )
    return bench.apply_shape(int(bench.current().regions()[level, row, column]))
