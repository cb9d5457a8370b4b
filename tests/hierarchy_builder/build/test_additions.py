"""`--accept-new-files`: rows, blocks, keys, labels and tars stay; what came later is appended."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from pictures import CLASSES, draw_picture, write_tree

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build.changes import append
from hierarchy_builder.build.workers import Workers
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig, VocabularyConfig
from hierarchy_builder.errors import ConfigMismatchError
from hierarchy_builder.progress import Reporter
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import read_index
from hierarchy_builder.store.shards import read_shard
from hierarchy_builder.verify.checks import find_problems
from hierarchy_builder.verify.repair import repair

PLAN = steps.BuildPlan(
    extract=ExtractConfig(encoder="dct", block_rows=8, batch_size=4),
    hierarchy=HierarchyRecipe.paper(),
    shard=ShardConfig(samples_per_shard=4, covariance=True),
)
SESSION = steps.Session(workers=Workers(count=0), reporter=Reporter(quiet=True))


@pytest.fixture
def built(tmp_path: Path) -> tuple[BuildFolder, Path]:
    """A build of 18 images in blocks of 8: two whole and one of 2 rows; tars of 4, the last of 2."""
    photos = write_tree(tmp_path / "photos", per_class=6)
    steps.build(BuildFolder(tmp_path / "build"), str(photos), PLAN, SESSION)
    return BuildFolder(tmp_path / "build"), photos


def add(photos: Path) -> None:
    """Two more of an old class, one of a class whose name comes first, one whose key an old image has."""
    for number in (7, 8):
        draw_picture(CLASSES[0], number).save(photos / CLASSES[0] / f"{number:03d}.png")
    (photos / "arc").mkdir()
    draw_picture(CLASSES[1], 9).save(photos / "arc" / "009.png")
    draw_picture(CLASSES[2], 9).save(photos / CLASSES[2] / "000.jpg")


def keys(folder: BuildFolder) -> list[str]:
    return read_index(folder.index).column("key").to_pylist()


def features(folder: BuildFolder) -> np.ndarray:
    return stores.read_rows(stores.open_store(folder.features), "features", slice(None))


def test_new_images_are_refused_then_appended(built: tuple[BuildFolder, Path]) -> None:
    folder, photos = built
    old_keys, old_features = keys(folder), features(folder)
    old_tars = {path.name: path.read_bytes() for path in folder.shards.glob("*.tar")}
    times = {path: path.stat().st_mtime_ns for path in folder.shards.glob("train-00000[0-3].tar")}
    add(photos)
    with pytest.raises(ConfigMismatchError, match=r"num_images: 18 there, 22 now(.|\n)*--accept-new-files"):
        steps.build(folder, str(photos), PLAN, SESSION)
    summaries = steps.build(folder, str(photos), PLAN, SESSION, accept_new_files=True)
    assert [summary.new_images for summary in summaries] == [6, 6, 6]  # the last block, the last tars
    assert keys(folder)[:18] == old_keys
    assert len(set(keys(folder))) == 22
    np.testing.assert_array_equal(features(folder)[:18], old_features)
    for number in range(4):
        name = f"train-{number:06d}.tar"
        assert (folder.shards / name).read_bytes() == old_tars[name]
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert json.loads(folder.class_map.read_text()) == {"circle": 0, "square": 1, "stripes": 2, "arc": 3}
    assert list(find_problems(folder)) == []
    assert sum(1 for tar in folder.shards.glob("*.tar") for _ in read_shard(tar)) == 22


def test_the_plain_command_goes_on_afterwards(built: tuple[BuildFolder, Path]) -> None:
    folder, photos = built
    add(photos)
    steps.build(folder, str(photos), PLAN, SESSION, accept_new_files=True)
    for accept in (False, True):
        summaries = steps.build(folder, str(photos), PLAN, SESSION, accept_new_files=accept)
        assert [summary.new_images for summary in summaries] == [0, 0, 0]
    draw_picture(CLASSES[0], 20).save(photos / CLASSES[0] / "a.png")
    with pytest.raises(ConfigMismatchError, match="num_images: 22 there, 23 now"):
        steps.extract(folder, str(photos), PLAN.extract, SESSION)
    steps.build(folder, str(photos), PLAN, SESSION, accept_new_files=True)
    assert keys(folder)[-1] == "circle/a"
    (folder.shards / "train-000001.tar").unlink()
    folder.index.unlink()
    repair(folder, SESSION)
    assert list(find_problems(folder)) == []


def test_added_last_it_is_the_build_of_all(tmp_path: Path) -> None:
    photos, folder = write_tree(tmp_path / "photos", per_class=4), BuildFolder(tmp_path / "build")
    listed = steps.BuildPlan(
        extract=ExtractConfig(encoder="dct", block_rows=8, order="listed"),
        hierarchy=PLAN.hierarchy,
        shard=PLAN.shard,
        vocabulary=VocabularyConfig(sizes=(4,), sampled_tokens=2000, iterations=3),
    )
    steps.build(folder, str(photos), listed, SESSION)
    for number in range(5):
        draw_picture(CLASSES[2], 50 + number).save(photos / CLASSES[2] / f"{50 + number:03d}.png")
    steps.build(folder, str(photos), listed, SESSION, accept_new_files=True)
    whole = BuildFolder(tmp_path / "whole")
    steps.build(whole, str(photos), listed, SESSION)
    for tar in sorted(whole.shards.glob("*.tar")):
        assert (folder.shards / tar.name).read_bytes() == tar.read_bytes()
    assert (folder.shards / "statistics.npz").read_bytes() == (whole.shards / "statistics.npz").read_bytes()


def test_changed_and_lost_images_are_no_additions(built: tuple[BuildFolder, Path]) -> None:
    folder, photos = built
    add(photos)
    (photos / CLASSES[1] / "003.png").unlink()
    with pytest.raises(ConfigMismatchError, match=r"1 image of this build .* for example square/003\.png"):
        steps.extract(folder, str(photos), PLAN.extract, SESSION, accept_new_files=True)


def test_stages_after_it_name_the_next_step(built: tuple[BuildFolder, Path]) -> None:
    folder, photos = built
    add(photos)
    steps.extract(folder, str(photos), PLAN.extract, SESSION, accept_new_files=True)
    problems = "\n".join(find_problems(folder))
    assert "cluster has done 2 of 3 units: run `hierarchy-builder cluster" in problems
    steps.cluster(folder, PLAN.hierarchy, SESSION)
    steps.shard(folder, PLAN.shard, SESSION)
    assert list(find_problems(folder)) == []


@pytest.mark.parametrize("end_at", ["write_index", "carry_over"])
def test_an_interrupted_addition_is_repeated(
    built: tuple[BuildFolder, Path], monkeypatch: pytest.MonkeyPatch, end_at: str, tmp_path: Path
) -> None:
    folder, photos = built
    add(photos)
    shutil.copytree(folder.root, tmp_path / "whole")
    steps.build(BuildFolder(tmp_path / "whole"), str(photos), PLAN, SESSION, accept_new_files=True)

    def end(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"hierarchy_builder.build.changes.{end_at}", end)
        with pytest.raises(KeyboardInterrupt):
            steps.build(folder, str(photos), PLAN, SESSION, accept_new_files=True)
    steps.build(folder, str(photos), PLAN, SESSION, accept_new_files=True)
    for path in sorted((tmp_path / "whole" / "shards").iterdir()):
        assert (folder.shards / path.name).read_bytes() == path.read_bytes()


def test_nothing_is_appended_where_something_else_differs(built: tuple[BuildFolder, Path]) -> None:
    folder, photos = built
    add(photos)
    other = ExtractConfig(encoder="dct", block_rows=4)
    with pytest.raises(ConfigMismatchError, match="block_rows: 8 there, 4 now"):
        steps.extract(folder, str(photos), other, SESSION, accept_new_files=True)
    assert append(folder, [], {}) == 0
    assert len(keys(folder)) == 18
