"""Imports point one way: which folders may import which, and what a fresh process must not load."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hierarchy_builder", "trainer", "pipelines")
RAY_FILES = {"hierarchy_builder/build/workers.py"}
GROUND_FLOOR = (
    "config",
    "errors",
    "fields",
    "files",
    "flags",
    "machine",
    "progress",
    "records",
    "terminal",
)
"""Modules and folders of hierarchy_builder that stand on nothing else; all folders of both packages may import them."""
WINGS = {
    "hierarchy_builder": (
        *("canvases", "hierarchy", "images", "encoders", "vocabulary"),
        *("store", "build", "verify", "quality", "cli", "__main__"),
    ),
    "trainer": (
        *("seeds", "data", "networks", "metrics", "training", "decode", "registry", "trajectories"),
        *(
            "methods",
            "post_training",
            "evaluation",
            "studio",
            "calls",
            "cli",
            "__main__",
            "official",
            "sample",
            "schedules",
        ),
    ),
}
"""The parts of each package from the lowest up: a part imports itself and those before it. `registry` is
trainer/methods/registry.py, which names the methods and imports none of them."""
TRAINER_MAY_USE = ("__version__", *GROUND_FLOOR, "canvases", "hierarchy")


@cache
def modules() -> dict[str, list[str]]:
    """Imports of every file, by its path relative to the root."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names = []
            lazy = {id(inner) for node in tree.body if is_for_types(node) for inner in ast.walk(node)}
            for node in ast.walk(tree):
                if id(node) in lazy:
                    continue
                if isinstance(node, ast.Import):
                    names += [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names += [f"{node.module}.{alias.name}" for alias in node.names]
            found[path.relative_to(ROOT).as_posix()] = names
    return found


def is_for_types(node: ast.stmt) -> bool:
    """Whether this is `if TYPE_CHECKING:`, whose imports load nothing."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def parts_of(path: str) -> tuple[str, str]:
    """The package of a file, and its folder or module there; the package itself is the part ``."""
    package, _, rest = path.removesuffix(".py").partition("/")
    part = part_of(f"{package}.{rest.replace('/', '.')}")
    return package, "" if part == "__init__" else part


def part_of(name: str) -> str:
    """The part that a module, or a name in it, belongs to."""
    return "registry" if f"{name}.".startswith("trainer.methods.registry.") else name.split(".")[1]


def test_ray_stays_in_its_file() -> None:
    for path, names in modules().items():
        if path.startswith("pipelines/") or path in RAY_FILES:
            continue
        assert not [name for name in names if name.split(".")[0] == "ray"], path


def test_packages_import_only_those_before_them() -> None:
    later = {
        "hierarchy_builder": {"trainer", "pipelines", "tests", "examples", "benchmarks"},
        "trainer": {"pipelines", "tests", "examples", "benchmarks"},
        "pipelines": {"tests", "examples", "benchmarks"},
    }
    for path, names in modules().items():
        assert not later[parts_of(path)[0]] & {name.split(".")[0] for name in names}, path


def test_trainer_takes_only_what_both_packages_share() -> None:
    for path, names in modules().items():
        if path.startswith("trainer/"):
            for name in (name for name in names if name.startswith("hierarchy_builder")):
                assert name.split(".")[1] in TRAINER_MAY_USE, f"{path} imports {name}"


def test_every_part_has_its_place_in_the_order() -> None:
    parts = {parts_of(path) for path in modules() if not path.startswith("pipelines/")}
    for package, part in parts:
        ground = GROUND_FLOOR if package == "hierarchy_builder" else ()
        assert part in ("", *ground, *WINGS[package]), f"{package}/{part}: give it a place in WINGS"


def test_no_part_imports_one_above_it() -> None:
    found = set()
    for path, names in modules().items():
        package, own = parts_of(path)
        order = WINGS.get(package, ())
        if not own or not order:
            continue
        height = order.index(own) if own in order else -1  # the ground floor
        used = {part_of(name) for name in names if name.startswith(f"{package}.")} & set(order)
        found |= {(path, part) for part in used if order.index(part) > height}
    assert not found, "these imports point up: move what is imported down, or the importer up"


def test_methods_never_import_each_other() -> None:
    folders = {path.name for path in (ROOT / "trainer" / "methods").iterdir() if path.is_dir()}
    found = set()
    for path, names in modules().items():
        own = path.removeprefix("trainer/methods/").partition("/")[0]
        if path.startswith("trainer/methods/") and own in folders:
            used = {name.split(".")[2] for name in names if name.startswith("trainer.methods.")}
            found |= {(path, other) for other in used & folders - {own}}
    assert not found, "a method asks for another through the registry"


LOADS = (
    ("import trainer", "ray zarr torch torchvision numba"),
    ("import hierarchy_builder.records", "ray zarr torch"),
    ("import hierarchy_builder.cli.app", "ray zarr torch numpy fsspec"),
    ("import trainer.cli.app", "ray zarr torch numpy fsspec"),
    ("import hierarchy_builder.store.units", "ray zarr torch numba scipy"),
    ("from trainer.methods import registry; registry.all_presets()", "ray zarr torch"),
    ("import hierarchy_builder.canvases", "ray zarr numba sklearn faiss"),
    (
        "import numpy; from hierarchy_builder.canvases.gallery import data_uri; "
        "data_uri(numpy.zeros((80, 80, 3), numpy.uint8))",
        "PIL.PsdImagePlugin",
    ),
    (
        "from hierarchy_builder.encoders import load_encoder; load_encoder('dct')",
        "timm torchvision onnxruntime",
    ),
    ("import trainer; trainer.TrajectoryPipeline", "ray zarr scipy numba"),
    ("import trainer.methods.trajectory_forcing.train", "ray zarr scipy numba"),
    (
        "import torch; from trainer.training.config import OptimConfig; from trainer.training.optim import MuonAdam; "
        "MuonAdam(torch.nn.Linear(2, 2).named_parameters(), OptimConfig()).step()",
        "torch._dynamo sympy",
    ),
    ("import hierarchy_builder.build.plan", "ray numba scipy"),
)
"""What a fresh process does, and what it must not have loaded afterwards."""
FRESH = """
import os, sys
for code, absent in {loads!r}:
    if "torch" not in absent.split():
        import torch  # it takes seconds, so those that may load it get it from this process
    if os.fork() == 0:
        exec(code)
        print(code, *(name for name in absent.split() if name in sys.modules), sep=chr(9), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, code
"""


def test_a_fresh_process_loads_only_what_it_needs() -> None:
    code = FRESH.format(loads=LOADS)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-800:]
    assert done.stdout.splitlines() == [code for code, _ in LOADS]


OF_EXTRAS = (
    *("aiohttp", "gradio", "onnx", "onnxruntime", "skimage", "sklearn", "torch_fidelity", "wandb", "faiss"),
    *("pillow_heif", "pillow_jxl", "s3fs", "gcsfs", "pytest", "hypothesis"),
)
"""Packages that only extras of pyproject.toml install."""


def test_the_packages_load_without_what_extras_install() -> None:
    loaded = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in modules()]
    names = [
        name
        for name in loaded
        if not name.startswith(("pipelines", "trainer.studio")) and "__main__" not in name
    ]
    code = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({OF_EXTRAS!r}))\n"
        f"for name in {names!r}:\n    importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-800:]


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


READERS = re.compile(
    r"(json|yaml|np|numpy|torch|pickle|marshal|tomllib|dill|joblib)\.(\w*load\w*|Unpickler)"
    r"|(np|numpy)\.(fromfile|genfromtxt|loadtxt)|np\.lib\.format\.read_\w+|.*\.read_(json|pickle)|eval|exec"
)
"""Functions that take more memory or time than the bytes, raise errors of many kinds, or run what the bytes name."""
OWN_GUARD = {
    "trainer/training/release_files.py": "torch.load",  # after `check_pickle`
    "trainer/post_training/bundle.py": "pickle.Unpickler",  # a subclass that resolves arrays only
}
"""Modules outside `untrusted` that may call one; each turns whatever is wrong with the bytes into one error."""


@pytest.mark.parametrize("package", PACKAGES)
def test_bytes_of_others_are_read_by_the_bounded_parsers(package: str) -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), call)
        for path in (ROOT / package).rglob("*.py")
        for call in called(ast.parse(path.read_text()))
        if READERS.fullmatch(call) and path.parent.name != "untrusted"
    }
    assert found == {(name, call) for name, call in OWN_GUARD.items() if name.startswith(package)}


def called(tree: ast.AST) -> Iterator[str]:
    """Names of the functions that are called, and of base classes, except json.loads of what json.dumps returned."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from map(ast.unparse, node.bases)
        if isinstance(node, ast.Call):
            plain = [ast.unparse(each.func) for each in node.args if isinstance(each, ast.Call)]
            if plain != ["json.dumps"]:
                yield ast.unparse(node.func)
