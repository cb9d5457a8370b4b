"""A build of some of the images, thrown away again: what an image costs here in bytes and in seconds.

Images are drawn at random and go through the steps of the real build on the same disk. The first round is done by the
workers of the build and tells how fast they are; further rounds, in this process, follow until the size of every store
is known to TARGET_ERROR, the time is up, or no image is left.

    n images tried of N, C channels
"""

from __future__ import annotations

import math
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hierarchy_builder.build.pipeline import BuildPlan, build
from hierarchy_builder.build.session import Session, StageSummary
from hierarchy_builder.build.space import nearest_folder
from hierarchy_builder.build.workers import Workers
from hierarchy_builder.config import HierarchyRecipe, VocabularyConfig
from hierarchy_builder.files import json_text, read_json, size_on_disk
from hierarchy_builder.images.masks import open_masks
from hierarchy_builder.images.sources import ImageSource
from hierarchy_builder.progress import Reporter
from hierarchy_builder.records import ImageRecord
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import OUTCOME_COLUMNS, read_index
from hierarchy_builder.store.shards import TAR_BLOCK

FIRST_ROUND, SHORTEST_ROUND, LONGEST_ROUND = 128, 64, 1024
"""Images of a round; the longest takes 0.8 GB of disk with 768 channels."""
LEAST_IMAGES = 512
"""Images tried at least, time permitting: index.parquet grows with how many different sizes photos have."""
UNIT_ROWS = 72
"""Rows of a unit at most, so that there are units for all workers; no power of two, which makes means of few digits."""
TARGET_ERROR = 0.006
"""Relative standard error of a size at which rounds end: three of them stay below 2 %."""
VOCABULARY_SIZE = 256
"""Prototypes fitted in a rehearsal at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How long a stage takes: seconds until its first unit begins, seconds of a worker per image, units at once.

    units: all there were.
    """

    startup: float
    per_image: float
    at_once: float
    units: int


