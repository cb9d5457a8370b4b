"""Read samples of a shard folder by number, one by one or directly into a batch.

Tars allow random access (see `tars`), so samples come exactly in the requested order, without a shuffle buffer.

    B samples, H×W grid of tokens, C channels, L levels
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain
from threading import Lock
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from hierarchy_builder.canvases import level_canvases
from hierarchy_builder.errors import DamagedShardError, TrainerError, UsageError
from hierarchy_builder.files.remote import store_error
from hierarchy_builder.files.untrusted.arrays import parse_npy
from hierarchy_builder.files.whole import parse_json
from hierarchy_builder.records import (
    CANVASES_MEMBER,
    FEATURE_DTYPE,
    FEATURES_MEMBER,
    IMAGE_MEMBER,
    LABEL_MEMBER,
    METADATA_MEMBER,
    REGIONS_MEMBER,
    SCALE_MEMBER,
    Sample,
    spread_evenly,
)
from hierarchy_builder.terminal import say
from trainer.data.distant import SAMPLES_KEPT, DistantTar, found_tar
from trainer.data.normalisation import RAW, Normaliser
from trainer.data.shards import INDEX, ShardIndex
from trainer.data.tars import Members, OpenTar, check_sha256, check_size

Tar = OpenTar | DistantTar

MOST_OPENED = 32
"""Shards that are opened for a sample of the set; all headers of a tar are read when it is opened."""
LOOKED_AT = 64
"""Samples of a set that are looked at before training, and read at a time."""
SETTLED = 16
"""Shards that are read for further classes after the last one that brought a new class."""


@dataclass(kw_only=True, slots=True)
class Rows:
    """Samples as they are stored, one row each."""

    features: Tensor
    """float16 [B, H, W, C], or int8 with `scale`"""
    scale: Tensor | None = None
    """float32 [B, H, W, 1] where features are int8; a feature is the product of the two."""
    regions: Tensor
    """uint8 [B, L−1, H, W]"""
    label: Tensor
    """int64 [B]"""
    keys: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    def raw_features(self) -> Tensor:
        """The features as the encoder wrote them, float32 [B, H, W, C]."""
        return self.features.float() if self.scale is None else self.features * self.scale

    def tokens(self, normaliser: Normaliser = RAW) -> Tensor:
        """Normalised features, float32 [B, H, W, C]."""
        return normaliser.apply(self.raw_features())

    def canvases(self, normaliser: Normaliser = RAW) -> Tensor:
        """Canvases of all levels, float32 [B, L, H, W, C]: means of normalised features."""
        return level_canvases(self.tokens(normaliser), self.regions)

    def rows(self, start: int, stop: int) -> Self:
        """Rows `start` ≤ i < `stop`."""
        return replace(self._map(lambda tensor: tensor[start:stop]), keys=self.keys[start:stop])

    def to(self, device: torch.device) -> Self:
        """The same rows on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Self:
        """The same rows in page-locked memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        stored = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {n: change(each) for n, each in stored.items() if isinstance(each, Tensor)}
        return replace(self, **changed)


class ShardReader:
    """Reads samples by number, counted through the shards in order; threads may share a reader.

    Keeps at most `max_open` tars open, with the positions of their members. verifies: whether this reader checks the
    SHA-256 of a shard on first use; the ranks of a run divide that work. max_damaged: number of damaged shards to
    tolerate; 0 stops at the first one. Sample i of a damaged shard is replaced by sample i (modulo its size) of the
    next intact shard, in every reader alike.
    """

    def __init__(
        self,
        index: ShardIndex,
        verifies: Callable[[int], bool] = lambda shard: True,
        max_open: int = 64,
        max_damaged: int = 0,
    ) -> None:
        self.index = index
        self._verifies = verifies
        self._max_open = max_open
        self._max_damaged = max_damaged
        self._open: OrderedDict[int, Tar] = OrderedDict()
        self._verified: set[int] = set()
        self._damaged: set[int] = set()
        self._order = Lock()
        self._opening = [Lock() for _ in index.shards]
        self._starts = index.starts

    def __len__(self) -> int:
        return self.index.num_samples

    def read(self, number: int, extras: bool = False) -> Sample:
        """Sample `number`, with features as float16; metadata, image and stored canvases only with `extras`.

        Raises TrainerError naming shard and key if the sample is damaged or of another shape.
        """
        rows = self.read_rows([number])
        features = rows.features[0].numpy()
        if rows.scale is not None:
            features = (features * rows.scale[0].numpy()).astype(FEATURE_DTYPE)
        sample = Sample(
            key=rows.keys[0], label=int(rows.label[0]), features=features, regions=rows.regions[0].numpy()
        )
        if extras:
            name, tar, (key, members) = self._find(number)
            with _named(name, key):
                self._add_extras(sample, tar, members)
        return sample

    def read_rows(self, numbers: Sequence[int], pin_memory: bool = False) -> Rows:
        """Read samples `numbers` as they are stored, each from the file directly into its row.

        Raises TrainerError naming shard and key if a sample is damaged or of another shape.
        """
        found = [self._find(number) for number in numbers]
        is_int8 = SCALE_MEMBER in found[0][2][1]
        rows = self._empty_rows(len(found), is_int8, pin_memory)
        scale = [(SCALE_MEMBER, rows.scale.numpy())] if rows.scale is not None else []
        arrays = [(FEATURES_MEMBER, rows.features.numpy()), (REGIONS_MEMBER, rows.regions.numpy()), *scale]
        headers = {name: _npy_header(array[0]) for name, array in arrays}
        labels = []
        for row, (shard, tar, (key, members)) in enumerate(found):
            if row % SAMPLES_KEPT == 0:
                _fetch(found[row : row + SAMPLES_KEPT])
            with _named(shard, key):
                if (SCALE_MEMBER in members) != is_int8:
                    raise ValueError("features are int8 in some samples and float16 in others")
                for name, array in arrays:
                    _read_array(tar, members, name, headers[name], array[row])
                if scale and not np.isfinite(scale[0][1][row]).all():
                    raise ValueError("scale is not finite")
                labels.append(self._label(tar, members))
            rows.keys.append(key)
        rows.label = torch.tensor(labels)
        return rows

    def label(self, number: int) -> int:
        """The label of sample `number`, without its arrays. Raises TrainerError naming shard and key if damaged."""
        shard, tar, (key, members) = self._find(number)
        with _named(shard, key):
            return self._label(tar, members)

    def shard_of(self, number: int) -> str:
        """The shard that provides sample `number`, for messages."""
        return self._find(number)[0]

    def number_of(self, key: str) -> int:
        """The number of the sample with this key, found by reading the tars. Raises UsageError if there is none."""
        for shard in range(len(self.index.shards)):
            tar = self._open.get(shard) or self._opened(shard)
            keys = [] if tar is None else [found for found, _ in tar.samples]
            if key in keys:
                return self._starts[shard] + keys.index(key)
        raise UsageError(f"{self.index.url}: no sample has the key {key!r}; keys are like {keys[:1]}")

    def damaged_shards(self) -> list[str]:
        """Names of the damaged shards found so far, in order."""
        return [self._name(shard) for shard in sorted(self._damaged)]

    def close(self) -> None:
        """Close all tars."""
        self._open.clear()

    def _find(self, number: int) -> tuple[str, Tar, tuple[str, Members]]:
        """Name and tar of the shard that provides sample `number`, and the sample's key and members."""
        shard = bisect_right(self._starts, number) - 1
        row = number - self._starts[shard]
        for candidate in chain(range(shard, len(self.index.shards)), range(shard)):
            tar = self._open.get(candidate) or self._opened(candidate)
            if tar is not None:
                return self._name(candidate), tar, tar.samples[row % len(tar.samples)]
        raise DamagedShardError(f"{self.index.url}: all shards are damaged; copy or build them again")

    def _name(self, shard: int) -> str:
        """Name of a tar, with its folder where the names of several sets would be confused."""
        entry = self.index.shards[shard]
        return entry.place if self.index.sets else entry.name

    def _opened(self, shard: int) -> Tar | None:
        """The tar, opened by the first thread that asks; None if it is damaged and may be skipped."""
        with self._opening[shard]:
            if shard in self._open or shard in self._damaged:
                return self._open.get(shard)
            try:
                tar = self._checked(shard)
            except DamagedShardError as error:
                self._tolerate(shard, error)
                return None
            with self._order:
                # A tar that is removed here is closed when the last thread that reads it drops it.
                while len(self._open) >= self._max_open:
                    self._open.popitem(last=False)
                self._open[shard] = tar
            return tar

    def _checked(self, shard: int) -> Tar:
        entry = self.index.shards[shard]
        path = found_tar(entry, sum(shard.num_bytes for shard in self.index.shards))
        if isinstance(path, DistantTar):
            return path
        check_size(path, entry)
        if self._verifies(shard) and shard not in self._verified:
            check_sha256(path, entry)
            self._verified.add(shard)
        return OpenTar(path, entry)

    def _tolerate(self, shard: int, error: DamagedShardError) -> None:
        if self._max_damaged == 0:
            raise error
        self._damaged.add(shard)
        if len(self._damaged) > self._max_damaged:
            count, allowed = len(self._damaged), self._max_damaged
            raise DamagedShardError(f"{error}; {count} damaged shards, max_damaged_shards is {allowed}")
        say(f"warning: {error}; samples of the next shard take their place")

    def _empty_rows(self, count: int, is_int8: bool, pin_memory: bool) -> Rows:
        empty = partial(torch.empty, pin_memory=pin_memory)
        height, width = self.index.grid
        dtype = torch.int8 if is_int8 else torch.float16
        return Rows(
            features=empty(count, height, width, self.index.width, dtype=dtype),
            scale=empty(count, height, width, 1, dtype=torch.float32) if is_int8 else None,
            regions=empty(count, self.index.num_levels - 1, height, width, dtype=torch.uint8),
            label=torch.empty(0),
            keys=[],
        )

    def _label(self, tar: Tar, members: Members) -> int:
        text = tar.read(*_span(members, LABEL_MEMBER)).strip()
        label = int(text) if text.isdigit() and len(text) < 10 else -1
        if not 0 <= label < self.index.num_classes:
            raise ValueError(
                f"label {text[:20].decode(errors='replace')}, expected 0 to {self.index.num_classes - 1}"
            )
        return label

    def _add_extras(self, sample: Sample, tar: Tar, members: Members) -> None:
        if METADATA_MEMBER in members:
            sample.metadata = parse_json(tar.read(*members[METADATA_MEMBER]))
        if CANVASES_MEMBER in members:
            sample.canvases = parse_npy(tar.read(*members[CANVASES_MEMBER]))
        if IMAGE_MEMBER in members:
            sample.image = tar.read(*members[IMAGE_MEMBER])


