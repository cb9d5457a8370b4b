"""Regions × features → level canvases: each token replaced by the mean over its region.

Runs on whatever device the features are on, in one pass per level over all images. Each mean is summed in
token order in float32, so its bits depend neither on the other images of the batch nor on region ids.

    N images, L levels (coarse → fine), H×W grid, C channels, K = largest region id + 1
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch.nn import functional as F

from hierarchy_builder.errors import BuilderError

ArrayT = TypeVar("ArrayT", np.ndarray, torch.Tensor)


def level_canvases(features: ArrayT, regions: np.ndarray | torch.Tensor) -> ArrayT:
    """Canvases of all levels: level l < L−1 holds region means of the raw features, level L−1 the features.

    features: float [N, H, W, C], numpy or torch. regions: integer [N, L−1, H, W], ids from 0.
    Returns [N, L, H, W, C] of the features' kind, dtype and device; differentiable in the features.
    Raises BuilderError if the shapes do not fit.
    Source: Trajectory Forcing (arXiv 2606.22527), level canvases.
    """
    tokens, ids = _as_tensors(features, regions)
    num_images, height, width, num_channels = tokens.shape
    if ids.ndim != 4 or ids.shape[0] != num_images or ids.shape[2:] != (height, width):
        raise BuilderError(
            f"regions have shape {tuple(ids.shape)}, expected [N, L−1, H, W] = "
            f"[{num_images}, L−1, {height}, {width}] for features of shape {tuple(tokens.shape)}"
        )
    means, _, slots = _means(tokens, ids)
    rows = _token_rows(tokens)[:, None] + len(means)
    table = torch.cat([means.to(tokens.dtype), tokens.flatten(0, 2)])
    index = torch.cat([slots, rows], dim=1)
    canvases = table.index_select(0, index.flatten())
    canvases = canvases.view(num_images, index.shape[1], height, width, num_channels)
    return canvases.numpy() if isinstance(features, np.ndarray) else canvases


def region_means(features: ArrayT, regions: np.ndarray | torch.Tensor) -> tuple[ArrayT, ArrayT]:
    """Mean feature of every region of one level.

    features: float [N, H, W, C], numpy or torch. regions: integer [N, H, W], ids from 0.
    Returns means float32 [N, K, C], row k of region k (zeros where an image has no region k), and counts
    int64 [N, K], tokens of each region; of the features' kind and device.
    Raises BuilderError if the shapes do not fit.
    """
    tokens, ids = _as_tensors(features, regions)
    if ids.shape != tokens.shape[:3]:
        raise BuilderError(
            f"regions have shape {tuple(ids.shape)}, expected [N, H, W] = {tuple(tokens.shape[:3])} of the features"
        )
    means, counts, _ = _means(tokens, ids[:, None])
    means, counts = means.view(len(ids), -1, tokens.shape[3]), counts.view(len(ids), -1)
    return (means.numpy(), counts.numpy()) if isinstance(features, np.ndarray) else (means, counts)


def _as_tensors(
    features: np.ndarray | torch.Tensor, regions: np.ndarray | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, ids = (
        # A writable copy only where needed: torch warns of read-only memory.
        torch.from_numpy(np.require(array, requirements=["C", "W"]))
        if isinstance(array, np.ndarray)
        else array
        for array in (features, regions)
    )
    if tokens.ndim != 4:
        raise BuilderError(f"features have shape {tuple(tokens.shape)}, expected [N, H, W, C]")
    return tokens, ids.to(tokens.device, torch.int64)


def _token_rows(tokens_NHWC: torch.Tensor) -> torch.Tensor:
    num_images, height, width, _ = tokens_NHWC.shape
    rows = torch.arange(num_images * height * width, device=tokens_NHWC.device)
    return rows.view(num_images, height * width)


def _means(
    tokens_NHWC: torch.Tensor, ids_NSHW: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means float32 [N·S·K, C] over the regions of S partitions, their counts, and each token's row in them.

    One bag of token rows per region, summed in order: index_add would use atomics on a GPU, whose order
    changes from run to run, and is 2.5 times slower on a CPU.
    """
    num_images, num_partitions = ids_NSHW.shape[:2]
    num_regions = int(ids_NSHW.max()) + 1 if ids_NSHW.numel() else 1
    num_bags = num_images * num_partitions * num_regions
    bases = torch.arange(0, num_bags, num_regions, device=tokens_NHWC.device)
    slots = ids_NSHW.flatten(2) + bases.view(num_images, num_partitions, 1)
    counts = torch.bincount(slots.flatten(), minlength=num_bags)
    order = torch.argsort(slots.flatten(), stable=True)
    rows = _token_rows(tokens_NHWC)[:, None].expand_as(slots).flatten()[order]
    sums = F.embedding_bag(rows, tokens_NHWC.float().flatten(0, 2), counts.cumsum(0) - counts, mode="sum")
    return sums / counts.clamp(min=1)[:, None], counts, slots
