"""What is suggested to train: within memory, never less for more images, and the same again for a run that began."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_line import cli, trainer
from fixture_shards import vouch, write_shards
from hypothesis import given
from hypothesis import strategies as st

from hierarchy_builder.errors import UsageError
from trainer.data.shards import ShardIndex, open_index
from trainer.methods.machine import device_at_hand, hours_of, sizes_of, suggestion_for
from trainer.methods.registry import LATENT_FORCING, METHODS, TRAJECTORY_FORCING
from trainer.methods.suggestion import (
    CPU_EPOCHS,
    EPOCHS,
    LEAST_SEEN,
    MOST_EPOCHS,
    MOST_SEEN,
    USABLE,
    Device,
    Size,
    memory_bytes,
    suggest,
)

GIB = 2**30
CPU = Device(name="CPU", count=2)
IMAGES = st.integers(1, 3_000_000)


def gpu(gib: float, count: int = 1) -> Device:
    return Device(name="NVIDIA A100", count=count, memory_bytes=int(gib * GIB))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Shards whose index claims the sizes of DINOv2-B features of ImageNet."""
    shards = write_shards(tmp_path_factory.mktemp("data") / "shards", pictures=True)
    np.savez(shards / "statistics.npz", channel_mean=np.zeros(768), channel_variance=np.ones(768))
    vouch(shards)
    found = open_index(str(shards))
    names = tuple(str(label) for label in range(1000))
    return dataclasses.replace(found, grid=(16, 16), width=768, class_names=names)


@pytest.fixture(scope="module")
def ladders(index: ShardIndex) -> dict[str, list[Size]]:
    return {name: sizes_of(method, index) for name, method in METHODS.items()}


@pytest.mark.parametrize("method", METHODS)
@given(images=IMAGES, more=IMAGES, gib=st.floats(4, 160), count=st.sampled_from([1, 2, 8]))
def test_more_images_never_mean_less_and_memory_suffices(
    ladders: dict[str, list[Size]], method: str, images: int, more: int, gib: float, count: int
) -> None:
    sizes, device = ladders[method], gpu(gib, count)
    few, many = (suggest(n, device, sizes) for n in sorted((images, images + more)))
    assert few.parameters <= many.parameters
    assert few.config.total_images <= many.config.total_images
    for found, n in ((few, images), (many, images + more)):
        assert found.memory_bytes <= USABLE * gib * GIB
        chosen = next(size for size in sizes if size.config.preset == found.config.preset)
        chosen = dataclasses.replace(chosen, config=found.config)
        if chosen is not sizes[0] and found.config.micro_batch_size:
            assert found.memory_bytes == memory_bytes(chosen, found.config.micro_batch_size)
            assert found.config.total_images >= min(EPOCHS * n, MOST_SEEN)
            assert found.config.total_images >= min(LEAST_SEEN, MOST_EPOCHS * n)
            assert found.config.batch_size <= max(n, count)
            assert found.config.batch_size % count == 0
            assert found.config.micro_batch_size * count <= found.config.batch_size


@pytest.mark.parametrize("method", METHODS)
@given(images=IMAGES)
def test_without_a_gpu_it_is_the_network_for_cores(
    ladders: dict[str, list[Size]], method: str, images: int
) -> None:
    found = suggest(images, CPU, ladders[method])
    preset = ladders[method][0].config
    assert found.config.preset == METHODS[method].small_preset
    assert preset.total_images <= found.config.total_images
    assert found.config.total_images <= max(preset.total_images, CPU_EPOCHS * images)
    assert found.config.batch_size <= images
    assert dataclasses.replace(found.config, total_images=1).model == preset.model


def test_photos_of_one_person_get_the_small_network_and_imagenet_the_large_one(
    ladders: dict[str, list[Size]],
) -> None:
    sizes = ladders["trajectory-forcing"]

    def preset(images: int, device: Device) -> str:
        return suggest(images, device, sizes).config.preset

    assert [preset(n, gpu(24)) for n in (500, 10_000, 100_000)] == ["TF-S"] * 3
    assert [preset(n, gpu(80)) for n in (200_000, 1_281_167)] == ["TF-B", "TF-L"]
    assert preset(1_281_167, gpu(8)) == "TF-B"  # TF-L does not fit
    assert preset(1_281_167, gpu(2)) == "TF-S"
    assert preset(1_281_167, gpu(0.1)) == "tiny-cpu"
    assert preset(1_281_167, CPU) == "tiny-cpu"
    one = suggest(300_000, gpu(24), sizes).config
    assert (one.preset, one.precision, one.model) == ("TF-B", "bfloat16", sizes[2].config.model)
    normalizing = suggest(20_000, gpu(80), ladders["normalizing-trajectory"])
    assert normalizing.config.preset == "NTM-B"
    assert "the smallest of this method for GPUs, though its size is for more images" in normalizing.reason


