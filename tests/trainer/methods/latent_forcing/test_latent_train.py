"""Latent Forcing end to end on drawn shards: training, resuming, sampling, editing, and the pixel stage it lends."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import fixture_shards
import numpy as np
import pytest
import torch
from command_line import call
from fixture_shards import GRID, NUM_LEVELS, WIDTH, vouch, write_shards
from PIL import Image
from tiny_runs import LATENT as TINY

from hierarchy_builder.canvases import level_canvases
from hierarchy_builder.errors import InterruptedRunError, MismatchError, TrainerError, UsageError
from trainer.data.normalisation import Normaliser
from trainer.data.reader import Rows
from trainer.data.shards import open_index
from trainer.evaluation.pages import run_page
from trainer.methods import registry
from trainer.methods.latent_forcing.config import LatentTrainConfig
from trainer.methods.latent_forcing.pipeline import LatentPipeline
from trainer.methods.latent_forcing.pixel_stage import side_by_side
from trainer.methods.registry import all_presets, config_of, preset_of
from trainer.methods.trajectory_forcing.config import TrainConfig
from trainer.training import checkpoint as saved
from trainer.training.log import read_metrics
from trainer.trajectories.pipeline import TrajectoryPipeline

LEVELS = dataclasses.replace(TINY, pixel_stage=True)


@pytest.fixture(scope="module")
def shards(picture_shards: str) -> str:
    return picture_shards


def weights_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    return saved.load_tensors(saved.checkpoint_folder(run, step) / saved.MODEL)


def test_the_loss_falls_and_the_run_is_that_of_a_method(run: Path) -> None:
    losses = [row["loss"] for row in read_metrics(run) if "loss" in row]
    assert len(losses) == 8
    assert losses[-1] < 0.9 * losses[0]
    state = saved.load_state(saved.find_checkpoint(run))
    assert isinstance(config_of(state.config, "here"), LatentTrainConfig)
    assert state.config["model"]["grid"] == list(GRID)
    assert state.config["model"]["num_canvases"] == 1


def test_latents_have_the_spread_asked_for(run: Path, shards: str) -> None:
    normaliser = saved.load_normaliser(saved.find_checkpoint(run))
    samples = LatentPipeline.from_pretrained(run).encoder["width"]
    assert samples == WIDTH
    with np.load(Path(shards) / "statistics.npz", allow_pickle=False) as stored:
        spread = np.sqrt(stored["channel_variance"])
    np.testing.assert_allclose(spread / normaliser.std.numpy(), 0.485, rtol=1e-5)


def test_interrupted_is_uninterrupted(run: Path, shards: str, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        registry.train(dataclasses.replace(TINY, max_seconds=1e-9), shards, str(tmp_path), quiet=True)
    registry.train(TINY, shards, str(tmp_path), quiet=True)
    for name, tensor in weights_of(run, 8).items():
        assert torch.equal(tensor, weights_of(tmp_path, 8)[name]), name


def test_micro_batches_take_the_same_steps(run: Path, shards: str, tmp_path: Path) -> None:
    split = dataclasses.replace(TINY, micro_batch_size=3, total_images=16)
    registry.train(split, shards, str(tmp_path), quiet=True)
    whole = [row["loss"] for row in read_metrics(run) if "loss" in row][:2]
    assert [row["loss"] for row in read_metrics(tmp_path) if "loss" in row] == pytest.approx(whole, rel=1e-5)


def test_every_level_is_a_latent_of_the_pixel_stage(shards: str) -> None:
    """Channels of canvas l are those of level l, made of normalised tokens."""
    torch.manual_seed(0)
    features, regions = torch.randn(2, *GRID, WIDTH), torch.randint(0, 3, (2, NUM_LEVELS - 1, *GRID))
    normaliser = Normaliser(mean=torch.tensor(0.3), std=torch.tensor(2.0))
    rows = Rows(features=features, regions=regions, label=torch.zeros(2), keys=["a", "b"])
    latents = side_by_side(rows.canvases(normaliser))
    canvases = level_canvases((features - 0.3) / 2.0, regions)
    for level in range(NUM_LEVELS):
        torch.testing.assert_close(latents[..., level * WIDTH : (level + 1) * WIDTH], canvases[:, level])
    torch.testing.assert_close(rows.tokens(normaliser), canvases[:, -1])


def test_the_page_of_a_run_names_its_method(run: Path, shards: str) -> None:
    pipe = TrajectoryPipeline.from_pretrained(run)
    page = run_page(run, pipe, [pipe("ant", 0, num_steps=2)], open_index(shards))
    assert page.title == "Latent Forcing: test on 24 images"


def test_the_command_line_chooses_method_and_stages(
    shards: str,
    levels_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train = ["train", shards, "--out", tmp_path / "run", "--dry-run", "--json", "--quiet"]
    assert call(*train, "--method", "latent-forcing", "--pixel-stage") == 0
    resolved = json.loads(capsys.readouterr().out)
    assert (resolved["preset"], resolved["model"]["num_canvases"]) == ("tiny-latent", NUM_LEVELS)
    assert call(*train, "--preset", "tiny-cpu", "--pixel-stage") == 2
    assert "add --method latent-forcing" in capsys.readouterr().err
    samples = tmp_path / "samples"
    words = ["--labels", "bee", "--seeds", "0", "--steps", "2", "--format", "png,safetensors"]
    assert call("sample", levels_run, *words, "--out", samples, "--pixel-stage", levels_run) == 0
    assert (samples / "grid.png").exists()


# Bad input


def test_shards_without_pictures_are_refused(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "bare")
    with pytest.raises(TrainerError, match=r"holds no picture.*--images"):
        registry.train(TINY, str(shards), str(tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run").exists()


def test_pictures_of_another_shape_than_the_grid_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fixture_shards, "picture_of", lambda features: Image.new("RGB", (48, 32)))
    shards = write_shards(tmp_path / "wide", pictures=True)
    with pytest.raises(MismatchError, match="48×32 pixels"):
        registry.train(TINY, str(shards), str(tmp_path / "run"), quiet=True)


def test_statistics_of_another_encoder_are_refused(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", pictures=True)
    with np.load(shards / "statistics.npz", allow_pickle=False) as stored:
        arrays = dict(stored)
    np.savez(shards / "statistics.npz", **{**arrays, "channel_variance": 900 * arrays["channel_variance"]})
    vouch(shards)
    with pytest.raises(MismatchError, match=r"statistics\.npz does not describe these features"):
        registry.train(TINY, str(shards), str(tmp_path / "run"), quiet=True)
    np.savez(shards / "statistics.npz", **{**arrays, "channel_mean": np.zeros(7)})
    vouch(shards)
    with pytest.raises(TrainerError, match=r"channel_mean has shape \(7,\)"):
        registry.train(TINY, str(shards), str(tmp_path / "run"), quiet=True)


def test_another_grid_than_that_of_the_shards_is_refused(shards: str) -> None:
    asked = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, grid=(5, 5)))
    with pytest.raises(MismatchError, match=r"model.grid is \(5, 5\)"):
        registry.fit_to_shards(asked, open_index(shards), ["model.grid"])


def test_a_run_folder_of_another_method_is_refused(run: Path, shards: str) -> None:
    other = TrainConfig(preset="test", total_images=8, batch_size=8, tensorboard=False)
    with pytest.raises(
        MismatchError, match="found a run of latent-forcing, expected one of trajectory-forcing"
    ):
        registry.train(other, shards, str(run), quiet=True)


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("LF-LM", "trajectory-forcing", "preset LF-LM is of latent-forcing"),
        ("tiny-latnt", None, "did you mean 'tiny-latent'"),
        (None, "latent", "unknown method 'latent'"),
    ],
)
def test_presets_belong_to_a_method(name: str | None, method: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        preset_of(name, method)


def test_every_size_of_the_paper_is_a_preset() -> None:
    assert preset_of(None, "latent-forcing").preset == "LF-LM"
    sizes = {
        name: (make().model.depth, make().model.width, make().model.num_heads)
        for name, make in all_presets().items()
        if name.startswith("LF-")
    }
    assert sizes == {
        "LF-S": (12, 384, 6),
        "LF-B": (12, 768, 12),
        "LF-L": (24, 1024, 16),
        "LF-LM": (20, 1024, 16),
        "LF-H": (32, 1280, 16),
    }


def test_levels_ask_for_a_cascade() -> None:
    method = dataclasses.replace(TINY.method, schedule="shifted")
    with pytest.raises(ValueError, match="pixel_stage with schedule shifted"):
        dataclasses.replace(TINY, pixel_stage=True, method=method)
