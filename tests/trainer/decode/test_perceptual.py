"""Networks whose weights are brought along: the same functions as those the weights were trained in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from hierarchy_builder.errors import MismatchError, TrainerError
from trainer.decode.adversary import (
    Discriminator,
    augmented,
    balanced_weight,
    frozen_vit,
    load_discriminator,
)
from trainer.decode.perceptual import SCALE, SHIFT, load_lpips

PLAN = "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M"
"""VGG16 as torchvision numbers it: a convolution and a ReLU for each width, and poolings."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the names of torchvision and LPIPS."""
    folder = tmp_path_factory.mktemp("lpips")
    generator = torch.Generator().manual_seed(0)
    tensors, number, before = {}, 0, 3
    for part in PLAN.split():
        if part == "M":
            number += 1
            continue
        shape = (int(part), before, 3, 3)
        tensors[f"features.{number}.weight"] = (
            torch.randn(shape, generator=generator) * (2 / before / 9) ** 0.5
        )
        tensors[f"features.{number}.bias"] = torch.randn(int(part), generator=generator) * 0.1
        number, before = number + 2, int(part)
    save_file(tensors, folder / "vgg16.safetensors")
    heads = {
        f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator)
        for i, width in enumerate((64, 128, 256, 512, 512))
    }
    torch.save(heads, folder / "lpips.pth")
    return folder


def reference(folder: Path, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """LPIPS step by step, from the paper's formula: sum over layers of w · mean over places of (â − b̂)²."""
    vgg, heads = load_file(folder / "vgg16.safetensors"), torch.load(folder / "lpips.pth", weights_only=True)
    shift, scale = (torch.tensor(values)[:, None, None] for values in (SHIFT, SCALE))
    x = torch.cat([(2 * each - 1 - shift) / scale for each in (a, b)])
    total, number, stage = torch.zeros(len(a)), 0, 0
    for part in [*PLAN.split()]:
        if part != "M":
            x = F.relu(
                F.conv2d(x, vgg[f"features.{number}.weight"], vgg[f"features.{number}.bias"], padding=1)
            )
            number += 2
            continue
        unit = x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
        squares = (unit[: len(a)] - unit[len(a) :]).square()
        total += (heads[f"lin{stage}.model.1.weight"] * squares).sum(dim=1).mean(dim=(1, 2))
        x, number, stage = F.max_pool2d(x, 2), number + 1, stage + 1
    return total


def test_lpips_is_the_distance_of_the_paper(weights: Path) -> None:
    lpips = load_lpips(weights)
    a, b = torch.rand(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = reference(weights, a, b)
    assert expected.min() > 0.1
    # The same float32 operations, sums in another order.
    torch.testing.assert_close(lpips(a, b), expected, rtol=1e-4, atol=1e-6)
    assert lpips(a, a).abs().max() == 0
    assert not any(p.requires_grad for p in lpips.parameters())


def test_files_keep_the_names_they_are_published_under(weights: Path, tmp_path: Path) -> None:
    torch.save(load_file(weights / "vgg16.safetensors"), tmp_path / "vgg16-397923af.pth")
    (tmp_path / "vgg.pth").write_bytes((weights / "lpips.pth").read_bytes())
    published, ours = load_lpips(tmp_path).state_dict(), load_lpips(weights).state_dict()
    assert all(torch.equal(published[name], tensor) for name, tensor in ours.items())


def test_missing_or_other_weights_are_named(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match=r"found no vgg16 .* or train without lpips"):
        load_lpips(tmp_path)
    with pytest.raises(
        TrainerError, match=r"vgg16\.safetensors: found a file, expected a folder of two files"
    ):
        load_lpips(weights / "vgg16.safetensors")
    (tmp_path / "vgg16.safetensors").write_bytes((weights / "vgg16.safetensors").read_bytes())
    save_file({"lin0.model.1.weight": torch.ones(1, 64, 1, 1)}, tmp_path / "lpips.safetensors")
    with pytest.raises(MismatchError, match=r"LPIPS v0\.1, does not fit .*lin1\.model\.1\.weight is missing"):
        load_lpips(tmp_path)


def test_weights_of_another_network_than_dinos_are_refused(tmp_path: Path) -> None:
    save_file(frozen_vit(depth=3).state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(
        MismatchError, match=r"expected DINO's ViT-S/8, does not fit the network: .* is missing"
    ):
        load_discriminator(tmp_path / "vit.safetensors")


def test_discriminator_tells_pictures_apart_after_training() -> None:
    torch.manual_seed(0)
    judge = Discriminator(frozen_vit(size_px=16, patch_px=4, width=12, depth=2, heads=2), blocks=(0, 1))
    optimizer = torch.optim.Adam(judge.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    light, dark = torch.rand(2, 8, 3, 16, 16, generator=generator) * 0.5
    light = light + 0.5
    for _ in range(30):
        loss = F.relu(1 - judge(light)).mean() + F.relu(1 + judge(dark)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert judge(light).shape == (8, 2 * 16)
    assert judge(light).mean() > judge(dark).mean() + 0.3
    assert not any(p.requires_grad for p in judge._held[0].parameters())


def test_balanced_weight_is_the_ratio_of_gradients_and_bounded() -> None:
    last = torch.tensor([1.0, 2.0], requires_grad=True)
    assert balanced_weight((6 * last).sum(), (2 * last).sum(), last) == pytest.approx(3.0)
    assert balanced_weight((6 * last).sum(), (1e-9 * last).sum(), last) == 1e4


def test_augmentation_moves_pictures_and_passes_gradients() -> None:
    pictures = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    made = augmented(pictures, torch.Generator().manual_seed(1))
    again = augmented(pictures, torch.Generator().manual_seed(1))
    assert torch.equal(made, again)
    assert made.shape == pictures.shape
    empty = (made == 0).all(dim=1)  # what translation let in: whole rows or columns at the border, at most 2
    assert 0 < empty.float().mean() < 0.25
    made.sum().backward()
    assert pictures.grad is not None
    assert pictures.grad.abs().sum() > 0
