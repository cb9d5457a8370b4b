"""Training from shards at a URL into a run at a URL, its continuation on another machine, and samples of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import SETTINGS, TINY, cli, trainer
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from object_store import Store, sent, served

from hierarchy_builder.errors import UsageError, UserError
from hierarchy_builder.files import remote
from hierarchy_builder.files.paths import a_folder
from trainer import train
from trainer.training.mirror import a_run

RUN = ("--preset", "tiny-cpu", *SETTINGS, "--batch-size", 8, "--total-images", 24)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with served() as found:
        yield found


@pytest.fixture(scope="module")
def shards_at_url(store: Store, shards: str) -> str:
    return str(sent(Path(shards), a_folder(f"{store.bucket('sets')}/set")))


def weights(run: Path) -> dict[str, bytes]:
    """The tensors of the checkpoints of a run, by path."""
    files = remote.files_below(run) if remote.is_remote(run) else run.rglob("*")
    found = {path.relative_to(run).as_posix(): path for path in files if path.suffix == ".safetensors"}
    return {name: path.read_bytes() for name, path in found.items()}


def test_a_run_at_a_url_goes_on_elsewhere_and_equals_one_on_a_disk(
    store: Store, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = store.bucket("training")
    sent(Path(shards), a_folder(f"{bucket}/shards"))
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "first"))
    trainer("train", shards, "--out", tmp_path / "near", *RUN, "--quiet")
    url = f"{bucket}/runs/far"
    trained = cli("trainer", "train", f"{bucket}/shards", "--out", url, *RUN)
    assert trained.code == 0, trained.err
    assert f"next: trainer sample {url} " in trained.err
    expected = weights(tmp_path / "near")
    assert weights(a_folder(url)) == expected
    assert (a_run(f"{url}/checkpoints/step-00000002") / "state.json").exists()  # not the newest
    with pytest.raises(UsageError, match="step-00000009 holds no whole checkpoint"):
        a_run(f"{url}/checkpoints/step-00000009")
    last = a_folder(url) / "checkpoints" / "step-00000003"
    remote.remove([last / "state.json"])  # as if the upload of the last one had been cut off
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "second"))  # another machine
    again = cli("trainer", "train", f"{bucket}/shards", "--out", url, *RUN)
    assert again.code == 0, again.err
    assert "goes on from" in again.err
    assert "step-00000002: step 2" in again.err
    assert weights(a_folder(url)) == expected
    for run, name in ((url, "drawn"), (tmp_path / "near", "same")):
        drawn = trainer("sample", run, "--labels", 0, "--seeds", 0, "--out", tmp_path / name)
        assert f"next: trainer report {run}\n" in drawn.err
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "same").rglob("*.png")}
    assert pictures
    assert {path.name: path.read_bytes() for path in (tmp_path / "drawn").rglob("*.png")} == pictures


def test_a_run_whose_credentials_expire_goes_on(
    store: Store, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = store.bucket("expiring")
    far = sent(Path(shards), a_folder(f"{bucket}/shards"))
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRAINER_CACHE_BYTES", "1")  # each sample is read where it lies
    passed = list[str]()

    def fault(environ: dict[str, Any]) -> tuple[str, str] | None:
        passed.append(environ["PATH_INFO"])
        is_over = any(path.endswith("step-00000002/state.json") for path in passed[:-1])
        return ("400 Bad Request", "ExpiredToken") if is_over else None

    words = ("train", far, "--out", f"{bucket}/run", *RUN, "--quiet")
    with store.failing(fault):
        stopped = cli("trainer", *words)
    assert (stopped.code, "renew them; then the same command continues" in stopped.err) == (75, True), (
        stopped.err
    )
    trainer(*words)
    trainer("train", shards, "--out", tmp_path / "near", *RUN, "--quiet")
    assert weights(a_folder(f"{bucket}/run")) == weights(tmp_path / "near")


@pytest.mark.parametrize(
    ("name", "status", "code", "exit_code", "words"),
    [
        ("_SUCCESS", "403 Forbidden", "AccessDenied", 1, "have no permission for that"),
        ("index.json", "403 Forbidden", "RequestTimeTooSkewed", 1, "the clock of this machine is wrong"),
        ("statistics.npz", "403 Forbidden", "AccessDenied", 1, "have no permission for that"),
        ("train-000001.tar", "403 Forbidden", "AccessDenied", 1, "have no permission for that"),
        ("train-000001.tar", "400 Bad Request", "ExpiredToken", 75, "renew them; then the same command"),
        ("train-000000.tar", "503 Slow Down", "SlowDown", 75, "the same command continues"),
    ],
)
def test_what_a_store_refuses_of_a_set_is_named(
    store: Store,
    shards_at_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    name: str,
    status: str,
    code: str,
    exit_code: int,
    words: str,
) -> None:
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "cache"))
    with store.failing(lambda environ: (status, code) if environ["PATH_INFO"].endswith(name) else None):
        ended = cli("trainer", "train", shards_at_url, "--out", tmp_path / "run", *RUN, "--quiet")
    assert (ended.code, words in ended.err) == (exit_code, True), ended.err
    assert f"error: {shards_at_url}/{name}: " in ended.err


def test_a_bucket_that_is_not_there_is_named(store: Store, tmp_path: Path) -> None:
    ended = cli("trainer", "train", "s3://nowhere/set", "--out", tmp_path / "run", *RUN)
    assert (ended.code, "there is no such bucket: create it, or correct the URL" in ended.err) == (1, True)
    ended = cli("trainer", "train", f"{store.bucket('here')}/set", "--out", tmp_path / "run", *RUN)
    assert (ended.code, "s3://here/set does not exist" in ended.err) == (2, True), ended.err


def test_what_a_verb_finds_of_a_run_lies_with_the_run(
    store: Store, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "cache"))
    url = f"{store.bucket('calls')}/run"
    settings = {name: yaml.safe_load(value) for name, value in (part.split("=") for part in TINY)}
    pipe = train(shards, url, preset="tiny-cpu", settings=settings, total_images=16)
    assert pipe(0, seed=0)
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "other"))
    reported = trainer("report", url, "--shards", shards)
    assert f"{url}/report.html" in reported.out
    found = {path.relative_to(a_folder(url)).as_posix() for path in remote.files_below(a_folder(url))}
    assert {"report.html", "config.yaml", "metrics.jsonl"} <= found


def test_a_url_without_a_run_is_refused(store: Store, tmp_path: Path) -> None:
    url = f"{store.bucket('empty')}/run"
    found = cli("trainer", "sample", url, "--labels", 0, "--out", tmp_path / "drawn")
    assert (found.code, f"{url} holds nothing" in found.err) == (2, True), found.err


def test_an_object_leads_to_no_file_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    files, name = MemoryFileSystem(), f"/{tmp_path.name}/run/checkpoints/../../../outside"
    monkeypatch.setitem(MemoryFileSystem.store, name, MemoryFile(files, name, b"theirs"))
    with pytest.raises(UserError, match=r"an object named '.*outside', and `\.\.` leads out"):
        a_run(f"memory://{tmp_path.name}/run")
    assert not list(tmp_path.rglob("outside"))
