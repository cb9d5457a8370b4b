"""The verbs encode, edit, compare and sweep, from files to files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import trainer
from documented import undocumented
from PIL import Image
from tiny_pipeline import GRID, tiny_pipeline, tiny_run

from hierarchy_builder.errors import MismatchError, TrainerError, UsageError
from hierarchy_builder.files.whole import read_json
from trainer.evaluation.sweep import (
    EDIT,
    NO_EDIT,
    OTHER_NOISE,
    SweepConfig,
    main_region,
    summarise,
    summary_table,
    sweep,
)
from trainer.trajectories.compare import compare, edited_tokens, encoder_of, heat_map
from trainer.trajectories.photos import (
    encoded_by,
    encoder_name,
    load_own_encoder,
    read_square,
    start_from_photo,
)
from trainer.trajectories.pipeline import TrajectoryPipeline
from trainer.trajectories.selection import Selection
from trainer.trajectories.trajectory import Trajectory

ENCODER = "test_edit_commands:TinyEncoder"


class TinyEncoder:
    """What `dct` sees of a picture of 6×5 patches."""

    name = "dct"
    image_size_px = 96

    def __init__(self, weights: str = "1") -> None:
        self.gain = np.float32(weights)
        self.weights_hash = f"gain {weights}"

    def encode(self, images: np.ndarray) -> np.ndarray:
        return self.gain * encoder_of(tiny_pipeline()("ant"))(images[:, :, :80])  # type: ignore[misc]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def files(run: Path, tmp_path: Path) -> tuple[Path, Path]:
    pipe = TrajectoryPipeline.from_pretrained(run, device="cpu")
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for label, path in zip(("ant", "bee"), paths, strict=True):
        pipe(label, 3).save(path)
    return paths


def call(*words: Any) -> Any:
    return trainer(*words, "--json").json


def test_edit_takes_a_region_from_another_trajectory(files: tuple[Path, Path], tmp_path: Path) -> None:
    ours, theirs = (Trajectory.load(path) for path in files)
    target, source = ours.region(3, level=1), theirs.region(2, level=1)
    out = tmp_path / "edited.safetensors"
    found = call(
        "edit", files[0], "--level", 1, "--region", 3, "--from", files[1], "--region", 2, "--resume", "--out", out
    )  # fmt: skip
    after = Trajectory.load(out)
    assert torch.equal(after.levels[0], ours.levels[0])
    expected = theirs.levels[1, source.mask].mean(dim=0).expand(target.count, -1)
    assert torch.equal(after.levels[1, target.mask], expected)
    assert [entry["edit"] for entry in found["history"]] == ["features", "resume"]
    rows = found["levels"]
    assert [row["equal"] for row in rows] == [True, False, False, False]
    assert rows[0]["lis"] is None
    assert rows[1]["lis"] == 0.0
    assert rows[3]["lis"] > 0
    assert undocumented(rows[3]) == []
    steps = call("edit", out, "--history")
    assert [(row["step"], row["what"], row["level"]) for row in steps] == [
        (1, "edit of features", 1),
        (2, "drawn again", 1),
    ]
    back = call("edit", out, "--undo", 1, "--out", tmp_path / "back.safetensors")
    assert back["history"] == []
    assert torch.equal(Trajectory.load(tmp_path / "back.safetensors").levels, ours.levels)


def test_edit_by_shape_tokens_and_painting(files: tuple[Path, Path], tmp_path: Path) -> None:
    ours = Trajectory.load(files[0])
    painting = np.zeros((60, 50), dtype=np.uint8)
    painting[:20, :10] = 255
    Image.fromarray(painting).save(tmp_path / "mask.png")
    call(
        "edit", files[0], "--level", 2, "--mask", tmp_path / "mask.png", "--tokens", "5,4", "--from", files[1]
    )
    after = Trajectory.load(tmp_path / "a-edited.safetensors")
    assert after.history[0]["tokens"] == [0, 5, 29]
    call("edit", files[0], "--level", 0, "--region", 1, "--grow", 1)
    grown = Trajectory.load(tmp_path / "a-edited.safetensors")
    inside = ours.region(1, level=0)
    assert set(grown.history[0]["tokens"]) == set((inside.grow() - inside).tokens)
    call("edit", files[0], "--level", 1, "--near", "2,2", "--cosine", 0.999, "--invert", "--to-region", 1)
    assert 12 not in Trajectory.load(tmp_path / "a-edited.safetensors").history[0]["tokens"]


def test_resume_with_other_noise(files: tuple[Path, Path], tmp_path: Path) -> None:
    found = call("edit", files[0], "--level", 1, "--seed", 8)
    assert [row["equal"] for row in found["levels"]] == [True, True, False, False]
    assert Trajectory.load(tmp_path / "a-edited.safetensors").seeds == (3, 3, 8, 8)


def test_list_names_regions(files: tuple[Path, Path]) -> None:
    rows = call("edit", files[0], "--level", 1, "--list")
    assert sum(row["tokens"] for row in rows) == GRID[0] * GRID[1]
    assert [row["region"] for row in rows] == list(range(len(rows)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--level", 1, "--region", 30, "--to-region", 0], "has no region 30"),
        (["--level", 1, "--region", 1], "one edit at a time, found tokens, but none"),
        (["--level", 1, "--region", 1, "--to-region", 0, "--to-neighbours"], "found several"),
        (["--level", 1, "--to-region", 0], "nothing is selected: name tokens by --region"),
        (["--region", 1, "--to-region", 0], "give --level"),
        (["--resume"], "--resume needs --level"),
        ([], "nothing to do"),
        (["--undo", 1], "nothing to undo"),
        (["--level", 1, "--tokens", "9,9", "--to-region", 0], "outside the grid"),
        (["--level", 1, "--tokens", "9", "--to-region", 0], "expected row,column"),
        (["--level", 1, "--region", 1, "--prototype", 2], "--prototype needs --vocabulary"),
        (["--level", 1, *["--region", 1] * 3], "3 times --region"),
        (
            ["--level", 1, "--region", 1, "--from-region", 0, "--by", "mode"],
            "--by mode, expected mean or tokens",
        ),
    ],
)
def test_edits_that_make_no_sense(files: tuple[Path, Path], words: list[Any], message: str) -> None:
    assert message in trainer("edit", files[0], *words, code=2).err
    assert not files[0].with_name("a-edited.safetensors").exists()


def test_the_model_is_found_and_checked(files: tuple[Path, Path], run: Path, tmp_path: Path) -> None:
    other = tiny_run(tmp_path / "other", seed=1)
    words = ["edit", str(files[0]), "--level", "1", "--seed", "9"]
    trainer(*words, "--run", run)
    renamed = (other / "checkpoints" / "step-00000005").rename(other / "checkpoints" / "step-00000006")
    assert "drawn by step-00000005" in trainer(*words, "--run", renamed, code=5).err
    moved = tmp_path / "elsewhere" / "deep"
    moved.mkdir(parents=True)
    words[1] = str(files[0].rename(moved / "a.safetensors"))
    assert "if the run has moved, give --run RUN" in trainer(*words, code=1).err


def test_compare_writes_numbers_and_a_picture(files: tuple[Path, Path], tmp_path: Path) -> None:
    rows = call("compare", *files, "--out", tmp_path / "c.png")
    assert len(rows) == 4
    assert "lis" not in rows[0]
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.size[0] > 400
    rows = call("compare", *files, "--level", 1, "--tokens", "0,0 0,1")
    assert rows[0]["lis"] is None
    assert rows[1]["feature_outside"] > 0
    assert undocumented(rows[1]) == []
    assert "need --level" in trainer("compare", *files, "--tokens", "0,0", code=2).err


def test_tables_of_edits_name_what_they_are_measured_against(
    files: tuple[Path, Path], run: Path, tmp_path: Path
) -> None:
    def printed(*words: Any) -> str:
        return " ".join(trainer(*words).out.split())

    out = tmp_path / "out.safetensors"
    edit = ("edit", files[0], "--level", 1, "--region", 1, "--to-neighbours", "--out", out)
    assert "against a.safetensors as it is in the file" in printed(*edit)
    assert "against a.safetensors without the edit, drawn again after level 1 with the same noise" in printed(
        *edit, "--resume"
    )
    assert "of out.safetensors against a.safetensors" in printed("compare", files[0], out)
    table = printed("sweep", run, "--labels", "ant", "--seeds", "0", "--levels", "1", "--strengths", "0,1")
    assert "compared with the unedited trajectory" in table
    assert "any" in table


def test_edited_tokens_are_those_since() -> None:
    start = tiny_pipeline()("ant", 1)
    corner = Selection.from_coordinates([(0, 0)], grid=GRID, level=1)
    other = Selection.from_coordinates([(1, 1)], grid=GRID, level=1)
    first = start.edit_features(corner, torch.ones(48))
    second = first.edit_features(other, torch.ones(48)).edit_features(other.at(3), torch.ones(48))
    assert edited_tokens(start) is None
    assert edited_tokens(second).tokens == [0, 6]  # type: ignore[union-attr]
    assert edited_tokens(second, first).tokens == [6]  # type: ignore[union-attr]
    assert [row["lis"] for row in compare(first, second)][1:] == [0.0, 0.0, 0.0]
    colours = heat_map(np.array([[0.0, 1.0, 2.0]]), 1.0)
    assert colours[0, 0].tolist() == [12, 12, 40]
    assert colours[0, 1].tolist() == colours[0, 2].tolist() == [255, 252, 220]


def test_sweep_has_baselines_and_intervals(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep.json"
    words = [
        "--labels",
        "ant",
        "--seeds",
        "0-1",
        "--levels",
        "1-2",
        "--strengths",
        "0,1",
        "--out",
        out,
        "--quiet",
    ]
    found = call("sweep", run, *words)
    assert read_json(out, sealed=True) == found
    assert undocumented([*found["rows"][0], *found["summary"][0]]) == []
    # seeds × (levels measured from 1, from 2) × strengths × arms
    assert len(found["rows"]) == 2 * (3 + 2) * 2 * 3
    by = {(row["level"], row["strength"], row["arm"], row["measured"]): row for row in found["summary"]}
    for (level, strength, arm, measured), line in by.items():
        assert line["units"] == 2
        if measured == level or arm == NO_EDIT or (arm == EDIT and strength == 0):
            assert line["lis_mean"] == pytest.approx(0, abs=1e-9)
        else:
            assert line["lis_low"] < line["lis_mean"] < line["lis_high"]
        if arm == EDIT and measured == level:
            assert (line["gain_mean"] > 0) == (strength > 0)
    assert by[1, 1.0, EDIT, 1]["reached_mean"] == pytest.approx(1.0)
    assert {line["arm"] for line in found["summary"]} == {EDIT, NO_EDIT, OTHER_NOISE}


def test_sweep_of_shapes_and_wrong_requests() -> None:
    pipe = tiny_pipeline()
    rows = list(sweep(pipe, SweepConfig(labels=(0,), seeds=(0,), levels=(1,), kind="shape")))
    assert {row["measured"] for row in rows} == {1, 2, 3}
    inside = main_region(pipe(0, 0), 1)
    assert rows[0]["tokens"] == (inside.grow() - inside).count
    table = summary_table(summarise(rows))
    assert [row["arm"] for row in table] == [EDIT, NO_EDIT, OTHER_NOISE] * 3
    assert [row["measure"] for row in table[::3]] == ["lis", "gain", "pixel_outside"]
    assert all(math.isnan(line["lis_std"]) for line in summarise(rows))
    with pytest.raises(UsageError, match="level 4, expected 0 to 3"):
        list(sweep(pipe, SweepConfig(labels=(0,), levels=(4,))))
    with pytest.raises(UsageError, match="kind 'colour', expected one of features, shape"):
        list(sweep(pipe, SweepConfig(labels=(0,), kind="colour")))  # type: ignore[arg-type]


def test_photograph_from_a_file(run: Path, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (120, 200, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "photo.png")
    out = tmp_path / "start.safetensors"
    words = ["encode", run, "--photo", tmp_path / "photo.png", "--encoder", ENCODER, "--out", out]
    found = call(*words, "--label", "bee", "--seed", 5)
    assert found["origin"] == {"source": "photo", "name": "photo.png", "encoder": "dct"}
    start = Trajectory.load(out)
    expected = TinyEncoder().encode(read_square(tmp_path / "photo.png", 96)[None])[0]
    assert np.array_equal(start.levels[3].numpy(), expected)
    call(*words, "--label", "bee", "--weights", "2")
    assert np.array_equal(Trajectory.load(out).levels[3].numpy(), 2 * expected)
    assert (
        call("edit", out, "--level", 0, "--region", 1, "--to-neighbours", "--resume")["levels"][0]["lis"] == 0
    )
    assert "--photo needs --label" in trainer(*words, code=2).err
    assert "give one of them" in trainer("encode", run, "--out", out, code=2).err
    (tmp_path / "photo.png").write_bytes(b"text")
    with pytest.raises(TrainerError, match="is not a picture"):
        read_square(tmp_path / "photo.png", 96)
    for name in ("json", "json:nothing", "nowhere:at_all", "collections:OrderedDict"):
        with pytest.raises(UsageError, match="encoder"):
            load_own_encoder(name)


def test_the_run_names_the_encoder_of_a_photograph_and_may_not_choose_code() -> None:
    pipe = tiny_pipeline()
    assert load_own_encoder(encoder_name(pipe)).name == "dct"
    pipe.encoder["name"] = "os:getcwd"
    with pytest.raises(UsageError, match="name it by --encoder"):
        encoder_name(pipe)


def test_a_photograph_is_refused_with_weights_that_the_model_was_not_trained_on(tmp_path: Path) -> None:
    Image.fromarray(np.full((96, 96, 3), 128, dtype=np.uint8)).save(tmp_path / "photo.png")
    pipe = tiny_pipeline()
    pipe.encoder = {**pipe.encoder, "weights_hash": "gain 1"}
    start_from_photo(pipe, tmp_path / "photo.png", TinyEncoder("1"), label="bee")
    with pytest.raises(
        MismatchError, match=r"encoded by weights 'gain 2'.*trained on.*'gain 1'.*--weights"
    ) as refusal:
        start_from_photo(pipe, tmp_path / "photo.png", TinyEncoder("2"), label="bee")
    assert refusal.value.exit_code == 5
    with pytest.raises(TrainerError, match=r"encoder '.*' failed on a batch of 1 images: .*Error: "):
        encoded_by(TinyEncoder("1"), np.zeros((1, 7, 7), np.uint8))
    with pytest.raises(TrainerError, match=r"returned features of shape \(\) for 1 images"):
        encoded_by(Speechless(), np.zeros((1, 7, 7, 3), np.uint8))


class Speechless(TinyEncoder):
    def encode(self, images: np.ndarray) -> np.ndarray:
        return np.float32(0)
