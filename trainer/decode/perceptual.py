"""LPIPS, a distance of pictures in the feature space of VGG16; the user supplies the weights.

B pictures, C channels, h×w pixels
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from hierarchy_builder.errors import TrainerError
from hierarchy_builder.machine.vision_libraries import import_vision
from trainer.training.release_files import check_weights, read_weights

COMPARED = (3, 8, 15, 22, 29)
"""Layers of torchvision's VGG16 whose output is compared: the last ReLU before each pooling."""
WIDTHS = (64, 128, 256, 512, 512)
"""Channels of these layers."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Normalisation of the network's input, for pictures in [−1, 1]."""
EPS = 1e-10
SUFFIXES = (".safetensors", ".pt", ".pth")
BACKBONE, HEADS = ("vgg16",), ("lpips", "vgg")
"""Names of the two files, ours first."""
PUBLISHED = (
    "Published: VGG16 at https://download.pytorch.org/models/vgg16-397923af.pth, the heads as "
    "lpips/weights/v0.1/vgg.pth in https://github.com/richzhang/PerceptualSimilarity"
)


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
    """LPIPS with the weights in a folder: VGG16 under torchvision's names, and the heads of version 0.1.

    The files are .safetensors, .pt or .pth, and keep the names they are published under: `vgg16`, torchvision's
    `vgg16-<hash>`; `lpips`, or `vgg` of the package lpips. Raises TrainerError if one is missing, MismatchError if its
    tensors differ.
    """
    backbone, heads = _found(Path(folder), BACKBONE), _found(Path(folder), HEADS)
    tensors = _read(backbone) | _read(heads)
    lpips = Lpips()
    wanted = {f"features.{name}": own for name, own in lpips.features.named_parameters()}
    wanted |= {f"lin{i}.model.1.weight": head[None, :, None, None] for i, head in enumerate(lpips.heads)}
    given = {name: tensor for name, tensor in tensors.items() if name in wanted}
    check_weights(
        f"{folder} ({backbone.name}, {heads.name}), expected VGG16 and LPIPS v0.1,",
        given,
        {name: own.shape for name, own in wanted.items()},
        advice=PUBLISHED,
    )
    for name, own in wanted.items():
        own.copy_(given[name])
    return lpips


def _found(folder: Path, names: tuple[str, ...]) -> Path:
    """The file of a folder with one of these names, or with a hash of its content after it, as torchvision adds."""
    for name in names:
        for suffix in SUFFIXES:
            places = [folder / f"{name}{suffix}", *sorted(folder.glob(f"{name}-*{suffix}"))]
            if there := next((place for place in places if place.exists()), None):
                return there
    if folder.is_dir():
        held = ", ".join(sorted(file.name for file in folder.iterdir())[:5]) or "nothing"
        fault = f"found no {names[0]} with one of {', '.join(SUFFIXES)}; the folder holds {held}"
    else:
        fault = f"{'found a file' if folder.exists() else 'found nothing'}, expected a folder of two files"
    raise TrainerError(
        f"{folder}: {fault}. LPIPS needs {BACKBONE[0]} (torchvision's weights) and {HEADS[0]} "
        f"(the heads), or train without lpips. {PUBLISHED}"
    )


def _read(file: Path) -> dict[str, Tensor]:
    """Tensors of a file; the heads of a whole saved LPIPS network are called `lins.N` there instead of `linN`."""
    return {re.sub(r"^lins\.", "lin", name): tensor for name, tensor in read_weights(file).items()}
