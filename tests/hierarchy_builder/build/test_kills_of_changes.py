"""A command that changes a build is killed at any moment; the same command then ends as if it had not been."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from kills import KILLED, run
from pictures import write_tree
from typer.testing import CliRunner

from hierarchy_builder.cli.app import app
from hierarchy_builder.files.whole import read_json
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.verify.checks import find_damage

SMALL = [
    "--encoder",
    "dct",
    "--block-rows",
    "8",
    "--samples-per-shard",
    "5",
    "--images",
    "--quiet",
    "--workers",
    "0",
]
LENIENT = ["--max-bad-fraction", "1"]


@dataclass(frozen=True)
class Change:
    """A command that changes a build.

    words: the command, with DIR, IMAGES and AWAY for its places. begin: the options of the build it changes. before,
    between: what happens to the photographs before the build, and to the build and them before the command.
    """

    words: list[str]
    begin: list[str] = field(default_factory=list)
    before: Callable[[Path], object] = lambda root: None
    between: Callable[[Path], object] = lambda root: None
    stale: tuple[str, ...] = ()


def set_aside(root: Path) -> list[Path]:
    """Move every sixth photograph out of the images; returns where they were."""
    (root / "kept").mkdir()
    found = sorted(path for path in (root / "images").rglob("*") if path.is_file())[::6]
    for path in found:
        path.replace(root / "kept" / f"{path.parent.name}-{path.name}")
    return found


def spoil(root: Path) -> None:
    for path in set_aside(root):
        path.write_bytes(b"no photograph")


def bring_back(root: Path) -> None:
    for path in (root / "kept").iterdir():
        path.replace(root / "images" / path.name.replace("-", "/", 1))


def damage(root: Path) -> None:
    folder = BuildFolder(root / "build")
    for path in (folder.features / "features" / "c" / "1", folder.shards / "train-000001.tar", folder.index):
        file = path if path.is_file() else next(each for each in path.rglob("*") if each.is_file())
        content = bytearray(file.read_bytes())
        content[len(content) // 3] ^= 4
        file.write_bytes(content)


CHANGES = {
    "retry": Change(
        words=["build", "IMAGES", "--out", "DIR", *SMALL, *LENIENT, "--retry-failed"],
        begin=LENIENT,
        before=spoil,
        between=bring_back,
    ),
    "accept": Change(
        words=["build", "IMAGES", "--out", "DIR", *SMALL, "--accept-new-files"],
        before=set_aside,
        between=bring_back,
    ),
    "recut": Change(
        words=["cluster", "DIR", "--recut", "0.7,0.4", "--quiet", "--workers", "0"],
        begin=["--vocabulary", "2,4"],
        stale=("shard",),
    ),
    "fresh": Change(
        words=["cluster", "DIR", "--recipe", "stable", "--fresh", "--yes", "--quiet", "--workers", "0"]
    ),
    "vocabulary": Change(
        words=["cluster", "DIR", "--vocabulary", "2,4", "--quiet", "--workers", "0"], stale=("shard",)
    ),
    "publish": Change(words=["publish", "DIR", "AWAY", "--quiet"]),
    "repair": Change(words=["repair", "DIR", "--quiet", "--workers", "0"], between=damage),
    "fused": Change(words=["build", "IMAGES", "--out", "DIR", *SMALL, "--fused"], begin=["nothing"]),
}


def prepare(root: Path, change: Change) -> None:
    """Photographs, and the build as it is before the command."""
    write_tree(root / "images", per_class=6)
    change.before(root)
    if change.begin != ["nothing"]:
        done = CliRunner().invoke(
            app, ["build", str(root / "images"), "--out", str(root / "build"), *SMALL, *change.begin]
        )
        assert done.exit_code == 0, done.output
    change.between(root)


def words_of(root: Path, change: Change) -> list[str]:
    places = {"DIR": root / "build", "IMAGES": root / "images", "AWAY": root / "away"}
    return [str(places.get(word, word)) for word in change.words]


def contents(root: Path) -> dict[str, object]:
    """What is in the build and where it was published; of markers all but the seconds they took."""
    found: dict[str, object] = {}
    for path in sorted(
        path for name in ("build", "away") for path in (root / name).rglob("*") if path.is_file()
    ):
        name = str(path.relative_to(root))
        if path.name == ".lock" or ".tmp-" in name or name.endswith(".partial"):
            continue
        if "/ledger/" in name and path.suffix == ".json":
            found[name] = {
                key: value for key, value in read_json(path).items() if key not in ("seconds", "batch_size")
            }
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def kill(name: str, root: Path, moments: Callable[[int], list[int]]) -> int:
    """Kill the command at some moments, each time in a copy of the build; returns the number of kills."""
    change, kills = CHANGES[name], 0
    prepare(root / "whole", change)
    shutil.copytree(root / "whole", root / "begun")
    code, changes = run(words_of(root / "whole", change), root / "whole", root / "log.txt")
    assert code == 0, (root / "log.txt").read_text()[-3000:]
    expected = contents(root / "whole")
    for at in moments(changes):
        place = root / "now"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(root / "begun", place)
        code, _ = run(words_of(place, change), place, root / "log.txt", at)
        assert code == KILLED, (root / "log.txt").read_text()[-3000:]
        again, _ = run(words_of(place, change), place, root / "log.txt")
        assert again == 0, f"{name}, killed before change {at}: {(root / 'log.txt').read_text()[-3000:]}"
        assert contents(place) == expected, f"{name}, killed before change {at}"
        left = [
            found for found in find_damage(BuildFolder(place / "build")) if found.stage not in change.stale
        ]
        assert not left, f"{name}, killed before change {at}: {left}"
        kills += 1
    return kills


@pytest.mark.parametrize("name", CHANGES)
def test_a_killed_change_ends_as_if_it_had_not_been(name: str, tmp_path: Path) -> None:
    draw = random.Random(name)
    kill(name, tmp_path, lambda changes: [draw.randrange(1, changes + 1)])


@pytest.mark.drill
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_may_be_killed_before_each_of_its_writes(name: str, tmp_path: Path) -> None:
    kills = kill(name, tmp_path, lambda changes: list(range(1, changes + 1)))
    print(f"{name}: killed {kills} times")
