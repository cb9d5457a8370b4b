"""A run of post-training: its targets, its gradient, resuming, several processes, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_two
from tiny_runs import FLOW, LATENT, NORMALIZING, assert_same_state, signal_at, tensors_of

from hierarchy_builder.errors import InterruptedRunError, MismatchError, NonFiniteLossError, UsageError
from trainer.data.shards import open_index
from trainer.methods import registry
from trainer.methods.trajectory_forcing.sample import sample_levels
from trainer.post_training.levels import LevelMoments, moments_of_shards, spaces_of
from trainer.post_training.run import PostTrainingRun, Start, post_train, resolved
from trainer.training.config import PostTrainingConfig
from trainer.training.distributed import World
from trainer.training.loop import StopRequest
from trainer.trajectories.pipeline import TrajectoryPipeline

CPU = World(device=torch.device("cpu"))
SETTINGS = {
    "total_images": 32,
    "batch_size": 8,
    "checkpoint_images": 1000,
    "log_images": 8,
    "optim.lr": 1e-3,
    "optim.ema_halflives_kimg": [0.01],
    "pooled_grid": 2,
    "queue_images": 16,
    "sample_images": None,
    "tensorboard": False,
    "warmup_fraction": 0.0,
}


@pytest.fixture(scope="module")
def run(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, whose network differs from a new one."""
    folder = tmp_path_factory.mktemp("start") / "run"
    config = dataclasses.replace(FLOW, total_images=16, sample_images=None, tensorboard=False)
    registry.train(config, shards, str(folder), quiet=True)
    return folder


def go_on(run: Path, shards: str, out: Path, **settings: Any) -> list[dict[str, Any]]:
    """Post-train quietly, and return the rows of metrics.jsonl."""
    start, index = Start.of(run), open_index(shards)
    post_train(start, resolved(start, index, {**SETTINGS, **settings}), index, out, quiet=True)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return {name: t for name, t in tensors_of(run, step).items() if name.startswith("model/")}


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_distances_fall_and_the_run_draws_like_any_other(run: Path, shards: str, tmp_path: Path) -> None:
    rows = go_on(run, shards, tmp_path, total_images=320, **{"optim.lr": 5e-3})
    assert {"fd_tokens_0", "fd_pooled_3", "fd_tokens_2_within", "fd_pooled_1_within"} < rows[0].keys()
    assert rows[-1]["distance"] < rows[0]["distance"] / 2
    assert rows[-1]["loss"] == pytest.approx(16, rel=0.2)  # about the number of distances, whatever they are
    pipe = TrajectoryPipeline.from_pretrained(tmp_path)
    assert pipe(label="bee", seed=1).levels.shape == (4, 4, 4, 3)
    with pytest.raises(MismatchError, match="is post-trained: repeat its `trainer post-train` command"):
        registry.train(registry.config_of(_config(tmp_path), "run"), shards, str(tmp_path), quiet=True)


def _config(run: Path) -> dict[str, Any]:
    return Start.of(run).state.config


def test_levels_with_their_gradient_are_those_of_the_sampler(run: Path) -> None:
    pipe = TrajectoryPipeline.from_pretrained(run)
    noise, label = torch.randn(4, 2, 4, 4, 3), torch.tensor([0, 2])
    drawn = pipe.draw([pipe.model] * 4, pipe.method, label, noise, detached=False)
    torch.testing.assert_close(drawn, sample_levels(pipe.model, label, noise), rtol=1e-4, atol=1e-5)
    assert drawn.requires_grad


