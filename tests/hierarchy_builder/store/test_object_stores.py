"""Builds at URLs: equal to those on a disk, whole or absent, one writer, and errors that can be read."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import cli
from object_store import Store, served
from pictures import write_tree
from tiny_builds import session

from hierarchy_builder import remote
from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig
from hierarchy_builder.files import atomic_file
from hierarchy_builder.places import a_folder
from hierarchy_builder.store.folder import BuildFolder

PLAN = steps.BuildPlan(
    extract=ExtractConfig(encoder="dct", block_rows=8, batch_size=4),
    hierarchy=HierarchyRecipe.paper(),
    shard=ShardConfig(samples_per_shard=5),
)
WORDS = ("--encoder", "dct", "--block-rows", 8, "--batch-size", 4, "--samples-per-shard", 5, "--workers", 0)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with served() as found:
        yield found


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("photos"), per_class=3)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> BuildFolder:
    folder = BuildFolder(tmp_path_factory.mktemp("builds") / "local")
    steps.build(folder, str(photos), PLAN, session())
    return folder


@pytest.fixture(scope="module")
def at_url(store: Store, photos: Path) -> str:
    """The same build at a URL, made by the command; tests leave it as it is."""
    url = f"{store.bucket('built')}/deep/build"
    built = cli("hierarchy-builder", "build", photos, "--out", url, *WORDS)
    assert built.code == 0, built.err
    assert f"next: trainer train {url} --out" in built.err
    return url


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a build but those that hold times or paths."""
    if remote.is_remote(root):
        files = list(remote.files_below(root))
    else:
        files = [path for path in root.rglob("*") if path.is_file()]
    names = {path.relative_to(root).as_posix(): path for path in files}
    kept = ("features.zarr/", "regions.zarr/", "shards/", "index.parquet", "class_map.json")
    return {name: path.read_bytes() for name, path in names.items() if name.startswith(kept)}


def test_a_build_at_a_url_has_the_bytes_of_one_on_a_disk(at_url: str, on_disk: BuildFolder) -> None:
    made, expected = contents(a_folder(at_url)), contents(on_disk.root)
    assert made.keys() == expected.keys()
    assert [name for name in made if made[name] != expected[name]] == []


def test_what_is_done_at_a_url_is_not_done_again(at_url: str, store: Store, photos: Path) -> None:
    store.door.requests.clear()
    again = cli("hierarchy-builder", "build", photos, "--out", at_url, *WORDS, "--json")
    assert again.code == 0, again.err
    assert [row["new_images"] for row in again.json] == [0, 0, 0]
    sent = {path.rpartition("build/")[2] for method, path in store.door.requests if method == "PUT"}
    assert not [name for name in sent if ".zarr/" in name or name.endswith(".tar")]


def test_looking_at_a_build_at_a_url(at_url: str, on_disk: BuildFolder) -> None:
    status = cli("hierarchy-builder", "status", at_url, "--json")
    assert [(row["stage"], row["state"], row["units_done"]) for row in status.json] == [
        ("extract", "done", 2),
        ("cluster", "done", 2),
        ("shard", "done", 2),
    ]
    assert cli("hierarchy-builder", "verify", at_url).code == 0


@pytest.mark.drill
def test_pages_of_a_build_at_a_url(at_url: str, on_disk: BuildFolder) -> None:
    compared = cli("hierarchy-builder", "compare", on_disk.root, at_url, "--json")
    assert compared.code == 0
    reported = cli("hierarchy-builder", "report", at_url, "--samples", 2)
    assert reported.code == 0, reported.err
    assert (a_folder(at_url) / "report.html").read_bytes().startswith(b"<!doctype html>")


