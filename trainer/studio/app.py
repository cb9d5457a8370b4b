"""The studio: a trajectory in a browser, to look at, edit, resume and measure.

Every action is a step of `workbench.Workbench`; `desk` takes and shows steps, `tabs` holds the rest of the page. Gradio
comes with the extra `studio`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from hierarchy_builder.errors import UsageError
from trainer.studio.board import draw_board
from trainer.studio.desk import Desk
from trainer.studio.folder import StudioFolder
from trainer.studio.guard import Guard
from trainer.studio.tabs import compare_tab, edit_tab, files_tab, paint_tab, sweep_tab
from trainer.studio.workbench import Workbench
from trainer.trajectories.pipeline import TrajectoryPipeline

LOOPBACK = "127.0.0.1"
MOST_STEPS = 1000
"""Most network evaluations per level that the page asks for."""
UPLOAD_LIMIT = "8mb"
"""Largest upload that the server accepts; browsers upload only paintings."""
CSS = """
#board img {cursor: crosshair}
#status {min-height: 1.6rem}
"""
PICKS = [
    ("whole region", "region"),
    ("one token", "token"),
    ("similar tokens", "similar"),
    ("merge the selection into the clicked region", "give"),
]


def build_studio(pipe: TrajectoryPipeline, folder: Path, vocabulary: Path | None = None) -> gr.Blocks:
    """The page for one model.

    folder: where trajectories, pages and reports are saved; no other folder is read or written. vocabulary: a
    vocabulary.npz of features of the same encoder, whose prototypes can then be sources of edits.
    """
    with gr.Blocks(title="Trajectory studio", fill_width=True, analytics_enabled=False) as page:
        desk = Desk(pipe, StudioFolder(folder), vocabulary)
        desk.status.render()
        with gr.Row():
            with gr.Column(scale=3, min_width=480):
                _generate_row(desk)
                gr.Markdown("Levels from coarse to fine: regions, features as colours, and decoded picture.")
                desk.board.render()
                _selection_row(desk)
            with gr.Column(scale=2, min_width=380), gr.Tabs():
                edit_tab(desk)
                paint_tab(desk)
                compare_tab(desk)
                sweep_tab(desk)
                files_tab(desk)
    return page


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
    def generate(bench: Workbench, label: Any, seed: float | None, steps: float | None) -> Workbench:
        if not 1 <= (steps or 1) <= MOST_STEPS:
            raise UsageError(f"steps per level are {steps}, expected 1 to {MOST_STEPS:,}")
        return bench.open(desk.pipe(label=desk.chosen(label), seed=int(seed or 0), num_steps=int(steps or 1)))

    with gr.Row(equal_height=True):
        desk.label.render()
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, scale=1, min_width=90)
        steps = gr.Number(
            1, label="Steps per level", precision=0, minimum=1, maximum=MOST_STEPS, scale=1, min_width=90
        )
        inputs, done = [desk.label, seed, steps], "Click a region on the board to select it."
        desk.button("Generate", generate, inputs, done, variant="primary", scale=1, min_width=110)
        gr.Button("Stop", min_width=80).click(desk.stop, None, desk.status, queue=False)


def _selection_row(desk: Desk) -> None:
    with gr.Row(equal_height=True):
        pick = gr.Radio(PICKS, value="region", label="A click means", scale=3)
        desk.join.render()
        cosine = gr.Slider(
            0.0, 1.0, 0.9, step=0.01, label="Similarity threshold (cosine)", scale=1, min_width=140
        )
    with gr.Row():
        for how in ("invert", "grow", "shrink", "clear"):
            step = partial(Workbench.reshape_selection, how=how)
            desk.button(f"{how.capitalize()} selection", step, size="sm", min_width=90)
        desk.button("Undo", Workbench.undo, size="sm", min_width=70)
        desk.button("Redo", Workbench.redo, size="sm", min_width=70)

    def click(bench: Workbench, pick: str, join: str, cosine: float, event: gr.SelectData) -> tuple[Any, ...]:
        return desk.take(lambda: _clicked(bench, event.index, pick, join, cosine), bench)

    desk.board.select(click, [desk.bench, pick, desk.join, cosine], desk.shows)


def _clicked(bench: Workbench, pixel: Any, pick: Any, join: Any, cosine: float) -> Workbench:
    place = draw_board(bench.current(), bench.selection, bench.reference).place(*pixel)
    if place is None:
        return bench
    level, row, column = place
    if pick != "give":
        return bench.click(level, row, column, pick, join, cosine)
    selection = bench.chosen()
    if level != selection.level:
        raise UsageError(
            f"the selection is on level {selection.level}, the click on level {level}: click a region of the same level"
        )
    return bench.apply_shape(int(bench.current().regions()[level, row, column]))