@pytest.mark.parametrize("more", [{}, {"statistics": "online"}, {"classes": ["each"]}], ids=str)
def test_a_signal_stops_it_and_the_same_command_goes_on_bit_by_bit(
    run: Path, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    signal_at(monkeypatch, signal.SIGTERM, step=1)
    with pytest.raises(InterruptedRunError):
        go_on(run, shards, tmp_path / "cut", **more)
    monkeypatch.undo()
    rows = go_on(run, shards, tmp_path / "cut", **more)
    whole = go_on(run, shards, tmp_path / "whole", **more)
    assert_same_state(tmp_path / "whole", tmp_path / "cut", 4)
    assert [row["distance"] for row in rows] == [row["distance"] for row in whole]


@pytest.mark.parametrize("more", [{}, {"balanced": True}, {"classes": ["each"]}], ids=str)
def test_parts_of_any_size_take_the_same_steps(
    run: Path, shards: str, tmp_path: Path, more: dict[str, Any]
) -> None:
    for size in (8, 3):
        go_on(run, shards, tmp_path / str(size), micro_batch_size=size, **more)
    assert furthest(weights(tmp_path / "8", 4), weights(tmp_path / "3", 4)) < 2e-5


RANKS = """
import json, sys
from pathlib import Path
import torch.distributed
from trainer.data.shards import open_index
from trainer.post_training.run import Start, post_train, resolved

torch.distributed.init_process_group("gloo")  # once for both runs
run, shards, out, settings = sys.argv[1:]
start, index = Start.of(run), open_index(shards)
for number, each in enumerate(json.loads(settings)):
    post_train(start, resolved(start, index, each), index, Path(f"{out}{number}"), quiet=True)
"""
STATISTICS: list[dict[str, Any]] = [{}, {"statistics": "snapshot"}]


def test_two_processes_take_the_steps_of_one(run: Path, shards: str, tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    settings = json.dumps([{**SETTINGS, **more} for more in STATISTICS])
    run_two(tmp_path / "ranks.py", run, shards, tmp_path / "two", settings)
    for number, more in enumerate(STATISTICS):
        go_on(run, shards, tmp_path / f"one{number}", **more)
        one, two = (tensors_of(tmp_path / f"{name}{number}", 4) for name in ("one", "two"))
        assert furthest(one, two) < 2e-5


def test_moments_of_shards_are_those_of_all_images_and_are_read_back(shards: str, tmp_path: Path) -> None:
    from hierarchy_builder.canvases import level_canvases
    from trainer.data.normalisation import RAW
    from trainer.data.reader import ShardReader

    index = open_index(shards)
    config = PostTrainingConfig(spaces=("tokens", "pooled"), classes=("all", "within", "each"), pooled_grid=2)
    spaces = spaces_of(config, 4)
    moments = moments_of_shards(index, spaces, config, RAW, CPU)
    moments.save(tmp_path / "moments.safetensors")
    read = LevelMoments.load(tmp_path / "moments.safetensors", spaces)
    rows = ShardReader(index).read_rows(range(24))
    canvases = level_canvases(rows.features.float(), rows.regions).double()
    pooled = canvases[:, 1].unflatten(2, (2, 2)).unflatten(1, (2, 2)).mean(dim=(2, 4)).flatten(1)
    whole = read.target(next(space for space in spaces if space.name == "pooled_1"), "all")
    torch.testing.assert_close(whole.mean, pooled.mean(dim=0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        whole.root @ whole.root, torch.cov(pooled.T, correction=0), rtol=1e-4, atol=1e-5
    )
    within = read.target(spaces[3], "within")
    assert within.mean.abs().max() == 0
    means = torch.stack([pooled[rows.label == label].mean(dim=0) for label in range(3)])
    away = pooled - means[rows.label]
    torch.testing.assert_close(within.root @ within.root, away.T @ away / (24 - 3), rtol=1e-4, atol=1e-5)
    each = read.target(spaces[3], "each")
    own = torch.cov(pooled[rows.label == 2].T, correction=0)
    shrunk = (8 * own + 12 * away.T @ away / 21) / (8 + 12)
    torch.testing.assert_close(each.root[2] @ each.root[2], shrunk, rtol=1e-4, atol=1e-5)


def taken(run: Path, shards: str, out: Path, **settings: Any) -> PostTrainingRun:
    """A run after its first backward pass, before the step."""
    start, index = Start.of(run), open_index(shards)
    config = resolved(start, index, {**SETTINGS, **settings})
    loop = PostTrainingRun(start, config, index, out, "auto", CPU, StopRequest(), True)
    batch = loop.dataset.read(0)
    loop.backward(batch, 0, len(batch))
    return loop


def test_levels_by_themselves_pass_no_gradient_through_the_canvas_before(
    run: Path, shards: str, tmp_path: Path
) -> None:
    """With the last level's score alone, tokens of coarser levels have a gradient only through the cascade."""

    def last_only(**settings: Any) -> torch.Tensor:
        loop = taken(run, shards, tmp_path / str(len(list(tmp_path.iterdir()))), **settings)
        for term in loop.terms_of_loss[:-1]:
            term._scale = 0.0
        loop.model.zero_grad()
        batch = loop.dataset.read(0)
        label, noise = loop._part(batch, 0, len(batch))
        canvases = loop._drawn(label, noise)
        term = loop.terms_of_loss[-1]
        term.surrogate(term.describe(canvases, label, None), label).backward()
        gradient = loop.model.level_table.grad
        assert gradient is not None
        return gradient[0].abs().sum(dim=1)

    through, alone = last_only(), last_only(per_level=True)
    assert (through[:4] > 0).all()
    assert (alone[:3] == 0).all()
    assert alone[3] > 0


def gradient(network: torch.nn.Module) -> torch.Tensor:
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in network.parameters()]
    return torch.cat([each.flatten() for each in gradients])


def test_balanced_gradients_are_the_levels_shares_of_the_cascades_scaled_to_one_norm(
    run: Path, shards: str, tmp_path: Path
) -> None:
    plain, balanced = taken(run, shards, tmp_path / "a"), taken(run, shards, tmp_path / "b", balanced=True)
    shares = [gradient(network) for network in balanced.networks]
    torch.testing.assert_close(sum(shares), gradient(plain.model), rtol=1e-4, atol=1e-6)
    norms = [float(share.norm()) for share in shares]
    measured = balanced._sum_gradients(list(balanced.model.parameters()))
    assert measured == {f"grad_norm_{n}": pytest.approx(norm, rel=1e-4) for n, norm in enumerate(norms)}
    mean = sum(norms) / 4
    expected = sum(share * mean / norm for share, norm in zip(shares, norms, strict=True))
    torch.testing.assert_close(gradient(balanced.model), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "reason"), [(LATENT, "dozens of evaluations"), (NORMALIZING, "its samples end in a score")]
)
def test_methods_without_a_gradient_are_refused_with_the_reason(
    config: Any, reason: str, picture_shards: str, tmp_path: Path
) -> None:
    registry.train(dataclasses.replace(config, total_images=8), picture_shards, str(tmp_path), quiet=True)
    with pytest.raises(UsageError, match=f"cannot be post-trained: .*{reason}"):
        Start.of(tmp_path)


def test_a_normalizing_model_that_draws_levels_by_a_denoiser_goes_on(shards: str, tmp_path: Path) -> None:
    model = dataclasses.replace(NORMALIZING.model, trajectory="canvases")
    config = dataclasses.replace(NORMALIZING, model=model, total_images=8)
    registry.train(config, shards, str(tmp_path / "flow"), quiet=True)
    model = dataclasses.replace(model, denoiser_depth=1)
    config = dataclasses.replace(config, model=model, distil_from=str(tmp_path / "flow"))
    registry.train(config, shards, str(tmp_path / "run"), quiet=True)
    rows = go_on(tmp_path / "run", shards, tmp_path / "out", total_images=80)
    assert rows[-1]["distance"] < rows[0]["distance"]
    assert TrajectoryPipeline.from_pretrained(tmp_path / "out")(label="bee").levels.shape == (4, 4, 4, 3)


def test_what_the_run_decides_and_what_is_unknown_is_refused(run: Path, shards: str) -> None:
    start, index = Start.of(run), open_index(shards)
    with pytest.raises(UsageError, match=r"model.width comes from the run that is post-trained"):
        resolved(start, index, {"model.width": 8})
    with pytest.raises(UsageError, match="unknown field 'pooled_gird', did you mean 'pooled_grid'"):
        resolved(start, index, {"pooled_gird": 8})
    with pytest.raises(UsageError, match="pooled_grid is 8, expected at most 4"):
        resolved(start, index, {"pooled_grid": 8})
    with pytest.raises(UsageError, match="there is no target"):
        resolved(start, index, {"levels": False})


def test_another_run_or_other_shards_do_not_continue_it(run: Path, shards: str, tmp_path: Path) -> None:
    go_on(run, shards, tmp_path / "out", total_images=8)
    with pytest.raises(MismatchError, match=r"post_training.pooled_grid: 2 there, 1 now"):
        go_on(run, shards, tmp_path / "out", pooled_grid=1)
    index = dataclasses.replace(open_index(shards), num_levels=3)
    with pytest.raises(
        MismatchError,
        match=r" has levels 3, the run .* was trained on levels 4: give shards of the same",
    ):
        Start.of(run).check_fits(index)


def test_samples_that_are_not_finite_end_it(run: Path, shards: str, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match=r"lower optim.lr"):
        go_on(run, shards, tmp_path, **{"optim.lr": 1e30})


def test_few_images_for_a_covariance_are_named_with_its_rank(
    run: Path, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, index = Start.of(run), open_index(shards)
    settings = {**SETTINGS, "pooled_grid": 4, "total_images": 8}
    post_train(start, resolved(start, index, settings), index, tmp_path)
    assert (
        "fd_pooled_0: 16 images begin statistics of 48 numbers, so their covariance has rank 15 at most"
        in (capsys.readouterr().err)
    )
