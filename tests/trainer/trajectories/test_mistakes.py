"""Slips of a user: labels, seeds and places that make no sense are messages, and leave nothing behind."""

from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path

import numpy as np
import pytest
from command_line import code_and_error as call
from fixture_shards import change_index, write_shards
from PIL import Image
from tiny_pipeline import tiny_pipeline, tiny_run

from hierarchy_builder.errors import BuilderError, TrainerError, UsageError, explained
from trainer.metrics.frechet import read_reference
from trainer.trajectories.compare import encoder_of
from trainer.trajectories.edit import prototype
from trainer.trajectories.pipeline import TrajectoryPipeline
from trainer.trajectories.sample_files import FORMATS, write_samples

NAMES = ["tench, Tinca tinca", "tench", "<b>Käse</b> & 'Brot'", "日本語 %s", "2", '100 %, "weiß"']


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def file(run: Path) -> Path:
    """One trajectory of the run."""
    TrajectoryPipeline.from_pretrained(run)("bee", seed=1).save(run / "bee.safetensors")
    return run / "bee.safetensors"


def odd_pipeline() -> TrajectoryPipeline:
    """Three classes of odd names at a time are enough: the network has three."""
    pipe = tiny_pipeline()
    pipe.class_names = NAMES
    pipe.model.config = dataclasses.replace(pipe.model.config, num_classes=len(NAMES))
    return pipe


def test_names_may_hold_commas_and_look_like_numbers() -> None:
    pipe = odd_pipeline()
    assert pipe.label_ids(",".join(NAMES)) == [0, 1, 2, 3, 4, 5]
    assert pipe.label_ids("tench, tench, Tinca tinca ,2, 0") == [1, 0, 4, 0]
    for text in ("", "tench,", "Tinca tinca", "9", "-1", "1.5"):
        with pytest.raises(UsageError):
            pipe.label_ids(text)


def test_pages_escape_names_of_classes(tmp_path: Path) -> None:
    pipe = odd_pipeline()
    trajectories = [pipe(label, 0) for label in (0, 1, 2)]
    for trajectory, name in zip(trajectories, (NAMES[2], NAMES[5], "<script>alert(1)</script>"), strict=True):
        trajectory.class_name = name
    list(write_samples(trajectories, tmp_path, ["html"], 3, {"run": "<i>run</i>"}))
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    for name in ("<b>Käse", "<script>alert", "<i>run"):
        assert name not in page
    assert "&lt;b&gt;Käse&lt;/b&gt; &amp;" in page


@pytest.mark.parametrize("name", FORMATS)
def test_an_output_that_cannot_be_written(run: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("a file")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none/x")):
        code, error = call("sample", run, "--labels", "ant", "--seeds", "0", "--format", name, "--out", out)
        assert code == 1
        assert error.startswith("error: /")
        assert "; " in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("png", "grid.png"),
        ("html", "index.html"),
        ("webdataset", "samples-000000.tar"),
        ("npz", "samples.npz"),
        ("safetensors", "trajectories/label0000-seed000000.safetensors"),
    ],
)
def test_a_name_that_a_folder_has_leaves_nothing_half_written(
    run: Path, tmp_path: Path, name: str, taken: str
) -> None:
    (tmp_path / taken).mkdir(parents=True)
    before = set(tmp_path.rglob("*"))
    code, error = call("sample", run, "--labels", "ant", "--seeds", "0", "--format", name, "--out", tmp_path)
    assert code == 1
    assert taken in error
    assert set(tmp_path.rglob("*")) == before


def test_files_of_edits_at_impossible_places(run: Path, file: Path, tmp_path: Path) -> None:
    edit = ("edit", file, "--level", "1", "--tokens", "1,1", "--from-region", "1", "--out")
    for words in (
        edit,
        ("compare", file, file, "--out"),
        ("sweep", run, "--labels", "0", "--seeds", "0", "--out"),
    ):
        code, error = call(*words, tmp_path)
        assert code == 1
        assert "is a folder, expected the name of a file" in error
        assert list(tmp_path.iterdir()) == []


def test_a_comparison_is_a_png_whatever_its_name(file: Path, tmp_path: Path) -> None:
    assert call("compare", file, file, "--out", tmp_path / "change")[0] == 0
    assert Image.open(tmp_path / "change").format == "PNG"


