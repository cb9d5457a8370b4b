"""The network: shapes, conditioning, forward-mode derivatives, initial weights, errors."""

import dataclasses

import pytest
import torch
from small_networks import SMALL, awake
from torch import nn

from hierarchy_builder.errors import MismatchError, UsageError
from trainer.methods.trajectory_forcing.network import TrajectoryTransformer, velocity
from trainer.networks.attention import attend, grid_rotations, rotate
from trainer.networks.config import ModelConfig


def inputs(config: ModelConfig = SMALL, batch: int = 4, dtype=torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    canvas = (batch, *config.grid, config.in_channels)
    return {
        "z": torch.randn(canvas, generator=g, dtype=dtype),
        "t": torch.tensor([0.9, 0.6, 0.3, 0.01], dtype=dtype)[:batch],
        "r": torch.tensor([0.1, 0.6, 0.0, 0.0], dtype=dtype)[:batch],
        "label": torch.tensor([0, 3, 6, 7])[:batch],
        "level": torch.tensor([0, 1, 2, 3])[:batch],
        "prev": torch.randn(canvas, generator=g, dtype=dtype),
    }


@pytest.mark.parametrize("fusion", ["fused", "concat"])
@pytest.mark.parametrize("guidance", [False, True])
@torch.no_grad()
def test_any_grid_and_every_input_matters(fusion, guidance):
    config = dataclasses.replace(SMALL, fusion=fusion, guidance=guidance)
    model, given = awake(config), inputs(config)
    base = model(**given)
    assert base.x.shape == base.u.shape == base.v.shape == (4, 3, 5, 6)
    changes = {"label": given["label"].flip(0), "level": given["level"].flip(0), "prev": given["prev"] + 1}
    changes |= {"z": given["z"] + 1, "r": given["r"] * 0.5}
    if guidance:
        changes["guidance"] = {"omega": 3.0, "t_min": 0.1, "t_max": torch.full((4,), 0.7)}
    for name, value in changes.items():
        moved = (model(**{**given, name: value}).x - base.x).abs().amax(dim=(1, 2, 3))
        assert (moved > 1e-6).sum() >= 2, name


@torch.no_grad()
def test_time_enters_only_as_its_difference():
    model, given = awake(), inputs()
    shifted = {**given, "t": given["t"] + 0.05, "r": given["r"] + 0.05}
    torch.testing.assert_close(model(**given).x, model(**shifted).x, atol=1e-5, rtol=0)


@torch.no_grad()
def test_network_without_guidance_scale_is_unguided():
    config = dataclasses.replace(SMALL, guidance=True)
    model, given = awake(config), inputs(config)
    torch.testing.assert_close(model(**given), model(**given, guidance=(1.0, 0.0, 1.0)), rtol=0, atol=0)


@torch.no_grad()
def test_one_head_alone_gives_what_both_give():
    model, given = awake(), inputs()
    both, u, v = model(**given), model(**given, heads="u"), model(**given, heads="v")
    assert torch.equal(u.u, both.u)
    assert torch.equal(u.x, both.x)
    assert torch.equal(v.v, both.v)
    assert u.v is None
    assert v.u is None


@torch.no_grad()
def test_prediction_and_velocity_agree_also_near_data():
    given = inputs()
    prediction = awake()(**given)
    torch.testing.assert_close(prediction.u, velocity(given["z"], prediction.x, given["t"]))
    torch.testing.assert_close(prediction.u[3], (given["z"] - prediction.x)[3] / 0.05)


@pytest.mark.parametrize("fusion", ["fused", "concat"])
def test_derivative_agrees_with_finite_differences(fusion):
    config = dataclasses.replace(SMALL, fusion=fusion)
    model, given = awake(config).double(), inputs(config, batch=3, dtype=torch.float64)
    direction = torch.randn_like(given["z"])
    rest = {k: v for k, v in given.items() if k != "z"}
    prediction, du_dt = model.forward_with_derivative(given["z"], direction, **rest)
    eps = 1e-5

    def u_at(step: float) -> torch.Tensor:
        return model(**{**given, "z": given["z"] + step * direction, "t": given["t"] + step}).u

    with torch.no_grad():
        slope = (u_at(eps) - u_at(-eps)) / (2 * eps)
    # Central differences in float64: error about eps² = 1e-10 times third derivatives.
    torch.testing.assert_close(du_dt, slope, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(prediction, model(**given))


def test_derivative_agrees_with_functional_jvp_and_keeps_no_graph():
    model, given = awake(), inputs()
    direction = torch.randn_like(given["z"])
    rest = {k: v for k, v in given.items() if k not in ("z", "t")}
    prediction, du_dt = model.forward_with_derivative(given["z"], direction, t=given["t"], **rest)
    _, expected = torch.func.jvp(
        lambda z, t: model(z, t=t, **rest).u, (given["z"], given["t"]), (direction, torch.ones(4))
    )
    torch.testing.assert_close(du_dt, expected, rtol=1e-5, atol=1e-5)
    assert not du_dt.requires_grad
    assert prediction.u.requires_grad
    assert prediction.v.requires_grad


def test_gradients_do_not_depend_on_the_derivative_being_taken():
    model, given = awake(), inputs()
    rest = {k: v for k, v in given.items() if k != "z"}
    plain = model(**given)
    derived, _ = model.forward_with_derivative(given["z"], torch.randn_like(given["z"]), **rest)
    for prediction in (plain, derived):
        (prediction.u.square().sum() + prediction.v.square().sum()).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        if prediction is plain:
            expected = gradients
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)


def test_attention_tangent_matches_explicit_softmax():
    g = torch.Generator().manual_seed(0)
    values = [torch.randn(2, 3, 7, 4, generator=g, dtype=torch.float64) for _ in range(6)]

    def explicit(q, k, v):
        return torch.softmax(q @ k.mT / 2, dim=-1) @ v

    found = torch.func.jvp(attend, tuple(values[:3]), tuple(values[3:]))
    torch.testing.assert_close(found, torch.func.jvp(explicit, tuple(values[:3]), tuple(values[3:])))


def test_attention_tangent_in_bfloat16_keeps_what_does_not_cancel() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v, dq, dk, dv = (torch.randn(1, 2, 64, 16, generator=g) for _ in range(6))
    v, dk = (x + 3 * torch.randn(1, 1, 1, 16, generator=g) for x in (v, dk))  # a part that all keys share
    rounded = [x.bfloat16() for x in (q, k, v, dq, dk, dv)]

    def tangent(dtype: torch.dtype) -> torch.Tensor:
        inputs = [x.to(dtype) for x in rounded]
        return torch.func.jvp(attend, tuple(inputs[:3]), tuple(inputs[3:]))[1].double()

    exact = tangent(torch.float64)
    assert (tangent(torch.bfloat16) - exact).norm() < 0.015 * exact.norm()


def test_rotations_make_scores_depend_on_offsets_only():
    rotations = grid_rotations(4, 6, 8, 10_000.0)
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 24, 1, 8)
    scores = (rotate(q, rotations[:, None])[0, :, 0] @ rotate(k, rotations[:, None])[0, :, 0].T).view(
        4, 6, 4, 6
    )
    torch.testing.assert_close(scores[0, 1, 2, 3], scores[1, 3, 3, 5])
    assert abs(scores[0, 1, 2, 3] - scores[0, 1, 3, 3]) > 1e-4


