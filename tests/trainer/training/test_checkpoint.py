"""A checkpoint is whole or it is not there, and gives back bit for bit what was put in."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from trainer.errors import MismatchError, TrainerError, UsageError
from trainer.methods.trajectory_forcing.network import TrajectoryTransformer
from trainer.training import checkpoint as saved
from trainer.training.config import ModelConfig, OptimConfig
from trainer.training.optim import MuonAdam
from trainer.training.weights import WeightAverages

TINY = ModelConfig(grid=(2, 2), in_channels=3, num_classes=2, width=16, depth=2, head_depth=1, num_heads=2)

SHARDS = {"encoder": {"name": "drawn"}, "class_names": ["ant"], "config_hash": "0"}


def make_parts(seed: int = 0) -> tuple[TrajectoryTransformer, MuonAdam, WeightAverages]:
    torch.manual_seed(seed)
    model = TrajectoryTransformer(TINY)
    return model, MuonAdam(model.named_parameters(), OptimConfig()), WeightAverages(model, (0.5, 500.0))


def take_step(model: TrajectoryTransformer, optimizer: MuonAdam, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def save(folder: Path, step: int = 3) -> tuple[TrajectoryTransformer, MuonAdam, WeightAverages]:
    parts = model, optimizer, averages = make_parts()
    for number in range(2):
        take_step(model, optimizer, number)
        averages.update(model, 8 * (number + 1), 8)
    state = saved.RunState(step=step, images_seen=8 * step, config={"a": 1}, shards=SHARDS)
    target = saved.checkpoint_folder(folder, step)
    saved.save_checkpoint(target, state, model, averages.state_dict(), optimizer)
    return parts


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    model, optimizer, averages = save(tmp_path)
    folder = saved.find_checkpoint(tmp_path)
    assert folder == tmp_path / "checkpoints" / "step-00000003"
    state = saved.load_state(folder)
    assert (state.step, state.images_seen, state.config, state.shards) == (3, 24, {"a": 1}, SHARDS)
    assert saved.averages_of(folder) == ["0.5", "500"]
    other, other_optimizer, other_averages = make_parts(seed=1)
    other.load_state_dict(saved.load_weights(folder, None))
    other_averages.load_state_dict({name: saved.load_weights(folder, name) for name in ("0.5", "500")})
    tensors = saved.load_tensors(folder / saved.OPTIMIZER)
    saved.restore_optimizer(other_optimizer, tensors, state.optimizer)
    take_step(model, optimizer, 9)
    take_step(other, other_optimizer, 9)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name
        for halflife in averages.averages:
            assert torch.equal(averages.averages[halflife][name], other_averages.averages[halflife][name])


def test_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    folder = saved.find_checkpoint(tmp_path)
    optimizer = MuonAdam(torch.nn.Linear(2, 2).named_parameters(), OptimConfig())
    with pytest.raises(MismatchError, match="other parameters"):
        saved.restore_optimizer(
            optimizer, saved.load_tensors(folder / saved.OPTIMIZER), saved.load_state(folder).optimizer
        )


def test_interrupted_write_is_not_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, step=3)
    written: list[str] = []
    write = saved._write

    def full_disk(path: Path, data: bytes) -> None:
        if path.name == saved.STATE:
            raise OSError(28, "No space left on device")
        written.append(path.name)
        write(path, data)

    monkeypatch.setattr(saved, "_write", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, step=4)
    assert saved.MODEL in written
    assert saved.latest_checkpoint(tmp_path) == saved.checkpoint_folder(tmp_path, 3)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_what_a_killed_process_of_the_same_id_left_is_no_obstacle(tmp_path: Path) -> None:
    left = saved.checkpoint_folder(tmp_path, 4).with_name(f"step-00000004.tmp-{os.getpid()}")
    left.mkdir(parents=True)
    (left / saved.MODEL).write_bytes(b"half")
    left.with_name("step-00000003.tmp-1").mkdir()
    save(tmp_path, step=4)
    saved.prune_checkpoints(tmp_path, keep=2)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


def test_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, step=3)
    save(tmp_path, step=4)
    weights = saved.checkpoint_folder(tmp_path, 4) / saved.MODEL
    weights.write_bytes(weights.read_bytes()[:-1])
    assert saved.latest_checkpoint(tmp_path) == saved.checkpoint_folder(tmp_path, 3)
    with pytest.raises(TrainerError, match=r"model\.safetensors: \d+ bytes, state\.json says \d+"):
        saved.load_state(weights.parent)


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save(tmp_path, step=step)
    saved.prune_checkpoints(tmp_path, keep=2)
    assert [folder.name for folder in saved.list_checkpoints(tmp_path)] == ["step-00000002", "step-00000010"]


def test_newer_checkpoint_format_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    path = saved.find_checkpoint(tmp_path) / saved.STATE
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
    with pytest.raises(MismatchError, match="checkpoint format 2, this program reads 1"):
        saved.load_state(path.parent)


def test_unknown_average_names_those_there(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(UsageError, match=r"half-life 7 kimg, there are 0\.5, 500"):
        saved.load_weights(saved.find_checkpoint(tmp_path), "7")


def test_folder_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="found no checkpoint"):
        saved.find_checkpoint(tmp_path)
