"""The estimates of `plan` against real builds, the states it reports for a folder, and what it refuses."""

import dataclasses
import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pictures import CLASSES, draw_picture, write_tree
from typer.testing import CliRunner

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build import space
from hierarchy_builder.build.fused import FuseStage
from hierarchy_builder.build.plan import Plan, make_plan, plan_tables
from hierarchy_builder.build.workers import Workers
from hierarchy_builder.cli import app as cli
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig, VocabularyConfig
from hierarchy_builder.errors import BuilderError, ConfigMismatchError, UsageError
from hierarchy_builder.files.whole import size_on_disk
from hierarchy_builder.progress import Reporter
from hierarchy_builder.store import ledger
from hierarchy_builder.store.folder import BuildFolder

SESSION = steps.Session(workers=Workers(count=0), reporter=Reporter(quiet=True))
PLAN = steps.BuildPlan(
    extract=ExtractConfig(encoder="dct", block_rows=16, max_bad_fraction=0.5),
    hierarchy=HierarchyRecipe.paper(),
    vocabulary=VocabularyConfig(sizes=(3, 40), sampled_tokens=900, iterations=2),
    shard=ShardConfig(samples_per_shard=10, images=True, covariance=True),
)
PLAIN = replace(
    PLAN,
    extract=replace(PLAN.extract, block_rows=13),
    hierarchy=HierarchyRecipe.stable(),
    vocabulary=None,
    shard=ShardConfig(split="val", feature_dtype="int8", canvases=True),
)
FUSED = replace(PLAN, vocabulary=None)
EXACT = ("class_map.json",)
WITHIN = 0.05
"""Largest relative error of a size when every image is tried."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_tree(tmp_path_factory.mktemp("photos"), per_class=12)
    (root / "circle" / "000.png").write_bytes(b"")
    (root / "nothing").mkdir()
    return root


def planned(folder: BuildFolder, photos: Path, plan: steps.BuildPlan = PLAN, **changes: Any) -> Plan:
    return make_plan(folder, str(photos), plan, SESSION, **changes)


def check_sizes(plan: Plan, folder: BuildFolder, within: float) -> None:
    """Compare the estimate of every artefact with its real size."""
    assert {path.name for path in folder.root.iterdir()} - {".lock"} == plan.sizes.keys()
    real = {name: size_on_disk(folder.root / name) for name in plan.sizes}
    assert {name: plan.sizes[name] for name in EXACT} == {name: real[name] for name in EXACT}
    errors = {name: size / real[name] - 1 for name, size in plan.sizes.items()}
    assert max(map(abs, errors.values())) < within, errors
    tars = sorted(path.name for path in folder.shards.glob("*.tar"))
    assert (plan.shards["count"], plan.shards["first"], plan.shards["last"]) == (len(tars), tars[0], tars[-1])


def states(plan: Plan) -> dict[str, tuple[str, int]]:
    """State of every stage, and images to do."""
    return {stage.stage: (stage.state, stage.images) for stage in plan.stages}


# Sizes


@pytest.mark.parametrize(
    ("config", "fused"), [(PLAN, False), (PLAIN, False), (FUSED, True)], ids=["all", "int8", "fused"]
)
def test_sizes_follow_when_every_image_is_tried(
    photos: Path, tmp_path: Path, config: steps.BuildPlan, fused: bool
) -> None:
    folder = BuildFolder(tmp_path / "build")
    plan = planned(folder, photos, config, fused=fused)
    assert list(tmp_path.iterdir()) == [], "plan leaves nothing behind"
    steps.build(folder, str(photos), config, SESSION, fused=fused)
    assert (plan.tried, plan.usable, plan.uncertainty) == (36, 35, 0)
    check_sizes(plan, folder, WITHIN)
    tars = sorted(folder.shards.glob("*.tar"))
    assert sum(tar.stat().st_size for tar in tars) == pytest.approx(
        plan.shards["bytes"] * 35 / plan.shards["samples"] if len(tars) > 1 else plan.shards["bytes"], rel=0.1
    )


def test_sizes_are_estimated_from_128_images(tmp_path: Path) -> None:
    photos, folder = write_tree(tmp_path / "photos", per_class=90), BuildFolder(tmp_path / "build")
    config = replace(PLAN, extract=ExtractConfig(encoder="dct"))
    plan = planned(folder, photos, config)
    assert plan.tried == 128
    assert 0 < plan.uncertainty < 0.1
    assert any("estimated from 128 images" in row["value"] for row in plan_tables(plan)["Build"])
    steps.build(folder, str(photos), config, SESSION)
    check_sizes(plan, folder, 0.1)


def test_images_are_counted_by_class_and_damage_is_sampled(photos: Path, tmp_path: Path) -> None:
    plan = planned(BuildFolder(tmp_path / "build"), photos, PLAIN)
    assert plan.classes == {"circle": 12, "nothing": 0, "square": 12, "stripes": 12}
    assert plan.num_images == 36
    assert plan.input_bytes == sum(path.stat().st_size for path in photos.rglob("*.png"))
    assert plan.unreadable == {"circle/000.png": "empty: the file has no bytes"}
    assert plan.warnings == ("1 class without images, which keep their ids: nothing",)
    tables = plan_tables(plan)
    assert {"class": "nothing", "images": 0} in tables["Classes"]
    assert tables["Unreadable"] == [{"path": "circle/000.png", "reason": "empty: the file has no bytes"}]
    assert json.loads(json.dumps(plan.as_json()))["fits"] is True


# States


@pytest.fixture(scope="module")
def built(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildFolder:
    folder = BuildFolder(tmp_path_factory.mktemp("built") / "build")
    steps.build(folder, str(photos), PLAN, SESSION)
    return folder


def test_stages_of_a_finished_build_are_done(built: BuildFolder, photos: Path) -> None:
    before = sorted(path for path in built.root.rglob("*"))
    plan = planned(built, photos)
    assert states(plan) == dict.fromkeys(("extract", "vocabulary", "cluster", "link", "shard"), ("done", 0))
    assert plan.seconds == 0
    assert plan.missing <= WITHIN * plan.total
    assert sorted(path for path in built.root.rglob("*")) == before
    plan.check(built, force=False)


def test_interrupted_stages_go_on_and_fresh_ones_start_over(
    built: BuildFolder, photos: Path, tmp_path: Path
) -> None:
    shutil.copytree(built.root, tmp_path / "build")
    copy = BuildFolder(tmp_path / "build")
    (copy.ledger("cluster") / "000001.json").unlink()
    shutil.rmtree(copy.ledger("shard"))
    shutil.rmtree(copy.shards)
    plan = planned(copy, photos)
    assert states(plan) == {
        "extract": ("done", 0), "vocabulary": ("done", 0), "cluster": ("goes on", 16), "link": ("done", 0),
        "shard": ("to do", 35),
    }  # fmt: skip
    assert [stage.units - stage.units_done for stage in plan.stages] == [0, 0, 1, 0, 4]
    assert plan.missing >= plan.sizes["shards"] * (1 - WITHIN)
    fresh = make_plan(copy, str(photos), PLAN, replace(SESSION, fresh=True))
    assert {stage.state for stage in fresh.stages} == {"starts over", "to do"}
    assert [stage.units_done for stage in fresh.stages] == [0] * 5


def test_a_fused_build_goes_on(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, run_unit = BuildFolder(tmp_path / "build"), FuseStage.run
    plan = planned(folder, photos, FUSED, fused=True)
    assert states(plan) == {"fuse": ("to do", 36)}
    assert plan.stages[0].units == 3
    assert 0 < plan.scratch < plan.sizes["shards"]

    def stop_at_last(stage: FuseStage, unit: Any, threads: int) -> dict[str, Any]:
        if unit.number == 2:
            raise KeyboardInterrupt
        return run_unit(stage, unit, threads)

    with monkeypatch.context() as patched:
        patched.setattr(FuseStage, "run", stop_at_last)
        with pytest.raises(KeyboardInterrupt):
            steps.build(folder, str(photos), FUSED, SESSION, fused=True)
    assert states(planned(folder, photos, FUSED, fused=True)) == {"fuse": ("goes on", 4)}
    (summary,) = steps.build(folder, str(photos), FUSED, SESSION, fused=True)
    assert summary.new_images == 4
    done = planned(folder, photos, FUSED, fused=True)
    assert states(done) == {"fuse": ("done", 0)}
    assert (done.scratch, done.seconds) == (0, 0)


def test_code_that_the_trial_compiles_is_not_compiled_for_every_image(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling = 1000.0

    def read_marker(path: Path) -> dict[str, Any]:
        marker = ledger.read_marker(path)
        return marker | {"seconds": marker["seconds"] + compiling * (marker["unit"] == 0)}

    monkeypatch.setattr("hierarchy_builder.build.plan.read_marker", read_marker)
    plan = planned(BuildFolder(tmp_path / "build"), photos, PLAIN)
    assert {stage.stage for stage in plan.stages if stage.seconds < compiling} >= {"extract", "cluster"}


@pytest.mark.parametrize("config", [PLAN, FUSED], ids=["linked", "plain"])
def test_new_images_are_planned_as_the_build_appends_them(
    photos: Path, tmp_path: Path, config: steps.BuildPlan
) -> None:
    folder = BuildFolder(tmp_path / "build")
    shutil.copytree(photos, tmp_path / "photos")
    photos = tmp_path / "photos"
    first = planned(folder, photos, config, accept_new_files=True)
    assert {state for state, _ in states(first).values()} == {"to do"}
    steps.build(folder, str(photos), config, SESSION)
    for number in (13, 14, 15):
        draw_picture(CLASSES[0], number).save(photos / CLASSES[0] / f"{number:03d}.png")
    (photos / "arc").mkdir()
    draw_picture(CLASSES[1], 9).save(photos / "arc" / "009.png")
    (photos / "arc" / "010.png").write_bytes(b"no picture")
    assert states(planned(folder, photos, config))["extract"][0] == "refused"
    before = sorted(path for path in folder.root.rglob("*"))
    plan = planned(folder, photos, config, accept_new_files=True)
    assert sorted(path for path in folder.root.rglob("*")) == before, "plan changes nothing"
    summaries = steps.build(folder, str(photos), config, SESSION, accept_new_files=True)
    found, done = states(plan), {summary.stage: summary.new_images for summary in summaries}
    assert found["extract"] == ("goes on", 9)  # the last block of four rows, and five more
    assert found["shard"] == (("goes on", 9) if config is FUSED else ("to do", 39))
    assert {stage: found[stage][1] for stage in ("extract", "shard")} == {
        stage: done[stage] for stage in ("extract", "shard")
    }
    check_sizes(plan, folder, 0.1)
    for accept in (False, True):  # the plain command goes on
        after = planned(folder, photos, config, accept_new_files=accept)
        assert {state for state, _ in states(after).values()} == {"done"}
    other = replace(config, hierarchy=replace(config.hierarchy, seed=7))
    refused = planned(folder, photos, other, accept_new_files=True).stages
    assert [stage.differs for stage in refused if stage.stage == "cluster"] == [
        ("config.seed: 0 there, 7 now",)
    ]
    shutil.rmtree(photos / "stripes")
    with pytest.raises(ConfigMismatchError, match=r"12 images of this build"):
        planned(folder, photos, config, accept_new_files=True)


# Refusals


def test_other_configurations_are_refused_by_name(built: BuildFolder, photos: Path, tmp_path: Path) -> None:
    plan = planned(built, photos, replace(PLAN, hierarchy=HierarchyRecipe(cuts=(0.5,))))
    assert [state for state, _ in states(plan).values()] == ["done", "done", "refused", "refused", "refused"]
    assert plan.stages[2].differs == ("config.cuts: [0.65, 0.35] there, [0.5] now",)
    with pytest.raises(ConfigMismatchError, match=r"another cluster.*\n  config\.cuts: .* there") as caught:
        plan.check(built, force=True)
    assert caught.value.exit_code == 5
    plan = planned(built, photos, FUSED, fused=True)
    assert plan.stages[0].differs == ("made by stages there, in one pass now",)
    fused = BuildFolder(tmp_path / "fused")
    steps.build(fused, str(photos), FUSED, SESSION, fused=True)
    with pytest.raises(ConfigMismatchError, match="made in one pass there, by stages now"):
        planned(fused, photos, FUSED).check(fused, force=False)
    other = replace(FUSED, hierarchy=replace(FUSED.hierarchy, seed=7))
    assert planned(fused, photos, other, fused=True).stages[0].differs[0] == (
        "cluster.config.seed: 0 there, 7 now"
    )


def test_what_a_fused_build_cannot_do_is_refused(photos: Path, tmp_path: Path) -> None:
    folder = BuildFolder(tmp_path / "build")
    with pytest.raises(UsageError, match="--vocabulary reads the stored features"):
        planned(folder, photos, PLAN, fused=True)
    with pytest.raises(UsageError, match="--accept-new-files reads the stored features"):
        planned(folder, photos, FUSED, fused=True, accept_new_files=True)
    with pytest.raises(UsageError, match="measure what int8 costs"):
        planned(folder, photos, replace(FUSED, shard=ShardConfig(feature_dtype="int8")), fused=True)


def test_a_build_that_does_not_fit_is_refused_with_numbers(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = BuildFolder(tmp_path / "build")
    plan = replace(planned(folder, photos), free=1_000_000)
    with pytest.raises(
        BuilderError, match=rf"{plan.missing:,} bytes are still.* 1,000,000 are free"
    ) as caught:
        plan.check(folder, force=False)
    assert caught.value.exit_code == 1
    plan.check(folder, force=True)
    assert any("DOES NOT FIT" in row["value"] for row in plan_tables(plan)["Build"])
    monkeypatch.setattr(space, "free_bytes", lambda root: 1_500_000)
    with pytest.raises(BuilderError, match=r"up to [\d,]+ bytes \(.*shards [\d,]+\), 1,500,000 are free"):
        steps.build(folder, str(photos), PLAN, SESSION)
    assert not folder.root.exists()
    steps.extract(folder, str(photos), PLAN.extract, SESSION)  # features alone do fit
    steps.build(folder, str(photos), PLAN, replace(SESSION, force=True))


def test_existing_files_count_as_free_space(
    built: BuildFolder, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sum(size_on_disk(path) for path in built.root.iterdir())
    monkeypatch.setattr(space, "free_bytes", lambda root: whole // 2)
    steps.build(built, str(photos), PLAN, SESSION)


def test_the_bound_from_shapes_holds(built: BuildFolder) -> None:
    encoder = {"grid": (16, 16), "width": 48, "image_size_px": 256}
    bound = space.extract_bytes(36, encoder, 16) | space.later_bytes(PLAN, 36, encoder)
    assert size_on_disk(built.index) <= bound["index.parquet"]
    for name, slack in (("features.zarr", 1.5), ("regions.zarr", 8)):
        stored = [path for path in (built.root / name).rglob("c/**/*") if path.is_file()]
        assert (
            sum(path.stat().st_size for path in stored)
            <= bound[name]
            <= slack * size_on_disk(built.root / name)
        )


# Command line


def test_plan_takes_the_options_of_build() -> None:
    asked, known = (set(inspect.signature(command).parameters) for command in (cli.plan, cli.build))
    fields = {
        field.name
        for part in (ExtractConfig, HierarchyRecipe, ShardConfig)
        for field in dataclasses.fields(part)
    }
    assert asked < known
    assert known & fields <= asked


def test_command_line(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [str(photos), "--out", str(tmp_path / "out"), "--encoder", "dct", "--workers", "0", "--quiet"]
    done = CliRunner().invoke(cli.app, ["plan", *words, "--json", "--samples-per-shard", "20"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["shards"]["last"] == "train-000001.tar"
    assert found["classes"] == {**dict.fromkeys(CLASSES, 12), "nothing": 0}
    assert found["total"] == sum(found["sizes"].values())
    done = CliRunner().invoke(cli.app, ["plan", *words, "--json", "--fused"])
    assert [stage["stage"] for stage in json.loads(done.stdout)["stages"]] == ["fuse"]
    monkeypatch.setattr(space, "free_bytes", lambda root: 1_500_000)
    refused = CliRunner().invoke(cli.app, ["build", *words, "--max-bad-fraction", "1"])
    assert "go on with --force" in str(refused.exception)
    assert CliRunner().invoke(cli.app, ["build", *words, "--max-bad-fraction", "1", "--force"]).exit_code == 0


def test_retry_failed_on_the_command_line(tmp_path: Path) -> None:
    photos = write_tree(tmp_path / "photos", per_class=2)
    whole = (photos / "circle" / "000.png").read_bytes()
    (photos / "circle" / "000.png").write_bytes(whole[:200])
    words = ["build", str(photos), "--out", str(tmp_path / "out")]
    words += ["--encoder", "dct", "--workers", "0", "--json"]
    assert CliRunner().invoke(cli.app, [*words, "--max-bad-fraction", "0.2"]).exit_code == 0
    (photos / "circle" / "000.png").write_bytes(whole)
    done = CliRunner().invoke(cli.app, [*words, "--retry-failed"])
    assert done.exit_code == 0, done.stderr
    assert [row["images"] for row in json.loads(done.stdout)] == [6, 6, 6]
    assert "tried again: 1 image that could not be used" in done.stderr
