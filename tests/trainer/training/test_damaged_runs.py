"""Run folders that were damaged, or are of something else: every verb says what it found and what to do."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixture_shards import write_shards
from tiny_pipeline import tiny_run
from tiny_runs import FLOW

from trainer.cli import app as cli
from trainer.decode.config import DecoderConfig
from trainer.methods.latent_forcing.config import LatentTrainConfig
from trainer.methods.trajectory_forcing.train import train
from trainer.training import checkpoint as saved
from trainer.training.config import to_mapping
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
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "run"
    train(TINY, shards, str(out), quiet=True)
    torch.set_num_threads(before)
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that may be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str]]:
    """Exit code and standard error of `trainer` with these words; OUT is a folder of the test."""

    def call(*words: object) -> tuple[int, str]:
        out = str(tmp_path / "out")
        monkeypatch.setattr(sys, "argv", ["trainer", *(str(word).replace("OUT", out) for word in words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return call


def newest(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(bytes(content))


def change_state(folder: Path, **fields: Any) -> None:
    state = json.loads((folder / saved.STATE).read_text())
    (folder / saved.STATE).write_text(json.dumps({**state, **fields}))


@pytest.mark.parametrize("place", [-5, 12, 3])
def test_a_flipped_bit_is_found_by_whatever_reads_the_file(
    run: Path, shards: str, call: Callable[..., tuple[int, str]], place: int
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
        assert "remove this one and go on from the one before" in error
    assert not (run.parent / "out").exists() or not [*(run.parent / "out").rglob("*.*")]
    shutil.rmtree(newest(run))
    assert call("train", shards, "--out", run, "--quiet")[0] == 0
    assert newest(run).name == "step-00000002"


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
    assert saved.load_tensors(newest(run) / saved.MODEL)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / saved.STATE).unlink(), "found no checkpoint"),
        (lambda folder: (folder / saved.STATE).write_bytes(b"\xff{"), "state.json: UnicodeDecodeError"),
        (lambda folder: (folder / saved.MODEL).unlink(), "model.safetensors: 0 bytes, state.json says"),
        (lambda folder: change_state(folder, step="two"), "state.json, step: .*valid integer"),
        (lambda folder: change_state(folder, optimizer={}), "state.json, optimizer: .*list"),
        (lambda folder: change_state(folder, colour="red"), "state.json, colour: Unexpected"),
    ],
)
def test_a_damaged_step_is_named_and_the_run_goes_on_without_it(
    run: Path,
    shards: str,
    call: Callable[..., tuple[int, str]],
    damage: Callable[[Path], object],
    message: str,
) -> None:
    damage(newest(run))
    code, error = call("sample", newest(run), *SAMPLE)
    assert code == 1
    assert re.search(message, error), error
    for words in (("sample", run, *SAMPLE), ("train", shards, "--out", run, "--quiet")):
        code, said = call(*words)
        assert code == 0
        warning = (
            r"warning: .*step-00000002.*(state\.json|model\.safetensors).*; taking step-00000001 instead"
        )
        assert [bool(re.match(warning, line)) for line in said.splitlines() if "warning" in line] == [True]
    assert saved.load_state(newest(run)).step == 2
    assert "warning" not in call("sample", run, *SAMPLE)[1]


def test_a_run_without_a_whole_step_is_begun_anew_and_says_so(
    run: Path, shards: str, call: Callable[..., tuple[int, str]]
) -> None:
    for folder in (run / "checkpoints").iterdir():
        (folder / saved.MODEL).write_bytes(b"")
    code, said = call("train", shards, "--out", run, "--quiet")
    assert code == 0
    assert said.count("0 bytes, state.json says") == 2
    assert said.count("; nothing before it is whole, starting anew\n") == 2


def test_a_run_without_a_whole_step_says_what_is_wrong_with_the_newest(
    run: Path, call: Callable[..., tuple[int, str]]
) -> None:
    for folder in (run / "checkpoints").iterdir():
        (folder / saved.MODEL).write_bytes(b"")
    code, error = call("sample", run, *SAMPLE)
    assert code == 1
    assert "step-00000002/model.safetensors: 0 bytes" in error


def test_the_optimiser_of_another_network_is_refused(
    run: Path, shards: str, call: Callable[..., tuple[int, str]]
) -> None:
    change_state(newest(run), optimizer=[{}], files={})
    code, error = call("train", shards, "--out", run, "--quiet")
    assert code == 5
    assert "optimiser holds other parameters" in error


@pytest.mark.parametrize(
    ("config", "method"),
    [(LatentTrainConfig(), "latent-forcing"), (DecoderConfig(), "train-decoder")],
)
def test_a_run_of_another_method_is_told_from_a_wrong_field(
    run: Path, tmp_path: Path, call: Callable[..., tuple[int, str]], config: Any, method: str
) -> None:
    other = tiny_run(tmp_path / "other")
    change_state(newest(other), config=to_mapping(config))
    code, error = call("sample", run, "--weak", other, *SAMPLE)
    assert code == 5
    assert f"found a run of {method}, expected one of trajectory-forcing" in error
    code, error = call("export-official", other, "--out", "OUT/official")
    assert code == 5
    assert f"found a run of {method}" in error


def test_a_method_that_nobody_knows(run: Path, call: Callable[..., tuple[int, str]]) -> None:
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
def test_a_config_yaml_that_is_none(
    run: Path, shards: str, call: Callable[..., tuple[int, str]], content: bytes
) -> None:
    (run / "config.yaml").write_bytes(content)
    for words in (("train", shards, "--out", run), ("report", run), ("train-decoder", shards, "--out", run)):
        code, error = call(*words)
        assert code == 5, words
        assert "config.yaml is not the configuration of a run, or damaged" in error
    assert not (run / "report.html").exists()


def test_numbers_kept_with_a_run_that_are_damaged(run: Path, call: Callable[..., tuple[int, str]]) -> None:
    assert read_kept(run / "evaluation.json") == {"metrics": []}
    for content in ("{", '{"metrics": 3}', "[]", '{"metrics": [{"name": "x"}]}'):
        (run / "evaluation.json").write_text(content)
        code, error = call("report", run)
        assert code == 1
        assert "evaluation.json is damaged" in error
        assert "remove it, `trainer evaluate` writes it again" in error


def test_lines_of_metrics_that_are_none_end_the_log(
    run: Path, shards: str, call: Callable[..., tuple[int, str]]
) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "images": 8}\n{"step": "two"}\n{"st')
    assert call("report", run)[0] == 0
    assert call("train", shards, "--out", run, "--quiet")[0] == 0
