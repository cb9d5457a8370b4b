"""Shards on other file systems: the same bytes, markers last, and again only what is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from loopback_hub import Hub, hub_environment, running_hub
from pictures import write_tree
from typer.testing import CliRunner

from hierarchy_builder.build.pipeline import BuildPlan, build
from hierarchy_builder.build.publish import publish_to
from hierarchy_builder.build.session import Session
from hierarchy_builder.build.workers import Workers
from hierarchy_builder.cli.app import app
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig
from hierarchy_builder.errors import BuilderError, UsageError, VerificationError
from hierarchy_builder.files.exclusion import BusyError
from hierarchy_builder.images.sources import open_source
from hierarchy_builder.progress import Reporter
from hierarchy_builder.store.folder import BuildFolder

QUIET = Reporter(quiet=True)


def make(root: Path, photos: str | Path, samples_per_shard: int = 4) -> BuildFolder:
    folder = BuildFolder(root)
    plan = BuildPlan(
        extract=ExtractConfig(encoder="dct"),
        hierarchy=HierarchyRecipe(),
        shard=ShardConfig(samples_per_shard=samples_per_shard),
    )
    build(folder, str(photos), plan, Session(workers=Workers(count=0), reporter=QUIET), fused=True)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_tree(tmp_path_factory.mktemp("photos") / "tree", per_class=4)


@pytest.fixture(scope="module")
def folder(photos, tmp_path_factory) -> BuildFolder:
    return make(tmp_path_factory.mktemp("build") / "out", photos)


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    """An empty folder of two file systems: one without folders or rename, and the local one."""
    yield f"memory://{tmp_path.name}/set" if request.param == "memory" else f"file://{tmp_path}/set"
    MemoryFileSystem.store.clear()


def found_at(url: str) -> dict[str, bytes]:
    fs, root = fsspec.core.url_to_fs(url)
    return {name.rsplit("/", 1)[-1]: fs.cat_file(name) for name in fs.ls(root, detail=False)}


def content(folder: BuildFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.shards.iterdir()}


def test_all_is_sent_once(folder, url) -> None:
    first = publish_to(folder, url, QUIET)
    assert found_at(url) == content(folder)
    assert first.notes == {"url": url, "files": len(content(folder)), "sent": len(content(folder))}
    assert (first.images, first.new_images) == (12, 12)
    assert first.num_bytes == sum(map(len, content(folder).values()))
    second = publish_to(folder, url, QUIET)
    assert (second.new_images, second.notes["sent"]) == (0, 0)


def test_markers_come_after_what_they_vouch_for(folder, url, monkeypatch) -> None:
    sent = []
    fs = fsspec.core.url_to_fs(url)[0]
    original = type(fs).put_file

    def note(self, local, remote, **options):
        sent.append(Path(local).name)
        return original(self, local, remote, **options)

    monkeypatch.setattr(type(fs), "put_file", note)
    publish_to(folder, url, QUIET)
    for name in (name for name in sent if name.endswith(".tar")):
        assert sent.index(name) < sent.index(name.replace(".tar", ".json")) < sent.index("index.json")
    assert sent[-1] == "_SUCCESS"


def test_a_stopped_transfer_goes_on_with_what_is_missing(folder, url, monkeypatch) -> None:
    fs = fsspec.core.url_to_fs(url)[0]
    original, tars = type(fs).put_file, []

    def fail_at_third(self, local, remote, **options):
        if local.endswith(".tar"):
            tars.append(local)
        if len(tars) == 3:
            raise OSError("connection reset")
        return original(self, local, remote, **options)

    monkeypatch.setattr("hierarchy_builder.build.publish.TRANSFERS", 1)
    monkeypatch.setattr(type(fs), "put_file", fail_at_third)
    with pytest.raises(BuilderError, match="connection reset; the same command goes on"):
        publish_to(folder, url, QUIET)
    assert "_SUCCESS" not in found_at(url)
    monkeypatch.setattr(type(fs), "put_file", original)
    again = publish_to(folder, url, QUIET)
    assert found_at(url) == content(folder)
    assert again.notes["sent"] == again.notes["files"] - 4  # two tars with their sidecars had arrived


@pytest.mark.parametrize("name", ["class_map.json", "statistics.npz", "train-000001.json"])
@pytest.mark.parametrize("how", ["missing", "changed"])
def test_a_set_that_is_not_whole_is_not_published(folder, tmp_path, name, how) -> None:
    shutil.copytree(folder.root, tmp_path / "build")
    damaged, place = BuildFolder(tmp_path / "build"), tmp_path / "set"
    path = damaged.shards / name
    changed = path.read_bytes().replace(b"1", b"2")
    path.unlink()
    if how == "changed":
        path.write_bytes(changed)
    with pytest.raises(VerificationError, match=f"{name} .*run `hierarchy-builder repair {damaged.root}`"):
        publish_to(damaged, str(place), QUIET)
    assert not place.exists()
    shutil.rmtree(damaged.root)


def test_another_set_takes_the_place_of_a_longer_one(folder, photos, url, tmp_path) -> None:
    publish_to(folder, url, QUIET)
    fs, root = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{root}/notes.txt", b"mine")
    other = make(tmp_path / "other", photos, samples_per_shard=6)
    publish_to(other, url, QUIET)
    assert found_at(url) == {**content(other), "notes.txt": b"mine"}


def test_two_builds_do_not_mix_at_one_place(folder, photos, tmp_path, monkeypatch) -> None:
    other = make(tmp_path / "other", photos, samples_per_shard=6)
    place, refused = tmp_path / "set", []
    original = LocalFileSystem.put_file

    def with_another(self, local, remote, **options):
        if not refused:
            with pytest.raises(
                BusyError, match="by another process: wait until it has ended, or publish to"
            ) as error:
                publish_to(other, str(place), QUIET)
            refused.append(error)
        return original(self, local, remote, **options)

    monkeypatch.setattr("hierarchy_builder.build.publish.TRANSFERS", 1)
    monkeypatch.setattr(LocalFileSystem, "put_file", with_another)
    publish_to(folder, str(place), QUIET)
    assert len(refused) == 1
    assert found_at(str(place)) == content(folder)
    publish_to(other, str(place), QUIET)
    assert found_at(str(place)) == content(other)


def test_a_store_without_locks_keeps_to_the_transfer_that_began(
    folder, photos, tmp_path, monkeypatch
) -> None:
    other = make(tmp_path / "other", photos, samples_per_shard=6)
    monkeypatch.setattr("hierarchy_builder.build.publish.may_hold_builds", lambda place: False)
    url, original, refused = f"memory://{tmp_path.name}/set", MemoryFileSystem.put_file, []

    def with_another(self, local, remote, **options):
        if not refused:
            with pytest.raises(BuilderError, match="holds _PUBLISHING of another set") as error:
                publish_to(other, url, QUIET)
            refused.append(error)
        return original(self, local, remote, **options)

    monkeypatch.setattr("hierarchy_builder.build.publish.TRANSFERS", 1)
    monkeypatch.setattr(MemoryFileSystem, "put_file", with_another)
    publish_to(folder, url, QUIET)
    assert len(refused) == 1
    assert found_at(url) == content(folder)
    MemoryFileSystem.store.clear()


def test_an_object_cut_short_is_noticed(folder, url, monkeypatch) -> None:
    fs = fsspec.core.url_to_fs(url)[0]
    monkeypatch.setattr(
        type(fs), "put_file", lambda self, local, remote, **options: self.pipe_file(remote, b"x")
    )
    with pytest.raises(BuilderError, match=r"has 1 bytes after it was sent, expected"):
        publish_to(folder, url, QUIET)


def test_what_cannot_be_published_is_said(folder, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"Protocol not known: nowhere"):
        publish_to(folder, "nowhere://x", QUIET)
    (tmp_path / "shards").mkdir()
    with pytest.raises(BuilderError, match="finish the shards"):
        publish_to(BuildFolder(tmp_path), "memory://x", QUIET)


def test_images_come_from_an_object_store_and_shards_go_to_one(photos, folder, tmp_path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(photos), "/photos", recursive=True)
    try:
        assert len(open_source("memory://photos").records) == 12
        arguments = [
            "build",
            "memory://photos",
            "--out",
            str(tmp_path / "out"),
            "--encoder",
            "dct",
            "--fused",
        ]
        arguments += ["--workers", "0", "--samples-per-shard", "4", "--publish", "memory://set", "--quiet"]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        tars = {name: data for name, data in found_at("memory://set").items() if name.endswith(".tar")}
        assert tars == {name: data for name, data in content(folder).items() if name.endswith(".tar")}
    finally:
        MemoryFileSystem.store.clear()


TO_THE_HUB = """
from pathlib import Path
import sys
from hierarchy_builder.build.publish import publish_to
from hierarchy_builder.errors import BuilderError
from hierarchy_builder.progress import Reporter
from hierarchy_builder.store.folder import BuildFolder
from trainer.data.reader import ShardReader
from trainer.data.shards import open_index
folder, url = BuildFolder(Path(sys.argv[1])), "hf://datasets/someone/set/photos"
print(*[publish_to(folder, url, Reporter(quiet=True)).notes["sent"] for _ in range(2)])
reader = ShardReader(open_index(url))
print(len({reader.read(number).key for number in range(len(reader))}))
try:
    publish_to(folder, "hf://datasets/someone/none", Reporter(quiet=True))
