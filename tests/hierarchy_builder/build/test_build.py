"""Images → shards with real stores, tars and Ray: the same bytes however they are made, and every refusal."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pictures import CLASSES, write_tree
from tiny_builds import PLAN, digests, session

from hierarchy_builder.build import inputs, workers
from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build.clustering import recut
from hierarchy_builder.build.workers import (
    Workers,
    _gpus_per_worker,
    _that_fit,
    is_broken_device,
    map_units,
    shutdown,
    threads_per_worker,
)
from hierarchy_builder.canvases import level_canvases
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig, VocabularyConfig
from hierarchy_builder.errors import BuilderError, ConfigMismatchError, TooManySkippedError
from hierarchy_builder.progress import Reporter
from hierarchy_builder.quality.report import write_report
from hierarchy_builder.records import Block
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import read_index
from hierarchy_builder.store.ledger import stage_entry
from hierarchy_builder.store.shards import read_shard
from hierarchy_builder.store.units import progress_of
from hierarchy_builder.verify.checks import find_problems


def test_every_artefact_is_there_and_in_order(tiny_build) -> None:
    assert list(find_problems(tiny_build)) == []
    names = {path.name for path in tiny_build.shards.iterdir()}
    assert {f"train-{n:06d}.tar" for n in range(4)} <= names
    assert {"index.json", "class_map.json", "statistics.npz", "README.md", "_SUCCESS"} <= names
    assert "18 images of 3 classes in\n4 webdataset shards" in (tiny_build.shards / "README.md").read_text()
    table = read_index(tiny_build.index)
    assert set(table.column("status").to_pylist()) == {"ok"}
    assert set(table.column("width").to_pylist()) == {96}


def test_samples_hold_what_the_stores_hold(tiny_build) -> None:
    keys = read_index(tiny_build.index).column("key").to_pylist()
    block = Block(number=0, start=0, stop=len(keys))
    features = stores.read_block(tiny_build.features, "features", block)
    regions = stores.read_block(tiny_build.regions, "regions", block)
    samples = [sample for tar in sorted(tiny_build.shards.glob("*.tar")) for sample in read_shard(tar)]
    assert [sample.key for sample in samples] == keys
    for row, sample in enumerate(samples):
        np.testing.assert_array_equal(sample.features, features[row])
        np.testing.assert_array_equal(sample.regions, regions[row])
        assert CLASSES[sample.label] == sample.metadata["class_name"] == sample.key.split("/")[0]
        assert sample.image[:2] == b"\xff\xd8"
        parts = int(sample.regions[1].max()) + 1
        assert len(sample.metadata["part_prototypes"]) == parts
        assert max(sample.metadata["part_prototypes"]) < 5


def test_statistics_are_those_of_the_features(tiny_build) -> None:
    features = stores.read_block(tiny_build.features, "features", Block(number=0, start=0, stop=18)).astype(
        np.float64
    )
    with np.load(tiny_build.shards / "statistics.npz", allow_pickle=False) as stored:
        np.testing.assert_allclose(stored["mean"], features.mean(axis=0), atol=1e-12)
        np.testing.assert_allclose(stored["variance"], features.var(axis=0), atol=1e-10)
        np.testing.assert_allclose(stored["channel_variance"], features.var(axis=(0, 1, 2)), atol=1e-10)


def test_rerunning_changes_no_byte(tiny_build, tiny_photos) -> None:
    before = digests(tiny_build.root)
    summaries = steps.build(tiny_build, str(tiny_photos), PLAN, session())
    assert [summary.new_images for summary in summaries] == [0, 0, 0, 0, 0]
    assert digests(tiny_build.root) == before


def test_ray_makes_the_same_bytes(tiny_build, tiny_photos, tmp_path) -> None:
    folder = BuildFolder(tmp_path / "build")
    try:
        steps.build(folder, str(tiny_photos), PLAN, session(workers=2))
        apart = steps.Session(workers=Workers(count=2, encoding=1), reporter=Reporter(quiet=True))
        steps.extract(BuildFolder(tmp_path / "apart"), str(tiny_photos), PLAN.extract, apart)
    finally:
        shutdown()
    assert list(find_problems(folder)) == []
    assert digests(folder.shards) == digests(tiny_build.shards)
    for name in ("index.parquet", "vocabulary.npz"):
        assert (folder.root / name).read_bytes() == (tiny_build.root / name).read_bytes()
    stored = digests(tmp_path / "apart" / "features.zarr").items()
    assert stored <= digests(tiny_build.features).items() | {("zarr.json", dict(stored)["zarr.json"])}


class _Interrupted:
    """Load the real stage, and die on one unit of it."""

    def __init__(self, load, number: int) -> None:
        self.load, self.number = load, number

    def __call__(self):
        stage, number = self.load(), self.number
        run = stage.run

        class Dying:
            def run(self, unit: Block, threads: int):
                if unit.number == number:
                    raise KeyboardInterrupt
                return run(unit, threads)

        return Dying()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_interrupted_build_resumes_to_the_same_bytes(
    tiny_build, tiny_photos, tmp_path, monkeypatch, number
) -> None:
    folder = BuildFolder(tmp_path / "build")

    def dying(load, *arguments, **options):
        return map_units(_Interrupted(load, number), *arguments, **options)

    for _ in range(4):  # every stage is interrupted once, then left to finish
        with monkeypatch.context() as patched:
            patched.setattr("hierarchy_builder.build.session.map_units", dying)
            with pytest.raises(KeyboardInterrupt):
                steps.build(folder, str(tiny_photos), PLAN, session())
        stage = next(row for row in progress_of(folder) if row["state"] == "unfinished")["stage"]
        if stage == "extract":
            steps.extract(folder, str(tiny_photos), PLAN.extract, session())
        elif stage == "cluster":
            steps.cluster(folder, PLAN.hierarchy, session())
        elif stage == "link":
            steps.link(folder, session())
        else:
            steps.build(folder, str(tiny_photos), PLAN, session())
    for tar in sorted(tiny_build.shards.glob("*.tar")):
        assert (folder.shards / tar.name).read_bytes() == tar.read_bytes()


def test_another_configuration_is_refused_and_named(tiny_build, tiny_photos) -> None:
    recipe = HierarchyRecipe(cuts=(0.5, 0.2))
    with pytest.raises(
        ConfigMismatchError, match=r"config\.cuts: \[0\.65, 0\.35\] there, \[0\.5, 0\.2\] now"
    ):
        steps.cluster(tiny_build, recipe, session())
    with pytest.raises(ConfigMismatchError, match=r"samples_per_shard: 5 there, 7 now"):
        steps.shard(tiny_build, ShardConfig(samples_per_shard=7, images=True), session())


def test_precision_is_settled_when_a_build_begins(tiny_photos, tmp_path, monkeypatch) -> None:
    folder = BuildFolder(tmp_path / "build")
    for there_is_a_gpu in (True, False):  # the second run goes on without one, in the same arithmetic
        monkeypatch.setattr(inputs, "has_gpu", lambda workers, answer=there_is_a_gpu: answer)
        steps.extract(folder, str(tiny_photos), PLAN.extract, session())
        assert stage_entry(folder, "extract")["inputs"]["config"]["precision"] == "bfloat16"
    steps.extract(folder, str(tiny_photos), PLAN.extract, session(fresh=True))
    assert stage_entry(folder, "extract")["inputs"]["config"]["precision"] == "float32"


def test_changed_listing_is_refused(tiny_photos, tmp_path) -> None:
    tree = write_tree(tmp_path / "photos", per_class=2)
    folder = BuildFolder(tmp_path / "build")
    steps.extract(folder, str(tree), PLAN.extract, session())
    (tree / CLASSES[0] / "000.png").unlink()
    with pytest.raises(ConfigMismatchError, match=r"num_images: 6 there, 5 now") as caught:
        steps.extract(folder, str(tree), PLAN.extract, session())
    assert "\n  images: 1 is gone (circle/000.png)\n" in str(caught.value)
    shutil.copy(tree / CLASSES[2] / "001.png", tree / CLASSES[0] / "001.png")
    shutil.copy(tree / CLASSES[1] / "000.png", tree / CLASSES[0] / "new.png")
    with pytest.raises(ConfigMismatchError) as caught:
        steps.extract(folder, str(tree), PLAN.extract, session())
    assert (
        "\n  images: 1 is of another size or class (circle/001.png), 1 is gone (circle/000.png), "
        "1 is new (circle/new.png)\n" in str(caught.value)
    )
    steps.extract(folder, str(tree), PLAN.extract, session(fresh=True))
    assert read_index(folder.index).num_rows == 6


def test_moved_images_are_found_where_they_were_named_last(tmp_path) -> None:
    tree = write_tree(tmp_path / "photos", per_class=1)
    folder = BuildFolder(tmp_path / "build")
    steps.extract(folder, str(tree), PLAN.extract, session())
    tree.rename(tmp_path / "moved")
    summary = steps.extract(folder, str(tmp_path / "moved"), PLAN.extract, session())
    assert summary.new_images == 0
    steps.cluster(folder, PLAN.hierarchy, session())
    steps.shard(folder, ShardConfig(images=True), session())
    assert next(iter(read_shard(folder.shards / "train-000000.tar"))).image


def test_bad_images_are_skipped_counted_and_capped(tmp_path) -> None:
    tree = write_tree(tmp_path / "photos", per_class=4)
    whole = (tree / CLASSES[0] / "000.png").read_bytes()
    (tree / CLASSES[0] / "000.png").write_bytes(whole[: len(whole) // 2])
    (tree / CLASSES[1] / "000.png").write_bytes(b"")
    folder = BuildFolder(tmp_path / "build")
    with pytest.raises(TooManySkippedError, match=r"2 of 12 images.*empty.*--max-bad-fraction") as caught:
        steps.extract(folder, str(tree), PLAN.extract, session())
    assert caught.value.exit_code == 3
    lenient = ExtractConfig(encoder="dct", block_rows=8, batch_size=4, max_bad_fraction=0.5)
    summaries = steps.build(
        folder,
        str(tree),
        steps.BuildPlan(extract=lenient, hierarchy=PLAN.hierarchy, shard=PLAN.shard),
        session(),
    )
    assert summaries[0].notes == {"ok": 10, "skipped": 2}
    assert summaries[0].new_images == 0
    assert sum(1 for tar in folder.shards.glob("*.tar") for _ in read_shard(tar)) == 10
    assert list(find_problems(folder)) == []


def test_stage_before_must_be_finished(tmp_path, tiny_photos) -> None:
    folder = BuildFolder(tmp_path / "build")
    steps.extract(folder, str(tiny_photos), PLAN.extract, session())
    folder.ledger("extract").joinpath("000001.json").unlink()
    with pytest.raises(BuilderError, match=r"extract has done 2 of 3 units: run `hierarchy-builder extract"):
        steps.cluster(folder, PLAN.hierarchy, session())


@pytest.mark.parametrize("cuts", [(), (0.5,), (0.8, 0.6, 0.4, 0.2)])
def test_any_number_of_levels(tmp_path, tiny_photos, cuts) -> None:
    folder = BuildFolder(tmp_path / "build")
    plan = steps.BuildPlan(
        extract=PLAN.extract, hierarchy=HierarchyRecipe(cuts=cuts), shard=ShardConfig(canvases=True)
    )
    steps.build(folder, str(tiny_photos), plan, session())
    index = json.loads((folder.shards / "index.json").read_text())
    assert index["num_levels"] == len(cuts) + 2
    sample = next(iter(read_shard(folder.shards / "train-000000.tar")))
    assert sample.regions.shape == (len(cuts) + 1, 16, 16)
    np.testing.assert_array_equal(
        sample.canvases, level_canvases(sample.features[None], sample.regions[None])[0]
    )
    assert list(find_problems(folder)) == []


def test_dinov2_with_random_weights_runs_the_whole_path(tmp_path) -> None:
    tree = write_tree(tmp_path / "photos", per_class=1)
    folder = BuildFolder(tmp_path / "build")
    extract = ExtractConfig(encoder="dinov2-reg-small", weights="random:0", batch_size=3)
    plan = steps.BuildPlan(extract=extract, hierarchy=PLAN.hierarchy, shard=ShardConfig())
    steps.build(folder, str(tree), plan, session())
    assert list(find_problems(folder)) == []
    samples = list(read_shard(folder.shards / "train-000000.tar"))
    assert [sample.features.shape for sample in samples] == [(16, 16, 384)] * 3
    tokens = samples[0].features.astype(np.float64)
    np.testing.assert_allclose(tokens.mean(axis=-1), 0, atol=1e-3)  # the final norm has no affine
    np.testing.assert_allclose(tokens.std(axis=-1), 1, atol=1e-2)


def test_shard_bytes_decides_the_count(tiny_build, tiny_photos, tmp_path) -> None:
    folder = BuildFolder(tmp_path / "build")
    plan = steps.BuildPlan(
        extract=PLAN.extract, hierarchy=PLAN.hierarchy, shard=ShardConfig(shard_bytes=150_000)
    )
    steps.build(folder, str(tiny_photos), plan, session())
    sizes = [tar.stat().st_size for tar in sorted(folder.shards.glob("*.tar"))]
    assert len(sizes) > 2
    assert max(sizes) <= 150_000 + 10_240


def test_report_shows_photos_and_decoded_levels(tiny_build, tmp_path) -> None:
    page = write_report(tiny_build, tmp_path / "report.html", limit=6).read_text()
    assert page.count("data:image") >= 6 * 3
    for class_name in CLASSES:
        assert class_name in page


def test_a_block_without_a_usable_image_is_passed_over(tiny_photos, tmp_path) -> None:
    import shutil

    source = shutil.copytree(tiny_photos, tmp_path / "photos")
    for path in sorted((source / CLASSES[0]).iterdir()):
        path.write_bytes(b"no picture")
    folder = BuildFolder(tmp_path / "build")
    extract = ExtractConfig(encoder="dct", block_rows=6, order="listed", max_bad_fraction=0.5)
    plan = steps.BuildPlan(extract=extract, hierarchy=PLAN.hierarchy, shard=ShardConfig())
    summaries = steps.build(folder, str(source), plan, session())
    assert [summary.images for summary in summaries] == [18, 12, 12]
    assert list(find_problems(folder)) == []


def test_a_vocabulary_that_cannot_be_fitted_spoils_nothing(tiny_build, tiny_photos, tmp_path) -> None:
    import shutil

    folder = BuildFolder(tmp_path / "build")
    shutil.copytree(tiny_build.root, folder.root)
    steps.extract(folder, str(tiny_photos), PLAN.extract, session(fresh=True))
    steps.cluster(folder, PLAN.hierarchy, session())
    shards = steps.shard(folder, PLAN.shard, session())
    with pytest.raises(BuilderError, match="lower sizes"):
        steps.vocabulary(folder, VocabularyConfig(sizes=(60_000,)), session())
    steps.vocabulary(folder, PLAN.vocabulary, session())
    steps.link(folder, session())
    assert len(list(folder.shards.glob("*.tar"))) == shards.notes["shards"]
    with pytest.raises(
        ConfigMismatchError, match=r"make it again as it was: hierarchy-builder shard .* --fresh --yes"
    ):
        steps.shard(folder, PLAN.shard, session())


def test_a_photograph_that_went_missing_is_named(tiny_photos, tmp_path) -> None:
    import shutil

    source = shutil.copytree(tiny_photos, tmp_path / "photos")
    folder = BuildFolder(tmp_path / "build")
    steps.extract(folder, str(source), PLAN.extract, session())
    steps.cluster(folder, PLAN.hierarchy, session())
    (source / CLASSES[0] / "000.png").unlink()
    with pytest.raises(BuilderError, match=r"circle/000\.png of .*missing.* or shard with --no-images"):
        steps.shard(folder, PLAN.shard, session())
    assert not list(folder.shards.glob("*.tmp-*"))


def test_no_workers_means_this_process_whatever_the_address(tiny_photos, tmp_path) -> None:
    workers = Workers(count=0, address="127.0.0.1:1")
    here = steps.Session(workers=workers, reporter=Reporter(quiet=True))
    assert steps.extract(BuildFolder(tmp_path), str(tiny_photos), PLAN.extract, here).new_images == 18


def test_a_small_set_is_built_in_this_process_if_nobody_asks_for_workers(
    tiny_build, tiny_photos, tmp_path, monkeypatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(workers, "_start_ray", refuse)
    here, folder = steps.Session(reporter=Reporter(quiet=True)), BuildFolder(tmp_path)
    steps.build(folder, str(tiny_photos), PLAN, here)
    assert digests(folder.shards, "*.tar") == digests(tiny_build.shards, "*.tar")


@pytest.mark.parametrize(
    ("asked", "few", "many"),
    [({}, True, False), ({"count": 2}, False, False), ({"address": "head:1"}, False, False)],
)
def test_only_few_images_begin_here_and_what_is_asked_for_wins(asked, few, many, monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert Workers(**asked).begins_here(2048) is few
    assert Workers(**asked).begins_here(2049) is many


@pytest.mark.parametrize(("seconds", "threads", "moved"), [(1.0, 1, 9), (7.0, 1, 2), (7.0, 2, 9)])
def test_slow_units_move_to_workers_and_keep_their_order(seconds, threads, moved, monkeypatch) -> None:
    monkeypatch.setattr(workers, "num_cpus", lambda: 2)
    now, used, there = iter(range(100)), iter(range(100)), []

    def start() -> workers._Here:
        there.append("started")
        return workers._Here("there")

    clocks = {
        "perf_counter": lambda: next(now) * seconds,
        "process_time": lambda: next(used) * seconds * threads,
    }
    monkeypatch.setattr(workers, "time", SimpleNamespace(**clocks))
    pool = workers._Here("here", start)
    units = [Block(number=n, start=n, stop=n + 1) for n in range(9)]
    found = list(pool.map(lambda loaded, unit, threads: (loaded, unit.number), units))
    assert [number for _, number in found] == list(range(9))
    assert [where for where, _ in found].count("here") == moved
    assert there == ["started"] * (moved < 9)


@pytest.mark.parametrize(
    ("asked", "uses_gpu", "available", "cpus", "reserved", "fitting"),
    [
        (Workers(), True, 2, 8, 0.5, 4),
        (Workers(), True, 1, 16, 0.1666, 6),
        (Workers(), True, 8, 192, 0.1666, 48),
        (Workers(count=3, address="auto"), True, 1, 16, 0.3333, 3),
        (Workers(), True, 0, 8, 0.0, 0),
        (Workers(gpus_per_worker=0.4), True, 8, 64, 0.4, 16),
        (Workers(gpus_per_worker=2), True, 8, 64, 2, 4),
        (Workers(gpus_per_worker=0.5), False, 1, 8, 0.0, 0),
        (Workers(), False, 2, 8, 0.0, 0),
    ],
)
def test_workers_share_gpus_where_the_stage_uses_them(
    asked, uses_gpu, available, cpus, reserved, fitting
) -> None:
    found = _gpus_per_worker(asked, uses_gpu, available, cpus)
    assert found == reserved
    assert not found or _that_fit(available, found) == fitting


def test_workers_on_a_gpu_have_more_threads_than_cores() -> None:
    assert threads_per_worker(16, 6, uses_gpu=True) == 4
    assert threads_per_worker(16, 6, uses_gpu=False) == 2
    assert threads_per_worker(2, 8, uses_gpu=True) == 1


def test_only_a_failed_device_ends_a_worker() -> None:
    def caused_by(cause: Exception) -> BuilderError:
        error = BuilderError("encoder 'x' failed on a batch of 4 images: CUDA error: …")
        error.__cause__ = cause
        return error

    assert is_broken_device(caused_by(RuntimeError("CUDA error: an illegal memory access was encountered")))
    assert not is_broken_device(caused_by(torch.OutOfMemoryError("CUDA error: out of memory")))
    assert not is_broken_device(caused_by(ValueError("no CUDA error")))


class TokenEncoder:
    """Mean colour of the cells of any grid."""

    name, image_size_px, width, weights_hash = "cells", 30, 3, "none"

    def __init__(self, grid: tuple[int, int]) -> None:
        self.grid = grid

    def encode(self, images: np.ndarray) -> np.ndarray:
        height, width = self.grid
        cells = images.reshape(len(images), height, 30 // height, width, 30 // width, 3)
        return cells.mean(axis=(2, 4)).astype(np.float32)

    def describe(self) -> dict[str, object]:
        return {
            "name": self.name,
            "image_size_px": 30,
            "grid": list(self.grid),
            "width": 3,
            "weights_hash": "none",
            "normalisation": None,
            "decoder": None,
        }


def wide() -> TokenEncoder:
    return TokenEncoder((3, 10))


def row() -> TokenEncoder:
    return TokenEncoder((1, 6))


@pytest.mark.parametrize(("maker", "grid"), [("row", (1, 6)), ("wide", (3, 10))])
@pytest.mark.parametrize("recipe", [HierarchyRecipe.paper(), HierarchyRecipe.stable()])
def test_odd_grids_go_all_the_way(tiny_photos, tmp_path, maker, grid, recipe) -> None:
    folder = BuildFolder(tmp_path / "build")
    plan = steps.BuildPlan(
        extract=ExtractConfig(encoder=f"test_build:{maker}"), hierarchy=recipe, shard=ShardConfig()
    )
    steps.build(folder, str(tiny_photos), plan, session())
    assert list(find_problems(folder)) == []
    recut(folder, (0.9, 0.6, 0.1), session())
    steps.shard(folder, ShardConfig(), session(fresh=True))
    samples = [sample for tar in sorted(folder.shards.glob("*.tar")) for sample in read_shard(tar)]
    assert {sample.regions.shape for sample in samples} == {(4, *grid)}
    write_report(folder, tmp_path / "report.html")
