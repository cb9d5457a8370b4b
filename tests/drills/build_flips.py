"""Single bits of the files of a build are flipped: verify must find each, or what is read must be what was written.

    python tests/drills/build_flips.py [--flips 20000] [--seed 0] [--record]

prints, for every kind of file, how many flips verify found and how many change nothing that is read. A flip that verify
does not find and that is not one of the kinds of `is_harmless` ends the run.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import zarr

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig, VocabularyConfig
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import read_index
from hierarchy_builder.verify.checks import find_damage

sys.path.extend(str(Path(__file__).resolve().parents[2] / part) for part in (".", "tests/support"))
from pictures import write_tree
from tiny_builds import session

from benchmarks import records

PAGES = (".lock", "report.html", "quality.html", "quality.json", "vocabulary.html")
"""Files that no step reads."""


def make_builds(root: Path, per_class: int = 2) -> list[BuildFolder]:
    """A staged build with everything a build can hold, and a fused one."""
    photos = write_tree(root / "photos", per_class=per_class)
    plan = steps.BuildPlan(
        extract=ExtractConfig(encoder="dct", block_rows=4, batch_size=4),
        hierarchy=HierarchyRecipe.paper(),
        vocabulary=VocabularyConfig(sizes=(2, 4), sampled_tokens=200, iterations=2),
        shard=ShardConfig(samples_per_shard=4, images=True, covariance=True),
    )
    staged, fused = BuildFolder(root / "staged"), BuildFolder(root / "fused")
    steps.build(staged, str(photos), plan, session())
    alone = steps.BuildPlan(extract=plan.extract, hierarchy=plan.hierarchy, shard=plan.shard)
    steps.build(fused, str(photos), alone, session(), fused=True)
    return [staged, fused]


def kind_of(folder: BuildFolder, path: Path) -> str:
    """The kind of a file, by its place in a build."""
    name = path.relative_to(folder.root)
    if path.name == "zarr.json":
        return "zarr.json"
    if name.parts[0].endswith(".zarr"):
        return f"{name.parts[0]} chunks"
    if name.parts[0] == "ledger" and len(name.parts) == 3:
        return "marker"
    if name.parts[0] == "shards" and "-" in path.name:
        return f"shards/*{path.suffix}"
    return f"parts/*{path.suffix}" if name.parts[0] == "parts" else name.as_posix()


@dataclass
class Flips:
    """Flips in one build, which verify found whole before."""

    folder: BuildFolder
    random: random.Random

    def __post_init__(self) -> None:
        assert not list(find_damage(self.folder))
        files = (path for path in sorted(self.folder.root.rglob("*")) if path.is_file())
        self.by_kind: dict[str, list[Path]] = {}
        for path in (path for path in files if path.stat().st_size and path.name not in PAGES):
            self.by_kind.setdefault(kind_of(self.folder, path), []).append(path)

    def run(self, count: int) -> Iterator[tuple[str, str]]:
        """Flip `count` bits, one after another, each kind as often; yields kind and `found` or `harmless`.

        Raises AssertionError for a flip that is neither, and whatever verify raises but should have turned into damage.
        """
        kinds = sorted(self.by_kind)
        for number in range(count):
            kind = kinds[number % len(kinds)]
            path = self.random.choice(self.by_kind[kind])
            before = path.read_bytes()
            place, bit = self.random.randrange(len(before)), self.random.randrange(8)
            after = bytearray(before)
            after[place] ^= 1 << bit
            path.write_bytes(after)
            try:
                found = next(iter(find_damage(self.folder)), None)
                where = f"{path}: byte {place}, bit {bit}"
                assert found is not None or is_harmless(path, before), f"{where}: verify finds nothing"
            finally:
                path.write_bytes(before)
            yield kind, "found" if found is not None else "harmless"


def is_harmless(path: Path, before: bytes) -> bool:
    """Whether a reader gets from a changed file what it got before: rows of a table, or the description of an array."""
    if path.suffix == ".parquet":
        return bool(read_index(path).equals(_of_bytes(path, before, read_index)))
    if path.name == "zarr.json":
        return bool(_metadata(path) == _of_bytes(path, before, _metadata))
    return False


def _metadata(path: Path) -> object:
    return zarr.open(path.parent, mode="r").metadata


def _of_bytes(path: Path, content: bytes, read: object) -> object:
    """What a reader makes of other bytes under the same name."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / path.name
        copy.write_bytes(content)
        return read(copy)  # type: ignore[operator]


def flip_all(root: Path, count: int, seed: int, per_class: int = 2) -> dict[str, Counter[str]]:
    """Flip bits in a staged and in a fused build; returns how many of each kind were found or harmless."""
    counts: dict[str, Counter[str]] = {}
    for folder in make_builds(root, per_class):
        for kind, outcome in Flips(folder, random.Random(seed)).run(count // 2):
            counts.setdefault(kind, Counter())[outcome] += 1
    return counts


def make_parser() -> argparse.ArgumentParser:
    """The options of the drill."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flips", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    records.add_option(parser)
    return parser


def main() -> None:
    """Flip, and print the counts."""
    asked = make_parser().parse_args()
    root = Path(tempfile.mkdtemp(prefix="flips-"))
    try:
        counts = flip_all(root, asked.flips, asked.seed)
    finally:
        shutil.rmtree(root)
    total = sum(counts.values(), Counter[str]())
    rows = [
        [kind, f"{outcomes['found']:,}", f"{outcomes['harmless']:,}", "0"]
        for kind, outcomes in [*sorted(counts.items()), ("all", total)]
    ]
    for kind, *numbers in rows:
        print(f"{kind:<24} {numbers[0]:>7} found, {numbers[1]:>6} harmless, 0 missed")
    columns = ["kind of file", "found", "harmless", "missed"]
    records.write(asked.record, columns=columns, rows=rows, seeds=[asked.seed])


if __name__ == "__main__":
    main()
