"""Check that a build holds what its manifest promises. Every file is read whole, or see `quick.py`; nothing is changed.

The marker of a unit holds the SHA-256 of what the unit wrote, so verify finds a block of another build as well as a
flipped bit. What can be computed from other files of the build is compared with them too.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hierarchy_builder.config import HierarchyRecipe, ShardConfig
from hierarchy_builder.errors import BuilderError, or_none
from hierarchy_builder.fields import from_mapping
from hierarchy_builder.files.untrusted.arrays import parse_npz
from hierarchy_builder.files.whole import decoding, fetched, read_json, readable_json, sha256_file
from hierarchy_builder.images.originals import changed_images, describe_changed
from hierarchy_builder.images.sources import listing_hash, open_reader
from hierarchy_builder.images.table import ImageTable
from hierarchy_builder.records import REGION_DTYPE, Block, Sample, Status, spread_evenly
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BEGUN, BuildFolder
from hierarchy_builder.store.index import OUTCOME_COLUMNS, read_images, read_index, status_name
from hierarchy_builder.store.ledger import (
    again_command,
    check_manifest,
    is_fused,
    open_ledger,
    recorded_stages,
    stage_entry,
)
from hierarchy_builder.store.samples import FACTS, make_sample
from hierarchy_builder.store.shard_set import (
    SUCCESS,
    card_of,
    dataset_moments,
    has_earlier_card,
    index_of,
    success_problems,
)
from hierarchy_builder.store.shards import encode_sample, read_shard, shard_name, sidecar_problems
from hierarchy_builder.store.statistics import read_part_moments, statistics_arrays
from hierarchy_builder.store.stored import Stored, is_as_written
from hierarchy_builder.store.units import (
    layout_of,
    outcomes_so_far,
    require_all,
    stage_units,
    state_of,
    stored_source,
    usable_rows,
)
from hierarchy_builder.terminal import counted
from hierarchy_builder.verify.quick import missing_files
from hierarchy_builder.vocabulary.prototypes import NO_REGION, load_vocabulary

MANIFEST = "manifest"
"""Value of `Damage.stage` for damage of the manifest itself."""
SAMPLED_ROWS = 16
"""Rows of each block whose regions are cut from their trees again and compared."""
SAMPLED_SAMPLES = 8
"""Samples of each tar that are made from the stores again, with canvases, and compared byte by byte."""
MEASURED = ("quantisation", "code_version")
"""Fields of index.json that do not follow from the manifest and the markers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """One problem that verify finds and repair can remove."""

    stage: str
    """The stage that wrote the damaged file: a name of `ledger.STAGES`, `covariance` or `manifest`."""
    text: str
    """Where the problem is, what was found and what was expected."""
    unit: int | None = None
    """The unit that wrote it; None for what a stage writes after all its units, and for units that are missing."""
    is_stale: bool = False
    """Whether the files are whole, but an earlier stage was run again after this one."""


Check = Callable[[BuildFolder, Mapping[str, Any]], Iterator[Damage]]
BlockCheck = Callable[[Block, Mapping[str, np.ndarray], Mapping[str, Any]], Iterator[str]]


def find_problems(folder: BuildFolder) -> Iterator[str]:
    """Check everything the manifest names, in the order of the data; yields one line per problem."""
    return (damage.text for damage in find_damage(folder))


def find_damage(folder: BuildFolder, *, quick: bool = False) -> Iterator[Damage]:
    """Do the same, and yield each problem with its stage and unit.

    quick: read no payload, see `quick.py`. Raises UsageError when `folder` is not a build.
    """
    folder.require(damaged=True)
    try:
        stages = check_manifest(folder.manifest)["stages"]
    except BuilderError as error:
        yield Damage(stage=MANIFEST, text=f"{error}; nothing else was checked")
        return
    copy = folder.manifest_copy
    if not copy.is_file() or copy.read_bytes() != folder.manifest.read_bytes():
        yield Damage(
            stage=MANIFEST, text=f"{copy} is missing or differs from {folder.manifest.name}, which it copies"
        )
    damaged_blocks = set[int | None]()
    checks: dict[str, Check] = {
        "extract": _check_extract,
        "vocabulary": _check_vocabulary,
        "cluster": _check_regions,
        "link": _check_links,
        "shard": partial(_check_shards, damaged_blocks=damaged_blocks),
        "fuse": _check_fused,
    }
    if quick:
        checks = {stage: partial(_check_quickly, stage) for stage in checks}
    for stage in (name for name in checks if name in stages):
        if state_of(folder, stage, 0) == "out of date":
            text = f"{stage} is out of date, since an earlier stage has changed: run `{again_command(folder, stage)}`"
            yield Damage(stage=stage, text=text, is_stale=True)
            continue
        if stage == "shard" and or_none(usable_rows, folder) is None:
            continue  # which rows a tar holds is known when the markers of extract are whole
        for damage in _check_stage(folder, stage, checks[stage]):
            if stage != "shard" and not damage.is_stale:
                damaged_blocks.add(damage.unit)
            yield damage


