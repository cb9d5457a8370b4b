"""The Gaussian start of a network: its closed form, what it is fitted to, and what an untrained network draws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.methods.trajectory_forcing import objective
from trainer.methods.trajectory_forcing.network import TrajectoryTransformer
from trainer.methods.trajectory_forcing.sample import sample_levels
from trainer.networks.config import ModelConfig
from trainer.networks.gaussian_start import LEAST_DEVIATION, GaussianStart

GRID, CHANNELS, CLASSES, LEVELS = (4, 6), 3, 2, 3
B = 5
ROUNDING = {"atol": 1e-5, "rtol": 1e-5}
"""The tensors of a start are stored in float32."""


@pytest.fixture
def start() -> GaussianStart:
    """A start with means and deviations between 0.1 and 3, float64."""
    generator = torch.Generator().manual_seed(0)
    start = GaussianStart(GRID, CHANNELS, CLASSES, LEVELS).double()
    places = GRID[0] * GRID[1]
    start.axes.data, start.places.data = (
        torch.linalg.qr(torch.randn(LEVELS, n, n, generator=generator, dtype=torch.float64)).Q
        for n in (CHANNELS, places)
    )
    start.deviation.data.uniform_(0.1, 3.0, generator=generator)
    start.steps.data.normal_(generator=generator)
    return start


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    prev = torch.randn(B, *GRID, CHANNELS, generator=generator, dtype=torch.float64)
    return {"label": torch.arange(B) % (CLASSES + 1), "level": torch.arange(B) % LEVELS, "prev": prev}


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def times(value: float) -> Tensor:
    return torch.full((B,), value, dtype=torch.float64)


def velocity(start: GaussianStart, z: Tensor, t: Tensor, r: Tensor, **inputs: Tensor) -> Tensor:
    """u of the start alone."""
    return start.velocity(start.see(z, t=t, **inputs), r, torch.zeros_like(z))


def test_one_step_lands_where_many_small_steps_of_the_instantaneous_velocity_lead(
    start: GaussianStart, inputs: dict[str, Tensor]
) -> None:
    z, n = noise(B, *GRID, CHANNELS), 1_000
    one_step = z - 0.9 * velocity(start, z, times(1.0), times(0.1), **inputs)
    for i in range(n):
        here, middle = times(1.0 - 0.9 * i / n), times(1.0 - 0.9 * (i + 0.5) / n)
        half = z - 0.45 / n * velocity(start, z, here, here, **inputs)
        z = z - 0.9 / n * velocity(start, half, middle, middle, **inputs)
    torch.testing.assert_close(one_step, z, atol=1e-5, rtol=1e-5)


def test_the_network_sees_where_one_step_to_clean_canvases_lands(
    start: GaussianStart, inputs: dict[str, Tensor]
) -> None:
    z, t = noise(B, *GRID, CHANNELS), times(0.7)
    landed = z - 0.7 * velocity(start, z, t, times(0.0), **inputs)
    torch.testing.assert_close(start.drawn(start.see(z, t=t, **inputs)), landed, **ROUNDING)


def test_average_velocity_fulfils_the_identity_of_mean_flow(
    start: GaussianStart, inputs: dict[str, Tensor]
) -> None:
    z, t, r = noise(B, *GRID, CHANNELS), times(0.8), times(0.3)
    v = velocity(start, z, t, t, **inputs)
    u, derivative = torch.func.jvp(
        lambda z, t: velocity(start, z, t, r, **inputs), (z, t), (v, torch.ones_like(t))
    )
    torch.testing.assert_close(u, v - 0.5 * derivative, **ROUNDING)


def test_velocity_of_no_deviation_leads_to_the_mean(start: GaussianStart, inputs: dict[str, Tensor]) -> None:
    start.deviation.data.zero_()
    start.steps.data.zero_()
    z, t = noise(B, *GRID, CHANNELS), times(0.6)
    for r in (0.0, 0.2, 0.6):
        torch.testing.assert_close(
            velocity(start, z, t, times(r), **inputs), (z - inputs["prev"]) / 0.6, **ROUNDING
        )


def correlated(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Canvases [n, L, H, W, C] whose class decides their colour, with one random colour for the whole of level 0."""
    label = torch.randint(0, CLASSES, (n,), generator=generator)
    colour = 3.0 * label[:, None] + torch.randn(n, CHANNELS, generator=generator)
    coarse = colour[:, None, None].expand(-1, *GRID, -1)
    fine = coarse + 0.5 * torch.randn(n, *GRID, CHANNELS, generator=generator)
    return torch.stack([coarse, fine, fine], dim=1), label


def network() -> TrajectoryTransformer:
    torch.manual_seed(0)
    sizes = {"width": 16, "depth": 2, "head_depth": 1, "num_heads": 2}
    shape = {"grid": GRID, "in_channels": CHANNELS, "num_classes": CLASSES, "num_levels": LEVELS}
    return TrajectoryTransformer(ModelConfig(start="gaussian", **sizes, **shape))  # type: ignore[arg-type]


