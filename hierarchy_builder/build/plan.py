"""`plan`: what a build would write, how long it would take and what it would resume; nothing of the build is written.

The states of the stages come from the manifest and the markers. Sizes and times are estimates from one trial: a
build of at most TRIAL_IMAGES random images in a temporary folder next to the build. The number of units, shards and
prototypes is known, and so are the sizes that follow from it; the rest grows with the number of images or of blocks.

    N images, H×W grid, C channels, T = H·W tokens
"""

from __future__ import annotations

import math
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hierarchy_builder.build.changes import Growth, growth_of, parts_of
from hierarchy_builder.build.clustering import stage_inputs
from hierarchy_builder.build.inputs import extract_inputs, list_images, settle_rows
from hierarchy_builder.build.pipeline import build, check_fused
from hierarchy_builder.build.session import BuildPlan, Session, StageSummary
from hierarchy_builder.build.space import fitting_bytes, free_bytes, nearest_folder
from hierarchy_builder.build.stages import asked_encoder, one_thread
from hierarchy_builder.build.workers import RAY_START_S, saves_time
from hierarchy_builder.config import VocabularyConfig
from hierarchy_builder.errors import BuilderError, ConfigMismatchError
from hierarchy_builder.fields import difference
from hierarchy_builder.files.whole import json_text, read_json, sealed_text, size_on_disk
from hierarchy_builder.images.masks import open_masks
from hierarchy_builder.images.sources import ImageSource
from hierarchy_builder.images.table import ImageTable
from hierarchy_builder.machine.process import num_cpus
from hierarchy_builder.progress import Reporter
from hierarchy_builder.records import Block, ImageRecord, Status, blocks_of
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import read_index, status_name, write_index
from hierarchy_builder.store.ledger import Ledger, differences, hash_of, read_manifest, read_marker
from hierarchy_builder.store.shards import TAR_BLOCK, shard_name, sidecar
from hierarchy_builder.store.units import samples_per_shard
from hierarchy_builder.terminal import counted
from hierarchy_builder.vocabulary.kmeans import sum_clusters

TRIAL_IMAGES = 128
"""Images of the trial."""
TRIAL_ROWS = 40
"""Rows of a block of the trial; with a power of two the means of a block would have few digits and compress better."""
TRIAL_PROTOTYPES = 256
"""Prototypes on each level of the vocabulary of the trial, at most."""
WRITTEN = 2**17
"""Rows of the index that are written to see how many bytes they take, at most."""
TIMED_TOKENS = 4_096
"""Tokens that are clustered once to estimate the time of a vocabulary."""
LISTED = 20
"""Classes and unreadable images that the tables list, at most."""


SHARED_TARS, FEW_SAMPLES = 20, 1000
"""Tars that keep the workers of a reader busy, and samples below which one worker is enough."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """What the build would do in one stage.

    state: `to do`, `goes on`, `done`, `starts over` (--fresh), or `refused` for the reasons in `differs`.
    images: images still to do, in `units` − `units_done` units. seconds: estimate for them, with start-up.
    """

    stage: str
    units: int
    units_done: int
    images: int
    state: str
    seconds: float
    differs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What `hierarchy-builder plan` prints.

    classes: class → images. tried: images of the trial, of which `unreadable` (path → reason) failed. usable:
    images expected in the shards. sizes: bytes by place in the build folder, estimated from the `tried` images.
    uncertainty: two relative standard errors of the most uncertain size. present: bytes that exist already.
    scratch: bytes that are in use during the build and gone at its end. shards: names, samples and bytes of the tars.
    """

    source: str
    num_images: int
    input_bytes: int
    classes: Mapping[str, int]
    warnings: Sequence[str]
    tried: int
    unreadable: Mapping[str, str]
    usable: int
    sizes: Mapping[str, int]
    uncertainty: float
    shards: Mapping[str, Any]
    stages: Sequence[StagePlan]
    present: int
    scratch: int
    free: int

    @property
    def total(self) -> int:
        """Bytes of the finished build."""
        return sum(self.sizes.values())

    @property
    def missing(self) -> int:
        """Bytes that the build needs in addition to those present, at most."""
        return max(0, self.total - self.present) + self.scratch

    @property
    def seconds(self) -> float:
        """Time of all stages that are still to do."""
        return sum(stage.seconds for stage in self.stages)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        sums = {"total": self.total, "missing": self.missing, "seconds": self.seconds}
        return {**asdict(self), **sums, "fits": self.missing <= self.free}

    def check(self, folder: BuildFolder, *, force: bool) -> None:
        """Raise what the build would raise at once: ConfigMismatchError, or BuilderError if the disk is too small."""
        for stage in self.stages:
            if stage.state == "refused":
                raise ConfigMismatchError(
                    f"{folder.root} was made with another {stage.stage} configuration or input:\n  "
                    + "\n  ".join(stage.differs)
                )
        if self.missing > self.free and not force:
            raise BuilderError(
                f"{folder.root}: {self.missing:,} bytes are still to be written, {self.free:,} are free there: "
                "free some space or choose another --out"
            )