def _check_quickly(stage: str, folder: BuildFolder, stages: Mapping[str, Any]) -> Iterator[Damage]:
    for unit, text in missing_files(folder, stage, stages):
        yield Damage(stage=stage, unit=unit, text=text)


def _check_stage(folder: BuildFolder, stage: str, check: Check) -> Iterator[Damage]:
    try:
        # A marker of an earlier release has no seal, so its fields may be of any kind.
        with decoding(f"{folder.ledger(stage)}: markers are"):
            path, layout = layout_of(folder, stage)
            for name in stores.damaged_layout(path, layout) if layout else []:
                yield Damage(stage=stage, text=f"{path / name / 'zarr.json'} is not as it was made")
            yield from _check_markers(folder, stage)
            yield from check(folder, recorded_stages(folder))
    except BuilderError as error:
        yield Damage(stage=stage, text=f"{stage}: {error}")


def _then_error(texts: Iterator[str]) -> Iterator[str]:
    """Yield the problems a check finds, and the text of the BuilderError that ends it, if there is one."""
    try:
        yield from texts
    except BuilderError as error:
        yield str(error)


def _damages(stage: str, texts: Iterator[str], unit: int | None = None, place: str = "") -> Iterator[Damage]:
    """Yield what `_then_error` does as damage of a unit. place: begins each text."""
    return (Damage(stage=stage, unit=unit, text=place + text) for text in _then_error(texts))


def _check_markers(folder: BuildFolder, stage: str) -> Iterator[Damage]:
    ledger, units = open_ledger(folder, stage), stage_units(folder, stage)
    found = {int(path.stem): path for path in folder.markers(stage)}
    for number in sorted(found.keys() - {unit.number for unit in units}):
        text = f"{found[number]} is the marker of a unit that {stage} does not have"
        yield Damage(stage=stage, unit=number, text=text)
    missing = ledger.missing(units)
    for number in (unit.number for unit in missing if unit.number in found):
        text = f"{found[number]} is damaged or belongs to another configuration"
        yield Damage(stage=stage, unit=number, text=text)
    for path in sorted(folder.ledger(stage).glob(f"*{BEGUN}")):
        text = f"{path} is left of a repair that was interrupted: what was made from this unit may be of another one"
        yield Damage(stage=stage, unit=int(path.stem), text=text)
    try:
        require_all(folder, stage, len(units) - len(missing), len(units))
    except BuilderError as error:
        yield Damage(stage=stage, text=str(error))


def _check_blocks(folder: BuildFolder, stage: str, check: BlockCheck) -> Iterator[Damage]:
    """Compare the arrays of each finished block with their SHA-256, then run `check(block, arrays, marker)`."""
    path, layout = layout_of(folder, stage)
    group = or_none(stores.open_store, path)

    def problems(block: Block, marker: Mapping[str, Any]) -> Iterator[str]:
        arrays: dict[str, np.ndarray] = {}
        for name in layout:
            try:
                opened = stores.open_store(path) if group is None else group
                arrays[name], digest = stores.read_written(opened, name, block)
            except BuilderError as error:
                yield str(error)
                continue
            if marker["digests"].get(name) != digest or not is_as_written(opened, name, block, marker):
                yield f"{name} are not those that were written"
        if len(arrays) == len(layout):
            yield from check(block, arrays, marker)

    for block, marker in open_ledger(folder, stage).finished(stage_units(folder, stage)):
        place = f"{path}, block {block.number}: "
        yield from _damages(stage, problems(block, marker), block.number, place)


