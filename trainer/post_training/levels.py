"""The canvases of every level as rows of numbers, and the moments of those of the shards.

    B images, L levels (coarse → fine), H×W grid, C channels, g rows and columns of pooled squares, D numbers of a row,
    K classes, n images of a class

No network is needed here: what a level should look like is known from the shards. Moments are sums over images in
float64, so those of two halves of the shards add up to those of the whole, and only sums are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from hierarchy_builder.errors import TrainerError, UsageError
from hierarchy_builder.files.whole import write_bytes
from trainer.data.normalisation import Normaliser
from trainer.data.reader import ShardReader
from trainer.data.shards import ShardIndex
from trainer.post_training.distance import Target
from trainer.post_training.moments import Sums
from trainer.training.checkpoint import load_tensors
from trainer.training.config import PostTrainingConfig
from trainer.training.distributed import World

READ_TOGETHER = 64
WIDEST = 4096
"""Most numbers of a row: the decomposition of a covariance takes their cube of operations at every step."""
PARTS = ("count", "total", "second")
"""The names of `Sums` in the file of the moments."""
CLASS_BYTES = 2**31
"""Most memory for the covariances of single classes of one space and level."""


class Space(NamedTuple):
    """One level, described in one way."""

    level: int
    kind: str
    """`tokens` or `pooled`."""

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.level}"

    def width(self, channels: int, pooled_grid: int) -> int:
        """D"""
        return channels if self.kind == "tokens" else pooled_grid**2 * channels

    def rows(self, canvases: Tensor, pooled_grid: int) -> Tensor:
        """Describe each image: canvases [B, L, H, W, C] → [B, H·W, C] tokens, or [B, 1, g²·C] means of squares."""
        canvas = canvases[:, self.level]
        if self.kind == "tokens":
            return canvas.flatten(1, 2)
        squares = F.adaptive_avg_pool2d(canvas.permute(0, 3, 1, 2), pooled_grid)
        return squares.permute(0, 2, 3, 1).flatten(1)[:, None]


def spaces_of(config: PostTrainingConfig, num_levels: int) -> list[Space]:
    """The spaces that a configuration names, those of one level after the other."""
    if not config.levels:
        return []
    return [Space(level, kind) for level in range(num_levels) for kind in config.spaces]


def check_widths(config: PostTrainingConfig, model: Any) -> None:
    """Raise UsageError for a space that is too wide to be decomposed at every step, or does not fit the grid."""
    grid = config.pooled_grid
    if "pooled" not in config.spaces:
        return
    if grid > min(model.grid):
        raise UsageError(f"pooled_grid is {grid}, expected at most {min(model.grid)}, the grid of the shards")
    if (width := grid**2 * model.in_channels) > WIDEST:
        most = int((WIDEST / model.in_channels) ** 0.5)
        advice = f"set pooled_grid={most}" if most else "set spaces=[tokens]"
        raise UsageError(
            f"pooled_grid {grid} describes an image of {model.in_channels} channels by {width} numbers, expected at "
            f"most {WIDEST}: {advice}"
        )


@dataclass(slots=True)
class LevelMoments:
    """Sums over real images, by space: of each class for the means, of all classes together for the covariance."""

    images: Tensor
    """Images of each class, float64 [K]."""
    sums: dict[str, Sums]
    """By name of a space: number [K] and Σx [K, D] of each class, Σxxᵀ of all [D, D] or of each class [K, D, D]."""

    def class_means(self, space: Space) -> Tensor:
        """The mean of each class, float64 [K, D]; 0 for a class without images."""
        count, total, _ = self.sums[space.name]
        return total / count.clamp(min=1)[:, None]

    def target(self, space: Space, classes: str) -> Target:
        """What samples are compared with: see `PostTrainingConfig.classes`.

        Raises TrainerError for `within` and `each` where no class has two images.
        """
        count, total, second = self.sums[space.name]
        whole = second.sum(dim=0) if second.ndim == 3 else second
        name = f"shards, {space.name}, {classes}"
        if classes == "all":
            return Target.of(*Sums(count.sum(), total.sum(dim=0), whole).moments(), name)
        means, images = self.class_means(space), float(self.images.sum())
        freedom = images - float((self.images > 0).sum())
        if freedom < 1:
            raise TrainerError(f"{name}: no class has two images, expected some: set classes=[all]")
        scatter = whole - (means.mT * count) @ means
        within = scatter / count.sum() * (images / freedom)
        if classes == "within":
            return Target.of(torch.zeros_like(means[0]), within, name)
        D = means.shape[1]
        own = Sums(count.clamp(min=1), total, second).moments().covariance
        trust = (self.images / (self.images + D))[:, None, None]
        return Target.of(means, trust * own + (1 - trust) * within, name)

    def save(self, path: Path) -> None:
        """Write all sums as safetensors."""
        tensors = {"images": self.images}
        for name, sums in self.sums.items():
            tensors |= {f"{name}/{part}": t.contiguous() for part, t in zip(PARTS, sums, strict=True)}
        write_bytes(path, save({name: tensor.cpu() for name, tensor in tensors.items()}))

    @classmethod
    def load(cls, path: Path, spaces: Sequence[Space]) -> LevelMoments:
        """Read what `save` wrote. Raises TrainerError for a damaged file, or one without these spaces."""
        tensors = load_tensors(path)
        try:
            sums = {s.name: Sums(*(tensors[f"{s.name}/{part}"] for part in PARTS)) for s in spaces}
            return cls(tensors["images"], sums)
        except KeyError as error:
            raise TrainerError(
                f"{path} holds no {error}: remove it, and it is computed from the shards again"
            ) from None


def moments_of_shards(
    index: ShardIndex,
    spaces: Sequence[Space],
    config: PostTrainingConfig,
    normaliser: Normaliser,
    world: World,
) -> LevelMoments:
    """Sum over all images of the shards, in one pass; the ranks share it. Canvases are in units of the network."""
    reader, starts = ShardReader(index), range(0, index.num_samples, READ_TOGETHER)
    by_class, K = "each" in config.classes, index.num_classes
    images = torch.zeros(K, dtype=torch.float64, device=world.device)
    found: dict[str, Sums] = {}
    for space in spaces:
        D = space.width(index.width, config.pooled_grid)
        if by_class and (needed := 8 * K * D**2) > CLASS_BYTES:
            raise UsageError(
                f"classes `each`: {K} covariances of {D} numbers take {needed / 2**30:.1f} GiB for each "
                f"level, expected at most {CLASS_BYTES / 2**30:.0f}: set classes=[all,within]"
            )
        shapes = ((K,), (K, D), (K, D, D) if by_class else (D, D))
        found[space.name] = Sums(*(images.new_zeros(shape) for shape in shapes))
    for start in starts[world.rank :: world.size]:
        stored = reader.read_rows(range(start, min(start + READ_TOGETHER, index.num_samples)))
        part = stored.to(world.device)
        canvases, label = part.canvases(normaliser), part.label
        images += torch.bincount(label, minlength=K)
        for space in spaces:
            rows = space.rows(canvases, config.pooled_grid).double()
            count, total, second = found[space.name]
            count += torch.bincount(label, minlength=K) * rows.shape[1]
            total.index_add_(0, label, rows.sum(dim=1))
            if by_class:
                second.index_add_(0, label, rows.mT @ rows)
            else:
                flat = rows.flatten(0, 1)
                second += flat.T @ flat
    reader.close()
    sums = {name: Sums(*map(world.sum, each)) for name, each in found.items()}
    return LevelMoments(world.sum(images), sums)
