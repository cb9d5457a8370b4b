"""The index, class map and statistics of a finished shard folder.

H×W grid of tokens, C channels
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np

from hierarchy_builder.errors import MismatchError, TrainerError, UsageError
from hierarchy_builder.records import FORMAT_VERSION
from trainer.data.tars import ShardEntry

MARKER = "_SUCCESS"
INDEX = "index.json"
STATISTICS = "statistics.npz"
CLASS_MAP = "class_map.json"


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
    """Hash of the configuration that the shards were built with."""

    @property
    def num_samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_classes(self) -> int:
        """Number of classes in the class map, including those without samples."""
        return len(self.class_names)

    def describe(self) -> dict[str, Any]:
        """What a run stores about its shards, as plain data without paths, so that folders can be moved."""
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

    url: local path or fsspec URL. Raises UsageError if it does not exist, TrainerError if the folder is not finished or
    has another format.
    """
    if folder := finished_folder(url):
        filesystem, path = fsspec.url_to_fs(folder)
        index, class_map = (_read_json(filesystem, f"{path}/{name}") for name in (INDEX, CLASS_MAP))
        return _parse_index(folder, index, class_map)
    if not _exists(url):
        raise UsageError(
            f"{url} does not exist, expected a finished shard folder, its build folder, or a URL"
        )
    raise TrainerError(f"{url} is not a finished shard folder: run `hierarchy-builder shard DIR`")


def finished_folder(url: str) -> str | None:
    """The folder of finished shards at `url`, which may be that of their build; None if there is none.

    Raises TrainerError for a URL that is not understood.
    """
    for folder in (url.rstrip("/"), f"{url.rstrip('/')}/shards"):
        try:
            filesystem, path = fsspec.url_to_fs(folder)
        except (ImportError, ValueError) as error:
            raise TrainerError(f"{url}: {error}") from None
        if filesystem.exists(f"{path}/{MARKER}") and filesystem.exists(f"{path}/{INDEX}"):
            return folder
    return None


def read_statistics(index: ShardIndex, names: Sequence[str]) -> list[np.ndarray]:
    """Read arrays of the shards' statistics.npz by name, float64 [C] or [H, W, C].

    Raises TrainerError if the file is missing or damaged, or if an array is missing, not finite or of another shape.
    """
    filesystem, path = fsspec.url_to_fs(f"{index.url}/{STATISTICS}")
    try:
        with np.load(io.BytesIO(filesystem.cat_file(path)), allow_pickle=False) as stored:
            found = [stored[name] for name in names]
    except FileNotFoundError:
        raise TrainerError(
            f"{path} is missing: normalise needs it; run `hierarchy-builder shard DIR` again, or train with "
            "normalise=none"
        ) from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise TrainerError(f"{path} is damaged ({error}); run `hierarchy-builder shard DIR` again") from None
    for name, array in zip(names, found, strict=True):
        expected = (index.width,) if name.startswith("channel_") else (*index.grid, index.width)
        if array.shape != expected or not np.isfinite(array).all():
            raise TrainerError(
                f"{path}: {name} has shape {array.shape}, expected finite numbers {expected} as in {INDEX}; "
                "run `hierarchy-builder shard DIR` again"
            )
    return found


def _exists(url: str) -> bool:
    filesystem, path = fsspec.url_to_fs(url)
    return bool(filesystem.exists(path))


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
            raise TypeError("encoder is not a mapping")
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
    """Class names by label; a label that the map omits is named by its number."""
    names = {label: name for name, label in class_map.items()}
    if not names or len(names) < len(class_map) or not all(type(n) is int and n >= 0 for n in names):
        raise TrainerError(
            f"{where}: expected a different label of 0 or more for each class; copy or build the shards again"
        )
    return tuple(names.get(label, str(label)) for label in range(max(names) + 1))
