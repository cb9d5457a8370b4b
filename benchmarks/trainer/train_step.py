"""Seconds per training step: loss, backward, optimiser, weight averages.

python -m benchmarks.trainer.train_step --help
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time

import torch

from benchmarks import records
from trainer.methods.trajectory_forcing import objective as trajectory_forcing
from trainer.methods.trajectory_forcing.config import MethodConfig
from trainer.methods.trajectory_forcing.network import TrajectoryTransformer
from trainer.networks.config import ModelConfig
from trainer.seeds import StepRows
from trainer.training.config import OptimConfig
from trainer.training.optim import MuonAdam
from trainer.training.weights import WeightAverages


def main() -> None:
    options = make_parser().parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = fresh_network(options).to(options.device)
    step = training_step(model, options)
    step(0)
    seconds = [timed(step, number) for number in range(1, options.steps + 1)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if options.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    print(
        f"{statistics.median(seconds):.3f} s per step (median of {len(seconds)}, fastest {min(seconds):.3f}), "
        f"batch {options.batch}, {options.precision}, {options.device}, peak {peak:.2f} GiB"
    )
    shape = f"grid {options.grid}, {options.channels} channels, width {options.width}, depth {options.depth}"
    records.write(
        options.record,
        columns=["network", "batch", "precision, device", "seconds per step (median)", "peak memory, GiB"],
        rows=[
            [
                shape,
                options.batch,
                f"{options.precision}, {options.device}",
                f"{statistics.median(seconds):.2f}",
                f"{peak:.2f}",
            ]
        ],
        seeds=[0],
        figures={"seconds": seconds, "peak_gib": peak},
    )


def fresh_network(options: argparse.Namespace) -> TrajectoryTransformer:
    """The network that the options describe."""
    return TrajectoryTransformer(
        ModelConfig(
            grid=(options.grid, options.grid),
            in_channels=options.channels,
            width=options.width,
            depth=options.depth,
            head_depth=options.head_depth,
            num_heads=options.heads,
        )
    )


def training_step(model: TrajectoryTransformer, options: argparse.Namespace):
    """One whole step on fixed random canvases, as the training loop takes it."""
    optimiser = MuonAdam(model.named_parameters(), OptimConfig())
    averages = WeightAverages(model, OptimConfig().ema_halflives_kimg)
    B, shape, device = options.batch, (options.grid, options.grid, options.channels), options.device
    x, prev = torch.randn(B, *shape, device=device), torch.randn(B, *shape, device=device)
    batch = {
        "level": torch.arange(B, device=device) % 4,
        "label": torch.arange(B, device=device) % 1000,
        "regions": torch.randint(0, 9, (B, *shape[:2]), device=device),
    }

    def step(number: int) -> None:
        draws = trajectory_forcing.draw_batch(
            StepRows(batch_size=B, seed=0, step=number, device=device), shape, MethodConfig()
        )
        with torch.autocast(device, dtype=torch.bfloat16, enabled=options.precision == "bfloat16"):
            terms = trajectory_forcing.loss(
                model, x, prev=prev, t=draws.t, r=draws.r, noise=draws.noise, **batch
            )
        terms["loss"].backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        averages.update(model, images_seen=(number + 1) * B, batch_size=B)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def timed(step, number: int) -> float:
    start = time.perf_counter()
    step(number)
    return time.perf_counter() - start


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("grid", 16), ("channels", 96), ("width", 192), ("depth", 8), ("head-depth", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("heads", 6), ("batch", 16), ("steps", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    records.add_option(parser)
    return parser


if __name__ == "__main__":
    main()
