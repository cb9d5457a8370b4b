"""Every odd picture through a real build: its outcome in the index, and another try once it is mended."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from odd_pictures import PICTURE, Odd, odd_pictures, write_odd_tree
from pictures import CLASSES, draw_picture, encoded, write_tree

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build.workers import Workers
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig, VocabularyConfig
from hierarchy_builder.errors import BuilderError, ConfigMismatchError, TooManySkippedError, UsageError
from hierarchy_builder.files.whole import read_json
from hierarchy_builder.progress import Reporter
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import read_index
from hierarchy_builder.store.shards import read_shard
from hierarchy_builder.store.units import progress_of
from hierarchy_builder.verify.checks import find_problems

SESSION = steps.Session(workers=Workers(count=0), reporter=Reporter(quiet=True))
PLAN = steps.BuildPlan(
    extract=ExtractConfig(encoder="dct", block_rows=4, batch_size=3, max_bad_fraction=0.5),
    hierarchy=HierarchyRecipe.paper(),
    vocabulary=VocabularyConfig(sizes=(3,), sampled_tokens=900, iterations=3),
    shard=ShardConfig(samples_per_shard=5, images=True, covariance=True),
)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[BuildFolder, dict[str, Odd]]:
    root = tmp_path_factory.mktemp("odd")
    written = write_odd_tree(root / "photos")
    folder = BuildFolder(root / "build")
    steps.build(folder, str(root / "photos"), PLAN, SESSION)
    return folder, written


def rows_by_path(folder: BuildFolder) -> dict[str, dict[str, Any]]:
    return {row["path"]: row for row in read_index(folder.index).to_pylist()}


def test_each_odd_file_is_listed_once(odd: tuple[BuildFolder, dict[str, Odd]]) -> None:
    folder, written = odd
    rows = rows_by_path(folder)
    assert set(rows) == set(written)
    keys = [row["key"] for row in rows.values()]
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch(r"odd/[A-Za-z0-9_-]+", key) and len(key) <= 110 for key in keys)
    assert json.loads(folder.class_map.read_text()) == {"empty": 0, "loop": 1, "odd": 2}


@pytest.mark.parametrize("kind", odd_pictures())
def test_odd_file_has_the_expected_status(odd: tuple[BuildFolder, dict[str, Odd]], kind: str) -> None:
    expected = odd_pictures()[kind]
    row = rows_by_path(odd[0])[f"odd/{expected.name}"]
    assert row["status"] == ("skipped" if expected.reason else "ok")
    assert (row["reason"] or "").partition(":")[0] == expected.reason
    assert {name: row[name] for name in expected.facts} == expected.facts
    assert row["bytes"] == len(expected.data)


def test_dangling_links_are_skipped_as_missing(odd: tuple[BuildFolder, dict[str, Odd]]) -> None:
    rows = rows_by_path(odd[0])
    for name in ("gone", "itself"):
        assert rows[f"odd/{name}.png"]["reason"].startswith(("missing", "unreadable"))


def test_shards_contain_only_images_with_status_ok(odd: tuple[BuildFolder, dict[str, Odd]]) -> None:
    folder, written = odd
    assert list(find_problems(folder)) == []
    paths = {sample.metadata["path"] for tar in folder.shards.glob("*.tar") for sample in read_shard(tar)}
    assert paths == {path for path, each in written.items() if not each.reason}


def test_skipped_images_are_counted_with_reasons(tmp_path: Path) -> None:
    write_odd_tree(tmp_path / "photos")
    strict = ExtractConfig(encoder="dct", max_bad_fraction=0.05)
    with pytest.raises(TooManySkippedError) as caught:
        steps.extract(BuildFolder(tmp_path / "build"), str(tmp_path / "photos"), strict, SESSION)
    message = str(caught.value)
    assert re.search(r"7 of \d+ images could not be used, allowed is 5\.00% \(2 truncated, ", message)
    assert "1 too_large" in message
    assert "--retry-failed, or raise --max-bad-fraction" in message
    assert caught.value.exit_code == 3


# Another try

BROKEN = (f"{CLASSES[0]}/000.png", f"{CLASSES[2]}/003.png")


def damage(photos: Path) -> Path:
    (photos / BROKEN[0]).write_bytes((photos / BROKEN[0]).read_bytes()[:500])
    (photos / BROKEN[1]).write_bytes(b"")
    return photos


def mend(photos: Path) -> None:
    for path in BROKEN:
        class_name, _, name = path.partition("/")
        draw_picture(class_name, int(name.removesuffix(".png"))).save(photos / path)


def artefacts(folder: BuildFolder) -> dict[str, Any]:
    """Bytes of everything; of markers all but the seconds they took and when the photographs were written."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.root.rglob("*") if path.is_file() and path.name != ".lock"):
        content: Any = path.read_bytes()
        if path.is_relative_to(folder.root / "ledger") and path.suffix == ".json":
            content = {name: value for name, value in read_json(path).items() if name != "seconds"}
            for outcome in content.get("outcomes", []):
                outcome.pop("modified", None)
        found[str(path.relative_to(folder.root))] = content
    return found


