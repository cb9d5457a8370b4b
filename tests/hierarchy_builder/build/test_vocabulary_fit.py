"""The vocabulary of a build: the same bytes for any number of workers and after any interruption; its page."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pictures import write_tree

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build import vocabulary as vocabulary_fit
from hierarchy_builder.build.schedule import UNITS_AHEAD
from hierarchy_builder.build.vocabulary import TokenSource
from hierarchy_builder.build.workers import Workers, _RayPool, shutdown
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig, VocabularyConfig
from hierarchy_builder.errors import BuilderError, ConfigMismatchError, UsageError
from hierarchy_builder.progress import Reporter
from hierarchy_builder.quality.vocabulary_page import (
    Parts,
    choose_prototypes,
    part_picture,
    write_vocabulary_page,
)
from hierarchy_builder.records import blocks_of
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.shards import read_shard
from hierarchy_builder.verify.checks import find_problems
from hierarchy_builder.vocabulary.kmeans import fit_prototypes, nearest_prototype
from hierarchy_builder.vocabulary.prototypes import NO_REGION, load_vocabulary

CONFIG = VocabularyConfig(sizes=(3, 12), sampled_tokens=3000, iterations=5)


class Lines(Reporter):
    """Keeps what was said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def session(workers: int = 0, fresh: bool = False, reporter: Reporter | None = None) -> steps.Session:
    return steps.Session(
        workers=Workers(count=workers), reporter=reporter or Reporter(quiet=True), fresh=fresh
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = write_tree(tmp_path_factory.mktemp("photos"), per_class=6)
    (tree / "circle" / "000.png").write_bytes(b"no picture")
    return tree


@pytest.fixture(scope="module")
def extracted(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildFolder:
    folder = BuildFolder(tmp_path_factory.mktemp("extracted") / "build")
    config = ExtractConfig(encoder="dct", block_rows=4, max_bad_fraction=0.5)
    steps.extract(folder, str(photos), config, session())
    return folder


@pytest.fixture
def folder(extracted: BuildFolder, photos: Path, tmp_path: Path) -> BuildFolder:
    """A copy with features only; runs are small, so that there are several."""
    shutil.copytree(extracted.root, tmp_path / "a" / "build")
    folder = BuildFolder(tmp_path / "a" / "build")
    (tmp_path / photos.name).symlink_to(photos)
    return folder


@pytest.fixture(autouse=True)
def several_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_fit, "RUN_TOKENS", 700)


def fit(folder: BuildFolder, config: VocabularyConfig = CONFIG, **options) -> bytes:
    steps.vocabulary(folder, config, session(**options))
    return folder.vocabulary.read_bytes()


def copy_of(folder: BuildFolder, name: str) -> BuildFolder:
    return BuildFolder(Path(shutil.copytree(folder.root, folder.root.parent / name)))


def test_tokens_are_drawn_evenly_from_usable_images(folder: BuildFolder) -> None:
    source = TokenSource.load(folder, CONFIG)
    status = stores.read_rows(stores.open_store(folder.features), "status", slice(None))
    assert source.num_tokens == 3000
    assert sorted(np.unique(source.given[status == 1])) == [176, 177]
    assert source.given[status != 1].sum() == 0
    runs = source.runs()
    assert len(runs) > 2
    assert [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])]
    assert runs[-1].stop == len(status)


def test_a_fit_of_workers_is_that_of_one_process(folder: BuildFolder) -> None:
    other = copy_of(folder, "other")
    try:
        assert fit(other, workers=2) == fit(folder)
    finally:
        shutdown()
    assert not folder.vocabulary_work.exists()


def test_all_tokens_are_read_where_they_are(folder: BuildFolder) -> None:
    everything = replace(CONFIG, sampled_tokens=None)
    source = TokenSource.load(folder, everything)
    assert source.drawn.sum() == 12 * 32  # only those the iterations start from
    fit(folder, everything)
    features = stores.read_rows(stores.open_store(folder.features), "features", slice(None))
    tokens = features[features.any(axis=(1, 2, 3))].reshape(-1, features.shape[-1])
    found = load_vocabulary(folder.vocabulary)[0]
    assert found.counts[-1].sum() == len(tokens) == 17 * 256
    np.testing.assert_allclose(
        found.inertia[-1], nearest_prototype(tokens, found.centroids[-1])[1].sum(), rtol=1e-5
    )


