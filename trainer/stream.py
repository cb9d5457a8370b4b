"""Shards → batches: an order that is a pure function of (seed, epoch), read by any number of processes.

Shards are permuted, taken in windows of `shuffle_shards`, and samples are shuffled within each window. The
run is one endless line of images: epoch 0 in its order, then epoch 1 in its own, and global batch b is places
b·B to (b+1)·B of that line. So a batch depends neither on the number of ranks nor of reading processes, and
the number of images seen is all a checkpoint has to keep. The level a sample is trained at is a hash of (seed,
epoch, sample); `level_counts` audits that every sample meets every level.

    B images in a global batch, b images of one rank in it, H×W grid, C channels, L levels
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from hierarchy_builder.canvases import level_canvases
from trainer.errors import TrainerError, UsageError
from trainer.shards import ShardIndex, ShardReader


@dataclass(kw_only=True, slots=True)
class Batch:
    """One rank's share of a global batch. Level l asks for canvas l, given canvas l−1."""

    features: Tensor
    """float16 [b, H, W, C]"""
    regions: Tensor
    """uint8 [b, L−1, H, W]"""
    label: Tensor
    """int64 [b]"""
    level: Tensor
    """int64 [b]"""
    keys: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, start: int, stop: int) -> Batch:
        """Rows `start` ≤ i < `stop`."""
        return self._map(lambda tensor: tensor[start:stop], self.keys[start:stop])

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True), self.keys)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by the loader)."""
        return self._map(Tensor.pin_memory, self.keys)

    def targets(self) -> tuple[Tensor, Tensor, Tensor]:
        """(x, prev, regions) of each row's level: its canvas, the one before, and the level's region ids.

        x, prev: float32 [b, H, W, C], prev zeros at level 0. regions: uint8 [b, H, W]; the last level, which has
        none, repeats those of the level before.
        """
        canvases = level_canvases(self.features.float(), self.regions)
        row = torch.arange(len(self), device=self.level.device)
        prev = canvases[row, (self.level - 1).clamp(min=0)]
        is_first = (self.level == 0)[:, None, None, None]
        regions = self.regions[row, self.level.clamp(max=self.regions.shape[1] - 1)]
        return canvases[row, self.level], prev.masked_fill(is_first, 0.0), regions

    def _map(self, change: Callable[[Tensor], Tensor], keys: list[str]) -> Batch:
        return Batch(
            features=change(self.features),
            regions=change(self.regions),
            label=change(self.label),
            level=change(self.level),
            keys=keys,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamPlan:
    """Which sample and level stands at which place of the run; small, picklable, reads no file."""

    shard_sizes: tuple[int, ...]
    """Samples in each shard."""
    num_levels: int
    batch_size: int
    """Images in a global batch."""
    seed: int = 0
    shuffle_shards: int = 64
    level_per: str = "sample"
    """`sample` draws a level for each sample and epoch, `batch` one for each global batch."""

    @property
    def num_samples(self) -> int:
        """Samples in an epoch."""
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
        else:
            drawn = _hash(self.seed, epoch, sample)
        return sample, ((drawn >> np.uint64(32)) * np.uint64(self.num_levels) >> np.uint64(32)).astype(
            np.int64
        )

    def level_counts(self, start: int, stop: int) -> np.ndarray:
        """How often each sample meets each level between two places: int64 [num_samples, L]."""
        counts = np.zeros(self.num_samples * self.num_levels, dtype=np.int64)
        for begin in range(start, stop, self.num_samples):
            sample, level = self.places(begin, min(begin + self.num_samples, stop))
            counts += np.bincount(sample * self.num_levels + level, minlength=counts.size)
        return counts.reshape(self.num_samples, self.num_levels)


@lru_cache(maxsize=4)
def epoch_order(shard_sizes: tuple[int, ...], seed: int, epoch: int, shuffle_shards: int) -> np.ndarray:
    """Sample numbers of one epoch in the order they are seen, int64 [sum of shard_sizes], each once."""
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


class BatchDataset(Dataset[Batch]):
    """Item n is rank `rank`'s share of global batch n; plain fields, so any process can be handed it."""

    def __init__(
        self, index: ShardIndex, plan: StreamPlan, rank: int = 0, world_size: int = 1, verify: bool = True
    ) -> None:
        if plan.num_samples < plan.batch_size:
            raise TrainerError(
                f"{index.url}: {plan.num_samples} samples, fewer than one batch of {plan.batch_size}; "
                "lower batch_size or shard more images"
            )
        if plan.batch_size % world_size:
            raise UsageError(f"batch_size {plan.batch_size} does not divide by {world_size} processes")
        self._index, self._plan, self._verify = index, plan, verify
        self._share = plan.batch_size // world_size
        self._rank, self._world_size = rank, world_size
        self._reader: ShardReader | None = None

    def __getitem__(self, number: int) -> Batch:
        start = number * self._plan.batch_size + self._rank * self._share
        numbers, levels = self._plan.places(start, start + self._share)
        reader = self._open()
        samples = [reader.read(int(n)) for n in numbers]
        return Batch(
            features=torch.from_numpy(np.stack([sample.features for sample in samples])),
            regions=torch.from_numpy(np.stack([sample.regions for sample in samples])),
            label=torch.tensor([sample.label for sample in samples]),
            level=torch.from_numpy(levels),
            keys=[sample.key for sample in samples],
        )

    def _open(self) -> ShardReader:
        if self._reader is None:
            worker = get_worker_info()
            workers = worker.num_workers if worker else 1
            mine = self._rank * workers + (worker.id if worker else 0)
            readers = self._world_size * workers
            self._reader = ShardReader(
                self._index,
                verifies=lambda shard: self._verify and shard % readers == mine,
                # Around the border of two windows both are in use.
                max_open=2 * self._plan.shuffle_shards,
            )
        return self._reader

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_reader": None}


def batch_loader(
    dataset: BatchDataset, batches: range, workers: int = 0, pin_memory: bool = False
) -> Iterator[Batch]:
    """The global batches `batches`, in order, each already this rank's share, read by `workers` processes."""
    loader = DataLoader(
        _Caught(dataset),
        batch_size=None,
        sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_ignore_signals if workers else None,
    )
    for batch in loader:
        if isinstance(batch, TrainerError):
            raise batch
        yield batch


class _Caught(Dataset["Batch | TrainerError"]):
    """Hands an error over as an item: raised in a worker it would come back wrapped in a foreign traceback."""

    def __init__(self, dataset: BatchDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, number: int) -> Batch | TrainerError:
        try:
            return self._dataset[number]
        except TrainerError as error:
            return error


def _ignore_signals(worker: int) -> None:
    """A stop reaches the whole process group; only the trainer acts on it, and then ends its readers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
