"""The objective: parity with the release, closed forms of mean flow, region losses, random draws."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from released import golden_arrays, load
from small_networks import SMALL, awake

from trainer.methods.trajectory_forcing import objective as tf
from trainer.methods.trajectory_forcing.config import MethodConfig
from trainer.methods.trajectory_forcing.network import Guidance, Prediction
from trainer.methods.trajectory_forcing.release import official_name
from trainer.seeds import StepRows


def golden_loss(golden):
    arrays = golden_arrays(golden / "loss.npz")
    guidance = Guidance(arrays["omega"], arrays["t_min"], arrays["t_max"])
    model = load(golden)
    terms = tf.loss(
        model,
        arrays["clean"],
        label=arrays["y"],
        regions=arrays["region_ids"],
        guidance=guidance if model.config.guidance else None,
        **{name: arrays[name] for name in ("prev", "level", "t", "r", "noise")},
    )
    return model, terms, arrays


def test_loss_terms_match_the_release(golden):
    _, terms, arrays = golden_loss(golden)
    for ours, theirs in (
        ("loss", "loss"),
        ("raw_mse_u", "raw_mse_u"),
        ("raw_mse_v", "raw_mse_v"),
        ("region", "region_var_loss"),
    ):
        assert float(terms[ours].detach()) == pytest.approx(float(arrays[f"loss__{theirs}"]), rel=1e-4), ours


def test_gradients_match_the_release(golden):
    model, terms, _ = golden_loss(golden)
    terms["loss"].backward()
    norms = json.loads((golden / "grad_norms.json").read_text())
    for name, p in model.named_parameters():
        assert float(p.grad.norm()) == pytest.approx(norms[official_name(name)], rel=1e-3), name


def test_region_loss_matches_the_release(golden):
    arrays = golden_arrays(golden / "region_losses.npz")
    predicted, clean, regions = arrays["pred"], arrays["gt"], arrays["region_ids"]
    found = float(tf.region_distances(predicted, clean, regions).mean())
    assert found == pytest.approx(float(arrays["variance"]), rel=1e-5)


def batch(config=SMALL, size: int = 4) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    shape = (size, *config.grid, config.in_channels)
    return {
        "x": torch.randn(shape, generator=g),
        "prev": torch.randn(shape, generator=g),
        "noise": torch.randn(shape, generator=g),
        "level": torch.tensor([0, 1, 2, 3])[:size],
        "label": torch.tensor([0, 3, 6, 7])[:size],
        "regions": torch.randint(0, 3, (size, *config.grid), generator=g),
        "t": torch.tensor([0.9, 0.6, 0.3, 0.2])[:size],
        "r": torch.tensor([0.1, 0.5, 0.0, 0.2])[:size],
    }


def one_point(x0: torch.Tensor):
    """The exact network for a single data point: u = v = (z − x₀)/t."""

    def model(z, *, t, r, label, level, prev, guidance=None):
        u = (z - x0) / t[:, None, None, None]
        return Prediction(x0 + 0 * z, u, u)

    return model


def test_one_data_point_has_no_loss():
    given_batch = batch()
    x0 = given_batch["x"]
    terms = tf.loss(one_point(x0), **given_batch | {"regions": None})
    # Squares of float32 rounding errors, through a division by t ≥ 0.2.
    assert float(terms["raw_mse_u"]) < 1e-10
    assert float(terms["raw_mse_v"]) < 1e-10


def test_gaussian_flow_obeys_the_mean_flow_identity():
    s = 0.7

    def deviation(t):
        return ((1 - t) ** 2 * s**2 + t**2).sqrt()[:, None, None, None]

    def model(z, *, t, r, label, level, prev, guidance=None):
        span = (t - r)[:, None, None, None]
        u = z * (1 - deviation(r) / deviation(t)) / torch.where(span == 0, 1.0, span)
        # Along the flow z_t = z_1·σ_t/σ_1, so v = z·σ_t'/σ_t.
        v = z * ((t - (1 - t) * s**2)[:, None, None, None] / deviation(t) ** 2)
        return Prediction(z, u, v)

    z = torch.randn(3, 2, 2, 5, dtype=torch.float64)
    t = torch.tensor([0.9, 0.5, 0.3], dtype=torch.float64)
    r = torch.tensor([0.0, 0.4, 0.1], dtype=torch.float64)
    rest = {"label": None, "level": None, "prev": None}
    v = tf._instantaneous(model, z, t, **rest)
    prediction, du_dt = tf._with_derivative(model, z, v, t=t, r=r, **rest)
    torch.testing.assert_close(prediction.u, v - (t - r)[:, None, None, None] * du_dt, rtol=0, atol=1e-9)


def test_plain_callables_and_the_network_share_one_objective():
    model, given_batch = awake(), batch()

    def plain(z, **inputs):
        return model(z, **inputs)

    plain.config = model.config
    for name, value in tf.loss(model, **given_batch).items():
        torch.testing.assert_close(tf.loss(plain, **given_batch)[name], value, rtol=1e-5, atol=1e-6)


def test_loss_weighs_its_terms():
    terms = tf.loss(awake(), **batch(), region_weight=3.0)
    torch.testing.assert_close(terms["loss"], terms["loss_u"] + terms["loss_v"] + 3 * terms["region"])
    assert float(terms["region"].detach()) > 0
    off = tf.loss(awake(), **batch(), region_weight=0.0)
    assert float(off["region"]) == 0


def test_last_level_has_no_region_loss():
    given_batch = batch() | {"level": torch.full((4,), 3)}
    garbage = {"regions": torch.zeros(4, *SMALL.grid, dtype=torch.uint8)}
    terms = tf.loss(awake(), **given_batch | garbage)
    assert float(terms["region"].detach()) == 0
    mixed = batch()
    other = mixed["regions"].clone()
    other[3] = 0
    torch.testing.assert_close(
        tf.loss(awake(), **mixed)["region"], tf.loss(awake(), **mixed | {"regions": other})["region"]
    )


def test_dropped_labels_aim_at_the_plain_velocity():
    model = awake(dataclasses.replace(SMALL, guidance=True))
    given_batch = batch() | {"label": torch.full((4,), SMALL.num_classes)}
    guidance = Guidance(torch.full((4,), 5.0), torch.zeros(4), torch.ones(4))
    guided = tf.loss(model, **given_batch, guidance=guidance)["raw_mse_v"]
    z = tf._mix(given_batch["x"], given_batch["noise"], given_batch["t"])
    inputs = {name: given_batch[name] for name in ("t", "r", "level", "label", "prev")}
    target = given_batch["noise"] - given_batch["x"]
    torch.testing.assert_close(guided, (model(z, **inputs, guidance=guidance).v - target).square().mean())


def test_every_parameter_receives_a_gradient_under_autocast():
    model = awake()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = tf.loss(model, **batch())
    terms["loss"].backward()
    exact = tf.loss(model, **batch())
    assert float(terms["region"].detach()) == pytest.approx(float(exact["region"].detach()), rel=0.02)
    assert terms["loss"].dtype == torch.float32
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), num_regions=st.integers(1, 6))
def test_region_loss_does_not_depend_on_the_numbering(seed, num_regions):
    g = torch.Generator().manual_seed(seed)
    predicted, clean = torch.randn(2, 2, 3, 4, 5, generator=g)
    regions = torch.randint(0, num_regions, (2, 3, 4), generator=g)
    renamed = torch.randperm(num_regions, generator=g)[regions]
    found, same = (tf.region_distances(predicted, clean, ids) for ids in (regions, renamed))
    torch.testing.assert_close(found, same)


def test_region_loss_by_hand():
    clean = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]], [[0.0, 2.0], [3.0, 0.0]]]])
    regions = torch.tensor([[[0, 1], [1, 0]]])
    # Tokens equal their region's mean direction except the last, which is opposite: (0 + 4)/2 in region 0.
    predicted = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]], [[0.0, 2.0], [-3.0, 0.0]]]])
    assert float(tf.region_distances(predicted, clean, regions).mean()) == pytest.approx((2.0 + 0.0) / 2)


def test_draws_do_not_depend_on_how_ranks_share_the_batch():
    def draw(rows: slice) -> tf.Draws:
        return tf.draw_batch(StepRows(batch_size=8, seed=3, step=11, rows=rows), (2, 2, 3), MethodConfig())

    whole, parts = draw(slice(None)), [draw(slice(0, 3)), draw(slice(3, 8))]
    for field in ("t", "r", "noise", "drop_label"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field)), field
    assert torch.equal(torch.cat([part.guidance.omega for part in parts]), whole.guidance.omega)
    later = tf.draw_batch(StepRows(batch_size=8, seed=3, step=12), (2, 2, 3), MethodConfig())
    assert not torch.equal(later.noise, whole.noise)
    assert len(set(whole.noise[:, 0, 0, 0].tolist())) == 8


def test_draws_follow_their_laws():
    n = 100_000
    config = MethodConfig(data_fraction=0.25, uniform_fraction=0.1)
    t, r = tf.draw_times(n, config, torch.Generator().manual_seed(0))
    assert (t >= r).all()
    assert float((t == r).float().mean()) == pytest.approx(0.25, abs=0.01)
    uniform_t, uniform_r = tf.draw_times(
        n, MethodConfig(uniform_fraction=1.0), torch.Generator().manual_seed(0)
    )
    # The larger and the smaller of two uniform numbers average 2/3 and 1/3.
    assert float(uniform_t.mean()) == pytest.approx(2 / 3, abs=0.005)
    assert float(uniform_r.mean()) == pytest.approx(1 / 3, abs=0.005)
    omega, t_min, t_max = tf.draw_guidance(n, config, torch.Generator().manual_seed(0))
    assert 1 <= float(omega.min()) < float(omega.max()) <= 8
    assert float(omega.log().mean()) == pytest.approx(0.5 * torch.log(torch.tensor(8.0)).item(), abs=0.01)
    assert float(t_min.max()) <= 0.5 <= float(t_max.min())


def test_noise_on_the_previous_level_spares_level_0_and_the_other_draws():
    def draw(rows: slice = slice(None), **options: float) -> tf.Draws:
        own = StepRows(batch_size=6, seed=3, step=11, rows=rows)
        return tf.draw_batch(own, (2, 2, 3), MethodConfig(**options))

    plain, noisy = draw(), draw(prev_noise=0.5)
    for field in ("t", "r", "noise", "drop_label"):
        assert torch.equal(getattr(plain, field), getattr(noisy, field)), field
    prev, level = torch.ones(6, 2, 2, 3), torch.tensor([0, 1, 2, 3, 1, 0])
    assert plain.noisy(prev, level) is prev
    moved = noisy.noisy(prev, level) - prev
    assert moved[level == 0].abs().max() == 0
    assert (moved[level > 0].flatten(1).abs().amax(dim=1) > 0).all()
    parts = [draw(rows, prev_noise=0.5) for rows in (slice(0, 2), slice(2, 6))]
    assert torch.equal(torch.cat([part.prev_noise for part in parts]), noisy.prev_noise)
    many = tf.draw_batch(StepRows(batch_size=4000, seed=0, step=0), (2, 2, 3), MethodConfig(prev_noise=0.5))
    # σ uniform on [0, 0.5] has E σ² = 0.25/3.
    assert float(many.prev_noise.square().mean()) == pytest.approx(0.25 / 3, rel=0.05)
    assert not torch.equal(
        many.prev_noise[0] / many.prev_noise[0].norm(), many.noise[0] / many.noise[0].norm()
    )


def test_labels_are_dropped_as_often_as_asked():
    for share in (0.0, 0.1, 1.0):
        rows = StepRows(batch_size=20_000, seed=0, step=0)
        draws = tf.draw_batch(rows, (1, 1, 1), MethodConfig(label_dropout=share))
        assert float(draws.drop_label.float().mean()) == pytest.approx(share, abs=0.01)


def test_the_direction_of_data_leaves_out_one_pass_and_trains_the_same_velocity() -> None:
    model, calls = awake(), []
    c, generator = model.config, torch.Generator().manual_seed(0)
    x, prev, noise = torch.randn(3, 4, *c.grid, c.in_channels, generator=generator)
    times = {"t": torch.tensor([0.3, 0.5, 0.7, 0.9]), "r": torch.tensor([0.1, 0.5, 0.2, 0.0])}
    given = {
        "level": torch.arange(4),
        "label": torch.arange(4),
        "prev": prev,
        "noise": noise,
        "regions": None,
        **times,
    }
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    exact = tf.loss(model, x, **given)
    assert len(calls) == 1
    cheap = tf.loss(model, x, **given, direction="data")
    assert len(calls) == 1  # forward_with_derivative alone
    assert torch.equal(exact["loss_v"], cheap["loss_v"])
    assert not torch.equal(exact["loss_u"], cheap["loss_u"])