def _check_extract(folder: BuildFolder, stages: Mapping[str, Any]) -> Iterator[Damage]:
    yield from _check_listing(folder, "extract", stages["extract"])
    yield from _check_photos(folder, "extract")

    def check(block: Block, arrays: Mapping[str, np.ndarray], marker: Mapping[str, Any]) -> Iterator[str]:
        features, status = arrays["features"], arrays["status"]
        recorded = [outcome.get("status") for outcome in marker["outcomes"]]
        if [status_name(Status(value)) for value in status.tolist()] != recorded:
            yield "status differs from the marker"
        usable = features[status == Status.OK]
        if not np.isfinite(usable).all():
            yield "features are not finite"
        if len(usable) and not usable.reshape(len(usable), -1).any(axis=1).all():
            yield "features of usable rows are all zeros"

    yield from _check_blocks(folder, "extract", check)
    if or_none(stores.has_scatter, folder.features):
        yield from _check_blocks(folder, "covariance", lambda *_: iter(()))


def _check_fused(folder: BuildFolder, stages: Mapping[str, Any]) -> Iterator[Damage]:
    """Check the listing of a fused build and the statistics of its blocks; if these are whole, its shards."""
    yield from _check_listing(folder, "fuse", stages["extract"])
    yield from _check_photos(folder, "fuse")
    lost, ledger = list[Damage](), open_ledger(folder, "fuse")
    for block, marker in ledger.finished(stage_units(folder, "fuse")):
        try:
            read_part_moments(folder, block.number, marker)
        except BuilderError as error:
            lost.append(Damage(stage="fuse", unit=block.number, text=str(error)))
    if lost or or_none(usable_rows, folder) is None:
        yield from lost
        return
    yield from _check_markers(folder, "shard")
    yield from _check_shards(folder, stages)


def _check_listing(folder: BuildFolder, stage: str, entry: Mapping[str, Any]) -> Iterator[Damage]:
    """Check the listing and the index against the manifest and the markers, and the class map."""
    for path in (folder.listing, folder.index):
        yield from _damages("extract", _listing_problems(path, entry))
    try:
        listing, index = read_images(folder.listing), read_index(folder.index)
        if ImageTable(index) != listing:
            text = f"{folder.index}: rows are in another order than in {folder.listing.name}"
            yield Damage(stage="extract", text=text)
        yield from _check_outcomes(folder, stage, index.select(OUTCOME_COLUMNS).to_pylist())
    except BuilderError:
        pass  # said above
    if "class_map" in entry:
        yield from _damages("extract", _class_map_problems(folder.class_map, entry["class_map"]))


def _listing_problems(path: Path, entry: Mapping[str, Any]) -> Iterator[str]:
    records = read_images(path)
    if listing_hash(records) != entry["inputs"]["listing_hash"]:
        yield f"{path} is not the listing the build was made from"
    # The hash of a listing leaves out the names of classes, whose ids it holds.
    ids = entry.get("class_map")
    if ids is not None and any(ids.get(record.class_name) != record.label for record in records):
        yield f"{path} has names of classes that are not those of its labels"


