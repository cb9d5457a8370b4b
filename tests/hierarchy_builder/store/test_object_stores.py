"""Builds at URLs: equal to those on a disk, whole or absent, one writer, and errors that can be read."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from command_line import cli
from object_store import Store, contents, sent, served
from pictures import write_tree
from tiny_builds import session

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build import workers
from hierarchy_builder.build.publish import publish_to
from hierarchy_builder.build.workers import Workers
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig
from hierarchy_builder.errors import ImageError, UsageError, UserError
from hierarchy_builder.files import remote
from hierarchy_builder.files.paths import a_folder, filesystem_of, shown
from hierarchy_builder.files.remote import StoreError
from hierarchy_builder.files.whole import atomic_file
from hierarchy_builder.images.reading import read_file
from hierarchy_builder.progress import Reporter
from hierarchy_builder.records import Block
from hierarchy_builder.store import arrays as stores
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
    remote.create(place, b"first")
    remote.create(place, b"second")
    assert place.read_bytes() == b"first"


@pytest.mark.drill
def test_a_store_that_fails_now_and_then_loses_no_sample(
    store: Store, photos: Path, on_disk: BuildFolder
) -> None:
    url, seen = f"{store.bucket('shaky')}/build", dict[str, int]()

    def fault(environ: dict[str, Any]) -> tuple[str, str] | None:
        """Every 40th request fails, uploads in the middle: the store has an error, or is overloaded."""
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


@pytest.mark.drill
def test_a_build_goes_on_after_its_store_was_away(store: Store, photos: Path, on_disk: BuildFolder) -> None:
    url, seen = f"{store.bucket('away-for-long')}/build", list[str]()

    def fault(environ: dict[str, Any]) -> tuple[str, str] | None:
        seen.append(environ["REQUEST_METHOD"])
        return ("503 Slow Down", "SlowDown") if len(seen) > 100 else None

    with store.failing(fault):
        stopped = cli("hierarchy-builder", "build", photos, "--out", url, *WORDS)
    assert stopped.code == 75, stopped.err
    assert "the same command continues" in stopped.err
    built = cli("hierarchy-builder", "build", photos, "--out", url, *WORDS)
    assert built.code == 0, built.err
    assert contents(a_folder(url)) == contents(on_disk.root)


def test_names_are_taken_literally() -> None:
    mine, other = a_folder("memory://literal[1]/set?"), a_folder("memory://literal1/sets")
    for place in (mine, other):
        for name in ("a/000000.json", "a/b*.json", "c"):
            remote.put(place / name, b"")
    (mine / "c").unlink()
    remote.move(mine / "a", mine / "b")
    assert [path.name for path in (mine / "b").glob("[0-9]*.json")] == ["000000.json"]
    BuildFolder(mine).remove(mine)  # no file of a build
    remote.remove(list(remote.files_below(mine)))
    assert not mine.exists()
    assert len(remote.files_below(other)) == 3


def test_an_upload_to_memory_that_fails_leaves_what_was_there() -> None:
    place = a_folder("memory://uploads/file")
    remote.put(place, b"before")
    with pytest.raises(ZeroDivisionError), atomic_file(place) as file:  # noqa: PT012 (what is inside matters)
        file.write(b"after")
        raise ZeroDivisionError
    assert remote.get(place) == b"before"
    with pytest.raises(UsageError, match="--workers 0"):
        Workers(count=2).that_see(place)
    assert Workers().that_see(place).count == 0


def test_a_block_is_replaced_without_being_removed(store: Store) -> None:
    place, block = a_folder(f"{store.bucket('blocks')}/set[1].zarr"), Block(number=0, start=0, stop=8)
    layout = stores.stage_layout("extract", 8, 8, {"grid": (2, 2), "width": 3})
    stores.create(place, layout)
    ones = np.ones((8, 2, 2, 3), np.float16)
    stores.write_block(place, block, {"features": ones})
    store.door.requests.clear()
    stores.write_block(place, block, {"features": 2 * ones})
    assert {method for method, _ in store.door.requests} == {"GET", "PUT"}
    assert (stores.read_block(place, "features", block) == 2).all()
    stores.write_block(place, block, {"features": 0 * ones})
    assert (stores.read_block(place, "features", block) == 0).all()
    assert not stores.shard_file(place, "features", 0).exists()


def test_a_deletion_that_the_store_refuses_is_noticed(store: Store) -> None:
    place = a_folder(f"{store.bucket('kept')}/file")
    remote.put(place, b"")
    answer = "<DeleteResult><Error><Key>file</Key><Code>AccessDenied</Code><Message>no</Message></Error></DeleteResult>"
    with (
        store.failing(lambda environ: ("200 OK", answer)),
        pytest.raises(StoreError, match=r"file: not removed: no \(AccessDenied\): these credentials have no"),
    ):
        remote.remove([place])


def test_a_build_at_a_url_is_published(at_url: str) -> None:
    publish_to(BuildFolder(a_folder(at_url)), "memory://published/set", Reporter(quiet=True))
    sent, shards = a_folder("memory://published/set"), a_folder(at_url) / "shards"
    files = {path.name: remote.get(path) for path in remote.files_below(shards)}
    assert files
    assert {path.name: remote.get(path) for path in remote.files_below(sent)} == files


# What errors of a store mean


def _raised_in(module: str, error: Exception) -> Exception:
    """An exception as a module of that name raises it."""
    scope: dict[str, Any] = {"__name__": module}
    exec("def fail(error): raise error", scope)
    with pytest.raises(type(error)) as caught:
        scope["fail"](error)
    return caught.value


def _answer(code: str, status: int) -> Exception:
    from botocore.exceptions import ClientError

    told: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(told, "HeadObject")


@pytest.mark.parametrize(
    ("error", "exit_code", "words"),
    [
        (lambda: _answer("301", 301), 1, "in another region"),
        (lambda: _answer("400", 400), 75, "renew them, or set AWS_DEFAULT_REGION; then the same command"),
        (lambda: _answer("RequestTimeout", 400), 75, "waited too long"),
        (lambda: _answer("InvalidToken", 400), 1, "does not know these credentials"),
        (lambda: _answer("Whatever", 503), 75, "the same command continues"),
        (lambda: _answer("Whatever", 418), 1, "check URL, network and permissions"),
        (lambda: botocore().ParamValidationError(report="x"), 1, "check URL, network and permissions"),
        (lambda: botocore().ProfileNotFound(profile="x"), 1, "check URL, network and permissions"),
        (lambda: botocore().EndpointConnectionError(endpoint_url="x"), 75, "the same command continues"),
        (lambda: _raised_in("gcsfs.retry", OSError("Forbidden: b/x")), 1, "have no permission"),
    ],
)
def test_what_an_error_of_a_store_means(
    store: Store, error: Callable[[], Exception], exit_code: int, words: str
) -> None:
    told = remote.store_error(error())
    assert told is not None
    assert (told.exit_code, words in str(told)) == (exit_code, True), told
    with pytest.raises(type(told)) as caught, workers._told_to_the_driver():  # as Ray carries it
        raise error()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(told)  # noqa: S301 (what it has just written)


def botocore() -> Any:
    import botocore.exceptions

    return botocore.exceptions


def test_an_error_of_this_machine_is_none_of_a_store() -> None:
    assert remote.store_error(_raised_in("pyarrow.lib", OSError("Corrupt snappy data"))) is None
    assert remote.store_error(UserError("x is missing")) is None


# What a user can do wrong


def test_a_build_among_its_images_at_a_url_is_refused() -> None:
    for inside in ("photos", "photos/build"):
        with pytest.raises(UsageError, match="lies inside the images"):
            BuildFolder(a_folder(f"memory://{inside}")).check_apart("memory://photos/")
    BuildFolder(a_folder("memory://photos/.build")).check_apart("memory://photos")
    BuildFolder(a_folder("memory://photos2")).check_apart("memory://photos")


def test_urls_of_files_are_of_this_machine(tmp_path: Path) -> None:
    assert a_folder(f"file://{tmp_path}") == a_folder(f"file://localhost{tmp_path}") == tmp_path
    for url in ("file://host/x", "file://x"):
        with pytest.raises(UsageError, match="is no file of this machine"):
            a_folder(url)


def test_no_password_is_printed_or_written(photos: Path, tmp_path: Path) -> None:
    url = "s3://key:secret@bucket/build"
    for words in ((photos, "--out", url), (url, "--out", tmp_path / "build")):
        found = cli("hierarchy-builder", "build", *words)
        assert (found.code, "s3://bucket/build was given with a password" in found.err) == (2, True), (
            found.err
        )
        assert "secret" not in found.err
    trained = cli("trainer", "train", url, "--out", tmp_path / "run", "--preset", "tiny-cpu")
    assert (trained.code, "secret" in trained.err) == (2, False), trained.err
    endpoint = "https://key:secret@host/?X-Amz-Credential=secret&a=b"
    told = remote.store_error(botocore().EndpointConnectionError(endpoint_url=endpoint))
    assert "secret" not in str(told)
    assert '"https://host/?a=b"' in str(told)
    assert shown("https://me:secret@host/a?X-Amz-Signature=secret") == "https://host/a"
    assert shown("s3://bucket[1]/a=b?c#d") == "s3://bucket[1]/a=b?c#d"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sftp://host/build", "sftp:// is not understood here"),
        ("s3://", "names no folder"),
        ("hf://datasets/x/y", "hf:// is not understood here"),
    ],
)
def test_a_url_that_nothing_can_be_written_to(url: str, message: str, photos: Path) -> None:
    found = cli("hierarchy-builder", "build", photos, "--out", url)
    assert (found.code, message in found.err) == (2, True), found.err


def test_a_missing_bucket_is_named_and_not_made(store: Store, photos: Path) -> None:
    found = cli("hierarchy-builder", "build", photos, "--out", "s3://nowhere/build", *WORDS)
    assert found.code == 1
    assert "error: s3://nowhere/build" in found.err
    assert "there is no such bucket" in found.err
    assert not a_folder("s3://nowhere/build").exists()


@pytest.mark.parametrize(
    ("method", "status", "code", "exit_code", "message"),
    [
        ("GET", "403 Forbidden", "AccessDenied", 1, "have no permission"),
        ("GET", "400 Bad Request", "ExpiredToken", 75, "renew them; then the same command continues"),
        ("GET", "403 Forbidden", "RequestTimeTooSkewed", 1, "the clock of this machine"),
        ("HEAD", "403 Forbidden", "", 1, "have no permission for that or have expired"),
        ("HEAD", "400 Bad Request", "", 75, "as it does when credentials have expired"),
        ("GET", "301 Moved Permanently", "PermanentRedirect", 1, "in another region: set AWS_DEFAULT_REGION"),
        ("GET", "400 Bad Request", "AuthorizationHeaderMalformed", 1, "in another region"),
    ],
)
def test_a_store_that_refuses(
    store: Store, photos: Path, at_url: str, method: str, status: str, code: str, exit_code: int, message: str
) -> None:
    with store.failing(lambda environ: (status, code) if environ["REQUEST_METHOD"] == method else None):
        for words in (("build", photos, "--out", at_url, *WORDS), ("verify", at_url)):
            found = cli("hierarchy-builder", *words)
            assert (found.code, message in found.err) == (exit_code, True), found.err


@pytest.mark.parametrize(
    "name",
    [
        *("manifest.json", "ledger/extract/000000.json", "index.parquet", "features.zarr/features/c/0/0/0/0"),
        *("shards/index.json", "shards/train-000001.tar"),
    ],
)
def test_an_object_that_is_refused_is_named(store: Store, at_url: str, name: str) -> None:
    with store.failing(
        lambda environ: ("403 No", "AccessDenied") if environ["PATH_INFO"].endswith(name) else None
    ):
        found = cli("hierarchy-builder", "verify", at_url)
    assert (found.code, f"error: {at_url}/{name}: " in found.err) == (1, True), found.err


def test_a_url_is_named_once_and_without_its_secrets() -> None:
    with pytest.raises(OSError) as caught:
        fsspec.filesystem("https").open("https://me:word@127.0.0.1:1/x.tar?sig=abc").read()
    told = remote.store_error(caught.value)
    assert told is not None
    assert told.place == "https://127.0.0.1:1/x.tar?"
    assert str(told).startswith(f"{told.place} (ClientConnector)")


def test_an_object_that_may_not_be_written_is_named(store: Store, photos: Path) -> None:
    def fault(environ: dict[str, Any]) -> tuple[str, str] | None:
        is_written = environ["REQUEST_METHOD"] == "PUT" and "/shards/" in environ["PATH_INFO"]
        return ("403 Forbidden", "AccessDenied") if is_written else None

    url = f"{store.bucket('readonly')}/build"
    with store.failing(fault):
        found = cli("hierarchy-builder", "build", photos, "--out", url, *WORDS)
    assert (found.code, f"error: {url}/shards/train-00000" in found.err) == (1, True), found.err


@pytest.fixture(scope="module")
def photos_at_url(store: Store, photos: Path) -> str:
    return str(sent(photos, a_folder(f"{store.bucket('photos')}/set")))


def test_credentials_that_expire_in_the_middle_cost_no_image(
    store: Store, photos_at_url: str, tmp_path: Path, on_disk: BuildFolder
) -> None:
    read, words = list[str](), ("build", photos_at_url, "--out", tmp_path / "build", *WORDS)

    def fault(environ: dict[str, Any]) -> tuple[str, str] | None:
        read.extend([environ["PATH_INFO"]] if environ["PATH_INFO"].endswith(".png") else [])
        return ("400 Bad Request", "ExpiredToken") if len(read) > 5 else None

    with store.failing(fault):
        stopped = cli("hierarchy-builder", *words)
    assert (stopped.code, "renew them; then the same command continues" in stopped.err) == (75, True), (
        stopped.err
    )
    assert cli("hierarchy-builder", *words).code == 0
    assert contents(tmp_path / "build") == contents(on_disk.root)


def test_an_image_that_goes_after_it_was_listed_is_left_out(
    store: Store, photos_at_url: str, tmp_path: Path
) -> None:
    def fault(environ: dict[str, Any]) -> tuple[str, str] | None:
        return ("404 Not Found", "NoSuchKey") if environ["PATH_INFO"].endswith("/circle/001.png") else None

    with store.failing(fault):
        built = cli(
            "hierarchy-builder",
            *("build", photos_at_url, "--out", tmp_path / "build", *WORDS, "--max-bad-fraction", 0.2),
        )
    assert built.code == 0, built.err
    assert "1 of 9 images could not be used (1 missing)" in built.err


@pytest.mark.parametrize(
    ("code", "error"),
    [("AccessDenied", ImageError), ("InvalidAccessKeyId", StoreError), ("ExpiredToken", StoreError)],
)
def test_an_object_that_is_refused_is_not_the_store_that_refuses(
    store: Store, photos_at_url: str, code: str, error: type[Exception]
) -> None:
    fs, key = filesystem_of(f"{photos_at_url}/circle/000.png")
    with store.failing(lambda environ: ("403 Forbidden", code)), pytest.raises(error):
        read_file(fs, key)


def test_the_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, photos: Path) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    found = cli("hierarchy-builder", "build", photos, "--out", "gs://bucket/build")
    assert found.code == 2
    assert "gcsfs is not installed: " in found.err
    assert "[gcs]" in found.err
