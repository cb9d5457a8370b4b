"""Runs of Normalizing Trajectory Models: training, resuming, sampling, likelihoods."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from documented import undocumented
from fixture_shards import NUM_LEVELS, vouch, write_shards
from tiny_runs import FLOW, before_step
from tiny_runs import NORMALIZING as TINY
from typer.testing import CliRunner

from hierarchy_builder.canvases import level_canvases
from hierarchy_builder.errors import MismatchError, NonFiniteLossError, UsageError
from trainer.cli.app import app
from trainer.data.reader import ShardReader
from trainer.data.shards import open_index
from trainer.methods import registry
from trainer.methods.normalizing_trajectory import train as room
from trainer.methods.normalizing_trajectory.config import NormalizingMethodConfig, NormalizingTrainConfig
from trainer.methods.normalizing_trajectory.likelihood import likelihood, measure
from trainer.methods.normalizing_trajectory.pipeline import NormalizingPipeline
from trainer.methods.registry import config_of, preset_of
from trainer.training import checkpoint as saved
from trainer.training.config import OptimConfig
from trainer.training.log import read_metrics
from trainer.trajectories.pipeline import TrajectoryPipeline

RUNNER = CliRunner()


def tiny(trajectory: str = "tokens", **fields: Any) -> NormalizingTrainConfig:
    model = dataclasses.replace(TINY.model, trajectory=trajectory)
    return dataclasses.replace(TINY, model=model, **fields)


@pytest.fixture(scope="module")
def runs(shards: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run of each kind of trajectory."""
    folder = tmp_path_factory.mktemp("runs")
    found = {name: folder / name for name in ("tokens", "canvases", "levels")}
    for name, out in found.items():
        registry.train(tiny(name), shards, str(out), quiet=True)
    return found


