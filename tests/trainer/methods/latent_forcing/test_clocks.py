"""The clocks of Latent Forcing: the laws they are drawn by in training, and the grids of sampling."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from hierarchy_builder.errors import UsageError
from trainer.methods.latent_forcing.clocks import draw_clocks, sampling_grid, shifted
from trainer.methods.latent_forcing.config import LatentMethodConfig


def clocks(schedule: str, n: int = 40_000, num_canvases: int = 1, **fields: Any) -> Any:
    config = LatentMethodConfig(schedule=schedule, **fields)  # type: ignore[arg-type]
    return draw_clocks(n, config, torch.Generator().manual_seed(0), num_canvases)


def test_cascaded_trains_one_modality_given_the_other() -> None:
    found = clocks("cascaded-noised")
    t_latents, latent = found.t_latents[:, 0], found.weight_latents[:, 0] == 1
    torch.testing.assert_close(found.weight_pixels, 1 - found.weight_latents[:, 0])
    assert latent.float().mean() == pytest.approx(0.4, abs=0.01)
    assert (found.t_pixels[latent] == 1).all()
    given = t_latents[~latent]
    assert 0 <= given.min() < given.max() <= 0.25
    assert given.mean() == pytest.approx(0.125, abs=0.003)
    assert (clocks("cascaded").t_latents[~latent] == 0).all()
    # Medians of the paper's laws on its own clock: 0.232 of the latents, 0.401 of the pixels but for the uniform ones.
    assert 1 - t_latents[latent].median() == pytest.approx(0.232, abs=0.01)
    whole = clocks("cascaded", pixel_uniform_share=0.0)
    assert 1 - whole.t_pixels[~latent].median() == pytest.approx(0.401, abs=0.01)


def test_uniform_pixel_times_are_noisy_ones() -> None:
    found = clocks("cascaded", pixel_uniform_share=1.0, latent_share=0.0)
    assert found.t_pixels.min() >= 0.5
    assert found.t_pixels.mean() == pytest.approx(0.75, abs=0.005)


def test_several_canvases_are_one_cascade() -> None:
    found = clocks("cascaded-noised", num_canvases=3, latent_share=0.6, prefix_share=0.0)
    stage = torch.cat([found.weight_latents, found.weight_pixels[:, None]], dim=1)
    assert (stage.sum(dim=1) == 1).all()
    assert stage.mean(dim=0).tolist() == pytest.approx([0.2, 0.2, 0.2, 0.4], abs=0.01)
    for k in range(4):
        times = found.t_latents[stage[:, k] == 1]
        assert (times[:, k + 1 :] == 1).all()
        assert (times[:, :k] <= 0.25).all()


@pytest.mark.parametrize("schedule", ["shifted", "offset"])
def test_training_times_lie_on_the_sampling_path(schedule: str) -> None:
    found = clocks(schedule, n=2_000)
    t_pixels, t_latents = sampling_grid(schedule, 4_000)  # type: ignore[arg-type]
    distance = torch.cdist(
        torch.stack([found.t_pixels, found.t_latents[:, 0]], dim=1),
        torch.cat([t_pixels[:, None], t_latents], dim=1),
    )
    assert distance.min(dim=1).values.max() < 2e-3
    assert (found.t_latents[:, 0] <= found.t_pixels).all()
    assert (found.weight_latents[:, 0] + found.weight_pixels == 1).all()


def test_independent_times_lean_to_noise_and_train_both() -> None:
    found = clocks("independent")
    assert found.weight_pixels.all()
    assert found.weight_latents.all()
    for t in (found.t_pixels, found.t_latents[:, 0]):
        # f(u) = 2u/(1 + u) of uniform u has mean 2 − 2 ln 2.
        assert t.mean() == pytest.approx(2 - 2 * math.log(2), abs=0.005)
    assert np.corrcoef(found.t_pixels, found.t_latents[:, 0])[0, 1] == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize(("schedule", "held"), [("latents-only", "t_pixels"), ("pixels-only", "t_latents")])
def test_controls_hold_the_other_modality_at_noise(schedule: str, held: str) -> None:
    found = clocks(schedule)
    assert (getattr(found, held) == 1).all()
    assert (getattr(found, held.replace("t_", "weight_")) == 0).all()
    times = dict(zip(("t_pixels", "t_latents"), sampling_grid(schedule, 5), strict=True))  # type: ignore[arg-type]
    assert (times[held] == 1).all()


def test_a_shift_is_a_rescaling_of_the_data() -> None:
    """At f_w(t) data w times smaller have the signal-to-noise ratio that whole data have at t."""
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    ratio = (1 - t) / t
    later = shifted(t, 3.0)
    torch.testing.assert_close((1 - later) / later * 3.0, ratio)
    torch.testing.assert_close(shifted(later, 1 / 3.0), t)


@pytest.mark.parametrize(
    ("schedule", "shift", "order"), [("shifted", 9.0, -1), ("shifted", 1.0, 0), ("independent", 1 / 9, 1)]
)
def test_shift_decides_what_comes_first(schedule: str, shift: float, order: int) -> None:
    t_pixels, t_latents = sampling_grid(schedule, 10, shift=shift)  # type: ignore[arg-type]
    ahead = t_latents[1:-1, 0] - t_pixels[1:-1]
    assert (ahead.sign() == order).all() if order else ahead.abs().max() < 1e-6
    for t in (t_pixels, t_latents[:, 0]):
        assert (t[0], t[-1]) == (1, 0)
        assert (t.diff() < 0).all()


def test_a_cascade_of_canvases_spends_its_steps_evenly() -> None:
    t_pixels, t_latents = sampling_grid("cascaded", 9, num_canvases=3)
    moving = torch.cat([t_latents, t_pixels[:, None]], dim=1).diff(dim=0) < 0
    assert (moving.sum(dim=1) == 1).all()
    assert moving.sum(dim=0).tolist() == [2, 2, 2, 3]


@pytest.mark.parametrize(
    ("schedule", "steps", "canvases"), [("cascaded", 2, 2), ("shifted", 0, 1), ("shifted", 4, 2)]
)
def test_impossible_grids_are_refused(schedule: str, steps: int, canvases: int) -> None:
    with pytest.raises(UsageError, match="expected"):
        sampling_grid(schedule, steps, num_canvases=canvases)  # type: ignore[arg-type]
