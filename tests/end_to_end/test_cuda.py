"""Every path on a CUDA device against the CPU; the suite skips these, `make test-cuda` runs them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import awake
from tiny_runs import FLOW

from hierarchy_builder.canvases import level_canvases
from hierarchy_builder.encoders import encode, load_encoder
from hierarchy_builder.hierarchy import build_hierarchy
from trainer.methods import registry
from trainer.methods.trajectory_forcing import objective
from trainer.methods.trajectory_forcing.config import MethodConfig
from trainer.methods.trajectory_forcing.sample import sample_levels
from trainer.seeds import StepRows
from trainer.training.config import OptimConfig
from trainer.training.log import read_metrics
from trainer.training.method_run import compiled
from trainer.training.optim import MuonAdam

pytestmark = pytest.mark.cuda


def gradients(device: str, *, loss: Any = objective.loss, bf16: bool = False) -> dict[str, torch.Tensor]:
    model = awake().to(device)
    c, generator = model.config, torch.Generator().manual_seed(1)
    draws = objective.draw_batch(
        StepRows(batch_size=4, seed=0, step=0), (*c.grid, c.in_channels), MethodConfig()
    )
    given = {
        "prev": torch.randn(4, *c.grid, c.in_channels, generator=generator),
        "level": torch.arange(4),
        "label": torch.arange(4),
        "regions": torch.randint(0, 3, (4, *c.grid), generator=generator),
        **{"t": draws.t, "r": draws.r, "noise": draws.noise},
    }
    x = torch.randn(4, *c.grid, c.in_channels, generator=generator).to(device)
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        terms = loss(model, x, **{name: value.to(device) for name, value in given.items()})
    terms["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("way", "tolerance"), [("plain", 1e-3), ("bf16", 0.2), ("compiled", 1e-3)])
def test_gradients_are_those_of_the_cpu(way: str, tolerance: float) -> None:
    loss = compiled(objective.loss) if way == "compiled" else objective.loss
    expected, found = gradients("cpu"), gradients("cuda", loss=loss, bf16=way == "bf16")
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-6, name


def test_muon_moves_as_on_the_cpu() -> None:
    moved = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(8, 12).to(device))
        weight.grad = torch.randn(8, 12).to(device)
        MuonAdam([("w", weight)], OptimConfig()).step()
        moved.append(weight.detach().cpu())
    torch.testing.assert_close(*moved, rtol=1e-4, atol=1e-5)


def test_hierarchies_and_canvases_are_those_of_the_cpu() -> None:
    features = torch.randn(3, 16, 16, 24, generator=torch.Generator().manual_seed(0)).half()
    on_cpu, on_device = build_hierarchy(features), build_hierarchy(features.cuda())
    np.testing.assert_array_equal(on_cpu.regions, on_device.regions)
    regions = torch.from_numpy(on_cpu.regions)
    drawn = level_canvases(features.cuda(), regions.cuda()).cpu()
    torch.testing.assert_close(drawn, level_canvases(features, regions))


def test_samples_are_those_of_the_cpu() -> None:
    model = awake().eval()
    c = model.config
    label, noise = torch.arange(2), torch.randn(4, 2, *c.grid, c.in_channels)
    with torch.no_grad():
        expected = sample_levels(model, label, noise)
        found = sample_levels(model.cuda(), label.cuda(), noise.cuda()).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_features_leave_the_device_as_on_the_cpu() -> None:
    images = np.random.default_rng(0).integers(0, 255, (3, 224, 224, 3), np.uint8)
    encoders = [
        load_encoder("timm:vit_tiny_patch16_224", weights="random:0", device=d) for d in ("cpu", "cuda")
    ]
    exact, fast = (encode(encoder, images, half=True).astype(np.float32) for encoder in encoders)
    assert np.abs(exact - fast).mean() < 0.02


def test_a_run_resumes_and_logs_its_speed(shards: str, tmp_path: Path) -> None:
    config = dataclasses.replace(FLOW, precision="auto")
    registry.train(dataclasses.replace(config, total_images=32), shards, str(tmp_path), quiet=True)
    registry.train(config, shards, str(tmp_path), quiet=True)
    lines = read_metrics(tmp_path)
    assert lines[-1]["images"] == config.total_images
    assert "precision: bfloat16" in (tmp_path / "config.yaml").read_text()
