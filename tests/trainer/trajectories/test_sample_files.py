"""Samples as files: every format holds the same trajectories, in any number, whole or not at all."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from tiny_pipeline import GRID, tiny_pipeline

from hierarchy_builder.errors import TrainerError, UsageError
from trainer.methods.trajectory_forcing.pipeline import TrajectoryForcingPipeline
from trainer.trajectories import sample_files
from trainer.trajectories.pipeline import TrajectoryPipeline
from trainer.trajectories.sample_files import FORMATS, parse_formats, write_samples
from trainer.trajectories.trajectory import Trajectory

LABELS, SEEDS = ["ant", "bee", "ant", "emu", "bee"], [0, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def pipe() -> TrajectoryPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def drawn(pipe: TrajectoryPipeline) -> list[Trajectory]:
    return pipe(LABELS, SEEDS)


def write(out: Path, formats: list[str], trajectories: list[Trajectory]) -> list[dict]:
    return list(write_samples(trajectories, out, formats, len(trajectories), {"run": "tiny"}))


def test_arrays_hold_levels_and_pictures(drawn: list[Trajectory], tmp_path: Path) -> None:
    rows = write(tmp_path / "out", ["npz"], drawn)
    assert [(row["class"], row["seed"]) for row in rows] == list(zip(LABELS, SEEDS, strict=True))
    with np.load(tmp_path / "out" / "samples.npz", allow_pickle=False) as arrays:
        assert arrays["label"].tolist() == [0, 1, 0, 2, 1]
        assert arrays["seed"].tolist() == SEEDS
        np.testing.assert_array_equal(arrays["levels"], np.stack([t.levels for t in drawn]))
        np.testing.assert_array_equal(arrays["pictures"], np.stack([t.decode()[-1] for t in drawn]))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["samples.npz"]


def test_tars_are_read_by_webdataset(
    drawn: list[Trajectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_files, "PER_TAR", 2)
    write(tmp_path, ["webdataset"], drawn)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"samples-{n:06d}.tar" for n in range(3)]
    tars = str(tmp_path / "samples-{000000..000002}.tar")
    read = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    assert [(item["cls"], item["json"]["seeds"][0]) for item in read] == [
        (0, 0),
        (1, 1),
        (0, 2),
        (2, 3),
        (1, 4),
    ]
    for item, trajectory in zip(read, drawn, strict=True):
        np.testing.assert_array_equal(item["canvases.npy"], trajectory.levels.numpy().astype(np.float16))
        np.testing.assert_array_equal(item["png"], trajectory.decode()[-1])


@pytest.mark.parametrize("name", ["webdataset", "npz", "safetensors"])
def test_equal_samples_give_equal_bytes(drawn: list[Trajectory], tmp_path: Path, name: str) -> None:
    written = []
    for number in range(4):  # the order of metadata and the time of the files must not show
        rows = write(tmp_path / str(number), [name], drawn)
        files = sorted(path for path in (tmp_path / str(number)).rglob("*") if path.is_file())
        written.append([(path.name, path.read_bytes()) for path in files])
        assert rows
    assert all(each == written[0] for each in written)
    if name == "npz":
        with zipfile.ZipFile(tmp_path / "0" / "samples.npz") as archive:
            assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize(("per_sheet", "names"), [(5, [""]), (2, ["-0000", "-0001", "-0002"])])
def test_many_trajectories_take_several_sheets_and_pages(
    drawn: list[Trajectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_sheet: int, names: list[str]
) -> None:
    monkeypatch.setattr(sample_files, "PER_SHEET", per_sheet)
    write(tmp_path, ["png", "html"], drawn)
    expected = [f"grid{name}.png" for name in names] + [f"index{name}.html" for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected
    assert "bee" in (tmp_path / expected[-1]).read_text()
    assert Image.open(tmp_path / expected[0]).height >= Image.open(tmp_path / expected[len(names) - 1]).height


def test_trajectories_are_written_as_they_come(pipe: TrajectoryPipeline, tmp_path: Path) -> None:
    asked: list[int] = []

    def counted() -> Iterator[Trajectory]:
        for trajectory in pipe.stream("ant", range(4)):
            asked.append(trajectory.seeds[0])
            yield trajectory

    rows = write_samples(counted(), tmp_path / "out", ["safetensors", "npz"], 4, {})
    assert not (tmp_path / "out").exists()
    first = next(rows)
    assert asked == [0]
    assert Trajectory.load(first["file"]).class_name == "ant"
    assert len(list(rows)) == 3


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_finished_is_removed(drawn: list[Trajectory], tmp_path: Path, name: str) -> None:
    def failing() -> Iterator[Trajectory]:
        yield drawn[0]
        raise UsageError("stop")

    with pytest.raises(UsageError, match="stop"):
        list(write_samples(failing(), tmp_path, [name], 5, {}))
    kept = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert kept == ([Path("trajectories/label0000-seed000000.safetensors")] if name == "safetensors" else [])
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_a_format_that_cannot_be_finished_leaves_the_others_whole(
    drawn: list[Trajectory], tmp_path: Path
) -> None:
    (tmp_path / "grid.png").mkdir()
    with pytest.raises(TrainerError, match=r"grid\.png is a folder"):
        write(tmp_path, ["npz", "png"], drawn)
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays["seed"].tolist() == SEEDS


def test_samples_without_a_decoder_have_no_pictures(drawn: list[Trajectory], tmp_path: Path) -> None:
    for trajectory in pipe_without_decoder()(LABELS[:2], SEEDS[:2]):
        assert not trajectory.can_decode
    write(tmp_path, ["npz", "webdataset", "png"], pipe_without_decoder()(LABELS[:2], SEEDS[:2]))
    with np.load(tmp_path / "samples.npz") as arrays:
        assert sorted(arrays) == ["label", "levels", "seed"]
    item = next(iter(webdataset.WebDataset(str(tmp_path / "samples-000000.tar"), shardshuffle=False)))
    assert "png" not in item
    assert json.loads(item["json"])["class_name"] == "ant"


def pipe_without_decoder() -> TrajectoryPipeline:
    pipe = tiny_pipeline()
    return TrajectoryForcingPipeline(pipe.model, pipe.class_names, {"name": "other"})


def test_formats_are_named() -> None:
    assert parse_formats("png, npz,png") == ["png", "npz"]
    with pytest.raises(UsageError, match="unknown format 'gif', expected one or more of png, html"):
        parse_formats("png,gif")


def test_a_page_of_one_trajectory(drawn: list[Trajectory], tmp_path: Path) -> None:
    text = drawn[1].to_html(tmp_path / "bee.html")
    assert (tmp_path / "bee.html").read_text() == text
    assert "bee" in text
    assert text.count("data:image") >= 2 * len(drawn[1].levels)
    assert 'src="http' not in text


def test_one_level_decoded_is_that_of_all(drawn: list[Trajectory]) -> None:
    np.testing.assert_array_equal(drawn[0].decode(level=2), drawn[0].decode()[2])
    with pytest.raises(UsageError, match="level 4, expected 0 to 3"):
        drawn[0].decode(level=4)


def test_order_and_neighbours_do_not_matter(pipe: TrajectoryPipeline) -> None:
    seeds = list(range(40))  # more than pass the network at once
    forth = {t.seeds[0]: t.levels for t in pipe.stream("emu", seeds)}
    back = {t.seeds[0]: t.levels for t in pipe.stream("emu", seeds[::-1])}
    for seed in seeds:
        # Matrix products of another batch size may round differently.
        torch.testing.assert_close(forth[seed], back[seed], atol=1e-5, rtol=1e-5)
    assert forth[0].shape == (4, *GRID, 48)


def test_a_folder_named_like_unfinished_arrays_stays(tmp_path: Path) -> None:
    mine = tmp_path / f"samples.tmp-{os.getpid()}" / "notes.txt"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    write(tmp_path, ["npz"], pipe_without_decoder()(LABELS[:2], SEEDS[:2]))
    assert mine.read_bytes() == b"mine"
    assert {path.name for path in tmp_path.iterdir()} == {"samples.npz", mine.parent.name}
