"""Other levels from stored trees: what a build with those cuts gives, wherever it was stopped, and in the shards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pictures import write_tree
from PIL import Image
from typer.testing import CliRunner

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build.clustering import recut
from hierarchy_builder.build.session import Session
from hierarchy_builder.build.workers import Workers
from hierarchy_builder.cli.app import app
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig, VocabularyConfig
from hierarchy_builder.errors import ConfigMismatchError, UsageError
from hierarchy_builder.hierarchy.recipe import Flag
from hierarchy_builder.progress import Reporter
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.units import progress_of
from hierarchy_builder.verify.checks import find_problems

SESSION = Session(workers=Workers(count=0), reporter=Reporter(quiet=True))
CUTS = (0.8, 0.5, 0.2)


def built(images: Path, out: Path, recipe: HierarchyRecipe) -> BuildFolder:
    folder = BuildFolder(out)
    steps.extract(folder, str(images), ExtractConfig(encoder="dct", block_rows=8), SESSION)
    steps.cluster(folder, recipe, SESSION)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("images"), per_class=7)


def levels(folder: BuildFolder) -> np.ndarray:
    return stores.read_rows(stores.open_store(folder.regions), "regions", slice(None))


@pytest.mark.parametrize("recipe", [HierarchyRecipe.paper(), HierarchyRecipe.stable()])
@pytest.mark.parametrize("cuts", [CUTS, (0.4,), (3, 9), ()])
def test_recut_is_a_build_with_those_cuts(images: Path, tmp_path: Path, recipe, cuts) -> None:
    folder = built(images, tmp_path / "recut", recipe)
    features = folder.features
    moved = features.rename(tmp_path / "away")  # they are not read
    (features / "status").parent.mkdir()
    for name in ("zarr.json", "status"):
        source = moved / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, features / name)
    summary = recut(folder, cuts, SESSION)
    expected = built(images, tmp_path / "fresh", replace(recipe, cuts=cuts))
    assert summary.new_images == 21
    np.testing.assert_array_equal(levels(folder), levels(expected))
    assert summary.notes == steps.cluster(expected, replace(recipe, cuts=cuts), SESSION).notes
    assert not folder.recut.exists()
    shutil.rmtree(features)
    moved.rename(features)
    assert list(find_problems(folder)) == []
    assert recut(folder, cuts, SESSION).new_images == 0


def test_a_recut_that_was_stopped_anywhere_is_finished_by_the_next(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = built(images, tmp_path / "origin", HierarchyRecipe.paper())
    expected = built(images, tmp_path / "expected", HierarchyRecipe(cuts=CUTS))

    class StoppedError(Exception):
        pass

    moments = 0
    for moment in range(1, 100):
        folder = BuildFolder(tmp_path / f"stopped-{moment}")
        shutil.copytree(origin.root, folder.root)
        left = [moment]

        def stopping(call: Callable[..., object], left: list[int] = left) -> Callable[..., object]:
            def wrapped(*args: object, **kwargs: object) -> object:
                left[0] -= 1
                if left[0] == 0:
                    raise StoppedError
                return call(*args, **kwargs)

            return wrapped

        with monkeypatch.context() as patch:
            patch.setattr("os.replace", stopping(os.replace))
            patch.setattr(BuildFolder, "remove", stopping(BuildFolder.remove))
            try:
                recut(folder, CUTS, SESSION)
            except StoppedError:
                moments += 1
            else:
                break
        before = levels(folder) if (folder.regions / "regions").exists() else None
        assert before is None or before.shape[1] in (3, 4)
        recut(folder, CUTS, SESSION)
        np.testing.assert_array_equal(levels(folder), levels(expected))
        assert list(find_problems(folder)) == []
    assert moments >= 10


def test_shards_of_former_levels_are_refused_until_made_afresh(images: Path, tmp_path: Path) -> None:
    folder = built(images, tmp_path / "out", HierarchyRecipe.paper())
    steps.vocabulary(folder, VocabularyConfig(sizes=(4,), backend="torch"), SESSION)
    steps.link(folder, SESSION)
    steps.shard(folder, ShardConfig(samples_per_shard=8), SESSION)
    recut(folder, CUTS, SESSION)
    states = {row["stage"]: row["state"] for row in progress_of(folder)}
    assert states == {"extract": "done", "vocabulary": "done", "cluster": "done", "shard": "out of date"}
    steps.link(folder, SESSION)
    assert any("out of date" in problem for problem in find_problems(folder))
    with pytest.raises(ConfigMismatchError, match=r"cluster: .* there, .* now"):
        steps.shard(folder, ShardConfig(samples_per_shard=8), SESSION)
    fresh = Session(workers=SESSION.workers, reporter=SESSION.reporter, fresh=True)
    steps.shard(folder, ShardConfig(samples_per_shard=8), fresh)
    assert list(find_problems(folder)) == []
    assert json.loads((folder.shards / "index.json").read_text())["num_levels"] == 5


def test_label_maps_through_a_build(images: Path, tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    for number, photo in enumerate(sorted(images.rglob("*.png"))):
        if number == 0:
            continue  # has no map
        with Image.open(photo) as picture:
            size = picture.size if number > 1 else (7, 7)  # of another size
        drawn = np.zeros(size[::-1], dtype=np.uint8)
        drawn[: size[1] // 2] = 1
        drawn[: size[1] // 2, : size[0] // 2] = 2
        target = maps / photo.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn).save(target)
    recipe = HierarchyRecipe(masks=str(maps), masks_level=1)
    folder = built(images, tmp_path / "out", recipe)
    flags = stores.read_rows(stores.open_store(folder.regions), "flags", slice(None))
    assert sorted(flags.tolist()) == [0] * 19 + [Flag.NO_MASK] * 2
    given = levels(folder)[flags == 0]
    assert (given[:, 0] == (np.arange(16) < 8)[:, None]).all()
    assert (given[:, 1].max(axis=(1, 2)) == 2).all()
    assert steps.cluster(folder, recipe, SESSION).notes["no_mask"] == 2
    recut(folder, (0.9, 0.5, 0.3), SESSION)
    np.testing.assert_array_equal(levels(folder)[flags == 0][:, :2], given[:, :2])
    with Image.open(target) as picture:
        Image.new("L", picture.size).save(target)
    with pytest.raises(ConfigMismatchError, match="masks"):
        steps.cluster(folder, HierarchyRecipe(masks=str(maps), masks_level=1, cuts=(0.9, 0.5, 0.3)), SESSION)


def test_a_recut_without_the_given_level_is_refused(images: Path, tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    photo = next(images.rglob("*.png"))
    (maps / photo.parent.name).mkdir(parents=True)
    with Image.open(photo) as picture:
        Image.new("L", picture.size, 1).save(maps / photo.relative_to(images))
    folder = built(images, tmp_path / "out", HierarchyRecipe(masks=str(maps), masks_level=2))
    with pytest.raises(UsageError, match="masks_level is 2, expected 0 to 1"):
        recut(folder, (0.5,), SESSION)


def test_the_command_line_cuts_anew_and_says_what_it_cannot(images: Path, tmp_path: Path) -> None:
    runner, out = CliRunner(), tmp_path / "build"
    quiet = ["--workers", "0", "--quiet"]
    words = ["build", str(images), "--out", str(out), "--encoder", "dct", "--recipe", "stable", *quiet]
    assert runner.invoke(app, words).exit_code == 0
    cut = runner.invoke(app, ["cluster", str(out), "--recut", "0.7,0.5,0.3", *quiet, "--json"])
    (row,) = json.loads(cut.stdout)
    assert (row["stage"], row["new_images"], len(row["notes"]["regions_per_image"])) == ("cluster", 21, 4)
    assert levels(BuildFolder(out)).shape[1] == 4
    with pytest.raises(UsageError, match="--recut keeps the stored trees and takes no --seed"):
        runner.invoke(
            app, ["cluster", str(out), "--recut", "0.5", "--seed", "1", *quiet], catch_exceptions=False
        )
    with pytest.raises(UsageError, match=r"--recut is 'a', expected numbers such as 0\.65,0\.35"):
        runner.invoke(app, ["cluster", str(out), "--recut", "a", *quiet], catch_exceptions=False)
    with pytest.raises(ConfigMismatchError, match=r"make it again as it was: .* shard .* --fresh --yes"):
        runner.invoke(app, ["shard", str(out), *quiet], catch_exceptions=False)
    assert runner.invoke(app, ["shard", str(out), "--fresh", "--yes", *quiet]).exit_code == 0
    assert list(find_problems(BuildFolder(out))) == []
    with pytest.raises(UsageError, match="--recipe is 'best', expected paper or stable"):
        runner.invoke(
            app, ["cluster", str(out), "--recipe", "best", "--fresh", *quiet], catch_exceptions=False
        )
