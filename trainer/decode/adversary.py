"""The discriminator for adversarial training of a decoder: small heads on the features of a frozen ViT.

B pictures, h×w pixels, N tokens, D width of the ViT

Source: RAE (Zheng et al. 2025), after StyleGAN-T (Sauer et al. 2023): frozen DINO ViT-S/8 and convolutional heads
over tokens with spectral and batch normalisation, hinge losses, differentiable augmentation. Deviation: the heads
read blocks 3, 6, 9 and 12.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from hierarchy_builder.machine.transfers import sent
from hierarchy_builder.machine.vision_libraries import import_vision
from trainer.decode.rae import IMAGENET_MEAN, IMAGENET_STD
from trainer.training.release_files import check_weights, read_weights

BLOCKS = (2, 5, 8, 11)
KERNEL = 9
LARGEST_WEIGHT = 1e4
SHIFT = 0.125
"""Largest translation of the augmentation, as a share of the side."""


def frozen_vit(
    size_px: int = 224, patch_px: int = 8, width: int = 384, depth: int = 12, heads: int = 6
) -> Any:
    """A frozen ViT of timm, whose parameter names are those of DINO's checkpoints. The default is ViT-S/8 at 224 px."""
    module = import_vision("timm.models.vision_transformer")
    vit = module.VisionTransformer(
        img_size=size_px, patch_size=patch_px, embed_dim=width, depth=depth, num_heads=heads, num_classes=0
    )
    return vit.eval().requires_grad_(False)


class Discriminator(nn.Module):
    """Logits that a picture is real, one per head and token. The backbone is not part of the saved state."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Any, blocks: Sequence[int] = BLOCKS) -> None:
        super().__init__()
        self._held = [backbone]
        self._blocks = list(blocks)
        self.heads = nn.ModuleList(_head(backbone.embed_dim) for _ in blocks)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        """RGB pictures [B, 3, h, w] in [0, 1] → logits [B, heads · N]."""
        backbone = self._held[0].to(pictures.device)
        size = backbone.patch_embed.img_size
        x = F.interpolate(pictures, size, mode="bilinear", antialias=True, align_corners=False)
        features = backbone.forward_intermediates(
            (x - self.mean) / self.std, self._blocks, output_fmt="NLC", intermediates_only=True
        )
        logits = [head(f.mT) for head, f in zip(self.heads, features, strict=True)]
        return torch.cat([each.flatten(1) for each in logits], dim=1)


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x) + x) / 2**0.5


def _head(width: int) -> nn.Sequential:
    return nn.Sequential(
        _convolved(width, 1), _Residual(_convolved(width, KERNEL)), spectral_norm(nn.Conv1d(width, 1, 1))
    )


def _convolved(width: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv1d(width, width, kernel, padding=kernel // 2, padding_mode="circular")
    return nn.Sequential(spectral_norm(convolution), nn.BatchNorm1d(width), nn.LeakyReLU(0.2))


def load_discriminator(weights: str | Path) -> Discriminator:
    """A fresh discriminator on DINO's ViT-S/8. Raises MismatchError if the weights are of another network."""
    backbone, given = frozen_vit(), read_weights(Path(weights))
    expected = {name: tensor.shape for name, tensor in backbone.state_dict().items()}
    check_weights(f"{weights}, expected DINO's ViT-S/8,", given, expected)
    backbone.load_state_dict(given)
    return Discriminator(backbone)


def hinge_for_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Mean hinge loss of logits of real and decoded pictures."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def balanced_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """The weight of the adversarial loss that equalises the two gradients at the last layer, at most 1e4.

    Source: Esser et al. (2021), VQGAN, eq. 7.
    """
    a, b = (torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (reconstruction, adversarial))
    return (a.norm() / (b.norm() + 1e-6)).clamp(max=LARGEST_WEIGHT).detach()


def augmented(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Random brightness, saturation, contrast and translation of each picture [B, 3, h, w], differentiable.

    Source: Zhao et al. (2020), DiffAugment, without cutout.
    """
    B, _, height, width = pictures.shape
    device = pictures.device
    light, colour, contrast = torch.rand(3, B, 1, 1, 1, generator=generator, device=device)
    x = pictures + (light - 0.5)
    grey = x.mean(dim=1, keepdim=True)
    x = (x - grey) * (2 * colour) + grey
    middle = x.mean(dim=(1, 2, 3), keepdim=True)
    x = (x - middle) * (contrast + 0.5) + middle
    reach = sent(torch.tensor([int(SHIFT * height + 0.5), int(SHIFT * width + 0.5)]), device)
    shift = (torch.rand(B, 2, generator=generator, device=device) * (2 * reach + 1)).floor().long() - reach
    rows = torch.arange(height, device=device) + shift[:, :1]
    columns = torch.arange(width, device=device) + shift[:, 1:]
    near_rows, near_columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    inside = (rows == near_rows)[:, None, :, None] & (columns == near_columns)[:, None, None, :]
    batch = torch.arange(B, device=device)[:, None, None]
    moved = x.permute(0, 2, 3, 1)[batch, near_rows[:, :, None], near_columns[:, None, :]]
    return moved.permute(0, 3, 1, 2) * inside
