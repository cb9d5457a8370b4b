"""Networks that describe decoded pictures, so that their statistics can be compared: judges.

    B pictures, [B, 3, h, w] RGB in [0, 1]    D numbers of a picture

Six judges of the paper are known by name, with its pre-processing: bicubic resize with antialiasing, not aligned at
corners, then the mean and standard deviation of the network; Inception resizes bilinearly as TensorFlow 1 does, to
299 px.
`sim` is the set that Trajectory Forcing is post-trained with: siglip, mae and inception. Any encoder of
hierarchy_builder is a judge by the mean of its tokens, and `module:function` by what that function returns.

Source: "Representation Fréchet Loss for Visual Generation", arXiv 2604.28190, and its release for files and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hierarchy_builder.errors import MismatchError, TrainerError, UsageError
from hierarchy_builder.machine.vision_libraries import import_vision, timm_model
from trainer.data.pictures import picture_of
from trainer.data.reader import ShardReader
from trainer.data.shards import ShardIndex
from trainer.metrics.frechet import Gaussian, Moments, load_inception
from trainer.post_training.bundle import read_statistics
from trainer.trajectories.photos import encoded_by, load_own_encoder

SIM = ("siglip", "mae", "inception")
READ_TOGETHER = 32


@dataclass(frozen=True, slots=True)
class Known:
    """A judge of the paper: its network, and what is published with it."""

    network: str
    """Name in timm; of Inception, the file of its weights."""
    of_validation: float
    """Distance of ImageNet's validation images from its statistics, as published."""
    size_px: int = 224
    """Side to which pictures are resized."""
    pool: str = "cls"
    """How tokens become one vector: `cls`, the class token or else the attention pool; `mean` over space."""
    file: str = ""
    """Name of its statistics of ImageNet at 256 px in the release, where it does not follow from the network's."""

    @property
    def statistics(self) -> str:
        """Name of its statistics of ImageNet at 256 px in the release."""
        return self.file or f"{self.network.replace('.', '_')}_in256_t{self.size_px}_stats.npz"


KNOWN = {
    "siglip": Known("vit_so400m_patch16_siglip_256.v2_webli", 0.60),
    "mae": Known("vit_large_patch16_224.mae", 0.04),
    "inception": Known("weights-inception-2015-12-05", 1.68, 299, "mean", "guided_diffusion_stats.npz"),
    "convnext": Known(
        "convnextv2_base.fcmae_ft_in22k_in1k", 56.87, pool="mean", file="convnext_in256_t224_stats.npz"
    ),
    "dinov2": Known("vit_large_patch14_dinov2.lvd142m", 14.19, size_px=256),
    "clip": Known("vit_large_patch14_clip_224.openai", 5.60, size_px=256),
}


@dataclass(kw_only=True, slots=True)
class Judge:
    """A network that describes pictures, [B, 3, h, w] in [0, 1] → float32 [B, D], and what it compares them with."""

    name: str
    describe: Callable[[Tensor], Tensor]
    weight: float = 1.0
    reference: Gaussian | None = None
    """Statistics of real images; None until they are computed from shards."""
    of_validation: float | None = None
    """Distance of validation images from the reference, where it is published."""


def parse_judges(texts: Sequence[str]) -> dict[str, float]:
    """Weights by name, of NAME or NAME=WEIGHT; `sim` stands for three. Raises UsageError for another form."""
    found: dict[str, float] = {}
    for text in texts:
        name, equals, number = text.partition("=")
        try:
            weight = float(number) if equals else 1.0
        except ValueError:
            weight = math.nan
        if not name or not 0 < weight < math.inf:
            raise UsageError(
                f"judge {text!r}, expected NAME or NAME=WEIGHT with a weight above 0, such as mae=0.5"
            )
        for each in SIM if name == "sim" else (name,):
            if each in found:
                raise UsageError(f"judge {each} is named twice, expected once")
            found[each] = weight
    return found


def load_judges(
    texts: Sequence[str],
    files: Mapping[str, str],
    references: Mapping[str, str],
    device: torch.device | str,
    differentiable: bool,
) -> list[Judge]:
    """Load judges with the references that are given.

    files, references: by name. differentiable: refuse judges without a gradient. Raises UsageError for a file of a
    judge that is not named, TrainerError or UsageError where weights cannot be loaded, MismatchError where a reference
    has another width than the judge.
    """
    weights = parse_judges(texts)
    for given in (*files, *references):
        if given not in weights:
            raise UsageError(
                f"a file is given for the judge {given}, the judges are {', '.join(weights) or 'none'}"
            )
    judges = []
    for name, weight in weights.items():
        known, file = KNOWN.get(name), files.get(name)
        describe: Callable[[Tensor], Tensor]
        if name == "inception":
            describe = Inception(file).to(device)
        elif known:
            describe = TimmJudge(name, known, file).to(device)
        else:
            describe = _own(name, file, differentiable)
        judge = Judge(
            name=name, describe=describe, weight=weight, of_validation=known.of_validation if known else None
        )
        if (path := references.get(name)) is not None:
            judge.reference = read_statistics(path, known.statistics if known else None)
            with torch.no_grad():
                width = describe(torch.zeros(1, 3, 256, 256, device=device)).shape[1]
            if len(judge.reference.mean) != width:
                raise MismatchError(
                    f"reference statistics {path} are of {len(judge.reference.mean)} numbers, the judge {name} "
                    f"describes a picture by {width}: give those of the same network"
                )
        judges.append(judge)
    return judges


