"""What a step waits for and costs on a device, as far as a CPU can tell."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from meta_device import waits_on_meta
from tiny_runs import DECODER, FLOW, LATENT, NORMALIZING, assert_same_state, before_step
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hierarchy_builder.encoders import load_encoder
from hierarchy_builder.errors import TrainerError
from trainer.data.shards import open_index
from trainer.decode.config import DecoderConfig
from trainer.decode.train import train_decoder
from trainer.methods import registry
from trainer.methods.trajectory_forcing import train as room
from trainer.post_training.run import Start, post_train, resolved
from trainer.training.config import with_settings
from trainer.training.distributed import World
from trainer.training.log import read_metrics
from trainer.training.run_folder import read_config, settled
from trainer.training.speed import counted_flops, explained, float32_products, images_that_fit, peak_of

META = torch.device("meta")
READ, DECOMPOSED = "aten._local_scalar_dense.default", "aten._linalg_eigh.default"
ONCE = ["aten._to_copy.default to the host"]
"""The terms of a step, its norm and the wish of a rank to stop are fetched together."""


class _SeenError(Exception):
    """The step has been looked at."""


def moved(run: Any, micro_batch_size: int) -> None:
    """Move a run to a device without numbers, as if it had begun there."""
    run.world, run.flops_per_image = World(device=META), 1.0
    run.config = dataclasses.replace(run.config, micro_batch_size=micro_batch_size)
    run.model.to(META)
    run.normaliser = run.normaliser.to(META)
    run.optimizer, run.averages = run._optimizer(), run._averages()


@pytest.mark.parametrize("config", [FLOW, LATENT, NORMALIZING, DECODER], ids=lambda each: type(each).__name__)
def test_a_step_waits_once_for_the_device_whatever_its_parts(
    config: Any, picture_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []

    def look(run: Any, batch: Any) -> None:
        monkeypatch.undo()
        moved(run, micro_batch_size=4)
        with waits_on_meta(monkeypatch) as waits:
            run.take_step(batch.pinned(), False)
        found.extend(waits.found)
        raise _SeenError

    before_step(monkeypatch, 0, look)
    train = train_decoder if config is DECODER else registry.train
    with pytest.raises(_SeenError):
        train(config, picture_shards, str(tmp_path), quiet=True)
    assert found == ONCE


def test_post_training_waits_for_the_device_once_a_distance(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.train(dataclasses.replace(FLOW, total_images=8), shards, str(tmp_path / "run"), quiet=True)
    start, index = Start.of(tmp_path / "run"), open_index(shards)
    config = resolved(start, index, {"batch_size": 8, "pooled_grid": 2, "queue_images": 16})
    found: list[str] = []

    def look(run: Any, batch: Any) -> None:
        monkeypatch.undo()
        moved(run, micro_batch_size=4)
        run.networks, run.terms_of_loss = [run.model] * 4, list(run._make_terms())
        with waits_on_meta(monkeypatch) as waits:
            run.take_step(batch, False)
        distances = len(run.terms_of_loss)
        assert sorted(waits.found) == sorted([*(READ, DECOMPOSED) * distances, *ONCE])
        found.extend(waits.found)
        raise _SeenError

    before_step(monkeypatch, 0, look)
    with pytest.raises(_SeenError):
        post_train(start, config, index, tmp_path / "out", quiet=True)
    assert found[-1:] == ONCE


def test_an_encoder_is_given_a_batch_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder: Any = load_encoder("timm:vit_tiny_patch16_224", weights="random:0", device="meta")
    with waits_on_meta(monkeypatch) as waits:
        encoder.begin_half(np.zeros((2, 224, 224, 3), np.uint8))
    assert waits.found == []


def test_operations_are_counted_and_compared_with_the_peak() -> None:
    layer, x = nn.Linear(8, 4, bias=False), torch.ones(3, 8)
    # Forward, and in the backward pass the gradient of the weight; x needs none.
    assert counted_flops(lambda: layer(x).sum().backward()) == 2 * 2 * 3 * 8 * 4
    q = torch.ones(1, 2, 3, 8)
    assert counted_flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * 2 * 2 * 3 * 3 * 8
    assert peak_of("NVIDIA H200") == 989e12
    assert peak_of("Apple M9") is None


POST = "post-training"


def trained(config: Any, shards: str, out: Path) -> None:
    """Train for two steps in parts of 4 images; POST is the post-training of a run of a step."""
    if config is not POST:
        train = train_decoder if isinstance(config, DecoderConfig) else registry.train
        two = dataclasses.replace(config, total_images=2 * config.batch_size, micro_batch_size=4)
        train(two, shards, str(out), quiet=True)
        return
    registry.train(dataclasses.replace(FLOW, total_images=8), shards, str(out / "run"), quiet=True)
    start, index = Start.of(out / "run"), open_index(shards)
    fields = {
        "batch_size": 8,
        "total_images": 16,
        "queue_images": 16,
        "pooled_grid": 1,
        "micro_batch_size": 4,
    }
    post_train(start, resolved(start, index, {**fields, "sample_images": None}), index, out, quiet=True)


@pytest.mark.parametrize(
    "config",
    [FLOW, LATENT, dataclasses.replace(LATENT, pixel_stage=True), NORMALIZING, DECODER, POST],
    ids=["flow", "latent", "pixel-stage", "normalizing", "decoder", POST],
)
def test_looking_at_the_cost_counts_a_step_and_changes_none(
    config: Any, picture_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(config, picture_shards, tmp_path / "plain")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    counts = []

    def look(run: Any, batch: Any) -> None:
        if config is POST and run.config.post_training is None:
            return
        run._look_at_cost(batch)
        world, run.world = run.world, World(device=torch.device("cuda"), size=2)
        assert run._utilisation(1000.0)["mfu"] == 1000 * run.flops_per_image / 2 / 989e12
        run.world = world
        terms = getattr(run, "terms_of_loss", None)
        run.terms_of_loss = copy.deepcopy(terms)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            for start in range(0, len(batch), 4):
                run.backward(batch, start, start + 4)
        run.optimizer.zero_grad()
        run.terms_of_loss = terms
        counts.append((run.flops_per_image * len(batch), counter.get_total_flops()))

    before_step(monkeypatch, 0, look)
    trained(config, picture_shards, tmp_path / "looking")
    for expected, found in counts:  # post-training leaves products with the slopes of its distances out
        assert found == pytest.approx(expected, rel=0.002 if config is POST else 0)
    assert len(counts) == 1
    assert_same_state(tmp_path / "plain", tmp_path / "looking", step=2)
    assert all("mfu" not in line for line in read_metrics(tmp_path / "looking"))


@pytest.mark.parametrize("config", [FLOW, DECODER, POST], ids=["flow", "decoder", POST])
def test_a_micro_batch_is_chosen_by_the_memory_where_none_is_set(
    config: Any, picture_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image takes 15 bytes and two 25, of 100: a batch of 8 would need 80, of which one half fits."""
    chosen = []

    def look(run: Any, batch: Any) -> None:
        run.config = dataclasses.replace(run.config, micro_batch_size=None)
        run.optimizer.state[run.model] = {}  # as of a resumed run, whose moments are part of what is taken
        peaks = iter([15, 25])
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
            patch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
            patch.setattr(torch.cuda, "mem_get_info", lambda device: (65, 100))
            patch.setattr(torch.cuda, "memory_reserved", lambda device: 30)
            run._look_at_cost(batch)
        run.optimizer.state.clear()
        chosen.append(run._micro_batch(batch))

    before_step(monkeypatch, 0, look)
    trained(config, picture_shards, tmp_path)
    # The adversarial loss of a decoder is balanced in each part, so that none is chosen for it.
    assert chosen[-1] == (8 if config is DECODER else 4)


