"""Compare outlines of regions: do meaningful ones appear in a network's prediction before meaningless ones?

    H×W grid of tokens, K regions

An outline is the set of borders between neighbouring tokens (four neighbours) of different regions. Control partitions
have as many regions as the partition under test: `shifted` keeps shapes and sizes, `shuffled` only sizes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def boundary_f(a: Tensor, b: Tensor) -> float:
    """F of two outlines: 2·(borders of both) / (borders of a + borders of b), 1 for equal ones, 0 for disjoint ones.

    a, b: integer [H, W]. Two partitions without any border give 1.
    """
    ours, theirs = _borders(a), _borders(b)
    total = int(ours.sum() + theirs.sum())
    return 2 * int((ours & theirs).sum()) / total if total else 1.0


def shifted(regions: Tensor, generator: torch.Generator) -> Tensor:
    """Shift regions cyclically, which keeps their shapes and sizes. integer [H, W] → the same.

    The shift is drawn among those of at least a quarter of the grid along one side.
    """
    height, width = regions.shape
    moves = [
        (y, x)
        for y in range(height)
        for x in range(width)
        if min(y, height - y) * 4 >= height or min(x, width - x) * 4 >= width
    ]
    return regions.roll(moves[int(torch.randint(len(moves), (), generator=generator))], dims=(0, 1))


def shuffled(regions: Tensor, generator: torch.Generator) -> Tensor:
    """Assign tokens to regions at random, which keeps only sizes. integer [H, W] → the same."""
    order = torch.randperm(regions.numel(), generator=generator)
    return regions.flatten()[order].view_as(regions)


def tiles(count: int, grid: tuple[int, int]) -> Tensor:
    """Divide the grid into `count` rectangles of about equal size: int64 [H, W], ids 0 … count−1.

    The number of rows makes the rectangles as square as possible; rows differ by at most one rectangle.
    """
    height, width = grid
    rows = min(max(1, round(math.sqrt(count * height / width))), count, height)
    ids = torch.empty(grid, dtype=torch.int64)
    for row in range(rows):
        first, last = count * row // rows, count * (row + 1) // rows
        columns = torch.arange(width) * (last - first) // width
        ids[height * row // rows : height * (row + 1) // rows] = first + columns
    return ids


def _borders(regions: Tensor) -> Tensor:
    """Whether horizontal, then vertical neighbours are of different regions: bool, one-dimensional."""
    right, below = regions[:, 1:] != regions[:, :-1], regions[1:] != regions[:-1]
    return torch.cat([right.flatten(), below.flatten()])
