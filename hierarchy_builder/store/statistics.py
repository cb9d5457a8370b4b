"""Exact, mergeable statistics of the stored features: count, mean and sum of squared deviations in float64.

Blocks are merged over a fixed binary tree in block order, so any number of workers gives the same bytes.
Source: Chan, Golub and LeVeque (1979), pairwise update of mean and M2.

    H×W grid, C channels
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from hierarchy_builder.errors import BuilderError
from hierarchy_builder.files.untrusted.arrays import npz_of, parse_npz
from hierarchy_builder.files.whole import decoding, read_bytes, write_bytes
from hierarchy_builder.store.folder import BuildFolder

SCATTER_VALUES = 2**22
"""Values that a thread converts to float64 at a time (32 MiB); fixed, since the order of a sum changes its bits."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and M2 = Σ (x − mean)² of `count` arrays of one shape, both float64 of that shape.

    For vectors [C], m2 may instead be the scatter matrix Σ (x − mean)(x − mean)ᵀ [C, C], whose diagonal is M2.
    """

    count: int
    mean: np.ndarray
    m2: np.ndarray

    @property
    def variance(self) -> np.ndarray:
        """Population variance (or covariance) M2 / count; zeros when `count` is 0."""
        return self.m2 / self.count if self.count else np.zeros_like(self.m2)


def moments_of(values: np.ndarray, threads: int = 1) -> Moments:
    """Return the moments over the first axis of `values` [n, ..., C]; n may be 0.

    The bits do not depend on `threads`, since every thread takes all n vectors of a place.
    """
    rows = values.reshape(len(values), math.prod(values.shape[1:-1]), values.shape[-1])
    mean, m2 = np.zeros(rows.shape[1:]), np.zeros(rows.shape[1:])

    def sum_up(place: int) -> None:  # a whole block in float64 takes four times its memory
        wide = rows[:, place].astype(np.float64)
        mean[place] = wide.mean(axis=0)
        wide -= mean[place]
        m2[place] = np.einsum("nc,nc->c", wide, wide)

    if len(values):
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(sum_up, range(len(mean))))
    return Moments(len(values), mean.reshape(values.shape[1:]), m2.reshape(values.shape[1:]))


def scatter_of(features: np.ndarray, mean: np.ndarray, threads: int = 1) -> np.ndarray:
    """Return the scatter matrix Σ (x − mean)(x − mean)ᵀ of all tokens x: float64 [C, C], symmetric.

    features: [n, H, W, C], n may be 0. mean: float64 [C]. The bits do not depend on `threads`, since every thread sums
    whole images and the sums are added in order.
    """
    step = max(1, SCATTER_VALUES // features[:1].size) if len(features) else 1

    def part(start: int) -> np.ndarray:
        wide = features[start : start + step].reshape(-1, len(mean)).astype(np.float64)
        wide -= mean
        return wide.T @ wide

    total = np.zeros((len(mean), len(mean)))
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        for scatter in pool.map(part, range(0, len(features), step)):
            total += scatter
    return total


def merge(left: Moments, right: Moments) -> Moments:
    """Return the moments of the union of two disjoint sets."""
    if left.count == 0 or right.count == 0:
        return right if left.count == 0 else left
    count = left.count + right.count
    delta = right.mean - left.mean
    squares = delta**2 if left.m2.shape == delta.shape else np.outer(delta, delta)
    mean = left.mean + delta * (right.count / count)
    return Moments(count, mean, left.m2 + right.m2 + squares * (left.count * right.count / count))


def merge_tree(parts: Iterable[Moments]) -> Moments:
    """Merge at least one part over a binary tree; equal subtrees are merged as soon as both are complete.

    The tree depends only on the number of parts, and at most log2 of this number are in memory.
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
    """Pool the positions of moments [H, W, C]; returns moments [C]."""
    tokens = position.mean.reshape(-1, position.mean.shape[-1])
    squares = position.m2.reshape(tokens.shape)
    return merge_tree([Moments(position.count, mean, m2) for mean, m2 in zip(tokens, squares, strict=True)])


def joint_moments(position: Moments, scatter: np.ndarray) -> Moments:
    """Pool the positions of moments [H, W, C] as `per_channel` does, with the scatter matrix of the tokens as m2."""
    channel = per_channel(position)
    return Moments(channel.count, channel.mean, scatter)


def write_statistics(path: Path, position: Moments, joint: Moments | None = None) -> None:
    """Write statistics.npz, see `statistics_arrays`."""
    write_bytes(path, npz_of(**statistics_arrays(position, joint)))


def statistics_arrays(position: Moments, joint: Moments | None) -> dict[str, Any]:
    """Return the arrays of statistics.npz, which docs/formats.md lists.

    position: moments [H, W, C], from which those per channel follow. joint: moments of all tokens with their scatter
    matrix [C, C], from which `covariance` follows; without it there is none.
    """
    channel = per_channel(position)
    arrays: dict[str, Any] = {
        "count": np.int64(position.count),
        "mean": position.mean,
        "variance": position.variance,
        "m2": position.m2,
        "channel_count": np.int64(channel.count),
        "channel_mean": channel.mean,
        "channel_variance": channel.variance,
        "channel_m2": channel.m2,
    }
    if joint is not None:
        arrays["covariance"] = joint.variance
    return arrays


def write_part_moments(
    folder: BuildFolder, part: int, moments: Moments, scatter: np.ndarray | None = None
) -> str:
    """Write count, mean and M2 (float64 [H,W,C]) of the rows of a part. scatter: float64 [C,C] of its tokens.

    Returns the SHA-256 of the file.
    """
    arrays: dict[str, Any] = {"count": np.int64(moments.count), "mean": moments.mean, "m2": moments.m2}
    if scatter is not None:
        arrays["scatter"] = scatter
    content = npz_of(**arrays)
    write_bytes(folder.part_moments(part), content)
    return hashlib.sha256(content).hexdigest()


def read_part_moments(
    folder: BuildFolder, part: int, marker: Mapping[str, Any], *, joint: bool = False
) -> Moments:
    """Read what `write_part_moments` wrote; joint: as `joint_moments` of its tokens.

    Raises BuilderError when it is not what the part's marker tells, or holds no scatter matrix since the build began
    without --covariance.
    """
    path, names = folder.part_moments(part), ("count", "mean", "m2", "scatter")[: 4 if joint else 3]
    with decoding(path):
        content = read_bytes(path)
        expected = marker.get("moments_sha256")  # absent in builds of earlier releases
        if expected is not None and hashlib.sha256(content).hexdigest() != expected:
            raise ValueError("it is not the file that was written")
        stored = parse_npz(content, names)
    if missing := [name for name in names if name not in stored]:
        raise BuilderError(
            f"{path} has no {missing[0]}: a fused build takes --covariance only from its beginning, "
            "start it over with --fresh"
        )
    moments = Moments(int(stored["count"]), stored["mean"], stored["m2"])
    return joint_moments(moments, stored["scatter"]) if joint else moments