def test_micro_batches_fit_into_the_memory() -> None:
    assert images_that_fit(128, each=1.0, free=1000.0) == 128
    assert images_that_fit(128, each=10.0, free=1000.0) == 64
    assert images_that_fit(100, each=10.0, free=300.0) == 13
    assert images_that_fit(8, each=1e9, free=1.0) == 1


def test_errors_of_the_device_say_what_to_do() -> None:
    with (
        pytest.raises(TrainerError, match=r"64 images in one backward pass: .* micro_batch_size=32"),
        explained(lambda: 64),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(TrainerError, match=r"activation_checkpointing=true"), explained(lambda: 1):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with (
        pytest.raises(TrainerError, match="the device failed: CUDA error: an illegal memory"),
        explained(lambda: 1),
    ):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="other"), explained(lambda: 1):
        raise RuntimeError("other")


def test_a_parameter_without_gradient_is_named(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = room.TrajectoryForcingRun._network

    def with_idle_parameter(run: Any) -> nn.Module:
        network = plain(run)
        network.idle = nn.Parameter(torch.ones(2))
        return network

    monkeypatch.setattr(room.TrajectoryForcingRun, "_network", with_idle_parameter)
    with pytest.raises(TrainerError, match="step 0: 1 parameter got no gradient, the first is idle"):
        registry.train(FLOW, shards, str(tmp_path), quiet=True)


def test_a_run_keeps_its_precision_until_another_is_asked_for(shards: str, tmp_path: Path) -> None:
    auto = dataclasses.replace(FLOW, precision="auto", total_images=8)
    assert settled(auto, tmp_path, None, "cuda").precision == "bfloat16"
    registry.train(auto, shards, str(tmp_path), quiet=True)
    assert read_config(tmp_path)["config"]["precision"] == "float32"
    assert settled(auto, tmp_path, None, "cuda").precision == "float32"
    longer = with_settings(auto, {"total_images": 16, "precision": "bfloat16"})
    registry.train(longer, shards, str(tmp_path), quiet=True)
    assert read_config(tmp_path)["config"]["precision"] == "bfloat16"


def test_a_run_leaves_the_products_of_the_process_as_they_were() -> None:
    before, gpu = torch.get_float32_matmul_precision(), torch.device("cuda")
    with float32_products(gpu, "bfloat16"):
        assert torch.get_float32_matmul_precision() == "high"
    with float32_products(gpu, "float32"):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == before
