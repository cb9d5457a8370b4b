"""Latent Forcing: the release's numbers, and what must hold whatever the weights."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from released import GOLDEN
from safetensors.torch import load_file, save_file
from torch import Tensor

from hierarchy_builder.errors import MismatchError, TrainerError, UsageError
from trainer.methods.latent_forcing import objective as latent_forcing
from trainer.methods.latent_forcing.clocks import sampling_grid
from trainer.methods.latent_forcing.config import LatentMethodConfig, LatentModelConfig
from trainer.methods.latent_forcing.network import PixelLatentTransformer
from trainer.methods.latent_forcing.release import load_latent_forcing, to_official
from trainer.methods.latent_forcing.sample import ClockGuidance, sample_pixels
from trainer.networks.layers import from_patches, to_patches
from trainer.seeds import StepRows

TINY = LatentModelConfig(
    grid=(2, 4),
    patch_px=4,
    in_channels=5,
    num_classes=3,
    width=16,
    depth=2,
    num_heads=2,
    pixel_bottleneck=6,
    latent_bottleneck=4,
    num_class_tokens=2,
    class_tokens_at=1,
    expert_depth=1,
    expert_width=24,
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return GOLDEN / "latent_forcing_tiny"


@pytest.fixture(scope="module")
def network(folder: Path) -> PixelLatentTransformer:
    return load_latent_forcing(folder)


def vectors(path: Path) -> dict[str, Tensor]:
    """Arrays of a reference file, channels-last, times turned round."""
    with np.load(path, allow_pickle=False) as stored:
        found = {name: torch.from_numpy(stored[name]) for name in stored}
    found = {name: x.permute(0, 2, 3, 1) if x.ndim == 4 else x for name, x in found.items()}
    return {name: 1 - x if name.startswith("t_") else x for name, x in found.items()}


def filled(config: LatentModelConfig, seed: int = 0) -> PixelLatentTransformer:
    """A network in which every weight counts."""
    torch.manual_seed(seed)
    network = PixelLatentTransformer(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def inputs(config: LatentModelConfig, batch: int = 3) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "pixels": torch.randn(batch, *config.image_px, 3),
        "latents": torch.randn(batch, *config.grid, config.latent_channels),
        "t_pixels": torch.rand(batch),
        "t_latents": torch.rand(batch, config.num_canvases),
        "label": torch.arange(batch) % (config.num_classes + 1),
    }


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# The release's numbers


@torch.no_grad()
def test_forward_agrees_with_the_release(network: PixelLatentTransformer, folder: Path) -> None:
    given = vectors(folder / "forward_loss.npz")
    z = [
        latent_forcing.mixed(given[name], given[f"noise_{name}"], given[f"t_{name}"])
        for name in ("pixels", "latents")
    ]
    pixels, latents = network(*z, t_pixels=given["t_pixels"], t_latents=given["t_latents"], label=given["y"])
    torch.testing.assert_close(pixels, given["pred_pixels"], rtol=0, atol=1e-5)
    torch.testing.assert_close(latents, given["pred_latents"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_loss_agrees_with_the_release(network: PixelLatentTransformer, folder: Path) -> None:
    given = vectors(folder / "forward_loss.npz")
    names = [f"{what}_{name}" for what in ("t", "noise", "weight") for name in ("pixels", "latents")]
    found = latent_forcing.loss(
        network,
        given["pixels"],
        given["latents"],
        label=given["y"],
        latent_weight=0.333,
        **{name: given[name] for name in names},
    )
    for name, value in found.items():
        assert float(value) == pytest.approx(float(given[name]), rel=1e-6), name


CFG = {
    "pixel_guidance": ClockGuidance(scale=2.9),
    "latent_guidance": ClockGuidance(scale=2.9, high=0.94),
}


@pytest.mark.parametrize(
    ("name", "grid", "guidance"),
    [
        ("cascaded_unguided", sampling_grid("cascaded", 6), {}),
        ("cascaded_cfg", sampling_grid("cascaded", 6, latent_warp=1 / 0.575), CFG),
        ("shifted_unguided", sampling_grid("shifted", 6, shift=9.0), {}),
    ],
)
def test_samples_agree_with_the_release(
    network: PixelLatentTransformer,
    folder: Path,
    name: str,
    grid: tuple[Tensor, Tensor],
    guidance: dict[str, ClockGuidance],
) -> None:
    given = vectors(folder / f"sample_{name}.npz")
    torch.testing.assert_close(grid[0], given["t_pixels"], rtol=0, atol=1e-6)
    torch.testing.assert_close(grid[1][:, 0], given["t_latents"], rtol=0, atol=1e-6)
    found = sample_pixels(
        network, given["y"], given["noise_pixels"], given["noise_latents"], grid, **guidance
    )
    assert relative(found[0], given["pixels"]) < 1e-5
    assert relative(found[1], given["latents"]) < 1e-5


def test_every_weight_of_the_release_is_kept(network: PixelLatentTransformer, folder: Path) -> None:
    written, given = to_official(network), load_file(folder / "model.safetensors")
    assert written.keys() == given.keys()
    for name in given:
        tolerance = 1e-6 if name == "pos_embed" else 0
        torch.testing.assert_close(written[name], given[name], rtol=0, atol=tolerance)


def test_weights_that_do_not_fit_are_named(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["blocks.1.attn.qkv.bias"]
    weights["y_embedder.embedding_table.weight"] = weights["y_embedder.embedding_table.weight"][:-2]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(MismatchError, match=r"embedding_table.*\(9, 64\).*qkv.bias is missing"):
        load_latent_forcing(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(TrainerError, match=r"model.safetensors"):
        load_latent_forcing(tmp_path)
    (tmp_path / "config.json").write_text('{"patch_size": 16}')
    with pytest.raises(UsageError, match="no configuration of Latent Forcing"):
        load_latent_forcing(tmp_path)


def test_the_paper_size_has_the_paper_count() -> None:
    """LM with two experts of two blocks: 465 million parameters."""
    with torch.device("meta"):
        network = PixelLatentTransformer(LatentModelConfig())
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == 465


# The network


def test_a_fresh_network_predicts_zero() -> None:
    pixels, latents = PixelLatentTransformer(TINY)(**inputs(TINY))
    assert pixels.shape == (3, 8, 16, 3)
    assert latents.shape == (3, 2, 4, 5)
    assert not pixels.any()
    assert not latents.any()


def test_fresh_layers_have_the_spread_of_the_matrices_of_the_release() -> None:
    """Xavier's √(2/(fan_in + fan_out)), where q, k and v are one matrix of 3·D rows, and w1 and w3 one of 2·h."""
    torch.manual_seed(0)
    D, h = 192, 512
    config = dataclasses.replace(TINY, width=D, depth=1, class_tokens_at=0, expert_depth=0)
    network = PixelLatentTransformer(config)
    attention, mlp = network.blocks[0].attention, network.blocks[0].mlp
    rows = {"q": 3 * D, "k": 3 * D, "v": 3 * D, "out": D}
    spreads = [(getattr(attention, name), D, fan_out) for name, fan_out in rows.items()]
    spreads += [(mlp.w1, D, 2 * h), (mlp.w3, D, 2 * h), (mlp.w2, h, D)]
    for layer, fan_in, fan_out in spreads:
        assert layer.weight.shape[1] == fan_in
        assert layer.weight.std().item() == pytest.approx((2 / (fan_in + fan_out)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("changes", [{"expert_depth": 0}, {"num_class_tokens": 0}, {"num_canvases": 3}])
@torch.no_grad()
def test_every_input_counts_in_every_variant(changes: dict[str, int]) -> None:
    config = dataclasses.replace(TINY, **changes)
    network, given = filled(config), inputs(config)
    before = torch.cat([part.flatten() for part in network(**given)])
    for name, value in given.items():
        moved = {**given, name: (value + 1) % 4 if name == "label" else value + 0.1}
        after = torch.cat([part.flatten() for part in network(**moved)])
        assert (after - before).abs().max() > 1e-4, name


@torch.no_grad()
def test_one_clock_is_shared_by_all_canvases() -> None:
    config = dataclasses.replace(TINY, num_canvases=3)
    network, given = filled(config), inputs(config)
    t = given["t_latents"][:, 0]
    shared = network(**{**given, "t_latents": t})
    torch.testing.assert_close(shared, network(**{**given, "t_latents": t[:, None].expand(-1, 3)}))


def test_a_patch_of_pixels_is_one_token() -> None:
    """Patches and back is the identity, also off the square."""
    pixels = inputs(TINY)["pixels"]
    patches = to_patches(pixels, 4)
    torch.testing.assert_close(patches[0, 5].view(4, 4, 3), pixels[0, 4:8, 4:8])
    torch.testing.assert_close(from_patches(patches, TINY.grid, 4), pixels)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        network = filled(TINY)
        network.blocks.recompute = recompute
        network.pixel_expert.blocks.recompute = recompute
        pixels, latents = network(**inputs(TINY))
        (pixels.square().sum() + latents.square().sum()).backward()
        gradients.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["pixels", "latents"])
def test_wrong_shapes_are_named(name: str) -> None:
    given = inputs(TINY)
    with pytest.raises(MismatchError, match=f"{name} have shape"):
        PixelLatentTransformer(TINY)(**{**given, name: given[name][:, 1:]})


# Objective and sampler


class Oracle:
    """Knows that data are Gaussian of deviation s: x̂ = z·(1−t)s²/((1−t)²s² + t²)."""

    def __init__(self, s: float) -> None:
        self.s = s

    def __call__(
        self, pixels: Tensor, latents: Tensor, *, t_pixels: Tensor, t_latents: Tensor, label: Tensor
    ) -> Any:
        return self._clean(pixels, t_pixels), self._clean(latents, t_latents)

    def _clean(self, z: Tensor, t: Tensor) -> Tensor:
        t = latent_forcing.per_channel(t, z).double()
        return (z * (1 - t) * self.s**2 / ((1 - t) ** 2 * self.s**2 + t**2)).to(z.dtype)


@pytest.mark.parametrize("schedule", ["cascaded", "shifted", "offset"])
def test_samples_come_near_the_exact_flow_by_the_square_of_the_steps(schedule: str) -> None:
    """The flow of Gaussian data multiplies the noise by s."""
    s, noise = 0.5, torch.randn(2, 4, 4, 3, dtype=torch.float64)
    errors = []
    for steps in (32, 128):
        grid = tuple(t.double() for t in sampling_grid(schedule, steps))  # type: ignore[arg-type]
        exactly: dict[str, Any] = {"clean_ends": True, "time_floor": 1e-9}
        found = sample_pixels(Oracle(s), torch.zeros(2).long(), noise, noise, grid, **exactly)  # type: ignore[arg-type]
        errors.append(max(relative(part, s * noise) for part in found))
    assert errors[1] < errors[0] / 8 < 0.01


def test_the_loss_of_a_perfect_network_is_zero_and_of_the_mean_known() -> None:
    torch.manual_seed(0)
    pixels, latents = torch.randn(4, 8, 8, 3), torch.randn(4, 2, 2, 6)
    given: dict[str, Any] = {
        "label": torch.zeros(4).long(),
        "t_pixels": torch.tensor([0.5, 0.5, 0.01, 1.0]),
        "t_latents": torch.full((4, 2), 0.5),
        "noise_pixels": torch.randn(4, 8, 8, 3),
        "noise_latents": torch.randn(4, 2, 2, 6),
        "weight_pixels": torch.tensor([1.0, 0.0, 1.0, 0.0]),
        "weight_latents": torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]),
    }
    perfect = latent_forcing.loss(lambda *_, **__: (pixels, latents), pixels, latents, **given)
    assert not any(perfect.values())
    zero = latent_forcing.loss(lambda p, q, **_: (0 * p, 0 * q), pixels, latents, **given, latent_weight=0.5)
    expected = (pixels[0].square().mean() / 0.25 + pixels[2].square().mean() / 0.0025) / 4
    assert float(zero["loss_pixels"]) == pytest.approx(float(expected), rel=1e-5)
    expected = (latents[1, ..., :3].square().mean() + latents[3, ..., 3:].square().mean()) / 0.25 / 4
    assert float(zero["loss_latents"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(zero["loss"]) == pytest.approx(float(zero["loss_pixels"] + 0.5 * zero["loss_latents"]))
    floored = latent_forcing.loss(lambda p, q, **_: (0 * p, 0 * q), pixels, latents, **given, time_floor=0.4)
    expected = (pixels[0].square().mean() / 0.25 + pixels[2].square().mean() / 0.16) / 4
    assert float(floored["loss_pixels"]) == pytest.approx(float(expected), rel=1e-5)


def test_draws_of_a_row_do_not_depend_on_the_split() -> None:
    config = LatentMethodConfig()
    whole, part = (
        latent_forcing.draw_batch(
            StepRows(batch_size=6, seed=3, step=7, rows=rows), (4, 4, 3), (2, 2, 5), config
        )
        for rows in (slice(None), slice(2, 5))
    )
    torch.testing.assert_close(part.noise_pixels, whole.noise_pixels[2:5])
    torch.testing.assert_close(part.noise_latents, whole.noise_latents[2:5])
    torch.testing.assert_close(part.drop_label, whole.drop_label[2:5])
    for mine, all_of_them in zip(part.clocks, whole.clocks, strict=True):
        torch.testing.assert_close(mine, all_of_them[2:5])


def test_given_latents_stay_as_they_are() -> None:
    network, given = filled(TINY), inputs(TINY)
    t_pixels = torch.linspace(1, 0, 4)
    clean = given["latents"]
    _, latents = sample_pixels(network, given["label"], given["pixels"], clean, (t_pixels, torch.zeros(4, 1)))
    torch.testing.assert_close(latents, clean, rtol=0, atol=0)


def test_clean_ends_leave_no_noise_in_the_latents() -> None:
    """A network that knows the data point: Heun's step into t = 0 keeps half of that step's noise, Euler's none."""
    x = torch.randn(1, 2, 2, 6)

    def knows(pixels: Tensor, latents: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        return 0 * pixels, x

    noise, grid = torch.randn(1, 2, 2, 6), sampling_grid("cascaded", 6, num_canvases=2)
    pixels = torch.zeros(1, 4, 4, 3)
    for clean_ends, left in ((True, 0.0), (False, 0.25)):
        _, latents = sample_pixels(knows, torch.zeros(1).long(), pixels, noise, grid, clean_ends=clean_ends)
        torch.testing.assert_close(latents, x + left * (noise - x), rtol=1e-4, atol=1e-5)


def test_what_guides_is_the_weak_network_from_its_time_on() -> None:
    given = inputs(TINY)
    strong, weak = filled(TINY), filled(TINY, seed=5)
    grid = sampling_grid("cascaded", 4)
    guidance = {name: ClockGuidance(scale=2.0) for name in ("pixel_guidance", "latent_guidance")}

    def sampled(**fields: Any) -> tuple[Tensor, Tensor]:
        noise = given["pixels"], given["latents"]
        return sample_pixels(strong, given["label"], *noise, grid, **guidance, **fields)

    own, always, late = sampled(), sampled(weak_network=weak), sampled(weak_network=weak, weak_from=0.001)
    # The last evaluation of the latent stage already lies at clean latents, as in the release.
    assert relative(always[1], own[1]) > 1e-3
    assert relative(late[0], own[0]) > 1e-3
    with_itself = sampled(weak_network=strong)
    torch.testing.assert_close(with_itself, own)
    null = torch.full_like(given["label"], TINY.num_classes)
    unguided = sample_pixels(strong, null, given["pixels"], given["latents"], grid)
    same = sample_pixels(strong, null, given["pixels"], given["latents"], grid, **guidance)
    torch.testing.assert_close(same, unguided, rtol=1e-3, atol=1e-4)


def test_rising_times_are_refused() -> None:
    given = inputs(TINY)
    with pytest.raises(UsageError, match="times that fall"):
        sample_pixels(
            filled(TINY),
            given["label"],
            given["pixels"],
            given["latents"],
            (torch.tensor([0.0, 1.0]), torch.ones(2, 1)),
        )


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (LatentModelConfig, {"width": 30, "num_heads": 4}, "multiple of 4 × num_heads"),
        (LatentModelConfig, {"expert_width": 1000}, "expert_width 1000"),
        (LatentModelConfig, {"class_tokens_at": 20}, "class_tokens_at"),
        (LatentMethodConfig, {"latent_share": 1.5}, "latent_share"),
        (LatentMethodConfig, {"offset": 1.0}, "offset"),
        (LatentMethodConfig, {"shift": 0.0}, "shift"),
    ],
)
def test_impossible_fields_are_refused(kind: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**fields)
