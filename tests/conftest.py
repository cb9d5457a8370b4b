"""Fixtures shared by the tests: reference data beside the checkout, quiet libraries, few threads, no chance."""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Tensors as small as those of tests lose by more threads, and several processes of tests share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Results are compared with bits and tolerances of the CPU; `make test-cuda` asks for the tests that need a device.
if not os.environ.get("CUDA_TESTS"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# A Ray of its own for each process of tests, whatever else runs on the machine; sockets want a short path.
os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray-")

import hypothesis
import pytest
from fixture_shards import write_shards
from pictures import write_tree
from released import golden  # noqa: F401 (a fixture of many tests)

atexit.register(shutil.rmtree, os.environ["RAY_TMPDIR"], ignore_errors=True)
hypothesis.settings.register_profile("same-every-time", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same-every-time")
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `cuda` where no device is visible."""
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and CUDA_TESTS=1 in the environment (make test-cuda)")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real photographs and their features, which a clone does not hold; tests that need it skip."""
    if not SHARED.is_dir():
        pytest.skip("needs real photographs or an encoder, which no clone holds")
    return SHARED


@pytest.fixture(scope="module", autouse=True)
def no_ray_is_left() -> Iterator[None]:
    """A Ray that stays is found by the tests after it, in place of theirs."""
    yield
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
        pytest.fail(
            "these tests left a Ray: call hierarchy_builder.build.workers.shutdown() after the test that needs it"
        )


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished shard folder that tests only read."""
    return str(write_shards(tmp_path_factory.mktemp("shards") / "plain"))


@pytest.fixture(scope="session")
def picture_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same samples with their pictures."""
    return str(write_shards(tmp_path_factory.mktemp("shards") / "pictures", pictures=True))


@pytest.fixture(scope="session")
def tiny_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 drawn photographs of three classes; not to be changed."""
    return write_tree(tmp_path_factory.mktemp("photos"), per_class=6)


@pytest.fixture(scope="session")
def tiny_build(tiny_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The BuildFolder of `tiny_builds.PLAN` over them, every stage done; not to be changed."""
    import tiny_builds  # loads every room of the builder, which most tests do without

    return tiny_builds.make(tmp_path_factory.mktemp("in-process") / "build", tiny_photos)


BROWSER_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
]


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Chromium as playwright drives it; tests that need one skip where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no chromium or google-chrome on PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=BROWSER_ARGUMENTS)
        yield browser
        browser.close()
