"""What `evaluate --likelihood` holds bits against: independent Gaussians, on the same states of the same images."""

from __future__ import annotations

import math

import fixture_shards
import numpy as np
import pytest
import torch
from documented import undocumented
from torch import Tensor, nn

from hierarchy_builder.canvases import level_canvases
from trainer.data.normalisation import Normaliser, normaliser_of
from trainer.data.reader import ShardReader
from trainer.data.shards import ShardIndex, open_index
from trainer.methods.normalizing_trajectory.chains import noise_covariance, noise_times
from trainer.methods.normalizing_trajectory.config import NormalizingModelConfig
from trainer.methods.normalizing_trajectory.likelihood import _gaussian_chain, likelihood
from trainer.methods.normalizing_trajectory.network import Gaussian, Given
from trainer.methods.normalizing_trajectory.pipeline import NormalizingPipeline


class IndependentGaussians(nn.Module):
    """A network of the chains of independent Gaussians with mean and variance [levels, C]."""

    denoiser = None

    def __init__(self, config: NormalizingModelConfig, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.config = config
        self.moments = nn.Parameter(torch.stack([mean, variance]))

    def transport(self, x: Tensor, t: Tensor, level: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        return x, x.new_zeros(x.shape[:3])

    def predict(self, u: Tensor, t: Tensor, s: Tensor, given: Given, num_steps: int) -> Gaussian:
        level = given.level if len(self.moments[0]) > 1 else torch.zeros_like(given.level)
        mean, variance = self.moments[:, level, None, None]
        s, t = s[:, None, None, None], t[:, None, None, None]
        V_s, V_t = ((1 - time) ** 2 * variance + time**2 for time in (s, t))
        covariance = (1 - s) * (1 - t) * variance + s**2 * (1 - t) / (1 - s)
        law = (1 - s) * mean + covariance / V_t * (u - (1 - t) * mean)
        return Gaussian(law, (0.5 * (V_s - covariance**2 / V_t).log()).expand_as(u))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """3/4 million numbers, so that means over one draw of the noise are expected values to a thousandth."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixture_shards, "GRID", (16, 16))
        patch.setattr(fixture_shards, "WIDTH", 64)
        return open_index(str(fixture_shards.write_shards(tmp_path_factory.mktemp("wide"), 48, 24)))


def moments_of(index: ShardIndex, normaliser: Normaliser) -> tuple[Tensor, Tensor]:
    """Mean and variance of every level's channels, [L, C] each."""
    reader = ShardReader(index)
    rows = reader.read_rows(list(range(index.num_samples)))
    reader.close()
    canvases = level_canvases(normaliser.apply(rows.features.float()), rows.regions)
    return canvases.mean(dim=(0, 2, 3)), canvases.var(dim=(0, 2, 3), correction=0)


@pytest.mark.parametrize(
    ("trajectory", "normalise"), [("tokens", "channel"), ("tokens", "none"), ("canvases", "channel")]
)
def test_a_network_of_independent_gaussians_has_their_bits(
    trajectory: str, normalise: str, index: ShardIndex
) -> None:
    normaliser = normaliser_of(normalise, index)  # type: ignore[arg-type]
    mean, variance = moments_of(index, normaliser)
    if trajectory == "tokens":
        mean, variance = mean[-1:], variance[-1:]
    config = NormalizingModelConfig(
        grid=(16, 16),
        in_channels=64,
        num_classes=3,
        trajectory=trajectory,  # type: ignore[arg-type]
    )
    network = IndependentGaussians(config, mean, variance)
    pipe = NormalizingPipeline(network, normaliser=normaliser)  # type: ignore[arg-type]
    rows = dict(likelihood(pipe, index)[0])
    assert rows["bits_per_dim_gaussian"] == pytest.approx(rows["bits_per_dim"], abs=1e-3)
    # a sum over four transitions, where the other is a mean
    assert rows["bits_per_dim_bound_gaussian"] == pytest.approx(rows["bits_per_dim_bound"], abs=4e-3)
    assert abs(rows["bits_per_dim"] - rows["bits_per_dim_bound"]) > 0.1
    if trajectory == "canvases":
        for level in range(index.num_levels):
            assert rows[f"bits_per_dim_gaussian_level_{level}"] == pytest.approx(
                rows[f"bits_per_dim_level_{level}"], abs=2e-3
            )
    assert undocumented(rows) == []


@pytest.mark.parametrize("variance", [0.0, 0.3, 1.0])
def test_a_chain_of_gaussians_costs_what_its_covariance_says(variance: float) -> None:
    """ln p(x_0 … x_{T−1}) of a joint Gaussian by its determinant; the last state is independent of the others."""
    times = noise_times(torch.tensor([0.02], dtype=torch.float64), 5, 64)
    kept = 1 - times[0, :-1]
    covariance = noise_covariance(times)[0] + variance * kept[:, None] * kept
    moments = np.full((1, 3), variance)
    chain, cleanest = _gaussian_chain(moments, moments, times[0].numpy())
    entropy = 0.5 * (math.log(2 * math.pi * math.e) + torch.linalg.slogdet(covariance)[1] / 5)
    assert chain == pytest.approx([float(entropy)])
    assert cleanest == pytest.approx(0.5 * np.log(2 * np.pi * np.e * covariance[:1, 0].numpy()))


def test_gaussians_of_other_moments_pay_for_the_difference() -> None:
    """−E ln p of data of variance v′ under a joint Gaussian of variance v, by its covariance."""
    times = noise_times(torch.tensor([0.05], dtype=torch.float64), 4, 64)
    kept, noise = 1 - times[0, :-1], noise_covariance(times)[0]
    model, seen = (noise + v * kept[:, None] * kept for v in (1.0, 1.7))
    distribution = torch.distributions.MultivariateNormal(torch.zeros(4, dtype=torch.float64), model)
    expected = -distribution.log_prob(torch.zeros(4)) + 0.5 * torch.trace(torch.linalg.solve(model, seen))
    chain, _ = _gaussian_chain(np.array([[1.7]]), np.array([[1.0]]), times[0].numpy())
    assert chain == pytest.approx([float(expected) / 4])
