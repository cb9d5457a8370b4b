"""Known answers of Normalizing Trajectory Models: transporter, likelihood, score and guidance."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from small_networks import GRID, TINY, C, awake_chain, normal
from torch import Tensor

from hierarchy_builder.errors import MismatchError, UsageError
from trainer.methods.normalizing_trajectory import chains
from trainer.methods.normalizing_trajectory import objective as method
from trainer.methods.normalizing_trajectory.config import NormalizingMethodConfig, NormalizingModelConfig
from trainer.methods.normalizing_trajectory.network import FlowPredictor, Gaussian, Given, NormalizingNetwork
from trainer.methods.normalizing_trajectory.sample import Sampler, num_noises
from trainer.methods.trajectory_forcing.network import TrajectoryTransformer
from trainer.networks.config import ModelConfig
from trainer.seeds import StepRows


def given(batch: int, config: NormalizingModelConfig = TINY, seed: int = 3) -> Given:
    generator = torch.Generator().manual_seed(seed)
    prev = torch.randn(batch, *config.grid, config.in_channels, generator=generator, dtype=torch.float64)
    return Given(torch.arange(batch) % config.num_classes, torch.arange(batch) % config.num_levels, prev)


def chain_of(batch: int, num_steps: int, t_min: float = 0.03, seed: int = 1) -> tuple[Tensor, Tensor]:
    times = chains.noise_times(torch.full((batch,), t_min, dtype=torch.float64), num_steps, 6)
    noise = normal(batch, num_steps + 1, *GRID, C, seed=seed)
    return chains.noise_chain(normal(batch, *GRID, C, seed=seed + 1), times, noise), times


def chained(states: Tensor, times: Tensor, who: Given) -> method.Chain:
    return method.Chain(states, times, who, chains.noise_covariance(times), 1 - times[:, :-1])


def test_likelihood_of_a_transition_integrates_to_one() -> None:
    """By importance sampling: E_q[p/q] = 1 for q wider than p; the error of the mean is about 0.01."""
    config = dataclasses.replace(TINY, grid=(1, 2), in_channels=1)
    network = awake_chain(config, size=0.1)
    count = 20_000
    x, last = 2.5 * normal(count, 1, 1, 2, 1), normal(1, 1, 1, 2, 1).expand(count, -1, -1, -1, -1)
    times = torch.tensor([[0.3, 0.7]], dtype=torch.float64).expand(count, -1)
    here = Given(torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64), x[:, 0])
    with torch.no_grad():
        nats = (
            method.transitions(network, torch.cat([x, last], dim=1), times, here, 4).nats().sum(dim=(1, 2, 3))
        )
    log_q = (-0.5 * (x / 2.5).square() - math.log(2.5) - 0.5 * math.log(2 * math.pi)).sum(dim=(1, 2, 3, 4))
    assert float((-nats - log_q).exp().mean()) == pytest.approx(1.0, abs=0.05)


# Likelihood


def test_likelihood_does_not_depend_on_the_batch() -> None:
    network = awake_chain()
    states, times = chain_of(4, 4)
    who = given(4)
    together = method.transitions(network, states, times, who, 4).nats()
    alone = [
        method.transitions(
            network, states[i : i + 1], times[i : i + 1], Given(*(p[i : i + 1] for p in who)), 4
        )
        for i in range(4)
    ]
    torch.testing.assert_close(together, torch.cat([part.nats() for part in alone]), rtol=1e-10, atol=1e-10)


def test_pairs_add_up_to_the_trajectory() -> None:
    network = awake_chain()
    states, times = chain_of(4, 4)
    whole = method.loss(network, states, times, given(4), num_steps=4)
    pairs = [
        method.loss(network, states, times, given(4), num_steps=4, pair=torch.full((4,), k)) for k in range(4)
    ]
    for name in ("loss", "fit", "log_sigma", "log_det"):
        torch.testing.assert_close(sum(p[name] for p in pairs) / 4, whole[name], rtol=1e-9, atol=1e-9)


class Linear:
    """A model without network: identity transporter, and the exact law of the chain for data N(0, s²)."""

    def __init__(self, data_std: float) -> None:
        self.variance = data_std**2

    def transport(self, x: Tensor, t: Tensor, level: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        return x, torch.zeros_like(x[..., 0])

    def predict(self, u: Tensor, t: Tensor, s: Tensor, given: Given, num_steps: int) -> Gaussian:
        t, s = t[:, None, None, None], s[:, None, None, None]
        at_t, at_s = (v * v + (1 - v) ** 2 * self.variance for v in (t, s))
        between = (1 - t) / (1 - s) * at_s  # covariance of x_s and x_t
        variance = at_s - between.square() / at_t
        return Gaussian(between / at_t * u, (0.5 * variance.log()).expand_as(u))


def test_gaussian_data_reach_the_entropy_of_the_trajectory() -> None:
    """Entropy of states 0 … T−1 given state T, from the covariance of the whole chain."""
    s, count = 1.7, 4_000
    times = chains.noise_times(torch.full((count,), 0.03, dtype=torch.float64), 4, 6)
    x = s * normal(count, *GRID, C, seed=5)
    states = chains.noise_chain(x, times, normal(count, 5, *GRID, C, seed=6))
    nats = method.transitions(Linear(s), states, times, given(count), 4).nats().sum(dim=(1, 2, 3)) / (6 * C)
    scale = 1 - times[0, :-1]
    covariance = chains.noise_covariance(times[0]) + s * s * torch.outer(scale, scale)
    entropy = 0.5 * torch.logdet(2 * math.pi * math.e * covariance)
    assert float(nats.mean()) == pytest.approx(float(entropy), abs=0.02)
    assert float(method.loss(Linear(s), states, times, given(count), num_steps=4)["loss"]) == pytest.approx(
        float(nats.mean()), rel=1e-9
    )


def test_the_bound_is_tight_for_the_exact_law() -> None:
    """−log p(chain) less the entropy of the noise is, on average, the entropy of the cleanest state."""
    s, t, count = 1.7, 0.03, 4_000
    times = chains.noise_times(torch.full((count,), t, dtype=torch.float64), 4, 6)
    states = chains.noise_chain(
        s * normal(count, *GRID, C, seed=5), times, normal(count, 5, *GRID, C, seed=6)
    )
    nats = method.transitions(Linear(s), states, times, given(count), 4).nats().sum(dim=(1, 2, 3))
    last = (0.5 * states[:, -1].square() + method.HALF_LOG_2PI).sum(dim=(1, 2, 3))
    bound = (nats + last) / (6 * C) - chains.chain_entropy(times)
    entropy = 0.5 * math.log(2 * math.pi * math.e * ((1 - t) ** 2 * s**2 + t**2))
    assert float(bound.mean()) == pytest.approx(entropy, abs=0.01)


def test_a_trained_network_comes_near_the_entropy_of_gaussian_data() -> None:
    torch.manual_seed(0)
    network = NormalizingNetwork(
        dataclasses.replace(TINY, grid=(1, 2), in_channels=1, depth=1, flow_depth=1, num_class_tokens=0)
    )
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-2)
    s, history = 2.0, []
    for step in range(80):
        times = chains.noise_times(torch.full((128,), 0.05), 4, 256)
        generator = torch.Generator().manual_seed(step)
        x = s * torch.randn(128, 1, 2, 1, generator=generator)
        states = chains.noise_chain(x, times, torch.randn(128, 5, 1, 2, 1, generator=generator))
        who = Given(torch.zeros(128, dtype=torch.int64), torch.zeros(128, dtype=torch.int64), x)
        terms = method.loss(network, states, times, who, num_steps=4)
        optimiser.zero_grad()
        terms["loss"].backward()
        optimiser.step()
        history.append(float(terms["loss"].detach()))
    scale = (1 - times[0, :-1]).double()
    covariance = chains.noise_covariance(times[0].double()) + s * s * torch.outer(scale, scale)
    entropy = float(0.5 * torch.logdet(2 * math.pi * math.e * covariance))
    assert sum(history[-20:]) / 20 == pytest.approx(entropy, abs=0.12)
    assert history[0] > entropy + 0.5


# Score, guidance, flow matching


@pytest.mark.parametrize("num_steps", [1, 4, 8])
def test_the_score_returns_the_posterior_mean_at_every_state(num_steps: int) -> None:
    s, T = 1.7, num_steps
    states, times = chain_of(3, T, t_min=0.04)
    found = method.denoised(Linear(s), chained(states, times, given(3)), T)
    t = times[:, :1, None, None, None]
    expected = (1 - t) * s**2 / ((1 - t) ** 2 * s**2 + t**2) * states[:, :1]
    torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-7, atol=1e-9)


def test_scores_of_many_images_are_those_of_each() -> None:
    """They are taken some states at a time, for their memory."""
    network, (states, times) = awake_chain(), chain_of(9, 4)
    assert 2 * method.SCORED_TOGETHER < 9 * 4
    found = method.denoised(network, chained(states, times, given(9)), 4)
    for row in range(9):
        who = Given(*(part[row : row + 1] for part in given(9)))
        alone = method.denoised(network, chained(states[row : row + 1], times[row : row + 1], who), 4)
        torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-9, atol=1e-9)


def test_guidance_is_the_normalised_product_of_gaussians() -> None:
    law = Gaussian(torch.tensor([0.3, -1.0]).double(), torch.tensor([-0.7, -0.2]).double())
    null = Gaussian(torch.tensor([0.1, 0.4]).double(), torch.tensor([0.1, 0.0]).double())
    w = 1.5
    found = method.guided(law, null, w)
    precision = (1 + w) * torch.exp(-2 * law.log_sigma) - w * torch.exp(-2 * null.log_sigma)
    mean = (
        (1 + w) * law.mean * torch.exp(-2 * law.log_sigma) - w * null.mean * torch.exp(-2 * null.log_sigma)
    ) / precision
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.log_sigma, -0.5 * precision.log())
    wide = method.guided(null, law, w)  # the share is clipped, so the deviation never grows
    assert bool((wide.log_sigma <= null.log_sigma + 1e-12).all())


def flow_config() -> NormalizingModelConfig:
    backbone = ModelConfig(
        grid=GRID,
        in_channels=C,
        num_classes=3,
        width=16,
        depth=2,
        head_depth=1,
        num_heads=2,
        num_class_tokens=1,
        num_time_tokens=1,
        num_level_tokens=1,
    )
    return dataclasses.replace(TINY, trajectory="canvases", backbone=backbone)


def test_a_flow_matching_network_starts_as_its_posterior_sampler() -> None:
    torch.manual_seed(0)
    config = flow_config()
    network = NormalizingNetwork(config)
    flow = network.predictor.backbone
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.2 * torch.randn_like(p))
    states, times = chain_of(3, 4)
    states, times, who = states.float(), times.float(), given(3, config)
    who = who._replace(prev=who.prev.float())
    t, s = times[:, 2], times[:, 1]
    with torch.no_grad():
        law = network.predict(states[:, 2], t, s, who, 4)
        v = flow(states[:, 2], t=t, r=t, heads="v", **who._asdict()).v
    a, b, c = (value[:, None, None, None] for value in chains.posterior(t, s))
    clean = states[:, 2] - t[:, None, None, None] * v
    torch.testing.assert_close(law.mean, a * states[:, 2] + b * clean)
    torch.testing.assert_close(law.log_sigma.exp(), c.expand_as(law.mean))
    assert float(v.abs().mean()) > 0.1
    assert isinstance(flow, TrajectoryTransformer)


def test_the_pull_of_the_flow_is_nothing_before_training() -> None:
    network = NormalizingNetwork(flow_config())
    states, times = (part.float() for part in chain_of(3, 4))
    who = given(3, flow_config())
    who = who._replace(prev=who.prev.float())
    flow = network.predictor
    assert isinstance(flow, FlowPredictor)
    terms = method.loss(network, states, times, who, num_steps=4, flow=flow, flow_weight=2.5)
    assert float(terms["flow"].detach()) == pytest.approx(0.0, abs=1e-10)
    with torch.no_grad():
        network.transporter.blocks[0].out.bias += 0.5
    moved = method.loss(network, states, times, who, num_steps=4, flow=flow, flow_weight=2.5)
    assert float(moved["flow"].detach()) > 1e-4
    assert float((moved["loss"] - moved["bits"] * math.log(2)).detach()) == pytest.approx(
        2.5 * float(moved["flow"].detach()), rel=1e-3
    )


# Sampling


def test_samples_of_the_exact_law_have_the_spread_of_the_data() -> None:
    """Ancestral sampling of Gaussian data ends at N(0, (1−t)²s² + t²)."""
    count, s = 4_000, 1.7
    times = chains.noise_times(torch.full((count,), 0.02, dtype=torch.float64), 4, 6)
    sampler = Sampler(network=Linear(s), method=NormalizingMethodConfig(), num_steps=4)  # type: ignore[arg-type]
    states = sampler.states(times, given(count), normal(5, count, *GRID, C))
    expected = math.sqrt((0.98 * s) ** 2 + 0.02**2)
    assert float(states[:, 0].std()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("trajectory", ["tokens", "canvases", "levels"])
@pytest.mark.parametrize("ending", ["inverse", "score", "denoiser"])
def test_sampling_with_every_ending(trajectory: str, ending: str) -> None:
    config = dataclasses.replace(TINY, trajectory=trajectory, denoiser_depth=1, num_steps=(4,), num_levels=4)
    network = awake_chain(config, size=0.1).float()
    sampler = Sampler(
        network=network,
        method=NormalizingMethodConfig(),
        num_steps=4,
        ending=ending,  # type: ignore[arg-type]
        guidance=1.0,
    )
    label = torch.tensor([0, 2])
    noise = normal(num_noises(network, 4), 2, *GRID, C).float()
    if (trajectory, ending) == ("levels", "inverse"):
        with pytest.raises(UsageError, match="leaves the noise of a level in"):
            sampler.canvases(label, noise)
        return
    found = sampler.canvases(label, noise)
    assert found.shape == (2, 1 if trajectory == "tokens" else 4, *GRID, C)
    assert bool(found.isfinite().all())
    if trajectory != "tokens":
        resumed = sampler.canvases(label, noise, start_level=2, previous=found[:, 1])
        assert torch.equal(resumed, found[:, 2:])


def test_guidance_without_label_dropout_is_refused() -> None:
    method = NormalizingMethodConfig(label_dropout=0.0)
    sampler = Sampler(network=NormalizingNetwork(TINY), method=method, num_steps=4, guidance=1.0)
    with pytest.raises(UsageError, match="without label dropout"):
        sampler.canvases(torch.tensor([0]), normal(5, 1, *GRID, C).float())


def test_other_numbers_of_transitions_are_refused() -> None:
    network = NormalizingNetwork(dataclasses.replace(TINY, num_steps=(4, 8)))
    sampler = Sampler(network=network, method=NormalizingMethodConfig(), num_steps=16)
    with pytest.raises(MismatchError, match=r"16 transitions.*4 or 8"):
        sampler.canvases(torch.tensor([0]), normal(17, 1, *GRID, C).float())


def test_draws_do_not_depend_on_the_split_of_the_batch() -> None:
    whole, *halves = (
        method.draw_batch(
            StepRows(batch_size=6, seed=3, step=9, rows=rows),
            (2, 2, 1),
            NormalizingMethodConfig(pairs="one"),
            (4, 8),
        )
        for rows in (slice(None), slice(0, 3), slice(3, 6))
    )
    assert {half.num_steps for half in halves} == {whole.num_steps}
    for name in ("t_min", "noise", "pair", "drop_label"):
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(whole, name))