@pytest.mark.drill
def test_damage_at_a_url_is_found_and_repaired(store: Store, at_url: str) -> None:
    whole = contents(a_folder(at_url))
    copied = a_folder(f"{store.bucket('damaged')}/build")
    for path in remote.files_below(a_folder(at_url)):
        remote.put(copied / path.relative_to(a_folder(at_url)), path.read_bytes())
    names = ["features.zarr/features/c/1/0/0/0", "shards/train-000001.tar", "regions.zarr/flags/zarr.json"]
    for name in names:
        data = bytearray((copied / name).read_bytes())
        data[len(data) // 2] ^= 1
        remote.put(copied / name, bytes(data))
    remote.remove([copied / "shards" / "statistics.npz"])
    found = cli("hierarchy-builder", "verify", copied)
    assert found.code == 4
    assert "features.zarr, block 1" in found.out
    repaired = cli("hierarchy-builder", "repair", copied, "--workers", 0)
    assert repaired.code == 0, repaired.err
    assert contents(copied) == whole


def test_a_fused_build_at_a_url_has_the_same_shards(store: Store, photos: Path, on_disk: BuildFolder) -> None:
    url = f"{store.bucket('fused')}/build"
    built = cli("hierarchy-builder", "build", photos, "--out", url, *WORDS, "--fused")
    assert built.code == 0, built.err
    shards = contents(a_folder(url) / "shards")
    expected = contents(on_disk.root / "shards")
    assert {name: data for name, data in shards.items() if name.endswith(".tar")} == {
        name: data for name, data in expected.items() if name.endswith(".tar")
    }
    assert not [path for path in remote.files_below(a_folder(url) / "parts") if path.suffix == ".tar"]


# Whole or absent


def test_an_upload_that_fails_leaves_what_was_there(store: Store) -> None:
    place = a_folder(f"{store.bucket('uploads')}/file")
    remote.put(place, b"before")
    with pytest.raises(ZeroDivisionError), atomic_file(place) as file:  # noqa: PT012 (what is inside matters)
        file.write(bytes(2 * remote.PART_BYTES))
        raise ZeroDivisionError
    assert place.read_bytes() == b"before"
    with atomic_file(place) as file:
        file.write(b"after")
    assert place.read_bytes() == b"after"


def test_only_the_first_creates_an_object(store: Store) -> None:
    place = a_folder(f"{store.bucket('created')}/file")
    assert remote.create(place, b"first")
    assert not remote.create(place, b"second")
    assert place.read_bytes() == b"first"


@pytest.mark.drill
def test_a_store_that_fails_now_and_then_loses_no_sample(
    store: Store, photos: Path, on_disk: BuildFolder
) -> None:
    url, seen = f"{store.bucket('shaky')}/build", dict[str, int]()

    def fault(environ: dict[str, Any]) -> tuple[str, str] | None:
        """Every 40th request fails: once it is refused, once it is torn, once the store is overloaded."""
        seen["all"] = number = seen.get("all", 0) + 1
        kinds = [("500 Internal Server Error", "InternalError"), ("503 Slow Down", "SlowDown")]
        return kinds[number // 40 % 2] if number % 40 == 0 else None

    with store.failing(fault):
        for _ in range(8):
            built = cli("hierarchy-builder", "build", photos, "--out", url, *WORDS)
            assert built.code in (0, 75), built.err
            if built.code == 0:
                break
    assert contents(a_folder(url)) == contents(on_disk.root)
    assert seen["all"] > 200


# What a user can do wrong


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sftp://host/build", "nothing can be written at sftp://"),
        ("s3://", "names no folder"),
        ("hf://datasets/x/y", "nothing can be written at hf://"),
    ],
)
def test_a_url_that_nothing_can_be_written_to(url: str, message: str, photos: Path) -> None:
    found = cli("hierarchy-builder", "build", photos, "--out", url)
    assert (found.code, message in found.err) == (2, True), found.err


def test_a_missing_bucket_is_named_and_not_made(store: Store, photos: Path) -> None:
    found = cli("hierarchy-builder", "build", photos, "--out", "s3://nowhere/build", *WORDS)
    assert found.code == 1
    assert "s3://nowhere/build: " in found.err
    assert "there is no such bucket" in found.err
    assert not a_folder("s3://nowhere/build").exists()


@pytest.mark.parametrize(
    ("status", "code", "exit_code", "message"),
    [
        ("403 Forbidden", "AccessDenied", 1, "have no permission"),
        ("400 Bad Request", "ExpiredToken", 75, "renew them; then the same command continues"),
        ("403 Forbidden", "RequestTimeTooSkewed", 1, "the clock of this machine"),
    ],
)
def test_a_store_that_refuses(
    store: Store, photos: Path, at_url: str, status: str, code: str, exit_code: int, message: str
) -> None:
    with store.failing(lambda environ: (status, code) if environ["REQUEST_METHOD"] == "GET" else None):
        for words in (("build", photos, "--out", at_url, *WORDS), ("verify", at_url)):
            found = cli("hierarchy-builder", *words)
            assert (found.code, message in found.err) == (exit_code, True), found.err


def test_the_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, photos: Path) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    found = cli("hierarchy-builder", "build", photos, "--out", "gs://bucket/build")
    assert found.code == 2
    assert "gcsfs is not installed: " in found.err
    assert "[gcs]" in found.err