def test_a_fit_in_parts_is_that_of_all_tokens_in_memory(folder: BuildFolder) -> None:
    fit(folder)
    found = load_vocabulary(folder.vocabulary)[0]
    source = TokenSource.load(folder, CONFIG)
    for block in source.blocks:
        source.draw(block, 1)
    tokens = np.concatenate([source.tokens(run) for run in source.runs()])
    alone = fit_prototypes(tokens, CONFIG)
    np.testing.assert_allclose(found.centroids[-1], alone.centroids, atol=1e-6)
    np.testing.assert_array_equal(found.counts[-1], alone.counts)
    np.testing.assert_allclose(found.inertia, alone.inertia, rtol=1e-6)


@pytest.mark.parametrize("call", [3, 9, 14, 28])
def test_a_fit_that_was_stopped_goes_on_to_the_same_bytes(
    folder: BuildFolder, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Stopped while drawing (5 blocks), in the first iteration (4 runs each), in the third and in the last."""
    expected = fit(copy_of(folder, "whole"))
    calls = {"total": 0, "after": 0}
    draw, sums = TokenSource.draw, TokenSource.sums

    def counted(function):
        def wrapped(*arguments):
            calls["total"] += 1
            calls["after"] += calls["total"] > call
            if calls["total"] == call:
                raise KeyboardInterrupt
            return function(*arguments)

        return wrapped

    monkeypatch.setattr(TokenSource, "draw", counted(draw))
    monkeypatch.setattr(TokenSource, "sums", counted(sums))
    with pytest.raises(KeyboardInterrupt):
        fit(folder)
    assert folder.vocabulary_work.is_dir()
    assert fit(folder) == expected
    whole = 5 + 6 * 4  # blocks drawn, iterations and the last look, in runs
    assert whole - (call - 1) <= calls["after"] < whole - (call - 1) + 4


def test_a_damaged_state_is_said_and_changes_nothing(folder: BuildFolder, monkeypatch) -> None:
    expected = fit(copy_of(folder, "whole"))
    write, states = vocabulary_fit.write_bytes, []

    def stop(path: Path, content: bytes) -> None:
        write(path, content)
        states.extend([path] * (path.name == "state.npz"))
        if len(states) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(vocabulary_fit, "write_bytes", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(folder)
    states[0].write_bytes(states[0].read_bytes()[:-30])
    reporter = Lines()
    assert fit(folder, reporter=reporter) == expected
    assert [line for line in reporter.said if "state.npz is damaged" in line]
    assert [line for line in reporter.said if "iteration 1 of at most 5, inertia" in line]


def test_a_damaged_token_file_is_named(folder: BuildFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    source = TokenSource.load(folder, CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(TokenSource, "sums", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit(folder)
    source.file(source.blocks[1]).write_bytes(b"\x93NUMPY")
    with pytest.raises(BuilderError, match=r"tokens-000001\.npz is damaged .*remove it and run the same"):
        fit(folder)
    source.file(source.blocks[1]).unlink()
    assert fit(folder)


def test_another_configuration_leaves_no_tokens_of_the_first(folder: BuildFolder, monkeypatch) -> None:
    monkeypatch.setattr(TokenSource, "sums", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(folder, replace(CONFIG, seed=7))
    monkeypatch.undo()
    assert fit(folder) == fit(copy_of(folder, "whole"), fresh=True)
    with pytest.raises(ConfigMismatchError, match=r"config\.sizes: \[3, 12\] there, \[3, 9\] now"):
        fit(folder, replace(CONFIG, sizes=(3, 9)))


def test_library_engines_fit_the_drawn_tokens(folder: BuildFolder) -> None:
    pytest.importorskip("faiss")
    fit(folder)
    ours = load_vocabulary(folder.vocabulary)[0]
    fit(folder, replace(CONFIG, backend="faiss"), fresh=True)
    theirs = load_vocabulary(folder.vocabulary)[0]
    assert theirs.counts[-1].sum() == ours.counts[-1].sum() == 3000
    assert theirs.sizes == (3, 12)
    assert abs(theirs.inertia[-1] / ours.inertia[-1] - 1) < 0.1


def test_fewer_tokens_than_prototypes(folder: BuildFolder) -> None:
    with pytest.raises(UsageError, match="sizes require 3001 prototypes, but there are only 3000 tokens"):
        fit(folder, replace(CONFIG, sizes=(3001,)))


def test_regions_made_anew_only_need_new_links(folder: BuildFolder) -> None:
    plan = steps.BuildPlan(
        extract=ExtractConfig(encoder="dct", block_rows=4, max_bad_fraction=0.5),
        hierarchy=HierarchyRecipe.paper(),
        vocabulary=CONFIG,
        shard=ShardConfig(samples_per_shard=9),
    )
    before = fit(folder)
    steps.cluster(folder, plan.hierarchy, session())
    steps.link(folder, session())
    steps.shard(folder, plan.shard, session())
    assert list(find_problems(folder)) == []
    assert (folder.shards / "vocabulary.npz").read_bytes() == before
    assert json.loads((folder.shards / "index.json").read_text())["vocabulary"] == [3, 12]

    steps.cluster(folder, HierarchyRecipe(cuts=(0.5, 0.2)), session(fresh=True))
    summary = steps.vocabulary(folder, CONFIG, session())
    assert (summary.new_images, folder.vocabulary.read_bytes()) == (0, before)
    with pytest.raises(BuilderError, match=r"no parts linked to prototypes: run .* --vocabulary 256"):
        write_vocabulary_page(folder, folder.vocabulary_page)
    assert steps.link(folder, session()).new_images == 17
    steps.shard(folder, plan.shard, session())
    assert list(find_problems(folder)) == []
    for sample in (sample for tar in sorted(folder.shards.glob("*.tar")) for sample in read_shard(tar)):
        prototypes = sample.metadata["part_prototypes"]
        assert len(prototypes) == sample.regions[1].max() + 1
        assert max(prototypes) < 12

    steps.cluster(folder, plan.hierarchy, session(fresh=True))
    steps.shard(folder, plan.shard, session())  # without links: nothing is said of prototypes
    assert not (folder.shards / "vocabulary.npz").exists()
    assert "part_prototypes" not in next(read_shard(folder.shards / "train-000000.tar")).metadata


def test_verify_compares_the_vocabulary(folder: BuildFolder) -> None:
    fit(folder)
    steps.cluster(folder, HierarchyRecipe.paper(), session())
    steps.link(folder, session())
    steps.shard(folder, ShardConfig(), session())
    with np.load(folder.vocabulary, allow_pickle=False) as stored:
        content = dict(stored)
    content["counts_0"] = content["counts_0"] + 1
    np.savez(folder.vocabulary, allow_pickle=False, **content)
    problems = "\n".join(find_problems(folder))
    assert "vocabulary.npz: token counts of prototypes differ from the sums over their children" in problems
    assert "shards/vocabulary.npz is not the vocabulary of the build" in problems
    content["description"] = np.array(
        str(content["description"]).replace('"config_hash": "', '"config_hash": "x')
    )
    np.savez(folder.vocabulary, allow_pickle=False, **content)
    assert "differs from that in the manifest" in "\n".join(find_problems(folder))


def test_parts_nearest_to_a_prototype_are_of_different_images(folder: BuildFolder) -> None:
    fit(folder)
    steps.cluster(folder, HierarchyRecipe.paper(), session())
    steps.link(folder, session())
    parts = Parts.read(folder)
    prototypes = stores.read_rows(stores.open_store(folder.regions), "prototypes", slice(None))
    assert len(parts.rows) == (prototypes != NO_REGION).sum()
    busiest = int(np.bincount(parts.prototypes).argmax())
    nearest = parts.nearest(busiest, 5)
    assert (parts.prototypes[nearest] == busiest).all()
    assert len(np.unique(parts.rows[nearest])) == len(nearest) > 1
    assert (np.diff(parts.distances[nearest]) >= 0).all()
    assert parts.distances[nearest[0]] == parts.distances[parts.prototypes == busiest].min()


def test_page_shows_groups_and_does_without_photos(folder: BuildFolder, photos: Path) -> None:
    fit(folder)
    steps.cluster(folder, HierarchyRecipe.paper(), session())
    steps.link(folder, session())
    page = write_vocabulary_page(folder, folder.vocabulary_page, limit=6, examples=4).read_text()
    assert page.count('class="strip"') == 6
    assert "Group " in page
    with_photos = page.count("data:image/webp")
    assert 6 <= with_photos <= 24
    hidden = photos.rename(photos.with_name("hidden"))
    try:
        page = write_vocabulary_page(folder, folder.vocabulary_page, limit=6, examples=4).read_text()
    finally:
        hidden.rename(photos)
    assert page.count("data:image/webp") == with_photos


def test_shown_prototypes_are_the_most_used_of_each_group(folder: BuildFolder) -> None:
    fit(folder)
    vocabulary = load_vocabulary(folder.vocabulary)[0]
    uses = np.arange(12)
    groups = choose_prototypes(vocabulary, uses, limit=9)
    assert sum(map(len, groups.values())) == 9
    for group, members in groups.items():
        assert {int(vocabulary.climb(np.array([k]), 0)[0]) for k in members} == {group}
        assert members == sorted(members, reverse=True)
        assert 0 not in members  # used by no part
    single = replace(vocabulary, centroids=vocabulary.centroids[1:], counts=vocabulary.counts[1:], parents=())
    assert choose_prototypes(single, uses, limit=3) == {0: [11, 10, 9]}


def test_picture_outlines_the_region_and_dims_the_rest() -> None:
    mask = np.zeros((16, 16), dtype=bool)
    mask[2:6, 10:14] = True
    photo = np.zeros((64, 64, 3), np.uint8)
    photo[..., 0] = 200
    picture = part_picture(photo, mask)
    assert picture.shape == (144, 144, 3)
    colours = {tuple(colour) for colour in picture.reshape(-1, 3).tolist()}
    assert colours == {(200, 0, 0), (255, 255, 255), (50, 50, 50)}
    inside = np.argwhere((picture != (50, 50, 50)).any(axis=-1))
    centre = inside.mean(axis=0)
    np.testing.assert_allclose(centre, 71.5, atol=1)  # the cut is centred on the region
    whole = part_picture(photo, np.ones((16, 16), dtype=bool))
    assert {tuple(colour) for colour in whole.reshape(-1, 3).tolist()} == {(200, 0, 0)}


def test_results_come_in_order_and_never_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls end last first, the first one only when nothing else can run."""

    def start() -> SimpleNamespace:
        """A worker whose loading is a reference of its own, and whose call is the number of its unit."""
        return SimpleNamespace(
            load=SimpleNamespace(remote=lambda load: object()),
            call=SimpleNamespace(
                remote=lambda function, unit: outstanding.append(unit.number) or unit.number
            ),
        )

    def end(pool: _RayPool, references: list) -> list:
        running = [reference for reference in references if isinstance(reference, int)]
        if pool.loading:
            return list(pool.loading)
        most.append(max(running) - min(*running, len(yielded)))
        return [max(running)]

    outstanding: list[int] = []
    yielded: list[int] = []
    most: list[int] = []
    monkeypatch.setattr(_RayPool, "_wait", end)
    monkeypatch.setattr("hierarchy_builder.build.workers._result", lambda reference: reference)
    for result in _RayPool(lambda: None, start, 2).map(None, blocks_of(30, 1)):
        yielded.append(result)
    assert yielded == sorted(outstanding) == list(range(30))
    assert 2 < max(most) < UNITS_AHEAD * 2
