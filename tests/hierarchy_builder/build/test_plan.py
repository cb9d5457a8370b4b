"""What `plan` foretells against what is then built, what it says of a begun build, and when it says no."""

import dataclasses
import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pictures import CLASSES, write_tree
from typer.testing import CliRunner

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build import rehearsal, space
from hierarchy_builder.build.forecast import Plan, plan_tables
from hierarchy_builder.build.plan import make_plan
from hierarchy_builder.build.workers import Workers
from hierarchy_builder.cli import app as cli
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig, VocabularyConfig
from hierarchy_builder.errors import BuilderError, ConfigMismatchError
from hierarchy_builder.files import size_on_disk
from hierarchy_builder.progress import Reporter
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder

SESSION = steps.Session(workers=Workers(count=0), reporter=Reporter(quiet=True))
PLAN = steps.BuildPlan(
    extract=ExtractConfig(encoder="dct", block_rows=16, max_bad_fraction=0.5),
    hierarchy=HierarchyRecipe.paper(),
    vocabulary=VocabularyConfig(sizes=(3, 40), sampled_tokens=900, iterations=2),
    shard=ShardConfig(samples_per_shard=10, images=True, covariance=True),
)
PLAIN = replace(PLAN, vocabulary=None, shard=ShardConfig(split="val", feature_dtype="int8", canvases=True))
ODD_BLOCKS = replace(PLAIN, extract=replace(PLAN.extract, block_rows=13), hierarchy=HierarchyRecipe.stable())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_tree(tmp_path_factory.mktemp("photos"), per_class=12)
    (root / "circle" / "000.png").write_bytes(b"")
    (root / "nothing").mkdir()
    return root


def planned(folder: BuildFolder, photos: Path, plan: steps.BuildPlan = PLAN, **changes: Any) -> Plan:
    return make_plan(folder, str(photos), plan, replace(SESSION, **changes))


def differences(plan: Plan, folder: BuildFolder) -> dict[str, float]:
    """Foretold over real bytes, less one, of every artefact."""
    real = {name: size_on_disk(folder.root / name) for name in plan.sizes}
    others = {path.name for path in folder.root.iterdir()} - {".lock", *plan.sizes}
    assert not others, "an artefact that no plan names"
    return {name: size / real[name] - 1 for name, size in plan.sizes.items()}


@pytest.mark.parametrize("config", [PLAN, PLAIN, ODD_BLOCKS], ids=["all", "int8", "odd blocks"])
def test_every_artefact_has_the_size_foretold(photos: Path, tmp_path: Path, config: steps.BuildPlan) -> None:
    folder = BuildFolder(tmp_path / "build")
    plan = planned(folder, photos, config)
    assert list(tmp_path.iterdir()) == [], "a plan leaves nothing behind"
    steps.build(folder, str(photos), config, SESSION)
    assert max(map(abs, differences(plan, folder).values())) < 0.01
    assert (plan.tried, plan.usable, plan.uncertainty) == (36, 35, 0)
    tars = sorted(path.name for path in folder.shards.glob("*.tar"))
    assert (plan.shards["count"], plan.shards["first"], plan.shards["last"]) == (len(tars), tars[0], tars[-1])
    assert plan.shards["bytes"] == (folder.shards / tars[0]).stat().st_size


def test_some_images_foretell_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos, folder = write_tree(tmp_path / "photos", per_class=90), BuildFolder(tmp_path / "build")
    monkeypatch.setattr(rehearsal, "FIRST_ROUND", 64)
    monkeypatch.setattr(rehearsal, "SHORTEST_ROUND", 16)
    monkeypatch.setattr(rehearsal, "LEAST_IMAGES", 64)
    monkeypatch.setattr(rehearsal, "TARGET_ERROR", 0.012)  # of so few images, more would mean all
    config = replace(PLAN, extract=ExtractConfig(encoder="dct"))
    plan = planned(folder, photos, config)
    assert 64 < plan.tried < 270, "a second round, sized by what the first one saw"
    assert 0 < plan.uncertainty < 0.03
    steps.build(folder, str(photos), config, SESSION)
    assert max(map(abs, differences(plan, folder).values())) < 0.02


def test_rounds_end_with_the_time(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "FIRST_ROUND", 16)
    plan = make_plan(BuildFolder(tmp_path / "build"), str(photos), PLAIN, SESSION, seconds=0)
    assert plan.tried == 16
    assert plan.uncertainty > 0


def test_images_are_counted_by_class_and_sampled_for_damage(photos: Path, tmp_path: Path) -> None:
    plan = planned(BuildFolder(tmp_path / "build"), photos, PLAIN)
    assert plan.classes == {"circle": 12, "nothing": 0, "square": 12, "stripes": 12}
    assert plan.num_images == 36
    assert plan.input_bytes == sum(path.stat().st_size for path in photos.rglob("*.png"))
    assert plan.unreadable == {"circle/000.png": "empty: the file has no bytes"}
    assert plan.warnings == ("1 class without images, ids kept: nothing",)
    tables = plan_tables(plan)
    assert {"class": "nothing", "images": 0} in tables["Classes"]
    assert tables["Unreadable"] == [{"path": "circle/000.png", "reason": "empty: the file has no bytes"}]
    assert json.loads(json.dumps(plan.as_json()))["fits"] is True


# What is there already


