"""Longer looks at a trained model, kept in its run folder: locality of edits, and alignment along the path.

Each writes one JSON file (setup, summary) and yields (name, value) of its main numbers for the table of `evaluate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hierarchy_builder.errors import UsageError
from hierarchy_builder.files import write_json
from hierarchy_builder.progress import Follow, unseen
from trainer.data.shards import ShardIndex, spread_evenly
from trainer.evaluation.path_alignment import (
    FLAT,
    SEMANTIC,
    SHIFTED,
    alignment,
    alignment_of_photos,
    summarise_alignment,
)
from trainer.evaluation.sweep import EDIT, OTHER_NOISE, SweepConfig, summarise, sweep
from trainer.trajectories.photos import start_from_shards
from trainer.trajectories.pipeline import TrajectoryPipeline
from trainer.trajectories.trajectory import Trajectory

EDITS, ALIGNMENT = "edits.json", "alignment.json"
"""Files of a run folder."""
PATH_STEPS = 16
"""Network evaluations per level along the path."""


def check_has_levels(pipe: TrajectoryPipeline) -> None:
    """Raise UsageError where samples have one level: the effect of an edit is looked for in the levels after it."""
    if pipe.drawn_levels == 1:
        raise UsageError(
            "edits are measured in the levels after theirs, and samples of this run have one level: leave out --edits"
        )


def edit_study(
    pipe: TrajectoryPipeline,
    run: Path,
    labels: Sequence[int],
    seeds: Sequence[int],
    num_steps: int = 1,
    follow: Follow = unseen,
) -> Iterator[tuple[str, float]]:
    """Feature edits of every level, over classes and seeds: see `trainer.evaluation.sweep`.

    Yields lis_<edited>_<measured> with _low and _high of its 95 % interval, the same with other_noise in place of an
    edit, and gain_<edited>_<measured>. Writes RUN/edits.json.
    """
    config = SweepConfig(labels=tuple(labels), seeds=tuple(seeds), num_steps=num_steps)
    summary = summarise(sweep(pipe, config, follow=follow))
    setup = {"labels": list(labels), "seeds": list(seeds), "num_steps": num_steps, "kind": config.kind}
    write_json(run / EDITS, {**setup, "summary": summary}, sort_keys=False)
    for line in summary:
        where = f"{line['level']}_{line['measured']}"
        if line["measured"] == line["level"]:
            continue  # an edit leaves its own level's other tokens as they are
        if line["arm"] == EDIT:
            yield f"lis_{where}", line["lis_mean"]
            yield f"lis_{where}_low", line["lis_low"]
            yield f"lis_{where}_high", line["lis_high"]
            yield f"gain_{where}", line["gain_mean"]
        elif line["arm"] == OTHER_NOISE:
            yield f"lis_{where}_other_noise", line["lis_mean"]


def alignment_study(
    pipe: TrajectoryPipeline,
    run: Path,
    labels: Sequence[int],
    seeds: Sequence[int],
    num_steps: int = PATH_STEPS,
    photos: Sequence[Trajectory] = (),
    follow: Follow = unseen,
) -> Iterator[tuple[str, float]]:
    """Boundaries along the generative path, over classes and seeds, and over photographs: see
    `trainer.evaluation.path_alignment`.

    Yields alignment_<level>_<partition>: the mean over the steps before the last, where x̂ is the canvas itself, of
    boundary F with the level's own regions, and with flat and shifted ones; with _real for photographs and their
    teacher's regions. Writes RUN/alignment.json, which holds all times and partitions (`summary`, `photos`).
    """
    summary = summarise_alignment(list(alignment(pipe, labels, seeds, num_steps, follow)))
    of_photos = summarise_alignment(list(alignment_of_photos(pipe, photos, num_steps, follow)))
    setup = {"labels": list(labels), "seeds": list(seeds), "num_steps": num_steps, "num_photos": len(photos)}
    write_json(run / ALIGNMENT, {**setup, "summary": summary, "photos": of_photos}, sort_keys=False)
    yield from _early_means(summary, "")
    yield from _early_means(of_photos, "_real")


def photos_of(pipe: TrajectoryPipeline, index: ShardIndex, count: int) -> list[Trajectory]:
    """At most `count` samples of shards, spread evenly over them, each with noise of its own."""
    chosen = spread_evenly(index.num_samples, count)
    return [start_from_shards(pipe, index, number, seed=seed) for seed, number in enumerate(chosen)]


def _early_means(summary: Sequence[Mapping[str, Any]], suffix: str) -> Iterator[tuple[str, float]]:
    means: dict[tuple[int, str], list[float]] = {}
    last_step = min((line["t"] for line in summary if line["t"] > 0), default=0.0)
    for line in summary:
        if line["t"] > last_step and line["partition"] in (SEMANTIC, FLAT, SHIFTED):
            means.setdefault((line["level"], line["partition"]), []).append(line["f_mean"])
    for (level, partition), values in means.items():
        yield f"alignment_{level}_{partition}{suffix}", sum(values) / len(values)
