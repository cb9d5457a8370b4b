"""Chains of noisy states: their posterior, their times, their covariance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given as with_values
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from hierarchy_builder.errors import UsageError
from trainer.methods.normalizing_trajectory import chains


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=200, deadline=None)
@with_values(st.floats(1e-3, 0.98), st.floats(1e-3, 1.0))
def test_posterior_leaves_the_marginals_of_the_chain(s: float, gap: float) -> None:
    t = torch.tensor(s + gap * (1 - s), dtype=torch.float64)
    s_ = torch.tensor(s, dtype=torch.float64)
    a, b, c = chains.posterior(t, s_)
    assert float(a * (1 - t) + b) == pytest.approx(1 - s, abs=1e-12)
    assert float(a.square() * t.square() + c.square()) == pytest.approx(s * s, rel=1e-9)


def test_posterior_of_the_papers_grid() -> None:
    times = torch.tensor([1.000, 0.754, 0.509, 0.263, 0.020], dtype=torch.float64)
    found = torch.stack(chains.posterior(times[:-1], times[1:]), dim=1)
    expected = torch.tensor(
        [
            [0.0, 0.2460, 0.7540],
            [0.2283, 0.4348, 0.4790],
            [0.1779, 0.6497, 0.2469],
            [0.0043, 0.9768, 0.0200],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(found, expected, atol=6e-5, rtol=0)


@pytest.mark.parametrize(
    ("num_tokens", "num_steps", "expected"),
    [
        (256, 4, [0.3547, 0.6225, 0.8318, 1.0]),
        (256, 8, [0.1906, 0.3547, 0.4973, 0.6225, 0.7332, 0.8318, 0.9203, 1.0]),
        (1024, 4, [0.3849, 0.6525, 0.8492, 1.0]),
        (4096, 4, [0.5128, 0.7595, 0.9045, 1.0]),
    ],
)
def test_step_times(num_tokens: int, num_steps: int, expected: list[float]) -> None:
    assert chains.step_times(num_steps, num_tokens).tolist() == pytest.approx(expected, abs=5e-5)


def test_the_last_time_is_one_to_the_last_bit() -> None:
    """There is no transporter at t = 1, and rounding must not bring it back."""
    assert {
        float(chains.step_times(T, N)[-1]) for T in range(1, 33) for N in (1, 6, 256, 300, 1024, 9999)
    } == {1}


def test_t_min_above_the_first_step_is_refused() -> None:
    first = float(chains.step_times(4, 256)[0])
    chains.check_first_step(0.99 * first, 4, 256)
    with pytest.raises(
        UsageError, match=r"t_min is up to 0\.355, the first of 4 steps on 256 tokens is at 0\.355"
    ):
        chains.check_first_step(first, 4, 256)


def test_chain_has_the_covariance_of_proposition_3() -> None:
    times = chains.noise_times(torch.tensor([0.2], dtype=torch.float64), 4, 6).expand(60_000, -1)
    x = torch.full((60_000, 1, 1, 1), 0.7, dtype=torch.float64)
    states = chains.noise_chain(x, times, normal(60_000, 5, 1, 1, 1))[..., 0, 0, 0]
    torch.testing.assert_close(states.mean(dim=0), 0.7 * (1 - times[0]), atol=0.02, rtol=0)
    torch.testing.assert_close(states[:, :4].T.cov(), chains.noise_covariance(times[0]), atol=0.01, rtol=0)
    torch.testing.assert_close(states[:, 4].var(), torch.ones((), dtype=torch.float64), atol=0.02, rtol=0)
