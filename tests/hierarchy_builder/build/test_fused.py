"""One pass gives the shards of the stages, byte for byte: with odd images, after a stop, after a loss."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import cli
from patch_means import PatchMeans
from pictures import write_tree

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build.fused import FuseStage
from hierarchy_builder.build.session import Session
from hierarchy_builder.build.workers import Workers
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig, VocabularyConfig
from hierarchy_builder.errors import BuilderError, ConfigMismatchError, UsageError
from hierarchy_builder.files.whole import read_json
from hierarchy_builder.progress import Reporter
from hierarchy_builder.quality.comparison import compare_builds
from hierarchy_builder.quality.report import write_report
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.verify.checks import find_problems
from hierarchy_builder.verify.repair import repair

IN_PROCESS = Session(workers=Workers(count=0), reporter=Reporter(quiet=True))
PLAN = steps.BuildPlan(
    extract=ExtractConfig(encoder="dct", block_rows=8, max_bad_fraction=0.5, batch_size=4),
    hierarchy=HierarchyRecipe.paper(),
    shard=ShardConfig(samples_per_shard=8, images=True),
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_tree(tmp_path_factory.mktemp("photos") / "tree", per_class=9)


def run(
    root: Path, photos: Path, plan: steps.BuildPlan = PLAN, *, fused: bool = True, **changes
) -> BuildFolder:
    folder = BuildFolder(root)
    steps.build(folder, str(photos), plan, replace(IN_PROCESS, **changes), fused=fused)
    return folder


def content(folder: BuildFolder) -> dict[str, bytes]:
    """Everything below shards/, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.shards.iterdir())}


@pytest.fixture(scope="module")
def staged(photos, tmp_path_factory) -> dict[str, bytes]:
    return content(run(tmp_path_factory.mktemp("staged") / "out", photos, fused=False))


def parts_left(folder: BuildFolder) -> list[str]:
    return sorted(path.name for path in folder.part(0).parent.iterdir() if path.suffix != ".npz")


def test_one_pass_makes_every_file_the_stages_make(photos, staged, tmp_path) -> None:
    folder = run(tmp_path / "out", photos)
    assert content(folder) == staged
    assert len([name for name in staged if name.endswith(".tar")]) == 4
    assert not folder.features.exists()
    assert not folder.regions.exists()
    assert parts_left(folder) == []


@pytest.mark.parametrize(("samples", "block"), [(5, 8), (11, 4), (100, 8), (8, 27)])
def test_shards_are_cut_from_blocks_of_any_size(samples, block, photos, tmp_path) -> None:
    plan = replace(
        PLAN,
        extract=replace(PLAN.extract, block_rows=block),
        shard=ShardConfig(samples_per_shard=samples, covariance=True),
    )
    assert content(run(tmp_path / "one", photos, plan)) == content(
        run(tmp_path / "stages", photos, plan, fused=False)
    )


def test_images_that_cannot_be_used_shift_the_shards_behind_them(tmp_path) -> None:
    photos = write_tree(tmp_path / "photos", per_class=9)
    for name in ("circle/001.png", "stripes/004.png", "stripes/008.png"):
        (photos / name).write_bytes(b"no picture")
    folder = run(tmp_path / "one", photos)
    stages = run(tmp_path / "stages", photos, fused=False)
    assert content(folder) == content(stages)
    assert folder.index.read_bytes() == stages.index.read_bytes()
    assert read_json(folder.shards / "index.json")["num_samples"] == 24


def test_a_block_without_a_usable_image_leaves_nothing(tmp_path, monkeypatch) -> None:
    photos = write_tree(tmp_path / "photos", per_class=9)
    for path in (photos / "circle").iterdir():
        path.write_bytes(b"no picture")
    plan = replace(PLAN, extract=replace(PLAN.extract, order="listed", block_rows=3))
    folder = run(tmp_path / "one", photos, plan)
    assert content(folder) == content(run(tmp_path / "stages", photos, plan, fused=False))
    assert parts_left(folder) == []
    monkeypatch.setattr(FuseStage, "run", None)  # nothing is done again
    assert content(run(tmp_path / "one", photos, plan)) == content(folder)


def test_a_stopped_run_goes_on_from_the_last_block(photos, staged, tmp_path, monkeypatch) -> None:
    run_unit, units = FuseStage.run, []

    def stop_at_third(stage, unit, threads):
        units.append(unit.number)
        if len(units) == 3:
            raise BuilderError("stopped here")
        return run_unit(stage, unit, threads)

    monkeypatch.setattr(FuseStage, "run", stop_at_third)
    with pytest.raises(BuilderError, match="stopped here"):
        run(tmp_path / "out", photos)
    assert (tmp_path / "out" / "shards" / "train-000001.tar").exists()  # whole shards need no later block
    assert not (tmp_path / "out" / "shards" / "_SUCCESS").exists()
    assert content(run(tmp_path / "out", photos)) == staged
    assert units == [0, 1, 2, 2, 3]


