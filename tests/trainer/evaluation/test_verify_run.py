"""`trainer verify`: every changed bit of every file of a run folder is found, or the file is listed as not checked."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from fixture_shards import write_shards
from mutations import bits_of, files_below, flip, flipped
from tiny_runs import DECODER, FLOW
from typer.testing import CliRunner, Result

from hierarchy_builder.errors import TrainerError, VerificationError
from trainer.cli.app import app
from trainer.decode.train import train_decoder
from trainer.evaluation.verify import parts_of, verify_part, verify_run
from trainer.methods import registry
from trainer.training import checkpoint as saved
from trainer.training.run_folder import read_config

NOT_CHECKED = {"report.html", "studio/a.html"}
"""Copies, which nothing reads again; those of TensorBoard are others."""


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that commands put into its folder."""
    root = tmp_path_factory.mktemp("verified")
    shards = str(write_shards(root / "shards", pictures=True))
    config = dataclasses.replace(FLOW, total_images=16, checkpoint_images=8, sample_images=8)
    registry.train(config, shards, str(root / "run"), quiet=True)
    decoder = dataclasses.replace(DECODER, total_images=8)
    train_decoder(decoder, shards, str(root / "decoder"), quiet=True)
    shutil.copytree(
        root / "decoder", root / "run" / "decoder", ignore=shutil.ignore_patterns("checkpoints", ".*")
    )
    evaluated = call(
        *("evaluate", root / "run", "--shards", shards, "--samples-per-class", 2, "--edits", "--quiet")
    )
    drawn = call(
        "sample", root / "run", "--labels", "ant", "--out", root / "samples", "--format", "safetensors"
    )
    assert (evaluated.exit_code, drawn.exit_code) == (0, 0)
    (root / "run" / "studio").mkdir()
    trajectory = next((root / "samples").rglob("*.safetensors"))
    shutil.copy(trajectory, root / "run" / "studio" / "a.safetensors")
    (root / "run" / "studio" / "a.html").write_text("<p>")
    (root / "run" / "report.html").write_text("<p>")
    return root / "run"


def unseen_flips(run: Path, count: int) -> tuple[int, list[str]]:
    """How many bits were flipped, and which flips `verify` does not find."""
    tried, missed = 0, []
    for part in parts_of(run):
        if any(verify_part(run, part)):  # listed as not checked
            continue
        for path in files_below(part) if part.is_dir() else [part] if part.stat().st_size else []:
            for bit in bits_of(path.stat().st_size, count):
                tried += 1
                with flipped(path, bit):
                    if not any(each.is_damaged for each in verify_part(run, part)):
                        missed.append(f"{path.relative_to(run)}: bit {bit}")
    return tried, missed


def test_a_whole_run_is_in_order_and_says_what_was_not_checked(run: Path) -> None:
    done = call("verify", run, "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["problems"] == []
    assert {name.split("/events")[0] for name in found["unchecked"]} - {"tensorboard"} == NOT_CHECKED


def test_flipped_bits_are_found(run: Path) -> None:
    tried, missed = unseen_flips(run, 20)
    assert tried > 300  # with those of builds and shards in test_trust.py more than 500
    assert missed == []


@pytest.mark.drill
@pytest.mark.timeout(3600)
def test_thousands_of_flipped_bits_are_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tried, missed = unseen_flips(run, 450)
    with capsys.disabled():
        print(f"{tried:,} bits of a run folder flipped, {len(missed)} not found")
    assert tried >= 5000
    assert missed == []


def test_damage_ends_with_exit_code_4_and_a_next_step(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (file,) = copy.glob("checkpoints/*2/model.safetensors")
    file.write_bytes(flip(file.read_bytes(), 8 * 5000))
    done = call("verify", copy)
    assert isinstance(done.exception, VerificationError)
    assert done.exception.exit_code == 4
    assert "step-00000002/model.safetensors: its checksum is" in done.stdout
    (copy / "evaluation.json").unlink()  # a file that is not there is no damage
    file.parent.rename(file.parent.with_name("aside"))
    assert call("verify", copy).exit_code == 0
    with pytest.raises(TrainerError, match="is not a run folder of `trainer train`: found no"):
        next(verify_run(tmp_path))


def test_a_changed_step_does_not_resume_to_another_model(run: Path) -> None:
    (newest,) = run.glob("checkpoints/*2")
    text = (newest / saved.STATE).read_bytes()
    with flipped(newest / saved.STATE, 8 * (text.index(b'"step": ') + 8)):
        for read in (saved.load_state, lambda folder: saved.load_tensors(folder / saved.MODEL)):
            with pytest.raises(TrainerError, match="checksum"):
                read(newest)


def test_a_changed_configuration_is_refused(run: Path) -> None:
    text = (run / "config.yaml").read_bytes()
    with (
        flipped(run / "config.yaml", 8 * (text.index(b"seed: ") + 6)),
        pytest.raises(TrainerError, match="is damaged"),
    ):
        read_config(run)
