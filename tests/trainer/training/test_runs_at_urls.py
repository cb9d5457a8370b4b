"""Training from shards at a URL into a run at a URL, its continuation on another machine, and samples of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import SETTINGS, cli, trainer
from object_store import Store, served

from hierarchy_builder import remote
from hierarchy_builder.places import a_folder

RUN = ("--preset", "tiny-cpu", *SETTINGS, "--batch-size", 8, "--total-images", 24)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with served() as found:
        yield found


def weights(run: Path) -> dict[str, bytes]:
    """The tensors of the checkpoints of a run, by path."""
    files = remote.files_below(run) if remote.is_remote(run) else run.rglob("*")
    found = {path.relative_to(run).as_posix(): path for path in files if path.suffix == ".safetensors"}
    return {name: path.read_bytes() for name, path in found.items()}


def test_a_run_at_a_url_goes_on_elsewhere_and_equals_one_on_a_disk(
    store: Store, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = store.bucket("training")
    for path in Path(shards).iterdir():
        remote.put(a_folder(f"{bucket}/shards/{path.name}"), path.read_bytes())
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "first"))
    trainer("train", shards, "--out", tmp_path / "near", *RUN, "--quiet")
    url = f"{bucket}/runs/far"
    trained = cli("trainer", "train", f"{bucket}/shards", "--out", url, *RUN)
    assert trained.code == 0, trained.err
    assert f"next: trainer sample {url} " in trained.err
    expected = weights(tmp_path / "near")
    assert weights(a_folder(url)) == expected
    last = a_folder(url) / "checkpoints" / "step-00000003"
    remote.remove([last / "state.json"])  # as if the upload of the last one had been cut off
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "second"))  # another machine
    again = cli("trainer", "train", f"{bucket}/shards", "--out", url, *RUN)
    assert again.code == 0, again.err
    assert "goes on from" in again.err
    assert "step-00000002: step 2" in again.err
    assert weights(a_folder(url)) == expected
    for run, name in ((url, "drawn"), (tmp_path / "near", "same")):
        trainer("sample", run, "--labels", 0, "--seeds", 0, "--out", tmp_path / name)
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "same").rglob("*.png")}
    assert pictures
    assert {path.name: path.read_bytes() for path in (tmp_path / "drawn").rglob("*.png")} == pictures


def test_a_url_without_a_run_is_refused(store: Store, tmp_path: Path) -> None:
    url = f"{store.bucket('empty')}/run"
    found = cli("trainer", "sample", url, "--labels", 0, "--out", tmp_path / "drawn")
    assert (found.code, f"{url} holds nothing" in found.err) == (2, True), found.err
