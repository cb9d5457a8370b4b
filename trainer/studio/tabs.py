"""The tabs of the studio: what is on each, and which step of the workbench a button takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from hierarchy_builder.errors import TrainerError, UsageError
from hierarchy_builder.files import without_nan, write_bytes
from trainer.evaluation.sweep import Kind, SweepConfig, summarise, summary_table, sweep
from trainer.seeds import parse_seeds
from trainer.studio.board import draw_board
from trainer.studio.desk import WARNING, Desk
from trainer.studio.folder import SUFFIX
from trainer.studio.workbench import Join, Workbench, markdown_report
from trainer.trajectories.edit import prototype
from trainer.trajectories.trajectory import Trajectory

TAKEN = "Taken. Select where it shall go, then Apply."
EDITED = "Edited. Resume to draw the levels after it."
EDITED_LEVEL = "the edited one"
SWEEP_TEXT = (
    "The same edit for several seeds, levels and strengths, beside the same without it and with other noise. It edits "
    "the selection, else the largest region of the object; features come from the next class."
)
COMPARED = ("level", "change", "changed_share", "lis", "inside")
"""Columns of `compare` that fit beside the board; the Markdown report has them all."""


def edit_tab(desk: Desk) -> None:
    with gr.Tab("Edit"):
        gr.Markdown(
            "**Features.** Select what it shall look like, take it; select where it shall go, apply it."
        )
        with gr.Row():
            mean, tokens = gr.Button("Take mean"), gr.Button("Take token by token")
        desk.on(
            mean.click,
            lambda bench: bench.take("mean"),
            done=TAKEN,
        )
        desk.on(
            tokens.click,
            lambda bench: bench.take("tokens"),
            done=TAKEN,
        )
        if desk.vocabulary is not None:
            with gr.Row(equal_height=True):
                number = gr.Number(0, label="Prototype of the vocabulary", precision=0, minimum=0)
                use = gr.Button("Take prototype")
            desk.on(use.click, partial(_take_prototype, desk), [number], TAKEN)
        strength = gr.Slider(-1.0, 2.0, 1.0, step=0.05, label="Strength: 0 none, 1 the source itself")
        apply = gr.Button("Apply features", variant="primary")
        desk.on(
            apply.click,
            lambda bench, value: bench.apply_features(value),
            [strength],
            EDITED,
        )
        gr.Markdown(
            "**Shape.** Give the selected tokens to the region beside them, or move a region's border."
        )
        with gr.Row():
            beside = gr.Button("Give to neighbours")
            grow, shrink = gr.Button("Grow region"), gr.Button("Shrink region")
        desk.on(
            beside.click,
            lambda bench: bench.apply_shape(),
            done=EDITED,
        )
        for button, how in ((grow, "grow"), (shrink, "shrink")):
            desk.on(
                button.click,
                lambda bench, how=how: bench.reshape_region(how),
                done=EDITED,
            )
        gr.Markdown("**Resume.** Levels up to the chosen one stay as they are, bit for bit.")
        with gr.Row(equal_height=True):
            level = gr.Radio([EDITED_LEVEL, *desk.levels[:-1]], value=EDITED_LEVEL, label="Keep levels up to")
            seeds = gr.Textbox(label="Seeds of the others (empty: their own)", placeholder="7, or 1,2")
        resume = gr.Button("Resume", variant="primary")
        desk.on(resume.click, _resume, [level, seeds], "Drawn. Compare shows what changed.")
        gr.Markdown("**Steps**")
        desk.history.render()


def paint_tab(desk: Desk) -> None:
    with gr.Tab("Paint"):
        level = gr.Radio(desk.levels, value=min(1, desk.levels[-1]), label="Level")
        show = gr.Button("Show the level")
        editor = gr.ImageEditor(
            label="Paint over the tokens you mean",
            type="numpy",
            sources=[],
            transforms=[],
            layers=False,
            brush=gr.Brush(default_size=24, colors=["#ff2d2d"], color_mode="fixed"),
            canvas_size=(448, 448),
            fixed_canvas=True,
        )
        use = gr.Button("Use painting", variant="primary")

        def picture(bench: Workbench, level: int) -> Any:
            if bench.trajectory is None:
                return None
            board = draw_board(bench.trajectory, None, bench.reference)
            return board.cell(level)

        show.click(picture, [desk.bench, level], editor)

        def paint(bench: Workbench, painting: dict[str, Any] | None, level: int, join: Join) -> Workbench:
            layers = [np.asarray(layer) for layer in (painting or {}).get("layers", [])]
            return bench.paint(np.maximum.reduce(layers) if layers else None, int(level), join)

        desk.on(use.click, paint, [editor, level, desk.join])


def compare_tab(desk: Desk) -> None:
    with gr.Tab("Compare"):
        gr.Markdown("Against the trajectory as it was generated, loaded, or last pinned.")
        with gr.Row():
            pin, compare = gr.Button("Pin this one"), gr.Button("Compare", variant="primary")
        sheet = gr.Image(
            show_label=False,
            interactive=False,
            format="png",
            elem_id="comparison",
            alt_text="Canvases before and after, and the change of each token",
        )
        table = gr.Dataframe(
            label="Per level; LIS: mean 1 − cos outside the edit", interactive=False, elem_id="scores"
        )
        desk.on(
            pin.click,
            lambda bench: bench.pin(),
            done="Pinned: comparisons are against this trajectory now.",
        )

        def show(bench: Workbench) -> tuple[Any, Any, str]:
            try:
                picture, rows = bench.comparison()
            except TrainerError as error:
                return None, None, f"{WARNING}{error}"
            return np.asarray(picture), _frame(rows, COMPARED), "Compared with the pinned trajectory."

        compare.click(show, [desk.bench], [sheet, table, desk.status])


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
        ) -> tuple[Any, str]:
            try:
                config = SweepConfig(
                    labels=(desk.pipe.label_id(label),),
                    seeds=tuple(parse_seeds(seeds)),
                    levels=tuple(levels),
                    strengths=_numbers(strengths),
                    kind=kind,
                )
                rows = list(progress.tqdm(sweep(desk.pipe, config, bench.selection), desc="sweeping"))
            except TrainerError as error:
                return None, f"{WARNING}{error}"
            if not rows:
                return (
                    None,
                    f"{WARNING}no edit could be made: choose levels, and for shapes a region that can grow",
                )
            shown = summary_table(summarise(rows))
            return _frame(shown, list(shown[0])), f"Seeds swept: {len(config.seeds)}."

        run.click(go, [desk.bench, desk.label, kind, seeds, levels, strengths], [table, desk.status])


def files_tab(desk: Desk) -> None:
    with gr.Tab("Files"):
        gr.Markdown(f"Everything is kept in `{desk.folder.root.name}/`.")
        name = gr.Textbox("trajectory", label="Name")
        with gr.Row():
            save = gr.Button("Save", variant="primary")
            html, report = gr.Button("Export HTML"), gr.Button("Export report (Markdown)")
        saved = gr.Dropdown(desk.folder.names(), label="Saved trajectories", elem_id="saved")
        with gr.Row():
            load, refresh = gr.Button("Load"), gr.Button("Refresh list")
        desk.on(load.click, partial(_load, desk), [saved], "Loaded.")
        refresh.click(lambda: gr.Dropdown(desk.folder.names()), None, saved)
        for button, write in (
            (save, partial(_save, desk)),
            (html, partial(_export_html, desk)),
            (report, partial(_export_report, desk)),
        ):
            button.click(_writing(desk, write), [desk.bench, name], [desk.status, saved])


def _take_prototype(desk: Desk, bench: Workbench, number: float | None) -> Workbench:
    assert desk.vocabulary is not None
    return bench.use(prototype(desk.vocabulary, int(number or 0)), f"prototype {int(number or 0)}")


def _load(desk: Desk, bench: Workbench, name: str | None) -> Workbench:
    if not name:
        raise UsageError("nothing is chosen: choose a saved trajectory from the list")
    return bench.open(desk.pipe.adopt(Trajectory.load(desk.folder.trajectory(name))))


def _writing(desk: Desk, write: Callable[[Workbench, str], Path]) -> Callable[..., tuple[str, Any]]:
    def run(bench: Workbench, name: str) -> tuple[str, Any]:
        try:
            path = write(bench, name)
        except (TrainerError, OSError) as error:
            return f"{WARNING}{error}", gr.skip()
        return f"Wrote `{path.name}`.", gr.Dropdown(desk.folder.names())

    return run


def _save(desk: Desk, bench: Workbench, name: str) -> Path:
    path = desk.folder.path(name, SUFFIX)
    bench.current().save(path)
    return path


def _export_html(desk: Desk, bench: Workbench, name: str) -> Path:
    path = desk.folder.path(name, ".html")
    bench.current().to_html(path)
    return path


def _export_report(desk: Desk, bench: Workbench, name: str) -> Path:
    path = desk.folder.path(name, ".md")
    write_bytes(path, markdown_report(bench).encode())
    return path


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
    """Rows as Gradio's tables take them, numbers with three digits."""
    names = [name for name in columns if name in rows[0]]

    def text(value: Any) -> str:
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    return {
        "headers": names,
        "data": [[text(row[name]) for name in names] for row in without_nan(list(rows))],
    }