@pytest.fixture(scope="module")
def never_broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("fine")
    steps.build(BuildFolder(root / "build"), str(write_tree(root / "photos", per_class=5)), PLAN, SESSION)
    return artefacts(BuildFolder(root / "build"))


@pytest.fixture
def broken(tmp_path: Path, built_broken: Path) -> tuple[BuildFolder, Path]:
    for name in ("build", "photos"):
        shutil.copytree(built_broken / name, tmp_path / name)
    return BuildFolder(tmp_path / "build"), tmp_path / "photos"


@pytest.fixture(scope="module")
def built_broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("broken")
    photos = damage(write_tree(root / "photos", per_class=5))
    steps.build(BuildFolder(root / "build"), str(photos), PLAN, SESSION)
    return root


def test_retry_after_repair_equals_a_fresh_build(
    broken: tuple[BuildFolder, Path], never_broken: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, photos = broken
    mend(photos)
    encoded_images = []
    monkeypatch.setattr(
        "hierarchy_builder.encoders.encoding.encode",
        lambda encoder, images, **how: encoded_images.append(len(images)) or encoder.encode(images),
    )
    summaries = steps.build(folder, str(photos), PLAN, SESSION, retry_failed=True)
    assert sum(encoded_images) == 2, "only what had failed is encoded"
    assert [summary.images for summary in summaries] == [15] * 5
    assert list(find_problems(folder)) == []
    assert artefacts(folder) == never_broken


def test_later_stages_are_out_of_date_after_a_retry(broken: tuple[BuildFolder, Path]) -> None:
    folder, photos = broken
    mend(photos)
    summary = steps.extract(folder, str(photos), PLAN.extract, SESSION, retry_failed=True)
    assert summary.notes == {"ok": 15}
    assert not (folder.shards / "_SUCCESS").exists()
    states = {row["stage"]: row["units_done"] < row["units"] for row in progress_of(folder)}
    assert states == {"extract": False, "vocabulary": True, "cluster": True, "link": True, "shard": True}
    with pytest.raises(BuilderError, match=r"cluster has done 2 of 4 units: run `hierarchy-builder cluster"):
        steps.shard(folder, PLAN.shard, SESSION)


@pytest.mark.parametrize("end_at", ["_rename_markers", "_remove_markers"])
def test_interrupted_retry_is_resumed(
    broken: tuple[BuildFolder, Path],
    never_broken: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    end_at: str,
) -> None:
    folder, photos = broken
    mend(photos)

    def end(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"hierarchy_builder.build.changes.{end_at}", end)
        with pytest.raises(KeyboardInterrupt):
            steps.build(folder, str(photos), PLAN, SESSION, retry_failed=True)
    # If nothing was recorded yet, the plain command would refuse the new listing.
    again = end_at == "_remove_markers"
    steps.build(folder, str(photos), PLAN, SESSION, retry_failed=again)
    assert artefacts(folder) == never_broken


def test_retry_of_unrepaired_images_changes_nothing(broken: tuple[BuildFolder, Path]) -> None:
    folder, photos = broken
    before = artefacts(folder)
    summaries = steps.build(folder, str(photos), PLAN, SESSION, retry_failed=True)
    assert [summary.new_images for summary in summaries] == [0] * 5
    assert artefacts(folder) == before


def test_retry_takes_the_repaired_images_only(broken: tuple[BuildFolder, Path]) -> None:
    folder, photos = broken
    draw_picture(CLASSES[0], 0).save(photos / BROKEN[0])
    summaries = steps.build(folder, str(photos), PLAN, SESSION, retry_failed=True)
    assert summaries[0].notes == {"ok": 14, "skipped": 1}
    assert list(find_problems(folder)) == []


def test_retry_of_a_file_that_is_readable_again_keeps_the_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hierarchy_builder.images.sources import FileReader

    photos, folder = write_tree(tmp_path / "photos", per_class=3), BuildFolder(tmp_path / "build")
    read = FileReader.read

    def fail_sometimes(self: FileReader, path: str) -> bytes:
        if path.endswith("001.png"):
            raise OSError(5, "Input/output error")
        return read(self, path)

    with monkeypatch.context() as patched:
        patched.setattr(FileReader, "read", fail_sometimes)
        steps.build(folder, str(photos), PLAN, SESSION)
    assert rows_by_path(folder)["circle/001.png"]["reason"] == "unreadable: Input/output error"
    steps.build(folder, str(photos), PLAN, SESSION, retry_failed=True)
    assert list(find_problems(folder)) == []
    assert sum(1 for tar in folder.shards.glob("*.tar") for _ in read_shard(tar)) == 9
    whole = BuildFolder(tmp_path / "whole")
    steps.build(whole, str(photos), PLAN, SESSION)
    assert artefacts(folder) == artefacts(whole)


def test_retry_refuses_other_changes_of_the_input(broken: tuple[BuildFolder, Path]) -> None:
    folder, photos = broken
    mend(photos)
    (photos / "square/002.png").write_bytes(encoded(PICTURE))
    with pytest.raises(ConfigMismatchError, match=r"1 image besides the failed.*for example square/002\.png"):
        steps.extract(folder, str(photos), PLAN.extract, SESSION, retry_failed=True)
    draw_picture("square", 2).save(photos / "square/002.png")
    (photos / "square/999.png").write_bytes(encoded(PICTURE))
    with pytest.raises(ConfigMismatchError, match=r"for example square/999\.png"):
        steps.extract(folder, str(photos), PLAN.extract, SESSION, retry_failed=True)
    os.unlink(photos / "square/999.png")
    other = ExtractConfig(encoder="dct", block_rows=5, max_bad_fraction=0.5)
    with pytest.raises(ConfigMismatchError, match=r"block_rows: 4 there, 5 now"):
        steps.extract(folder, str(photos), other, SESSION, retry_failed=True)
    fresh = steps.Session(workers=SESSION.workers, reporter=SESSION.reporter, fresh=True)
    with pytest.raises(UsageError, match="--retry-failed goes on with what --fresh removes"):
        steps.extract(folder, str(photos), PLAN.extract, fresh, retry_failed=True)
    with pytest.raises(BuilderError, match=r"has no extract stage yet"):
        steps.extract(BuildFolder(folder.root / "new"), str(photos), PLAN.extract, SESSION, retry_failed=True)


def test_retry_keeps_the_stored_features(broken: tuple[BuildFolder, Path]) -> None:
    folder, photos = broken
    before = stores.read_rows(stores.open_store(folder.features), "features", slice(None))
    usable = stores.read_rows(stores.open_store(folder.features), "status", slice(None)) == 1
    mend(photos)
    steps.extract(folder, str(photos), PLAN.extract, SESSION, retry_failed=True)
    after = stores.read_rows(stores.open_store(folder.features), "features", slice(None))
    np.testing.assert_array_equal(after[usable], before[usable])
    assert after[~usable].any(axis=(1, 2, 3)).all()
