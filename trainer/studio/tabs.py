"""The tabs of the studio: the controls of each, and the step of the workbench that a button takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from hierarchy_builder.errors import UsageError
from hierarchy_builder.files import without_nan, write_bytes
from trainer.evaluation.sweep import Kind, SweepConfig, summarise, summary_table, sweep
from trainer.seeds import parse_seeds
from trainer.studio.board import draw_board
from trainer.studio.desk import Desk
from trainer.studio.folder import SUFFIX
from trainer.studio.workbench import Join, Workbench, markdown_report
from trainer.trajectories.edit import prototype
from trainer.trajectories.trajectory import Trajectory

TAKEN = "Taken. Select the tokens that receive the features, then press Apply."
EDITED = "Edited. Press Resume to draw the following levels again."
EDITED_LEVEL = "the edited one"
MOST_EDITS = 1000
"""Most edits of a sweep."""
SWEEP_TEXT = (
    "Runs the same edit for several seeds, levels and strengths, with two controls: no edit, and other noise. It edits "
    "the selection, or the largest region of the object if nothing is selected; features come from the next class."
)
COMPARED = ("level", "change", "changed_share", "lis", "inside")
"""Columns of `compare` that fit next to the board; the Markdown report has all of them."""


def edit_tab(desk: Desk) -> None:
    with gr.Tab("Edit"):
        gr.Markdown(
            "**Features.** Select tokens and take their features; select other tokens and apply the features there."
        )
        with gr.Row():
            desk.button("Take mean", partial(Workbench.take, how="mean"), done=TAKEN)
            desk.button("Take token by token", partial(Workbench.take, how="tokens"), done=TAKEN)
        if desk.vocabulary is not None:
            with gr.Row(equal_height=True):
                number = gr.Number(0, label="Prototype of the vocabulary", precision=0, minimum=0)
                desk.button("Take prototype", partial(_take_prototype, desk), [number], TAKEN)
        strength = gr.Slider(
            -1.0, 2.0, 1.0, step=0.05, label="Strength (0: no change, 1: the taken features)"
        )
        desk.button("Apply features", Workbench.apply_features, [strength], EDITED, variant="primary")
        gr.Markdown(
            "**Shape.** Merge the selected tokens into their neighbouring regions, or move the border of a region."
        )
        with gr.Row():
            desk.button("Give to neighbours", Workbench.apply_shape, done=EDITED)
            desk.button("Grow region", partial(Workbench.reshape_region, how="grow"), done=EDITED)
            desk.button("Shrink region", partial(Workbench.reshape_region, how="shrink"), done=EDITED)
        gr.Markdown("**Resume.** Levels up to the chosen one stay identical, bit for bit.")
        with gr.Row(equal_height=True):
            level = gr.Radio([EDITED_LEVEL, *desk.levels[:-1]], value=EDITED_LEVEL, label="Keep levels up to")
            seeds = gr.Textbox(label="Seeds of the other levels (empty: unchanged)", placeholder="7, or 1,2")
        desk.button(
            "Resume", _resume, [level, seeds], "Drawn. Compare shows what changed.", variant="primary"
        )
        gr.Markdown("**Steps**")
        desk.history.render()


def paint_tab(desk: Desk) -> None:
    def picture(bench: Workbench, level: int) -> Any:
        if bench.trajectory is None:
            return None
        return draw_board(bench.trajectory, None, bench.reference).cell(level)

    def paint(bench: Workbench, painting: dict[str, Any] | None, level: int, join: Join) -> Workbench:
        layers = [np.asarray(layer) for layer in (painting or {}).get("layers", [])]
        return bench.paint(np.maximum.reduce(layers) if layers else None, int(level), join)

    with gr.Tab("Paint"):
        level = gr.Radio(desk.levels, value=min(1, desk.levels[-1]), label="Level")
        show = gr.Button("Show the level")
        editor = gr.ImageEditor(
            label="Paint over the tokens to select",
            type="numpy",
            sources=[],
            transforms=[],
            layers=False,
            brush=gr.Brush(default_size=24, colors=["#ff2d2d"], color_mode="fixed"),
            canvas_size=(448, 448),
            fixed_canvas=True,
        )
        show.click(picture, [desk.bench, level], editor)
        desk.button("Use painting", paint, [editor, level, desk.join], variant="primary")


def compare_tab(desk: Desk) -> None:
    def show(bench: Workbench) -> tuple[Any, ...]:
        picture, rows = bench.comparison()
        return np.asarray(picture), _frame(rows, COMPARED), "Compared with the pinned trajectory."

    with gr.Tab("Compare"):
        gr.Markdown("Compares with the trajectory as it was generated, loaded, or last pinned.")
        with gr.Row():
            done = "Pinned: comparisons are with this trajectory from now on."
            desk.button("Pin this one", Workbench.pin, done=done)
            compare = gr.Button("Compare", variant="primary")
        sheet = gr.Image(
            show_label=False,
            interactive=False,
            format="png",
            elem_id="comparison",
            alt_text="Canvases before and after, and the change of each token",
        )
        table = gr.Dataframe(
            label="Numbers by level; LIS is the mean 1 − cos outside the edit",
            interactive=False,
            elem_id="scores",
        )
        outputs = [sheet, table, desk.status]
        compare.click(lambda bench: desk.attempt(partial(show, bench), outputs), [desk.bench], outputs)


def sweep_tab(desk: Desk) -> None:
    with gr.Tab("Sweep"):
        gr.Markdown(SWEEP_TEXT)
        kind = gr.Radio(["features", "shape"], value="features", label="Edit")
        seeds = gr.Textbox("0-3", label="Seeds")
        levels = gr.CheckboxGroup(desk.levels[:-1], value=[min(1, desk.levels[-1])], label="Levels to edit")
        strengths = gr.Textbox("0.5,1", label="Strengths")
        run = gr.Button("Run the sweep", variant="primary")
        table = gr.Dataframe(label="Mean ± half the 95 % interval over seeds", interactive=False)

        def go(
            bench: Workbench,
            label: str,
            kind: Kind,
            seeds: str,
            levels: list[int],
            strengths: str,
            progress: Any = gr.Progress(),
        ) -> tuple[Any, ...]:
            def swept() -> tuple[Any, ...]:
                config = SweepConfig(
                    labels=(desk.pipe.label_id(desk.chosen(label)),),
                    seeds=tuple(parse_seeds(seeds)),
                    levels=tuple(levels),
                    strengths=_numbers(strengths),
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
                shown = summary_table(summarise(rows))
                return _frame(shown, list(shown[0])), f"Seeds swept: {len(config.seeds)}."

            return desk.attempt(swept, outputs)

        outputs = [table, desk.status]
        run.click(go, [desk.bench, desk.label, kind, seeds, levels, strengths], outputs)


def files_tab(desk: Desk) -> None:
    with gr.Tab("Files"):
        gr.Markdown(f"All files are saved in `{desk.folder.root.name}/`.")
        name = gr.Textbox("trajectory", label="Name")
        with gr.Row():
            writers = (
                (
                    gr.Button("Save", variant="primary"),
                    SUFFIX,
                    lambda bench, path: bench.current().save(path),
                ),
                (gr.Button("Export HTML"), ".html", lambda bench, path: bench.current().to_html(path)),
                (gr.Button("Export report (Markdown)"), ".md", _write_report),
            )
        saved = gr.Dropdown(desk.folder.names(), label="Saved trajectories", elem_id="saved")
        with gr.Row():
            desk.button("Load", partial(_load, desk), [saved], "Loaded.")
            gr.Button("Refresh list").click(lambda: gr.Dropdown(desk.folder.names()), None, saved)
        outputs = [saved, desk.status]
        for button, suffix, write in writers:

            def save(
                bench: Workbench, name: str, suffix: str = suffix, write: Any = write
            ) -> tuple[Any, ...]:
                def written() -> tuple[Any, ...]:
                    path = desk.folder.path(name, suffix)
                    write(bench, path)
                    return gr.Dropdown(desk.folder.names()), f"Wrote `{path.name}`."

                return desk.attempt(written, outputs)

            button.click(save, [desk.bench, name], outputs)


def _take_prototype(desk: Desk, bench: Workbench, number: float | None) -> Workbench:
    assert desk.vocabulary is not None
    return bench.use(prototype(desk.vocabulary, int(number or 0)), f"prototype {int(number or 0)}")


def _load(desk: Desk, bench: Workbench, name: str | None) -> Workbench:
    if not name:
        raise UsageError("nothing is chosen: choose a saved trajectory from the list")
    return bench.open(desk.pipe.adopt(Trajectory.load(desk.folder.trajectory(name))))


def _write_report(bench: Workbench, path: Path) -> None:
    write_bytes(path, markdown_report(bench).encode())


def _resume(bench: Workbench, level: str | int, seeds: str) -> Workbench:
    given = parse_seeds(seeds) if seeds.strip() else None
    kept = None if level == EDITED_LEVEL else int(level)
    return bench.resume(kept, given[0] if given and len(given) == 1 else given)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UsageError(f"strengths are {text!r}, expected numbers such as 0.5,1") from None


def _frame(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, Any]:
    """Rows in the form of Gradio's tables, numbers with three digits."""

    def text(value: Any) -> str:
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    names = [name for name in columns if name in rows[0]]
    return {
        "headers": names,
        "data": [[text(row[name]) for name in names] for row in without_nan(list(rows))],
    }
