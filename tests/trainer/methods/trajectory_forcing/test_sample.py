"""Sampling: parity, exact solutions, resuming, and independence of the batch."""

from types import SimpleNamespace

import pytest
import torch
from released import golden_arrays, load, worst
from small_networks import SMALL, awake

from hierarchy_builder.errors import UsageError
from trainer.methods.trajectory_forcing.network import Prediction
from trainer.methods.trajectory_forcing.sample import sample_levels
from trainer.seeds import level_noise


@pytest.mark.parametrize("num_steps", [1, 4])
def test_samples_match_the_release(golden, num_steps):
    arrays = golden_arrays(golden / f"sample_{num_steps}step.npz")
    levels = sample_levels(load(golden), arrays["y"], arrays["noise"], num_steps)
    assert worst(levels, arrays["levels"]) < 1e-4


def gaussian_flow(deviation: float):
    """The exact average velocity of data N(0, deviation²), as a network."""

    def model(z, *, t, r, heads="uv", **conditions):
        sigma_t = ((1 - t) ** 2 * deviation**2 + t**2).sqrt()
        sigma_r = ((1 - r) ** 2 * deviation**2 + r**2).sqrt()
        return Prediction(None, z * ((1 - sigma_r / sigma_t) / (t - r))[:, None, None, None], None)

    model.config = SimpleNamespace(grid=(2, 2), in_channels=3, num_levels=4, num_classes=5)
    return model


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_exact_flow_lands_on_the_data_in_any_number_of_steps(num_steps):
    noise = torch.randn(4, 3, 2, 2, 3, dtype=torch.float64)
    levels = sample_levels(gaussian_flow(0.3), torch.zeros(3, dtype=torch.long), noise, num_steps)
    torch.testing.assert_close(levels, 0.3 * noise.transpose(0, 1))


def test_image_depends_on_its_own_seed_and_label_only():
    model = awake()
    seeds, label = [5, 6, 7, 8], torch.tensor([0, 1, 2, 7])
    together = sample_levels(model, label, level_noise(seeds, 4, SMALL.grid, 6), 2)
    for i in (0, 3):
        alone = sample_levels(model, label[i : i + 1], level_noise(seeds[i : i + 1], 4, SMALL.grid, 6), 2)
        # Matrix kernels may differ with the batch, by rounding only.
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-4)
    assert torch.equal(level_noise([6], 4, SMALL.grid, 6), level_noise(seeds, 4, SMALL.grid, 6)[:, 1:2])


@pytest.mark.parametrize("start_level", [1, 3])
def test_resuming_repeats_the_rest_of_the_trajectory(start_level):
    model, label, noise = awake(), torch.tensor([3, 4]), level_noise([1, 2], 4, SMALL.grid, 6)
    whole = sample_levels(model, label, noise)
    previous = whole[:, start_level - 1]
    rest = sample_levels(model, label, noise, start_level=start_level, previous=previous)
    assert torch.equal(rest, whole[:, start_level:])
    changed = sample_levels(model, label, noise, start_level=start_level, previous=previous + 1)
    assert not torch.allclose(changed, rest)


def test_autoguidance_moves_away_from_the_weak_network():
    model, weak = awake(seed=0), awake(seed=1)
    label, noise = torch.tensor([3]), level_noise([1], 4, SMALL.grid, 6)
    plain, bad = sample_levels(model, label, noise)[:, 0], sample_levels(weak, label, noise)[:, 0]
    guided = sample_levels(model, label, noise, weak_model=weak, weak_scale=0.5)[:, 0]
    torch.testing.assert_close(guided, plain + 0.5 * (plain - bad), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": torch.tensor([0, 8])}, "label 0 to 8, expected 0 to 6, or 7 for no class"),
        ({"label": torch.tensor([-1, 2])}, "label -1 to 2"),
        ({"noise": torch.zeros(3, 2, 3, 5, 6)}, r"noise has shape \(3, 2, 3, 5, 6\)"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"start_level": 4, "previous": torch.zeros(2, 3, 5, 6)}, "start_level is 4"),
        ({"start_level": 1}, "start_level 1 with previous missing"),
        ({"previous": torch.zeros(2, 3, 5, 6)}, "start_level 0 with previous given"),
        ({"guidance": (2.0, 0.0, 1.0)}, "trained without it"),
    ],
)
def test_misfits_are_errors(changes, message):
    given = {"label": torch.tensor([0, 1]), "noise": torch.zeros(4, 2, 3, 5, 6)} | changes
    with pytest.raises(UsageError, match=message):
        sample_levels(awake(), **given)


def test_seeds_that_would_coincide_are_refused():
    with pytest.raises(UsageError, match="seed 4294967296, expected 0 to 4294967295"):
        level_noise([2**32], 4, (2, 2), 3)
