"""Batches in an order that is a pure function of (seed, epoch), for any number of ranks and threads.

Shards are permuted and grouped into windows of `shuffle_shards`; samples are shuffled within each window. A run is one
endless sequence of images, epoch after epoch, and global batch b holds places b·B to (b+1)·B of it. So a batch depends
neither on the number of ranks nor on that of reading threads, and a checkpoint only needs the number of images seen.
The level at which a sample is trained is a function of (seed, epoch, sample): within L epochs a sample gets all L
levels, in a random order of its own. `level_counts` audits that.

    B images in a global batch, b images of one rank in it, H×W grid, C channels, L levels
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hierarchy_builder.errors import TrainerError, UsageError
from hierarchy_builder.fields import brief
from hierarchy_builder.machine.process import ahead
from trainer.data.normalisation import RAW, Normaliser
from trainer.data.reader import Rows, ShardReader
from trainer.data.shards import ShardIndex

AHEAD_BYTES = 2**32
"""Limit of the memory for batches that are read ahead, per rank."""


@dataclass(kw_only=True, slots=True)
class Batch(Rows):
    """One rank's share of a global batch. A row of level l trains canvas l, given canvas l−1."""

    __repr__ = brief

    level: Tensor
    """int64 [b]"""

    def targets(self, normaliser: Normaliser = RAW) -> tuple[Tensor, Tensor, Tensor]:
        """(x, prev, regions) of each row's level: its canvas, the one before, and the level's region ids.

        Canvases are means of normalised features, computed on the device of the batch.
        x, prev: float32 [b, H, W, C], prev zeros at level 0. regions: uint8 [b, H, W]; the last level has
        none and repeats those of the level before.
        """
        canvases = self.canvases(normaliser)
        row = torch.arange(len(self), device=self.level.device)
        prev = canvases[row, (self.level - 1).clamp(min=0)]
        is_first = (self.level == 0)[:, None, None, None]
        regions = self.regions[row, self.level.clamp(max=self.regions.shape[1] - 1)]
        return canvases[row, self.level], prev.masked_fill(is_first, 0.0), regions


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamPlan:
    """Maps each place of a run to a sample and a level; small, picklable, reads no file."""

    __repr__ = brief

    shard_sizes: tuple[int, ...]
    """Number of samples in each shard."""
    num_levels: int
    batch_size: int
    """Images in a global batch."""
    seed: int = 0
    shuffle_shards: int = 64
    level_per: str = "sample"
    """`sample` draws a level for each sample and epoch, `batch` one for each global batch."""

    @property
    def num_samples(self) -> int:
        """Number of samples in an epoch."""
        return sum(self.shard_sizes)

    def places(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(sample, level), int64 [stop − start], at places `start` ≤ p < `stop` of the run."""
        place = np.arange(start, stop, dtype=np.int64)
        epoch, slot = place // self.num_samples, place % self.num_samples
        sample = np.empty_like(place)
        for number in np.unique(epoch):
            here = epoch == number
            order = epoch_order(self.shard_sizes, self.seed, int(number), self.shuffle_shards)
            sample[here] = order[slot[here]]
        if self.level_per == "batch":
            drawn = _hash(self.seed, place // self.batch_size, np.zeros_like(place))
            scaled = (drawn >> np.uint64(32)) * np.uint64(self.num_levels) >> np.uint64(32)
            return sample, scaled.astype(np.int64)
        return sample, self._levels(epoch, sample)

    def _levels(self, epoch: np.ndarray, sample: np.ndarray) -> np.ndarray:
        """Entry `epoch` modulo L of a random order of the levels, which each sample draws anew every L epochs.

        Levels are uniform in each epoch, as with independent draws; but with those, 38 % of the samples would still
        lack one of 4 levels after 8 epochs.
        """
        L = self.num_levels
        keys = [_hash(self.seed, epoch // L * L + turn, sample) for turn in range(L)]
        return np.argsort(np.stack(keys, axis=1), axis=1)[np.arange(len(sample)), epoch % L]

    def level_counts(self, start: int, stop: int) -> np.ndarray:
        """How often each sample is trained at each level between two places: int64 [num_samples, L]."""
        counts = np.zeros(self.num_samples * self.num_levels, dtype=np.int64)
        for begin in range(start, stop, self.num_samples):
            sample, level = self.places(begin, min(begin + self.num_samples, stop))
            counts += np.bincount(sample * self.num_levels + level, minlength=counts.size)
        return counts.reshape(self.num_samples, self.num_levels)


def coverage(counts: np.ndarray) -> dict[str, list[int]]:
    """Summarise `level_counts` [N, L]: images per level, samples by the number of their levels, and pairs of
    sample and level by how often they occurred."""
    met = np.bincount((counts > 0).sum(axis=1), minlength=counts.shape[1] + 1)
    return {
        "images_per_level": counts.sum(axis=0).tolist(),
        "samples_by_levels_met": met.tolist(),
        "pairs_by_times_met": np.bincount(counts.ravel()).tolist(),
    }


@lru_cache(maxsize=4)
def epoch_order(shard_sizes: tuple[int, ...], seed: int, epoch: int, shuffle_shards: int) -> np.ndarray:
    """Sample numbers of one epoch in training order, int64 [sum of shard_sizes], each once."""
    generator = np.random.default_rng([seed, epoch])
    starts = np.concatenate([[0], np.cumsum(shard_sizes, dtype=np.int64)])
    shards = generator.permutation(len(shard_sizes))
    windows = []
    for first in range(0, len(shards), shuffle_shards):
        window = [np.arange(starts[s], starts[s + 1]) for s in shards[first : first + shuffle_shards]]
        windows.append(generator.permutation(np.concatenate(window)))
    order = np.concatenate(windows)
    order.flags.writeable = False
    return order


def _hash(seed: int, epoch: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """uint64 hash of each (seed, epoch, sample): a round of SplitMix64 (Steele et al., 2014) for each part."""
    state = np.zeros(sample.shape, dtype=np.uint64)
    for part in (np.uint64(seed), epoch.astype(np.uint64), sample.astype(np.uint64)):
        state = (state ^ part) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state


class RankShare:
    """The share of every global batch that one rank reads; threads may read at the same time.

    verify: check the SHA-256 of each shard when it is first read. max_damaged: number of damaged shards to tolerate,
    see `ShardReader`; `damaged_shards` names them.
    Raises TrainerError for fewer samples than one batch, UsageError if the batch size is no multiple of the ranks.
    """

    def __init__(
        self,
        index: ShardIndex,
        plan: StreamPlan,
        rank: int = 0,
        world_size: int = 1,
        verify: bool = True,
        max_damaged: int = 0,
    ) -> None:
        if plan.num_samples < plan.batch_size:
            raise TrainerError(
                f"{index.url}: {plan.num_samples} samples to train on, fewer than one batch of {plan.batch_size}; "
                "lower batch_size or shard more images"
            )
        if plan.batch_size % world_size:
            raise UsageError(
                f"batch_size {plan.batch_size}, expected a multiple of the {world_size} processes"
            )
        self._index, self._plan, self._rank = index, plan, rank
        self._share = plan.batch_size // world_size
        # Ranks divide the checks of SHA-256, unless damaged shards are skipped: then every rank must find them itself.
        checked_by = 1 if max_damaged else world_size
        self._reader = ShardReader(
            index,
            verifies=lambda shard: verify and shard % checked_by == rank % checked_by,
            max_open=2 * plan.shuffle_shards,  # at the border of two windows, both are in use
            max_damaged=max_damaged,
        )

    def places(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples and levels of this rank in global batch `number`, int64 [B]."""
        start = number * self._plan.batch_size + self._rank * self._share
        return self._plan.places(start, start + self._share)

    def damaged_shards(self) -> list[str]:
        """Names of the damaged shards that this rank skipped."""
        return self._reader.damaged_shards()


class BatchDataset(RankShare):
    """Item n is rank `rank`'s share of global batch n, see `RankShare`."""

    def read(self, number: int, pin_memory: bool = False) -> Batch:
        """Read item `number`, into page-locked memory if `pin_memory`."""
        numbers, levels = self.places(number)
        rows = self._reader.read_rows(numbers.tolist(), pin_memory)
        stored: dict[str, Any] = {field.name: getattr(rows, field.name) for field in fields(rows)}
        return Batch(**stored, level=torch.from_numpy(levels))

    @property
    def num_bytes(self) -> int:
        """Approximate size of an item."""
        height, width = self._index.grid
        return self._share * height * width * (2 * self._index.width + self._index.num_levels)


def batch_loader(
    dataset: BatchDataset, batches: range, workers: int = 0, pin_memory: bool = False
) -> Iterator[Batch]:
    """Yield this rank's share of the global batches `batches`, in order.

    `workers` threads read ahead, two batches each or as many as fit into AHEAD_BYTES. They are threads so that a batch
    needs no copy: batches of other processes come through shared memory, and filling its pages took four times as
    long as reading. The interpreter's lock is no obstacle, since reading seldom holds it.
    """
    if not workers:
        yield from (dataset.read(number, pin_memory) for number in batches)
        return
    depth = max(workers, min(2 * workers, AHEAD_BYTES // dataset.num_bytes))
    with ThreadPoolExecutor(workers, thread_name_prefix="loader") as pool:
        yield from ahead(pool, partial(dataset.read, pin_memory=pin_memory), batches, depth - 1)
