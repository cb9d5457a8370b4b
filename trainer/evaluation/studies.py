"""Studies of `trainer evaluate` on request: how local edits are, when boundaries appear, what surprises the model.

    L levels (coarse → fine), H×W grid, C channels, S steps, K regions

Each study writes one JSON file into the run folder and gives name and value of its main numbers.

Boundaries: a level is drawn in S steps from noise (t = 1) to its canvas (t = 0). At every t the network predicts a
clean canvas x̂, which is divided into K regions. Their outlines are compared with those of the regions that the level
ends with, of a flat division of the final tokens, and of meaningless partitions. Definitions: docs/metrics.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hierarchy_builder.errors import UsageError
from hierarchy_builder.files.whole import sealed_text, write_bytes, write_sealed_json
from hierarchy_builder.progress import Follow, unseen
from hierarchy_builder.records import spread_evenly
from trainer.data.shards import ShardIndex
from trainer.evaluation.evaluate import check_fits
from trainer.evaluation.sweep import EDIT, OTHER_NOISE, SweepConfig, summarise, sweep
from trainer.methods.normalizing_trajectory.likelihood import likelihood
from trainer.methods.trajectory_forcing.network import TrajectoryTransformer
from trainer.methods.trajectory_forcing.sample import time_steps
from trainer.metrics.alignment import boundary_f, shifted, shuffled, tiles
from trainer.metrics.regions import divide, extract_regions
from trainer.metrics.spread import spread
from trainer.seeds import level_noise
from trainer.trajectories.photos import start_from_shards
from trainer.trajectories.pipeline import TrajectoryPipeline
from trainer.trajectories.trajectory import Trajectory

EDITS, ALIGNMENT, LIKELIHOOD = "edits.json", "alignment.json", "likelihood.json"
"""Files of a run folder."""
PATH_STEPS = 16
"""Network evaluations per level along the path."""
SEMANTIC, FLAT, SHIFTED, GRID, SHUFFLED = "semantic", "flat", "shifted", "grid", "shuffled"
"""Partitions whose outlines are compared with those of x̂, see `partitions`."""


def check_has_levels(pipe: TrajectoryPipeline) -> None:
    """Raise UsageError if samples have one level, since an edit is measured in the levels after the edited one."""
    if pipe.drawn_levels == 1:
        raise UsageError(
            "edits are measured in the levels after the edited one, but samples of this run have one level: leave out "
            "--edits"
        )


def edit_study(
    pipe: TrajectoryPipeline,
    run: Path,
    labels: Sequence[int],
    seeds: Sequence[int],
    num_steps: int = 1,
    follow: Follow = unseen,
    classes: Sequence[int] | None = None,
) -> Iterator[tuple[str, float]]:
    """Edit the features of every level, over classes and seeds: see `trainer.evaluation.sweep`.

    Yields lis_<edited>_<measured> with the ends _low and _high of its 95 % interval, the same for other noise instead
    of an edit (_other_noise), and gain_<edited>_<measured>. classes: see `SweepConfig`. Writes RUN/edits.json.
    """
    from_classes = None if classes is None else tuple(classes)
    config = SweepConfig(labels=tuple(labels), seeds=tuple(seeds), num_steps=num_steps, classes=from_classes)
    summary = summarise(sweep(pipe, config, follow=follow))
    setup = {"labels": list(labels), "seeds": list(seeds), "num_steps": num_steps, "kind": config.kind}
    write_sealed_json(run / EDITS, {**setup, "summary": summary}, sort_keys=False)
    for line in summary:
        where = f"{line['level']}_{line['measured']}"
        if line["measured"] == line["level"]:
            continue  # an edit does not change the other tokens of its own level
        if line["arm"] == EDIT:
            yield f"lis_{where}", line["lis_mean"]
            yield f"lis_{where}_low", line["lis_low"]
            yield f"lis_{where}_high", line["lis_high"]
            yield f"gain_{where}", line["gain_mean"]
        elif line["arm"] == OTHER_NOISE:
            yield f"lis_{where}_other_noise", line["lis_mean"]


def check_has_paths(pipe: TrajectoryPipeline) -> None:
    """Raise UsageError unless the model was trained by Trajectory Forcing, the only method whose path is measured."""
    if not isinstance(pipe.model, TrajectoryTransformer):
        raise UsageError(
            f"--alignment needs a model of Trajectory Forcing, found {type(pipe.model).__name__}: leave out "
            "--alignment"
        )


def alignment_study(
    pipe: TrajectoryPipeline,
    run: Path,
    labels: Sequence[int],
    seeds: Sequence[int],
    num_steps: int = PATH_STEPS,
    photos: Sequence[Trajectory] = (),
    follow: Follow = unseen,
) -> Iterator[tuple[str, float]]:
    """Measure when boundaries appear on the generative path, over classes and seeds, and over photographs.

    Yields alignment_<level>_<partition>: the boundary F with the level's own regions, and with flat and shifted ones,
    averaged over all steps but the last, whose x̂ is the canvas itself. Names that end in _real are of photographs,
    compared with the regions of their teacher. Writes RUN/alignment.json with all times and partitions (`summary`,
    `photos`).
    """
    summary = summarise_alignment(list(alignment(pipe, labels, seeds, num_steps, follow)))
    of_photos = summarise_alignment(list(alignment_of_photos(pipe, photos, num_steps, follow)))
    setup = {"labels": list(labels), "seeds": list(seeds), "num_steps": num_steps, "num_photos": len(photos)}
    write_sealed_json(run / ALIGNMENT, {**setup, "summary": summary, "photos": of_photos}, sort_keys=False)
    yield from _early_means(summary, "")
    yield from _early_means(of_photos, "_real")


def photos_of(pipe: TrajectoryPipeline, index: ShardIndex, count: int) -> list[Trajectory]:
    """At most `count` samples spread evenly over the shards, each with a noise seed of its own."""
    chosen = spread_evenly(index.num_samples, count)
    return [start_from_shards(pipe, index, number, seed=seed) for seed, number in enumerate(chosen)]


def measure_likelihood(
    run: Path, pipe: Any, index: ShardIndex, max_real: int, num_steps: int, ema: str, follow: Follow
) -> list[dict[str, Any]]:
    """Rows name/value of `trainer evaluate --likelihood`; they and the bits of every image are kept in likelihood.json.

    Images are listed from the most surprising one down, so that the head of the list flags odd hierarchies.
    Arguments and errors are those of `likelihood`; raises MismatchError if the shards do not fit the model.
    """
    check_fits(pipe, index)
    metrics, images = likelihood(pipe, index, max_real, num_steps, follow)
    rows = [{"name": name, "value": value} for name, value in metrics]
    listed = [
        {
            "key": image.key,
            "number": image.number,
            "added_bits": round(image.added_total, 2),
            "by_level": [round(float(bits), 2) for bits in image.added.sum(axis=(1, 2, 3))],
            "by_region": [[round(bits, 2) for bits in level] for level in image.region_bits()[:-1]],
        }
        for image in sorted(images, key=lambda image: image.added_total, reverse=True)
    ]
    setup = {"shards": index.name, "shards_hash": index.config_hash, "num_steps": num_steps, "ema": ema}
    content = {**setup, "metrics": rows, "images": listed}
    write_bytes(run / LIKELIHOOD, sealed_text(content, sort_keys=False, indent=None))
    return rows


@torch.no_grad()
def denoising_path(
    pipe: TrajectoryPipeline, label: int, noise: Tensor, previous: Tensor | None, level: int, num_steps: int
) -> tuple[list[float], Tensor]:
    """Draw one level in steps and record which clean canvas the network predicts on the way.

    noise: float32 [H, W, C], the start at t = 1. previous: [H, W, C], raw canvas of the level before; None at level 0.
    Returns the times t from 1 to 0, and x̂ float32 [S+1, H, W, C] in units of raw features. At t > 0, x̂ is where a
    straight line from z_t ends: z_t − t·u(z_t, t, r = 0). The last x̂ is the drawn canvas.
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
    num_steps: int = PATH_STEPS,
    follow: Follow = unseen,
) -> Iterator[dict[str, Any]]:
    """Boundary F along the path, one row for each class, seed, level, partition and time.

    Every level is drawn in `num_steps` steps from the canvas before it. Ward's linkage divides x̂ into as many regions
    as the partition has that it is compared with. Columns: label, seed, level, partition, t, f, regions.
    Raises UsageError for models of another method.
    """
    check_has_paths(pipe)
    units = list(itertools.product(labels, seeds))
    for label, seed in follow(units, "paths", len(units)):
        noise = _noise(pipe, seed)
        paths: dict[int, tuple[list[float], Tensor]] = {}
        previous = None
        for level in range(len(noise)):
            paths[level] = denoising_path(pipe, label, noise[level], previous, level, num_steps)
            previous = paths[level][1][-1]
        final = torch.stack([expected[-1] for _, expected in paths.values()])
        yield from _rows({"label": label, "seed": seed}, paths, final)


