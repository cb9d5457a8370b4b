"""The tabs of the studio: the controls of each, and the step of the workbench that a button takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.processing_utils import save_file_to_cache

from hierarchy_builder.errors import UsageError
from hierarchy_builder.files.whole import write_bytes
from trainer.evaluation.definitions import FIGURES
from trainer.evaluation.sweep import Kind, SweepConfig, parse_strengths, summarise, sweep, table_in_words
from trainer.seeds import parse_seeds
from trainer.studio.board import draw_board
from trainer.studio.desk import UNSAVED, Desk, Seat
from trainer.studio.folder import SUFFIX
from trainer.studio.workbench import Join, Workbench, markdown_report, markdown_table
from trainer.trajectories.edit import prototype
from trainer.trajectories.trajectory import Trajectory

TAKEN = "Taken. Select other tokens, and press **Apply features**."
EDITED = "Edited. Press Resume to draw the following levels again."
EDITED_LEVEL = "the edited one"
MOST_EDITS = 1000
"""Most edits of a sweep."""
SWEEP_TEXT = (
    "Runs the same edit for several seeds, levels and strengths, with two controls: no edit, and other noise. It edits "
    "the selection, or the largest region of the object if nothing is selected; features come from the next class."
)
CHANGES = "Changes by level: mean 1 − cosine of tokens"
SWEPT = "Mean ± half the 95 % interval over seeds"
COMPARED = ("level", "change", "changed_share", "lis", "inside")
"""Columns of `compare` that fit next to the board; the Markdown report has all of them."""


def edit_tab(desk: Desk) -> None:
    with gr.Tab("Edit"):
        gr.Markdown(
            "**Features.** Select tokens and take their features; select other tokens and apply the features there."
        )
        with gr.Row():
            mean, tokens = (partial(Workbench.take, how=how) for how in ("mean", "tokens"))
            desk.button("Take mean", mean, done=TAKEN, elem_id="take")
            desk.button("Take token by token", tokens, done=TAKEN, elem_id="take-tokens")
        if desk.vocabulary is not None:
            with gr.Row(equal_height=True):
                text = "Prototype of the vocabulary"
                number = gr.Number(0, label=text, precision=0, elem_id="prototype")
                take = partial(_take_prototype, desk)
                desk.button("Take prototype", take, [number], TAKEN, elem_id="take-prototype")
        text = "Strength (0: no change, 1: the taken features)"
        strength = gr.Slider(-1.0, 2.0, 1.0, step=0.05, label=text, elem_id="strength")
        desk.button(
            "Apply features", Workbench.apply_features, [strength], EDITED, variant="primary", elem_id="apply"
        )
        gr.Markdown(
            "**Shape.** Merge the selected tokens into their neighbouring regions, or move the border of a region."
        )
        with gr.Row(elem_classes="narrow"):
            desk.button("Give to neighbours", Workbench.apply_shape, done=EDITED, elem_id="give")
            for how in ("grow", "shrink"):
                step = partial(Workbench.reshape_region, how=how)
                desk.button(f"{how.capitalize()} region", step, done=EDITED, elem_id=f"{how}-region")
        gr.Markdown("**Resume.** Levels up to the chosen one stay identical, bit for bit.")
        with gr.Row(equal_height=True):
            look: dict[str, Any] = {"value": EDITED_LEVEL, "label": "Keep levels up to", "elem_id": "keep"}
            level = gr.Radio([EDITED_LEVEL, *desk.levels[:-1]], **look)
            text = "Seeds of the other levels (empty: unchanged)"
            seeds = gr.Textbox(label=text, placeholder="7, or 1,2", elem_id="resume-seeds")
        done = "Drawn. Compare shows what changed."
        look = {"variant": "primary", "elem_id": "resume"}
        desk.button("Resume", _resume, [level, seeds], done, draws=True, **look)
        gr.Markdown("**Steps**")
        desk.history.render()


def paint_tab(desk: Desk) -> None:
    def picture(seat: Seat, level: int) -> np.ndarray | None:
        shown = seat.bench.trajectory
        return None if shown is None else draw_board(shown, None, seat.bench.reference).cell(level)

    def paint(bench: Workbench, painting: dict[str, Any] | None, level: int, join: Join) -> Workbench:
        layers = [np.asarray(layer) for layer in (painting or {}).get("layers", [])]
        return bench.paint(np.maximum.reduce(layers) if layers else None, int(level), join)

    with gr.Tab("Paint") as tab:
        gr.Markdown("Choose the brush at the left of the picture, and paint over the tokens to select.")
        level = gr.Radio(desk.levels, value=min(1, desk.levels[-1]), label="Level", elem_id="paint-level")
        editor = gr.ImageEditor(
            show_label=False,
            type="numpy",
            sources=[],
            transforms=[],
            layers=False,
            brush=gr.Brush(default_size=24, colors=["#ff2d2d"], color_mode="fixed"),
            canvas_size=(448, 448),
            fixed_canvas=True,
            elem_id="painting",
        )
        for shows in (tab.select, level.input):
            shows(picture, [desk.seat, level], editor)
        desk.button(
            "Use painting", paint, [editor, level, desk.join], variant="primary", elem_id="use-painting"
        )


def compare_tab(desk: Desk) -> None:
    def show(bench: Workbench) -> tuple[Any, ...]:
        picture, rows = bench.comparison()
        assert bench.reference is not None  # `comparison` has refused a bench without one
        before, after = (
            draw_board(each, None, bench.reference).cell(each.num_levels - 1)
            for each in (bench.reference, bench.current())
        )
        return (
            gr.ImageSlider((before, after), visible=True),
            gr.Image(np.asarray(picture), visible=True),
            gr.Markdown(_table(CHANGES, rows, COMPARED), visible=True),
            "Compared with the pinned trajectory.",
        )

    with gr.Tab("Compare"):
        gr.Markdown("Compares with the trajectory as it was generated, loaded, or last pinned.")
        with gr.Row():
            done = "Pinned: comparisons are with this trajectory from now on."
            desk.button("Pin this one", Workbench.pin, done=done, elem_id="pin")
            compare = gr.Button("Compare", variant="primary", elem_id="compare")
        slider = gr.ImageSlider(
            label="Finest level before | after: drag the divider",
            interactive=False,
            format="png",
            elem_id="slider",
            visible=False,
        )
        sheet = gr.Image(
            show_label=False,
            interactive=False,
            format="png",
            buttons=["download", "fullscreen"],
            elem_id="comparison",
            visible=False,
            alt_text="Canvases before and after, and the change of each token",
        )
        table = gr.Markdown(elem_id="scores", visible=False)
        outputs = [slider, sheet, table, desk.status]
        desk.wait(compare, "Comparing…")
        compare.click(
            lambda seat: desk.attempt(seat, show, outputs), [desk.seat], outputs, show_progress="hidden"
        )


def sweep_tab(desk: Desk) -> None:
    with gr.Tab("Sweep"):
        gr.Markdown(SWEEP_TEXT)
        kind = gr.Radio(["features", "shape"], value="features", label="Edit", elem_id="sweep-kind")
        seeds = gr.Textbox("0-3", label="Seeds", elem_id="sweep-seeds")
        levels = gr.CheckboxGroup(
            desk.levels[:-1], value=[min(1, desk.levels[-1])], label="Levels to edit", elem_id="sweep-levels"
        )
        strengths = gr.Textbox("0.5,1", label="Strengths", elem_id="sweep-strengths")
        run = gr.Button("Run the sweep", variant="primary", elem_id="run-sweep")
        progress_bar = gr.Markdown(elem_id="sweeping", min_height=44)
        table = gr.Markdown(elem_id="swept", visible=False)

        def go(
            seat: Seat,
            label: str,
            kind: Kind,
            seeds: str,
            levels: list[int],
            strengths: str,
            progress: Any = gr.Progress(),
        ) -> tuple[Any, ...]:
            def swept(bench: Workbench) -> tuple[Any, ...]:
                config = SweepConfig(
                    labels=(desk.pipe.label_id(desk.chosen(label)),),
                    seeds=tuple(parse_seeds(seeds)),
                    levels=tuple(levels),
                    strengths=parse_strengths(strengths),
                    kind=kind,
                )
                edits = len(config.seeds) * len(levels) * len(config.strengths)
                if edits > MOST_EDITS:
                    raise UsageError(
                        f"{edits:,} edits, expected at most {MOST_EDITS:,}: `trainer sweep` has no limit"
                    )
                rows = list(progress.tqdm(sweep(desk.pipe, config, bench.selection), desc="sweeping"))
                if not rows:
                    raise UsageError(
                        "no edit was possible: choose levels, and for shapes a region that can grow"
                    )
                shown = table_in_words(summarise(rows))
                filled = gr.Markdown(_table(SWEPT, shown, list(shown[0])), visible=True)
                return filled, f"Seeds swept: {len(config.seeds)}."

            return desk.attempt(seat, swept, outputs)

        outputs = [table, desk.status]
        desk.wait(run)
        asked = [desk.seat, desk.label, kind, seeds, levels, strengths]
        run.click(go, asked, outputs, show_progress_on=progress_bar)


def files_tab(desk: Desk) -> gr.Dropdown:
    """The list of saved trajectories is returned, since the page reads the folder again when it is loaded."""
    with gr.Tab("Files"):
        gr.Markdown(f"All files are saved in `{desk.folder.root.name}/`.")
        name = gr.Textbox("trajectory", label="Name", elem_id="file-name")
        with gr.Row(elem_classes="narrow"):
            writers = (
                (
                    gr.Button("Save", variant="primary", elem_id="save"),
                    SUFFIX,
                    lambda bench, path: bench.current().save(path),
                ),
                (
                    gr.Button("Export HTML", elem_id="export"),
                    ".html",
                    lambda bench, path: bench.current().to_html(path),
                ),
                (
                    gr.Button("Export report (Markdown)", elem_id="report"),
                    ".md",
                    lambda bench, path: write_bytes(path, markdown_report(bench).encode()),
                ),
            )
        download = gr.DownloadButton("Download", visible=False, elem_id="download")
        saved = gr.Dropdown(desk.folder.names(), label="Saved trajectories", elem_id="saved")
        with gr.Row():
            desk.button("Load", partial(_load, desk), [saved], "Loaded.", elem_id="load")
            refresh = gr.Button("Refresh list", elem_id="refresh")
            refresh.click(lambda: gr.Dropdown(desk.folder.names()), None, saved)

        def offered(path: Path) -> gr.DownloadButton:
            """The button for a file, of which Gradio serves a copy; the folder itself is not served."""
            return gr.DownloadButton(
                f"Download {path.name}", save_file_to_cache(path, download.GRADIO_CACHE), visible=True
            )

        def choose(seat: Seat, name: str | None) -> tuple[Any, ...]:
            return desk.attempt(
                seat, lambda bench: (offered(desk.folder.trajectory(name)), gr.skip()), chosen
            )

        chosen = [download, desk.status]
        saved.input(choose, [desk.seat, saved], chosen)
        outputs = [saved, download, desk.unsaved, desk.status]
        for button, suffix, write in writers:

            def save(seat: Seat, name: str, suffix: str = suffix, write: Any = write) -> tuple[Any, ...]:
                def written(bench: Workbench) -> tuple[Any, ...]:
                    path = desk.folder.path(name, suffix)
                    write(bench, path)
                    if suffix == SUFFIX:
                        seat.bench = bench.saved()
                    mark = UNSAVED if seat.bench.is_unsaved else ""
                    return gr.Dropdown(desk.folder.names()), offered(path), mark, f"Wrote `{path.name}`."

                return desk.attempt(seat, written, outputs)

            button.click(save, [desk.seat, name], outputs)
    return saved


def _take_prototype(desk: Desk, bench: Workbench, number: float | None) -> Workbench:
    assert desk.vocabulary is not None
    return bench.use(prototype(desk.vocabulary, int(number or 0)), f"prototype {int(number or 0)}")


def _load(desk: Desk, bench: Workbench, name: str | None) -> Workbench:
    if not name:
        raise UsageError("nothing is chosen: choose a saved trajectory from the list")
    return bench.open(desk.pipe.adopt(Trajectory.load(desk.folder.trajectory(name))))


def _resume(bench: Workbench, level: str | int, seeds: str) -> Workbench:
    given = parse_seeds(seeds) if seeds.strip() else None
    kept = None if level == EDITED_LEVEL else int(level)
    return bench.resume(kept, given[0] if given and len(given) == 1 else given)


def _table(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Some columns of rows as a table in Markdown, under their names in words."""
    shown = [{FIGURES.term(name): row[name] for name in columns if name in row} for row in rows]
    return "\n".join([title, "", *markdown_table(shown, digits=3)])