@pytest.fixture(scope="module")
def flow_run(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of Trajectory Forcing."""
    optim = OptimConfig(ema_halflives_kimg=(0.05,))
    config = dataclasses.replace(FLOW, optim=optim, total_images=16, normalise="channel")
    out = tmp_path_factory.mktemp("flow") / "run"
    registry.train(config, shards, str(out), quiet=True)
    return out


def weights(run: Path) -> dict[str, torch.Tensor]:
    folder = saved.find_checkpoint(run)
    return {
        f"{file.stem}/{name}": tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in saved.load_tensors(file).items()
    }


@pytest.mark.parametrize("trajectory", ["tokens", "levels"])
def test_a_resumed_run_has_the_weights_of_a_whole_one(
    trajectory: str, shards: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    registry.train(tiny(trajectory, total_images=32), shards, str(tmp_path / "run"), quiet=True)
    for folder in saved.list_checkpoints(tmp_path / "run")[1:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    registry.train(tiny(trajectory), shards, str(tmp_path / "run"), quiet=True)
    whole, resumed = weights(runs[trajectory]), weights(tmp_path / "run")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_micro_batches_take_the_same_steps(shards: str, runs: dict[str, Path], tmp_path: Path) -> None:
    registry.train(tiny(micro_batch_size=3), shards, str(tmp_path / "run"), quiet=True)
    whole = [row["loss"] for row in read_metrics(runs["tokens"]) if "loss" in row]
    split = [row["loss"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert split == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("pairs", ["all", "one"])
def test_bits_fall(pairs: str, shards: str, tmp_path: Path) -> None:
    config = tiny(method=NormalizingMethodConfig(pairs=pairs), total_images=320)  # type: ignore[arg-type]
    registry.train(config, shards, str(tmp_path / "run"), quiet=True)
    bits = [row["bits"] for row in read_metrics(tmp_path / "run") if "bits" in row]
    assert np.mean(bits[-10:]) < np.mean(bits[:10]) - 0.3


def test_samples_of_every_trajectory_and_ending(runs: dict[str, Path]) -> None:
    for name, run in runs.items():
        for ending in ("score",) if name == "levels" else ("inverse", "score"):
            pipe = TrajectoryPipeline.from_pretrained(run, ending=ending)  # type: ignore[arg-type]
            together = pipe(["ant", "bee"], seed=3)
            assert together[1].levels.shape == (1 if name == "tokens" else 4, 4, 4, 3)
            alone = pipe("bee", seed=3)
            torch.testing.assert_close(alone.levels, together[1].levels, atol=1e-4, rtol=1e-4)
            assert alone.num_steps == 4, name


def test_a_run_without_classes_knows_none(shards: str, tmp_path: Path) -> None:
    """Rows of classes that no step has trained take no part in samples and likelihoods."""
    config = tiny(method=NormalizingMethodConfig(label_dropout=1.0), total_images=16)
    registry.train(config, shards, str(tmp_path / "run"), quiet=True)
    pipe = NormalizingPipeline.from_pretrained(tmp_path / "run")
    before = pipe("ant", seed=3).levels, next(iter(measure(pipe, open_index(shards), [0]))).bits
    with torch.no_grad():
        pipe.model.predictor.trunk.class_table[:, :-1] += 5.0
    assert torch.equal(pipe("bee", seed=3).levels, before[0])
    np.testing.assert_array_equal(next(iter(measure(pipe, open_index(shards), [0]))).bits, before[1])


def test_levels_can_be_edited_and_resumed(runs: dict[str, Path]) -> None:
    for name in ("levels", "canvases"):
        trajectory = TrajectoryPipeline.from_pretrained(runs[name])("bee", seed=3)
        again = trajectory.resume(1)
        torch.testing.assert_close(again.levels, trajectory.levels, atol=1e-5, rtol=1e-5)
        other = trajectory.resume(1, seeds=9)
        assert torch.equal(other.levels[:2], trajectory.levels[:2])
        assert float((other.levels[2:] - trajectory.levels[2:]).abs().mean()) > 0.01


def test_guidance_needs_label_dropout(shards: str, runs: dict[str, Path], tmp_path: Path) -> None:
    plain, guided = (
        TrajectoryPipeline.from_pretrained(runs["tokens"])("bee", guidance=w) for w in (None, 2.0)
    )
    assert not torch.equal(plain.levels, guided.levels)
    config = tiny(method=NormalizingMethodConfig(label_dropout=0.0), total_images=8)
    registry.train(config, shards, str(tmp_path / "run"), quiet=True)
    with pytest.raises(UsageError, match="without label dropout"):
        TrajectoryPipeline.from_pretrained(tmp_path / "run")("bee", guidance=2.0)


def test_steps_it_was_not_trained_with_are_refused(runs: dict[str, Path]) -> None:
    with pytest.raises(MismatchError, match="8 transitions, the network was trained on 4"):
        TrajectoryPipeline.from_pretrained(runs["tokens"])("bee", num_steps=8)


def test_another_number_of_steps_in_the_run_folder_is_refused(shards: str, runs: dict[str, Path]) -> None:
    model = dataclasses.replace(TINY.model, num_steps=(8,))
    with pytest.raises(MismatchError, match=r"model.num_steps: \[4\] there, \[8\] now"):
        registry.train(dataclasses.replace(TINY, model=model), shards, str(runs["tokens"]), quiet=True)


def test_from_a_flow_matching_network(shards: str, flow_run: Path, tmp_path: Path) -> None:
    config = tiny(init_from=str(flow_run), method=NormalizingMethodConfig(t_min=(0.02, 0.05)))
    resolved = registry.fit_to_shards(config, open_index(shards))
    assert resolved.model.trajectory == "canvases"
    assert resolved.model.backbone is not None
    assert config_of(json.loads(json.dumps(dataclasses.asdict(resolved))), "test") == resolved
    network = room.fresh_network(resolved)
    before = saved.load_weights(saved.find_checkpoint(flow_run), "0.05")
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in network.predictor.backbone.state_dict().items()
    )
    registry.train(config, shards, str(tmp_path / "run"), quiet=True)
    rows = [row for row in read_metrics(tmp_path / "run") if "flow" in row]
    assert rows[0]["flow"] == pytest.approx(0.0, abs=1e-8)
    assert rows[-1]["flow"] > 0
    assert TrajectoryPipeline.from_pretrained(tmp_path / "run")("bee").levels.shape[0] == NUM_LEVELS


def test_from_a_flow_matching_network_that_joins_tokens(shards: str, tmp_path: Path) -> None:
    joined = dataclasses.replace(FLOW.model, patch_size=2)
    flow = dataclasses.replace(FLOW, model=joined, total_images=16, normalise="channel")
    registry.train(flow, shards, str(tmp_path / "flow"), quiet=True)
    config = tiny(init_from=str(tmp_path / "flow"), method=NormalizingMethodConfig(t_min=(0.02, 0.05)))
    registry.train(dataclasses.replace(config, total_images=16), shards, str(tmp_path / "run"), quiet=True)
    rows = [row for row in read_metrics(tmp_path / "run") if "flow" in row]
    assert rows[0]["flow"] == pytest.approx(0.0, abs=1e-8)
    pipe = TrajectoryPipeline.from_pretrained(tmp_path / "run")
    assert pipe.model.config.backbone.patch_size == 2
    assert pipe("bee").levels.isfinite().all()


def test_statistics_of_other_features_are_refused(shards: str, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(shards, tmp_path / "shards"))
    with np.load(moved / "statistics.npz") as stored:
        scaled = {
            name: stored[name] / 10_000 if "variance" in name else stored[name] for name in stored.files
        }
    np.savez(moved / "statistics.npz", **scaled)
    vouch(moved)
    with pytest.raises(MismatchError, match="does not describe these features"):
        registry.train(TINY, str(moved), str(tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_run_to_start_from_has_to_be_of_the_right_method(
    shards: str, flow_run: Path, runs: dict[str, Path]
) -> None:
    bounded = NormalizingMethodConfig(t_min=(0.02, 0.05))
    with pytest.raises(
        UsageError, match=r"init_from=.*normalizing-trajectory, expected one of trajectory-forcing"
    ):
        registry.fit_to_shards(tiny(init_from=str(runs["tokens"]), method=bounded), open_index(shards))
    with pytest.raises(UsageError, match="distil_from"):
        registry.fit_to_shards(tiny(distil_from=str(flow_run)), open_index(shards))
    with pytest.raises(ValueError, match="low end above 0"):
        tiny(init_from=str(flow_run))


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("num_steps", r"\[8\], .* has \[4\]"),
        ("width", "48, .* has 16"),
        ("trajectory", "levels, .* has tokens"),
    ],
)
def test_fields_of_the_run_to_distil_are_not_asked_for(
    asked: str, found: str, shards: str, runs: dict[str, Path]
) -> None:
    values = {"num_steps": (8,), "width": 48, "trajectory": "levels"}
    model = dataclasses.replace(TINY.model, **{asked: values[asked]})
    config = dataclasses.replace(TINY, distil_from=str(runs["tokens"]), model=model)
    with pytest.raises(MismatchError, match=f"model.{asked} is {found}: leave it out"):
        registry.fit_to_shards(config, open_index(shards), [f"model.{asked}"])
    assert registry.fit_to_shards(config, open_index(shards)).model.num_steps == (4,)


def test_units_of_the_flow_are_not_asked_for(shards: str, flow_run: Path) -> None:
    config = tiny(
        init_from=str(flow_run), method=NormalizingMethodConfig(t_min=(0.02, 0.05)), normalise="position"
    )
    with pytest.raises(MismatchError, match=r"normalise is position, .* has channel: leave it out"):
        registry.fit_to_shards(config, open_index(shards), ["normalise", "init_from"])


def test_the_flow_that_pulls_stays_the_one_of_the_start(shards: str, flow_run: Path, tmp_path: Path) -> None:
    """The run it came from may go on meanwhile; its later network is another one."""
    source = Path(shutil.copytree(flow_run, tmp_path / "flow"))
    config = tiny(init_from=str(source), method=NormalizingMethodConfig(t_min=(0.02, 0.05)), total_images=16)
    registry.train(config, shards, str(tmp_path / "run"), quiet=True)
    newest = saved.find_checkpoint(source)
    shutil.copytree(newest, newest.with_name("step-00009999"))
    longer = dataclasses.replace(config, total_images=32)
    with pytest.raises(MismatchError, match=rf"init_from: '….*{newest.name}' there, '….*step-00009999' now"):
        registry.train(longer, shards, str(tmp_path / "run"), quiet=True)
    registry.train(
        dataclasses.replace(longer, init_from=str(newest)), shards, str(tmp_path / "run"), quiet=True
    )


def test_t_min_that_leaves_no_first_step_is_refused_before_the_start(shards: str) -> None:
    model = dataclasses.replace(TINY.model, num_steps=(4, 16))
    config = dataclasses.replace(TINY, model=model, method=NormalizingMethodConfig(t_min=(0.0, 0.3)))
    with pytest.raises(UsageError, match=r"t_min is up to 0\.3, the first of 16 steps on 16 tokens is"):
        registry.fit_to_shards(config, open_index(shards))


def test_a_denoiser_is_distilled_with_blocks_run_again(
    shards: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    """Weights that are frozen get no gradient there either."""
    for name in (False, True):
        config = tiny(distil_from=str(runs["tokens"]), total_images=16, activation_checkpointing=name)
        registry.train(config, shards, str(tmp_path / str(name)), quiet=True)
    plain, again = (weights(tmp_path / str(name)) for name in (False, True))
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trajectory", ["tokens", "levels"])
def test_the_denoiser_learns_what_the_score_says(
    trajectory: str, shards: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    config = tiny(distil_from=str(runs[trajectory]), total_images=400)
    registry.train(config, shards, str(tmp_path / "run"), quiet=True)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:5])
    before, after = weights(runs[trajectory]), weights(tmp_path / "run")
    frozen = [name for name in after if name.startswith("model/") and "denoiser" not in name]
    assert all(torch.equal(after[name], before[name.replace("model/", "ema-0.05/")]) for name in frozen)
    assert TrajectoryPipeline.from_pretrained(tmp_path / "run").ending == "denoiser"  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="the model has none"):
        TrajectoryPipeline.from_pretrained(runs[trajectory], ending="denoiser")
    two_blocks = dataclasses.replace(TINY.model, denoiser_depth=2)
    again = dataclasses.replace(TINY, distil_from=str(tmp_path / "run"), model=two_blocks)
    deeper = room.fresh_network(registry.fit_to_shards(again, open_index(shards)))  # its denoiser starts anew
    assert len(deeper.denoiser.trunk.blocks) == 2
    assert torch.equal(
        deeper.transporter.blocks[0].out.weight, after["model/transporter.blocks.0.out.weight"]
    )


def test_likelihoods_do_not_depend_on_neighbours(shards: str, runs: dict[str, Path]) -> None:
    index = open_index(shards)
    for run in runs.values():
        pipe = NormalizingPipeline.from_pretrained(run)
        rows, images = likelihood(pipe, index, max_real=5)
        (alone,) = measure(pipe, index, [images[3].number])
        np.testing.assert_allclose(alone.bits, images[3].bits, rtol=1e-4, atol=1e-3)
        dims = 4 * 4 * 3
        named = dict(rows)
        assert undocumented(named) == []
        assert named["bits_per_dim"] == pytest.approx(
            np.mean([i.bits.mean(axis=(0, 1)).sum() for i in images]) / dims, rel=1e-5
        )
        totals = [sum(map(sum, image.region_bits())) for image in images]
        assert totals == pytest.approx([image.added_total for image in images], rel=1e-4)


def test_a_hierarchy_is_held_against_gaussians_of_its_own_levels(shards: str, runs: dict[str, Path]) -> None:
    index, pipe = open_index(shards), NormalizingPipeline.from_pretrained(runs["levels"])
    rows, images = likelihood(pipe, index, max_real=7)
    reader = ShardReader(index)
    read = reader.read_rows([image.number for image in images])
    reader.close()
    canvases = level_canvases(pipe.normaliser.apply(read.features.float()), read.regions)
    variance = canvases.var(dim=(0, 2, 3), correction=0) + pipe.method.level_noise**2
    bits = 0.5 * (2 * np.pi * np.e * variance).log2() + pipe.normaliser.std.log2()
    for level, expected in enumerate(bits.mean(dim=1).tolist()):
        assert dict(rows)[f"bits_per_dim_gaussian_level_{level}"] == pytest.approx(expected, rel=1e-4)
    assert dict(rows)["bits_per_dim_gaussian"] == pytest.approx(float(bits.mean()), rel=1e-4)


def test_the_bound_of_a_level_of_a_hierarchy_is_its_bits(shards: str, runs: dict[str, Path]) -> None:
    """It used to be in nats."""
    (image,) = measure(NormalizingPipeline.from_pretrained(runs["levels"]), open_index(shards), [0])
    np.testing.assert_allclose(image.bound, image.bits.sum(axis=(1, 2, 3)), rtol=1e-5)


def test_bits_are_of_raw_features(shards: str, runs: dict[str, Path], tmp_path: Path) -> None:
    """Ten times the features, with ten times the spread, need log₂ 10 bits more for every number of every state."""
    pipe, index = NormalizingPipeline.from_pretrained(runs["tokens"]), open_index(shards)
    before = dict(likelihood(pipe, index, max_real=4)[0])
    wide = write_shards(tmp_path / "wide", factor=10.0)
    pipe.normaliser = dataclasses.replace(
        pipe.normaliser, mean=pipe.normaliser.mean * 10, std=pipe.normaliser.std * 10
    )
    after = dict(likelihood(pipe, open_index(str(wide)), max_real=4)[0])
    assert after["bits_per_dim_gaussian"] - before["bits_per_dim_gaussian"] == pytest.approx(np.log2(10))
    # float16 features are rounded otherwise at another size
    assert after["bits_per_dim"] - before["bits_per_dim"] == pytest.approx(np.log2(10), abs=0.01)
    assert after["added_bits_per_dim"] == pytest.approx(before["added_bits_per_dim"], abs=0.01)


def test_a_density_that_is_not_finite_names_image_and_seed(shards: str, runs: dict[str, Path]) -> None:
    pipe = NormalizingPipeline.from_pretrained(runs["tokens"])
    with torch.no_grad():
        pipe.model.transporter.blocks[0].out.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"ant/image0000.*seed \d+"):
        likelihood(pipe, open_index(shards), max_real=2)


def test_a_log_determinant_that_is_not_finite_stops_the_run(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[str] = []

    def damage(loop: Any, batch: Any) -> None:
        keys.extend(batch.keys)
        with torch.no_grad():  # the second half of the channels are log scales
            loop.model.transporter.blocks[0].out.bias.chunk(2)[1].fill_(torch.nan)

    before_step(monkeypatch, 2, damage)
    with pytest.raises(NonFiniteLossError, match=r"step 2, seed 0: loss nan.* log_det nan") as caught:
        registry.train(tiny(), shards, str(tmp_path), quiet=True)
    assert f"all features are finite; samples of this rank: {', '.join(keys)}. " in str(caught.value)
    assert [folder.name for folder in saved.list_checkpoints(tmp_path)] == ["step-00000002"]


def test_presets_and_methods() -> None:
    assert preset_of(None, "normalizing-trajectory").preset == "NTM-B"
    with pytest.raises(UsageError, match="is of normalizing-trajectory"):
        preset_of("NTM-L", "latent-forcing")


def test_a_run_of_tokens_is_evaluated(shards: str, runs: dict[str, Path]) -> None:
    words = [
        "evaluate",
        str(runs["tokens"]),
        "--shards",
        shards,
        "--samples-per-class",
        "2",
        "--max-real",
        "8",
    ]
    done = RUNNER.invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    names = {row["name"] for row in json.loads(done.stdout)}
    assert "class_mean_accuracy" in names


def test_verbs(shards: str, runs: dict[str, Path], tmp_path: Path) -> None:
    run = str(runs["levels"])
    done = RUNNER.invoke(
        app, ["evaluate", run, "--shards", shards, "--likelihood", "--json", "--max-real", "8"]
    )
    assert done.exit_code == 0, done.output
    rows = {row["name"]: row["value"] for row in json.loads(done.stdout)}
    assert rows["noise"] == pytest.approx(0.1)
    assert {f"bits_per_dim_level_{level}" for level in range(NUM_LEVELS)} <= rows.keys()
    flagged = json.loads((runs["levels"] / "likelihood.json").read_text())["images"]
    assert [row["added_bits"] for row in flagged] == sorted((r["added_bits"] for r in flagged), reverse=True)
    done = RUNNER.invoke(app, ["report", run, "--shards", shards])
    assert done.exit_code == 0, done.output
    assert "Surprise" in (runs["levels"] / "report.html").read_text()
    out = str(tmp_path / "samples")
    done = RUNNER.invoke(
        app,
        [
            "sample",
            str(runs["canvases"]),
            "--labels",
            "bee",
            "--seeds",
            "0",
            "--ending",
            "inverse",
            "--out",
            out,
        ],
    )
    assert done.exit_code == 0, done.output
