"""Files of trajectories: what is no trajectory, or does not fit together, is refused when it is read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_pipeline import tiny_pipeline

from hierarchy_builder.errors import TrainerError, UsageError
from hierarchy_builder.files.whole import whole_file, write_bytes
from trainer.cli.edits import region_map, region_rows
from trainer.data.tensor_files import tensor_bytes
from trainer.trajectories.selection import Selection
from trainer.trajectories.trajectory import Trajectory


@pytest.fixture(scope="module")
def trajectory() -> Trajectory:
    return tiny_pipeline()("bee", seed=3)


@pytest.fixture
def file(trajectory: Trajectory, tmp_path: Path) -> Path:
    """An edited trajectory."""
    chosen = Selection.from_coordinates([(1, 1)], grid=trajectory.grid, level=1)
    trajectory.edit_features(chosen, torch.zeros(48)).save(tmp_path / "one.safetensors")
    return tmp_path / "one.safetensors"


def rewritten(path: Path, tensors: dict[str, torch.Tensor] | None = None, **entries: Any) -> Path:
    """The file with other tensors and entries."""
    with safe_open(path, framework="pt") as content:
        metadata = content.metadata()
        found = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    more = {name: json.dumps(value) for name, value in entries.items()}
    path.write_bytes(tensor_bytes({**found, **(tensors or {})}, {**metadata, **more}))
    return path


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"label": "ant"}, "label: .*integer"),
        ({"num_steps": 0}, "num_steps: .*greater than or equal to 1"),
        ({"model": 3}, "model: .*dictionary"),
        ({"encoder": []}, "encoder: .*dictionary"),
        ({"guidance": [1.0]}, "guidance"),
        ({"history": 5}, "history: .*list"),
        ({"history": []}, "0 steps, which replaced 1 tensors"),
        ({"history": [{"first_level": 9, "seeds_before": [3] * 4}]}, "history does not fit its levels"),
        ({"history": [{"first_level": 1, "seeds_before": 3}]}, "is not a trajectory"),
        ({"colour": "red"}, "colour: Unexpected keyword"),
    ],
)
def test_entries_that_do_not_fit_are_named(file: Path, entries: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainerError, match=message):
        Trajectory.load(rewritten(file, **entries))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"levels": torch.zeros(3)}, r"float32 \[3\], expected finite float32 \[L, H, W, C\]"),
        ({"levels": torch.full((4, 6, 5, 48), torch.nan)}, "expected finite"),
        ({"levels": torch.zeros(4, 6, 5, 48, dtype=torch.int32)}, "int32"),
        ({"seeds": torch.zeros(4)}, "seeds of torch.float32"),
        ({"seeds": torch.zeros(2, dtype=torch.int64)}, r"4 levels have \[2\] seeds"),
        ({"replaced.0": torch.zeros(2)}, "history does not fit its levels"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    file: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(TrainerError, match=message):
        Trajectory.load(rewritten(file, tensors))


def test_files_that_are_not_trajectories_are_refused(file: Path, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / "text").write_text("no trajectory")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-20])
    for name, message in (
        ("model.safetensors", "it has no format_version"),
        ("text", "header"),
        ("cut.safetensors", "not fully covered"),
        ("absent", "No such file"),
    ):
        with pytest.raises(TrainerError, match=rf"{name} is not a trajectory: .*{message}.*trainer sample"):
            Trajectory.load(tmp_path / name)


def test_regions_of_a_level_that_is_not_there(trajectory: Trajectory) -> None:
    for level in (9, -1):
        for listed in (region_rows, region_map):
            with pytest.raises(UsageError, match=f"level {level}, expected 0 to 3"):
                listed(trajectory, level)


def test_a_region_grows_no_further_than_the_grid(trajectory: Trajectory) -> None:
    one = Selection.from_coordinates([(0, 0)], grid=trajectory.grid, level=1)
    assert one.grow(10**9).count == 30
    assert one.shrink(10**9).count == 0
    with pytest.raises(UsageError, match="cosine is nan, expected -1 to 1"):
        trajectory.neighbours((0, 0), level=1, cosine=float("nan"))


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    def write_half() -> None:
        with whole_file(tmp_path / "a" / "b") as partial:
            partial.write_text("half of it")
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        write_half()
    assert list((tmp_path / "a").iterdir()) == []
    write_bytes(tmp_path / "a" / "b", b"whole")
    assert [path.read_bytes() for path in (tmp_path / "a").iterdir()] == [b"whole"]


def test_only_a_file_is_replaced_by_a_file(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="is a folder, expected the name of a file to write"):
        write_bytes(tmp_path, b"whole")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(TrainerError, match="is no regular file"):
        write_bytes(pipe, b"whole")
    assert sorted(tmp_path.iterdir()) == [pipe]
