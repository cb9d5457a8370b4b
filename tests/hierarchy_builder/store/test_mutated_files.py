"""Whatever the bytes of a file of a build are, its reader says so in an error of ours, and in little memory."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from build_flips import make_builds

from hierarchy_builder.errors import UserError
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import read_index
from hierarchy_builder.store.ledger import check_manifest, read_marker
from hierarchy_builder.store.shards import read_shard
from hierarchy_builder.store.statistics import read_part_moments
from hierarchy_builder.store.units import layout_of
from hierarchy_builder.vocabulary.prototypes import load_vocabulary


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mutated")
    make_builds(root)
    return root


def _layout(folder: BuildFolder) -> object:
    return stores.damaged_layout(*layout_of(folder, "extract"))


READERS: dict[str, tuple[str, Callable[[BuildFolder], Path], Callable[[BuildFolder, Path], object]]] = {
    "parquet": ("staged", lambda f: f.listing, lambda f, path: read_index(path)),
    "marker": ("staged", lambda f: f.markers("extract")[0], lambda f, path: read_marker(path)),
    "manifest": ("staged", lambda f: f.manifest_copy, lambda f, path: check_manifest(path)),
    "zarr metadata": ("staged", lambda f: f.features / "features" / "zarr.json", lambda f, path: _layout(f)),
    "zarr chunk": (
        "staged",
        lambda f: stores.shard_file(f.features, "block_mean", 0),
        lambda f, path: stores.read_rows(stores.open_store(f.features), "block_mean", slice(0, 1)),
    ),
    "vocabulary": ("staged", lambda f: f.vocabulary, lambda f, path: load_vocabulary(path)),
    "part": ("fused", lambda f: f.part_moments(0), lambda f, path: read_part_moments(f, 0, {})),
    "tar": ("staged", lambda f: f.shards / "train-000001.tar", lambda f, path: list(read_shard(path))),
}
"""Kind → a build, one of its files, and how it is read."""


def mutated(content: bytes, draw: random.Random) -> bytes:
    """The bytes with a few of them flipped, taken out, repeated, put in, or made a number out of all bounds."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5))):
        start = draw.randrange(len(changed) + 1)
        stop = min(len(changed), start + draw.choice((1, 2, 8, 100)))
        match draw.randrange(5):
            case 0 if start < len(changed):
                changed[start] ^= 1 << draw.randrange(8)
            case 1:
                del changed[start:stop]
            case 2:
                changed[start:start] = changed[start:stop] * draw.choice((1, 3))
            case 3:
                changed[start:stop] = draw.randbytes(stop - start)
            case _:
                changed[start:stop] = draw.choice(
                    (b"\xff" * 8, b"-9" * 4, b"[" * 5000, b"9" * 30, b"\0" * 512)
                )
        if not changed:
            changed = bytearray(b"x")
    return bytes(changed)


def read_mutations(place: Path, kind: str, count: int, seed: int) -> Counter[str]:
    """Read `count` mutations of one file; returns how many were refused or read."""
    name, find, read = READERS[kind]
    folder, draw, outcomes = BuildFolder(place / name), random.Random(seed), Counter[str]()
    path = find(folder)
    content = path.read_bytes()
    for _ in range(count):
        path.write_bytes(mutated(content, draw))
        try:
            read(folder, path)
            outcomes["read"] += 1
        except UserError:
            outcomes["refused"] += 1
    path.write_bytes(content)
    return outcomes


@pytest.mark.parametrize("kind", READERS)
def test_a_reader_refuses_mutated_bytes_with_an_error_of_ours(made: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(made, tmp_path / "now")
    outcomes = read_mutations(tmp_path / "now", kind, 100, seed=3)
    assert sum(outcomes.values()) == 100


@pytest.mark.drill
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", READERS)
def test_a_hundred_thousand_mutations_of_each_kind(made: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(made, tmp_path / "now")
    print(kind, dict(read_mutations(tmp_path / "now", kind, 100_000, seed=4)))
