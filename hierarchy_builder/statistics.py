"""Exact, mergeable statistics of the stored features: count, mean and sum of squared deviations in float64.

Blocks are merged over a fixed binary tree in block order, so the result has the same bytes for any number of
workers. Source: Chan, Golub and LeVeque (1979), pairwise update of mean and M2.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hierarchy_builder.artefacts import write_bytes


@dataclass(frozen=True, slots=True)
class Moments:
    """Of `count` arrays of one shape: their mean and M2 = Σ (x − mean)², float64 of that shape."""

    count: int
    mean: np.ndarray
    m2: np.ndarray

    @property
    def variance(self) -> np.ndarray:
        """Population variance M2 / count; zeros when nothing was counted."""
        return self.m2 / self.count if self.count else np.zeros_like(self.m2)


def moments_of(values: np.ndarray) -> Moments:
    """Moments over the first axis of `values` [n, m, ...]; n may be 0."""
    count = len(values)
    mean, m2 = np.zeros(values.shape[1:]), np.zeros(values.shape[1:])
    if count == 0:
        return Moments(0, mean, m2)
    for place in range(values.shape[1]):  # float64 of a whole block would take four times its memory
        wide = values[:, place].astype(np.float64)
        mean[place] = wide.mean(axis=0)
        wide -= mean[place]
        m2[place] = np.einsum("n...,n...->...", wide, wide)
    return Moments(count, mean, m2)


def merge(left: Moments, right: Moments) -> Moments:
    """Moments of the union of two disjoint sets."""
    if left.count == 0 or right.count == 0:
        return right if left.count == 0 else left
    count = left.count + right.count
    delta = right.mean - left.mean
    mean = left.mean + delta * (right.count / count)
    return Moments(count, mean, left.m2 + right.m2 + delta**2 * (left.count * right.count / count))


def merge_tree(parts: Iterable[Moments]) -> Moments:
    """Merge equal subtrees as they fill up, like a binary counter; at least one part.

    The tree depends on the number of parts only, and no more than log2 of them are held at once.
    """
    waiting: list[tuple[int, Moments]] = []
    for part in parts:
        height = 0
        while waiting and waiting[-1][0] == height:
            part = merge(waiting.pop()[1], part)
            height += 1
        waiting.append((height, part))
    _, total = waiting.pop()
    while waiting:
        total = merge(waiting.pop()[1], total)
    return total


def per_channel(position: Moments) -> Moments:
    """Moments per channel [C] from moments per position and channel [H, W, C], positions pooled."""
    tokens = position.mean.reshape(-1, position.mean.shape[-1])
    squares = position.m2.reshape(tokens.shape)
    return merge_tree([Moments(position.count, mean, m2) for mean, m2 in zip(tokens, squares, strict=True)])


def write_statistics(path: Path, position: Moments) -> None:
    """Write statistics.npz: count, per-position mean and variance [H,W,C], per-channel mean and variance [C]."""
    channel = per_channel(position)
    buffer = io.BytesIO()
    np.savez(
        buffer,
        count=np.int64(position.count),
        mean=position.mean,
        variance=position.variance,
        m2=position.m2,
        channel_mean=channel.mean,
        channel_variance=channel.variance,
    )
    write_bytes(path, buffer.getvalue())
