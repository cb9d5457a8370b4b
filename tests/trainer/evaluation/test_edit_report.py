"""Edits and sweeps on a page: what the cards, curves and tables hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mutations import flipped
from tiny_pipeline import tiny_pipeline

from hierarchy_builder.canvases.gallery import Gallery, Plots, Table
from hierarchy_builder.canvases.plots import Plot, Series, draw
from hierarchy_builder.errors import TrainerError
from hierarchy_builder.files.whole import write_sealed_json
from trainer.evaluation.pages import edits_section, read_sweep, sweep_section, unedited
from trainer.evaluation.sweep import SweepConfig, summarise, sweep
from trainer.metrics.edit_locality import token_change


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def test_before_is_what_was_first_made(pipe) -> None:
    first = pipe(label="bee", seed=1)
    selection = first.region(1, level=1)
    edited = (
        first.edit_features(selection, torch.zeros(48)).resume(1).edit_shape(selection.grow() - selection)
    )
    assert torch.equal(unedited(edited).levels, first.levels)
    with pytest.raises(TrainerError, match="the trajectory of bee was not edited"):
        unedited(first)


def test_a_card_shows_before_after_and_change(pipe) -> None:
    first = pipe(label="bee", seed=1)
    selection = first.region(1, level=1)
    edited = first.edit_features(selection, torch.zeros(48)).resume(1)
    scale, gallery, table = edits_section([edited]).blocks
    assert float(scale.high) == pytest.approx(
        float(token_change(first.levels, edited.levels).max()), rel=0.01
    )
    assert isinstance(gallery, Gallery)
    assert isinstance(table, Table)
    views = {view.name: view.layers for view in gallery.viewers[0].views}
    np.testing.assert_array_equal(views["before"], first.decode())
    np.testing.assert_array_equal(views["after"], edited.decode())
    dark = views["change"][0, 0, 0]
    assert (views["change"][0] == dark).all()
    still = (views["change"][1] == dark).all(axis=-1)
    np.testing.assert_array_equal(still, ~selection.mask.numpy())
    assert [row["change of tokens not edited ↓"] for row in table.rows[:2]] == [None, 0]


def test_a_sweep_becomes_curves_with_intervals(pipe, tmp_path: Path) -> None:
    config = SweepConfig(labels=(0,), seeds=(0, 1, 2), levels=(0, 1), strengths=(0.5, 1.0))
    summary = summarise(sweep(pipe, config))
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps({"summary": summary}))
    plots, table = sweep_section(read_sweep(file)).blocks
    assert isinstance(plots, Plots)
    assert isinstance(table, Table)
    assert [plot.title[-14:] for plot in plots.plots] == ["level 0 edited"] * 2 + ["level 1 edited"] * 2
    lis = plots.plots[2]
    assert [series.name for series in lis.series] == ["edit", "no edit", "other noise"]
    strongest = [row for row in summary if row["level"] == row["strength"] == 1 and row["arm"] == "edit"]
    assert list(lis.series[0].y) == [row["lis_mean"] for row in strongest]
    assert list(lis.series[0].high) == [row["lis_high"] for row in strongest]
    write_sealed_json(file, {"summary": summary})
    with flipped(file, 8 * (file.read_bytes().index(b'"lis_mean"') + 3)), pytest.raises(TrainerError):
        read_sweep(file)
    file.write_text('{"summary": [{"level": 1}]}')
    with pytest.raises(TrainerError, match="is not what `trainer sweep --out` writes"):
        read_sweep(file)


def test_an_interval_is_drawn_as_a_band() -> None:
    line = Series(name="a", x=[0, 1], y=[1.0, 2.0])
    band = Series(name="a", x=[0, 1], y=[1.0, 2.0], low=[0.5, float("nan")], high=[1.5, 2.5])
    with_line, with_band = (draw(Plot(title="t", x_label="x", series=[each])) for each in (line, band))
    assert 'class="band' not in with_line
    assert 'class="band' in with_band
