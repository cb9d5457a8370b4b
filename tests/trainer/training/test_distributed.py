"""Sums over ranks are taken by hand, and a rank that went its own way is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fixture_shards import write_shards
from processes import run_two

from hierarchy_builder.errors import InterruptedRunError, TrainerError
from trainer import cli
from trainer.training import distributed
from trainer.training.distributed import GradientSum, World, check_equal, joined_world


def test_numbers_that_differ_between_ranks_are_refused() -> None:
    check_equal(torch.tensor([2.5, 2.5, 2.5]), "the norm")
    with pytest.raises(TrainerError, match=r"the norm differs between processes: \[2\.5, 2\.5, 2\.75\]"):
        check_equal(torch.tensor([2.5, 2.5, 2.75]), "the norm")


def test_missing_gradients_count_as_zero() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    parameters[0].grad = torch.full((2,), 4.0)
    GradientSum(World(device=torch.device("cpu")), parameters).finish()
    assert [p.grad.tolist() for p in parameters if p.grad is not None] == [[4.0, 4.0], [0.0] * 3]


RANKS = """
import os, sys, torch
from trainer.training.config import OptimConfig
from trainer.training.optim import MuonAdam
from trainer.training import distributed
from trainer.training.distributed import check_equal, joined_world
from trainer.data.shards import open_index
from trainer.training.run_folder import check_sets

distributed.BUCKET_ELEMENTS = 4  # several buckets
try:
    with joined_world(timeout_s=60) as world:
        parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 2, 5)]
        for n, p in enumerate(parameters[:2]):
            p.grad = torch.full_like(p, 10.0 * n + world.rank + 1)
        if world.rank == 1:
            parameters[2].grad = torch.ones(5)
        distributed.GradientSum(world, parameters).finish()
        assert [p.grad.unique().tolist() for p in parameters] == [[3.0], [23.0], [1.0]], parameters
        norms = world.gather(torch.nn.utils.get_total_norm([p.grad for p in parameters])[None])[:, 0]
        check_equal(norms, "the norm of the summed gradients")
        for p in parameters:
            p.grad = torch.full_like(p, 2.0)  # of an earlier part of the batch
        overlapping = distributed.GradientSum(world, parameters)
        with overlapping.during():
            sum(((n + world.rank) * p).sum() for n, p in enumerate(parameters[:2])).backward()
            # The bucket of the third has no new gradient, so that it and those after it wait.
            assert len(overlapping._begun) == 0
        with (later := distributed.GradientSum(world, parameters[:2])).during():
            (0 * parameters[1]).sum().backward()
            assert len(later._begun) == 1
        later.finish()
        assert [p.grad.unique().tolist() for p in parameters[:2]] == [[5.0], [7.0]], parameters
        overlapping.finish()
        assert [p.grad.unique().tolist() for p in parameters] == [[10.0], [14.0], [4.0]], parameters
        moved = []
        for ranks in (None, world):  # three matrices of one shape and one of another
            generator = torch.Generator().manual_seed(0)
            shapes = [(4, 6), (6, 4), (4, 6), (3, 3)]
            weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator)
            MuonAdam([(str(n), w) for n, w in enumerate(weights)], OptimConfig(), world=ranks).step()
            moved.append(torch.cat([w.detach().flatten() for w in weights]))
        assert torch.equal(*moved), moved
        if world.rank == 1:
            parameters[0].grad += 1e-3  # what a bypassed reduction looks like
        norms = world.gather(torch.nn.utils.get_total_norm([p.grad for p in parameters])[None])[:, 0]
        try:
            check_equal(norms, "the norm of the summed gradients")
        except distributed.TrainerError as error:
            open(f"{sys.argv[1]}/rank{world.rank}", "w").write(str(error))
        sets = [open_index(sys.argv[2]), open_index(sys.argv[2 + world.rank])]
        check_sets(sets[0], world)
        try:
            check_sets(sets[1], world)
        except distributed.TrainerError as error:
            open(f"{sys.argv[1]}/sets{world.rank}", "w").write(str(error))
        if world.rank == 1:
            os._exit(0)
        world.barrier()
except distributed.TrainerError as error:
    open(f"{sys.argv[1]}/alone", "w").write(str(error))
"""


def test_gradients_are_sums_and_a_rank_apart_is_noticed_by_all(tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    sets = [write_shards(tmp_path / f"set-{seed}", 3, seed=seed) for seed in (0, 1)]
    run_two(tmp_path / "ranks.py", tmp_path, *sets)
    for rank in (0, 1):
        assert "summed gradients differs between processes" in (tmp_path / f"rank{rank}").read_text()
        told = (tmp_path / f"sets{rank}").read_text()
        assert told.startswith(
            f"this process reads {sets[rank]} (3 samples), and the shards of rank 1 are not"
        )
    assert "another process of this run has ended" in (tmp_path / "alone").read_text()


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_a_rank_that_fails_says_why_before_others_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    on_gpu, ended = backend == "nccl", list[str]()
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(distributed, "_meet", lambda *asked, **named: None)
    fake = {"is_initialized": False, "get_rank": 0, "get_world_size": 2}
    for name, answer in fake.items():
        monkeypatch.setattr(distributed.dist, name, lambda *asked, answer=answer, **named: answer)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: ended.append(backend))
    of_a_store = ConnectionResetError(104, "Connection reset by peer")
    for error in (ValueError("a fault of its own"), of_a_store):
        with pytest.raises(type(error)), joined_world():
            raise error
    assert ended == ([] if on_gpu else ["gloo", "gloo"])
    with pytest.raises(InterruptedRunError), joined_world():  # all ranks stop at the same step
        raise InterruptedRunError("stopped")
    assert ended[-1:] == [backend]


def test_an_empty_world_size_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    with joined_world() as world:
        assert (world.rank, world.size) == (0, 1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', expected a number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK and MASTER_ADDR and MASTER_PORT not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "::1", "MASTER_PORT": "1"}, "RANK is 2, expected"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "::1", "MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}, "did not meet"),
    ],
)
def test_processes_that_do_not_come_are_named_and_not_waited_for_silently(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], given: dict[str, str], said: str
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "QUIET_SECONDS", 0.0)
    with pytest.raises(TrainerError, match=said) as caught, joined_world(join_s=1.0):
        pass
    assert "unset WORLD_SIZE" in str(caught.value)
    monkeypatch.setattr("trainer.cli.app.app", lambda: joined_world(join_s=1.0).__enter__())
    with pytest.raises(SystemExit):
        cli.main()
    told = capfd.readouterr().err
    rank = given.get("RANK")
    assert told.rpartition("error: ")[2].startswith(f"rank {rank}: " if rank else "WORLD_SIZE is ")
    if "did not meet" in said:
        assert "waiting at most 1 s for the other 1 of 2 processes" in told


def test_a_process_that_ends_before_all_are_connected_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(**named: Any) -> None:
        raise distributed.dist.DistStoreError("wait timeout after 3000ms")

    environment = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        distributed, "rendezvous", lambda *asked, **named: iter([(distributed.dist.HashStore(), 0, 2)])
    )
    monkeypatch.setattr(distributed.dist, "init_process_group", lost)
    with (
        pytest.raises(TrainerError, match=r"did not meet .* \(wait timeout after 3000ms\): look"),
        joined_world(),
    ):
        pass