@pytest.mark.parametrize(("samples", "again"), [(8, {1}), (5, {0, 1})])
def test_a_lost_shard_is_made_again_from_its_blocks(samples, again, photos, tmp_path, monkeypatch) -> None:
    plan = replace(PLAN, shard=replace(PLAN.shard, samples_per_shard=samples))
    folder = run(tmp_path / "out", photos, plan)
    whole = content(folder)
    (folder.shards / "train-000001.tar").unlink()
    run_unit, units = FuseStage.run, set()

    def note(stage, unit, threads):
        units.add(unit.number)
        return run_unit(stage, unit, threads)

    monkeypatch.setattr(FuseStage, "run", note)
    assert content(run(tmp_path / "out", photos, plan)) == whole
    assert units == again
    assert parts_left(folder) == []


def test_another_configuration_is_refused(photos, tmp_path) -> None:
    run(tmp_path / "out", photos)
    other = replace(PLAN, hierarchy=replace(PLAN.hierarchy, seed=7))
    with pytest.raises(ConfigMismatchError, match=r"cluster\.config\.seed: 0 there, 7 now"):
        run(tmp_path / "out", photos, other)
    with pytest.raises(ConfigMismatchError, match="was built fused and cannot be continued in stages"):
        run(tmp_path / "out", photos, fused=False)
    assert content(run(tmp_path / "out", photos, other, fresh=True)) != {}


def test_commands_that_need_stores_refuse_a_fused_build(photos, tmp_path) -> None:
    folder = run(tmp_path / "out", photos)
    for needs_stores in (
        lambda: write_report(folder, folder.report),
        lambda: compare_builds(folder, folder),
        lambda: steps.cluster(folder, HierarchyRecipe.paper(), IN_PROCESS),
    ):
        with pytest.raises(BuilderError, match=r"is a fused build.*build without --fused in another folder"):
            needs_stores()


@pytest.mark.parametrize("words", [("extract",), ("report", "--vocabulary"), ("cluster",), ("shard",)])
def test_verbs_say_that_a_build_is_fused_and_how_to_finish_it(photos, tmp_path, words) -> None:
    folder = run(tmp_path / "out", photos)
    verb, *options = words
    refused = cli("hierarchy-builder", verb, folder.root, *options)
    assert refused.code == 1
    assert f"{folder.root} is a fused build" in refused.err
    assert "to finish this one, repeat the command that made it" in refused.err


def test_what_needs_stored_features_is_refused(photos, tmp_path) -> None:
    with pytest.raises(UsageError, match="--vocabulary reads the stored features"):
        run(tmp_path / "out", photos, replace(PLAN, vocabulary=VocabularyConfig()))
    with pytest.raises(UsageError, match="measure what int8 costs"):
        run(tmp_path / "out", photos, replace(PLAN, shard=ShardConfig(feature_dtype="int8")))


class Cramped(PatchMeans):
    """Has memory for three pictures."""

    def encode(self, images: np.ndarray) -> np.ndarray:
        if len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().encode(images)


@pytest.mark.parametrize("fused", [True, False])
def test_out_of_memory_halves_the_batch_and_repeats_its_rows(fused, photos, tmp_path, monkeypatch) -> None:
    plan = replace(PLAN, extract=replace(PLAN.extract, encoder="patch_means:PatchMeans", batch_size=8))
    expected = content(run(tmp_path / "roomy", photos, plan, fused=fused))
    monkeypatch.setattr("patch_means.PatchMeans", Cramped)
    folder = run(tmp_path / "cramped", photos, plan, fused=fused)
    assert content(folder) == expected
    markers = sorted(folder.ledger("fuse" if fused else "extract").glob("*.json"))
    assert [read_json(marker)["batch_size"] for marker in markers] == [2, 2, 2, 2]
    summary = steps.build(folder, str(photos), plan, IN_PROCESS, fused=fused)[0]  # its grid is no list
    assert summary.notes["batch_size"] == 2


def damage_tar(folder: BuildFolder) -> None:
    with open(folder.shards / "train-000002.tar", "r+b") as file:
        file.seek(5000)
        file.write(b"\xff")


DAMAGE = {
    "a flipped byte": damage_tar,
    "a lost sidecar": lambda folder: (folder.shards / "train-000001.json").unlink(),
    "lost statistics": lambda folder: folder.part_moments(1).unlink(),
    "a torn index": lambda folder: folder.index.write_bytes(folder.index.read_bytes()[:200]),
    "no marker of the set": lambda folder: (folder.shards / "_SUCCESS").unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_mended(kind, photos, staged, tmp_path) -> None:
    folder = run(tmp_path / "out", photos)
    index = folder.index.read_bytes()
    assert list(find_problems(folder)) == []
    DAMAGE[kind](folder)
    assert list(find_problems(folder)) != []
    repair(folder, IN_PROCESS)
    assert list(find_problems(folder)) == []
    assert content(folder) == staged
    assert folder.index.read_bytes() == index
