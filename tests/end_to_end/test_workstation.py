"""The rehearsal in docs/workstation.md works as it stands there, on bundled photographs."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import click
import pytest
import torch
from command_line import Ended, cli
from pictures import write_tree
from released import save_checkpoint
from typer.main import get_command

from hierarchy_builder.cli.app import app as builder
from trainer.cli.app import app as trainer
from trainer.methods.trajectory_forcing.network import TrajectoryTransformer
from trainer.networks.config import ModelConfig

APPS = {"hierarchy-builder": builder, "trainer": trainer}
ROOT = Path(__file__).resolve().parents[2]
REHEARSAL = "## Rehearse it on a CPU"


def rehearsed() -> list[list[str]]:
    """The commands of the rehearsal, in their order."""
    text = (ROOT / "docs" / "workstation.md").read_text(encoding="utf-8").split(REHEARSAL)[1]
    (block,) = re.findall(r"```bash\n(.*?)```", text, re.S)
    return [shlex.split(line) for line in block.splitlines()]


def next_commands(ended: Ended) -> list[list[str]]:
    """What a command named as its next ones; the parser of their program understands each."""
    found = [shlex.split(line) for line in re.findall(r"^next: (.+)$", ended.err, re.M)]
    for program, verb, *rest in found:
        group = get_command(APPS[program])
        group.commands[verb].make_context(verb, list(rest), parent=click.Context(group))
    return found


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
        for following, verb, *rest in next_commands(ended):
            check = {"train": ["--dry-run"], "train-decoder": ["--dry-run"], "edit": []}
            if verb in check and "RUN" not in rest:  # the other verbs are rehearsed themselves
                assert cli(following, verb, *rest, *check[verb]).code == 0, rest
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


def test_what_a_command_names_as_the_next_one_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verbs that the rehearsal leaves out, and all that follows from them, on nets and pictures that are tiny."""
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path / "photos", per_class=1)
    torch.manual_seed(0)
    size = {"width": 16, "depth": 2, "head_depth": 1, "num_heads": 2}
    model = TrajectoryTransformer(ModelConfig(grid=(4, 4), in_channels=8, num_classes=3, **size))
    save_checkpoint(
        model, tmp_path / "checkpoint_5", averages={"500": dict(model.named_parameters())}, step=5
    )
    drawn = "official/drawn/trajectories/label0000-seed000000.safetensors"
    waiting = [
        shlex.split(line)
        for line in (
            "hierarchy-builder extract photos --out staged --encoder dct --workers 0",
            "hierarchy-builder repair staged --workers 0",
            "trainer import-official checkpoint_5 --out official --encoder drawn",
            f"trainer edit {drawn} --level 0 --tokens 0,0 --from-region 1 --resume --out edited.safetensors",
            "trainer sweep official --labels 0 --seeds 0 --levels 0 --out sweep.json",
        )
    ]
    done: list[str] = []
    more = {"cluster": ["--workers", "0"], "shard": ["--workers", "0"], "train": ["--dry-run"]}
    while waiting:
        program, verb, *rest = waiting.pop(0)
        ended = cli(program, verb, *rest, *more.get(verb, []))
        assert ended.code == 0, f"{program} {verb} {shlex.join(rest)}\n{ended.err[-2000:]}"
        done.append(verb)
        waiting = [*next_commands(ended), *waiting]
    assert done[:4] == ["extract", "cluster", "shard", "report"]
    assert done.count("train") == 1
    assert {"verify", "sample", "compare"} <= {*done}