@pytest.mark.parametrize("strengths", ["a,b", "", "nan", "1,inf"])
def test_strengths_that_are_none(run: Path, strengths: str) -> None:
    code, error = call("sweep", run, "--strengths", strengths)
    assert code == 2
    assert f"strengths are {strengths!r}, expected numbers" in error


def test_samples_that_are_not_finite_are_not_written(run: Path, tmp_path: Path) -> None:
    words = ("--labels", "bee", "--seeds", "3", "--weak", run, "--ema", "raw", "--weak-scale", "1e39")
    code, error = call("sample", run, *words, "--out", tmp_path / "samples")
    assert code == 1
    assert "levels of bee, seed 3, hold NaN or infinity: lower guidance" in error
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize("seed", [-1, 2**32, 10**20])
def test_a_photograph_gets_a_seed_that_can_be_drawn(seed: int) -> None:
    features = np.zeros((6, 5, 48), np.float32)
    with pytest.raises(UsageError, match=f"seed {seed}, expected 0 to 4294967295"):
        tiny_pipeline().from_features(features, label=0, seed=seed)


def test_arrays_that_are_something_else(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no array")
    np.save(tmp_path / "one.npy", np.zeros(3), allow_pickle=False)
    np.savez(tmp_path / "other.npz", allow_pickle=False, a=np.zeros(3))
    for name in ("text", "one.npy", "other.npz"):
        for read in (lambda path: prototype(path, 0), read_reference):
            with pytest.raises(TrainerError, match=rf"{name}.*: (it is no npz|it holds no|holds )") as caught:
                read(tmp_path / name)
            assert "pickle" not in str(caught.value)


def test_pictures_of_another_size_are_judged_by_the_same_encoder() -> None:
    trajectory = tiny_pipeline()("bee", seed=1)
    pictures = trajectory.decode()
    trajectory.encoder = {**trajectory.encoder, "image_size_px": 96}
    encode = encoder_of(trajectory)
    assert encode is not None
    tall = np.repeat(pictures, 2, axis=2)
    square = np.asarray([Image.fromarray(picture).resize((96, 96)) for picture in tall])
    assert encode(square[:, ::2, ::2]).shape == encode(square).shape


def test_a_studio_needs_a_vocabulary_of_the_model(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the extra `studio` is not installed")
    np.savez(tmp_path / "other.npz", allow_pickle=False, centroids_0=np.zeros((5, 7)))
    (tmp_path / "text").write_text("no vocabulary")
    for name, expected, message in (
        ("text", 1, "it is no npz file"),
        ("other.npz", 5, "prototypes of 7 channels"),
    ):
        code, error = call("studio", run, "--vocabulary", tmp_path / name, "--folder", tmp_path / "studio")
        assert code == expected
        assert message in error


def test_few_images_are_no_two_halves(run: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", num_samples=3)
    other = tiny_run(tmp_path / "run")
    (state,) = other.rglob("state.json")
    content = json.loads(state.read_text())
    change_index(shards, encoder=content["shards"]["encoder"], grid=[6, 5], width=48)
    code, error = call("evaluate", other, "--shards", shards)
    assert code == 1
    assert "holds 3 images, expected 4 or more" in error


def test_what_the_system_says_comes_with_a_next_step() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/data/run")
    assert (
        explained(full) == "/data/run: No space left on device; make room, then give the same command again"
    )
    without_place = OSError(errno.ENOSPC, "No space left on device")
    assert explained(without_place).endswith("on device; make room, then give the same command again")
    assert explained(OSError("no number")) == "no number"
    assert explained(OSError(errno.EIO, "Input/output error", "/x")) == "/x: Input/output error"


class FullEncoder:
    """An encoder that ends as the builder's own encoders end where memory runs out."""

    name = "dct"
    image_size_px = 96

    def encode(self, images: np.ndarray) -> np.ndarray:
        raise BuilderError(
            f"no memory for {len(images)} images: expected room for one, use a smaller encoder"
        )


def test_an_error_of_the_builder_is_a_message_of_the_trainer(run: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "p.png")
    words = ("--photo", tmp_path / "p.png", "--encoder", "test_mistakes:FullEncoder", "--label", "0")
    code, error = call("encode", run, *words, "--out", tmp_path / "t.safetensors")
    assert code == 1
    assert error == "error: no memory for 1 images: expected room for one, use a smaller encoder\n"
