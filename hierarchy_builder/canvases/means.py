"""Builds level canvases: each token is replaced by the mean feature of its region.

The work runs on the device of the features, in one pass for all images. Each mean is summed in token order in float32,
so that its bits depend neither on the other images of the batch nor on region ids.

    N images, L levels (coarse → fine), H×W grid, C channels, K = largest region id + 1
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch.nn import functional as F

from hierarchy_builder.errors import BuilderError
from hierarchy_builder.machine.transfers import as_tensor

ArrayT = TypeVar("ArrayT", np.ndarray, torch.Tensor)


def level_canvases(features: ArrayT, regions: np.ndarray | torch.Tensor) -> ArrayT:
    """Canvases of all levels: levels l < L−1 hold region means of the raw features, level L−1 the features.

    features: float [N, H, W, C], numpy or torch. regions: integer [N, L−1, H, W], ids from 0.
    Returns [N, L, H, W, C] of the same kind, dtype and device as the features; differentiable in them.
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
    # The largest id is on the device, and reading it there would wait for all work before it; bytes have 256 values.
    is_away = tokens.device.type != "cpu" and regions.dtype == torch.uint8
    means, _, slots = _means(tokens, ids, 256 if is_away else None)
    rows = _token_rows(tokens)[:, None] + len(means)
    table = torch.cat([means.to(tokens.dtype), tokens.flatten(0, 2)])
    index = torch.cat([slots, rows], dim=1)
    canvases = table.index_select(0, index.flatten())
    canvases = canvases.view(num_images, index.shape[1], height, width, num_channels)
    return canvases.numpy() if isinstance(features, np.ndarray) else canvases


def region_means(features: ArrayT, regions: np.ndarray | torch.Tensor) -> tuple[ArrayT, ArrayT]:
    """Mean feature of each region of one level.

    features: float [N, H, W, C], numpy or torch. regions: integer [N, H, W], ids from 0.
    Returns means float32 [N, K, C] (row k belongs to region k; zeros if an image has no region k) and counts int64
    [N, K], the tokens of each region, of the same kind and device as the features.
    Raises BuilderError if the shapes do not fit.
    """
    tokens, ids = _as_tensors(features, regions)
    if ids.shape != tokens.shape[:3]:
        raise BuilderError(
            f"regions have shape {tuple(ids.shape)}, expected [N, H, W] = {tuple(tokens.shape[:3])} as the features"
        )
    means, counts, _ = _means(tokens, ids[:, None])
    means, counts = means.view(len(ids), -1, tokens.shape[3]), counts.view(len(ids), -1)
    return (means.numpy(), counts.numpy()) if isinstance(features, np.ndarray) else (means, counts)


def _as_tensors(
    features: np.ndarray | torch.Tensor, regions: np.ndarray | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, ids = (as_tensor(each) if isinstance(each, np.ndarray) else each for each in (features, regions))
    if tokens.ndim != 4:
        raise BuilderError(f"features have shape {tuple(tokens.shape)}, expected [N, H, W, C]")
    return tokens, ids.to(tokens.device, torch.int64)


def _token_rows(tokens_NHWC: torch.Tensor) -> torch.Tensor:
    num_images, height, width, _ = tokens_NHWC.shape
    rows = torch.arange(num_images * height * width, device=tokens_NHWC.device)
    return rows.view(num_images, height * width)


def _means(
    tokens_NHWC: torch.Tensor, ids_NSHW: torch.Tensor, num_regions: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means float32 [N·S·K, C] over the regions of S partitions, their counts, and the row of each token in the means.

    embedding_bag sums the tokens of each region in order. index_add would use atomics on a GPU, whose order differs
    between runs, and it is 2.5 times slower on a CPU.
    """
    num_images, num_partitions = ids_NSHW.shape[:2]
    if num_regions is None:
        num_regions = int(ids_NSHW.max()) + 1 if ids_NSHW.numel() else 1
    num_bags = num_images * num_partitions * num_regions
    bases = torch.arange(0, num_bags, num_regions, device=tokens_NHWC.device)
    slots = ids_NSHW.flatten(2) + bases.view(num_images, num_partitions, 1)
    flat = slots.flatten()
    counts = flat.new_zeros(num_bags).scatter_add_(0, flat, torch.ones_like(flat))  # bincount waits on a GPU
    order = torch.argsort(flat, stable=True)
    rows = _token_rows(tokens_NHWC)[:, None].expand_as(slots).flatten()[order]
    sums = F.embedding_bag(rows, tokens_NHWC.float().flatten(0, 2), counts.cumsum(0) - counts, mode="sum")
    return sums / counts.clamp(min=1)[:, None], counts, slots
