"""Faster or smaller ways through the objective: compiled, and with blocks run again; both give the same numbers."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from small_networks import awake
from tiny_runs import LATENT, NORMALIZING
from torch import Tensor

from hierarchy_builder.errors import TrainerError
from trainer.methods import registry
from trainer.methods.normalizing_trajectory.config import NormalizingMethodConfig
from trainer.methods.trajectory_forcing import objective as tf
from trainer.methods.trajectory_forcing.config import MethodConfig
from trainer.networks.attention import Blocks
from trainer.networks.config import ModelConfig
from trainer.seeds import StepRows
from trainer.training.log import read_metrics
from trainer.training.method_run import compiled

SMALLEST = ModelConfig(
    grid=(2, 2),
    in_channels=4,
    num_classes=3,
    width=8,
    depth=2,
    head_depth=1,
    num_heads=1,
    num_class_tokens=1,
    num_time_tokens=1,
    num_level_tokens=1,
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def terms_and_gradients(
    objective: Callable[..., dict[str, Tensor]],
    *,
    config: ModelConfig = SMALLEST,
    bf16: bool = False,
    recompute: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = awake(config)
    for module in model.modules():
        if isinstance(module, Blocks):
            module.recompute = recompute
    generator = torch.Generator().manual_seed(3)
    x, prev = torch.randn(2, 4, 2, 2, 4, generator=generator)
    draws = tf.draw_batch(StepRows(batch_size=4, seed=0, step=0), (2, 2, 4), MethodConfig())
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        terms = objective(
            model,
            x,
            prev=prev,
            level=torch.arange(4),
            label=torch.arange(4) % 3,
            regions=torch.tensor([0, 0, 1, 2], dtype=torch.uint8).view(1, 2, 2).expand(4, 2, 2),
            t=draws.t,
            r=draws.r,
            noise=draws.noise,
            guidance=None,
        )
    terms["loss"].backward()
    return terms, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: Any, theirs: Any, tolerance: float) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            largest = max(float(value.abs().max()), 1e-3)
            torch.testing.assert_close(mine[name], value, rtol=0, atol=tolerance * largest, msg=name)


@pytest.mark.parametrize("bf16", [False, True])
def test_blocks_run_again_give_the_same_numbers(bf16: bool) -> None:
    plain = terms_and_gradients(tf.loss, bf16=bf16)
    assert len(plain[1]) > 30
    # Kernels without a graph sum in another order than those with one.
    assert_same(terms_and_gradients(tf.loss, bf16=bf16, recompute=True), plain, 1e-6)


def test_objective_is_one_graph_with_the_same_numbers() -> None:
    """Captured whole, tangents included, and run without code generation: what torch.compile starts from."""
    fast = torch.compile(tf.loss, fullgraph=True, backend="aot_eager")
    assert_same(terms_and_gradients(fast), terms_and_gradients(tf.loss), 1e-5)


@pytest.mark.parametrize(
    "config",
    [
        LATENT,
        pytest.param(dataclasses.replace(LATENT, pixel_stage=True), marks=pytest.mark.drill),
        pytest.param(NORMALIZING, marks=pytest.mark.drill),
        pytest.param(
            dataclasses.replace(NORMALIZING, method=NormalizingMethodConfig(pairs="one")),
            marks=pytest.mark.drill,
        ),
        dataclasses.replace(NORMALIZING, model=dataclasses.replace(NORMALIZING.model, trajectory="levels")),
        pytest.param(
            dataclasses.replace(NORMALIZING, model=dataclasses.replace(NORMALIZING.model, num_steps=(2, 4))),
            marks=pytest.mark.drill,
        ),
    ],
    ids=["latents", "canvases", "all pairs", "one pair", "levels", "two lengths"],
)
def test_the_other_methods_are_one_graph_too(
    config: Any, picture_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of a whole run, with the smallest graph that torch.compile makes of each objective."""
    small = dataclasses.replace(config, total_images=16, checkpoint_images=1000)
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    traces = []
    for compile_it in (False, True):
        run = tmp_path / str(compile_it)
        registry.train(dataclasses.replace(small, compile=compile_it), picture_shards, str(run), quiet=True)
        traces.append(
            [[row[name] for name in row if "loss" in name] for row in read_metrics(run) if "loss" in row]
        )
    assert 1 <= graphs.frame_count <= 2
    assert len(traces[0]) == 2
    np.testing.assert_allclose(traces[1], traces[0], rtol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
@pytest.mark.timeout(600)
@pytest.mark.drill
def test_compiled_objective_gives_the_same_numbers() -> None:
    one_block = dataclasses.replace(SMALLEST, depth=1)  # a second one doubles the time of the test
    plain = terms_and_gradients(tf.loss, config=one_block)
    # Float32 in another order of operations.
    assert_same(terms_and_gradients(compiled(tf.loss), config=one_block), plain, 1e-5)


def test_failed_compilation_names_the_setting_that_turns_it_off_or_runs_without(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unclear(x: Tensor) -> dict[str, Tensor]:
        if x.sum() > 0:  # a branch on data breaks the graph
            return {"loss": x}
        return {"loss": -x}

    with pytest.raises(TrainerError, match=r"compile: .*; train with --set compile=false"):
        compiled(unclear)(torch.ones(2))
    either = compiled(unclear, or_eager=True)
    for _ in range(2):
        assert torch.equal(either(torch.ones(2))["loss"], torch.ones(2))
    assert capsys.readouterr().err.count("training is not compiled") == 1
