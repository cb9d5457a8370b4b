"""A finished shard folder: its index, where each sample lies in its tar, and samples by number.

Tars are uncompressed, so one pass over the headers gives the offset of every member and a sample is one
positioned read; no shuffle buffer stands between the order that was asked for and the order that comes.

    H×W grid of tokens, C channels, L levels
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import numpy as np

from hierarchy_builder.records import (
    CANVASES_MEMBER,
    FEATURE_DTYPE,
    FEATURES_MEMBER,
    FORMAT_VERSION,
    IMAGE_MEMBER,
    LABEL_MEMBER,
    METADATA_MEMBER,
    REGION_DTYPE,
    REGIONS_MEMBER,
    SCALE_MEMBER,
    Sample,
)
from trainer.errors import MismatchError, TrainerError

MARKER = "_SUCCESS"
INDEX = "index.json"
CLASS_MAP = "class_map.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One tar of the set, as index.json lists it."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardIndex:
    """index.json and class_map.json of a finished shard folder."""

    url: str
    """Folder that holds the tars: a local path or an fsspec URL."""
    name: str
    split: str
    shards: tuple[ShardEntry, ...]
    num_levels: int
    grid: tuple[int, int]
    width: int
    class_names: tuple[str, ...]
    """Class names by label."""
    encoder: dict[str, Any]
    """Description of the encoder: name, grid, width, normalisation, weights_hash, decoder."""
    config_hash: str
    """Hash of the configuration the shards were made with."""

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_classes(self) -> int:
        """Classes of the class map, whether or not each has samples."""
        return len(self.class_names)

    def describe(self) -> dict[str, Any]:
        """What a run stores about its shards, as plain data; no paths, so that folders may move."""
        return {
            "name": self.name,
            "split": self.split,
            "num_samples": self.num_samples,
            "num_levels": self.num_levels,
            "grid": list(self.grid),
            "width": self.width,
            "config_hash": self.config_hash,
            "encoder": self.encoder,
            "class_names": list(self.class_names),
        }


def open_index(url: str) -> ShardIndex:
    """Read the index of a finished shard folder, or of a build folder that holds one under `shards`.

    url: local path or fsspec URL. Raises TrainerError when the folder is not finished or not of this format.
    """
    for folder in (url.rstrip("/"), f"{url.rstrip('/')}/shards"):
        try:
            filesystem, path = fsspec.url_to_fs(folder)
        except (ImportError, ValueError) as error:
            raise TrainerError(f"{url}: {error}") from None
        if filesystem.exists(f"{path}/{MARKER}") and filesystem.exists(f"{path}/{INDEX}"):
            index, class_map = (_read_json(filesystem, f"{path}/{name}") for name in (INDEX, CLASS_MAP))
            return _parse_index(folder, index, class_map)
    raise TrainerError(f"{url} is not a finished shard folder: run `hierarchy-builder shard DIR`")


def _read_json(filesystem: fsspec.AbstractFileSystem, path: str) -> dict[str, Any]:
    try:
        content = json.loads(filesystem.cat_file(path))
    except FileNotFoundError:
        raise TrainerError(f"{path} is missing; copy or build the shards again") from None
    except ValueError as error:
        content = error
    if not isinstance(content, dict):
        raise TrainerError(f"{path} is damaged: expected a JSON object; copy or build the shards again")
    return content


def _parse_index(url: str, index: dict[str, Any], class_map: dict[str, int]) -> ShardIndex:
    version = index.get("format_version")
    if version != FORMAT_VERSION:
        raise MismatchError(
            f"{url}/{INDEX}: format version {version}, this program reads {FORMAT_VERSION}; "
            "build the shards again or update the program"
        )
    names = _class_names(class_map, f"{url}/{CLASS_MAP}")
    try:
        entries = [
            ShardEntry(
                name=entry["url"],
                num_samples=int(entry["nsamples"]),
                num_bytes=int(entry["filesize"]),
                sha256=entry["sha256"],
            )
            for entry in index["shardlist"]
        ]
        if int(index["num_levels"]) < 2 or min(*index["grid"], index["width"]) < 1:
            raise ValueError("fewer than 2 levels, or no tokens")
        if not isinstance(index["encoder"], dict):
            raise TypeError("encoder is no description")
        return ShardIndex(
            url=url,
            name=index["name"],
            split=index["split"],
            shards=tuple(entries),
            num_levels=int(index["num_levels"]),
            grid=(int(index["grid"][0]), int(index["grid"][1])),
            width=int(index["width"]),
            class_names=tuple(names),
            encoder=index["encoder"],
            config_hash=index["config_hash"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise TrainerError(f"{url}/{INDEX}: not a shard index ({error!r})") from None


def _class_names(class_map: dict[str, int], where: str) -> tuple[str, ...]:
    """Names by label; a label that the map leaves out is named by its number."""
    names = {label: name for name, label in class_map.items()}
    if not names or len(names) < len(class_map) or not all(type(n) is int and n >= 0 for n in names):
        raise TrainerError(
            f"{where}: expected labels from 0, each of one class; copy or build the shards again"
        )
    return tuple(names.get(label, str(label)) for label in range(max(names) + 1))


def default_cache() -> str:
    """Folder where remote shards are kept: `TRAINER_CACHE`, else under the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return os.environ.get("TRAINER_CACHE") or str(Path(base) / "trajectory-hierarchies")


