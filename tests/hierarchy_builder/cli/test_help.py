"""What every verb of both programs has in common: groups of options, output options, version, plain errors."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import typer
from command_line import cli

from hierarchy_builder.cli.app import app as builder
from hierarchy_builder.fields import difference
from hierarchy_builder.terminal import print_cells
from trainer.cli.app import app as trainer

APPS: dict[str, Any] = {
    "hierarchy-builder": typer.main.get_command(builder),
    "trainer": typer.main.get_command(trainer),
}
VERBS = [(program, name) for program, app in APPS.items() for name in app.commands]


@pytest.mark.parametrize(("program", "name"), VERBS)
def test_every_verb_prints_json_and_can_be_quiet_and_has_groups(program: str, name: str) -> None:
    verb = APPS[program].commands[name]
    options = {option: param for param in verb.params for option in param.opts}
    assert {"--json", "--quiet"} <= options.keys()
    assert verb.rich_help_panel, "the verb has no group in the help of its program"
    assert options["--json"].rich_help_panel == "What it prints"
    alone = [option for option, param in options.items() if not getattr(param, "rich_help_panel", None)]
    assert len(alone) <= 14, f"too many options outside any group: {alone}"


@pytest.mark.parametrize("program", APPS)
def test_the_version_is_that_of_the_package(program: str) -> None:
    ended = cli(program, "--version")
    assert (ended.code, ended.out) == (
        0,
        f"{program} {importlib.metadata.version('trajectory-hierarchies')}\n",
    )


@pytest.mark.parametrize("columns", [60, 100])
def test_the_help_cuts_no_sentence(columns: int) -> None:
    help_text = cli("trainer", "--help", columns=columns).out
    assert "…" not in help_text
    assert "optimiser" in help_text  # the last word of the longest line


def test_the_help_of_a_verb_keeps_options_whole_and_names_no_types_of_python() -> None:
    text = cli("trainer", "presets", "--help", columns=60).out
    assert "--method trajectory-forcing|latent-forcing|normalizing-trajectory\n" in text
    text = cli("hierarchy-builder", "shard", "--help", columns=60).out
    assert "[OPTIONS] DIR\n" in text
    assert not any(kind in text for kind in ("<bool>", "<Path>", "…", "{DIR}"))
    assert text.index("\nOptions:") < text.index("\nShards:") < text.index("\nWhat it prints:")
    assert "cc-by-4.0" in text  # options and names are not broken at their hyphens
    text = " ".join(cli("hierarchy-builder", "build", "--help").out.split())
    assert "as JPEG. Default: no." in text  # of a pair such as --images / --no-images
    assert "from which the level `--masks-level` is taken" in text  # and not the name of a field


@pytest.mark.parametrize(
    ("program", "words", "hint"),
    [
        ("trainer", "train SHARDS --out RUN --lr 0.1", "for example --set optim.lr=0.005"),
        ("trainer", "train SHARDS --out RUN --epochs 3", "did you mean --total-images?"),
        ("trainer", "train SHARDS --out RUN --batchsize 3", "did you mean --batch-size?"),
        ("hierarchy-builder", "build P --out D --image-size 64", "did you mean --image-px?"),
        ("hierarchy-builder", "status D --zzzz", "--help` lists its options"),
    ],
)
def test_an_unknown_option_is_refused_with_the_one_that_is_meant(program: str, words: str, hint: str) -> None:
    ended = cli(program, *words.split())
    assert (ended.code, hint in ended.err) == (2, True), ended.err


def test_an_error_of_the_command_line_has_no_frame() -> None:
    ended = cli("hierarchy-builder", "status", "--no-such", columns=40)
    assert (ended.code, "─" in ended.err) == (2, False)


def test_a_table_folds_long_values_and_leaves_short_columns_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "a sentence that is much longer than the terminal is wide and goes on"
    for columns in (60, 12):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr("hierarchy_builder.terminal.stdout", type(_console())(width=columns))
        print_cells(("name", "text"), [("dinov2-original-small", long)])
        printed = capsys.readouterr().out
        assert "…" not in printed
        assert ("dinov2-original-small" in printed) is (columns == 60)
        letters = "".join(each for each in printed if each.isalpha())
        assert sorted(letters) == sorted("nametext" + "dinovoriginalsmall" + long.replace(" ", ""))


def _console() -> Any:
    from hierarchy_builder.terminal import stdout

    return stdout


@pytest.mark.parametrize(
    ("before", "now", "line"),
    [
        (4, 5, "x: 4 there, 5 now"),
        ({"a": [0.5] * 40}, {"a": [0.5] * 39 + [0.25]}, "x.a[39]: 0.5 there, 0.25 now"),
        ([1] * 40, [1] * 41, "x: 40 values there, 41 values now"),
        ({"channels": [0.5] * 40}, None, "x: 1 fields (channels) there, None now"),
    ],
)
def test_a_difference_names_the_place_and_not_all_numbers(before: Any, now: Any, line: str) -> None:
    assert difference("x", before, now) == line