except BuilderError as error:
    print(error)

from huggingface_hub import HfApi
upload, url, other = HfApi.upload_file, "hf://datasets/someone/set/twice", BuildFolder(Path(sys.argv[2]))
def after_another(self, **options):
    HfApi.upload_file = upload
    publish_to(other, url, Reporter(quiet=True))
    return upload(self, **options)
HfApi.upload_file = after_another
try:
    publish_to(folder, url, Reporter(quiet=True))
except BuilderError as error:
    print(error)
"""


def test_shards_go_to_the_hub_and_are_read_from_it(folder, photos, tmp_path) -> None:
    """Of two sets that are sent to one place at once, one is there in the end."""
    other = make(tmp_path / "other", photos, samples_per_shard=6)
    with running_hub("datasets/someone/set") as address:
        done = subprocess.run(
            [sys.executable, "-c", TO_THE_HUB, folder.root, other.root],
            capture_output=True,
            text=True,
            env={**os.environ, **hub_environment(address, tmp_path)},
        )
    assert done.returncode == 0, done.stderr[-2000:]
    sent, read, refused, later = done.stdout.splitlines()
    assert sent == f"{len(content(folder))} 0"
    assert read == "12"
    assert "hf repos create someone/none --type dataset" in refused
    assert "was changed in this moment" in later
    places = {"photos": folder, "twice": other}
    assert Hub.repositories["datasets/someone/set"] == {
        f"{place}/{name}": data for place, build in places.items() for name, data in content(build).items()
    }
