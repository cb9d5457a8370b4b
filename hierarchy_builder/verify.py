"""Does a finished build hold what its manifest promises? Each check yields the problems it finds."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hierarchy_builder import stores
from hierarchy_builder.artefacts import BuildFolder, read_json, sha256_file
from hierarchy_builder.errors import BuilderError
from hierarchy_builder.hierarchy import check_nesting
from hierarchy_builder.index import read_index, status_name
from hierarchy_builder.ledger import VERBS, read_manifest
from hierarchy_builder.publish import SUCCESS
from hierarchy_builder.records import REGION_DTYPE, Sample, Status
from hierarchy_builder.shards import read_shard, sidecar
from hierarchy_builder.units import finished_stage, stage_units, state_of
from hierarchy_builder.vocabulary import NO_REGION, load_vocabulary


def find_problems(folder: BuildFolder) -> Iterator[str]:
    """Check every artefact the manifest names, in the order of the data; yields one line per problem."""
    stages = read_manifest(folder.require())["stages"]
    for stage, check in {
        "extract": _check_features,
        "vocabulary": _check_vocabulary,
        "cluster": _check_regions,
        "link": _check_links,
        "shard": _check_shards,
    }.items():
        if stage not in stages:
            continue
        if state_of(folder, stage, 0) == "out of date":
            again = f"hierarchy-builder {VERBS[stage]} {folder.root} --fresh"
            yield f"{stage} is out of date, what it was made from has changed since: run `{again}`"
            continue
        try:
            finished_stage(folder, stage)
            yield from check(folder, stages)
        except BuilderError as error:
            yield f"{stage}: {error}"


def _check_features(folder: BuildFolder, stages: Mapping[str, Any]) -> Iterator[str]:
    table = read_index(folder.index)
    keys, statuses = table.column("key").to_pylist(), table.column("status").to_pylist()
    expected = stages["extract"]["inputs"]["num_images"]
    if len(keys) != expected:
        yield f"{folder.index}: {len(keys)} rows, the manifest has {expected}"
    if len(set(keys)) != len(keys):
        yield f"{folder.index}: {len(keys) - len(set(keys))} keys occur twice"
    for block in stage_units(folder, "extract"):
        try:
            status = stores.read_block(folder.features, "status", block)
            features = stores.read_block(folder.features, "features", block)
        except BuilderError as error:
            yield f"{folder.features}, block {block.number}: {error}"
            continue
        named = [status_name(Status(value)) for value in status.tolist()]
        if named != statuses[block.start : block.stop]:
            yield f"{folder.features}, block {block.number}: status differs from {folder.index.name}"
        usable = features[status == Status.OK]
        if not np.isfinite(usable).all():
            yield f"{folder.features}, block {block.number}: values that are not finite"
        if len(usable) and not usable.reshape(len(usable), -1).any(axis=1).all():
            yield f"{folder.features}, block {block.number}: usable rows that hold only zeros"


def _check_regions(folder: BuildFolder, stages: Mapping[str, Any]) -> Iterator[str]:
    for block in stage_units(folder, "cluster"):
        try:
            usable = stores.read_block(folder.features, "status", block) == Status.OK
            regions = stores.read_block(folder.regions, "regions", block)[usable]
            for name in ("merges", "flags"):  # their checksums
                stores.read_block(folder.regions, name, block)
        except BuilderError as error:
            yield f"{folder.regions}, block {block.number}: {error}"
            continue
        violations = np.asarray(check_nesting(regions))
        if violations.any():
            yield (
                f"{folder.regions}, block {block.number}: {int((violations > 0).sum())} images whose ids are not"
                " dense or not nested"
            )


def _check_vocabulary(folder: BuildFolder, stages: Mapping[str, Any]) -> Iterator[str]:
    vocabulary, config, config_hash = load_vocabulary(folder.vocabulary)
    width = stages["extract"]["inputs"]["encoder"]["width"]
    if config_hash != stages["vocabulary"]["hash"]:
        yield f"{folder.vocabulary}: configuration {config_hash[:12]} is not the manifest's"
    shapes = [level.shape for level in vocabulary.centroids]
    if shapes != [(size, width) for size in config.sizes]:
        yield f"{folder.vocabulary}: prototypes of shape {shapes}, expected sizes {config.sizes} of width {width}"
    if not all(np.isfinite(level).all() for level in vocabulary.centroids):
        yield f"{folder.vocabulary}: prototypes that are not finite"
    for coarse, fine, parents in zip(
        vocabulary.counts, vocabulary.counts[1:], vocabulary.parents, strict=False
    ):
        if not np.array_equal(np.bincount(parents, fine, len(coarse)), coarse):
            yield f"{folder.vocabulary}: prototypes do not have the tokens of those below them"


def _check_links(folder: BuildFolder, stages: Mapping[str, Any]) -> Iterator[str]:
    num_prototypes = stages["vocabulary"]["inputs"]["config"]["sizes"][-1]
    for block in stage_units(folder, "link"):
        try:
            prototypes = stores.read_block(folder.regions, "prototypes", block)
            distances = stores.read_block(folder.regions, "prototype_distances", block)
        except BuilderError as error:
            yield f"{folder.regions}, block {block.number}: {error}"
            continue
        if ((prototypes >= num_prototypes) & (prototypes != NO_REGION)).any():
            yield f"{folder.regions}, block {block.number}: prototypes of {num_prototypes} or more"
        if not np.array_equal(np.isfinite(distances), prototypes != NO_REGION):
            yield f"{folder.regions}, block {block.number}: prototypes without a distance, or the reverse"


def _check_shards(folder: BuildFolder, stages: Mapping[str, Any]) -> Iterator[str]:
    shards = folder.shards
    if not (shards / SUCCESS).is_file():
        yield f"{shards / SUCCESS} is missing: the set was not finished"
        return
    index = read_json(shards / "index.json")
    sizes = ("grid", "width", "num_levels", "num_classes", "num_samples")
    known = ("config_hash", "shardlist", "feature_dtype", *sizes)
    if lacking := [name for name in known if name not in index]:
        yield f"{shards / 'index.json'} has no {', '.join(lacking)}: it is damaged"
        return
    yield from _check_companions(folder, index)
    if index["config_hash"] != stages["shard"]["hash"]:
        yield f"{shards / 'index.json'}: configuration {index['config_hash'][:12]} is not the manifest's"
    listed = {entry["url"] for entry in index["shardlist"]}
    for stray in sorted(path.name for path in shards.glob("*.tar") if path.name not in listed):
        yield f"{shards / stray} is not in index.json"
    seen: set[str] = set()
    for entry in index["shardlist"]:
        yield from _check_tar(shards / entry["url"], entry, index, seen)
    table = read_index(folder.index)
    usable = {
        key
        for key, status in zip(
            table.column("key").to_pylist(), table.column("status").to_pylist(), strict=True
        )
        if status == status_name(Status.OK)
    }
    if seen != usable:
        yield f"{shards}: {len(usable - seen)} images are in no tar, {len(seen - usable)} are not in the index"


def _check_companions(folder: BuildFolder, index: Mapping[str, Any]) -> Iterator[str]:
    """index.json against its hash in the marker; class map and statistics against the build."""
    shards = folder.shards
    if read_json(shards / SUCCESS).get("index_sha256") != sha256_file(shards / "index.json"):
        yield f"{shards / 'index.json'} was changed after the set was finished"
    if read_json(shards / "class_map.json") != read_json(folder.class_map):
        yield f"{shards / 'class_map.json'} is not the class map of the build"
    if index.get("vocabulary"):
        copy, made = shards / folder.vocabulary.name, folder.vocabulary
        if not (copy.is_file() and made.is_file() and sha256_file(copy) == sha256_file(made)):
            yield f"{copy} is not the vocabulary of the build"
    try:
        with np.load(shards / "statistics.npz", allow_pickle=False) as stored:
            count = int(stored["count"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        yield f"{shards / 'statistics.npz'} is damaged: {error}"
        return
    if count != index["num_samples"]:
        yield f"{shards / 'statistics.npz'}: statistics of {count} images, index.json has {index['num_samples']}"


def _check_tar(
    tar: Path, entry: Mapping[str, Any], index: Mapping[str, Any], seen: set[str]
) -> Iterator[str]:
    if not tar.is_file():
        yield f"{tar} is missing"
        return
    digest = sha256_file(tar)
    if digest != entry["sha256"]:
        yield f"{tar}: sha256 {digest[:12]}…, expected {entry['sha256'][:12]}…"
    if not sidecar(tar).is_file() or read_json(sidecar(tar)).get("sha256") != entry["sha256"]:
        yield f"{sidecar(tar)} is missing or belongs to another tar"
    count = 0
    try:
        for sample in read_shard(tar):
            count += 1
            if sample.key in seen:
                yield f"{tar}: key {sample.key} occurs twice in the set"
            seen.add(sample.key)
            problem = _sample_problem(sample, index)
            if problem:
                yield f"{tar}: {sample.key}: {problem}"
    except BuilderError as error:
        yield str(error)
    if count != entry["nsamples"]:
        yield f"{tar}: {count} samples, index.json has {entry['nsamples']}"


def _sample_problem(sample: Sample, index: Mapping[str, Any]) -> str | None:
    height, width = index["grid"]
    shapes = {
        "features": (sample.features, (height, width, index["width"]), np.dtype(index["feature_dtype"])),
        "regions": (sample.regions, (index["num_levels"] - 1, height, width), REGION_DTYPE),
    }
    if sample.scale is not None:
        shapes["scale"] = (sample.scale, (height, width, 1), np.dtype("float32"))
    for name, (array, shape, dtype) in shapes.items():
        if array.shape != shape or array.dtype != dtype:
            return f"{name} are {array.dtype} {list(array.shape)}, expected {dtype} {list(shape)}"
    if not 0 <= sample.label < index["num_classes"]:
        return f"label {sample.label}, expected 0 to {index['num_classes'] - 1}"
    if not np.isfinite(sample.features).all():
        return "features are not finite"
    if sample.scale is not None and not (np.isfinite(sample.scale) & (sample.scale >= 0)).all():
        return "scales are not finite or below 0"
    if np.asarray(check_nesting(sample.regions[None])).any():
        return "region ids are not dense or not nested"
    return None
