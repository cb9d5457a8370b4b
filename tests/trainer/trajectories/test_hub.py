"""Networks are saved as folders, sent to a hub and fetched from it; the hub is a server on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from loopback_hub import Hub, hub_environment, running_hub
from tiny_pipeline import tiny_run

from hierarchy_builder.errors import TrainerError, UsageError
from trainer import TrajectoryPipeline
from trainer.trajectories.hub import folder_of


@pytest.fixture
def hub() -> Iterator[str]:
    with running_hub("models/someone/digits") as address:
        yield address


def test_a_saved_network_draws_the_same(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run")
    pipe = TrajectoryPipeline.from_pretrained(run)
    folder = pipe.save_pretrained(tmp_path / "saved", license="mit")
    assert not (folder / "optimizer.safetensors").exists()
    again = TrajectoryPipeline.from_pretrained(folder)
    assert torch.equal(pipe("bee", seed=1).levels, again("bee", seed=1).levels)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert 'license: "mit"' in card
    assert "ant, bee, emu" in card
    assert "[arXiv 2606.22527](https://arxiv.org/abs/2606.22527)" in card
    assert (folder / "samples.png").stat().st_size > 1_000
    raw = TrajectoryPipeline.from_pretrained(run, ema="raw")
    again = TrajectoryPipeline.from_pretrained(raw.save_pretrained(tmp_path / "raw"))
    assert torch.equal(raw("bee", seed=1).levels, again("bee", seed=1).levels)
    with pytest.raises(TrainerError, match="exists, nothing was written there"):
        pipe.save_pretrained(folder)


PROGRAM = """
import sys, torch
from trainer import TrajectoryPipeline
pipe = TrajectoryPipeline.from_pretrained(sys.argv[1])
print(pipe.push_to_hub("someone/digits", token="hf_test"))
for name in ("hf://someone/digits", "someone/digits"):
    again = TrajectoryPipeline.from_pretrained(name)
    assert torch.equal(pipe("bee", seed=1).levels, again("bee", seed=1).levels)
try:
    TrajectoryPipeline.from_pretrained("hf://someone/else")
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_network_goes_to_the_hub_and_back(tmp_path: Path, hub: str) -> None:
    run = tiny_run(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, run],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, **hub_environment(hub, tmp_path / "home")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    address, refused = done.stdout.strip().splitlines()
    assert address.endswith("/someone/digits")
    assert refused.startswith("UserError hf://someone/else: 404")
    assert {"README.md", "samples.png", "state.json"} <= Hub.repositories["models/someone/digits"].keys()


def test_local_folders_are_never_looked_for_on_the_hub(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert folder_of("runs/missing") == Path("runs/missing")
    assert folder_of(tmp_path / "run") == tmp_path / "run"
    with pytest.raises(UsageError, match="expected hf://owner/name"):
        folder_of("hf://only-one-part")