def classes_with_images(index: ShardIndex, most: int = 10_000, max_damaged: int = 0) -> list[int]:
    """The classes that images have; the class map may hold more.

    Of more than `most` images, whole shards are read, spread over the set, until every class was met or SETTLED of them
    in a row brought no new one: to open a shard takes longer than to read its labels.
    """
    reader = ShardReader(index, verifies=lambda shard: False, max_damaged=max_damaged)
    found, last_new, starts = set[int](), 0, index.starts
    for turn, shard in enumerate(spread_order(len(index.shards))):
        if index.num_samples > most and (len(found) == index.num_classes or turn - last_new > SETTLED):
            break
        labels = {reader.label(number) for number in range(starts[shard], starts[shard + 1])}
        last_new = turn if labels - found else last_new
        found |= labels
    reader.close()
    return sorted(found)


def spread_samples(index: ShardIndex, most: int) -> list[int]:
    """At most `most` samples by number, spread evenly over the set, of at most MOST_OPENED shards."""
    starts, chosen = index.starts, spread_evenly(len(index.shards), MOST_OPENED)
    numbers = [number for shard in chosen for number in range(starts[shard], starts[shard + 1])]
    return [numbers[place] for place in spread_evenly(len(numbers), most)]


def looked_at(index: ShardIndex) -> list[tuple[ShardIndex, range]]:
    """The sets that are looked at before training, each with the numbers of a few samples of its first shard.

    These are all of them, but of remote ones at most MOST_OPENED, spread evenly: to look at one downloads a shard.
    """
    firsts = np.cumsum([0, *(part.num_samples for part in index.parts)]).tolist()
    most = MOST_OPENED if index.is_remote else len(index.parts)
    chosen = [(index.parts[place], firsts[place]) for place in spread_evenly(len(index.parts), most)]
    return [
        (part, range(first, first + min(LOOKED_AT, part.shards[0].num_samples))) for part, first in chosen
    ]