def statistics_of_shards(
    judge: Judge,
    index: ShardIndex,
    size_px: tuple[int, int],
    numbers: Sequence[int],
    device: torch.device | str,
) -> Gaussian:
    """The statistics of the pictures in shards, resized to (h, w), with divisor N−1. numbers: of the samples.

    Raises TrainerError if the shards hold no pictures.
    """
    moments: Moments | None = None
    reader = ShardReader(index)
    for start in range(0, len(numbers), READ_TOGETHER):
        samples = [reader.read(number, extras=True) for number in numbers[start : start + READ_TOGETHER]]
        pictures = torch.stack([torch.tensor(picture_of(sample, size_px)) for sample in samples])
        with torch.no_grad():
            rows = judge.describe(pictures.to(device).permute(0, 3, 1, 2).float() / 255)
        moments = moments or Moments(rows.shape[1])
        moments.add(rows)
    reader.close()
    assert moments is not None
    return moments.gaussian()


class TimmJudge(nn.Module):
    """A network of timm as the paper uses it; frozen."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, known: Known, file: str | None) -> None:
        super().__init__()
        self.known = known
        self.model = _timm_model(name, known.network, file).eval().requires_grad_(False)
        config: Any = self.model.pretrained_cfg
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(config[key])[:, None, None], persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        """[B, 3, h, w] in [0, 1] → float32 [B, D]"""
        size = (self.known.size_px, self.known.size_px)
        x = F.interpolate(pictures, size, mode="bicubic", align_corners=False, antialias=True).float()
        return pooled(self.model, self.model.forward_features((x - self.mean) / self.std), self.known.pool)


def pooled(model: Any, tokens: Tensor, pool: str) -> Tensor:
    """One vector for each picture: tokens [B, N, D] or a map [B, D, h, w] → [B, D]; see `Known.pool`."""
    if tokens.ndim == 4:
        return tokens.mean(dim=(2, 3))
    prefix = getattr(model, "num_prefix_tokens", 0)
    if pool == "cls" and prefix:
        return tokens[:, 0]
    if pool == "cls" and getattr(model, "attn_pool", None) is not None:
        return model.attn_pool(tokens)
    return tokens[:, prefix:].mean(dim=1)


def _timm_model(name: str, network: str, file: str | None) -> Any:
    """A network with all its weights, from a file or the hub."""
    is_vit = network.startswith("vit_")
    sizes: dict[str, Any] = {"dynamic_img_size": True, "dynamic_img_pad": True} if is_vit else {}
    try:
        if file is None:
            return import_vision("timm").create_model(network, pretrained=True, num_classes=0, **sizes)
        return timm_model(network, Path(file), **sizes)
    except Exception as error:  # each file format, and the hub, raises its own exceptions
        reason = " ".join(str(error).partition(". ")[0].split())[:300]
        raise TrainerError(
            f"judge {name}: no weights of {network} from {file or 'the hub'}: {reason}; give a file that holds all of "
            f"them by --judge-file {name}=FILE"
        ) from None


class Inception(nn.Module):
    """torch-fidelity's Inception-v3 for FID, with its gradient; frozen."""

    LAYERS = (
        *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3"),
        *("MaxPool_2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d"),
        *("Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c"),
    )

    def __init__(self, file: str | None) -> None:
        super().__init__()
        self.model = load_inception(["2048"], file, "judge inception", "give --judge-file inception=FILE")
        self.model.eval().requires_grad_(False)

    def forward(self, pictures: Tensor) -> Tensor:
        """[B, 3, h, w] in [0, 1] → float32 [B, 2048]"""
        x = 2 * resized_as_tensorflow(pictures.float(), 299) - 1
        for name in self.LAYERS:
            x = getattr(self.model, name)(x)
        return x.mean(dim=(2, 3))


def resized_as_tensorflow(pictures: Tensor, side_px: int) -> Tensor:
    """Resize [B, C, h, w] bilinearly as TensorFlow 1 does: pixel i is taken at i·h/side, without antialiasing."""
    for dim in (2, 3):
        length = pictures.shape[dim]
        places = torch.arange(side_px, device=pictures.device) * (length / side_px)
        low = places.floor().long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        share = (places - low).to(pictures.dtype)
        share = share[:, None] if dim == 2 else share
        before = pictures.index_select(dim, low)
        pictures = before + (pictures.index_select(dim, high) - before) * share
    return pictures


def _own(name: str, file: str | None, differentiable: bool) -> Callable[[Tensor], Tensor]:
    """An encoder by the mean of its tokens."""
    encoder: Any = load_own_encoder(name, file)
    side = (encoder.image_size_px, encoder.image_size_px)
    keeps_gradient = hasattr(encoder, "tokens")
    if differentiable and not keeps_gradient:
        raise UsageError(
            f"judge {name}: {type(encoder).__name__} has no method `tokens` ([B, 3, S, S] in [0, 1] → tokens) that "
            "keeps the gradient, so it can judge (`trainer evaluate --fdr`), but not train"
        )

    def described(pictures: Tensor) -> Tensor:
        resized = F.interpolate(pictures, side, mode="bicubic", antialias=True).clamp(0, 1)
        if keeps_gradient:
            tokens: Tensor = encoder.tokens(resized)
            return tokens.mean(dim=(1, 2))
        pixels = (resized * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return torch.from_numpy(encoded_by(encoder, pixels)).mean(dim=(1, 2)).to(pictures.device)

    return described
