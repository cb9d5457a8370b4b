"""Pipelines of Latent Forcing: samples, guidance, levels, pictures of them, and the pixel stage of other methods."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import call
from fixture_shards import GRID, NUM_LEVELS, WIDTH
from tiny_runs import LATENT as TINY

from hierarchy_builder.errors import MismatchError, TrainerError, UsageError
from trainer.data.shards import open_index
from trainer.decode.rae import to_uint8
from trainer.methods import registry
from trainer.methods.latent_forcing.clocks import sampling_grid
from trainer.methods.latent_forcing.config import LatentMethodConfig
from trainer.methods.latent_forcing.pipeline import LatentPipeline
from trainer.methods.latent_forcing.pixel_stage import Drawn, PixelStage, pixel_noise
from trainer.methods.latent_forcing.sample import ClockGuidance, sample_pixels
from trainer.methods.trajectory_forcing.config import TrainConfig
from trainer.networks.config import ModelConfig
from trainer.seeds import level_noise
from trainer.studio.board import draw_board
from trainer.studio.workbench import Workbench
from trainer.training.config import OptimConfig
from trainer.trajectories.photos import start_from_shards
from trainer.trajectories.pipeline import TrajectoryPipeline
from trainer.trajectories.selection import Selection
from trainer.trajectories.trajectory import Trajectory

LEVELS = dataclasses.replace(TINY, pixel_stage=True)


@pytest.fixture(scope="module")
def shards(picture_shards: str) -> str:
    return picture_shards


def test_an_image_depends_on_its_label_and_seed_alone(run: Path) -> None:
    pipe = TrajectoryPipeline.from_pretrained(run)
    together = pipe([0, 1, 2], [5, 6, 7], num_steps=3)
    alone = pipe("bee", 6, num_steps=3)
    torch.testing.assert_close(alone.levels, together[1].levels, rtol=1e-4, atol=1e-5)
    assert alone.levels.shape == (1, *GRID, WIDTH)
    pictures = alone.decode()
    assert pictures.shape == (1, 8, 8, 3)
    assert np.abs(pictures.astype(int) - together[1].decode()).max() <= 1
    assert (pictures != pipe("cat", 6, num_steps=3).decode()).any()


def test_tokens_alone_are_looked_at_and_edited(run: Path, shards: str, tmp_path: Path) -> None:
    pipe, index = TrajectoryPipeline.from_pretrained(run), open_index(shards)
    photo = start_from_shards(pipe, index, 0)
    assert photo.num_levels == pipe.drawn_levels == 1
    drawn = pipe("ant", 1, num_steps=2)
    ids = drawn.regions()
    assert ids.shape == (1, *drawn.grid)
    assert len(ids.unique()) > 1
    assert draw_board(drawn).num_levels == 1
    bench = Workbench().open(photo).click(0, 1, 1).take().open(drawn).click(0, 2, 2).apply_features()
    bench.current().save(tmp_path / "edited.safetensors")
    edited = pipe.adopt(Trajectory.load(tmp_path / "edited.safetensors")).resume(0)
    assert torch.equal(edited.levels[0, 2, 2], photo.levels[0, 1, 1])
    assert edited.levels.ne(drawn.levels).any(dim=-1).sum() == 1
    assert edited.region(int(ids[0, 0, 0]), level=0).count >= 1


def test_levels_are_drawn_one_after_the_other_and_resumed(levels_run: Path, tmp_path: Path) -> None:
    pipe = TrajectoryPipeline.from_pretrained(levels_run)
    trajectory = pipe("cat", 3, num_steps=2)
    assert trajectory.levels.shape == (NUM_LEVELS, *GRID, WIDTH)
    assert trajectory.decode().shape == (NUM_LEVELS, 8, 8, 3)
    np.testing.assert_array_equal(trajectory.decode(1), trajectory.decode()[1])
    again = trajectory.resume(1)
    torch.testing.assert_close(again.levels, trajectory.levels, rtol=1e-4, atol=1e-4)
    assert torch.equal(again.levels[:2], trajectory.levels[:2])
    other = trajectory.resume(1, seeds=9)
    assert (other.levels[2:] - trajectory.levels[2:]).abs().max() > 1e-3
    trajectory.save(tmp_path / "one.safetensors")
    adopted = pipe.adopt(type(trajectory).load(tmp_path / "one.safetensors"))
    np.testing.assert_array_equal(adopted.decode(), trajectory.decode())


@pytest.mark.parametrize("schedule", ["shifted", "offset", "independent", "pixels-only"])
def test_other_paths_draw_pixels_and_latents_together(run: Path, schedule: Any) -> None:
    pipe = TrajectoryPipeline.from_pretrained(run)
    assert isinstance(pipe, LatentPipeline)
    pipe.method = dataclasses.replace(pipe.method, schedule=schedule)
    trajectory = pipe("ant", 1, num_steps=2)
    assert trajectory.decode().shape == (1, 8, 8, 3)


def test_a_control_that_leaves_pixels_alone_has_no_picture(run: Path) -> None:
    pipe = TrajectoryPipeline.from_pretrained(run)
    assert isinstance(pipe, LatentPipeline)
    pipe.method = dataclasses.replace(pipe.method, schedule="latents-only")
    trajectory = pipe("ant", 1, num_steps=2)
    assert not trajectory.can_decode


@pytest.mark.parametrize(("schedule", "draws_anew"), [("shifted", False), ("independent", True)])
def test_a_picture_is_of_its_own_levels_alone(
    run: Path, tmp_path: Path, schedule: Any, draws_anew: bool
) -> None:
    """An edited canvas shows no picture from before the edit, nor does one that was read or taken from a photograph."""
    pipe = TrajectoryPipeline.from_pretrained(run)
    assert isinstance(pipe, LatentPipeline)
    pipe.method = dataclasses.replace(pipe.method, schedule=schedule)
    drawn = pipe("ant", 1, num_steps=2)
    edited = drawn.edit_features(
        Selection.from_coordinates([(0, 0)], grid=GRID, level=0), torch.full((WIDTH,), 5.0)
    )
    edited.save(tmp_path / "edited.safetensors")
    adopted = pipe.adopt(Trajectory.load(tmp_path / "edited.safetensors"))
    photo = pipe.from_features(torch.zeros(*GRID, WIDTH), label="ant", seed=1)
    assert [each.can_decode for each in (edited, adopted, photo)] == 3 * [draws_anew]
    np.testing.assert_array_equal(edited.undo().decode(), drawn.decode())
    if draws_anew:
        assert (edited.decode() != drawn.decode()).any()
        expected = to_uint8(pipe.pixel_stage(2).of(0, 1)(edited.levels))
        np.testing.assert_array_equal(edited.decode(), expected)
        np.testing.assert_array_equal(adopted.decode(), edited.decode())
        assert photo.decode().shape == (1, 8, 8, 3)
    else:
        with pytest.raises(TrainerError, match="no decoder of their own"):
            edited.decode()
        assert isinstance(edited.decoder, Drawn)
        with pytest.raises(MismatchError, match="not the levels that the picture was drawn with"):
            edited.decoder(edited.levels)


def test_one_run_of_all_pairs_of_times_is_sampled_in_any_order(
    run: Path,
    shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    both = LatentMethodConfig(schedule="independent", time_floor=0.3)
    registry.train(dataclasses.replace(TINY, method=both, total_images=8), shards, str(tmp_path), quiet=True)
    last = [
        TrajectoryPipeline.from_pretrained(tmp_path, shift=shift)("ant", 1, num_steps=2).levels
        for shift in (9.0, 1.0)
    ]
    assert (last[0] - last[1]).abs().max() > 1e-4
    words = ["evaluate", tmp_path, "--shards", shards, "--samples-per-class", 2, "--steps", 2, "--shift", 0.2]
    space = "dct"
    assert call(*words, "--space", space, "--json") == 0
    found = {row["name"]: row["value"] for row in json.loads(capsys.readouterr().out)}
    assert found["frechet_pictures"] > found["frechet_pictures_real"] >= 0
    assert isinstance(pipe := TrajectoryPipeline.from_pretrained(tmp_path), LatentPipeline)
    assert pipe.pixel_stage().time_floor == both.time_floor
    for folder, shift, message in (
        (run, "2", "schedule cascaded-noised has none"),
        (tmp_path, "0", "expected above 0"),
    ):
        assert call("sample", folder, "--labels", "ant", "--shift", shift, "--out", tmp_path / "s") == 2
        assert message in capsys.readouterr().err


def test_guidance_and_autoguidance_change_samples(run: Path) -> None:
    pipe = TrajectoryPipeline.from_pretrained(run, weak=run / "checkpoints" / "step-00000004")
    plain = pipe("ant", 1, num_steps=2).levels
    for how in ({"guidance": 3.0}, {"weak_scale": 2.0}, {"guidance": 3.0, "weak_scale": 2.0}):
        assert (pipe("ant", 1, num_steps=2, **how).levels - plain).abs().max() > 1e-4  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="weak model"):
        TrajectoryPipeline.from_pretrained(run)("ant", 1, weak_scale=1.0)


@pytest.mark.parametrize(
    ("how", "scales"),
    [
        ({}, (1.0, 1.0)),
        ({"guidance": 3.0}, (3.0, 3.0)),
        ({"weak_scale": 2.0}, (3.0, 3.0)),
        ({"guidance": 4.0, "weak_scale": 0.5}, (1.5, 4.0)),
    ],
)
def test_pictures_of_a_cascade_are_those_of_the_whole_path(
    run: Path, tmp_path: Path, how: dict[str, float], scales: tuple[float, float]
) -> None:
    """Latents now and pixels on demand, also after the file. Beside own guidance the weak network is of the pixels."""
    pipe = TrajectoryPipeline.from_pretrained(run, weak=run / "checkpoints" / "step-00000004")
    assert isinstance(pipe, LatentPipeline)
    trajectory = pipe("ant", 1, num_steps=2, **how)  # type: ignore[call-overload]
    config = pipe.model.config
    pixels, _ = sample_pixels(
        pipe.model,
        torch.tensor([0]),
        pixel_noise(1, config.image_px)[None],
        level_noise([1], 1, config.grid, config.in_channels)[0],
        sampling_grid("cascaded", 4),
        pixel_guidance=ClockGuidance(scale=scales[0]),
        latent_guidance=ClockGuidance(scale=scales[1]),
        weak_network=pipe.weak if "weak_scale" in how else None,
        weak_from=0.001 if len(how) == 2 else 1.0,
        clean_ends=True,
    )
    trajectory.save(tmp_path / "one.safetensors")
    for each in (trajectory, pipe.adopt(Trajectory.load(tmp_path / "one.safetensors"))):
        assert isinstance(each.decoder, PixelStage)
        found = each.decoder.of(0, 1)(each.levels).permute(0, 2, 3, 1)
        torch.testing.assert_close(2 * found - 1, pixels, rtol=1e-4, atol=1e-4)
    if "weak_scale" in how:
        with pytest.raises(UsageError, match="weak model"):
            TrajectoryPipeline.from_pretrained(run).adopt(trajectory)


def test_a_network_trained_without_classes_draws_none(levels_run: Path) -> None:
    """Rows of classes that training never touched count neither in levels, drawn or drawn again, nor in pictures."""
    pipe = TrajectoryPipeline.from_pretrained(levels_run)
    assert isinstance(pipe, LatentPipeline)
    pipe.method = dataclasses.replace(pipe.method, label_dropout=1.0)
    ant, cat = (pipe(name, 3, num_steps=2).resume(1, seeds=9) for name in ("ant", "cat"))
    assert (ant.class_name, cat.class_name) == ("ant", "cat")
    assert torch.equal(ant.levels, cat.levels)
    np.testing.assert_array_equal(ant.decode(), cat.decode())


def test_guidance_needs_label_dropout(run: Path, shards: str, tmp_path: Path) -> None:
    """Without it the row of the null class is as it was drawn at first."""
    always = dataclasses.replace(TINY, method=LatentMethodConfig(label_dropout=0.0), total_images=8)
    registry.train(always, shards, str(tmp_path), quiet=True)
    pipe = TrajectoryPipeline.from_pretrained(tmp_path, weak=run)
    for how in ({}, {"guidance": 1.0}, {"weak_scale": 0.5}):
        pipe("ant", num_steps=2, **how)  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="trained without label dropout"):
        pipe("ant", num_steps=2, guidance=2.0)
    with pytest.raises(UsageError, match="it guides without class, but was trained without label dropout"):
        TrajectoryPipeline.from_pretrained(run, weak=tmp_path)


def test_a_weak_network_sees_what_the_other_does(
    run: Path, levels_run: Path, shards: str, tmp_path: Path
) -> None:
    with pytest.raises(
        MismatchError, match=r"weak model .*: model.num_canvases is 4, that of .*tokens.* is 1"
    ):
        TrajectoryPipeline.from_pretrained(run, weak=levels_run)
    smaller = dataclasses.replace(TINY, method=LatentMethodConfig(latent_scale=0.3), total_images=8)
    registry.train(smaller, shards, str(tmp_path), quiet=True)
    with pytest.raises(MismatchError, match="its features are normalised differently from"):
        TrajectoryPipeline.from_pretrained(run, weak=tmp_path)


def test_a_pixel_stage_draws_the_canvases_of_trajectory_forcing(
    run: Path, levels_run: Path, shards: str, tmp_path: Path
) -> None:
    small = ModelConfig(width=16, depth=2, head_depth=1, num_heads=2, num_class_tokens=1, num_time_tokens=1)
    config = TrainConfig(
        preset="test",
        model=small,
        optim=OptimConfig(ema_halflives_kimg=()),
        total_images=8,
        batch_size=8,
        loader_workers=0,
        sample_images=None,
        tensorboard=False,
    )
    registry.train(config, shards, str(tmp_path / "tf"), quiet=True)
    for stage in (run, levels_run):
        pipe = TrajectoryPipeline.from_pretrained(tmp_path / "tf", pixel_stage=stage)
        assert isinstance(pipe.decoder, PixelStage)
        trajectory = pipe("bee", 2)
        pictures = trajectory.decode()
        assert pictures.shape == (NUM_LEVELS, 8, 8, 3)
        np.testing.assert_array_equal(pictures, pipe("bee", 2).decode())
        pipe.to("meta")
        assert {each.device.type for each in pipe.decoder.network.parameters()} == {"meta"}
    assert not TrajectoryPipeline.from_pretrained(tmp_path / "tf")("bee", 2).can_decode


def test_a_pixel_stage_of_another_encoder_is_refused(run: Path) -> None:
    with pytest.raises(MismatchError, match="its encoder has name 'drawn', that of the canvases 'dct'"):
        TrajectoryPipeline.from_pretrained(run).decoder_of_canvases({"name": "dct"})


def test_a_run_that_draws_both_at_once_is_no_pixel_stage(shards: str, tmp_path: Path) -> None:
    both = LatentMethodConfig(schedule="shifted")
    registry.train(dataclasses.replace(TINY, method=both, total_images=8), shards, str(tmp_path), quiet=True)
    with pytest.raises(
        MismatchError, match="trained with schedule shifted, expected cascaded, cascaded-noised or"
    ):
        TrajectoryPipeline.from_pretrained(tmp_path).decoder_of_canvases(open_index(shards).encoder)
