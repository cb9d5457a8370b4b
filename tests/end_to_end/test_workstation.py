"""The rehearsal in docs/workstation.md works as it stands there, on bundled photographs."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from command_line import cli

ROOT = Path(__file__).resolve().parents[2]
REHEARSAL = "## Rehearse it on a CPU"


def rehearsed() -> list[list[str]]:
    """The commands of the rehearsal, in their order."""
    text = (ROOT / "docs" / "workstation.md").read_text(encoding="utf-8").split(REHEARSAL)[1]
    (block,) = re.findall(r"```bash\n(.*?)```", text, re.S)
    return [shlex.split(line) for line in block.splitlines()]


def test_the_rehearsal_works_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    demo.cut_photographs(tmp_path / "photos", demo.shipped("skimage", "data", demo.PHOTOGRAPHS), 3)
    monkeypatch.chdir(tmp_path)
    commands = rehearsed()
    for program, *words in commands:
        ended = cli(program, *words)
        assert ended.code == 0, f"{program} {shlex.join(words)}\n{ended.err[-2000:]}"
        for line in re.findall(r"^next: (.+)$", ended.err, re.M):
            following, verb, *rest = shlex.split(line)
            check = {"train": ["--dry-run"], "train-decoder": ["--dry-run"], "edit": []}
            if verb in check and "RUN" not in rest:  # the other verbs are rehearsed themselves
                assert cli(following, verb, *rest, *check[verb]).code == 0, line
            assert cli(following, verb, "--help").code == 0, line
    verbs = [words[0] for _, *words in commands]
    assert verbs.index("doctor") == 0
    assert {"plan", "build", "verify", "report", "presets", "train", "train-decoder"} <= {*verbs}
    assert {"sample", "evaluate", "publish"} <= {*verbs}
    for page in ("build/report.html", "run/report.html", "samples/index.html", "published/_SUCCESS"):
        assert Path(page).is_file(), [*map(str, Path().glob("*/*"))]


def test_the_commands_for_a_gpu_are_the_rehearsed_ones() -> None:
    text = (ROOT / "docs" / "workstation.md").read_text(encoding="utf-8").split(REHEARSAL)[0]
    lines = re.findall(r"^    ((?:hierarchy-builder|trainer) .+)$", text, re.M)
    asked = {tuple(shlex.split(line)[:2]) for line in lines}
    assert asked - {("trainer", "studio")} == {tuple(words[:2]) for words in rehearsed()}
