"""When do boundaries of regions appear along the generative path? A study of a trained model.

    B images, L levels (coarse → fine), H×W grid, C channels, S steps, K regions

A level is drawn in S steps from noise (t = 1) to its canvas (t = 0). At every t the network says what clean canvas x̂
it expects; its partition into K regions is held against the outlines of the regions the level ends with, of a flat
division of the final tokens, and of partitions that mean nothing. Definitions: docs/metrics.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hierarchy_builder.errors import UsageError
from hierarchy_builder.progress import Follow, unseen
from trainer.methods.trajectory_forcing.network import TrajectoryTransformer
from trainer.methods.trajectory_forcing.sample import time_steps
from trainer.metrics.alignment import boundary_f, shifted, shuffled, tiles
from trainer.metrics.regions import divide, extract_regions
from trainer.metrics.spread import spread
from trainer.seeds import level_noise
from trainer.trajectories.pipeline import TrajectoryPipeline
from trainer.trajectories.trajectory import Trajectory

SEMANTIC, FLAT, SHIFTED, GRID, SHUFFLED = "semantic", "flat", "shifted", "grid", "shuffled"


@torch.no_grad()
def denoising_path(
    pipe: TrajectoryPipeline, label: int, noise: Tensor, previous: Tensor | None, level: int, num_steps: int
) -> tuple[list[float], Tensor]:
    """One level drawn in steps, and what canvas the network expects on the way.

    noise: float32 [H, W, C], the start at t = 1. previous: [H, W, C], raw canvas of the level before; None at level 0.
    Returns times t from 1 to 0 and x̂ float32 [S+1, H, W, C] in units of raw features: at time t > 0 the end of the
    straight way from z_t, z_t − t·u(z_t, t, r = 0), and last the canvas itself.
    """
    device = next(pipe.model.parameters()).device
    z = noise[None].to(device)
    prev = torch.zeros_like(z) if previous is None else pipe.normaliser.apply(previous[None].to(device))
    ids = torch.tensor([label], device=device)
    inputs: dict[str, Any] = {"label": ids, "level": torch.full_like(ids, level), "prev": prev, "heads": "u"}
    times, expected = [], []
    for t_now, t_next in time_steps(num_steps):
        t, r = z.new_full((1,), t_now), z.new_full((1,), t_next)
        expected.append(z - t_now * pipe.model(z, t=t, r=torch.zeros_like(t), **inputs).u)
        times.append(t_now)
        z = z - (t_now - t_next) * pipe.model(z, t=t, r=r, **inputs).u
    canvases = pipe.normaliser.undo(torch.cat([*expected, z]))
    return [*times, 0.0], canvases.cpu()


def alignment(
    pipe: TrajectoryPipeline,
    labels: Sequence[int],
    seeds: Sequence[int],
    num_steps: int = 16,
    follow: Follow = unseen,
) -> Iterator[dict[str, Any]]:
    """Boundary F along the path, one row for each class, seed, level, partition and time.

    Every level is drawn in `num_steps` steps from the canvas before it. x̂ is divided by Ward's linkage into as many
    regions as the partition it is held against. Columns: label, seed, level, partition, t, f, regions.
    Raises UsageError for models of another method, whose paths are others.
    """
    check_has_paths(pipe)
    config = pipe.model.config
    units = list(itertools.product(labels, seeds))
    for label, seed in follow(units, "paths", len(units)):
        noise = level_noise([seed], config.num_levels, config.grid, config.in_channels)[:, 0]
        paths: dict[int, tuple[list[float], Tensor]] = {}
        previous = None
        for level in range(config.num_levels):
            paths[level] = denoising_path(pipe, label, noise[level], previous, level, num_steps)
            previous = paths[level][1][-1]
        final = torch.stack([expected[-1] for _, expected in paths.values()])
        yield from _rows({"label": label, "seed": seed}, paths, final)


def alignment_of_photos(
    pipe: TrajectoryPipeline, photos: Sequence[Trajectory], num_steps: int = 16, follow: Follow = unseen
) -> Iterator[dict[str, Any]]:
    """The same with photographs: level ℓ ≥ 1 is drawn from the photograph's own level ℓ−1, and x̂ held against the
    teacher's regions of ℓ, which the network has not seen.

    photos: trajectories that start from photographs (`trainer.trajectories.photos`). Columns and errors as
    of `alignment`.
    """
    check_has_paths(pipe)
    config = pipe.model.config
    for photo in follow(photos, "paths from photos", len(photos)):
        seed = photo.seeds[-1]
        noise = level_noise([seed], config.num_levels, config.grid, config.in_channels)[:, 0]
        paths = {
            level: denoising_path(pipe, photo.label, noise[level], photo.levels[level - 1], level, num_steps)
            for level in range(1, config.num_levels)
        }
        yield from _rows({"label": photo.label, "seed": seed}, paths, photo.levels)


def _rows(
    unit: dict[str, int], paths: Mapping[int, tuple[list[float], Tensor]], levels: Tensor
) -> Iterator[dict[str, Any]]:
    """Paths of some levels against the partitions of `levels`."""
    targets = partitions(levels, torch.Generator().manual_seed(unit["seed"]))
    for level, (times, expected) in paths.items():
        for name, regions in targets[level].items():
            count = int(regions.max()) + 1
            for t, canvas in zip(times, expected, strict=True):
                score = boundary_f(divide(canvas, count), regions)
                yield {**unit, "level": level, "partition": name, "t": t, "f": score, "regions": count}


def check_has_paths(pipe: TrajectoryPipeline) -> None:
    """Raise UsageError unless the model is one of Trajectory Forcing, whose paths are measured here."""
    if not isinstance(pipe.model, TrajectoryTransformer):
        raise UsageError(
            f"alignment asks for a model of Trajectory Forcing, found {type(pipe.model).__name__}: leave out "
            "--alignment"
        )


def partitions(levels: Tensor, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """For each level the regions it ended with, and others with as many: float [L, H, W, C] → int64 [H, W] each.

    semantic: `extract_regions` of that level (the last level: of the one before). flat: Ward's linkage of the final
    tokens into as many, which belongs to no hierarchy. shifted, shuffled, grid: see `metrics.alignment`.
    """
    found = extract_regions(levels).long()
    targets = []
    for level in range(len(levels)):
        _, ids = found[min(level, len(found) - 1)].unique(return_inverse=True)
        count = int(ids.max()) + 1
        targets.append(
            {
                SEMANTIC: ids,
                FLAT: divide(levels[-1], count),
                SHIFTED: shifted(ids, generator),
                GRID: tiles(count, (ids.shape[0], ids.shape[1])),
                SHUFFLED: shuffled(ids, generator),
            }
        )
    return targets


def summarise_alignment(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean, deviation and 95 % interval of f over classes and seeds, for each level, partition and time."""
    groups: dict[tuple[int, str, float], list[float]] = {}
    for row in rows:
        groups.setdefault((row["level"], row["partition"], row["t"]), []).append(row["f"])
    return [
        {
            "level": level,
            "partition": partition,
            "t": t,
            **{f"f_{k}": v for k, v in spread(f)._asdict().items()},
        }
        for (level, partition, t), f in groups.items()
    ]


def alignment_table(summary: Sequence[Mapping[str, Any]], columns: int = 5) -> list[dict[str, Any]]:
    """A summary to be read: a row for each level and partition, a column for some of the times."""
    times = sorted({line["t"] for line in summary}, reverse=True)
    shown = [times[round(i * (len(times) - 1) / (columns - 1))] for i in range(columns)]
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for line in summary:
        if line["t"] in shown:
            place = {"level": line["level"], "partition": line["partition"]}
            row = rows.setdefault((line["level"], line["partition"]), place)
            row[f"t={line['t']:.2f}"] = f"{line['f_mean']:.2f}±{line['f_high'] - line['f_mean']:.2f}"
    return list(rows.values())
