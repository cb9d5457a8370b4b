"""Photographs → hierarchy → shards → training → samples → scores → pages, for any number of levels."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from command_line import SETTINGS, call
from pictures import write_tree

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build.workers import Workers
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig
from hierarchy_builder.progress import Reporter
from hierarchy_builder.quality.report import write_report
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.shards import read_shard
from hierarchy_builder.verify.checks import find_problems
from trainer.trajectories.pipeline import Trajectory

RECIPES = {
    2: HierarchyRecipe(cuts=()),
    3: HierarchyRecipe(cuts=(0.5,), divide_background=True),
    6: HierarchyRecipe(cuts=(0.8, 0.6, 0.4, 0.2)),
}
NAMES = {
    2: ("object/background", "tokens"),
    3: ("object/background", "parts", "tokens"),
    6: ("object/background", "parts 1", "parts 2", "parts 3", "parts 4", "tokens"),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("photos"), per_class=3)


def build(photos: Path, out: Path, recipe: HierarchyRecipe) -> BuildFolder:
    plan = steps.BuildPlan(
        extract=ExtractConfig(encoder="dct"),
        hierarchy=recipe,
        shard=ShardConfig(images=True, canvases=True),
    )
    folder = BuildFolder(out)
    session = steps.Session(workers=Workers(count=0), reporter=Reporter(quiet=True))
    steps.build(folder, str(photos), plan, session)
    return folder


@pytest.mark.parametrize("num_levels", RECIPES)
def test_any_number_of_levels(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], num_levels: int
) -> None:
    folder = build(photos, tmp_path / "build", RECIPES[num_levels])
    assert list(find_problems(folder)) == []
    sample = next(read_shard(folder.shards / "train-000000.tar"))
    assert sample.canvases is not None
    assert sample.canvases.shape == (num_levels, 16, 16, 48)
    assert len(sample.metadata["regions_per_level"]) == num_levels - 1
    shown = write_report(folder, tmp_path / "hierarchies.html").read_text()
    assert all(name in shown for name in NAMES[num_levels])
    assert bool(re.search(r"regions?, background \d", shown)) == RECIPES[num_levels].divide_background

    run, samples = tmp_path / "run", tmp_path / "samples"
    settings = [*SETTINGS, "--batch-size", "8", "--total-images", "16", "--set", "normalise=channel"]
    assert call("train", folder.root, "--out", run, "--preset", "tiny-cpu", *settings, "--quiet") == 0
    capsys.readouterr()
    words = ("--labels", "circle,stripes", "--seeds", "0-1", "--out", samples, "--json")
    assert call("sample", run, *words) == 0
    trajectory = Trajectory.load(json.loads(capsys.readouterr().out)[0]["file"])
    assert trajectory.levels.shape == (num_levels, 16, 16, 48)
    assert trajectory.decode().shape == (num_levels, 256, 256, 3)
    assert all(name in (samples / "index.html").read_text() for name in NAMES[num_levels])
    assert call("evaluate", run, "--shards", folder.root, "--samples-per-class", 2, "--json") == 0
    values = {row["name"]: row["value"] for row in json.loads(capsys.readouterr().out)}
    assert np.isfinite(list(values.values())).all()
    assert values["roughness_real"] < 1e-3
    assert call("report", run, "--shards", folder.root) == 0
    assert "class_mean_accuracy" in (run / "report.html").read_text()


def test_levels_are_those_of_the_shards(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build(photos, tmp_path / "build", RECIPES[3])
    train = ("train", folder.root, "--out", tmp_path / "run", "--preset", "tiny-cpu", "--dry-run", "--json")
    assert call(*train, "--set", "model.num_levels=6") == 5
    assert f"model.num_levels is 6, {folder.shards} holds 3: leave it out" in capsys.readouterr().err
    file = tmp_path / "more.yaml"
    file.write_text("model: {in_channels: 768}\n")
    assert call(*train, "--config", file) == 5
    assert f"model.in_channels is 768, {folder.shards} holds 48" in capsys.readouterr().err
    assert call(*train) == 0
    resolved = capsys.readouterr().out
    assert json.loads(resolved)["model"]["num_levels"] == 3
    file.write_text(resolved)  # what was resolved can be asked for
    assert call(*train, "--config", file) == 0


def test_a_run_goes_on_only_with_its_levels(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three, two = (build(photos, tmp_path / f"build{n}", RECIPES[n]) for n in (3, 2))
    train = ("--out", tmp_path / "run", *SETTINGS, "--batch-size", "8", "--total-images", "8", "--quiet")
    assert call("train", three.root, *train, "--preset", "tiny-cpu") == 0
    assert call("train", two.root, *train) == 5
    assert "model.num_levels: 3 there, 2 now" in capsys.readouterr().err
    assert call("evaluate", tmp_path / "run", "--shards", two.root) == 5