class ShardReader:
    """Samples of a shard folder by number, counted through the shards in order.

    Keeps at most `max_open` tars open with their member offsets. `verifies(shard)` says whether this reader
    checks the shard's SHA-256 on first use: several readers of one machine share that work.
    """

    def __init__(
        self,
        index: ShardIndex,
        verifies: Callable[[int], bool] = lambda shard: True,
        max_open: int = 64,
        cache: str | None = None,
    ) -> None:
        self.index = index
        self._verifies = verifies
        self._max_open = max_open
        self._cache = cache
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._verified: set[int] = set()
        sizes = [shard.num_samples for shard in index.shards]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def __len__(self) -> int:
        return self.index.num_samples

    def read(self, number: int, extras: bool = False) -> Sample:
        """Sample `number`, features as float16; metadata, image and stored canvases only with `extras`.

        Raises TrainerError naming shard and key when the sample is damaged or of another shape.
        """
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        tar = self._tar(shard)
        key, members = tar.samples[number - int(self._starts[shard])]
        try:
            return self._decode(
                key,
                {
                    name: tar.read(*span)
                    for name, span in members.items()
                    if extras or name in _TRAINING_MEMBERS
                },
            )
        except (ValueError, KeyError, OSError) as error:
            raise TrainerError(f"{self.index.shards[shard].name}, sample {key}: {error}") from None

    def close(self) -> None:
        """Close all tars."""
        while self._open:
            self._open.popitem()[1].close()

    def _tar(self, shard: int) -> _OpenShard:
        if shard not in self._open:
            entry = self.index.shards[shard]
            path = _local_path(self.index.url, entry, self._cache or default_cache())
            _check_size(path, entry)
            if self._verifies(shard) and shard not in self._verified:
                _check_sha256(path, entry)
                self._verified.add(shard)
            while len(self._open) >= self._max_open:
                self._open.popitem(last=False)[1].close()
            self._open[shard] = _OpenShard(path, entry)
        self._open.move_to_end(shard)
        return self._open[shard]

    def _decode(self, key: str, members: dict[str, bytes]) -> Sample:
        for name in (FEATURES_MEMBER, REGIONS_MEMBER, LABEL_MEMBER):
            if name not in members:
                raise ValueError(f"member {name} is missing")
        features = _array(members[FEATURES_MEMBER])
        if SCALE_MEMBER in members:
            features = (features * _array(members[SCALE_MEMBER])).astype(FEATURE_DTYPE)
        regions = _array(members[REGIONS_MEMBER])
        label = int(members[LABEL_MEMBER])
        height, width = self.index.grid
        _expect("features", features, (height, width, self.index.width), FEATURE_DTYPE)
        _expect("regions", regions, (self.index.num_levels - 1, height, width), REGION_DTYPE)
        if not 0 <= label < self.index.num_classes:
            raise ValueError(f"label {label}, expected 0 to {self.index.num_classes - 1}")
        return Sample(
            key=key,
            label=label,
            features=features,
            regions=regions,
            metadata=json.loads(members.get(METADATA_MEMBER, b"{}")),
            canvases=_array(members[CANVASES_MEMBER]) if CANVASES_MEMBER in members else None,
            image=members.get(IMAGE_MEMBER),
        )


_TRAINING_MEMBERS = (FEATURES_MEMBER, SCALE_MEMBER, REGIONS_MEMBER, LABEL_MEMBER)


class _OpenShard:
    """An open tar and, per sample, its key and the (offset, size) of each member."""

    def __init__(self, path: str, entry: ShardEntry) -> None:
        self.samples = _scan(path, entry)
        self._file = open(path, "rb")  # noqa: SIM115 (kept open until close)

    def read(self, offset: int, size: int) -> bytes:
        # A positioned read moves no file position, so processes forked from this one may share the file.
        return os.pread(self._file.fileno(), size, offset)

    def close(self) -> None:
        self._file.close()


def _scan(path: str, entry: ShardEntry) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not samples or samples[-1][0] != key:
                    samples.append((key, {}))
                samples[-1][1][suffix] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise TrainerError(f"{path}: {error}; the shard is damaged, copy or build it again") from None
    if len(samples) != entry.num_samples:
        raise TrainerError(
            f"{path}: {len(samples)} samples, {INDEX} says {entry.num_samples}; run `hierarchy-builder verify`"
        )
    return samples


def _local_path(url: str, entry: ShardEntry, cache: str) -> str:
    filesystem, path = fsspec.url_to_fs(f"{url}/{entry.name}")
    if "file" in (filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,)):
        return path
    folder = Path(cache) / hashlib.sha256(url.encode()).hexdigest()[:16]
    local = folder / f"{entry.sha256[:16]}-{PurePosixPath(entry.name).name}"
    if not local.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with open(f"{local}.lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process of the machine downloads, the others wait for it
            if not local.exists():
                partial = Path(f"{local}.tmp-{os.getpid()}")
                try:
                    filesystem.get_file(path, str(partial))
                    _check_sha256(str(partial), entry)
                    os.replace(partial, local)
                finally:
                    partial.unlink(missing_ok=True)
    return str(local)


def _check_size(path: str, entry: ShardEntry) -> None:
    try:
        size = os.path.getsize(path)
    except OSError:
        raise TrainerError(f"{path} is missing, {INDEX} lists it; copy or build it again") from None
    if size != entry.num_bytes:
        raise TrainerError(
            f"{path}: {size} bytes, {INDEX} says {entry.num_bytes}; "
            "the shard is truncated or changed, copy or build it again"
        )


def _check_sha256(path: str, entry: ShardEntry) -> None:
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != entry.sha256:
        raise TrainerError(
            f"{path}: SHA-256 {found[:12]}…, {INDEX} says {entry.sha256[:12]}…; "
            "the shard is corrupt, copy or build it again"
        )


def _array(data: bytes) -> np.ndarray:
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def _expect(name: str, array: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, {INDEX} says {dtype}{list(shape)}")
