"""Sums over ranks are taken by hand, and a rank that went its own way is noticed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hierarchy_builder.errors import TrainerError
from trainer.training.distributed import World, check_equal


def test_numbers_that_differ_between_ranks_are_refused() -> None:
    check_equal(torch.tensor([2.5, 2.5, 2.5]), "the norm")
    with pytest.raises(TrainerError, match=r"the norm differs between processes: \[2\.5, 2\.5, 2\.75\]"):
        check_equal(torch.tensor([2.5, 2.5, 2.75]), "the norm")


def test_missing_gradients_count_as_zero() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    parameters[0].grad = torch.full((2,), 4.0)
    World(device=torch.device("cpu")).add_gradients(parameters)
    assert [p.grad.tolist() for p in parameters if p.grad is not None] == [[4.0, 4.0], [0.0] * 3]


RANKS = """
import sys, torch
from trainer.training import distributed
from trainer.training.distributed import check_equal, joined_world

distributed.BUCKET_ELEMENTS = 4  # several buckets
with joined_world(60) as world:
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 2, 5)]
    for n, p in enumerate(parameters[:2]):
        p.grad = torch.full_like(p, 10.0 * n + world.rank + 1)
    if world.rank == 1:
        parameters[2].grad = torch.ones(5)
    world.add_gradients(parameters)
    assert [p.grad.unique().tolist() for p in parameters] == [[3.0], [23.0], [1.0]], parameters
    norms = world.gather(torch.nn.utils.get_total_norm([p.grad for p in parameters])[None])[:, 0]
    check_equal(norms, "the norm of the summed gradients")
    if world.rank == 1:
        parameters[0].grad += 1e-3  # what a bypassed reduction looks like
    norms = world.gather(torch.nn.utils.get_total_norm([p.grad for p in parameters])[None])[:, 0]
    try:
        check_equal(norms, "the norm of the summed gradients")
    except distributed.TrainerError as error:
        open(f"{sys.argv[1]}/rank{world.rank}", "w").write(str(error))
"""


def test_gradients_are_sums_and_a_rank_apart_is_noticed_by_all(tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(tmp_path / "ranks.py"), str(tmp_path)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in (0, 1):
        assert "summed gradients differs between processes" in (tmp_path / f"rank{rank}").read_text()