def test_the_formula_of_memory_is_above_a_measured_network() -> None:
    """docs/results.md: 2.28 GiB for the whole process, whose weights are small."""
    config = TRAJECTORY_FORCING.load("presets")["tiny-cpu"]()
    model = dataclasses.replace(
        config.model, start="zeros", in_channels=96, width=192, depth=8, head_depth=4, num_heads=6
    )
    config = dataclasses.replace(config, model=model)
    with torch.device("meta"):
        network = TRAJECTORY_FORCING.load("pipeline").network_type(model)
    count = sum(parameter.numel() for parameter in network.parameters())
    size = Size(config=config, parameters=count, has_tangents=True)
    assert 2.28 * GIB < memory_bytes(size, 16) < 2 * 2.28 * GIB


def test_hours_on_gpus_are_said_to_be_assumed(index: ShardIndex, ladders: dict[str, list[Size]]) -> None:
    for device in (gpu(80), Device(name="Unheard of", count=2, memory_bytes=24 * GIB)):
        found = suggest(50_000, device, ladders["latent-forcing"])
        hours, how = hours_of(found, device, index.url)
        assert how.startswith("unmeasured: assumes 30% of ")
        assert hours > 0
    with pytest.raises(UsageError, match="0 images"):
        suggest(0, CPU, ladders["latent-forcing"])


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_the_command_says_what_it_would_cost(no_gpu: None, picture_shards: str) -> None:
    for method in METHODS.values():
        words = () if method is TRAJECTORY_FORCING else ("--method", method.name)
        found = json.loads(trainer("presets", "--suggest", picture_shards, *words, "--json").out)
        assert (found["preset"], found["config"]["preset"]) == (method.small_preset,) * 2
        assert found["hours_are"].startswith("measured: ")
        assert found["hours"] > 0
        assert found["epochs"] == pytest.approx(found["total_images"] / 24, abs=0.01)
    assert "next: trainer train" in trainer("presets", "--suggest", picture_shards).err
    refused = trainer("presets", "--method", "latent-forcing", code=2)
    assert "--method is for --suggest" in refused.err


def test_a_suggestion_is_recorded_and_a_run_that_began_keeps_it(
    no_gpu: None, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    words = ("--method", "normalizing-trajectory", "--total-images", 8)
    done = trainer("train", shards, "--out", out, *words)
    assert "24 images and " in done.err
    assert "because it trains on CPU" in done.err
    recorded = yaml.safe_load((out / "config.yaml").read_text())["config"]
    expected = suggestion_for(METHODS["normalizing-trajectory"], open_index(shards), device_at_hand()).config
    assert (recorded["preset"], recorded["batch_size"]) == ("tiny-normalizing", expected.batch_size)
    monkeypatch.setattr("trainer.methods.machine.device_at_hand", lambda: gpu(80))
    for again in (("--method", "normalizing-trajectory"), ()):
        said = trainer("train", shards, "--out", out, *again, "--total-images", 8, "--dry-run", "--json")
        assert json.loads(said.out)["batch_size"] == expected.batch_size
        assert "images and" not in said.err
    elsewhere = ("--out", tmp_path / "other", "--resume", out, "--dry-run", "--json")
    assert json.loads(trainer("train", shards, *elsewhere).out)["preset"] == "tiny-normalizing"
    fresh = trainer("train", shards, "--out", tmp_path / "new", "--dry-run", "--json")
    assert json.loads(fresh.out)["preset"] == "TF-S"


def test_presets_and_files_of_fields_are_taken_as_before(no_gpu: None, shards: str, tmp_path: Path) -> None:
    file = tmp_path / "more.yaml"
    file.write_text("seed: 7\n")
    dry = ("--out", tmp_path / "run", "--dry-run", "--json")
    for words, preset in (
        (("--preset", "TF-B"), "TF-B"),
        (("--config", file), "TF-B"),
        (("--config", file, "--method", LATENT_FORCING.name), "LF-LM"),
    ):
        said = trainer("train", shards, *dry, *words)
        assert json.loads(said.out)["preset"] == preset
        assert said.err == ""


def test_the_list_of_presets_fits_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = cli("trainer", "presets", columns=80).out.splitlines()
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if "NTM-B" in line)
    assert "normalizing-trajectory" in row
    assert "102.4 M" in row
