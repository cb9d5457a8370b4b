"""What `evaluate` and `sweep` say while they work and when they are done: the counter, and tables by topic."""

from __future__ import annotations

import io
import itertools
import re

from documented import PAGE, undocumented
from rich.console import Console
from tiny_pipeline import tiny_pipeline

from hierarchy_builder.canvases.gallery import Page, Section, Table, render
from hierarchy_builder.progress import shown, unseen
from trainer.evaluation import sweep as room
from trainer.evaluation.definitions import FIGURES, TEXT, TITLE
from trainer.evaluation.sweep import EDIT, SweepConfig, summarise, summary_table, sweep
from trainer.evaluation.tables import metric_tables

PARTITIONS = {"semantic", "flat", "shifted", "grid", "shuffled"}


def test_each_topic_has_a_table_with_its_reference_values() -> None:
    names = ("frechet_pooled", "lis_0_1", "lis_0_1_low", "flatness_noise", "lis_0_1_other_noise")
    names += ("frechet_pooled_real", "num_real", "alignment_1_flat_real", "bits_per_dim", "of_a_plugin")
    tables = metric_tables([{"name": name, "value": i} for i, name in enumerate(names)])
    assert {topic.title: rows for topic, rows in tables.items()} == {
        "Samples": [{"name": "flatness_noise", "value": 3}],
        "Distribution": [
            {"name": "frechet_pooled", "value": 0, "real images": 5},
            {"name": "num_real", "value": 6, "real images": ""},
        ],
        "Edits": [{"name": "lis_0_1", "value": 1, "low": 2, "other noise": 4}],
        "Alignment": [{"name": "alignment_1_flat_real", "value": 7}],
        "Likelihood": [{"name": "bits_per_dim", "value": 8}],
        "Other": [{"name": "of_a_plugin", "value": 9}],
    }
    assert "unedited" in next(topic.note for topic in tables if topic.title == "Edits")


def test_a_name_that_the_page_of_metrics_lacks_is_found() -> None:
    names = ["lis_0_12_low", "pmr_spatial_0_1_real", "added_bits_per_dim_step_3", "roughness_noise", "lis_a"]
    assert undocumented([*names, "pmr_0", "_real", "gain_mean_mean", ""]) == [
        "lis_a",
        "pmr_0",
        "_real",
        "gain_mean_mean",
        "",
    ]


def test_progress_is_a_counter_on_a_terminal_and_occasional_lines_in_a_file(monkeypatch) -> None:
    terminal, log = Console(file=io.StringIO(), force_terminal=True, width=80), Console(file=io.StringIO())
    monkeypatch.setattr("hierarchy_builder.progress.stderr", terminal)
    assert list(shown(iter("abc"), "editing", 3)) == ["a", "b", "c"]
    assert "editing" in terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "100%" in terminal.file.getvalue()  # type: ignore[attr-defined]
    for module in ("progress", "terminal"):
        monkeypatch.setattr(f"hierarchy_builder.{module}.stderr", log)
    monkeypatch.setattr("hierarchy_builder.progress.time.perf_counter", itertools.count(0.0, 4.0).__next__)
    assert list(shown(range(7), "editing", 7)) == list(range(7))
    assert log.file.getvalue() == "editing: 2/7\nediting: 5/7\n"  # type: ignore[attr-defined]
    assert list(unseen("ab", "editing", 2)) == ["a", "b"]


def test_a_sweep_measures_its_baselines_once(monkeypatch) -> None:
    measured = []

    def counted(*args):
        measured.append(args)
        return found(*args)

    found = room.locality
    monkeypatch.setattr(room, "locality", counted)
    strengths = (0.25, 0.5, 1.0)
    rows = list(
        sweep(tiny_pipeline(), SweepConfig(labels=(0,), seeds=(0,), levels=(1,), strengths=strengths))
    )
    assert len(measured) == len(strengths) + 2
    assert len(rows) == len(strengths) * 3 * 3  # strengths × arms × measured levels
    shown = summary_table(summarise(rows))
    assert {row["strength"] for row in shown if row["arm"] == EDIT} == set(strengths)
    assert {row["strength"] for row in shown if row["arm"] != EDIT} == {"any"}
    assert len(shown) == (len(strengths) + 2) * 3  # × measures


def test_baselines_of_shapes_belong_to_the_tokens_that_each_edit_touches() -> None:
    config = SweepConfig(labels=(0,), seeds=(0,), levels=(1,), strengths=(1, 2), kind="shape")
    rows = list(sweep(tiny_pipeline(), config))
    tokens = {(row["arm"], row["strength"]): row["tokens"] for row in rows}
    assert len(set(tokens.values())) == 2
    assert all(tokens[arm, strength] == tokens[EDIT, strength] for arm, strength in tokens)


def test_every_documented_figure_has_words_and_links_to_its_definition_on_the_page() -> None:
    tables = re.findall(r"^\| (`[^|]*) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    names = [
        re.sub(r"(?<=_)(ℓ|[abk])(?=_|$)", "1", name) for row in tables for name in re.findall(r"`(\w+)`", row)
    ]
    names = [name for name in names if name not in PARTITIONS and not name.endswith("_real")]
    assert len(names) > 40
    assert [name for name in names if FIGURES.find(name) is None] == []
    metrics = Section(
        title="Metrics",
        blocks=[Table(rows=FIGURES.in_words({"name": name, "value": 1} for name in names))],
    )
    text = render(Page(title="run", sections=[metrics, *FIGURES.meanings([metrics], TITLE, TEXT)]))
    links = set(re.findall(r'<a class="term" href="#([^"]*)"', text))
    assert links == set(re.findall(r'<div id="(means-[^"]*)"', text))
    assert "Fréchet distance of tokens, level 1\u00a0↓</a>" in text
    assert FIGURES.term("of_a_plugin") == "of_a_plugin"
