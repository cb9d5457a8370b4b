"""Numbers in sentences and in notes."""

from __future__ import annotations

import pytest

from hierarchy_builder.build.session import StageSummary
from hierarchy_builder.terminal import counted, print_cells, print_result, print_stages, say


def test_one_is_no_plural() -> None:
    assert [counted(number, "image") for number in (0, 1, 2048)] == ["0 images", "1 image", "2,048 images"]
    assert counted(1, "class", "classes") == "1 class"
    assert counted(3, "class", "classes") == "3 classes"


def test_names_of_others_cannot_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b]0;title\x07\x1b[31mred\x9b2J\u202egnp.exe\r\x7f"
    shown = r"\x1b]0;title\x07\x1b[31mred\x9b2J\u202egnp.exe\r\x7f"
    say(f"unknown class {hostile!s}, [bold]x[/bold] :b:\tcafé")
    print_cells(("class",), [[hostile]])
    printed = capsys.readouterr()
    assert f"unknown class {shown}, [bold]x[/bold] :b:" in printed.err
    assert "café" in printed.err
    assert shown in printed.out
    assert not set(hostile) & set("\x1b\x07\x9b\u202e\r\x7f") & set(printed.out + printed.err)


def test_notes_of_a_stage_are_rounded(capsys: pytest.CaptureFixture[str]) -> None:
    notes = {"inertia": 0.123456789, "tokens": 12345}
    print_stages(
        [StageSummary(stage="vocabulary", images=1, new_images=0, seconds=1.0, num_bytes=9, notes=notes)],
        False,
    )
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "0.1235" in printed
    assert "12,345" in printed


def test_tables_of_results_are_no_python(capsys: pytest.CaptureFixture[str]) -> None:
    print_result({"averages": ["500", "1000"], "levels": [0, 0.25], "held_out": True, "none": []}, False)
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [row[2].strip() for row in rows] == ["500, 1000", "0, 0.25", "yes", "–"]