@dataclass(kw_only=True, slots=True)
class Findings:
    """Sums over the rounds of a rehearsal; sizes in bytes.

    outcomes: path → what index.parquet says of it, for every image tried. chunks: store → each of its chunks, all
    arrays by rows together. once_per_block: store → everything else that grows, of all `num_blocks` blocks; all of
    parts.
    metadata: store → its zarr.json files. arrays: store → arrays by rows. samples: each sample as it lies in a tar.
    files: everything else of the build folder by path. markers: stage → a marker, without what it says of each row,
    which are `outcome_bytes`. index: the last index.json. paces: stage → how fast the first round was. vocabulary:
    what was fitted, smaller than what is asked for.
    """

    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    chunks: dict[str, np.ndarray] = field(default_factory=dict)
    rows_per_chunk: int = stores.ROWS_PER_CHUNK
    num_blocks: int = 0
    once_per_block: Counter[str] = field(default_factory=Counter)
    metadata: dict[str, int] = field(default_factory=dict)
    arrays: dict[str, int] = field(default_factory=dict)
    samples: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    files: dict[str, int] = field(default_factory=dict)
    markers: dict[str, int] = field(default_factory=dict)
    outcome_bytes: int = 0
    index: dict[str, Any] = field(default_factory=dict)
    paces: dict[str, Pace] = field(default_factory=dict)
    vocabulary: VocabularyConfig | None = None

    @property
    def num_images(self) -> int:
        """n."""
        return len(self.outcomes)

    def store_bytes(self, store: str, num_rows: int, block_rows: int) -> float:
        """Bytes of a whole store of so many rows."""
        index = stores.shard_index_bytes(-(-block_rows // self.rows_per_chunk))
        per_row = self.chunks[store].sum() / self.num_images
        per_block = self.once_per_block[store] / self.num_blocks + self.arrays[store] * index
        return self.metadata[store] + num_rows * per_row + -(-num_rows // block_rows) * per_block

    def errors(self, num_images: int) -> dict[str, float]:
        """Relative standard error of the bytes of the stores and of the shards of so many images."""
        missing = max(0.0, 1 - self.num_images / num_images)
        return {
            name: _variation(sizes) * (missing / max(len(sizes), 1)) ** 0.5
            for name, sizes in self._parts().items()
        }

    def images_wanted(self, num_images: int) -> int:
        """Images to try in all for TARGET_ERROR, if all bytes are as scattered as those seen."""
        wanted = float(min(LEAST_IMAGES, num_images))
        for name, sizes in self._parts().items():
            images_each = self.rows_per_chunk if name in self.chunks else 1
            of_many = images_each * (_variation(sizes) / TARGET_ERROR) ** 2
            wanted = max(wanted, of_many / (1 + of_many / num_images))
        return math.ceil(wanted)

    def _parts(self) -> dict[str, np.ndarray]:
        return {**self.chunks, "shards": self.samples}


def rehearse(
    folder: BuildFolder,
    images: ImageSource,
    records: Sequence[ImageRecord],
    plan: BuildPlan,
    session: Session,
    *,
    seconds: float,
    fused: bool = False,
) -> Findings:
    """Build some of `images` beside `folder` and measure; nothing is left of it.

    records: all images in build order; all are tried where they are few. seconds: of further rounds after the first.
    fused: build in one pass.
    Raises what the build itself would raise at once: no usable image, an encoder that sees other than it should.
    """
    found, started = Findings(), time.perf_counter()
    quiet = replace(session, reporter=Reporter(quiet=True), fresh=False)
    alone = replace(quiet, workers=Workers(count=0))
    order = np.random.default_rng(0).permutation(len(records))
    while found.num_images < len(records):
        spent = time.perf_counter() - started
        count = _next_round(found, len(records), spent, seconds)
        if not count:
            break
        session.reporter.say(f"trying {count} of {len(records)} images")
        chosen = [records[row] for row in np.sort(order[found.num_images : found.num_images + count])]
        with tempfile.TemporaryDirectory(prefix=".plan-", dir=nearest_folder(folder.root)) as place:
            trial, short = BuildFolder(Path(place) / "build"), _shorten(plan, chosen)
            some = replace(images, records=chosen)
            summaries = build(trial, some, short, alone if found.outcomes else quiet, fused=fused)
            if not found.outcomes:  # what comes from here on takes no start-up of workers
                started = time.perf_counter()
            _measure(trial, summaries, found)
            found.vocabulary = short.vocabulary
    return found


def _next_round(found: Findings, num_rows: int, spent: float, seconds: float) -> int:
    """Images of the next round, 0 for none."""
    left = num_rows - found.num_images
    if not found.num_images:
        return min(FIRST_ROUND, left)
    missing = found.images_wanted(num_rows) - found.num_images
    affordable = int((seconds - spent) / sum(pace.per_image for pace in found.paces.values()))
    if missing <= 0 or affordable < SHORTEST_ROUND:
        return 0
    count = min(max(missing, SHORTEST_ROUND), affordable, LONGEST_ROUND)
    return left if left - count < SHORTEST_ROUND else count


def _shorten(plan: BuildPlan, records: Sequence[ImageRecord]) -> BuildPlan:
    """The same for few images: every skip is allowed, units are short, the vocabulary is small."""
    rows = plan.extract.block_rows
    assert rows is not None
    most = max(UNIT_ROWS, -(-plan.extract.batch_size // stores.ROWS_PER_CHUNK) * stores.ROWS_PER_CHUNK)
    if rows % stores.ROWS_PER_CHUNK:  # chunks are whole blocks then
        most -= 1
    vocabulary = plan.vocabulary
    if vocabulary is not None:
        sizes = sorted({min(size, VOCABULARY_SIZE, len(records)) for size in vocabulary.sizes})
        tokens = min(vocabulary.sampled_tokens or 2**20, 16 * VOCABULARY_SIZE)
        vocabulary = replace(vocabulary, sizes=tuple(sizes), sampled_tokens=tokens, iterations=2)
    return BuildPlan(
        extract=replace(plan.extract, block_rows=min(rows, most), max_bad_fraction=1.0),
        hierarchy=_with_masks_of(plan.hierarchy, records),
        vocabulary=vocabulary,
        shard=replace(plan.shard, samples_per_shard=UNIT_ROWS, shard_bytes=None),
    )


def _with_masks_of(recipe: HierarchyRecipe, records: Sequence[ImageRecord]) -> HierarchyRecipe:
    """The recipe without its label maps where none of these images has one, which would be refused."""
    if recipe.masks is None:
        return recipe
    maps = open_masks(Path(recipe.masks))
    return recipe if any(maps.of(record.path) for record in records) else replace(recipe, masks=None)


def _measure(trial: BuildFolder, summaries: Sequence[StageSummary], found: Findings) -> None:
    table = read_index(trial.index)
    outcomes = table.select(OUTCOME_COLUMNS).to_pylist()
    found.outcomes.update(zip(table.column("path").to_pylist(), outcomes, strict=True))
    for store in (store for store in (trial.features, trial.regions) if store.exists()):
        _measure_store(store, found)
    if trial.part(0).parent.exists():
        found.once_per_block[trial.part(0).parent.name] += size_on_disk(trial.part(0).parent)
    tars = sorted(trial.shards.glob("*.tar"))
    found.samples = np.concatenate([found.samples, *map(_sample_sizes, tars)])
    found.index = read_json(trial.shards / "index.json")
    ledger = trial.ledger("extract").parent
    places = (trial.manifest, trial.vocabulary, *trial.shards.iterdir(), *ledger.iterdir())
    found.files = {
        str(path.relative_to(trial.root)): path.stat().st_size
        for path in places
        if path.is_file() and path not in tars
    }
    for stage in sorted(path.name for path in ledger.iterdir() if path.is_dir()):
        _measure_markers(trial, stage, found)
    if not found.paces:
        found.paces = {summary.stage: _pace(trial, summary) for summary in summaries}


def _measure_store(path: Path, found: Findings) -> None:
    group = stores.open_store(path)
    arrays = {name: stores.array_of(group, name) for name in group.array_keys()}
    by_rows = [name for name, array in arrays.items() if array.shards is not None and array.ndim > 1]
    chunks = np.sum([stores.chunk_bytes(path, name) for name in by_rows], axis=0)
    found.chunks[path.name] = np.append(found.chunks.get(path.name, chunks[:0]), chunks)
    found.rows_per_chunk = arrays[by_rows[0]].chunks[0]
    found.arrays[path.name] = len(by_rows)
    found.once_per_block[path.name] += sum(
        size_on_disk(path / name / "c") for name in arrays if name not in by_rows
    )
    found.metadata[path.name] = sum(file.stat().st_size for file in path.rglob("zarr.json"))


def _sample_sizes(tar: Path) -> np.ndarray:
    """Bytes of each sample: its members with their headers, padded."""
    sizes: Counter[str] = Counter()
    with tarfile.open(tar, "r:") as archive:
        for member in archive:
            sizes[member.name.partition(".")[0]] += TAR_BLOCK + -(-member.size // TAR_BLOCK) * TAR_BLOCK
    return np.array(list(sizes.values()), np.int64)


def _measure_markers(trial: BuildFolder, stage: str, found: Findings) -> None:
    markers = sorted(trial.ledger(stage).glob("*.json"))
    rows: dict[str, Any] = {"outcomes": [], **({"sizes": []} if stage == "fuse" else {})}
    without_rows = sum(len(json_text({**read_json(path), **rows})) for path in markers)
    whole = sum(path.stat().st_size for path in markers)
    if stage in ("extract", "fuse"):
        found.num_blocks += len(markers)
        found.outcome_bytes += whole - without_rows
        whole = without_rows
    found.markers[stage] = whole // len(markers)


def _pace(trial: BuildFolder, summary: StageSummary) -> Pace:
    """From the markers of a stage: when units ended, and how long each took. A small vocabulary is all start-up."""
    if summary.stage == "vocabulary":
        return Pace(startup=summary.seconds, per_image=0.0, at_once=1.0, units=1)
    markers = sorted(trial.ledger(summary.stage).glob("*.json"))
    ends = [marker.stat().st_mtime for marker in markers]
    seconds = [float(read_json(marker)["seconds"]) for marker in markers]
    window = max(ends) - min(end - lasted for end, lasted in zip(ends, seconds, strict=True))
    return Pace(
        startup=max(0.0, summary.seconds - window),
        per_image=sum(seconds) / max(summary.images, 1),
        at_once=max(1.0, sum(seconds) / max(window, 1e-9)),
        units=len(markers),
    )


def _variation(sizes: np.ndarray) -> float:
    """Standard deviation over mean."""
    return float(sizes.std(ddof=1) / sizes.mean()) if len(sizes) > 1 and sizes.any() else 0.0
