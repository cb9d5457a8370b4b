"""What a sample costs by each method: evaluations of the network, seconds of work, and ratios, from one run.

    python -m benchmarks.trainer.sampling RUN RUN … [--images 8] [--steps 8] [--turns 3] [--pixel-stage RUN]

Runs may be of any method; they are timed in turns, and the quickest turn counts. Seconds are seconds of work on a CPU,
summed over threads, which other programs do not stretch; on a GPU they are of the clock. Drawing ends in canvases,
decoding in one picture of the last of them; a run of Latent Forcing with a cascade draws its pixels in the second.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import records
from trainer.trajectories.pipeline import TrajectoryPipeline


def main() -> None:
    """Print a row for every run."""
    given = make_parser().parse_args()
    pipes = {str(run): _opened(run, given.pixel_stage) for run in given.runs}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in pipes}
    for _ in range(given.turns):
        for name, pipe in pipes.items():
            seconds[name].append(_timed(pipe, given.images, given.steps))
    best = {name: min(sum(turn) for turn in turns) / given.images for name, turns in seconds.items()}
    rows = []
    for name, pipe in pipes.items():
        drawing, decoding = (min(turn[part] for turn in seconds[name]) / given.images for part in (0, 1))
        evaluations = ", ".join(f"{count} {what}" for what, count in _evaluations(pipe, given.steps).items())
        print(
            f"{name}: {drawing:.3f} s drawn + {decoding:.3f} s decoded = {best[name]:.3f} s a sample, "
            f"{best[name] / min(best.values()):.1f}×; evaluations of {evaluations}"
        )
        ratio = f"{best[name] / min(best.values()):.1f}"
        rows.append([name, evaluations, f"{drawing:.3f} + {decoding:.3f}", ratio])
    records.write(
        given.record,
        columns=["run", "evaluations", "core seconds, drawn + decoded", "ratio"],
        rows=rows,
        seeds=[0],
    )


def _opened(run: Path, pixel_stage: Path | None) -> TrajectoryPipeline:
    pipe = TrajectoryPipeline.from_pretrained(run)
    can_decode = pipe(0, 0, num_steps=_steps(pipe, 2)).can_decode
    return pipe if can_decode else TrajectoryPipeline.from_pretrained(run, pixel_stage=pixel_stage)


def _steps(pipe: TrajectoryPipeline, latent: int) -> int:
    """Steps of a call: those of Latent Forcing are asked for, the others take what they were trained with."""
    return latent if type(pipe).__name__ == "LatentPipeline" else 1


def _timed(pipe: TrajectoryPipeline, images: int, steps: int) -> tuple[float, float]:
    """Seconds of drawing and of decoding `images` samples."""
    clock = _clock()
    start = clock()
    drawn = pipe([0] * images, list(range(images)), num_steps=_steps(pipe, steps))
    between = clock()
    for trajectory in drawn:
        trajectory.decode(level=trajectory.num_levels - 1)
    return between - start, clock() - between


def _clock() -> Callable[[], float]:
    if not torch.cuda.is_available():
        return time.process_time

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def _evaluations(pipe: TrajectoryPipeline, steps: int) -> dict[str, int]:
    """Forward passes of the network, or of its parts, for one sample and its picture."""
    parts = {name: getattr(pipe.model, name, None) for name in ("predictor", "transporter", "denoiser")}
    modules = {name: part for name, part in parts.items() if part is not None} or {"network": pipe.model}
    counted: Counter[str] = Counter()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: counted.update([name]))
        for name, module in modules.items()
    ]
    trajectory = pipe(0, 0, num_steps=_steps(pipe, steps))
    trajectory.decode(level=trajectory.num_levels - 1)
    for hook in hooks:
        hook.remove()
    return dict(counted)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="steps a stage of Latent Forcing")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--pixel-stage", type=Path, help="what decodes where a run has no decoder of its own")
    records.add_option(parser)
    return parser


if __name__ == "__main__":
    main()
