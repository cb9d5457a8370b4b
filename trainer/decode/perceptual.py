"""LPIPS: a distance of pictures in the features of VGG16, by weights that are brought along.

B pictures, C channels, h×w pixels
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.errors import TrainerError
from trainer.training.release_files import check_weights, read_weights

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Width and number of the 3×3 convolutions between two poolings of VGG16; the last of each is compared."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of the network's input, for pictures in [−1, 1]."""
EPS = 1e-10
SUFFIXES = (".safetensors", ".pt", ".pth")
BACKBONE, HEADS = "vgg16", "lpips"


class Lpips(nn.Module):
    """Learned perceptual distance; frozen. Source: Zhang et al. (2018), LPIPS v0.1 with VGG16."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        widths = (3, *(width for width, _ in STAGES))
        self.layers = nn.ModuleList(
            _stage(before, *stage, pooled=number > 0)
            for number, (before, stage) in enumerate(zip(widths, STAGES, strict=False))
        )
        self.heads = nn.ParameterList(torch.ones(width) for width, _ in STAGES)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, pictures: Tensor, others: Tensor) -> Tensor:
        """Distance of each pair of RGB pictures [B, 3, h, w] in [0, 1]: float [B]."""
        a, b = ((2 * x - 1 - self.shift) / self.scale for x in (pictures, others))
        total = pictures.new_zeros(len(pictures))
        for layer, head in zip(self.layers, self.heads, strict=True):
            a, b = layer(a), layer(b)
            squares = (_unit(a) - _unit(b)).square().mean(dim=(2, 3))
            total = total + squares @ head.to(squares.dtype)
        return total


def _stage(width_before: int, width: int, count: int, *, pooled: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.MaxPool2d(2)] if pooled else []
    for number in range(count):
        layers += [nn.Conv2d(width if number else width_before, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


def _unit(features_BChw: Tensor) -> Tensor:
    return features_BChw / (torch.linalg.vector_norm(features_BChw, dim=1, keepdim=True) + EPS)


def load_lpips(folder: str | Path) -> Lpips:
    """LPIPS by the weights in a folder: `vgg16` as torchvision names them and `lpips`, the heads of version 0.1.

    Each file is .safetensors, .pt or .pth. Raises TrainerError when one is missing, MismatchError when it holds other
    tensors.
    """
    backbone, heads = (_read(Path(folder), name) for name in (BACKBONE, HEADS))
    lpips = Lpips()
    wanted: dict[str, Tensor] = {}
    number = 0
    for layer in lpips.layers:
        for module in layer.children():
            for kind, parameter in module.named_parameters():
                wanted[f"features.{number}.{kind}"] = parameter
            number += 1
    wanted |= {f"lin{i}.model.1.weight": head[None, :, None, None] for i, head in enumerate(lpips.heads)}
    given = {name: tensor for name, tensor in (backbone | heads).items() if name in wanted}
    check_weights(
        f"{folder}, expected VGG16 and LPIPS v0.1,", given, {name: own.shape for name, own in wanted.items()}
    )
    for name, own in wanted.items():
        own.copy_(given[name])
    return lpips


def _read(folder: Path, name: str) -> dict[str, Tensor]:
    found = [folder / f"{name}{suffix}" for suffix in SUFFIXES if (folder / f"{name}{suffix}").exists()]
    if not found:
        raise TrainerError(
            f"{folder}: found no {name} with one of {', '.join(SUFFIXES)}; LPIPS needs {BACKBONE} (torchvision's "
            f"weights) and {HEADS} (the heads), or train without lpips"
        )
    return read_weights(found[0])
