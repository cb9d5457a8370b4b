"""Run folders that were damaged, or are of something else: every verb says what it found and what to do."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import code_and_error as call
from fixture_shards import write_shards
from tiny_pipeline import tiny_run
from tiny_runs import FLOW

from hierarchy_builder.fields import to_mapping
from hierarchy_builder.files.exclusion import LOCK
from hierarchy_builder.files.whole import sealed_text
from trainer.decode.config import DecoderConfig
from trainer.methods import registry
from trainer.methods.latent_forcing.config import LatentTrainConfig
from trainer.training import checkpoint as saved
from trainer.training.run_folder import read_kept

TINY = dataclasses.replace(
    FLOW, preset="tiny-cpu", total_images=16, checkpoint_images=8, sample_images=None, tensorboard=False
)
SAMPLE = ("--labels", "0", "--seeds", "0", "--format", "npz", "--out", "OUT")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_shards(tmp_path_factory.mktemp("data") / "shards"))


@pytest.fixture(scope="module")
def trained(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with a checkpoint of each."""
    out = tmp_path_factory.mktemp("runs") / "run"
    registry.train(TINY, shards, str(out), quiet=True)
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that may be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(autouse=True)
def out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder OUT, in the folder of the test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "OUT"


def content(folder: Path) -> dict[str, bytes]:
    """Every path in a folder, but for the lock, with a digest of the file there."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b""
        for path in folder.rglob("*")
        if path.name != LOCK
    }


def follow(error: str) -> None:
    """Run the shell command that a message ends with."""
    command = error.rstrip().rpartition(": mv ")[2]
    subprocess.run(f"mv {command}", shell=True, check=True)


def newest(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(bytes(content))


def change_state(folder: Path, **fields: Any) -> None:
    state = json.loads((folder / saved.STATE).read_text())
    (folder / saved.STATE).write_bytes(sealed_text({**state, **fields}))


@pytest.mark.parametrize("place", [-5, 12, 3])
def test_a_flipped_bit_is_found_by_whatever_reads_the_file(
    run: Path, shards: str, out: Path, place: int
) -> None:
    flip(newest(run) / saved.MODEL, place)
    for words in (
        ("train", shards, "--out", run, "--quiet"),
        ("sample", run, "--ema", "raw", *SAMPLE),
        ("evaluate", run, "--ema", "raw", "--shards", shards),
        ("report", run, "--ema", "raw", "--out", "OUT/page.html"),
        ("sweep", run, "--ema", "raw"),
        ("export-official", run, "--out", "OUT/official"),
    ):
        code, error = call(*words)
        assert code == 1, words
        assert "step-00000002/model.safetensors: its checksum is" in error, words
        assert "move this one away and continue from the one before: mv -- " in error
    assert not out.exists() or not [*out.rglob("*.*")]
    follow(error)
    assert call("train", shards, "--out", run, "--quiet")[0] == 0
    assert saved.load_state(saved.find_checkpoint(run)).step == 2


def test_each_file_of_a_checkpoint_has_its_checksum(run: Path) -> None:
    folder = newest(run)
    state = saved.load_state(folder)
    names = {path.name for path in folder.iterdir()} - {saved.STATE}
    assert state.checksums.keys() == state.files.keys() == names
    for name in names:
        flip(folder / name, -1)
        with pytest.raises(saved.TrainerError, match=rf"{name}: its checksum"):
            saved.load_tensors(folder / name)


def test_a_checkpoint_without_checksums_is_read(run: Path) -> None:
    change_state(newest(run), checksums={})
    with pytest.raises(saved.TrainerError, match="not every file has a size and a checksum"):
        saved.load_state(newest(run))
    change_state(newest(run), checksums={}, format_version=1)  # as earlier releases wrote it
    assert saved.load_state(newest(run)).checksums == {}
    assert saved.load_tensors(newest(run) / saved.MODEL)


DAMAGES = [
    (lambda folder: (folder / saved.STATE).unlink(), 5, "found no state.json in it"),
    (
        lambda folder: (folder / saved.STATE).write_bytes(b"\xff{"),
        1,
        "state.json is damaged: UnicodeDecodeError",
    ),
    (lambda folder: (folder / saved.MODEL).unlink(), 1, "model.safetensors: 0 bytes, state.json says"),
    (lambda folder: change_state(folder, step="two"), 5, "state.json, step: .*valid integer"),
    (lambda folder: change_state(folder, optimizer={}), 5, "state.json, optimizer: .*list"),
    (lambda folder: change_state(folder, colour="red"), 5, "state.json, colour: Unexpected"),
]


@pytest.mark.parametrize(("damage", "message"), [(damage, message) for damage, _, message in DAMAGES])
def test_verbs_that_only_read_name_a_damaged_step_and_pass_over_it(
    run: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(newest(run))
    before = content(run)
    if (newest(run) / saved.STATE).exists():
        code, error = call("sample", newest(run), *SAMPLE)
        assert code == 1
        assert re.search(message, error), error
    code, said = call("sample", run, *SAMPLE)
    assert code == 0
    warning = r"warning: .*step-00000002.*(state\.json|model\.safetensors).*; taking step-00000001 instead"
    assert [bool(re.match(warning, line)) for line in said.splitlines() if "warning" in line] == [True]
    assert content(run) == before


def unreadable(folder: Path) -> None:
    """state.json cannot be read, as in a passing error of the disk: the system says so of a folder, even to root."""
    (folder / saved.STATE).rename(folder / "kept")
    (folder / saved.STATE).mkdir()


def foreign(folder: Path) -> None:
    """Another program uses the same name."""
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"weights of another program")


def renamed(folder: Path) -> None:
    """A copy of the step before, under the name of this one."""
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step-00000001"), folder)


@pytest.mark.parametrize(
    ("damage", "code", "message"),
    [
        *DAMAGES,
        (
            lambda folder: change_state(folder, format_version=3),
            5,
            "format 3, this program reads 2 and older: use the rel",
        ),
        (unreadable, 1, "cannot be read: .* give the same command again; else train"),
        (foreign, 5, "found no state.json in it"),
        (renamed, 5, "holds the checkpoint of another step, 1"),
    ],
)
def test_training_stops_at_a_step_that_it_cannot_read_and_goes_on_once_it_is_moved_away(
    run: Path,
    shards: str,
    damage: Callable[[Path], object],
    code: int,
    message: str,
) -> None:
    folder = newest(run)
    damage(folder)
    before = content(run)
    train = ("train", shards, "--out", run, "--quiet")
    for words in (train, (*train, "--dry-run"), (*train, "--resume", folder.with_name("step-00000001"))):
        found, error = call(*words)
        assert found == code, error
        assert re.search(rf"^error: .*step-00000002.*{message}", error), error
        assert "nothing was changed" in error
        assert "the same command continues from step-00000001: mv -- " in error
        assert len(error.splitlines()) == 1
    assert content(run) == before
    follow(error)
    aside = folder.with_name("step-00000002.aside")
    kept = content(aside)
    assert call(*train)[0] == 0
    assert saved.load_state(folder).step == 2
    assert (
        content(aside)
        == kept
        == {
            name.removeprefix("checkpoints/step-00000002/"): digest
            for name, digest in before.items()
            if name.startswith("checkpoints/step-00000002/")
        }
    )


def test_training_goes_on_by_itself_once_an_error_of_the_disk_has_passed(
    run: Path, shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(run)
    read = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path.name == saved.STATE:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", fail)
        code, error = call("train", shards, "--out", run, "--quiet")
    assert code == 1
    assert "step-00000002/state.json cannot be read: [Errno 5] Input/output error" in error
    assert "(and 1 more before it); nothing was changed: if that error may have passed" in error
    assert content(run) == before
    assert call("train", shards, "--out", run, "--quiet")[0] == 0
    assert content(run / "checkpoints") == {
        name.removeprefix("checkpoints/"): digest
        for name, digest in before.items()
        if name.startswith("checkpoints/")
    }


def test_a_folder_of_checkpoints_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    run: Path, shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(run)
    listdir = os.listdir

    def fail(path: Any) -> list[str]:
        if Path(path).name == "checkpoints":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return listdir(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", fail)
        code, error = call("train", shards, "--out", run, "--quiet")
    assert code == 1
    assert "checkpoints cannot be listed" in error
    assert content(run) == before


def test_a_run_without_a_whole_step_starts_anew_only_after_all_are_moved_away(run: Path, shards: str) -> None:
    for folder in (run / "checkpoints").iterdir():
        (folder / saved.MODEL).write_bytes(b"")
    before = content(run)
    code, error = call("train", shards, "--out", run, "--quiet")
    assert code == 1
    assert "step-00000002/model.safetensors: 0 bytes" in error
    assert "and the same command starts from scratch: mv -- " in error
    assert content(run) == before
    follow(error)
    assert call("train", shards, "--out", run, "--quiet")[0] == 0
    assert [folder.name for folder in saved.list_checkpoints(run)] == ["step-00000001", "step-00000002"]
    assert len(list((run / "checkpoints").glob("*.aside"))) == 2


def test_resume_never_reads_and_removes_nothing(run: Path, shards: str) -> None:
    foreign(newest(run))
    before = content(run)
    code, error = call("train", shards, "--out", run, "--quiet", "--resume", "never")
    assert (code, "holds checkpoints up to step-00000002" in error) == (2, True)
    assert content(run) == before


def test_a_course_that_is_given_up_takes_nothing_else_with_it(run: Path, shards: str) -> None:
    (newest(run) / "notes.txt").write_text("the best one so far")
    before = content(run)
    earlier = run / "checkpoints" / "step-00000001"
    code, error = call("train", shards, "--out", run, "--quiet", "--resume", earlier)
    assert code == 5
    assert "step-00000002 holds notes.txt, which is not part of a checkpoint" in error
    assert content(run) == before
    follow(error)
    assert call("train", shards, "--out", run, "--quiet", "--resume", earlier)[0] == 0
    assert (run / "checkpoints" / "step-00000002.aside" / "notes.txt").exists()


def test_what_interrupted_writes_left_does_not_stop_a_training(run: Path, shards: str) -> None:
    newest(run).rename(newest(run).with_name("step-00000002.tmp-7"))
    assert call("train", shards, "--out", run, "--quiet")[0] == 0
    assert {folder.name for folder in (run / "checkpoints").iterdir()} == {"step-00000001", "step-00000002"}


def test_a_run_without_a_whole_step_says_what_is_wrong_with_the_newest(run: Path) -> None:
    for folder in (run / "checkpoints").iterdir():
        (folder / saved.MODEL).write_bytes(b"")
    code, error = call("sample", run, *SAMPLE)
    assert code == 1
    assert "step-00000002/model.safetensors: 0 bytes" in error


def test_the_optimiser_of_another_network_is_refused(run: Path, shards: str) -> None:
    change_state(newest(run), optimizer=[{}], files={}, checksums={}, format_version=1)
    code, error = call("train", shards, "--out", run, "--quiet")
    assert code == 5
    assert "optimiser holds other parameters" in error


@pytest.mark.parametrize(
    ("config", "method"),
    [(LatentTrainConfig(), "latent-forcing"), (DecoderConfig(), "train-decoder")],
)
def test_a_run_of_another_method_is_told_from_a_wrong_field(
    run: Path, tmp_path: Path, config: Any, method: str
) -> None:
    other = tiny_run(tmp_path / "other")
    change_state(newest(other), config=to_mapping(config))
    code, error = call("sample", run, "--weak", other, *SAMPLE)
    assert code == 5
    assert f"found a run of {method}, expected one of trajectory-forcing" in error
    code, error = call("export-official", other, "--out", "OUT/official")
    assert code == 5
    assert f"found a run of {method}" in error


def test_a_method_that_nobody_knows(run: Path) -> None:
    change_state(newest(run), config={"method_name": "alchemy"})
    code, error = call("sample", newest(run), *SAMPLE)
    assert code == 5
    assert "found a run of 'alchemy', known are trajectory-forcing" in error


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[1, 2",
        b"3",
        b"\xff",
        b"\0",
        b"config: {}\n",
        b"config: 3\nshards: {}\n",
        b"a: !!python/name:os.system ''\n",
    ],
)
def test_a_config_yaml_that_is_none(run: Path, shards: str, content: bytes) -> None:
    (run / "config.yaml").write_bytes(content)
    for words in (("train", shards, "--out", run), ("report", run), ("train-decoder", shards, "--out", run)):
        code, error = call(*words)
        assert code == 5, words
        assert "config.yaml is damaged or is not the configuration of a run" in error
    assert not (run / "report.html").exists()


def test_numbers_kept_with_a_run_that_are_damaged(run: Path) -> None:
    assert read_kept(run / "evaluation.json") == {"metrics": []}
    for content in ("{", '{"metrics": 3}', "[]", '{"metrics": [{"name": "x"}]}'):
        (run / "evaluation.json").write_text(content)
        code, error = call("report", run)
        assert code == 1
        assert "evaluation.json is damaged" in error
        assert "remove it, `trainer evaluate` writes it again" in error


def test_lines_of_metrics_that_are_none_end_the_log(run: Path, shards: str) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "images": 8}\n{"step": "two"}\n{"st')
    assert call("report", run)[0] == 0
    assert call("train", shards, "--out", run, "--quiet")[0] == 0
