"""What a person sees of the packages in Python: names, versions, one-line representations, types."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_pipeline import tiny_pipeline

import hierarchy_builder
import pipelines
import trainer
from hierarchy_builder.config import HierarchyRecipe
from hierarchy_builder.fields import to_mapping
from hierarchy_builder.hierarchy import build_hierarchy
from trainer.data.normalisation import Normaliser
from trainer.data.shards import open_index
from trainer.methods import registry
from trainer.training.checkpoint import RunState

ROOT = Path(__file__).resolve().parents[1]


def test_the_version_is_one() -> None:
    assert hierarchy_builder.__version__ == trainer.__version__ == pipelines.__version__


@pytest.mark.parametrize("package", [hierarchy_builder, trainer])
def test_dir_shows_the_public_face_and_the_reference_documents_it(package) -> None:
    assert dir(package) == sorted([*package.__all__, "__version__"])
    assert all(getattr(package, name) is not None for name in package.__all__)
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert not [name for name in package.__all__ if f".{name}\n" not in page]
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        package.nonsense  # noqa: B018


@pytest.mark.parametrize("package", ["hierarchy_builder", "trainer"])
def test_a_package_runs_as_a_program(package: str) -> None:
    done = subprocess.run([sys.executable, "-m", package, "--version"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hierarchy_builder.__version__ in done.stdout


def test_the_package_of_builds_can_be_called_in_a_fresh_process() -> None:
    program = "import hierarchy_builder; hierarchy_builder.build('missing', 'out', encoder='dct')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "missing" in done.stderr.splitlines()[-1]
    assert "AttributeError" not in done.stderr


def test_what_people_hold_is_described_in_one_line(shards: str) -> None:
    pipe = tiny_pipeline()
    trajectory = pipe("bee", seed=3)
    features = np.random.default_rng(0).normal(size=(2, 6, 5, 8)).astype(np.float32)
    held = [
        pipe,
        trajectory,
        trajectory.region(0, level=1),
        build_hierarchy(features),
        open_index(shards),
    ]
    for each in held:
        assert "\n" not in repr(each)
        assert len(repr(each)) < 300
    assert "'bee', seed 3: 4 levels of 6×5×48" in repr(trajectory)
    frame = trajectory._repr_html_()
    assert frame.startswith("<iframe srcdoc=")
    assert '"' not in frame.split('srcdoc="')[1].split('" style')[0]
    assert str(pipe.device) == "cpu"
    assert pipe.to("cpu") is pipe


def test_configurations_and_arrays_are_short_as_well() -> None:
    """A configuration shows what differs from its defaults, an array its type and shape."""
    trajectory = tiny_pipeline()("bee", seed=3)
    presets = {name: make() for name, make in registry.all_presets().items()}
    held = [
        *presets.values(),
        RunState(step=5, images_seen=40, config=to_mapping(presets["TF-B"]), shards={"encoder": {}}),
        trajectory.view(),
        trajectory.mean_of(trajectory.region(0, level=1)),
        Normaliser.of(np.zeros((16, 16, 768)), np.ones((16, 16, 768))),
    ]
    for each in held:
        assert "\n" not in repr(each)
        assert len(repr(each)) < 600, repr(each)
    assert repr(HierarchyRecipe.paper()) == "HierarchyRecipe()"
    assert "cuts=(8.0, 16.0), spatial_weight=0.0" in repr(HierarchyRecipe.stable())
    assert repr(held[-2]).startswith("Source(features=float32 [1, 48]")


@pytest.mark.parametrize("package", [hierarchy_builder, trainer])
def test_types_reach_those_who_use_them(package) -> None:
    """Names that are loaded on first use are imported for type checkers, which the marker py.typed allows to look."""
    folder = Path(package.__file__).parent
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    shown = {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    also = {"build"} if package is hierarchy_builder else set()  # a package that can be called
    assert shown == {*package.__all__, *also}
    assert (folder / "py.typed").exists()
    assert (Path(pipelines.__file__).parent / "py.typed").exists()
