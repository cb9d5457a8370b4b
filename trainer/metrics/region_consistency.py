"""Do levels agree with each other? Parent misrouting, and how close a level is to the average of the next.

    L levels (coarse → fine), H×W grid, N = H·W tokens, C channels, h×w pixels

Definitions, sources and deviations: docs/metrics.md. `trainer.metrics.regions.extract_regions` finds
the regions of generated canvases.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hierarchy_builder.canvases import region_means
from hierarchy_builder.errors import UsageError
from trainer.metrics.edit_locality import cosine_distance
from trainer.metrics.regions import extract_regions


def parent_misrouting(
    child_regions: Any, parent_regions: Any, child_features: Any = None
) -> dict[str, float]:
    """PMR between a level and a coarser one: {"spatial": …, "feature": …}, shares of tokens, lower is better.

    child_regions, parent_regions: integer [H, W], ids from 0; or [B, H, W], then the mean over images.
    child_features: float [H, W, C] or [B, H, W, C], the canvas of the child level; without it "feature" is NaN.
    The parent of a child region is the most frequent parent id of its tokens (the lowest of several). Spatial: tokens
    with another parent id. Feature: tokens nearer, by cosine, to the centre of another parent than to that of their
    child region's parent; the centre of a parent is the mean child feature over its tokens.
    Raises UsageError if shapes differ.
    Source: Trajectory Forcing (arXiv 2606.22527), parent misrouting rate.
    """
    child, parent = (_as_images(ids, 2) for ids in (child_regions, parent_regions))
    features = None if child_features is None else _as_images(child_features, 3)
    if child.shape != parent.shape or (features is not None and features.shape[:3] != child.shape):
        raise UsageError(
            f"child regions {tuple(child.shape)}, parent regions {tuple(parent.shape)}"
            + ("" if features is None else f", child features {tuple(features.shape)}")
            + ": expected [H, W], [H, W] and [H, W, C], or as many images of each"
        )
    spatial, feature = [], []
    for image in range(len(child)):
        own, expected = parent[image].flatten().long(), _expected_parent(child[image], parent[image])
        spatial.append(float((own != expected).double().mean()))
        if features is not None:
            feature.append(_nearer_to_another(features[image].flatten(0, 1).double(), own, expected))
    return {"spatial": _mean(spatial), "feature": _mean(feature)}


def misrouting_by_pair(levels: Tensor, regions: Tensor) -> dict[tuple[int, int], dict[str, float]]:
    """PMR of every pair (parent level, child level) of one trajectory.

    levels: float [L, H, W, C]. regions: integer [L−1, H, W]. On the last level each token is a region, so its
    spatial PMR is always 0.
    """
    height, width = regions.shape[1:]
    every = [*regions.long(), torch.arange(height * width).view(height, width)]
    return {
        (coarse, fine): parent_misrouting(every[fine], every[coarse], levels[fine])
        for fine in range(1, len(every))
        for coarse in range(fine)
    }


def level_consistency(levels: Tensor, regions: Tensor) -> dict[int, float]:
    """How close level ℓ is to the average of level ℓ+1: mean over tokens of 1 − cos between their region's two means.

    levels: float [L, H, W, C]. regions: integer [L−1, H, W], of level ℓ. The result is 0 for teachers.
    """
    means = _paired_means(levels.float(), regions)
    return {level: float(cosine_distance(own.double(), finer.double()).mean()) for level, own, finer in means}


def decoded_consistency(pictures: np.ndarray, regions: Tensor) -> dict[int, float]:
    """The same for decoded levels: mean absolute difference between the two mean colours of a pixel's region.

    pictures: uint8 [L, h, w, 3], h and w multiples of H and W. Values from 0 to 1.
    """
    tall, wide = pictures.shape[1] // regions.shape[1], pictures.shape[2] // regions.shape[2]
    pixels = regions.repeat_interleave(tall, dim=1).repeat_interleave(wide, dim=2)
    colours = torch.from_numpy(pictures.astype(np.float32) / 255)
    return {level: float((own - finer).abs().mean()) for level, own, finer in _paired_means(colours, pixels)}


def consistency(
    trajectories: Iterable[tuple[Tensor, np.ndarray | None]], suffix: str = ""
) -> Iterator[tuple[str, float]]:
    """(name, value) of all these metrics, averaged over trajectories, as `trainer evaluate` prints them.

    trajectories: (levels [L, H, W, C], decoded uint8 [L, h, w, 3] or None); regions are found in the levels.
    Names: pmr_spatial_<parent>_<child>, pmr_feature_<parent>_<child>, level_consistency_<ℓ>, decoded_consistency_<ℓ>.
    The last level, whose regions are single tokens, has no spatial PMR.
    """
    measured: dict[str, list[float]] = {}
    for levels, pictures in trajectories:
        regions = extract_regions(levels)
        found: dict[str, float] = {}
        for (coarse, fine), rates in misrouting_by_pair(levels, regions).items():
            kinds = ("feature",) if fine == len(levels) - 1 else ("spatial", "feature")
            found |= {f"pmr_{kind}_{coarse}_{fine}": rates[kind] for kind in kinds}
        of_levels = {"level": level_consistency(levels, regions)}
        if pictures is not None:
            of_levels["decoded"] = decoded_consistency(pictures, regions)
        for kind, values in of_levels.items():
            found |= {f"{kind}_consistency_{level}": value for level, value in values.items()}
        for name, value in found.items():
            measured.setdefault(name, []).append(value)
    for name, every in measured.items():
        yield f"{name}{suffix}", _mean(every)


def _as_images(values: Any, dimensions: int) -> Tensor:
    tensor = torch.as_tensor(np.asarray(values) if not isinstance(values, Tensor) else values).detach().cpu()
    return tensor[None] if tensor.ndim == dimensions else tensor


def _expected_parent(child_HW: Tensor, parent_HW: Tensor) -> Tensor:
    """The parent of each token's child region, int64 [N]."""
    child, parent = child_HW.flatten().long(), parent_HW.flatten().long()
    num_parents = int(parent.max()) + 1
    table = torch.bincount(child * num_parents + parent, minlength=(int(child.max()) + 1) * num_parents)
    return table.view(-1, num_parents).argmax(dim=1)[child]


def _nearer_to_another(tokens_NC: Tensor, own_N: Tensor, expected_N: Tensor) -> float:
    present, own = own_N.unique(return_inverse=True)
    sums = torch.zeros(len(present), tokens_NC.shape[1], dtype=torch.float64).index_add_(0, own, tokens_NC)
    centres = sums / torch.bincount(own)[:, None]
    distance_NK = cosine_distance(tokens_NC[:, None], centres[None])
    to_expected = distance_NK.gather(1, torch.searchsorted(present, expected_N)[:, None])
    return float((distance_NK < to_expected).any(dim=1).double().mean())


def _paired_means(images: Tensor, regions: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(ℓ, own, finer): for each place, the mean of its region of level ℓ in image ℓ and in image ℓ+1, [n, C] each."""
    for level, ids in enumerate(regions.long()):
        means, _ = region_means(images[level : level + 2], torch.stack([ids, ids]))
        yield level, means[0, ids.flatten()], means[1, ids.flatten()]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
