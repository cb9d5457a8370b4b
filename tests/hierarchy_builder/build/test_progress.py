"""What a running stage tells: this terminal, and others through the build folder."""

import io
import json
import threading
from pathlib import Path

import pytest
from pictures import write_tree
from rich.console import Console
from typer.testing import CliRunner

from hierarchy_builder.build.pipeline import BuildPlan, build
from hierarchy_builder.build.session import Session
from hierarchy_builder.build.stages import ExtractStage, count_failed
from hierarchy_builder.build.workers import Workers, _Metrics
from hierarchy_builder.cli.app import app
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig
from hierarchy_builder.files.whole import write_json
from hierarchy_builder.progress import Meter, Reporter, as_duration
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.units import running_stage


def test_a_stage_tells_how_far_how_fast_and_how_long(monkeypatch) -> None:
    monkeypatch.setattr("hierarchy_builder.progress.time.perf_counter", lambda: 5.0)
    meter = Meter("extract", total=90, before=10, started=0.0)
    assert meter.remaining_s is None
    meter.advance(30, failed=2)
    told = {"stage": "extract", "images": 100, "images_done": 40, "failed": 2}
    assert meter.as_row() == {**told, "images_per_second": 6.0, "seconds": 5.0, "remaining_s": 10.0}
    assert meter.as_text() == "extract: 40/100 images, 2 could not be used"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (83, "1:23"), (3600 + 62, "1:01:02")])
def test_durations(seconds: float, text: str) -> None:
    assert as_duration(seconds) == text


def test_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch) -> None:
    for terminal in (True, False):
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=terminal, width=120, color_system=None)
        for module in ("progress", "terminal"):
            monkeypatch.setattr(f"hierarchy_builder.{module}.stderr", console)
        with Reporter().stage("cluster", 8, 3) as meter:
            meter.advance(5, failed=1)
        assert "8/8" in screen.getvalue()
        assert ("1 failed" if terminal else "1 could not be used") in screen.getvalue()


def test_another_terminal_reads_a_running_build(tmp_path: Path, monkeypatch) -> None:
    photos = write_tree(tmp_path / "photos", per_class=4)
    (photos / "circle" / "000.png").write_bytes(b"no picture")
    folder, plan = (
        BuildFolder(tmp_path / "out"),
        BuildPlan(
            extract=ExtractConfig(encoder="dct", block_rows=4, max_bad_fraction=0.5, order="listed"),
            hierarchy=HierarchyRecipe(),
            shard=ShardConfig(),
        ),
    )
    reached, go_on = threading.Event(), threading.Event()
    run_unit = ExtractStage.run

    def wait_at_second(stage, unit, threads):
        if unit.number == 1:
            reached.set()
            assert go_on.wait(60)
        return run_unit(stage, unit, threads)

    monkeypatch.setattr(ExtractStage, "run", wait_at_second)
    monkeypatch.setattr("hierarchy_builder.progress.LIVE_INTERVAL_S", 0.0)
    session = Session(workers=Workers(count=0), reporter=Reporter(quiet=True))

    def work() -> None:
        with folder.locked():
            build(folder, str(photos), plan, session)

    driver = threading.Thread(target=work)
    driver.start()
    try:
        assert reached.wait(60)
        running = running_stage(folder)
        (row,) = json.loads(CliRunner().invoke(app, ["status", str(folder.root), "--json"]).stdout)
        shown = CliRunner().invoke(app, ["status", str(folder.root)]).stdout
    finally:
        go_on.set()
        driver.join()
    assert running is not None
    assert (running["stage"], running["images"], running["images_done"], running["failed"]) == (
        "extract",
        12,
        4,
        1,
    )
    assert row["running"]["images_per_second"] > 0
    assert "running: extract, 4/12 images" in shown
    assert running_stage(folder) is None
    assert not folder.live.exists()


def test_what_a_killed_run_left_is_not_running(tmp_path: Path) -> None:
    folder = BuildFolder(tmp_path)
    write_json(folder.live, {"stage": "extract", "time": 0.0})
    assert running_stage(folder) is None


def test_workers_count_what_they_do(monkeypatch) -> None:
    counted = []

    class Metric:
        def __init__(self, name, description, tag_keys, boundaries=None):
            self.name = name

        def inc(self, value, tags):
            counted.append((self.name.removeprefix("hierarchy_builder_"), value, tags["stage"]))

        observe = inc

    monkeypatch.setattr("ray.util.metrics.Counter", Metric)
    monkeypatch.setattr("ray.util.metrics.Histogram", Metric)
    outcomes = [{"status": "ok"}, {"status": "skipped"}, {"status": "nonfinite"}]
    failed = count_failed({"outcomes": outcomes})
    _Metrics().count("ExtractStage", {"images": 3, "seconds": 1.5, "failed": failed})
    _Metrics().count("ClusterStage", {"images": 1, "seconds": 0.5, "failed": 0})
    assert counted == [
        ("images", 3, "ExtractStage"),
        ("failed_images", 2, "ExtractStage"),
        ("unit_seconds", 1.5, "ExtractStage"),
        ("images", 1, "ClusterStage"),
        ("unit_seconds", 0.5, "ClusterStage"),
    ]
