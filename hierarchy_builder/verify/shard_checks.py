"""The shards of a build against their markers, their index and the stores they were made from."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hierarchy_builder.config import ShardConfig
from hierarchy_builder.errors import BuilderError
from hierarchy_builder.fields import from_mapping
from hierarchy_builder.files import read_json, sha256_file
from hierarchy_builder.hierarchy.recipe import check_nesting
from hierarchy_builder.records import REGION_DTYPE, ImageRecord, Sample
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.damage import Damage
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import read_index, records_of
from hierarchy_builder.store.ledger import is_fused, open_ledger
from hierarchy_builder.store.samples import FACTS, make_sample
from hierarchy_builder.store.shard_set import (
    SUCCESS,
    card_of,
    dataset_joint_moments,
    dataset_moments,
    index_of,
)
from hierarchy_builder.store.shards import encode_sample, read_shard, shard_name, sidecar
from hierarchy_builder.store.statistics import per_channel
from hierarchy_builder.store.units import spread_rows, stage_units, usable_rows

SAMPLED_SAMPLES = 8
"""Samples of a tar that are made again from the stores, canvases among them, and compared byte by byte."""

MEASURED = ("quantisation", "code_version")
"""Entries of index.json that do not follow from the manifest and the markers."""


def check_shards(
    folder: BuildFolder, stages: Mapping[str, Any], *, doubted: Collection[int | None] = ()
) -> Iterator[Damage]:
    """Every tar whose unit is done, then what stands beside them.

    doubted: damaged blocks of the stores, whose rows no tar is compared with; None: nor with the index.
    """
    if None in doubted:
        return
    config = from_mapping(ShardConfig, stages["shard"]["request"])
    ledger, units = open_ledger(folder, "shard"), stage_units(folder, "shard")
    rows, index, seen = usable_rows(folder), read_index(folder.index), set[str]()
    sizes = _sizes(stages, config)
    markers = list[Mapping[str, Any]]()
    for unit in (unit for unit in units if ledger.is_done(unit.number)):
        tar, marker = folder.shards / shard_name(config.split, unit.number), ledger.results([unit.number])[0]
        markers.append(marker)
        of_tar = rows[unit.start : unit.stop]
        blocks = of_tar // stages["extract"]["inputs"]["config"]["block_rows"]
        sound = np.flatnonzero(~np.isin(blocks, [block for block in doubted if block is not None]))
        expected = _Expected(folder, config, index.take(of_tar), of_tar, sound)
        texts = _check_tar(tar, marker, expected, sizes, seen)
        yield from (Damage(stage="shard", unit=unit.number, text=text) for text in texts)
    if len(markers) < len(units):
        return
    for text in _check_set(folder, config, markers):
        yield Damage(stage="shard", text=text)


class _Expected:
    """What a tar should hold: rows of the index, and samples made again from the stores."""

    def __init__(
        self, folder: BuildFolder, config: ShardConfig, table: Any, rows: np.ndarray, sound: np.ndarray
    ) -> None:
        self.config, self.rows = config, rows
        self.records: Sequence[ImageRecord] = records_of(table)
        self.facts = table.select(FACTS).to_pylist()
        self.sampled: set[int] = set()
        if not is_fused(folder):  # made without stores
            self.features = stores.open_store(folder.features)
            self.regions = stores.open_store(folder.regions)
            self.sampled = set(sound[spread_rows(len(sound), SAMPLED_SAMPLES)].tolist())

    def sample(self, number: int, image: bytes | None) -> Sample:
        """Sample `number` of the tar, with the crop it has."""
        row = slice(int(self.rows[number]), int(self.rows[number]) + 1)
        arrays = {"features": stores.read_rows(self.features, "features", row)[0]}
        for name in (name for name in ("regions", "flags", "prototypes") if name in self.regions):
            arrays[name] = stores.read_rows(self.regions, name, row)[0]
        return make_sample(self.records[number], self.facts[number], arrays, self.config, image)


def _sizes(stages: Mapping[str, Any], config: ShardConfig) -> dict[str, Any]:
    extracted = stages["extract"]["inputs"]
    return {
        "grid": tuple(extracted["encoder"]["grid"]),
        "width": extracted["encoder"]["width"],
        "num_levels": len(stages["cluster"]["inputs"]["config"]["cuts"]) + 2,
        "num_classes": extracted["num_classes"],
        "feature_dtype": config.feature_dtype,
    }


def _check_tar(
    tar: Path, marker: Mapping[str, Any], expected: _Expected, sizes: Mapping[str, Any], seen: set[str]
) -> Iterator[str]:
    if not tar.is_file():
        yield f"{tar} is missing"
        return
    digest = sha256_file(tar)
    if digest != marker["sha256"]:
        yield f"{tar}: sha256 {digest[:12]}…, expected {marker['sha256'][:12]}…"
    yield from _check_sidecar(sidecar(tar), marker)
    keys = list[str]()
    try:
        yield from _check_members(tar)
        for number, sample in enumerate(read_shard(tar)):
            keys.append(sample.key)
            if sample.key in seen:
                yield f"{tar}: key {sample.key} occurs twice in the set"
            seen.add(sample.key)
            if problem := _sample_problem(sample, sizes) or _content_problem(sample, number, expected):
                yield f"{tar}: {sample.key}: {problem}"
    except BuilderError as error:
        yield str(error)
    if keys != [record.key for record in expected.records]:
        yield f"{tar}: {len(keys)} samples, expected the {len(expected.records)} of its rows of the index"


def _check_sidecar(path: Path, marker: Mapping[str, Any]) -> Iterator[str]:
    try:
        found = read_json(path)
    except BuilderError:
        found = {}
    if any(found.get(name) != marker[name] for name in ("count", "bytes", "sha256", "config_hash")):
        yield f"{path} is missing or belongs to another tar"


def _check_members(tar: Path) -> Iterator[str]:
    """Headers as `write_shard` makes them: plain files, nothing of the time, the user or other folders."""
    try:
        with tarfile.open(tar, "r:") as archive:
            for info in archive:
                owner = (info.mtime, info.uid, info.gid)
                if not info.isfile() or owner != (0, 0, 0) or info.name.startswith("/") or ".." in info.name:
                    yield f"{tar}: member {info.name} is not as it was written"
    except (tarfile.TarError, EOFError, OSError) as error:
        raise BuilderError(f"{tar}: not a whole tar ({error})") from None


def _sample_problem(sample: Sample, sizes: Mapping[str, Any]) -> str | None:
    height, width = sizes["grid"]
    shapes = {
        "features": (sample.features, (height, width, sizes["width"]), np.dtype(sizes["feature_dtype"])),
        "regions": (sample.regions, (sizes["num_levels"] - 1, height, width), REGION_DTYPE),
    }
    if sample.scale is not None:
        shapes["scale"] = (sample.scale, (height, width, 1), np.dtype("float32"))
    for name, (array, shape, dtype) in shapes.items():
        if array.shape != shape or array.dtype != dtype:
            return f"{name} are {array.dtype} {list(array.shape)}, expected {dtype} {list(shape)}"
    if not 0 <= sample.label < sizes["num_classes"]:
        return f"label {sample.label}, expected 0 to {sizes['num_classes'] - 1}"
    if not np.isfinite(sample.features).all():
        return "features are not finite"
    if sample.scale is not None and not (np.isfinite(sample.scale) & (sample.scale >= 0)).all():
        return "scales are not finite or below 0"
    if np.asarray(check_nesting(sample.regions[None])).any():
        return "region ids are not dense or not nested"
    return None


def _content_problem(sample: Sample, number: int, expected: _Expected) -> str | None:
    """Key, label and path against the index; of a sample of them every member against the stores."""
    if number >= len(expected.records):
        return "more samples than rows"
    record = expected.records[number]
    if (sample.key, sample.label, sample.metadata.get("path")) != (record.key, record.label, record.path):
        return f"not row {int(expected.rows[number])} of the index, {record.key} of class {record.label}"
    if number not in expected.sampled:
        return None
    found, made = encode_sample(sample), encode_sample(expected.sample(number, sample.image))
    different = sorted(name for name in found.keys() | made.keys() if found.get(name) != made.get(name))
    return f"{', '.join(different)} differ from what the stores give" if different else None


def _check_set(
    folder: BuildFolder, config: ShardConfig, markers: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """index.json, class map, statistics, card, vocabulary, the last marker; and tars nobody asked for."""
    shards, index = folder.shards, index_of(folder, config, markers)
    listed = {entry["url"] for entry in index["shardlist"]}
    for stray in folder.own_files(shards, config.split):
        if stray.suffix == ".tar" and stray.name not in listed:
            yield f"{stray} is not in index.json"
    yield from _check_index(shards / "index.json", index)
    try:
        if read_json(shards / "class_map.json") != read_json(folder.class_map):
            yield f"{shards / 'class_map.json'} is not the class map of the build"
    except BuilderError as error:
        yield str(error)
    if index["vocabulary"]:
        copy, made = shards / folder.vocabulary.name, folder.vocabulary
        if not (copy.is_file() and made.is_file() and sha256_file(copy) == sha256_file(made)):
            yield f"{copy} is not the vocabulary of the build"
    yield from _check_statistics(folder, shards / "statistics.npz", config)
    yield from _check_success(shards, index)


def _check_index(path: Path, expected: Mapping[str, Any]) -> Iterator[str]:
    try:
        found = read_json(path)
    except BuilderError as error:
        yield str(error)
        return
    if lacking := sorted(expected.keys() - found.keys()):
        yield f"{path} has no {', '.join(lacking)}: it is damaged"
        return
    names = [name for name in expected if name not in MEASURED and found[name] != expected[name]]
    if names or found.keys() - expected.keys():
        yield f"{path}: {', '.join(names) or 'its fields'} differ from what the manifest and the markers say"
        return
    card = path.with_name("README.md")
    if not card.is_file() or card.read_bytes() != card_of(found).encode():
        yield f"{card} is not the card of this index"


def _check_statistics(folder: BuildFolder, path: Path, config: ShardConfig) -> Iterator[str]:
    position = dataset_moments(folder)
    expected: dict[str, Any] = {
        "count": position.count,
        "mean": position.mean,
        "m2": position.m2,
        "variance": position.variance,
    }
    channel = per_channel(position)
    expected |= {
        "channel_count": channel.count,
        "channel_mean": channel.mean,
        "channel_m2": channel.m2,
        "channel_variance": channel.variance,
    }
    if config.covariance:
        expected["covariance"] = dataset_joint_moments(folder).variance
    try:
        with np.load(path, allow_pickle=False) as stored:
            different = [
                name
                for name, value in expected.items()
                if stored[name].shape != np.shape(value) or not np.allclose(stored[name], value, rtol=1e-12)
            ]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        yield f"{path} is damaged: {error}"
        return
    if different:
        yield f"{path}: {', '.join(different)} differ from those of the features"


def _check_success(shards: Path, index: Mapping[str, Any]) -> Iterator[str]:
    path = shards / SUCCESS
    if not path.is_file():
        yield f"{path} is missing: the set was not finished"
        return
    try:
        found = read_json(path)
    except BuilderError as error:
        yield str(error)
        return
    digest = sha256_file(shards / "index.json") if (shards / "index.json").is_file() else ""
    if found.get("index_sha256") != digest:
        yield f"{shards / 'index.json'} was changed after the set was finished"
    if found.get("count") != index["num_samples"]:
        yield f"{path}: {found.get('count')} samples, the markers have {index['num_samples']}"
