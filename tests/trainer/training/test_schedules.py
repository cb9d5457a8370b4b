"""The laws of time, against quantiles of two million draws of the release, and the decay of averages."""

import numpy as np
import pytest
import torch
from released import GOLDEN

from trainer.training.schedules import ema_beta, learning_rate, logit_normal, plateau_logit_normal


@pytest.mark.parametrize(
    ("key", "draw", "law"),
    [
        ("plateau_a10_m0_s1", plateau_logit_normal, (0.0, 1.0, 10.0)),
        ("plateau_a1_m-0.4_s1", plateau_logit_normal, (-0.4, 1.0, 1.0)),
        ("shifted_a10_m0_s1", logit_normal, (0.0, 1.0, 10.0)),
    ],
)
def test_quantiles_match_the_release(key, draw, law):
    golden = np.load(GOLDEN / "schedules.npz")
    n = 1_000_000
    values = np.sort(draw(n, *law, generator=torch.Generator().manual_seed(0)).numpy())
    levels = golden["quantile_levels"]
    found = np.searchsorted(values, golden[key]) / n
    # Standard error of an empirical level at 1 and 2 million draws, 5 sigma over 100 correlated levels.
    allowed = 5 * np.sqrt(levels * (1 - levels) * (1 / n + 1 / 2e6)) + 1e-6
    assert (np.abs(found - levels) <= allowed).all()


def test_plateau_starts_where_the_method_says():
    t = plateau_logit_normal(400_000, 0.0, 1.0, 10.0, torch.Generator().manual_seed(1))
    assert 0 <= float(t.min()) <= float(t.max()) <= 1
    # 75.2 % of the mass lies below the mode 0.9618; the standard error of the share is 0.0007.
    assert float((t < 0.9618).float().mean()) == pytest.approx(0.752, abs=0.003)
    flat = t[t > 0.9618]
    assert float(flat.mean()) == pytest.approx((0.9618 + 1) / 2, abs=3e-4)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.05), (0.0, 2.5), (-8.0, 1.0), (3.0, 3.0)])
def test_extreme_laws_stay_on_the_interval(mean, std):
    t = plateau_logit_normal(10_000, mean, std, 1.0, torch.Generator().manual_seed(0))
    assert torch.isfinite(t).all()
    assert 0 <= float(t.min()) < float(t.max()) <= 1


def test_equal_generators_draw_equal_times():
    draws = [plateau_logit_normal(5, 0.0, 1.0, 10.0, torch.Generator().manual_seed(s)) for s in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("halflife", [500, 1000, 2000])
def test_decay_of_averages_matches_the_release(halflife):
    golden = np.load(GOLDEN / "schedules.npz")
    betas = [ema_beta(int(step), halflife) for step in golden["ema_steps"]]
    np.testing.assert_allclose(betas, golden[f"ema_beta_{halflife}"], atol=1e-6)


def test_learning_rate_is_constant_and_then_falls_to_zero() -> None:
    rates = [learning_rate(seen, 100, 0.02, 0.4) for seen in range(0, 101, 10)]
    assert rates[:7] == [0.02] * 7
    assert rates[6:] == pytest.approx([0.02, 0.015, 0.01, 0.005, 0.0])
    assert learning_rate(99, 100, 0.02, 0.0) == 0.02
