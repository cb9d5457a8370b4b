"""Four ranks under torchrun: where one of them fails, all end soon, and the terminal says why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import processes_below

pytestmark = pytest.mark.drill

RUN = """
import os, signal
from hierarchy_builder.errors import TrainerError
from trainer.cli import main
from trainer.training.loop import Loop

kind, place = os.environ["FAULT"].split()
plain = getattr(Loop, place)

def failing(loop, *given):
    if loop.world.rank == 2 and loop.step >= 3:
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"said": TrainerError, "unforeseen": RuntimeError}[kind]("a fault that was put in")
    return plain(loop, *given)

setattr(Loop, place, failing)
main()
"""
LIMIT_S = 120
"""A rank that waits for others would wait for half an hour."""


@pytest.mark.parametrize("place", ["take_step", "_save"])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("said", "error: rank 2: a fault that was put in"),
        ("unforeseen", "RuntimeError: a fault that was put in"),
        ("killed", "rank      : 2 (local_rank: 2)\n  exitcode  : -9"),
    ],
)
def test_a_rank_that_fails_ends_all_with_its_reason(
    kind: str, said: str, place: str, shards: str, tmp_path: Path
) -> None:
    (tmp_path / "run.py").write_text(RUN)
    fields = ("total_images=64", "batch_size=8", "checkpoint_images=32", "tensorboard=false")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "4", str(tmp_path / "run.py")]
    command += ["train", shards, "--out", str(tmp_path / "run"), "--preset", "tiny-cpu", "--quiet"]
    started = subprocess.Popen(
        [sys.executable, *command, *(word for field in fields for word in ("--set", field))],
        env={**os.environ, "FAULT": f"{kind} {place}"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, told = started.communicate(timeout=LIMIT_S)
    finally:
        left = processes_below(started.pid)
        for process in left:
            os.kill(process, 9)
    assert started.returncode == 1
    assert said in told
    assert "error: rank 0: another process of this run has ended" in told
    assert left == []
