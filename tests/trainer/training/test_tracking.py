"""What a run shows while it trains: sheets, event files, another tracker; and that showing changes nothing."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fixture_shards import write_shards
from PIL import Image
from tiny_runs import FLOW as TINY
from tiny_runs import assert_same_state

from hierarchy_builder.errors import UsageError
from trainer.methods import registry
from trainer.training.log import TENSORBOARD, TensorBoard, open_trackers


def shown(**fields: Any) -> Any:
    return dataclasses.replace(TINY, total_images=16, sample_images=None, tensorboard=False, **fields)


def test_sheets_of_samples_leave_the_run_as_it_is(tmp_path: Path) -> None:
    shards = str(write_shards(tmp_path / "shards"))
    registry.train(shown(), shards, str(tmp_path / "plain"), quiet=True)
    registry.train(
        dataclasses.replace(shown(), sample_images=8), shards, str(tmp_path / "watched"), quiet=True
    )
    sheets = sorted((tmp_path / "watched" / "samples").iterdir())
    assert [path.name for path in sheets] == ["step-00000001.png", "step-00000002.png"]
    with Image.open(sheets[0]) as first, Image.open(sheets[1]) as second:
        assert first.size == second.size
        assert first.convert("RGB").tobytes() != second.convert("RGB").tobytes()  # the model has moved
    assert not (tmp_path / "plain" / "samples").exists()
    assert_same_state(tmp_path / "plain", tmp_path / "watched", 2)


def test_event_files_hold_the_numbers_and_sheets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tracker,) = open_trackers(tmp_path, 0, TINY)
    tracker.scalars({"loss": 2.5}, 8)
    tracker.scalars({"loss": 1.5}, 16)
    tracker.picture("samples", Image.new("RGB", (6, 4), "red"), 16)
    tracker.close()
    later = (
        time.time() + 1
    )  # files are read in the order of their names: by seconds, then by a number without zeros
    monkeypatch.setattr(time, "time", lambda: later)
    again = TensorBoard(tmp_path, 8)  # a run that goes on from image 8
    again.scalars({"loss": 1.0}, 16)
    again.close()
    events = EventAccumulator(str(tmp_path / TENSORBOARD))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(8, 2.5), (16, 1.0)]
    assert (events.Images("samples") or [SimpleNamespace(width=6)])[0].width == 6


def test_run_without_tensorboard_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert open_trackers(tmp_path, 0, TINY) == []
    assert "tensorboard is not installed: numbers go to metrics.jsonl only" in capsys.readouterr().err


def test_weights_and_biases_gets_the_same_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    run = SimpleNamespace(
        log=lambda row: calls.append(("log", row)), finish=lambda: calls.append(("end", None))
    )

    def init(**named: Any) -> SimpleNamespace:
        calls.append(("init", named))
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Image=lambda picture: picture.size))
    out = tmp_path / "first-run"
    (tracker,) = open_trackers(out, 0, shown(wandb_project="levels", seed=3))
    tracker.scalars({"loss": 2.0}, 8)
    tracker.picture("samples", Image.new("RGB", (6, 4)), 8)
    tracker.close()
    named = calls[0][1]
    assert (named["project"], named["id"], named["resume"]) == ("levels", "first-run", "allow")
    assert (named["config"]["seed"], named["config"]["model"]["width"]) == (3, 16)
    assert [row for _, row in calls[1:]] == [
        {"loss": 2.0, "images": 8},
        {"samples": (6, 4), "images": 8},
        None,
    ]


def test_weights_and_biases_that_is_asked_for_and_missing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"wandb_project is 'levels'.*pip install .*\[wandb\]"):
        open_trackers(tmp_path, 0, shown(wandb_project="levels"))
