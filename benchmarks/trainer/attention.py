"""Attention under a forward-mode derivative: which way is fastest, and what the inexact one costs in error.

`python -m benchmarks.trainer.attention` prints, for each way, seconds of loss and backward and the ratio to the
default:

    by hand      the kernel of scaled_dot_product_attention for the value, its tangent by formula (the default)
    math         torch differentiates scaled_dot_product_attention itself; only its MATH backend can
    explicit     torch differentiates softmax(qkᵀ/√d)v, written out
    differences  du/dt from two more values of u, at ± a small step along the direction: no derivative at all

Ways take turns within a round. On a CPU with one thread seconds are processor time, which other load barely moves.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import records
from benchmarks.trainer.train_step import fresh_network
from trainer.methods.trajectory_forcing import objective as trajectory_forcing
from trainer.methods.trajectory_forcing.config import MethodConfig
from trainer.methods.trajectory_forcing.network import Prediction, TrajectoryTransformer
from trainer.networks import attention as layers
from trainer.seeds import StepRows

BY_HAND = layers.attend


def math_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention [B, H, N, d] whose derivatives are torch's."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same in three operations."""
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v


class Differences(nn.Module):
    """A network whose du/dt comes from values: (u(z + εd, t + ε) − u(z − εd, t − ε))/2ε, r held."""

    def __init__(self, network: TrajectoryTransformer, step: float) -> None:
        super().__init__()
        self.network, self.step, self.config = network, step, network.config

    def forward(self, z: Tensor, **inputs: Any) -> Prediction:
        """The network's own prediction."""
        return self.network(z, **inputs)

    def forward_with_derivative(
        self, z: Tensor, direction: Tensor, *, t: Tensor, **inputs: Any
    ) -> tuple[Prediction, Tensor]:
        """As the network's, but for du/dt."""
        with torch.no_grad():
            ahead, behind = (
                self.network(z + e * direction, t=t + e, heads="u", **inputs).u
                for e in (self.step, -self.step)
            )
        return self.network(z, t=t, **inputs), (ahead - behind) / (2 * self.step)


TITLES = {
    "by hand": "tangent by formula, fused kernel for the value (default)",
    "math": "`scaled_dot_product_attention`, MATH backend",
    "explicit": "softmax(qkᵀ/√d)v written out",
    "differences": "central differences of u",
}
"""Rows of the record."""


def main() -> None:
    options = make_parser().parse_args()
    torch.set_num_threads(options.threads)
    network = awake_network(options)
    ways: dict[str, tuple[Callable[..., Tensor], nn.Module]] = {
        "by hand": (BY_HAND, network),
        "math": (math_attention, network),
        "explicit": (explicit_attention, network),
        "differences": (BY_HAND, Differences(network, options.step)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(options.rounds + 1):
        for name, (attention, model) in ways.items():
            layers.attend = attention
            spent = timed(model, options)
            if number:  # the first round warms up
                seconds[name].append(spent)
    exact = derivative(network, options)
    print(
        f"batch {options.batch}, {options.device}, {options.threads} threads, {options.precision},"
        f" {options.rounds} rounds"
    )
    print(f"{'':<12} seconds  to by hand  error of du/dt")
    rows = []
    for name, (attention, model) in ways.items():
        layers.attend = attention
        found = derivative(model, options)
        error = float((found - exact).norm() / exact.norm())
        ratios = [a / b for a, b in zip(seconds[name], seconds["by hand"], strict=True)]
        median = statistics.median(seconds[name])
        print(f"{name:<12} {median:7.3f}  {statistics.median(ratios):10.2f}  {error:14.1e}")
        rows.append([TITLES[name], f"{median:.2f}", f"{statistics.median(ratios):.2f}", f"{error:.0e}"])
    records.write(
        options.record,
        columns=[
            "attention under the derivative",
            "processor seconds",
            "ratio to the default",
            "error of du/dt",
        ],
        rows=rows,
        seeds=[0],
        figures={"seconds": seconds},
    )


def awake_network(options: argparse.Namespace) -> TrajectoryTransformer:
    """A fresh network whose gates and outputs are not 0, so that every layer has a derivative."""
    torch.manual_seed(0)
    network = fresh_network(options)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return network.to(options.device)


def batch_of(options: argparse.Namespace) -> dict[str, Any]:
    """Random canvases and the draws of one step."""
    B, shape, device = options.batch, (options.grid, options.grid, options.channels), options.device
    generator = torch.Generator().manual_seed(0)
    x, prev = (torch.randn(B, *shape, generator=generator).to(device) for _ in range(2))
    draws = trajectory_forcing.draw_batch(
        StepRows(batch_size=B, seed=0, step=0, device=device), shape, MethodConfig()
    )
    times = {"t": draws.t, "r": draws.r, "noise": draws.noise}
    level, label = torch.arange(B, device=device) % 4, torch.arange(B, device=device)
    return {"x": x, "prev": prev, "level": level, "label": label, **times}


def timed(model: nn.Module, options: argparse.Namespace) -> float:
    """Seconds of one loss with its backward pass."""
    batch = batch_of(options)
    clock = time.process_time if options.device == "cpu" and options.threads == 1 else time.perf_counter
    start = clock()
    with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bfloat16"):
        terms = trajectory_forcing.loss(model, batch.pop("x"), regions=None, **batch)
    terms["loss"].backward()
    if options.device == "cuda":
        torch.cuda.synchronize()
    spent = clock() - start
    model.zero_grad(set_to_none=True)
    return spent


def derivative(model: Any, options: argparse.Namespace) -> Tensor:
    """du/dt as the model finds it."""
    batch = batch_of(options)
    z, direction = batch.pop("noise"), batch.pop("x")
    with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bfloat16"):
        return model.forward_with_derivative(z, direction, **batch)[1].detach()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("grid", 16), ("channels", 96), ("width", 192), ("depth", 8), ("head-depth", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("heads", 6), ("batch", 16), ("rounds", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--step", type=float, default=1e-2, help="of the differences")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    records.add_option(parser)
    return parser


if __name__ == "__main__":
    main()
