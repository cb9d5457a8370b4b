"""Resume, or refuse: what a stage was made with decides, and the refusal shows the difference."""

from pathlib import Path

import pytest

from hierarchy_builder.errors import BuilderError, ConfigMismatchError, UsageError
from hierarchy_builder.files.whole import atomic_file, write_bytes
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.ledger import Ledger, begin_stage, open_ledger, read_manifest, stage_entry


@pytest.fixture
def folder(tmp_path) -> BuildFolder:
    return BuildFolder(tmp_path / "build")


def test_units_stay_done_for_the_same_inputs(folder) -> None:
    ledger = begin_stage(folder, "extract", {"a": 1}, {}, fresh=False)
    folder.features.mkdir()
    assert not ledger.is_done(0)
    ledger.finish(0, {"images": 3})
    again = begin_stage(folder, "extract", {"a": 1}, {}, fresh=False)
    assert again.is_done(0)
    assert again.result(0)["images"] == 3


def test_other_inputs_are_refused_with_a_list_of_differences(folder) -> None:
    ledger = begin_stage(
        folder, "extract", {"config": {"encoder": "dct", "order": "listed"}}, {}, fresh=False
    )
    folder.features.mkdir()
    ledger.finish(0, {})
    with pytest.raises(ConfigMismatchError) as caught:
        begin_stage(folder, "extract", {"config": {"encoder": "onnx:x", "order": "listed"}}, {}, fresh=False)
    assert "config.encoder: 'dct' there, 'onnx:x' now" in str(caught.value)
    assert "order" not in str(caught.value)
    assert caught.value.exit_code == 5


def test_units_are_run_again_if_their_store_is_missing(folder) -> None:
    folder.features.mkdir(parents=True)
    begin_stage(folder, "extract", {"a": 1}, {}, fresh=False).finish(0, {})
    folder.features.rmdir()
    assert not begin_stage(folder, "extract", {"a": 1}, {}, fresh=False).is_done(0)


def test_stage_without_finished_units_accepts_other_inputs(folder) -> None:
    begin_stage(folder, "extract", {"a": 1}, {}, fresh=False)
    begin_stage(folder, "extract", {"a": 2}, {}, fresh=False)
    assert stage_entry(folder, "extract")["inputs"] == {"a": 2}


def test_fresh_removes_the_stage_and_all_after_it(folder) -> None:
    for stage in ("extract", "cluster"):
        begin_stage(folder, stage, {"a": 1}, {}, fresh=False).finish(0, {})
    folder.regions.mkdir()
    begin_stage(folder, "extract", {"a": 2}, {}, fresh=True)
    assert list(read_manifest(folder)["stages"]) == ["extract"]
    assert not folder.regions.exists()
    assert not open_ledger(folder, "extract").is_done(0)
    assert not folder.ledger("cluster").exists()


def test_marker_of_another_configuration_is_ignored(folder) -> None:
    Ledger(folder.ledger("extract"), "old").finish(0, {})
    new = Ledger(folder.ledger("extract"), "new")
    assert not new.is_done(0)
    with pytest.raises(BuilderError, match="another configuration"):
        new.result(0)


def test_missing_stage_names_the_command(folder) -> None:
    with pytest.raises(BuilderError, match="run `hierarchy-builder cluster"):
        stage_entry(folder, "cluster")
    with pytest.raises(UsageError, match="is not a build"):
        folder.require()


@pytest.mark.parametrize(
    ("name", "advice"), [("x", "start one with"), ("index.json", "a finished"), ("checkpoints/x", "a run of")]
)
def test_a_folder_that_is_no_build_is_told_what_it_is(tmp_path: Path, name: str, advice: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(UsageError, match=f"is not a build: manifest.json is missing; .*{advice}"):
        BuildFolder(tmp_path).require()


def test_newer_format_is_refused(folder) -> None:
    write_bytes(folder.manifest, b'{"format_version": 99, "stages": {}}')
    with pytest.raises(BuilderError, match="format version 99, this release reads 1"):
        read_manifest(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"format_version": 1}'])
def test_damaged_json_is_named(folder, content) -> None:
    write_bytes(folder.manifest, content)
    with pytest.raises(
        BuilderError, match=r"manifest\.json (is damaged|has no stages).*: run `hierarchy-builder repair"
    ):
        read_manifest(folder)


def test_failed_write_keeps_the_old_file(tmp_path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    def fail_halfway() -> None:
        with atomic_file(path) as file:
            file.write(b"half of the n")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_second_writer_is_refused(folder) -> None:
    with (
        folder.locked(),
        pytest.raises(BuilderError, match="being written by another process"),
        folder.locked(),
    ):
        raise AssertionError("both writers were let in")
    with folder.locked():
        assert (folder.root / ".lock").exists()


def test_new_folder_is_removed_if_no_stage_started(folder) -> None:
    with folder.locked():
        assert folder.root.exists()
    assert not folder.root.exists()
    with folder.locked():
        folder.manifest.write_text("{}")
    assert folder.manifest.exists()


def test_folder_with_foreign_files_is_refused_and_kept(folder) -> None:
    (folder.root / "shards").mkdir(parents=True)
    (folder.root / "shards" / "mine.tar").write_bytes(b"precious")
    with pytest.raises(UsageError, match=r"holds shards, which no build"), folder.locked():
        raise AssertionError("let in")
    file = BuildFolder(folder.root / "shards" / "mine.tar")
    for place in (file, BuildFolder(file.root / "below")):
        with pytest.raises(UsageError, match="expected a folder to write to"), place.locked():
            raise AssertionError("let in")


def test_build_inside_its_images_is_refused(tmp_path) -> None:
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    for inside in ("photos", "photos/build", "photos/cat/build"):
        with pytest.raises(UsageError, match="lies inside the images"):
            BuildFolder(tmp_path / inside).check_apart(str(tmp_path / "photos"))
    for apart in ("build", "photos/.build", "photos-build"):
        BuildFolder(tmp_path / apart).check_apart(str(tmp_path / "photos"))


def test_a_glance_at_a_marker_reads_what_the_whole_one_holds(tmp_path: Path) -> None:
    ledger, outcome = Ledger(tmp_path, "ab" * 32), {"images": 9, "seconds": 9.5, "status": "ok", "unit": 9}
    facts = {"images": 700, "seconds": 1.25}
    for unit, (rows, samples) in enumerate(
        ((0, 0), (300, 0), (700, 700), (700, 9_000))
    ):  # the last is read whole
        sizes = {"sizes": [123_456] * samples} if samples else {}
        ledger.finish(unit, {**facts, "outcomes": [outcome] * rows, **sizes})
        assert ledger.glance(unit) == facts
        assert Ledger(tmp_path, "cd" * 32).glance(unit) is None
    assert ledger.glance(7) is None
    ledger.marker(8).write_bytes(ledger.marker(0).read_bytes())
    assert ledger.glance(8) is None  # the marker of another unit
