"""Nothing of the user's is removed or replaced: not beside a build, not in it, not where its shards go."""

import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import fsspec
import pytest
from command_line import cli
from fsspec.implementations.memory import MemoryFileSystem
from tiny_builds import PLAN, digests, session
from typer.testing import CliRunner

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build.clustering import vocabulary
from hierarchy_builder.build.extraction import extract
from hierarchy_builder.build.publish import PUBLISHING, publish_to
from hierarchy_builder.cli.app import app
from hierarchy_builder.errors import BuilderError, TrainerError, UsageError, UserError
from hierarchy_builder.files.whole import atomic_file, read_json, whole_file, write_bytes, write_json
from hierarchy_builder.progress import Reporter
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.shard_set import remove_surplus
from hierarchy_builder.verify.checks import find_problems
from hierarchy_builder.verify.repair import repair
from trainer.training.run_folder import locked

QUIET = Reporter(quiet=True)
PLACES = (
    "", "mine", "holiday.tmp-5", "parts", "vocabulary", "shards", "shards/old", "ledger", "ledger/extract",
    "ledger/shard", "features.zarr", "features.zarr/features/c", "regions.zarr", "regions.zarr/prototypes",
)  # fmt: skip
NAMES = (
    "photo.jpg", "photo.tmp-backup.jpg", "photo.jpg.tmp-77", "mail.partial", "0.a1.partial.txt", "notes.json",
    "other-000000.tar", "backup.tar", "train-0001.tar", "tokens.npy", "a.tmp-1", "1.json", "train-000000.tar.tmp-x",
)  # fmt: skip
"""Names near to those of a build, none of which is one."""


@pytest.fixture
def folder(tiny_build: BuildFolder, tmp_path: Path) -> BuildFolder:
    shutil.copytree(tiny_build.root, tmp_path / "build", symlinks=True)
    return BuildFolder(tmp_path / "build")


def plant(root: Path, seed: int, names: Sequence[str] = NAMES) -> dict[Path, bytes]:
    """Files of a user at random places around and in a build."""
    drawn = random.Random(seed)
    files = [root / place / name for place in PLACES for name in names]
    found = {path: f"{seed} {path}".encode() for path in drawn.sample(files, 60)}
    for path, content in found.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return found


def read(files: dict[Path, bytes]) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in files}


def call(*words: object) -> BaseException | None:
    """What `hierarchy-builder` with these words raises."""
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=True).exception


@pytest.mark.parametrize("seed", [0, 1])
def test_no_verb_touches_files_of_the_user(
    folder: BuildFolder, tiny_photos: Path, tmp_path: Path, seed: int
) -> None:
    files, root = plant(folder.root, seed), folder.root
    target = tmp_path / "published"
    in_shards = {path.name for path in files if path.parent == folder.shards}
    files |= plant(target, seed + 10, [name for name in NAMES if name not in in_shards])
    build = ("build", tiny_photos, "--out", root, "--encoder", "dct", "--fresh", "--force")
    for words in (
        ("repair", root),
        ("cluster", root, "--vocabulary", "2,5", "--fresh"),
        ("cluster", root, "--recut", "0.8,0.4"),
        ("shard", root, "--samples-per-shard", "5", "--fresh"),
        ("report", root),
        ("publish", root, f"file://{target}"),
        ("extract", root, "--fresh"),
        (*build, "--vocabulary", "2,5", "--split", "val"),
        (*build, "--fused"),
        build,
        ("repair", root),
    ):
        words += () if words[0] in ("report", "publish") else ("--workers", "0")
        error = call(*words, *(["--yes"] if "--fresh" in words else []))
        assert error is None, (words, error)
        assert read(files) == files, words
    assert list(find_problems(folder)) == []


FRESH = [
    (("shard",), ["shards"]),
    (("cluster",), ["regions.zarr", "shards"]),
    (("extract",), ["features.zarr", "regions.zarr", "shards"]),
    (("build", "--encoder", "dct", "--out"), ["index.parquet", "class_map.json", "vocabulary.npz", "shards"]),
]


