"""What `plan` foretells of builds in one pass and of builds that images are appended to, against what then comes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pictures import CLASSES, draw_picture, write_tree
from typer.testing import CliRunner

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build.forecast import Plan
from hierarchy_builder.build.fused import FuseStage
from hierarchy_builder.build.plan import make_plan
from hierarchy_builder.build.workers import Workers
from hierarchy_builder.cli import app as cli
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig, VocabularyConfig
from hierarchy_builder.errors import ConfigMismatchError, UsageError
from hierarchy_builder.files import size_on_disk
from hierarchy_builder.progress import Reporter
from hierarchy_builder.store.folder import BuildFolder

SESSION = steps.Session(workers=Workers(count=0), reporter=Reporter(quiet=True))
PLAN = steps.BuildPlan(
    extract=ExtractConfig(encoder="patch_means:PatchMeans", block_rows=8, max_bad_fraction=0.5),
    hierarchy=HierarchyRecipe.paper(),
    shard=ShardConfig(samples_per_shard=5, images=True, image_px=64, covariance=True),
)
WORDS = VocabularyConfig(sizes=(3, 10), sampled_tokens=900, iterations=2)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """18 photos in blocks of 8, one of them no picture: tars of 5, the last of 2."""
    root = write_tree(tmp_path / "photos", per_class=6)
    (root / "circle" / "000.png").write_bytes(b"no picture")
    return root


def add(photos: Path) -> None:
    """Five more, one of a class of its own, one that is no picture."""
    for number in (7, 8, 9):
        draw_picture(CLASSES[0], number).save(photos / CLASSES[0] / f"{number:03d}.png")
    (photos / "arc").mkdir()
    draw_picture(CLASSES[1], 9).save(photos / "arc" / "009.png")
    (photos / "arc" / "010.png").write_bytes(b"no picture either")


def planned(folder: BuildFolder, photos: Path, plan: steps.BuildPlan = PLAN, **changes: Any) -> Plan:
    return make_plan(folder, str(photos), plan, SESSION, **changes)


def check_sizes(plan: Plan, folder: BuildFolder) -> None:
    """Every artefact foretold within one per cent, tars to a record of 10,240 bytes, and no other there."""
    assert {path.name for path in folder.root.iterdir()} - {".lock"} == plan.sizes.keys()
    for name, size in plan.sizes.items():
        real = size_on_disk(folder.root / name)
        assert abs(size - real) <= 0.01 * real + (10_240 if name == "shards" else 0), name
    tars = sorted(path.name for path in folder.shards.glob("*.tar"))
    assert (plan.shards["count"], plan.shards["last"]) == (len(tars), tars[-1])


def left(plan: Plan) -> dict[str, tuple[str, int]]:
    """State of every stage, and images to do."""
    return {stage.stage: (stage.state, stage.images) for stage in plan.stages}


def test_one_pass_makes_what_is_foretold(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = BuildFolder(tmp_path / "build")
    plan = planned(folder, photos, fused=True)
    assert left(plan) == {"fuse": ("to do", 18)}
    assert plan.stages[0].units == 3
    assert plan.usable == 17
    assert 0 < plan.scratch < plan.sizes["shards"] * 0.8  # 13 of 17 rows
    assert not folder.root.exists()
    run_unit = FuseStage.run

    def stop_at_last(stage: FuseStage, unit: Any, threads: int) -> dict[str, Any]:
        if unit.number == 2:
            raise KeyboardInterrupt
        return run_unit(stage, unit, threads)

    with monkeypatch.context() as patched:
        patched.setattr(FuseStage, "run", stop_at_last)
        with pytest.raises(KeyboardInterrupt):
            steps.build(folder, str(photos), PLAN, SESSION, fused=True)
    assert left(planned(folder, photos, fused=True)) == {"fuse": ("goes on", 2)}
    (summary,) = steps.build(folder, str(photos), PLAN, SESSION, fused=True)
    assert summary.new_images == 2
    check_sizes(plan, folder)
    done = planned(folder, photos, fused=True)
    assert left(done) == {"fuse": ("done", 0)}
    assert (done.scratch, done.seconds) == (0, 0)


def test_blocks_of_one_pass_are_shards_where_there_are_many(photos: Path, tmp_path: Path) -> None:
    config = replace(
        PLAN, extract=replace(PLAN.extract, block_rows=None), shard=ShardConfig(samples_per_shard=1)
    )
    folder = BuildFolder(tmp_path / "build")
    plan = planned(folder, photos, config, fused=True)
    steps.build(folder, str(photos), config, SESSION, fused=True)
    assert plan.stages[0].units == 18
    check_sizes(plan, folder)


def test_the_other_way_of_building_is_refused(photos: Path, tmp_path: Path) -> None:
    fused, staged = BuildFolder(tmp_path / "fused"), BuildFolder(tmp_path / "staged")
    steps.build(fused, str(photos), PLAN, SESSION, fused=True)
    steps.extract(staged, str(photos), PLAN.extract, SESSION)
    for folder, differs in (
        (fused, "made in one pass there, by stages now"),
        (staged, "made by stages there, in one pass now"),
    ):
        plan = planned(folder, photos, fused=folder is staged)
        assert plan.stages[0].differs == (differs,)
        with pytest.raises(ConfigMismatchError, match=differs):
            plan.check(folder, force=False)
    other = replace(PLAN, hierarchy=replace(PLAN.hierarchy, seed=7))
    plan = planned(fused, photos, other, fused=True)
    assert plan.stages[0].differs[0] == "cluster.config.seed: 0 there, 7 now"


def test_what_one_pass_cannot_do_is_refused_here_too(photos: Path, tmp_path: Path) -> None:
    folder = BuildFolder(tmp_path / "build")
    with pytest.raises(UsageError, match="--vocabulary reads the stored features"):
        planned(folder, photos, replace(PLAN, vocabulary=WORDS), fused=True)
    with pytest.raises(UsageError, match="--accept-new-files reads the stored features"):
        planned(folder, photos, fused=True, accept_new_files=True)
    with pytest.raises(UsageError, match="measure what int8 costs"):
        planned(folder, photos, replace(PLAN, shard=ShardConfig(feature_dtype="int8")), fused=True)


@pytest.mark.parametrize("vocabulary", [None, WORDS], ids=["plain", "linked"])
def test_new_images_are_planned_and_the_rest_resumed(
    photos: Path, tmp_path: Path, vocabulary: VocabularyConfig | None
) -> None:
    config, folder = replace(PLAN, vocabulary=vocabulary), BuildFolder(tmp_path / "build")
    steps.build(folder, str(photos), config, SESSION)
    add(photos)
    before = sorted(path for path in folder.root.rglob("*"))
    plan = planned(folder, photos, config, accept_new_files=True)
    assert sorted(path for path in folder.root.rglob("*")) == before, "a plan changes nothing"
    summaries = steps.build(folder, str(photos), config, SESSION, accept_new_files=True)
    found, done = left(plan), {summary.stage: summary.new_images for summary in summaries}
    assert found["extract"] == ("goes on", 7)  # the last block of two rows, and five more
    assert found["shard"] == (("goes on", 6) if vocabulary is None else ("to do", 21))
    assert found["shard"][1] == done["shard"]
    assert found["extract"][1] == done["extract"]
    assert plan.stages[0].units_done == 2
    assert plan.usable == 21
    check_sizes(plan, folder)


def test_nothing_new_leaves_nothing_to_do(photos: Path, tmp_path: Path) -> None:
    folder = BuildFolder(tmp_path / "build")
    first = planned(folder, photos, accept_new_files=True)
    assert {state for state, _ in left(first).values()} == {"to do"}
    steps.build(folder, str(photos), PLAN, SESSION)
    add(photos)
    assert left(planned(folder, photos))["extract"][0] == "refused"
    steps.build(folder, str(photos), PLAN, SESSION, accept_new_files=True)
    for accept in (False, True):  # the plain command goes on
        after = planned(folder, photos, accept_new_files=accept)
        assert {state for state, _ in left(after).values()} == {"done"}


def test_other_changes_are_refused_as_the_build_refuses_them(photos: Path, tmp_path: Path) -> None:
    folder = BuildFolder(tmp_path / "build")
    steps.build(folder, str(photos), PLAN, SESSION)
    add(photos)
    other = replace(PLAN, hierarchy=replace(PLAN.hierarchy, seed=7))
    plan = planned(folder, photos, other, accept_new_files=True)
    assert [stage.state for stage in plan.stages] == ["goes on", "refused", "refused"]
    assert plan.stages[1].differs == ("config.seed: 0 there, 7 now",)
    shutil.rmtree(photos / "stripes")
    with pytest.raises(ConfigMismatchError, match=r"6 images .* the first is stripes/"):
        planned(folder, photos, accept_new_files=True)


def test_the_command_line_takes_both(photos: Path, tmp_path: Path) -> None:
    words = [str(photos), "--out", str(tmp_path / "build"), "--encoder", "dct", "--workers", "0", "--quiet"]
    words += ["--max-bad-fraction", "0.5", "--json"]
    done = CliRunner().invoke(cli.app, ["plan", *words, "--fused"])
    assert done.exit_code == 0, done.stderr
    assert [stage["stage"] for stage in json.loads(done.stdout)["stages"]] == ["fuse"]
    assert CliRunner().invoke(cli.app, ["build", *words]).exit_code == 0
    add(photos)
    done = CliRunner().invoke(cli.app, ["plan", *words, "--accept-new-files"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["stages"][0]["state"] == "to do"  # 18 rows were no whole block
