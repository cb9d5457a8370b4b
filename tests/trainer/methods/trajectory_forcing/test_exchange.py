"""Checkpoints of the release become run folders that sample and train on, and become equal files again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from command_line import SETTINGS, call
from fixture_shards import CLASS_NAMES, GRID, NUM_LEVELS, WIDTH, write_shards
from released import changed, save_checkpoint

from hierarchy_builder.errors import MismatchError, TrainerError, UsageError
from hierarchy_builder.files.whole import sealed_text
from trainer.methods.trajectory_forcing import exchange
from trainer.methods.trajectory_forcing.exchange import export_official, import_official
from trainer.methods.trajectory_forcing.network import TrajectoryTransformer
from trainer.methods.trajectory_forcing.release import (
    SIZES,
    config_of,
    load_checkpoint,
    official_config,
    official_shapes,
    read_config,
)
from trainer.methods.trajectory_forcing.sample import sample_levels
from trainer.networks.config import ModelConfig
from trainer.seeds import level_noise
from trainer.training import checkpoint as saved
from trainer.training.run_folder import locked
from trainer.trajectories.pipeline import TrajectoryPipeline


def content(file: Path) -> Any:
    return msgpack.unpackb(file.read_bytes(), raw=False, strict_map_key=False)


def official_file(folder: Path, **fields: Any) -> Path:
    """A checkpoint file of the release for the shards of the tests, with its configuration beside it."""
    shape: dict[str, Any] = {
        "grid": GRID,
        "in_channels": WIDTH,
        "num_classes": len(CLASS_NAMES),
        "num_levels": NUM_LEVELS,
    }
    config = ModelConfig(**shape, width=16, depth=2, head_depth=1, num_heads=2, **fields)
    torch.manual_seed(0)
    model = TrajectoryTransformer(config)
    average = {name: p + 1 for name, p in model.named_parameters()}
    folder.mkdir(exist_ok=True)
    save_checkpoint(model, folder / "checkpoint_5", averages={"500": average, "1000": average}, step=5)
    (folder / "config.json").write_text(json.dumps(official_config(config)))
    return folder / "checkpoint_5"


def test_a_round_trip_is_exact(golden: Path, tmp_path: Path) -> None:
    file = golden / "flax" / "checkpoint_1234"
    held = import_official(file, tmp_path / "run", ema="1000")
    assert (held["step"], held["images_seen"], held["averages"]) == (
        1234,
        1234 * 1024,
        ["1000", "500", "2000"],
    )
    written = export_official(tmp_path / "run", tmp_path / "back")
    assert content(Path(written["file"])) == content(file)  # weights, averages, optimiser and step
    given, back = (json.loads((f / "config.json").read_text()) for f in (golden, tmp_path / "back"))
    assert held["batch_size_from"].startswith("preset TF-B, as the file does not say")
    assert back.pop("batch_size") == held["batch_size"] == 1024
    assert {name: back[name] for name in back} == {name: given[name] for name in back}


def test_an_imported_folder_samples_with_the_average_asked_for(golden: Path, tmp_path: Path) -> None:
    file = golden / "flax" / "checkpoint_1234"
    import_official(file, tmp_path / "run", ema="2000")
    pipe = TrajectoryPipeline.from_pretrained(tmp_path / "run", device="cpu")
    model = load_checkpoint(file, golden / "config.json", ema=2000)
    c = model.config
    noise = level_noise([3], c.num_levels, c.grid, c.in_channels)
    assert torch.equal(pipe(7, 3).levels, sample_levels(model, torch.tensor([7]), noise)[0])


def test_training_goes_on_with_the_optimiser_of_the_file(
    golden: Path,
    tmp_path: Path,
) -> None:
    import_official(golden / "flax" / "checkpoint_1234", tmp_path / "run")
    folder = saved.find_checkpoint(tmp_path / "run")
    tensors, state = saved.load_tensors(folder / saved.OPTIMIZER), saved.load_state(folder)
    opt = content(golden / "flax" / "checkpoint_1234")["opt_state"]["inner_states"]
    stored = opt["muon"]["inner_state"]["0"]["mu"]["net"]["u_final_layer"]["linear"]["_flax_linear"]["kernel"]
    shape, _, data = msgpack.unpackb(stored.data, raw=False)
    expected = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(shape)
    assert torch.equal(tensors["momentum/u_out.weight"], expected.mT)
    assert {name.partition("/")[0] for name in tensors} == {"momentum", "square"}
    assert [group["step"] for group in state.optimizer] == [0, 0]  # as its counters stand in the file


def test_a_run_goes_on_in_the_imported_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, run = official_file(tmp_path / "theirs"), tmp_path / "run"
    shards = write_shards(tmp_path / "shards", num_samples=1024, per_shard=512)  # one batch of the release
    assert call("import-official", file, "--out", run, "--ema", "500", "--encoder", "drawn", "--json") == 0
    assert json.loads(capsys.readouterr().out)["averages"] == ["500", "1000"]
    more = ["--total-images", 6 * 1024, "--set", "micro_batch_size=256", "--quiet", "--json"]
    assert call("import-official", file, "--out", tmp_path / "foreign") == 0  # of the release's encoder
    assert call("report", tmp_path / "foreign") == 0
    assert "unknown images" in (tmp_path / "foreign" / "report.html").read_text()
    assert call("train", shards, "--out", tmp_path / "foreign", *more) == 5
    assert "shards.encoder: 'dinov2-reg-base' there, 'drawn' now" in capsys.readouterr().err
    assert call("train", shards, "--out", run, *more) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 6
    assert call("sample", run, "--labels", "ant", "--seeds", "0", "--out", tmp_path / "samples") == 0
    # From now on the run has shards of its own.
    other = write_shards(tmp_path / "other", num_samples=1025, per_shard=513)
    assert call("train", other, "--out", run, *more) == 5
    assert "shards.num_samples: 1024 there, 1025 now" in capsys.readouterr().err


def test_a_trained_run_can_be_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, shards = tmp_path / "run", write_shards(tmp_path / "shards")
    words = [
        "--preset",
        "tiny-cpu",
        *SETTINGS,
        "--batch-size",
        "8",
        "--total-images",
        "16",
        "--quiet",
        "--set",
        "model.patch_size=1",
        "--set",
        "model.start=zeros",
        "--set",
        "normalise=none",
    ]
    assert call("train", shards, "--out", run, *words) == 0
    capsys.readouterr()
    assert call("export-official", run, "--out", tmp_path / "theirs", "--json") == 0
    written = json.loads(capsys.readouterr().out)
    assert written["file"] == str(tmp_path / "theirs" / "checkpoint_2")
    model = load_checkpoint(written["file"], tmp_path / "theirs" / "config.json", ema=None)
    weights = saved.load_weights(saved.find_checkpoint(run), None)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert call("import-official", written["file"], "--out", tmp_path / "again", "--json") == 0
    held = json.loads(capsys.readouterr().out)
    assert (held["step"], held["images_seen"], held["batch_size_from"]) == (2, 16, "config.json")
    first, second = (saved.find_checkpoint(folder) for folder in (run, tmp_path / "again"))
    for name in (saved.OPTIMIZER, saved.MODEL, "ema-0.05.safetensors"):
        before, after = saved.load_tensors(first / name), saved.load_tensors(second / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), name


def test_normalised_features_have_no_place_in_the_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, shards = tmp_path / "run", write_shards(tmp_path / "shards")
    words = ["--preset", "tiny-cpu", *SETTINGS, "--batch-size", "8", "--total-images", "8", "--quiet"]
    assert call("train", shards, "--out", run, *words, "--set", "normalise=channel") == 0
    assert call("export-official", run, "--out", tmp_path / "theirs") == 5
    assert "trained with normalise=channel" in capsys.readouterr().err
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--ema", "750"], 5, "holds no weight average 750; it holds: 500, 1000"),
        (["--config", "absent.json"], 2, "absent.json does not exist"),
    ],
)
def test_import_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    file = official_file(tmp_path / "theirs")
    assert call("import-official", file, "--out", tmp_path / "run", *words) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_import_refuses_files_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, run = official_file(tmp_path / "theirs"), tmp_path / "run"
    config = json.loads((file.parent / "config.json").read_text())
    for fields, code, message in (
        ({"hidden_size": 32}, 5, "in_channels 3 and hidden_size 16"),
        ({"num_classes": 9}, 5, "the checkpoint has num_classes 3"),
        ({"num_levels": 6}, 5, "the checkpoint has num_levels 4"),
        ({"num_heads": "many"}, 2, "num_heads"),
    ):
        (file.parent / "config.json").write_text(json.dumps(config | fields))
        assert call("import-official", file, "--out", run) == code
        assert message in capsys.readouterr().err
        assert saved.latest_checkpoint(run) is None
    (file.parent / "config.json").write_text(json.dumps(config))
    shutil.copy(file, tmp_path / "cut")
    with open(tmp_path / "cut", "r+b") as cut:
        cut.truncate(file.stat().st_size - 100)
    assert (
        call("import-official", tmp_path / "cut", "--out", run, "--config", file.parent / "config.json") == 5
    )
    assert "cut is truncated or not a checkpoint" in capsys.readouterr().err
    assert call("import-official", file, "--out", run) == 0
    assert call("import-official", file, "--out", run) == 2
    assert (
        "holds a run, its checkpoints or config.yaml; import into another folder" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("step",), "five", "found 'five' where a number of steps belongs"),
        (("opt_state",), "text", "found str where an array belongs"),
        (
            ("opt_state", "inner_states", "muon", "inner_state", "0", "count"),
            {},
            "opt_state is not that of Muon",
        ),
        (("opt_state", "inner_states", "adam", "inner_state", "0", "nu"), {}, "net/class_tokens is missing"),
        (("ema_params", "2000"), {}, "does not fit the network"),
        (("ema_params", "../x"), {}, "holds the weight average '../x', expected half-lives"),
    ],
)
def test_a_file_damaged_within_leaves_no_run(
    golden: Path,
    tmp_path: Path,
    place: tuple[str, ...],
    value: Any,
    message: str,
) -> None:
    file = changed(golden, tmp_path / "file", value, place)
    with pytest.raises(MismatchError, match=message):
        import_official(file, tmp_path / "run", golden / "config.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "run").mkdir()
    with pytest.raises(MismatchError, match=message):
        import_official(file, tmp_path / "run", golden / "config.json")
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] in (
        [],
        [tmp_path / "run" / ".lock"],
    )


def test_files_need_a_step_and_weights_and_may_hold_more(golden: Path, tmp_path: Path) -> None:
    whole = content(golden / "flax" / "checkpoint_1234")
    config = golden / "config.json"
    for lacking, message in (("step", "it holds no step"), ("params", "it holds no weights")):
        parts = {name: part for name, part in whole.items() if name != lacking}
        (tmp_path / "file").write_bytes(msgpack.packb(parts))
        with pytest.raises(MismatchError, match=f"not a checkpoint of the release: {message}"):
            import_official(tmp_path / "file", tmp_path / "run", config, ema="500")
    (tmp_path / "file").write_bytes(msgpack.packb(whole | {"batch_stats": {"count": 5}}))
    assert import_official(tmp_path / "file", tmp_path / "run", config)["step"] == 1234


def test_a_file_alone_is_read_by_its_shapes(golden: Path, tmp_path: Path) -> None:
    (tmp_path / "alone" / "here").mkdir(parents=True)
    file = Path(shutil.copy(golden / "flax" / "checkpoint_1234", tmp_path / "alone" / "here"))
    held = import_official(file, tmp_path / "run", golden / "config.json")
    (file.parent / "config.json").write_text('{"hidden_size": 768}')  # of a decoder, and so passed over
    bare = import_official(file, tmp_path / "bare")
    assert "no config.json" in bare["sizes_from"]
    assert bare["network"] == held["network"]
    assert bare["class_names"] == "numbers, as the file has no names"
    first, second = (saved.load_state(saved.find_checkpoint(tmp_path / name)) for name in ("run", "bare"))
    assert first.config["model"] == second.config["model"]
    damaged = changed(golden, tmp_path / "alone" / "here" / "damaged", {}, ("params", "net", "class_tokens"))
    with pytest.raises(
        MismatchError, match=r"net/class_tokens is missing .* TF-B, TF-L or TF-H release\. The auth"
    ):
        import_official(damaged, tmp_path / "no")
    torch.save({"model": {}}, damaged)
    with pytest.raises(MismatchError, match=r"which is one msgpack file .*huggingface\.co/mervekocabas/Traj"):
        import_official(damaged, tmp_path / "no")


@pytest.mark.parametrize("letter", ["B", "L", "H"])
def test_the_released_sizes_are_recognised_by_shapes(letter: str) -> None:
    width, depth, heads = SIZES[letter]
    shape = {"grid": (16, 16), "in_channels": 768, "num_classes": 1000, "num_levels": 4}
    with torch.device("meta"):
        model = TrajectoryTransformer(ModelConfig(**shape, width=width, depth=depth, num_heads=heads))
    arrays = {name: torch.empty(shape, device="meta") for name, shape in official_shapes(model).items()}
    fields = config_of(arrays, "checkpoint")
    assert fields["model_str"] == f"pmfDiT_{letter}_16"
    assert read_config(fields) == model.config
    names = exchange._class_names(1000)
    assert (names[0], names[1], len(set(names))) == ("tench", "goldfish", 1000)


def test_import_keeps_what_is_there(tmp_path: Path) -> None:
    file = official_file(tmp_path / "theirs")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("of: something else")
    with pytest.raises(UsageError, match=r"holds a run, its checkpoints or config\.yaml"):
        import_official(file, tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").read_text() == "of: something else"


def test_configuration_next_to_a_linked_checkpoint_is_found(tmp_path: Path) -> None:
    file = official_file(tmp_path / "theirs")
    (tmp_path / "store").mkdir()
    blob = file.rename(tmp_path / "store" / "0f3a")
    file.symlink_to(blob)
    assert import_official(file, tmp_path / "run")["step"] == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {}}, r"model\.safetensors does not fit the network: .* has shape"),
        ({"optimizer": []}, "its optimiser is not that of Muon with Adam for this network"),
        ({"optimizer": [{}, {}]}, "its optimiser is not that of Muon with Adam for this network"),
        ({"config": {"method_name": "latent-forcing"}}, "found a run of latent-forcing, expected one of"),
    ],
)
def test_a_checkpoint_that_does_not_fit_itself_is_not_exported(
    golden: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    import_official(golden / "flax" / "checkpoint_1234", tmp_path / "run")
    file = saved.find_checkpoint(tmp_path / "run") / saved.STATE
    file.write_bytes(sealed_text(json.loads(file.read_text()) | changes))
    with pytest.raises(MismatchError, match=message):
        export_official(tmp_path / "run", tmp_path / "theirs")
    assert not list(tmp_path.glob("theirs/*"))


def test_export_says_which_checkpoint_it_passes_over(
    golden: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import_official(golden / "flax" / "checkpoint_1234", tmp_path / "run")
    saved.checkpoint_folder(tmp_path / "run", 1235).mkdir()
    assert export_official(tmp_path / "run", tmp_path / "theirs")["step"] == 1234
    assert capsys.readouterr().err.endswith("; taking step-00001234 instead\n")


def test_export_overwrites_no_folder(golden: Path, tmp_path: Path) -> None:
    import_official(golden / "flax" / "checkpoint_1234", tmp_path / "run")
    (tmp_path / "theirs" / "config.json").mkdir(parents=True)
    with pytest.raises(TrainerError, match=r"config\.json is a folder, expected the name of a file"):
        export_official(tmp_path / "run", tmp_path / "theirs")
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["config.json"]


def test_an_import_that_fails_keeps_what_another_program_put_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(run: Path, content: Any) -> None:
        (run / "notes.txt").write_text("mine")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exchange, "write_config", full_disk)
    with pytest.raises(OSError, match="No space left"):
        import_official(official_file(tmp_path / "theirs"), tmp_path / "run")
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_of_two_imports_into_one_folder_the_first_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, run = official_file(tmp_path / "theirs"), tmp_path / "run"
    written: dict[Path, bytes] = {}

    def overtaken(folder: Path) -> Any:
        monkeypatch.undo()
        import_official(file, folder)
        written.update({path: path.read_bytes() for path in run.rglob("*") if path.is_file()})
        return locked(folder)

    monkeypatch.setattr(exchange, "locked", overtaken)
    with pytest.raises(TrainerError, match="step-00000005 exists, nothing was written there"):
        import_official(file, run)
    assert written
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == written
