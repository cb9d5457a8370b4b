"""The index, class map and statistics of a finished shard folder, or of several that are read as one.

Several sets are sorted by the digests of their tars, so that the order of their samples depends neither on how the
sets are listed nor on where they lie.

H×W grid of tokens, C channels
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hierarchy_builder.errors import MismatchError, TrainerError, UsageError
from hierarchy_builder.fields import MOST, MOST_BLOCKS, MOST_ROWS, difference
from hierarchy_builder.files.paths import filesystem_of
from hierarchy_builder.files.remote import store_error
from hierarchy_builder.files.untrusted.arrays import parse_npz
from hierarchy_builder.files.untrusted.documents import read_object
from hierarchy_builder.files.untrusted.pictures import SUFFIXES
from hierarchy_builder.files.whole import parse_json
from hierarchy_builder.records import FORMAT_VERSION
from trainer.data.folders import Places, filesystem_at, folders_at
from trainer.data.tars import ShardEntry

MARKER = "_SUCCESS"
INDEX = "index.json"
STATISTICS = "statistics.npz"
CLASS_MAP = "class_map.json"
EARLIER_MARKER = {"count", "index_sha256"}
"""Fields of the marker in sets of earlier releases, which had no seal and vouched for the index alone."""
AGAIN = "copy or build the shards again"
MOST_BYTES = 2**32
"""Largest file beside the tars that is read: statistics with a covariance of 16,384 channels take 2**31."""
DIGEST = re.compile(r"[0-9a-f]{64}")
TAR_NAME = re.compile(r"(?:\w[\w.+=@-]*/)*\w[\w.+=@-]*")
"""A path inside the folder: no `..`, no root, no protocol."""
SAME = ("encoder", "recipe", "num_levels", "grid", "width", "feature_dtype", "class_names")
"""What sets have in common that are read as one."""
IN_EACH = ("in the first", "in the second")
OPENING_THREADS = 16
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class ShardIndex:
    """index.json and class_map.json of a finished shard folder, or of several."""

    url: str
    """Folder that holds the tars: a local path or an fsspec URL. Of several sets: their folders, for messages."""
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
    digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the files beside the tars; empty for sets of earlier releases."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """How the regions were found."""
    feature_dtype: str = ""
    """How features are stored."""
    sets: tuple[ShardIndex, ...] = ()
    """The sets that are read as one; empty for a single set."""
    statistics: dict[tuple[str, ...], list[np.ndarray]] = field(
        default_factory=dict, init=False, compare=False
    )
    """What `read_statistics` has read, by the names of the arrays."""

    def __repr__(self) -> str:
        grid = "×".join(map(str, (*self.grid, self.width)))
        return (
            f"<ShardIndex of {self.url}: {self.num_samples:,} samples in {len(self.shards):,} shards, "
            f"{self.num_classes} classes, {self.num_levels} levels of {grid} by {self.encoder.get('name')}>"
        )

    @property
    def num_samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def starts(self) -> list[int]:
        """Number of the first sample of each shard, and at the end the number of samples."""
        return list(itertools.accumulate((shard.num_samples for shard in self.shards), initial=0))

    @property
    def num_classes(self) -> int:
        """Number of classes in the class map, including those without samples."""
        return len(self.class_names)

    @property
    def parts(self) -> tuple[ShardIndex, ...]:
        """Every set: the several ones, or this one."""
        return self.sets or (self,)

    @property
    def is_remote(self) -> bool:
        """Whether a tar must be downloaded before it can be read."""
        return any("://" in part.url for part in self.parts)

    @property
    def digest(self) -> str:
        """SHA-256 over those of the tars: equal for sets of equal samples, wherever they lie."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a run stores about its shards, as plain data without paths, so that folders can be moved."""
        return {
            "sets": [
                {
                    "folder": name,
                    "num_samples": part.num_samples,
                    "config_hash": part.config_hash,
                    "sha256": part.digest,
                }
                for part, name in zip(self.parts, _names_of(self.parts), strict=True)
            ],
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


def _names_of(parts: Sequence[ShardIndex]) -> list[str]:
    """The names of the folders of sets, which hold `shards` or are it; where names are equal, with the folder above."""
    places = [part.url if "://" in part.url else str(Path(part.url).resolve()) for part in parts]
    paths = [place.rstrip("/").removesuffix("/shards").split("/") for place in places]
    counts = Counter(path[-1] for path in paths)
    return ["/".join(path[-1:] if counts[path[-1]] == 1 else path[-2:]) for path in paths]


def open_index(places: Places | ShardIndex) -> ShardIndex:
    """Read the index of finished shards, or of several sets as one.

    places: see `folders_at`; each is a folder of shards, or of a build that holds one under `shards`. An index that was
    opened before is returned as it is.
    Raises UsageError if one does not exist, TrainerError if a folder is not finished or has another format, and
    MismatchError if several sets do not fit together.
    """
    return places if isinstance(places, ShardIndex) else joined(pooled(_open_set, folders_at(places)))


def pooled(call: Callable[[ItemT], ResultT], items: Iterable[ItemT]) -> list[ResultT]:
    """What `call` returns for each item, several at a time, since most of the time passes waiting for files."""
    with ThreadPoolExecutor(OPENING_THREADS) as pool:
        return list(pool.map(call, items))


def joined(sets: Sequence[ShardIndex]) -> ShardIndex:
    """Several sets as one. Raises MismatchError unless they agree in `SAME`, and UsageError for samples given twice."""
    first, *others = sets = sorted(sets, key=lambda each: each.digest)
    if not others:
        return first
    for other in others:
        for name in SAME:
            values = getattr(first, name), getattr(other, name)
            if values[0] != values[1]:
                raise MismatchError(
                    f"{first.url} and {other.url} cannot be read as one, they differ in "
                    f"{difference(name, *values, places=IN_EACH)}: give sets of the same encoder, recipe and classes "
                    "(partitions of one listing, or builds with the same --class-map)"
                )
    found = dict[str, str]()
    for each in sets:
        for shard in each.shards:
            if shard.sha256 in found:
                raise UsageError(
                    f"{shard.place} and {found[shard.sha256]} hold the same samples: give every set once"
                )
            found[shard.sha256] = shard.place
    digest = hashlib.sha256("".join(each.digest for each in sets).encode()).hexdigest()
    return replace(
        first,
        url=f"{first.url}, {others[0].url}" + (f" and {len(others) - 1:,} more" if others[1:] else ""),
        split="+".join(sorted({each.split for each in sets})),
        shards=tuple(shard for each in sets for shard in each.shards),
        config_hash=digest,
        digests={},
        sets=tuple(sets),
    )


def _open_set(url: str) -> ShardIndex:
    if folder := finished_folder(url):
        digests = _vouched_for(folder)
        index, class_map = (_read_json(folder, name, digests) for name in (INDEX, CLASS_MAP))
        return _parse_index(folder, index, class_map, digests)
    if not _exists(url):
        raise UsageError(
            f"{url} does not exist, expected a finished shard folder, its build folder, or a URL"
        )
    raise TrainerError(f"{url} {_instead_of_shards(url)}")


def _instead_of_shards(url: str) -> str:
    """What a place without finished shards is, and what to do."""
    place, quoted = Path(url), shlex.quote(url)
    if (place / "manifest.json").is_file():
        return f"is a build whose shards are not finished: run `hierarchy-builder shard {quoted}`"
    if (place / INDEX).is_file():
        return "is not a finished shard folder: run `hierarchy-builder shard DIR` of its build again, or copy it whole"
    if inner := sorted(each.parent.name for each in place.glob("*/manifest.json")):
        one = shlex.quote(str(place / inner[0]))
        return f"is no build but holds builds ({', '.join(inner[:5])}): give one, such as {one}"
    if (place / "checkpoints").is_dir():
        return "is a run folder, expected the shards that a run is trained on: give their folder"
    if _holds_pictures(place):
        what = "a picture" if place.is_file() else "a folder of photos"
        return (
            f"is {what}, and training reads shards that are made from photos: run `hierarchy-builder build {quoted} "
            "--out DIR`, then give DIR"
        )
    return "is not a finished shard folder: run `hierarchy-builder build PHOTOS --out DIR`, then give DIR"


def _holds_pictures(place: Path, looked_at: int = 1000) -> bool:
    """Whether a picture is among the first files of a folder, or the file is one."""
    if place.is_file():
        return place.suffix.lower() in SUFFIXES
    files = (name for _, _, names in os.walk(place) for name in names)
    return any(Path(name).suffix.lower() in SUFFIXES for name in itertools.islice(files, looked_at))


def check_trained_on(index: ShardIndex, model: Any, encoder: Mapping[str, Any], who: str) -> None:
    """Raise MismatchError unless encoder, grid, width, levels and classes of the shards are those of a network.

    model: its configuration. encoder: description of the one it was trained on; what it lacks is not compared. who: the
    network, for the message.
    """
    for name in ("name", "weights_hash"):
        trained, given = encoder.get(name), index.encoder.get(name)
        if None not in (trained, given) and trained != given:
            raise MismatchError(
                f"{index.url} holds features of encoder {name} {given!r}, {who} was trained on {trained!r}: "
                "give shards of the same encoder"
            )
    # A network of one level, which draws only tokens and pixels, fits shards of any number of levels.
    levels = model.num_levels if model.num_levels > 1 else index.num_levels
    pairs = {
        "grid": (index.grid, tuple(model.grid)),
        "width": (index.width, model.in_channels),
        "levels": (index.num_levels, levels),
        "classes": (index.num_classes, model.num_classes),
    }
    if differing := [(name, a, b) for name, (a, b) in pairs.items() if a != b]:
        found, wanted = (
            ", ".join(f"{name} {values[place]}" for name, *values in differing) for place in (0, 1)
        )
        raise MismatchError(
            f"{index.url} has {found}, {who} was trained on {wanted}: "
            "give shards of the same encoder, recipe and classes"
        )


def finished_folder(url: str) -> str | None:
    """The folder of finished shards at `url`, which may be that of their build; None if there is none.

    Raises TrainerError for a URL that is not understood.
    """
    for folder in (url.rstrip("/"), f"{url.rstrip('/')}/shards"):
        filesystem, path = filesystem_at(folder)
        if filesystem.exists(f"{path}/{MARKER}") and filesystem.exists(f"{path}/{INDEX}"):
            return folder
    return None


def read_statistics(index: ShardIndex, names: Sequence[str]) -> list[np.ndarray]:
    """Read a mean and a variance of the shards' statistics.npz by name, each float64 [C] or [H, W, C].

    Those of several sets are merged: they are the statistics of one set of all samples, to the rounding of float64.
    Raises TrainerError if the file is missing or damaged, or if an array is missing, not finite or of another shape.
    """
    if (found := index.statistics.get(tuple(names))) is None:
        found = index.statistics[tuple(names)] = _merged_statistics(index, names)
    return found


def _merged_statistics(index: ShardIndex, names: Sequence[str]) -> list[np.ndarray]:
    if not index.sets:
        return _read_statistics(index, names)
    weights = [part.num_samples / index.num_samples for part in index.sets]
    means, variances = zip(*pooled(lambda part: read_statistics(part, names), index.sets), strict=True)
    mean = sum(weight * each for weight, each in zip(weights, means, strict=True))
    # The law of total variance: the mean of the variances and the variance of the means.
    within = sum(weight * each for weight, each in zip(weights, variances, strict=True))
    between = sum(weight * (each - mean) ** 2 for weight, each in zip(weights, means, strict=True))
    return [mean, within + between]


def _read_statistics(index: ShardIndex, names: Sequence[str]) -> list[np.ndarray]:
    path = f"{index.url}/{STATISTICS}"
    try:
        arrays = parse_npz(_read(index.url, STATISTICS, index.digests), names)
        found = [arrays[name] for name in names]
    except FileNotFoundError:
        raise TrainerError(
            f"{path} is missing: normalise needs it; run `hierarchy-builder shard DIR` again, or train with "
            "normalise=none"
        ) from None
    except (OSError, ValueError, KeyError) as error:
        if told := store_error(error):
            raise told from error
        raise TrainerError(f"{path} is damaged ({error}); run `hierarchy-builder shard DIR` again") from None
    for name, array in zip(names, found, strict=True):
        expected = (index.width,) if name.startswith("channel_") else (*index.grid, index.width)
        if array.shape != expected or array.dtype.kind != "f" or not np.isfinite(array).all():
            raise TrainerError(
                f"{path}: {name} has shape {array.shape}, expected finite numbers {expected} as in {INDEX}; "
                "run `hierarchy-builder shard DIR` again"
            )
    return found


def _exists(url: str) -> bool:
    """Whether there is anything. Raises StoreError for a bucket that is not there."""
    filesystem, path = filesystem_of(url)
    try:
        filesystem.info(path)
    except FileNotFoundError as error:
        if (told := store_error(error)) and told.code == "NoSuchBucket":
            raise told from error
        return False
    return True


def _vouched_for(folder: str) -> dict[str, str]:
    """Return the SHA-256 of files in a finished folder, by name, out of its marker."""
    found = _read_json(folder, MARKER, {})
    if found.keys() != EARLIER_MARKER:
        found = _read_json(folder, MARKER, {}, sealed=True)
    files = found.get("files", {})
    digests = {**(files if isinstance(files, dict) else {}), INDEX: found.get("index_sha256")}
    if not all(isinstance(digest, str) and DIGEST.fullmatch(digest) for digest in digests.values()):
        raise TrainerError(f"{folder}/{MARKER} is damaged: expected a SHA-256 for each file; {AGAIN}")
    return digests


def _read(folder: str, name: str, digests: Mapping[str, str]) -> bytes:
    """Read a file beside the tars. Raises TrainerError unless it has the SHA-256 in `digests`, if there is one."""
    filesystem, path = filesystem_of(f"{folder}/{name}")
    data = read_object(filesystem, path, MOST_BYTES)
    if name in digests and hashlib.sha256(data).hexdigest() != digests[name]:
        raise TrainerError(
            f"{path} is not the file that {MARKER} vouches for: it was changed or damaged; {AGAIN}"
        )
    return data


def _read_json(folder: str, name: str, digests: Mapping[str, str], sealed: bool = False) -> dict[str, Any]:
    try:
        return parse_json(_read(folder, name, digests), sealed)
    except FileNotFoundError:
        raise TrainerError(f"{folder}/{name} is missing; {AGAIN}") from None
    except ValueError as error:
        raise TrainerError(f"{folder}/{name} is damaged ({error}); {AGAIN}") from None


def _parse_index(
    url: str, index: dict[str, Any], class_map: dict[str, int], digests: Mapping[str, str]
) -> ShardIndex:
    version = index.get("format_version")
    if version != FORMAT_VERSION:
        raise MismatchError(
            f"{url}/{INDEX}: format version {version}, this program reads {FORMAT_VERSION}; "
            "build the shards again or update the program"
        )
    names = _class_names(class_map, f"{url}/{CLASS_MAP}")
    try:
        entries = tuple(_entry(url, entry) for entry in index["shardlist"])
        grid, width, levels = index["grid"], index["width"], index["num_levels"]
        if len(grid) != 2 or not all(type(side) is int and 0 < side <= MOST_ROWS for side in grid):
            raise ValueError(f"grid {grid}")
        if type(width) is not int or not 0 < width <= MOST:
            raise ValueError(f"width {width}")
        if type(levels) is not int or not 2 <= levels <= MOST_BLOCKS:
            raise ValueError(f"num_levels {levels}")
        if not entries or len({entry.name for entry in entries}) < len(entries):
            raise ValueError("no shards, or one name twice")
        described = {name: index[name] for name in ("name", "split", "config_hash", "encoder")}
        described |= {"recipe": index.get("recipe", {}), "feature_dtype": index.get("feature_dtype", "")}
        for name, value in described.items():
            kind = dict if name in ("encoder", "recipe") else str
            if not isinstance(value, kind):
                raise TypeError(f"{name} is {value!r}, expected {kind.__name__}")
        return ShardIndex(
            url=url,
            shards=entries,
            num_levels=levels,
            grid=(grid[0], grid[1]),
            width=width,
            class_names=names,
            digests=digests,
            **described,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise TrainerError(f"{url}/{INDEX}: not a shard index ({error!r})") from None


def _entry(url: str, entry: dict[str, Any]) -> ShardEntry:
    name, digest, sizes = entry["url"], entry["sha256"], (entry["nsamples"], entry["filesize"])
    if not TAR_NAME.fullmatch(name):
        raise ValueError(f"shard name {name!r} leads out of the folder")
    if not DIGEST.fullmatch(digest):
        raise ValueError(f"{name}: sha256 {digest!r}")
    if not all(type(size) is int and 0 < size < 2**50 for size in sizes):
        raise ValueError(f"{name}: nsamples and filesize {sizes}")
    return ShardEntry(name=name, num_samples=sizes[0], num_bytes=sizes[1], sha256=digest, folder=url)


def _class_names(class_map: dict[str, int], where: str) -> tuple[str, ...]:
    """Class names by label; a label that the map omits is named by its number."""
    names = {label: name for name, label in class_map.items() if type(label) is int and 0 <= label < MOST}
    if not names or len(names) < len(class_map):
        raise TrainerError(
            f"{where}: expected a different label of 0 or more for each class; copy or build the shards again"
        )
    return tuple(names.get(label, str(label)) for label in range(max(names) + 1))
