"""The command `trainer`: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command_line import SETTINGS, trainer
from documented import undocumented
from fixture_shards import change_index, write_shards
from PIL import Image

from hierarchy_builder.fields import known_fields
from hierarchy_builder.files.whole import sealed_text
from trainer.methods.registry import all_presets
from trainer.methods.trajectory_forcing import train as room
from trainer.trajectories.pipeline import Trajectory


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_shards(tmp_path_factory.mktemp("data") / "shards"))


@pytest.fixture(scope="module")
def run(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    trainer("train", shards, *arguments(out), "--quiet")
    return out


def arguments(out: Path) -> list[str]:
    return ["--out", str(out), "--preset", "tiny-cpu", *SETTINGS, "--batch-size", "8", "--total-images", "32"]


def test_train_prints_its_summary(shards: str, tmp_path: Path) -> None:
    printed = trainer("train", shards, *arguments(tmp_path), "--json")
    summary = printed.json
    assert (summary["step"], summary["images_seen"]) == (4, 32)
    assert (Path(summary["checkpoint"]) / "state.json").exists()
    assert "preset: tiny-cpu" in printed.err
    assert "step 4  32/32 images" in printed.err


def test_dry_run_resolves_and_writes_nothing(shards: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    resolved = trainer("train", shards, *arguments(out), "--set", "optim.lr=5e-3", "--dry-run", "--json").json
    assert resolved["optim"]["lr"] == 0.005
    assert resolved["model"]["grid"] == [4, 4]
    assert resolved["batch_size"] == 8
    assert not out.exists()


def test_a_large_default_without_cuda_names_the_small_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_shards(tmp_path / "shards", pictures=True)
    dry = ("train-decoder", shards, "--out", tmp_path / "run", "--dry-run")
    hints = []
    for has_cuda, more in ((False, []), (True, []), (False, ["--quiet"]), (False, ["--size", "tiny"])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_cuda=has_cuda: has_cuda)
        hints.append(trainer(*dry, *more).err)
    assert hints[1:] == ["", "", ""]
    assert hints[0].count("\n") == 1
    assert "size XL" in hints[0]
    assert "--size tiny" in hints[0]


def test_flag_over_file_over_preset(shards: str, tmp_path: Path) -> None:
    file = tmp_path / "more.yaml"
    file.write_text(yaml.safe_dump({"seed": 7, "batch_size": 12, "model": {"width": 48}}))
    words = ["--preset", "tiny-cpu", "--config", file, "--batch-size", 6, "--dry-run", "--json"]
    resolved = trainer("train", shards, "--out", tmp_path / "run", *words).json
    assert (resolved["seed"], resolved["batch_size"], resolved["model"]["width"]) == (7, 6, 48)
    assert resolved["model"]["depth"] == 3


def test_run_folder_alone_resumes(run: Path, shards: str) -> None:
    assert trainer("train", shards, "--out", run, "--json", "--quiet").json["step"] == 4
    said = trainer("train", shards, "--out", run, "--json").err.splitlines()
    assert next(line for line in said if line.startswith(f"goes on from {run / 'checkpoints'}")).endswith(
        "/step-00000004: step 4, 32 of 32 images"
    )
    assert said[-1] == f"next: trainer report {run}"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--set", "optim.lrr=1"], 2, "unknown field 'optim.lrr', did you mean 'optim.lr'?"),
        (["--set", "lr"], 2, "--set lr: expected name=value"),
        (["--set", "seed=many"], 2, "seed: "),
        (["--preset", "tf-b"], 2, "unknown preset 'tf-b', did you mean 'TF-B'?"),
        (["--config", "absent.yaml"], 2, "config file absent.yaml"),
        (["--resume", "absent"], 2, "--resume absent: found no such folder"),
        (["--batch-size", "30"], 1, "24 samples to train on, fewer than one batch of 30"),
        (["--set", "optim.lr={"], 2, "'{' is no value of YAML"),
        (["--set", "optim.lr=nan"], 2, "lr is nan, expected above 0"),
        (["--set", "optim.adam_betas=[0.9, 1.0]"], 2, "hold 1.0, expected 0 up to below 1"),
        (["--set", "method.region_weight=nan"], 2, "region_weight is nan"),
        (["--set", "method.time_std=0"], 2, "time_std is 0.0, expected above 0"),
        (["--set", "method.guidance_max=0.5"], 2, "guidance_max is 0.5, expected 1 or more"),
        (["--set", "model.num_heads=0"], 2, "num_heads is 0, expected above 0"),
        (["--set", "model.num_class_tokens=-1"], 2, "num_class_tokens is -1"),
        (
            ["--set", "method_name=other"],
            2,
            "method_name is 'other', expected 'trajectory-forcing': choose the method",
        ),
    ],
)
def test_train_refuses(shards: str, tmp_path: Path, words: list[str], code: int, message: str) -> None:
    error = trainer("train", shards, *arguments(tmp_path / "run"), *words, "--quiet", code=code).err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff", "config file"),
        (b"1: 2", "expected fields by name"),
        (b"optim: {1: 2}", "unknown field 'optim.1'"),
    ],
)
def test_config_file_must_hold_fields_by_name(
    shards: str, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "more.yaml").write_bytes(content)
    words = ("--config", tmp_path / "more.yaml", "--quiet")
    assert message in trainer("train", shards, *arguments(tmp_path / "run"), *words, code=2).err


@pytest.mark.parametrize("content", ["[1, 2", "a: 1", "config: 3\nshards: 4\n"])
def test_a_folder_with_another_config_yaml_is_refused(shards: str, tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    said = trainer("train", shards, *arguments(tmp_path), "--quiet", code=5).err
    assert f"error: {tmp_path / 'config.yaml'}" in said
    assert (tmp_path / "config.yaml").read_text() == content


@pytest.mark.parametrize(
    ("part", "content"),
    [("shards", {}), ("shards", []), ("files", []), ("config", 3)],
)
def test_a_checkpoint_with_a_wrong_state_is_skipped(
    run: Path, tmp_path: Path, part: str, content: object
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    newest = max((copy / "checkpoints").iterdir())
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_bytes(sealed_text({**state, part: content}))
    trainer("sample", copy, "--labels", "ant", "--seeds", "0", "--out", tmp_path / "samples")
    said = trainer("sample", newest, "--labels", "ant", "--out", tmp_path / "samples", code=1).err
    assert "is not a checkpoint" in said


def test_weights_of_another_network_are_refused(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    newest = max((copy / "checkpoints").iterdir())
    state = json.loads((newest / "state.json").read_text())
    state["config"]["model"]["width"] = 32
    (newest / "state.json").write_bytes(sealed_text(state))
    said = trainer("sample", copy, "--labels", "ant", "--out", tmp_path / "samples", code=5).err
    assert "the weights do not fit the network" in said


def test_report_refuses_shards_of_other_features(run: Path, tmp_path: Path) -> None:
    other = write_shards(tmp_path / "shards")
    change_index(other, width=48)
    said = trainer("report", run, "--shards", other, "--out", tmp_path / "report.html", code=5).err
    assert "the model was trained on" in said
    assert not (tmp_path / "report.html").exists()


def test_other_configuration_is_exit_code_5(run: Path, shards: str) -> None:
    said = trainer("train", shards, *arguments(run), "--seed", "9", "--quiet", code=5).err
    assert "seed: 0 there, 9 now" in said


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ("notes.txt", "is not a finished shard folder"),
        ("manifest.json", "is a build whose shards are not finished: run `hierarchy-builder shard {}`"),
        ("val/manifest.json", "is no build but holds builds (val): give one, such as {}/val"),
        (
            "cat/1.JPG",
            "is a folder of photos, and training reads shards that are made from photos: run "
            "`hierarchy-builder build {} --out DIR`",
        ),
        ("checkpoints/1/state.json", "is a run folder"),
    ],
)
def test_what_is_not_finished_shards_is_named(made: str, said: str, tmp_path: Path) -> None:
    place = tmp_path / "place" / made
    place.parent.mkdir(parents=True)
    place.touch()
    words = ("--out", tmp_path / "run", "--preset", "tiny-cpu")
    assert said.format(tmp_path / "place") in trainer("train", tmp_path / "place", *words, code=1).err


def test_a_field_by_its_name_elsewhere_is_understood(shards: str, tmp_path: Path) -> None:
    for asked, meant in (
        ("learning_rate", "optim.lr"),
        ("model.hidden_size", "model.width"),
        ("lr", "optim.lr"),
    ):
        words = ("--preset", "tiny-cpu", "--set", f"{asked}=1")
        said = trainer("train", shards, "--out", tmp_path / "run", *words, code=2).err
        assert f"did you mean {meant!r}?" in said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_have_their_exit_codes(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    backward = room.TrajectoryForcingRun.backward

    def signalled(self: Any, *rest: Any) -> Any:
        if self.step == 1:
            os.kill(os.getpid(), number)
        return backward(self, *rest)

    monkeypatch.setattr(room.TrajectoryForcingRun, "backward", signalled)
    trainer("train", shards, *arguments(tmp_path), "--quiet", code=code)
    assert (tmp_path / "checkpoints" / "step-00000002").is_dir()


def test_missing_option_is_a_usage_error(shards: str) -> None:
    assert "--out" in trainer("train", shards, code=2).err


def test_sample_writes_grid_page_and_trajectories(run: Path, tmp_path: Path) -> None:
    printed = trainer("sample", run, "--labels", "ant,2", "--seeds", "0-1,5", "--out", tmp_path, "--json")
    assert f"train-decoder SHARDS --out {run}/decoder` trains one; published decoders: " in printed.err
    rows = printed.json
    assert [(row["class"], row["seed"]) for row in rows] == [
        (name, seed) for name in ("ant", "cat") for seed in (0, 1, 5)
    ]
    trajectory = Trajectory.load(rows[4]["file"])
    assert (trajectory.class_name, trajectory.seeds) == ("cat", (1, 1, 1, 1))
    assert min(Image.open(tmp_path / "grid.png").size) > 100
    assert "ant" in (tmp_path / "index.html").read_text()


def test_sample_writes_the_formats_asked_for(run: Path, tmp_path: Path) -> None:
    words = ("--labels", "ant", "--seeds", "0-2", "--format", "npz,webdataset", "--out", tmp_path)
    trainer("sample", run, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples-000000.tar", "samples.npz"]
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays["levels"].shape[:2] == (3, 4)


def test_a_weak_model_guides_samples_and_scores(run: Path, shards: str, tmp_path: Path) -> None:
    early = min((run / "checkpoints").iterdir())
    levels = []
    for name, words in (("plain", ()), ("guided", ("--weak", early)), ("none", ("--weak-scale", "0"))):
        out = tmp_path / name
        trainer("sample", run, "--labels", "bee", "--seeds", "4", "--out", out, "--format", "npz", *words)
        with np.load(out / "samples.npz") as arrays:
            levels.append(arrays["levels"])
    assert not np.array_equal(levels[0], levels[1])
    np.testing.assert_array_equal(levels[0], levels[2])
    said = trainer(
        "sample", run, "--labels", "bee", "--out", tmp_path / "no", "--weak-scale", "2", code=2
    ).err
    assert "needs a weak model" in said
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    printed = trainer("evaluate", copy, "--shards", shards, "--samples-per-class", "1", "--weak", early)
    assert [line for line in printed.out.splitlines() if line in ("Samples", "Levels", "Distribution")]
    assert printed.err.startswith("note: no decoder for features of drawn was found")
    assert printed.err.splitlines()[2:] == [  # a short run in a log needs no counter
        f"the figures lie in {copy / 'evaluation.json'}",
        f"next: trainer report {copy}",
    ]
    assert json.loads((copy / "evaluation.json").read_text())["weak_scale"] == 1
    trainer("report", copy, "--weak", early, "--weak-scale", "0.5")
    for verb in (("evaluate", copy, "--shards", shards), ("report", copy)):
        assert "trained without it" in trainer(*verb, "--guidance", "2", code=2).err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--labels", "ant", "--format", "gif"], "unknown format 'gif'"),
        (["--labels", "207"], "label 207, expected 0 to 2"),
        (["--labels", "cta"], "did you mean 'cat'?"),
        (["--labels", "ant", "--seeds", "a-b"], "seeds 'a-b', expected numbers and ranges"),
        (["--labels", "ant", "--seeds", "9" * 5000], "expected numbers and ranges"),
        (["--labels", "ant", "--seeds", "5-2"], "found no number"),
        (["--labels", "ant", "--ema", "7"], "no weight average of half-life 7 kimg, there are 0.05"),
    ],
)
def test_sample_refuses(run: Path, tmp_path: Path, words: list[str], message: str) -> None:
    assert message in trainer("sample", run, "--out", tmp_path / "samples", *words, code=2).err
    assert not (tmp_path / "samples").exists()


def test_sample_needs_a_run(tmp_path: Path) -> None:
    said = trainer("sample", tmp_path, "--labels", "0", "--out", tmp_path / "samples", code=1).err
    assert "found no checkpoint" in said


def test_evaluate_then_report(run: Path, shards: str) -> None:
    values = {
        row["name"]: row["value"]
        for row in trainer("evaluate", run, "--shards", shards, "--samples-per-class", 2, "--json").json
    }
    assert undocumented(values) == []
    assert values["class_mean_chance"] == pytest.approx(1 / 3)
    assert values["class_mean_accuracy_real"] > 0.9  # the drawn classes lie 3 deviations apart
    assert values["flatness_real"] == pytest.approx(1, abs=1e-4)
    assert values["flatness_noise"] < values["flatness_real"]
    trainer("report", run, "--shards", shards)
    page = (run / "report.html").read_text()
    assert "class_mean_accuracy" in page
    assert "ant/image0000" in page


def test_evaluate_refuses_shards_of_other_features(run: Path, tmp_path: Path) -> None:
    folder = write_shards(tmp_path)
    change_index(folder, width=9)
    assert "the model was trained on" in trainer("evaluate", run, "--shards", folder, code=5).err


def test_evaluate_refuses_shards_of_another_encoder(run: Path, tmp_path: Path) -> None:
    folder = write_shards(tmp_path)
    index = json.loads((folder / "index.json").read_text())
    change_index(folder, encoder={**index["encoder"], "name": "painted"})
    for verb in ("evaluate", "report"):
        said = trainer(verb, run, "--shards", folder, code=5).err
        assert "encoder name 'painted', the model was trained on 'drawn'" in said


def test_presets_list_every_field() -> None:
    presets = trainer("presets", "--json").json
    assert list(presets)[:4] == ["tiny-cpu", "TF-S", "TF-B", "TF-L"]
    assert list(presets) == list(all_presets())
    for name, fields in presets.items():
        assert fields["preset"] == name
        flat = {k for k, v in fields.items() if not isinstance(v, dict)}
        flat |= {f"{k}.{inner}" for k, v in fields.items() if isinstance(v, dict) for inner in v}
        assert flat == set(known_fields(type(all_presets()[name]())))
    assert "tiny-cpu" in trainer("presets").out