def spread_order(count: int) -> list[int]:
    """The numbers below `count` in an order whose every beginning is spread evenly: by their bits, last bit first."""
    bits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda number: f"{number:0{bits}b}"[::-1])


@contextmanager
def _named(shard: str, key: str) -> Iterator[None]:
    """Add the shard and the sample to errors raised inside."""
    try:
        yield
    except (ValueError, KeyError, OSError) as error:
        if told := store_error(error):
            raise told from error
        raise TrainerError(f"{shard}, sample {key}: {error}") from None


def _fetch(found: Sequence[tuple[str, Tar, tuple[str, Members]]]) -> None:
    """Fetch samples from tars at URLs at once; an error of one is raised again when it is read, with its name."""
    distant = [(tar, members) for _, tar, (_, members) in found if isinstance(tar, DistantTar)]
    if len(distant) > 1:
        with ThreadPoolExecutor(len(distant)) as pool:
            for tar, members in distant:
                pool.submit(tar.read, min(members.values())[0], 1)


def _read_array(tar: Tar, members: Members, name: str, header: np.ndarray, row: np.ndarray) -> None:
    """Read one .npy member into `row`, with a single system call if its header is the expected one."""
    offset, size = _span(members, name)
    found, data = np.empty_like(header), row.reshape(-1).view(np.uint8)
    is_whole = size == len(header) + len(data) and tar.read_into([found, data], offset) == size
    if is_whole and found.tobytes() == header.tobytes():
        return
    array = parse_npy(tar.read(offset, size))
    if array.shape != row.shape or array.dtype != row.dtype:
        what = name.removesuffix(".npy")
        raise ValueError(
            f"{what} is {array.dtype}{list(array.shape)}, {INDEX} says {row.dtype}{list(row.shape)}"
        )
    row[...] = array


def _span(members: Members, name: str) -> tuple[int, int]:
    if name not in members:
        raise ValueError(f"member {name} is missing")
    return members[name]


def _npy_header(array: np.ndarray) -> np.ndarray:
    """The header of a .npy file of such an array, uint8."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
    return np.frombuffer(stream.getvalue(), dtype=np.uint8)