@pytest.fixture(scope="module")
def built(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildFolder:
    folder = BuildFolder(tmp_path_factory.mktemp("built") / "build")
    steps.build(folder, str(photos), PLAN, SESSION)
    return folder


@pytest.fixture
def copy(built: BuildFolder, photos: Path, tmp_path: Path) -> BuildFolder:
    shutil.copytree(built.root, tmp_path / "build")
    return BuildFolder(tmp_path / "build")


def states(plan: Plan) -> dict[str, str]:
    return {stage.stage: stage.state for stage in plan.stages}


def test_stages_of_a_finished_build_are_done(built: BuildFolder, photos: Path) -> None:
    before = sorted(path for path in built.root.rglob("*"))
    plan = planned(built, photos)
    assert states(plan) == dict.fromkeys(("extract", "vocabulary", "cluster", "link", "shard"), "done")
    assert plan.seconds == 0
    assert plan.missing <= 0.01 * plan.total
    assert sorted(path for path in built.root.rglob("*")) == before
    plan.check(built, force=False)


def test_a_plan_says_what_would_go_on_and_what_starts_over(copy: BuildFolder, photos: Path) -> None:
    (copy.ledger("cluster") / "000001.json").unlink()
    shutil.rmtree(copy.ledger("shard"))
    shutil.rmtree(copy.shards)
    plan = planned(copy, photos)
    assert states(plan) == {
        "extract": "done", "vocabulary": "done", "cluster": "goes on", "link": "done", "shard": "to do",
    }  # fmt: skip
    left = {stage.stage: (stage.units - stage.units_done, stage.images) for stage in plan.stages}
    assert left == {
        "extract": (0, 0),
        "vocabulary": (0, 0),
        "cluster": (1, 16),
        "link": (0, 0),
        "shard": (4, 35),
    }
    assert plan.missing >= plan.sizes["shards"] * 0.98
    fresh = planned(copy, photos, fresh=True)
    assert set(states(fresh).values()) == {"starts over", "to do"}
    assert [stage.units_done for stage in fresh.stages] == [0] * 5


def test_what_would_be_refused_is_named(built: BuildFolder, photos: Path) -> None:
    plan = planned(built, photos, replace(PLAN, hierarchy=HierarchyRecipe(cuts=(0.5,))))
    assert list(states(plan).values()) == ["done", "done", "refused", "refused", "refused"]
    assert plan.stages[2].differs == ("config.cuts: [0.65, 0.35] there, [0.5] now",)
    with pytest.raises(ConfigMismatchError, match=r"another cluster.*\n  config\.cuts: .* there") as caught:
        plan.check(built, force=True)
    assert caught.value.exit_code == 5


# Room


def test_what_cannot_fit_is_refused_with_numbers(
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


def test_what_is_there_needs_no_room_again(
    built: BuildFolder, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sum(size_on_disk(path) for path in built.root.iterdir())
    monkeypatch.setattr(space, "free_bytes", lambda root: whole // 2)
    steps.build(built, str(photos), PLAN, SESSION)


def test_the_quick_bound_is_one(built: BuildFolder) -> None:
    encoder = {"grid": (16, 16), "width": 48, "image_size_px": 256}
    bound = space.extract_bytes(36, encoder, 16) | space.later_bytes(
        PLAN.hierarchy, PLAN.vocabulary, PLAN.shard, 36, encoder
    )
    assert size_on_disk(built.index) <= bound["index.parquet"]
    for name, slack in (("features.zarr", 1.5), ("regions.zarr", 8)):
        stored = [path for path in (built.root / name).rglob("c/**/*") if path.is_file()]
        assert (
            sum(path.stat().st_size for path in stored)
            <= bound[name]
            <= slack * size_on_disk(built.root / name)
        )


def test_chunks_and_their_index_fill_a_store(built: BuildFolder) -> None:
    for path, name in ((built.features, "features"), (built.regions, "merges"), (built.regions, "regions")):
        chunks = stores.chunk_bytes(path, name)
        assert len(chunks) == -(-36 // 8)
        files = [file for file in (path / name / "c").rglob("*") if file.is_file()]
        assert chunks.sum() + len(files) * stores.shard_index_bytes(2) == size_on_disk(path / name / "c")


# Command line


def test_plan_takes_the_words_of_build() -> None:
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
    monkeypatch.setattr(space, "free_bytes", lambda root: 1_500_000)
    refused = CliRunner().invoke(cli.app, ["build", *words, "--max-bad-fraction", "1"])
    assert "go on with --force" in str(refused.exception)
    assert CliRunner().invoke(cli.app, ["build", *words, "--max-bad-fraction", "1", "--force"]).exit_code == 0


def test_retry_failed_on_the_command_line(tmp_path: Path) -> None:
    photos = write_tree(tmp_path / "photos", per_class=2)
    whole = (photos / "circle" / "000.png").read_bytes()
    (photos / "circle" / "000.png").write_bytes(whole[:200])
    words = [
        "build",
        str(photos),
        "--out",
        str(tmp_path / "out"),
        "--encoder",
        "dct",
        "--workers",
        "0",
        "--json",
    ]
    assert CliRunner().invoke(cli.app, [*words, "--max-bad-fraction", "0.2"]).exit_code == 0
    (photos / "circle" / "000.png").write_bytes(whole)
    done = CliRunner().invoke(cli.app, [*words, "--retry-failed"])
    assert done.exit_code == 0, done.stderr
    assert [row["images"] for row in json.loads(done.stdout)] == [6, 6, 6]
    assert "tried again: 1 image that could not be used" in done.stderr
