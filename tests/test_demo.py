"""`make demo ENCODER=…`: the commands it makes, and as a drill the whole path from photographs to the page."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from trainer.cli.app import app

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw_photographs(folder: Path, count: int) -> Path:
    random = np.random.default_rng(0)
    for number in range(count):
        target = folder / f"class{number % 2}" / f"{number}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (64, 80, 3), dtype=np.uint8)).save(target)
    return folder


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_hands_encoder_weights_and_photographs_on() -> None:
    asked = ["ENCODER=timm:some_vit@9", "WEIGHTS=a file.safetensors", "PHOTOS=my photos"]
    # The tests themselves may be run by make, which hands its own flags and depth on.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "-n", "demo", *asked], cwd=ROOT, env=own, capture_output=True, text=True, check=True
    )
    line = " ".join(done.stdout.replace("\\\n", " ").splitlines()[-1].split())
    assert "--out runs/demo-timm-some_vit@9" in line
    assert '--photos "my photos" --encoder "timm:some_vit@9" --weights "a file.safetensors"' in line


def test_an_eighth_of_the_photographs_judges_the_decoder(demo: ModuleType, tmp_path: Path) -> None:
    photos = draw_photographs(tmp_path, 17)
    words = demo.encoder_words("dinov2-small@9", "file.safetensors", photos)
    expected = ["--encoder", "dinov2-small@9", "--weights", "file.safetensors", "--samples-per-shard", 15]
    assert words == expected
    assert demo.encoder_words("dct", None, photos) == ["--encoder", "dct"]  # needs no decoder
    (tmp_path / "few").mkdir()
    assert "--samples-per-shard" not in demo.encoder_words("dinov2-small", None, tmp_path / "few")


@pytest.mark.parametrize(("shards", "held_out"), [(1, 0), (2, 1)])
def test_the_decoder_draws_what_the_encoder_saw(
    demo: ModuleType, tmp_path: Path, shards: int, held_out: int
) -> None:
    facts = {"encoder": {"image_size_px": 224}, "grid": [16, 16], "shardlist": [{}] * shards}
    program, *words = map(str, demo.decoder_words(tmp_path, tmp_path / "run", facts, 320))
    assert program == "trainer"
    done = CliRunner().invoke(app, [*words, "--dry-run"], catch_exceptions=False)
    resolved = json.loads(done.stdout)
    fields = ("size", "patch_size", "held_out_shards", "total_images")
    assert [resolved[name] for name in fields] == ["tiny", 14, held_out, 320]


@pytest.mark.drill
def test_from_photographs_to_the_page_with_a_vision_transformer(tmp_path: Path) -> None:
    photos = draw_photographs(tmp_path / "photos", 16)
    words = ["--encoder", "timm:vit_tiny_patch16_224@1", "--weights", "random:0", "--photos", str(photos)]
    words += ["--total-images", "32", "--decoder-images", "32", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "examples/demo.py", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    stages = [row["stage"] for row in json.loads((tmp_path / "out" / "stages.json").read_text())]
    assert stages == ["extract", "cluster", "shard", "train-decoder", "train", "sample"]
    assert "no sample can look better" in done.stderr
    page = (tmp_path / "out" / "report.html").read_text()
    assert "decoded" in page
    assert (tmp_path / "out" / "photographs.html").stat().st_size > 10_000
