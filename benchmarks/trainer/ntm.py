"""Cost of Normalizing Trajectory Models: training by pairs, and the ways a trajectory ends.

    python -m benchmarks.trainer.ntm

Times of all rows come from one run, in turns; on a CPU they are seconds of work, summed over threads, which other
programs do not stretch. So ratios hold where the machine is shared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks import records
from trainer.methods.normalizing_trajectory import objective as method
from trainer.methods.normalizing_trajectory.chains import noise_times
from trainer.methods.normalizing_trajectory.config import NormalizingMethodConfig, NormalizingModelConfig
from trainer.methods.normalizing_trajectory.network import NormalizingNetwork
from trainer.methods.normalizing_trajectory.sample import Sampler, num_noises
from trainer.seeds import StepRows


def main() -> None:
    options = make_parser().parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    network = NormalizingNetwork(
        NormalizingModelConfig(
            grid=(options.grid, options.grid),
            in_channels=options.channels,
            width=options.width,
            depth=options.depth,
            num_heads=options.heads,
            num_steps=(options.transitions,),
            flow_width=options.width,
            flow_depth=options.flow_depth,
            flow_heads=options.heads,
            denoiser_depth=options.denoiser_depth,
        )
    ).to(options.device)
    groups = {
        "training, batch by batch": training(network, options),
        "sampling": sampling(network, options),
        "inverse of one state": inverting(network, options),
    }
    table = []
    for title, rows in groups.items():
        print(f"\n{title} ({options.batch} images, {options.transitions} transitions, {options.device})")
        seconds = in_turns(rows, options)
        slowest = max(seconds.values())
        for name, each in seconds.items():
            rate = options.batch / each
            print(f"  {name:<44} {each:8.3f} s  {rate:8.2f} images/s  {slowest / each:6.1f}×")
            table.append([title, name, f"{rate:.3g}", f"{slowest / each:.1f}"])
    records.write(
        options.record,
        columns=["work", "way", "images per core second", "ratio to the slowest"],
        rows=table,
        seeds=[0],
    )


def training(network: NormalizingNetwork, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Loss and gradients: all pairs folded into one batch, pair after pair, and one drawn pair a sample."""
    shape, T, B = (options.grid, options.grid, options.channels), options.transitions, options.batch
    rows = StepRows(batch_size=B, seed=0, step=0, device=options.device)
    draws = method.draw_batch(rows, shape, NormalizingMethodConfig(pairs="one"), (T,))
    label = torch.zeros(B, dtype=torch.int64, device=options.device)
    canvases = torch.randn(B, 1, *shape, device=options.device)
    chain = method.build_chain(
        canvases,
        label,
        label,
        noise=draws.noise,
        t_min=draws.t_min,
        trajectory="tokens",
        level_noise=0.1,
    )

    def step(pair: torch.Tensor | None) -> None:
        network.zero_grad(set_to_none=True)
        terms = method.loss(network, chain.states, chain.times, chain.given, num_steps=T, pair=pair)
        terms["loss"].backward()

    def one_after_the_other() -> None:
        for k in range(T):
            step(torch.full_like(label, k))

    return {
        "all pairs, one after the other": one_after_the_other,
        "all pairs, folded into the batch": lambda: step(None),
        "one pair a sample": lambda: step(draws.pair),
    }


def sampling(network: NormalizingNetwork, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """A trajectory with each of its endings."""
    B, T, shape = options.batch, options.transitions, (options.grid, options.grid, options.channels)
    noise = torch.randn(num_noises(network, T), B, *shape, device=options.device)
    label = torch.zeros(B, dtype=torch.int64, device=options.device)

    def draw(ending: str) -> Callable[[], object]:
        sampler = Sampler(network=network, method=NormalizingMethodConfig(), num_steps=T, ending=ending)
        return lambda: sampler.canvases(label, noise)

    return {
        "inverse and score denoising": draw("score"),
        "inverse of the cleanest state": draw("inverse"),
        "learned denoiser": draw("denoiser"),
    }


def inverting(network: NormalizingNetwork, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """The transporter's inverse with cached keys and values, and with a whole pass for each token."""
    shape = (options.batch, options.grid**2, options.channels)
    u = torch.randn(shape, device=options.device)
    times = noise_times(torch.full((options.batch,), 0.02, device=options.device), options.transitions, 256)
    level = torch.zeros(options.batch, dtype=torch.int64, device=options.device)
    condition = network.flow_condition(times[:, 0], level, options.transitions)

    @torch.no_grad()
    def slow() -> None:
        for block in network.transporter.blocks:
            x = torch.zeros_like(u)
            for n in range(1, u.shape[1] + 1):
                mean, log_scale = block._affine(x[:, :n], condition)
                x[:, n - 1] = u[:, n - 1] * log_scale[:, -1].exp() + mean[:, -1]

    return {
        "a pass over the tokens so far, for each": slow,
        "cached keys and values": lambda: network.transporter.inverse(u, condition),
        "forward, for comparison": lambda: network.transporter(u, condition),
    }


def in_turns(rows: dict[str, Callable[[], object]], options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each, measured in turns after one unmeasured turn."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    clock = time.perf_counter if options.device == "cuda" else time.process_time
    for turn in range(options.turns + 1):
        for name, call in rows.items():
            start = clock()
            call()
            if options.device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(clock() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("grid", 16), ("channels", 48), ("width", 96), ("depth", 6), ("heads", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("flow-depth", 2), ("denoiser-depth", 2), ("transitions", 4), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("turns", 3), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    records.add_option(parser)
    return parser


if __name__ == "__main__":
    main()