@pytest.mark.parametrize(("words", "places"), FRESH, ids=[words[0] for words, _ in FRESH])
def test_fresh_names_what_it_removes_and_needs_yes_for_finished_shards(
    folder: BuildFolder,
    tiny_photos: Path,
    words: tuple[str, ...],
    places: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, out = digests(folder.root), str(folder.root)
    images = [str(tiny_photos)] if words[0] == "build" else []
    line = [words[0], *images, *words[1:], out, "--fresh", "--workers", "0"]
    monkeypatch.setattr("sys.argv", ["/usr/bin/hierarchy-builder", *line])
    refused = CliRunner().invoke(app, line)
    assert isinstance(refused.exception, UsageError)
    assert str(refused.exception).endswith(
        f"18 finished samples; to remove them: hierarchy-builder {' '.join(line)} --yes"
    )
    assert f"--fresh removes from {out}: " in refused.stderr
    assert all(f"{place} (" in refused.stderr for place in places)
    assert "bytes, 18 samples)" in refused.stderr
    assert digests(folder.root) == before
    done = CliRunner().invoke(app, [*line, "--yes"])
    assert done.exit_code == 0, done.exception
    if words[0] in ("cluster", "extract"):  # no finished shards are left that would need --yes
        again = CliRunner().invoke(app, line)
        assert again.exit_code == 0, again.exception
        assert "--fresh removes from" in again.stderr


def test_leftovers_of_our_own_go(folder: BuildFolder) -> None:
    own = [
        "manifest.json.tmp-7", "ledger/extract/000000.json.tmp-7", "shards/train-000001.tar.tmp-7",
        "vocabulary/state.npz.tmp-7", "parts/000003.tar.tmp-7", "features.zarr/features/c/0/0/0/0.0a1b.partial",
        "regions.zarr/zarr.0a1b.partial",
    ]  # fmt: skip
    for name in own:
        (folder.root / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.root / name).write_bytes(b"half")
    repair(folder, session())
    assert [name for name in own if (folder.root / name).exists()] == []


def test_a_removed_folder_takes_the_leftovers_of_kills_along(folder: BuildFolder) -> None:
    write_bytes(folder.vocabulary_work / "state.npz.tmp-7", b"half")
    write_bytes(folder.part(3), b"ours")
    write_bytes(folder.parts / "photo.jpg.tmp-7", b"mine")
    folder.remove(folder.vocabulary_work)
    folder.remove(folder.parts)
    assert not folder.vocabulary_work.exists()
    assert [path.name for path in folder.parts.iterdir()] == ["photo.jpg.tmp-7"]


@pytest.mark.parametrize(
    "name",
    [
        "parts/000000.tar", "parts/wheel.stl", "vocabulary/words.txt", "shards/train-000000.tar", "ledger/2024.csv",
        "ledger/extract/000000.json", "features.zarr/zarr.json", "manifest.json", "index.parquet", "report.html",
    ],
)  # fmt: skip
@pytest.mark.parametrize("words", [(), ("--fresh",), ("--vocabulary", "2,5"), ("--fresh", "--fused")])
def test_a_folder_that_is_no_build_is_refused(
    tiny_photos: Path, tmp_path: Path, name: str, words: tuple[str, ...]
) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text('{"name": "mine"}')
    before = digests(tmp_path)
    error = call(
        "build", tiny_photos, "--out", tmp_path, "--encoder", "dct", "--workers", "0", "--quiet", *words
    )
    assert isinstance(error, UsageError)
    assert f"holds {name.split('/')[0]}, which no build" in str(error)
    assert "choose an empty or new folder" in str(error)
    assert digests(tmp_path) == before


def test_repair_refuses_a_folder_that_is_no_build(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "an app"}')
    (tmp_path / "manifest.json.tmp-5").write_text("mine")
    before = digests(tmp_path)
    assert isinstance(call("repair", tmp_path), UsageError)
    assert digests(tmp_path) == before


def test_a_build_beside_other_files_is_fine(tiny_photos: Path, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    assert call("extract", tiny_photos, "--out", tmp_path, "--encoder", "dct", "--workers", "0") is None
    assert [(tmp_path / name).read_text() for name in (".lock", "notes.txt")] == ["mine", "mine"]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_stage_does_not_take_what_it_did_not_make(tiny_photos: Path, tmp_path: Path, fresh: bool) -> None:
    folder = BuildFolder(tmp_path / "build")
    extract(folder, str(tiny_photos), PLAN.extract, session())
    write_bytes(folder.vocabulary_work / "words.txt", b"mine")
    write_bytes(folder.vocabulary_work / "tokens-000000.npy", b"mine")
    write_bytes(folder.shards / "train-000000.tar", b"mine")
    before = digests(folder.root)
    assert PLAN.vocabulary is not None
    with pytest.raises(UsageError, match=r"holds vocabulary/tokens-000000\.npy, which no build has made"):
        vocabulary(folder, PLAN.vocabulary, session(fresh=fresh))
    extract(folder, str(tiny_photos), PLAN.extract, session(fresh=True))
    assert {name: digests(folder.root)[name] for name in before if name[0] in "vs"} == {
        name: digest for name, digest in before.items() if name[0] in "vs"
    }
    (folder.vocabulary_work / "tokens-000000.npy").unlink()
    vocabulary(folder, PLAN.vocabulary, session(fresh=fresh))
    assert [path.name for path in folder.vocabulary_work.iterdir()] == ["words.txt"]


def test_a_linked_store_is_emptied_and_stays_a_link(folder: BuildFolder, tiny_photos: Path) -> None:
    elsewhere = folder.root.parent / "disk"
    shutil.move(folder.features, elsewhere)
    (elsewhere / "mine.txt").write_text("mine")
    folder.features.symlink_to(elsewhere)
    steps.build(folder, str(tiny_photos), PLAN, session(fresh=True))
    assert folder.features.is_symlink()
    assert (elsewhere / "mine.txt").read_text() == "mine"
    assert list(find_problems(folder)) == []


def test_surplus_tars_are_those_of_the_same_split(folder: BuildFolder) -> None:
    for name in ("train-000099.tar", "train-000099.json", "val-000099.tar", "archive.tar"):
        (folder.shards / name).write_bytes(b"{}")
    remove_surplus(folder, "train", 4)
    left = {path.name for path in folder.shards.iterdir()}
    assert left & {"train-000099.tar", "train-000099.json"} == set()
    assert {"val-000099.tar", "archive.tar", "train-000003.tar"} <= left


# Where shards are published


@pytest.fixture
def place(tmp_path: Path) -> str:
    yield f"memory://{tmp_path.name}/set"
    MemoryFileSystem.store.clear()


def put(url: str, files: dict[str, bytes]) -> None:
    fs, root = fsspec.core.url_to_fs(url)
    for name, content in files.items():
        fs.pipe_file(f"{root}/{name}", content)


def found(url: str) -> dict[str, bytes]:
    fs, root = fsspec.core.url_to_fs(url)
    return {name.rsplit("/", 1)[-1]: fs.cat_file(name) for name in fs.ls(root, detail=False)}


@pytest.mark.parametrize(
    "names",
    [
        ("train-000000.tar",), ("train-000000.tar", "train-000000.json"), ("train-000123.tar",), ("README.md",),
        ("index.json", "train-000001.tar"), ("_SUCCESS",), (PUBLISHING,),
    ],
)  # fmt: skip
def test_a_foreign_set_is_refused(tiny_build: BuildFolder, place: str, names: tuple[str, ...]) -> None:
    put(place, dict.fromkeys(names, b'{"shardlist": [], "wids_version": 1}'))
    before = found(place)
    with pytest.raises(UsageError, match=r"which no build published.*choose an empty or new folder") as error:
        publish_to(tiny_build, place, QUIET)
    assert all(name in str(error.value) for name in names)
    assert found(place) == before


def test_a_transfer_stopped_at_any_file_goes_on(
    tiny_build: BuildFolder, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(place, {"notes.txt": b"mine", "val-000000.tar": b"mine"})
    original = MemoryFileSystem.put_file
    monkeypatch.setattr("hierarchy_builder.build.publish.TRANSFERS", 1)

    def stop(self: MemoryFileSystem, local: str, remote: str, **options: object) -> None:
        nonlocal allowed
        if not allowed:
            raise OSError("connection reset")
        allowed -= 1
        original(self, local, remote, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", stop)
    for allowed in (0, 1, 2, 0, 1, 3, 1, 1, 1, 0):  # noqa: B007 (read by stop)
        with pytest.raises(BuilderError, match="connection reset; the same command goes on"):
            publish_to(tiny_build, place, QUIET)
        assert PUBLISHING in found(place)
        assert "_SUCCESS" not in found(place)
    allowed = 99
    publish_to(tiny_build, place, QUIET)
    whole = {path.name: path.read_bytes() for path in tiny_build.shards.iterdir()}
    assert found(place) == {**whole, "notes.txt": b"mine", "val-000000.tar": b"mine"}


def test_a_transfer_of_an_earlier_release_goes_on(tiny_build: BuildFolder, place: str) -> None:
    names = ("train-000000.tar", "train-000000.json", "train-000002.tar", "train-000002.json")
    put(place, {name: (tiny_build.shards / name).read_bytes() for name in names})
    assert publish_to(tiny_build, place, QUIET).notes["sent"] > 0
    assert found(place) == {path.name: path.read_bytes() for path in tiny_build.shards.iterdir()}


# Files that are written


def odd_targets(folder: Path) -> dict[str, Path]:
    os.mkfifo(folder / "pipe")
    (folder / "device").symlink_to("/dev/null")
    (folder / "folder").mkdir()
    (folder / "to-folder").symlink_to(folder / "folder")
    return {name: folder / name for name in ("pipe", "device", "folder", "to-folder")}


@pytest.mark.parametrize("name", ["pipe", "device", "folder", "to-folder"])
def test_what_is_no_file_is_not_replaced(tiny_build: BuildFolder, tmp_path: Path, name: str) -> None:
    target = odd_targets(tmp_path)[name]
    before = os.lstat(target)  # times of access change when a link is followed
    for error in (
        call("report", tiny_build.root, "--out", target),
        call("report", tiny_build.root, "--vocabulary", "--out", target),
        call("compare", tiny_build.root, tiny_build.root, "--out", target),
    ):
        assert isinstance(error, BuilderError | SystemExit), error  # typer refuses a folder itself
        assert getattr(error, "exit_code", getattr(error, "code", None)) in (1, 2)
        assert not isinstance(error, BuilderError) or "expected the name of a file to write" in str(error)
    with pytest.raises(BuilderError, match="expected the name of a file to write"), atomic_file(target):
        pass
    with pytest.raises(TrainerError, match="expected the name of a file to write"), whole_file(target):
        pass
    after = os.lstat(target)
    assert (after.st_mode, after.st_ino) == (before.st_mode, before.st_ino)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device", "folder", "pipe", "to-folder"]


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    for number, (start, kind) in enumerate((("old", "there"), (None, "dangling"))):
        file, link = tmp_path / "far" / f"{kind}.json", tmp_path / f"{kind}.json"
        if start:
            file.write_text(start)
        link.symlink_to(file)
        write_json(link, {"number": number})
        assert link.is_symlink()
        assert read_json(file) == {"number": number}
        with whole_file(link) as partial:
            partial.write_text("again")
        assert link.is_symlink()
        assert file.read_text() == "again"
    assert sorted(path.name for path in (tmp_path / "far").iterdir()) == ["dangling.json", "there.json"]


def test_a_build_or_run_of_a_stranger_leads_to_no_file_outside(
    tiny_build: BuildFolder, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    shutil.copytree(tiny_build.root, tmp_path / "build")
    folder = BuildFolder(tmp_path / "build")
    for place in (folder.shards / "README.md", folder.index, folder.markers("extract")[0]):
        place.rename(tmp_path / "kept")
        place.symlink_to(mine)
        for words in (
            ("repair", folder.root),
            ("shard", folder.root),
            ("publish", folder.root, tmp_path / "set"),
        ):
            done = cli("hierarchy-builder", *words)
            assert done.code == 1, (words, done)
            assert f"{place} is a link to {mine}, which would be overwritten" in done.err
        place.unlink()
        (tmp_path / "kept").rename(place)
    run = tmp_path / "run"
    run.mkdir()
    for name in ("evaluation.json", "report.html", "metrics.jsonl"):
        (run / name).symlink_to(mine)
    for words in (("evaluate", run, "--shards", folder.root), ("report", run)):
        assert "which would be overwritten" in cli("trainer", *words).err
    with pytest.raises(UserError, match="which would be overwritten"), locked(run):
        pass
    shutil.copytree(tiny_build.shards, tmp_path / "set")
    for name in ("README.md", ".lock"):
        (tmp_path / "set" / name).unlink(missing_ok=True)
        (tmp_path / "set" / name).symlink_to(mine)
        done = cli("hierarchy-builder", "publish", tiny_build.root, tmp_path / "set")
        assert f"{name} is a link to {mine}, which would be overwritten" in done.err
    sheet = tmp_path / "other run" / "samples" / "step-00000008.png"
    sheet.parent.mkdir(parents=True)
    sheet.symlink_to(mine)
    with (
        locked(sheet.parents[1]),
        pytest.raises(UserError, match=f"{sheet} is a link to"),
        whole_file(sheet) as partial,
    ):
        partial.write_text("a sheet of samples")
    assert mine.read_text() == "mine"
