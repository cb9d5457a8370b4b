"""A checkpoint is whole or it is not there, and gives back bit for bit what was put in."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from hierarchy_builder.errors import MismatchError, TrainerError, UsageError
from hierarchy_builder.files.whole import sealed_text
from trainer.methods.trajectory_forcing.network import TrajectoryTransformer
from trainer.networks.config import ModelConfig
from trainer.training import checkpoint as saved
from trainer.training.config import OptimConfig
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
    sync = saved.sync

    def full_disk(path: Path) -> None:
        if path.name == saved.STATE:
            raise OSError(28, "No space left on device")
        written.append(path.name)
        sync(path)

    monkeypatch.setattr(saved, "sync", full_disk)
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


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def test_prune_leaves_alone_and_does_not_count_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5, 6):
        save(tmp_path, step=step)
    one, two, *_, five, six = saved.list_checkpoints(tmp_path)
    (one / "notes.txt").write_text("mine")
    (two / saved.MODEL).write_bytes(b"damaged")
    (five / saved.STATE).unlink()
    (six / saved.STATE).write_text('{"format_version": 3}')
    outside = tmp_path / "outside"
    six.with_name("step-00000003").rename(outside)
    six.with_name("step-00000003").symlink_to(outside)
    save(tmp_path, step=7)
    save(tmp_path, step=8)
    before = listing(tmp_path)
    saved.prune_checkpoints(tmp_path, keep=2)
    after = listing(tmp_path)
    gone = before.keys() - after.keys()
    assert after == {name: data for name, data in before.items() if name not in gone}
    assert {Path(name).parts[1] for name in gone} == {"step-00000004"}


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("step-00000004.tmp-7", "notes.txt"),
        ("step-00000004.tmp-7", "state.json/deep"),
        ("step-00000004.tmp-mine", "model.safetensors"),
        ("step-4.tmp-7", "model.safetensors"),
        ("step-final.tmp-7", "model.safetensors"),
    ],
)
def test_a_folder_of_another_shape_is_not_taken_for_an_interrupted_write(
    tmp_path: Path, name: str, file: str
) -> None:
    save(tmp_path, step=3)
    path = tmp_path / "checkpoints" / name / file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    saved.prune_checkpoints(tmp_path, keep=1)
    assert path.read_bytes() == b"mine"


def test_writing_replaces_no_folder(tmp_path: Path) -> None:
    target = saved.checkpoint_folder(tmp_path, 4)
    in_place = target.with_name(f"{target.name}.tmp-{os.getpid()}") / "notes.txt"
    in_place.parent.mkdir(parents=True)
    in_place.write_bytes(b"mine")
    with pytest.raises(TrainerError, match=r"give the same command again: mv -- .*tmp-\d+ .*aside"):
        save(tmp_path, step=4)
    target.mkdir()
    with pytest.raises(TrainerError, match=r"step-00000004 exists, nothing was written there; .* mv -- "):
        save(tmp_path, step=4)
    assert listing(tmp_path / "checkpoints").keys() == {
        target.name,
        in_place.parent.name,
        f"{in_place.parent.name}/notes.txt",
    }


def test_a_kill_during_a_removal_leaves_no_damaged_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(tmp_path, step=step)

    def killed(path: Path) -> None:
        (path / saved.STATE).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(saved.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            saved.drop_after(tmp_path, 1)
    assert saved.checkpoint_to_resume(tmp_path) == saved.checkpoint_folder(tmp_path, 1)
    saved.prune_checkpoints(tmp_path, keep=2)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_steps_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step=step)
    assert saved.latest_checkpoint(tmp_path) == saved.checkpoint_folder(tmp_path, 100_000_000)


def test_newer_checkpoint_format_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    path = saved.find_checkpoint(tmp_path) / saved.STATE
    path.write_bytes(sealed_text({**json.loads(path.read_text()), "format_version": 3}))
    with pytest.raises(MismatchError, match="checkpoint format 3, this program reads 2 and older"):
        saved.load_state(path.parent)


def test_unknown_average_names_those_there(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(UsageError, match=r"half-life 7 kimg, there are 0\.5, 500"):
        saved.load_weights(saved.find_checkpoint(tmp_path), "7")


def test_folder_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="found no checkpoint; give a run folder"):
        saved.find_checkpoint(tmp_path)
    (tmp_path / "index.json").touch()  # of shards
    with pytest.raises(TrainerError, match=r"it holds hierarchies, from which `trainer train .* makes a run"):
        saved.find_checkpoint(tmp_path)


@pytest.mark.parametrize("prefix", ["", "predictor.backbone."])
def test_a_gaussian_start_of_an_earlier_version_is_refused_by_name(tmp_path: Path, prefix: str) -> None:
    start = {f"{prefix}start.deviation": torch.ones(1), f"{prefix}start.spread": torch.ones(1)}
    for ema, tensors in (("1", start), ("2", dict([*start.items()][:1]))):
        safetensors.torch.save_file(tensors, tmp_path / f"ema-{ema}.safetensors")
    assert saved.load_weights(tmp_path, "1").keys() == start.keys()
    with pytest.raises(MismatchError, match="an earlier version trained this network"):
        saved.load_weights(tmp_path, "2")
