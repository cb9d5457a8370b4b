"""Data flows one way: which rooms may import which, and what a fresh process must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hierarchy_builder", "trainer", "pipelines")
RAY_ROOMS = {"hierarchy_builder/build/workers.py"}
TRAINER_MAY_USE = (
    "errors",
    "fields",
    "files",
    "terminal",
    "records",
    "vision_libraries",
    "canvases",
    "hierarchy",
)


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
        ("hierarchy_builder.cli", ("ray", "torch", "zarr")),
        ("hierarchy_builder.build.stages", ("ray",)),
    ],
)
def test_a_fresh_process_loads_only_what_it_needs(module: str, absent: tuple[str, ...]) -> None:
    code = f"import {module}, sys; print(*[name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


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