def is_listing(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a listing or index proves itself whole: it is readable and lists what the build was made from."""
    return not any(_then_error(_listing_problems(path, entry)))


def _check_outcomes(folder: BuildFolder, stage: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[Damage]:
    """Compare the outcomes in the index with those of finished units; in an unfinished build they come later."""
    ledger, units = open_ledger(folder, stage), stage_units(folder, stage)
    if ledger.missing(units):
        return
    for unit, marker in ledger.finished(units):
        told = [{name: row.get(name) for name in OUTCOME_COLUMNS} for row in marker["outcomes"]]
        if told != rows[unit.start : unit.stop]:
            # Without a seal nothing tells which of the two is right, so the images are looked at again.
            number = None if "format_version" in marker else unit.number
            text = f"{folder.index}: outcomes differ from those of the marker of block {unit.number}"
            yield Damage(stage=stage if number is not None else "extract", unit=number, text=text)


def _check_photos(folder: BuildFolder, stage: str) -> Iterator[Damage]:
    """Say which photographs are not the files that were encoded, where they are still there; the build is whole."""
    outcomes = outcomes_so_far(folder)
    is_told = outcomes.column("modified").is_valid()
    if not pc.any(is_told).as_py():
        return
    try:
        reader, paths = open_reader(stored_source(folder)), read_images(folder.listing).column("path")
    except (BuilderError, OSError):
        return
    if len(outcomes) != len(paths):
        return
    known, told = (part.filter(is_told).to_pylist() for part in (paths, outcomes))
    if changed := changed_images(known, told, reader):
        yield Damage(stage=stage, text=describe_changed(stored_source(folder), changed), is_stale=True)


def _class_map_problems(path: Path, expected: Mapping[str, Any]) -> Iterator[str]:
    if read_json(path) != expected:
        yield f"{path} is not the class map of the build"


def _check_regions(folder: BuildFolder, stages: Mapping[str, Any]) -> Iterator[Damage]:
    from hierarchy_builder.hierarchy.recipe import check_nesting, cut_levels, given_levels

    recipe = from_mapping(HierarchyRecipe, stages["cluster"]["request"])

    def check(block: Block, arrays: Mapping[str, np.ndarray], marker: Mapping[str, Any]) -> Iterator[str]:
        usable = stores.read_block(folder.features, "status", block) == Status.OK
        regions, merges, flags = (arrays[name][usable] for name in ("regions", "merges", "flags"))
        violations = np.asarray(check_nesting(regions))
        if violations.any():
            yield f"{counted(int((violations > 0).sum()), 'image')} with ids that are not dense or not nested"
            return
        rows = spread_evenly(len(regions), SAMPLED_ROWS)
        if not rows:
            return
        given = given_levels(flags[rows], recipe)
        if not np.array_equal(cut_levels(regions[rows, 0], merges[rows], recipe.cuts, given), regions[rows]):
            yield "regions do not follow from their trees"

    yield from _check_blocks(folder, "cluster", check)


def _check_links(folder: BuildFolder, stages: Mapping[str, Any]) -> Iterator[Damage]:
    num_prototypes = stages["vocabulary"]["inputs"]["config"]["sizes"][-1]

    def check(block: Block, arrays: Mapping[str, np.ndarray], marker: Mapping[str, Any]) -> Iterator[str]:
        prototypes, distances = arrays["prototypes"], arrays["prototype_distances"]
        if ((prototypes >= num_prototypes) & (prototypes != NO_REGION)).any():
            yield f"prototypes have ids of {num_prototypes} or more"
        if not np.array_equal(np.isfinite(distances), prototypes != NO_REGION):
            yield "prototypes without a distance, or distances without a prototype"

    yield from _check_blocks(folder, "link", check)


def _check_vocabulary(folder: BuildFolder, stages: Mapping[str, Any]) -> Iterator[Damage]:
    ledger = open_ledger(folder, "vocabulary")
    if ledger.is_done(0):
        problems = _vocabulary_problems(folder, stages, ledger.result(0))
        yield from _damages("vocabulary", problems, 0, f"{folder.vocabulary}: ")


def _vocabulary_problems(
    folder: BuildFolder, stages: Mapping[str, Any], marker: Mapping[str, Any]
) -> Iterator[str]:
    vocabulary, config, config_hash = load_vocabulary(folder.vocabulary)
    width = stages["extract"]["inputs"]["encoder"]["width"]
    if sha256_file(folder.vocabulary) != marker["sha256"]:
        yield "not the one that was fitted"
    if config_hash != stages["vocabulary"]["hash"]:
        yield f"configuration {config_hash[:12]}… differs from that in the manifest"
    shapes = [level.shape for level in vocabulary.centroids]
    if shapes != [(size, width) for size in config.sizes]:
        yield f"prototypes have shapes {shapes}, expected sizes {config.sizes} of width {width}"
    if not all(np.isfinite(level).all() for level in vocabulary.centroids):
        yield "prototypes are not finite"
    levels = zip(vocabulary.counts, vocabulary.counts[1:], vocabulary.parents, strict=False)
    for coarse, fine, parents in levels:
        if not np.array_equal(np.bincount(parents, fine, len(coarse)), coarse):
            yield "token counts of prototypes differ from the sums over their children"


def _check_shards(
    folder: BuildFolder, stages: Mapping[str, Any], *, damaged_blocks: Collection[int | None] = ()
) -> Iterator[Damage]:
    """Check every finished tar against its marker, the index and the stores, then the files next to the tars.

    damaged_blocks: blocks of the stores whose rows are not compared with tars; nothing is checked if None is among
    them, since the index itself may be wrong then.
    """
    if None in damaged_blocks:
        return
    config = from_mapping(ShardConfig, stages["shard"]["request"])
    ledger = open_ledger(folder, "shard")
    units = stage_units(folder, "shard")
    rows, index, seen = usable_rows(folder), read_index(folder.index), set[str]()
    stored = None if is_fused(folder) else Stored(folder)  # a fused build has no stores
    extracted, recipe = stages["extract"]["inputs"], stages["cluster"]["inputs"]["config"]
    encoder, num_levels = extracted["encoder"], len(recipe["cuts"]) + 2
    arrays = arrays_of(encoder["grid"], encoder["width"], num_levels, config.feature_dtype)
    layout = Layout(arrays, extracted["num_classes"])
    markers = list[Mapping[str, Any]]()
    for unit, marker in ledger.finished(units):
        tar = folder.shards / shard_name(config.split, unit.number)
        markers.append(marker)
        tar_rows = rows[unit.start : unit.stop]
        blocks = tar_rows // extracted["config"]["block_rows"]
        intact = np.flatnonzero(~np.isin(blocks, [block for block in damaged_blocks if block is not None]))
        expected = _ExpectedTar(stored, config, index.take(tar_rows), tar_rows, intact)
        yield from _damages("shard", _tar_problems(tar, marker, layout, expected, seen), unit.number)
    if len(markers) == len(units):
        yield from _damages("shard", _set_problems(folder, config, markers))


@dataclass
class Layout:
    """What all samples of a set have in common: shape and dtype of the arrays that they may have, and the classes."""

    arrays: dict[str, tuple[tuple[int, ...], np.dtype]]
    num_classes: int


def arrays_of(
    grid: Sequence[int], width: int, num_levels: int, feature_dtype: str
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of the arrays of a sample."""
    return {
        "features": ((*grid, width), np.dtype(feature_dtype)),
        "regions": ((num_levels - 1, *grid), np.dtype(REGION_DTYPE)),
        "scale": ((*grid, 1), np.dtype("float32")),
    }


class _ExpectedTar:
    """What a tar should hold: rows of the index, and samples that are made from the stores again.

    stored: the stores of the build, if it has them. table, rows: the rows of the index in this tar and their numbers.
    intact: positions in `rows` whose blocks are not damaged.
    """

    def __init__(
        self,
        stored: Stored | None,
        config: ShardConfig,
        table: pa.Table,
        rows: np.ndarray,
        intact: np.ndarray,
    ) -> None:
        self.stored, self.config, self.rows = stored, config, rows
        self.records, self.facts = list(ImageTable(table)), table.select(FACTS).to_pylist()
        spread = spread_evenly(len(intact), SAMPLED_SAMPLES) if stored is not None else []
        self.sampled = set(intact[spread].tolist())

    def problem(self, number: int, sample: Sample) -> str | None:
        """Compare key, label and path with the index, and every member of a sampled one with the stores."""
        if number >= len(self.records):
            return "more samples than rows"
        record, row = self.records[number], int(self.rows[number])
        if (sample.key, sample.label, sample.metadata.get("path")) != (record.key, record.label, record.path):
            return f"not row {row} of the index, {record.key} of class {record.label}"
        if self.stored is None or number not in self.sampled:
            return None
        names = ("features", *self.stored.region_arrays)
        arrays = {name: self.stored.rows(name, slice(row, row + 1))[0] for name in names}
        again = make_sample(record, self.facts[number], arrays, self.config, sample.image)
        found, made = encode_sample(sample), encode_sample(again)
        different = sorted(name for name in found.keys() | made.keys() if found.get(name) != made.get(name))
        return f"{', '.join(different)} differ from what the stores give" if different else None


def _tar_problems(
    tar: Path, marker: Mapping[str, Any], layout: Layout, expected: _ExpectedTar, seen: set[str]
) -> Iterator[str]:
    """Check one tar. seen: keys of the tars before it; those of this tar are added."""
    if not tar.exists():
        yield f"{tar} is missing"
        return
    keys = list[str]()
    with fetched(tar) as file:
        digest = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
        if digest != marker["sha256"]:
            yield f"{tar}: sha256 {digest[:12]}…, expected {marker['sha256'][:12]}…"
        yield from sidecar_problems(tar, marker)
        yield from _then_error(sample_problems(tar, file, layout, seen, keys, expected.problem))
    if keys != [record.key for record in expected.records]:
        yield f"{tar}: {len(keys)} samples, expected the {len(expected.records)} of its rows of the index"


def sample_problems(
    tar: Path,
    file: BinaryIO,
    layout: Layout,
    seen: set[str],
    keys: list[str],
    more: Callable[[int, Sample], str | None] = lambda number, sample: None,
) -> Iterator[str]:
    """Check the headers and samples of an open tar, and `more` of each sample.

    seen: keys of the tars before it. Those of this tar are added, and appended to `keys` in their order.
    """
    file.seek(0)
    with decoding(f"{tar}: not a whole tar, it is"), tarfile.open(fileobj=file, mode="r:") as archive:
        for info in archive:  # as `write_shard` makes them: plain files without time, owner or parent folders
            owner = (info.mtime, info.uid, info.gid)
            if not info.isfile() or owner != (0, 0, 0) or info.name.startswith("/") or ".." in info.name:
                yield f"{tar}: member {info.name} is not as it was written"
    file.seek(0)
    for number, sample in enumerate(read_shard(tar, file)):
        keys.append(sample.key)
        if sample.key in seen:
            yield f"{tar}: key {sample.key} occurs twice in the set"
        seen.add(sample.key)
        if problem := array_problem(sample, layout) or more(number, sample):
            yield f"{tar}: {sample.key}: {problem}"


def array_problem(sample: Sample, expected: Layout) -> str | None:
    """Compare shapes, dtypes, label and values of a sample with what its set says."""
    for name, (shape, dtype) in expected.arrays.items():
        array = getattr(sample, name)
        if array is not None and (array.shape != shape or array.dtype != dtype):
            return f"{name} are {array.dtype} {list(array.shape)}, expected {dtype} {list(shape)}"
    if not 0 <= sample.label < expected.num_classes:
        return f"label {sample.label}, expected 0 to {expected.num_classes - 1}"
    if not np.isfinite(sample.features).all():
        return "features are not finite"
    if sample.scale is not None and not (np.isfinite(sample.scale) & (sample.scale >= 0)).all():
        return "scales are not finite or below 0"
    from hierarchy_builder.hierarchy import check_nesting

    if np.asarray(check_nesting(sample.regions[None])).any():
        return "region ids are not dense or not nested"
    return None


def _set_problems(
    folder: BuildFolder, config: ShardConfig, markers: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Check index.json, class map, statistics, card, vocabulary and _SUCCESS, and look for tars not in the index."""
    shards, index = folder.shards, index_of(folder, config, markers)
    listed = {entry["url"] for entry in index["shardlist"]}
    for path in folder.own_files(shards, config.split):
        if path.suffix == ".tar" and path.name not in listed:
            yield f"{path} is not in index.json"
    ids = stage_entry(folder, "extract").get("class_map") or read_json(folder.class_map)
    yield from _then_error(_index_problems(shards / "index.json", index, ids))
    yield from _then_error(_class_map_problems(shards / "class_map.json", ids))
    if index["vocabulary"]:
        copy, made = shards / folder.vocabulary.name, folder.vocabulary
        if not (copy.is_file() and made.is_file() and sha256_file(copy) == sha256_file(made)):
            yield f"{copy} is not the vocabulary of the build"
    yield from _then_error(_statistics_problems(folder, shards / "statistics.npz", config))
    yield from _then_error(success_problems(shards, index))


def _index_problems(path: Path, expected: Mapping[str, Any], class_map: Mapping[str, int]) -> Iterator[str]:
    found = read_json(path)
    if lacking := sorted(expected.keys() - found.keys()):
        yield f"{path} has no {', '.join(lacking)}: it is damaged"
        return
    names = [name for name in expected if name not in MEASURED and found[name] != expected[name]]
    if names or found.keys() - expected.keys():
        yield f"{path}: {', '.join(names) or 'its fields'} differ from what the manifest and the markers say"
        return
    card = path.with_name("README.md")
    vouched = readable_json(path.with_name(SUCCESS))
    if card.name in vouched.get("files", {}) or has_earlier_card(path.parent, found):
        return  # the mark of the set holds the digest of the card, whose wording is that of the release that wrote it
    if not card.is_file() or card.read_bytes() != card_of(found, class_map).encode():
        yield f"{card} is not the card of this index"


def _statistics_problems(folder: BuildFolder, path: Path, config: ShardConfig) -> Iterator[str]:
    joint = dataset_moments(folder, joint=True) if config.covariance else None
    expected = statistics_arrays(dataset_moments(folder), joint)
    with decoding(path):
        stored = parse_npz(path.read_bytes())
        different = [
            name
            for name, value in expected.items()
            if stored[name].shape != np.shape(value) or not np.allclose(stored[name], value, rtol=1e-12)
        ]
    if different:
        yield f"{path}: {', '.join(different)} differ from those of the features"