def alignment_of_photos(
    pipe: TrajectoryPipeline,
    photos: Sequence[Trajectory],
    num_steps: int = PATH_STEPS,
    follow: Follow = unseen,
) -> Iterator[dict[str, Any]]:
    """The same for photographs: level ℓ ≥ 1 is drawn from the photograph's own level ℓ−1, and x̂ is compared with the
    teacher's regions of ℓ, which the network has not seen.

    photos: trajectories that start from photographs (`trainer.trajectories.photos`). Columns and errors are those of
    `alignment`.
    """
    check_has_paths(pipe)
    for photo in follow(photos, "paths from photos", len(photos)):
        noise = _noise(pipe, photo.seeds[-1])
        paths = {
            level: denoising_path(pipe, photo.label, noise[level], photo.levels[level - 1], level, num_steps)
            for level in range(1, len(noise))
        }
        yield from _rows({"label": photo.label, "seed": photo.seeds[-1]}, paths, photo.levels)


def partitions(levels: Tensor, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """For each level, the regions it ended with and other partitions of as many: float [L, H, W, C] → int64 [H, W].

    semantic: `extract_regions` of that level (for the last level, of the one before). flat: Ward's linkage of the
    final tokens, which belongs to no hierarchy. shifted, shuffled, grid: see `metrics.alignment`.
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
        dict(zip(("level", "partition", "t"), place, strict=True))
        | {f"f_{name}": value for name, value in spread(f)._asdict().items()}
        for place, f in groups.items()
    ]


def _noise(pipe: TrajectoryPipeline, seed: int) -> Tensor:
    """Noise of all levels of one trajectory, float32 [L, H, W, C]."""
    config = pipe.model.config
    return level_noise([seed], config.num_levels, config.grid, config.in_channels)[:, 0]


def _rows(
    unit: dict[str, int], paths: Mapping[int, tuple[list[float], Tensor]], levels: Tensor
) -> Iterator[dict[str, Any]]:
    """Compare the paths of some levels with the partitions of `levels`."""
    targets = partitions(levels, torch.Generator().manual_seed(unit["seed"]))
    for level, (times, expected) in paths.items():
        for name, regions in targets[level].items():
            count = int(regions.max()) + 1
            for t, canvas in zip(times, expected, strict=True):
                score = boundary_f(divide(canvas, count), regions)
                yield {**unit, "level": level, "partition": name, "t": t, "f": score, "regions": count}


def _early_means(summary: Sequence[Mapping[str, Any]], suffix: str) -> Iterator[tuple[str, float]]:
    means: dict[tuple[int, str], list[float]] = {}
    last_step = min((line["t"] for line in summary if line["t"] > 0), default=0.0)
    for line in summary:
        if line["t"] > last_step and line["partition"] in (SEMANTIC, FLAT, SHIFTED):
            means.setdefault((line["level"], line["partition"]), []).append(line["f_mean"])
    for (level, partition), values in means.items():
        yield f"alignment_{level}_{partition}{suffix}", sum(values) / len(values)
