"""The transporter alone: identity at first, inverse, determinant, bounds."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from small_networks import GRID, TINY, C, awake_chain, normal

from trainer.methods.normalizing_trajectory.network import NormalizingNetwork
from trainer.methods.normalizing_trajectory.transporter import bounded


def test_a_fresh_transporter_is_the_identity() -> None:
    torch.manual_seed(0)
    network = NormalizingNetwork(TINY).double()
    x, t = normal(3, *GRID, C), torch.full((3,), 0.3, dtype=torch.float64)
    u, log_det = network.transport(x, t, torch.zeros(3, dtype=torch.int64), 4)
    assert torch.equal(u, x)
    assert torch.count_nonzero(log_det) == 0


@pytest.mark.parametrize("flow_blocks", [1, 2, 3])
def test_transporter_is_inverted_with_cached_keys(flow_blocks: int) -> None:
    network = awake_chain(dataclasses.replace(TINY, flow_blocks=flow_blocks)).float()
    x, t = normal(5, *GRID, C).float(), torch.linspace(0.05, 0.9, 5)
    level = torch.zeros(5, dtype=torch.int64)
    with torch.no_grad():
        u, _ = network.transport(x, t, level, 4)
    assert float((u - x).abs().mean()) > 0.1
    torch.testing.assert_close(network.untransport(u, t, level, 4), x, atol=1e-5, rtol=1e-5)


def test_cached_inverse_equals_the_slow_one() -> None:
    network = awake_chain()
    block = network.transporter.blocks[1]
    u, condition = normal(2, 6, C), normal(2, 16)
    x = torch.zeros_like(u)
    for _ in range(6):  # each pass of the parallel map puts one more token right
        mean, log_scale = block._affine(x.flip(1), condition)
        x = (u.flip(1) * log_scale.exp() + mean).flip(1)
    with torch.no_grad():
        torch.testing.assert_close(block.inverse(u, condition), x, atol=1e-12, rtol=1e-12)


def test_log_determinant_is_that_of_the_jacobian() -> None:
    network = awake_chain()
    x, t = normal(1, *GRID, C), torch.tensor([0.4], dtype=torch.float64)
    level = torch.zeros(1, dtype=torch.int64)
    jacobian = torch.autograd.functional.jacobian(lambda x: network.transport(x, t, level, 4)[0], x)
    found = network.transport(x, t, level, 4)[1].sum()
    size = x.numel()
    torch.testing.assert_close(found, torch.linalg.slogdet(jacobian.reshape(size, size)).logabsdet)


@pytest.mark.parametrize("highest", [0.5, 1.0, 4.0])
def test_no_weights_make_the_inverse_stretch_further_than_the_bound(highest: float) -> None:
    """Not even such that all scales stand at their bounds, as far from training as can be."""
    config = dataclasses.replace(TINY, flow_max_log_scale=highest)
    network = awake_chain(config, size=100.0)
    condition, u = normal(4, 16, seed=7), 100 * normal(4, 6, C)
    with torch.no_grad():
        for block in network.transporter.blocks:
            x = block._ordered(block.inverse(u, condition))
            mean, log_scale = block._affine(x, condition)
            assert -4 <= float(log_scale.min()) < -3.9
            assert 0.99 * highest < float(log_scale.max()) <= highest
            stretched = (x - mean).abs() / block._ordered(u).abs()
            assert float(stretched.max()) <= math.exp(highest) * (1 + 1e-9)


def test_a_scale_near_one_is_what_the_network_says() -> None:
    a = torch.linspace(-0.02, 0.02, 41, dtype=torch.float64, requires_grad=True)
    found = bounded(a, 0.5)
    (slope,) = torch.autograd.grad(found.sum(), a)
    torch.testing.assert_close(found, a, atol=2e-5, rtol=0)
    torch.testing.assert_close(slope, torch.ones_like(a), atol=2e-3, rtol=0)
