"""Data flows one way: which rooms may import which, and what a fresh process must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hierarchy_builder", "trainer", "pipelines")
RAY_ROOMS = {"hierarchy_builder/build/workers.py"}
GROUND_FLOOR = ("config", "errors", "fields", "files", "progress", "records", "terminal", "vision_libraries")
TRAINER_MAY_USE = (*GROUND_FLOOR, "canvases", "hierarchy")


def modules() -> dict[str, list[str]]:
    """Imports of every file, by its path relative to the root."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names = []
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    names += [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names += [f"{node.module}.{alias.name}" for alias in node.names]
            found[path.relative_to(ROOT).as_posix()] = names
    return found


def test_ray_stays_in_its_rooms() -> None:
    for path, names in modules().items():
        if path.startswith("pipelines/") or path in RAY_ROOMS:
            continue
        assert not [name for name in names if name.split(".")[0] == "ray"], path


def test_builder_never_imports_what_comes_after_it() -> None:
    for path, names in modules().items():
        if path.startswith("hierarchy_builder/"):
            assert not [name for name in names if name.split(".")[0] in ("trainer", "pipelines")], path
        if path.startswith("trainer/"):
            assert not [name for name in names if name.split(".")[0] == "pipelines"], path


def test_trainer_takes_only_the_shared_rooms() -> None:
    for path, names in modules().items():
        if path.startswith("trainer/"):
            for name in (name for name in names if name.startswith("hierarchy_builder")):
                assert name.split(".")[1] in TRAINER_MAY_USE, f"{path} imports {name}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("trainer", ("ray", "zarr", "torchvision", "numba")),
        ("trainer.methods.trajectory_forcing.train", ("ray", "zarr")),
        ("trainer.trajectories.pipeline", ("ray", "zarr")),
        ("hierarchy_builder.records", ("ray", "zarr", "torch")),
        ("hierarchy_builder.canvases", ("ray", "zarr", "numba")),
        ("hierarchy_builder.cli.app", ("ray", "torch", "zarr")),
        ("trainer.cli.app", ("ray", "torch", "zarr")),
        ("hierarchy_builder.build.stages", ("ray",)),
    ],
)
def test_a_fresh_process_loads_only_what_it_needs(module: str, absent: tuple[str, ...]) -> None:
    code = f"import {module}, sys; print(*[name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["presets"],
        ["sample", "absent", "--labels", "0", "--out", "drawn"],
        ["train", "absent", "--out", "run", "--preset", "tiny-cpu"],
        ["train", "absent", "--out", "run", "--preset", "tiny-gpu"],
        ["train-decoder", "absent", "--out", "run", "--size", "tiny", "--set", "rate=1"],
    ],
)
def test_help_and_refusals_of_the_trainer_do_not_wait_for_torch(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys, trainer.cli\n"
        "try:\n    trainer.cli.main()\n"
        "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    is_answer = words[0] in ("--help", "presets")
    assert done.stdout.splitlines()[-1] == ("0 False" if is_answer else "2 False"), done.stderr


def test_no_import_cycles() -> None:
    graph = {path: set() for path in modules()}
    by_name = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in graph}
    for path, names in modules().items():
        for name in names:
            parts = name.split(".")
            target = by_name.get(name) or by_name.get(".".join(parts[:-1]))
            if target and target != path:
                graph[path].add(target)
    remaining = dict(graph)
    while free := [path for path, targets in remaining.items() if not targets & remaining.keys()]:
        for path in free:
            del remaining[path]
    assert not remaining, f"import cycle among {sorted(remaining)}"


def test_no_dumping_grounds() -> None:
    names = {path.stem for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert not names & {"utils", "util", "common", "helpers", "helper", "misc"}