def test_initial_weights_follow_the_stated_laws():
    torch.manual_seed(0)
    model = TrajectoryTransformer(dataclasses.replace(SMALL, width=128, grid=(8, 8)))
    block = model.shared_blocks[0]
    for layer, deviation in (
        (block.attention.q, 0.32 / 128**0.5),
        (block.mlp.w2, 0.32 / 341**0.5),
        (model.fusion, 1 / 256**0.5),
        (model.time_embedder.out, 1 / 128**0.5),
    ):
        # 16,384 numbers or more: a relative error of 3 % is over five standard errors.
        assert float(layer.weight.detach().std()) == pytest.approx(deviation, rel=0.03)
    assert float(model.positions.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(model.class_tokens.detach().std()) == pytest.approx(128**-0.5, rel=0.1)
    gates = [block.attention_gate, block.mlp_gate, model.u_out.weight, model.v_out.weight, model.fusion.bias]
    assert all(not p.any() for p in gates)
    assert [type(m) for m in model.modules() if isinstance(m, nn.LayerNorm)] == []


def test_bfloat16_autocast_stays_close():
    model, given = awake(), inputs()
    rest = {k: v for k, v in given.items() if k != "z"}
    direction = torch.randn_like(given["z"])
    exact, exact_slope = model.forward_with_derivative(given["z"], direction, **rest)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, slope = model.forward_with_derivative(given["z"], direction, **rest)
    assert rough.u.dtype == rough.v.dtype == slope.dtype == torch.float32
    # bfloat16 keeps 8 bits; 4 % of the largest value bounds three blocks of it.
    for found, expected in ((rough.x, exact.x), (rough.v, exact.v), (slope, exact_slope)):
        assert (found - expected).abs().max() < 0.04 * expected.abs().max()


def test_misfits_are_errors():
    model, given = awake(), inputs()
    with pytest.raises(UsageError, match="trained without it"):
        model(**given, guidance=(2.0, 0.0, 1.0))
    with pytest.raises(
        MismatchError, match=r"z has shape \(4, 5, 3, 6\), the network expects \(4, 3, 5, 6\)"
    ):
        model(**{**given, "z": given["z"].transpose(1, 2)})
    with pytest.raises(MismatchError, match="prev has shape"):
        model(**{**given, "prev": given["prev"][..., :5]})
    guided = awake(dataclasses.replace(SMALL, guidance=True))
    with pytest.raises(UsageError, match="holds 2 values"):
        guided(**given, guidance=(2.0, 0.0))