def test_untrained_network_draws_means_spectrum_and_levels_of_the_data() -> None:
    model, generator = network(), torch.Generator().manual_seed(3)
    assert model.start is not None
    examples = [correlated(100, generator) for _ in range(20)]
    model.start.fit(lambda: examples, 1.0)
    for label in range(CLASSES):
        noise = torch.randn(LEVELS, 2_000, *GRID, CHANNELS, generator=generator)
        coarse, fine, _ = sample_levels(model, torch.full((2_000,), label), noise).unbind(dim=1)
        torch.testing.assert_close(coarse.mean(), torch.tensor(3.0 * label), atol=0.1, rtol=0)
        # Level 0 has one colour in the whole canvas, of variance 1; level 1 adds 0.25 to each token.
        assert coarse.mean(dim=(1, 2)).var() == pytest.approx(1.0, rel=0.1)
        assert coarse.var(dim=(1, 2)).mean() < 0.02
        assert (fine - coarse).var() == pytest.approx(0.25, rel=0.1)


def test_channels_that_vary_together_do_so_in_samples() -> None:
    generator = torch.Generator().manual_seed(7)
    grey = torch.randn(2_000, LEVELS, *GRID, 1, generator=generator).cumsum(dim=1)
    canvases = grey * torch.tensor([1.0, 2.0, -1.0])
    model = network()
    assert model.start is not None
    model.start.fit(lambda: [(canvases, torch.zeros(2_000, dtype=torch.int64))], 1.0)
    noise = torch.randn(LEVELS, 2_000, *GRID, CHANNELS, generator=generator)
    drawn = sample_levels(model, torch.zeros(2_000, dtype=torch.int64), noise)[:, 0].flatten(0, 2)
    torch.testing.assert_close(drawn.T.cov(), canvases[:, 0].flatten(0, 2).T.cov(), atol=0.1, rtol=0.05)


def test_class_without_examples_gets_the_mean_of_all() -> None:
    start = GaussianStart(GRID, CHANNELS, 3, LEVELS)
    examples = [correlated(200, torch.Generator().manual_seed(4))]
    start.fit(lambda: examples, 1.0)
    torch.testing.assert_close(start.steps[2:], torch.zeros_like(start.steps[2:]))
    means = start.mean[0] + start.places[0, :, : start.steps.shape[2]] @ start.steps[:, 0]
    torch.testing.assert_close(means.mean(dim=(1, 2)), torch.tensor([0.0, 3.0, 1.5, 1.5]), atol=0.3, rtol=0)


def test_classes_that_differ_by_chance_share_a_mean() -> None:
    generator = torch.Generator().manual_seed(5)
    canvases = torch.randn(400, LEVELS, *GRID, CHANNELS, generator=generator)
    start = GaussianStart(GRID, CHANNELS, 100, LEVELS)
    start.fit(lambda: [(canvases, torch.arange(400) % 100)], 1.0)
    # A class of 4 examples has means of deviation 1/2 by chance; little of that is kept.
    assert start.steps[:100].std() < 0.2


def test_places_that_never_vary_are_drawn_without_noise() -> None:
    generator = torch.Generator().manual_seed(8)
    canvases = torch.zeros(500, LEVELS, *GRID, CHANNELS)
    canvases[..., 1:3, 2:4, :] = torch.randn(500, 1, 2, 2, CHANNELS, generator=generator)
    model = network()
    assert model.start is not None
    model.start.fit(lambda: [(canvases, torch.zeros(500, dtype=torch.int64))], 1.0)
    noise = torch.randn(LEVELS, 500, *GRID, CHANNELS, generator=generator)
    deviation = sample_levels(model, torch.zeros(500, dtype=torch.int64), noise)[:, 0].std(dim=(0, -1))
    assert deviation[1:3, 2:4].min() > 0.9
    deviation[1:3, 2:4] = 0
    assert deviation.max() <= 1.1 * LEAST_DEVIATION
    # What the network adds there is small as well.
    spread = model.start.spread[0].unflatten(0, GRID)
    assert spread[1:3, 2:4].min() > 0.9
    assert spread[0].max() == pytest.approx(LEAST_DEVIATION)


def test_loss_is_that_of_the_network_plus_the_start() -> None:
    model, generator = network(), torch.Generator().manual_seed(6)
    assert model.start is not None
    canvases, label = correlated(8, generator)
    model.start.fit(lambda: [(canvases, label)], 0.5)
    torch.nn.init.normal_(model.u_out.weight, std=0.1)
    t, r = torch.linspace(0.3, 1.0, 8), torch.linspace(0.0, 0.9, 8)
    r = torch.minimum(t, r)
    noise = torch.randn(8, *GRID, CHANNELS, generator=generator)
    common = {
        "prev": canvases[:, 0],
        "level": torch.ones(8, dtype=torch.int64),
        "label": label,
        "regions": None,
    }
    fast = objective.loss(model, canvases[:, 1], t=t, r=r, noise=noise, **common)

    class Opaque:
        """The same network without its own forward derivative."""

        config = model.config

        def __call__(self, z: Tensor, **inputs: Tensor) -> object:
            return model(z, **inputs)

    plain = objective.loss(Opaque(), canvases[:, 1], t=t, r=r, noise=noise, **common)
    for name, value in fast.items():
        torch.testing.assert_close(value, plain[name], msg=name)
