"""Verify names every damage in a build, and running the build again restores lost files."""

import shutil
from pathlib import Path

import numpy as np
from tiny_builds import PLAN, digests, session
from typer.testing import CliRunner

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.cli.app import app
from hierarchy_builder.records import Block
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.verify.checks import find_damage, find_problems
from hierarchy_builder.verify.sets import AGAIN, find_set_problems


def change(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def test_verify_checks_files_next_to_the_tars(tiny_build, tmp_path) -> None:
    folder = BuildFolder(tmp_path / "copy")
    shutil.copytree(tiny_build.root, folder.root)
    (folder.shards / "class_map.json").write_text('{"circle": 0}')
    (folder.shards / "statistics.npz").write_bytes(b"junk")
    with (folder.shards / "index.json").open("a") as file:
        file.write(" ")
    problems = "\n".join(find_problems(folder))
    assert "class_map.json is not the class map of the build" in problems
    assert "statistics.npz is damaged" in problems
    assert "index.json was changed after the set was finished" in problems
    (folder.shards / "index.json").write_text("{}")
    assert "index.json has no __kind__, code_version" in "\n".join(find_problems(folder))


def test_verify_finds_planted_damage(tiny_build, tmp_path) -> None:
    folder = BuildFolder(tmp_path / "copy")
    shutil.copytree(tiny_build.root, folder.root)
    tar = folder.shards / "train-000001.tar"
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 1
    tar.write_bytes(content)
    (folder.shards / "train-000002.tar").unlink()
    chunk = next(path for path in (folder.regions / "regions" / "c").rglob("*") if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-9])
    problems = "\n".join(find_problems(folder))
    assert "train-000001.tar: sha256" in problems
    assert "train-000002.tar is missing" in problems
    assert "regions.zarr, block" in problems


def test_verify_reads_merge_trees_and_prototypes(tiny_build, tmp_path) -> None:
    folder = BuildFolder(tmp_path / "copy")
    shutil.copytree(tiny_build.root, folder.root)
    for chunk in (folder.regions / "merges" / "c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(chunk.read_bytes()[:-9])
    second = Block(number=1, start=8, stop=16)
    prototypes = stores.read_block(folder.regions, "prototypes", second)
    stores.write_block(folder.regions, second, {"prototypes": np.full_like(prototypes, 5)})
    problems = list(find_problems(folder))
    assert len([line for line in problems if "merges" in line]) == 3
    assert [line for line in problems if "block 1: prototypes have ids of 5 or more" in line]
    assert [line for line in problems if "block 1: prototypes without a distance" in line]
    assert [line for line in problems if "block 1: prototypes are not those that were written" in line]
    assert len(problems) == 6


def test_build_restores_lost_tars_and_stores(tiny_build, tiny_photos, tmp_path) -> None:
    folder = BuildFolder(tmp_path / "build")
    shutil.copytree(tiny_build.root, folder.root)
    before = digests(folder.shards, "*.tar")
    shutil.rmtree(folder.regions)
    (folder.shards / "train-000001.tar").unlink()
    (folder.shards / "train-000002.tar").write_bytes(b"cut")
    steps.build(folder, str(tiny_photos), PLAN, session())
    assert digests(folder.shards, "*.tar") == before
    assert list(find_problems(folder)) == []


def test_a_quick_look_finds_what_is_lost_or_cut_and_reads_no_payload(tiny_build, tmp_path) -> None:
    folder = BuildFolder(tmp_path / "copy")
    shutil.copytree(tiny_build.root, folder.root)

    def found() -> list[str]:
        return [damage.text for damage in find_damage(folder, quick=True)]

    assert found() == []
    tar = folder.shards / "train-000000.tar"
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 1
    tar.write_bytes(content)
    assert found() == []  # every byte of a tar is what --quick leaves out
    (folder.shards / "train-000001.tar").write_bytes(b"cut")
    (folder.shards / "train-000002.json").unlink()
    for array, lost in ((folder.regions / "merges", True), (folder.features / "features", False)):
        file = min(path for path in (array / "c").rglob("*") if path.is_file())
        file.unlink() if lost else file.write_bytes(file.read_bytes()[:-9])
    change(folder.root / "ledger/cluster/000002.json", b'"images": ', b'"images": 1')
    problems = found()
    assert [line for line in problems if "train-000001.tar has 3 bytes, expected " in line]
    assert [line for line in problems if "train-000002.json is missing" in line]
    assert [line for line in problems if "the file of merges is missing" in line]
    assert [line for line in problems if "the file of features is missing or not the one" in line]
    assert [line for line in problems if "cluster/000002.json is damaged" in line]
    assert [line for line in problems if "cluster has done 2 of 3 units" in line]
    assert len(problems) == 6


def test_a_quick_look_takes_a_set_of_shards_without_its_build(tiny_build, tmp_path) -> None:
    folder = BuildFolder(tmp_path / "set")
    shutil.copytree(tiny_build.shards, folder.root)
    looked = CliRunner().invoke(app, ["verify", str(folder.root), "--quick"])
    assert looked.exit_code == 0
    assert "everything is there" in looked.stdout
    (folder.root / "train-000001.tar").unlink()
    (folder.root / "train-000009.tar").touch()
    change(folder.root / "index.json", b'"num_classes": ', b'"num_classes": 1')
    assert list(find_set_problems(str(folder.root), quick=True)) == [
        f"{folder.root}: index.json was changed after the set was finished: {AGAIN}",
        f"{folder.root}: train-000001.tar is missing: {AGAIN}",
        f"{folder.root}: train-000009.tar is not in index.json: {AGAIN}",
    ]