def plan_tables(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """The tables that `plan` prints, by title."""
    counts = sorted(plan.classes.values())
    fits = "fits" if plan.missing <= plan.free else "DOES NOT FIT"
    estimate = f"estimated from {plan.tried:,} images"
    summary: dict[str, Any] = {
        "images": f"{plan.num_images:,} ({plan.input_bytes:,} bytes)",
        "classes": f"{len(counts):,}, the smallest of {counts[0]:,} images, the largest of {counts[-1]:,}",
        "tried": f"{plan.tried:,}, unreadable {len(plan.unreadable)}",
        "usable": f"{plan.usable:,}",
        "shards": "{count} of {samples:,} images, {bytes:,} bytes each: {first} … {last}".format(
            **plan.shards
        ),
        "bytes": f"{plan.total:,} (± {plan.uncertainty:.1%}, {estimate}), of which {plan.present:,} exist",
        "to write": f"{plan.missing:,}, free {plan.free:,}: {fits}",
        "time": f"{plan.seconds:,.0f} s, {estimate}",
    }
    tables = {"Build": [{"name": name, "value": value} for name, value in summary.items()]}
    if len(counts) <= LISTED:
        tables["Classes"] = [{"class": name, "images": count} for name, count in plan.classes.items()]
    if plan.unreadable:
        listed = list(plan.unreadable.items())[:LISTED]
        tables["Unreadable"] = [{"path": path, "reason": reason} for path, reason in listed]
    tables["Bytes"] = [{"artefact": name, "bytes": f"{size:,}"} for name, size in plan.sizes.items()]
    tables["Stages"] = [
        {
            "stage": stage.stage,
            "units": f"{stage.units_done}/{stage.units}",
            "images to do": f"{stage.images:,}",
            "seconds": f"{stage.seconds:,.1f}",
            "state": "; ".join((stage.state, *stage.differs)),
        }
        for stage in plan.stages
    ]
    return tables


def make_plan(
    folder: BuildFolder,
    source: str,
    plan: BuildPlan,
    session: Session,
    *,
    class_map: str | None = None,
    fused: bool = False,
    accept_new_files: bool = False,
) -> Plan:
    """List the images, compare them with what `folder` holds, build a few of them, and estimate the rest.

    Raises UsageError and BuilderError as the build would for images, encoder or configuration it cannot use.
    """
    images = list_images(folder, source, plan.extract, class_map)
    accept = accept_new_files and not session.fresh
    if fused:
        check_fused(plan, accept_new_files=accept_new_files)
    shards = plan.shard if fused else None
    images, config = settle_rows(folder, images, plan.extract, session, accept=accept, fused=shards)
    assert config.block_rows is not None
    plan, records = replace(plan, extract=config), images.records
    blocks = blocks_of(len(records), config.block_rows)
    with tempfile.TemporaryDirectory(prefix=".plan-", dir=nearest_folder(folder.root)) as place:
        there = BuildFolder(Path(place) / "none") if session.fresh else folder
        progress = _progress(there, images, plan, fused=fused, accept=accept)
        encoder = progress.inputs_of("extract")["encoder"]
        trial = _run_trial(BuildFolder(Path(place) / "build"), images, plan, session, fused=fused)
        usable = progress.usable(records, blocks, trial)
        per_shard = samples_per_shard(plan.shard, *map(progress.inputs_of, ("extract", "cluster")))
        tars = blocks_of(usable, per_shard)
        sizes = _sizes(trial, images, plan, len(blocks), tars)
        uncertainty = trial.uncertainty(len(records))
        stages = [
            _stage_plan(folder, progress, stage, trial, plan, session, blocks, tars)
            for stage in progress.inputs
        ]
    todo = {stage.stage for stage in stages if stage.seconds}
    scratch = 0  # tokens a vocabulary is fitted to, or rows that are copied from parts to a shard
    if "vocabulary" in todo and plan.vocabulary is not None:
        scratch = fitting_bytes(plan.vocabulary, usable * math.prod(encoder["grid"]), encoder["width"])
    elif "fuse" in todo:
        scratch = math.ceil(min(usable, per_shard + config.block_rows) * trial.samples.mean())
    counts = {row["values"]: row["counts"] for row in records.column("class_name").value_counts().to_pylist()}
    return Plan(
        source=images.location,
        num_images=len(records),
        input_bytes=pc.sum(records.column("bytes")).as_py(),
        classes={name: counts.get(name, 0) for name in images.class_map},
        warnings=(*images.warnings, *few_tars(len(tars), usable, plan.shard.shard_bytes)),
        tried=len(trial.tried),
        unreadable=trial.unreadable,
        usable=usable,
        sizes=sizes,
        uncertainty=uncertainty,
        shards={
            "count": len(tars),
            "first": shard_name(plan.shard.split, 0),
            "last": shard_name(plan.shard.split, len(tars) - 1),
            "samples": per_shard,
            "bytes": _tar_bytes(min(per_shard, usable), trial),
        },
        stages=stages,
        present=sum(size_on_disk(folder.root / name) for name in sizes),
        scratch=scratch,
        free=free_bytes(folder.root),
    )


# The trial, and the sizes that follow from it


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trial:
    """A finished build of a few images.

    tried: its index.parquet. samples: bytes of each sample in the tars, with headers and padding. index: that of its
    shards.
    """

    folder: BuildFolder
    index: Mapping[str, Any]
    tried: pa.Table
    samples: np.ndarray
    summaries: Mapping[str, StageSummary]

    @property
    def unreadable(self) -> dict[str, str]:
        """Path → reason of each image that could not be used."""
        failed = self.tried.filter(pc.not_equal(self.tried.column("status"), status_name(Status.OK)))
        return {row["path"]: row["reason"] or "" for row in failed.sort_by("path").to_pylist()}

    def uncertainty(self, num_images: int) -> float:
        """Two relative standard errors of the bytes of the shards, or of an array that is compressed in chunks."""
        missing = max(0.0, 1 - len(self.tried) / num_images)
        errors = [
            float(sizes.std(ddof=1) / sizes.mean()) * (missing / len(sizes)) ** 0.5
            for sizes in (self.samples, *self._chunks())
            if len(sizes) > 1
        ]
        return 2 * max(errors, default=0.0)

    def _chunks(self) -> Iterator[np.ndarray]:
        for store, name in ((self.folder.features, "features"), (self.folder.regions, "merges")):
            if store.exists():
                yield stores.chunk_bytes(store, name)


def _run_trial(
    folder: BuildFolder, images: ImageSource, plan: BuildPlan, session: Session, *, fused: bool
) -> _Trial:
    """Build a few random images with the workers of the session."""
    count = min(TRIAL_IMAGES, len(images.records))
    rows = np.sort(np.random.default_rng(0).permutation(len(images.records))[:count])
    records = images.records.take(rows)
    small = _smaller(plan, records)
    session.reporter.say(f"trying {count} of {len(images.records)} images")
    workers = session.workers
    if workers.count is None and workers.cluster is None and not workers.begins_here(len(images.records)):
        workers = replace(workers, count=num_cpus())  # as the whole build, though the trial is small
    quiet = replace(session, workers=workers, reporter=Reporter(quiet=True), fresh=False)
    summaries = build(folder, replace(images, records=records), small, quiet, fused=fused)
    return _Trial(
        folder=folder,
        index=read_json(folder.shards / "index.json"),
        tried=read_index(folder.index),
        samples=np.concatenate([_sample_sizes(tar) for tar in sorted(folder.shards.glob("*.tar"))]),
        summaries={summary.stage: summary for summary in summaries},
    )


def _smaller(plan: BuildPlan, records: Sequence[ImageRecord]) -> BuildPlan:
    """The plan of the trial: short blocks, few prototypes, and any number of images may fail."""
    rows, vocabulary, recipe = plan.extract.block_rows, plan.vocabulary, plan.hierarchy
    assert rows is not None
    short = max(TRIAL_ROWS, -(-plan.extract.batch_size // stores.ROWS_PER_CHUNK) * stores.ROWS_PER_CHUNK)
    if rows % stores.ROWS_PER_CHUNK:  # a chunk is a whole block then
        short -= 1
    if vocabulary is not None:
        sizes = sorted({min(size, TRIAL_PROTOTYPES, len(records)) for size in vocabulary.sizes})
        tokens = min(vocabulary.sampled_tokens or 2**20, 16 * TRIAL_PROTOTYPES)
        vocabulary = replace(vocabulary, sizes=tuple(sizes), sampled_tokens=tokens, iterations=2)
    if recipe.masks is not None:
        maps = open_masks(Path(recipe.masks))
        if not any(maps.of(record.path) for record in records):  # would be refused as the wrong folder
            recipe = replace(recipe, masks=None)
    return BuildPlan(
        extract=replace(plan.extract, block_rows=min(rows, short), max_bad_fraction=1.0),
        hierarchy=recipe,
        vocabulary=vocabulary,
        shard=replace(plan.shard, samples_per_shard=TRIAL_ROWS, shard_bytes=None),
    )


def _sizes(
    trial: _Trial, images: ImageSource, plan: BuildPlan, num_blocks: int, tars: Sequence[Block]
) -> dict[str, int]:
    """Bytes of every artefact by its place in the build folder."""
    folder = trial.folder
    ratio, blocks = (
        len(images.records) / len(trial.tried),
        num_blocks / len(folder.markers(next(iter(trial.summaries)))),
    )
    listing, index = (_index_bytes(trial, images.records, is_done=is_done) for is_done in (False, True))
    sizes = {
        "manifest.json": size_on_disk(folder.manifest),
        "class_map.json": len(json_text(images.class_map)),
        "index.parquet": index,
    }
    for store in (store for store in (folder.features, folder.regions) if store.exists()):
        arrays = [path for path in store.iterdir() if path.is_dir()]
        sizes[store.name] = sum(size_on_disk(place / "zarr.json") for place in (store, *arrays))
        for array in arrays:
            more = blocks if array.name.startswith("block_") else ratio
            sizes[store.name] += round(size_on_disk(array / "c") * more)
    if folder.parts.exists():
        sizes["parts"] = round(size_on_disk(folder.parts) * blocks)
    if plan.vocabulary is not None:
        sizes["vocabulary.npz"] = _vocabulary_bytes(trial, plan.vocabulary)
    sizes["ledger"] = listing + size_on_disk(folder.manifest_copy)
    for stage in {path.parent.name for path in folder.markers("*")}:
        units = {"vocabulary": 1, "shard": len(tars)}.get(stage, num_blocks)
        sizes["ledger"] += _marker_bytes(folder, stage, units, ratio)
    sizes["shards"] = _shard_set_bytes(trial, plan, tars, sizes)
    return sizes


def _index_bytes(trial: _Trial, images: ImageTable, *, is_done: bool) -> int:
    """Write the index of the first images, each with the outcome of a random one that was tried."""
    num_images, images, outcomes = len(images), images[:WRITTEN], None
    if is_done:
        generator = np.random.default_rng(0)
        drawn = generator.integers(0, len(trial.tried), len(images))
        # no two hashes are alike, so none compresses
        hashes = pa.array((generator.bytes(16).hex() for _ in drawn), pa.string())
        place = trial.tried.schema.get_field_index("file_hash")
        outcomes = trial.tried.take(drawn).set_column(place, "file_hash", hashes)
    path = trial.folder.root / "whole.parquet"
    write_index(path, images, outcomes)
    return round(path.stat().st_size * num_images / len(images))


def _vocabulary_bytes(trial: _Trial, config: VocabularyConfig) -> int:
    """Arrays of known shapes, and headers as in the trial."""
    arrays = [
        sum(sizes) * (trial.index["width"] * 4 + 8) + sum(sizes[1:]) * 2
        for sizes in (config.sizes, trial.index["vocabulary"])
    ]
    return size_on_disk(trial.folder.vocabulary) + arrays[0] - arrays[1]


def _marker_bytes(folder: BuildFolder, stage: str, num_units: int, ratio: float) -> int:
    """Markers of a stage: a part per unit, and the outcomes and sizes of its images."""
    markers = [read_marker(path) for path in folder.markers(stage)]
    empty: dict[str, Any] = {name: [] for name in ("outcomes", "sizes") if name in markers[0]}
    per_unit = sum(len(sealed_text({**marker, **empty})) for marker in markers)
    per_image = sum(len(sealed_text(marker)) for marker in markers) - per_unit
    return round(per_unit / len(markers) * num_units + per_image * ratio)


def _shard_set_bytes(trial: _Trial, plan: BuildPlan, tars: Sequence[Block], sizes: Mapping[str, int]) -> int:
    """Tars with their sidecars, and the files that describe the set."""
    shards, known = trial.folder.shards, ("class_map.json", "vocabulary.npz")
    total = len(json_text({**trial.index, "shardlist": trial.index["shardlist"][:1] * len(tars)}))
    total += sum(sizes.get(name, 0) for name in known)
    for path in shards.iterdir():
        if not path.name.startswith(f"{plan.shard.split}-") and path.name not in ("index.json", *known):
            total += path.stat().st_size
    of_tar = size_on_disk(sidecar(shards / shard_name(plan.shard.split, 0)))
    return total + sum(_tar_bytes(len(tar), trial) + of_tar for tar in tars)


def _sample_sizes(tar: Path) -> np.ndarray:
    """Bytes of each sample of a tar: its members with their headers, padded."""
    sizes: Counter[str] = Counter()
    with tarfile.open(tar, "r:") as archive:
        for member in archive:
            sizes[member.name.partition(".")[0]] += TAR_BLOCK + -(-member.size // TAR_BLOCK) * TAR_BLOCK
    return np.array(list(sizes.values()), np.int64)


def few_tars(count: int, samples: int, shard_bytes: int | None = None) -> list[str]:
    """Advice where a reader that gives whole tars to its workers would leave most of them idle."""
    if samples < FEW_SAMPLES or count >= SHARED_TARS:
        return []
    more = f"--samples-per-shard {samples // SHARED_TARS} makes as many"
    if shard_bytes is not None:
        more = f"--shard-bytes {shard_bytes * count // SHARED_TARS} makes about as many"
    return [
        f"{counted(count, 'tar')} for {samples:,} samples: readers that give whole tars to workers, such as Hugging "
        f"Face datasets, want {SHARED_TARS} or more; {more}"
    ]


def _tar_bytes(num_samples: int, trial: _Trial) -> int:
    """A tar ends in two empty blocks and is padded to whole records."""
    content = num_samples * float(trial.samples.mean()) + 2 * TAR_BLOCK
    return math.ceil(content / tarfile.RECORDSIZE) * tarfile.RECORDSIZE


# What the folder holds already, and the time that the rest takes


@dataclass(frozen=True, kw_only=True, slots=True)
class _Progress:
    """What each stage would be made with, and what the folder holds of it.

    inputs: stage → what the manifest would hold, in order; a fused build has the stage `fuse` alone. recorded: the
    entries of the manifest. growth: what appending images changes.
    """

    folder: BuildFolder
    inputs: Mapping[str, Mapping[str, Any]]
    recorded: Mapping[str, Mapping[str, Any]]
    growth: Growth | None

    def inputs_of(self, stage: str) -> Mapping[str, Any]:
        """Inputs of a stage, also of one that is part of a fused build."""
        found: Mapping[str, Any] = self.inputs.get("fuse", self.inputs)[stage]
        return found

    def ledger(self, stage: str) -> Ledger:
        """The markers of a stage as they are now, which get another hash when images are appended."""
        asked = {"hash": hash_of(stage, self.inputs[stage])}
        entry = self.recorded.get(stage, asked) if self.growth else asked
        return Ledger(self.folder.ledger(stage), entry["hash"])

    def is_done(self, stage: str, unit: int) -> bool:
        """Whether the build would leave a unit as it is."""
        is_kept = self.growth is None or self.growth.keeps(stage, unit)
        return is_kept and self.ledger(stage).is_done(unit)

    def differences(self, stage: str) -> tuple[str, ...]:
        """Why the build would refuse the folder, one line each."""
        stored = self.growth.stages if self.growth else self.recorded
        made, asked = ("in one pass" if "fuse" in stages else "by stages" for stages in (stored, self.inputs))
        if stored and made != asked:
            return (f"made {made} there, {asked} now",)
        if not self.folder.markers(stage):
            return ()
        entry = stored.get(stage, {}).get("inputs", {})
        return tuple(
            difference(name, before, now) for name, before, now in differences(entry, self.inputs[stage])
        )

    def usable(self, records: ImageTable, blocks: Sequence[Block], trial: _Trial) -> int:
        """Usable images, at least one: counted where done or tried, else the share of the trial."""
        ledger, ok = self.ledger("fuse" if "fuse" in self.inputs else "extract"), status_name(Status.OK)
        usable, unknown = 0, np.ones(len(records), bool)
        for block, marker in ledger.finished(blocks):
            rows = marker["outcomes"]
            unknown[block.start : block.start + len(rows)] = False
            usable += sum(row["status"] == ok for row in rows)
        paths = ImageTable(trial.tried).column("path")
        place = pc.index_in(records.column("path"), value_set=paths).filter(pa.array(unknown))
        tried = trial.tried.column("status").take(place)
        usable += pc.sum(pc.equal(tried, ok)).as_py() or 0
        return max(1, round(usable + len(trial.samples) / len(trial.tried) * tried.null_count))


def _progress(
    folder: BuildFolder, images: ImageSource, plan: BuildPlan, *, fused: bool, accept: bool
) -> _Progress:
    """Compare what is asked for with what `folder` holds; nothing is changed.

    images, plan: in the order of rows, with open options settled. accept: whether images may be appended.
    """
    extracted = extract_inputs(images, plan.extract, asked_encoder(plan.extract))
    recorded, growth = read_manifest(folder)["stages"], None
    if not fused:
        extracted |= parts_of(folder, images, accept=accept)
        growth = growth_of(folder, extracted) if accept else None
    link_hash = (growth.stages if growth else recorded).get("link", {}).get("hash")
    inputs = stage_inputs(extracted, plan, images.records, link_hash)
    if fused:
        inputs = {"fuse": inputs}
    return _Progress(folder=folder, inputs=inputs, recorded=recorded, growth=growth)


def _stage_plan(
    folder: BuildFolder,
    progress: _Progress,
    stage: str,
    trial: _Trial,
    plan: BuildPlan,
    session: Session,
    blocks: Sequence[Block],
    tars: Sequence[Block],
) -> StagePlan:
    """What the build would do in one stage."""
    whole = [Block(number=0, start=0, stop=sum(map(len, tars)))]
    units = {"vocabulary": whole, "shard": tars}.get(stage, blocks)
    todo = [unit for unit in units if not progress.is_done(stage, unit.number)]
    differs = progress.differences(stage)
    if session.fresh and folder.markers(stage):
        state = "starts over"
    elif differs:
        state = "refused"
    else:
        state = "done" if not todo else "goes on" if len(todo) < len(units) else "to do"
    return StagePlan(
        stage=stage,
        units=len(units),
        units_done=len(units) - len(todo),
        images=sum(map(len, todo)),
        state=state,
        seconds=round(_seconds(trial, stage, todo, plan, session), 1) if todo else 0.0,
        differs=differs,
    )


def _seconds(trial: _Trial, stage: str, todo: Sequence[Block], plan: BuildPlan, session: Session) -> float:
    """Time of the units `todo`: start-up as in the trial, then as many units at once as there are workers.

    An image takes what it takes in the middle one of the trial's units: in the first, code is compiled, which the build
    then finds compiled. A stage that begins in this process starts workers only where they save time.
    """
    total = trial.summaries[stage].seconds
    images = sum(map(len, todo))
    if stage == "vocabulary":  # the small one of the trial is all start-up
        assert plan.vocabulary is not None
        return total + _fitting_seconds(plan.vocabulary, images, trial, session)
    units = [read_marker(path) for path in trial.folder.markers(stage)]
    working = sum(float(unit["seconds"]) for unit in units)
    per_image = median_low(float(unit["seconds"]) / max(1, unit["images"]) for unit in units)
    workers = _num_workers(session) or max(1.0, working / total)
    at_once = 1 if session.workers.begins_here(images) else min(workers, len(units))
    start_up = max(0.0, total - working / at_once)
    alone = images * per_image
    together = alone / min(workers, len(todo))
    if session.workers.begins_here(images):
        each = alone / len(todo)  # how many threads it uses is not measured here
        return start_up + (RAY_START_S + together if saves_time(each, each, len(todo)) else alone)
    return start_up + together


def _num_workers(session: Session) -> int | None:
    """Processes that do units; None on a cluster, which is not asked."""
    if session.workers.count == 0:
        return 1
    return None if session.workers.cluster else session.workers.count or num_cpus()


def _fitting_seconds(config: VocabularyConfig, num_images: int, trial: _Trial, session: Session) -> float:
    """Time of all iterations, from one over a few tokens here; k-means++ takes about as long as one of them."""
    tokens = np.random.default_rng(0).standard_normal((TIMED_TOKENS, trial.index["width"]), np.float32)
    centroids = tokens[: min(config.num_prototypes, TIMED_TOKENS)]
    with one_thread():
        started = time.perf_counter()
        sum_clusters(tokens, centroids, threads=1)
        spent = time.perf_counter() - started
    num_tokens = num_images * math.prod(trial.index["grid"])
    products = min(config.sampled_tokens or num_tokens, num_tokens) * config.num_prototypes
    each = spent * products / (len(tokens) * len(centroids))
    return (config.iterations + 1) * each / (_num_workers(session) or 1)
