"""LPIPS, a distance of pictures in the feature space of VGG16; the user supplies the weights.

B pictures, C channels, h×w pixels
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from hierarchy_builder.errors import TrainerError
from hierarchy_builder.vision_libraries import import_vision
from trainer.training.release_files import check_weights, read_weights

COMPARED = (3, 8, 15, 22, 29)
"""Layers of torchvision's VGG16 whose output is compared: the last ReLU before each pooling."""
WIDTHS = (64, 128, 256, 512, 512)
"""Channels of these layers."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Normalisation of the network's input, for pictures in [−1, 1]."""
EPS = 1e-10
SUFFIXES = (".safetensors", ".pt", ".pth")
BACKBONE, HEADS = "vgg16", "lpips"


class Lpips(nn.Module):
    """Learned perceptual distance; frozen. Source: Zhang et al. (2018), LPIPS v0.1 with VGG16."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        vgg = import_vision("torchvision.models.vgg")
        self.features = vgg.make_layers(vgg.cfgs["D"])
        self.heads = nn.ParameterList(torch.ones(width) for width in WIDTHS)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, pictures: Tensor, others: Tensor) -> Tensor:
        """Distance of each pair of RGB pictures [B, 3, h, w] in [0, 1]: float [B]."""
        a, b = ((2 * x - 1 - self.shift) / self.scale for x in (pictures, others))
        total = pictures.new_zeros(len(pictures))
        heads = iter(self.heads)
        for number, layer in enumerate(self.features[: COMPARED[-1] + 1]):
            a, b = layer(a), layer(b)
            if number in COMPARED:
                squares = (_unit(a) - _unit(b)).square().mean(dim=(2, 3))
                total = total + squares @ next(heads).to(squares.dtype)
        return total


def _unit(features_BChw: Tensor) -> Tensor:
    return features_BChw / (torch.linalg.vector_norm(features_BChw, dim=1, keepdim=True) + EPS)


def load_lpips(folder: str | Path) -> Lpips:
    """LPIPS with the weights in a folder: `vgg16` under torchvision's names, and `lpips`, the heads of version 0.1.

    Each file is .safetensors, .pt or .pth. Raises TrainerError if one is missing, MismatchError if its tensors differ.
    """
    backbone, heads = (_read(Path(folder), name) for name in (BACKBONE, HEADS))
    lpips = Lpips()
    wanted = {f"features.{name}": own for name, own in lpips.features.named_parameters()}
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
