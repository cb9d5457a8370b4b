"""Longer looks at a trained model, kept in its run folder: locality of edits, and alignment along the path.

Each writes one JSON file (setup, summary) and yields (name, value) of its main numbers for the table of `evaluate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.alignment import FLAT, SEMANTIC, SHIFTED, alignment, summarise_alignment
from trainer.pipeline import TrajectoryPipeline
from trainer.printing import write_json
from trainer.sweep import EDIT, OTHER_NOISE, SweepConfig, summarise, sweep

EDITS, ALIGNMENT = "edits.json", "alignment.json"
"""Files of a run folder."""
PATH_STEPS = 16
"""Network evaluations per level along the path."""


def edit_study(
    pipe: TrajectoryPipeline, run: Path, labels: Sequence[int], seeds: Sequence[int], num_steps: int = 1
) -> Iterator[tuple[str, float]]:
    """Feature edits of every level, over classes and seeds: see `trainer.sweep`.

    Yields lis_<edited>_<measured> with _low and _high of its 95 % interval, the same with other_noise in place of an
    edit, and gain_<edited>_<measured>. Writes RUN/edits.json.
    """
    config = SweepConfig(labels=tuple(labels), seeds=tuple(seeds), num_steps=num_steps)
    summary = summarise(sweep(pipe, config))
    setup = {"labels": list(labels), "seeds": list(seeds), "num_steps": num_steps, "kind": config.kind}
    write_json(run / EDITS, {**setup, "summary": summary})
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
) -> Iterator[tuple[str, float]]:
    """Boundaries along the generative path, over classes and seeds: see `trainer.alignment`.

    Yields alignment_<level>_<partition>: the mean over the steps before the last, where x̂ is the canvas itself, of
    boundary F with the level's own regions, and with flat and shifted ones. Writes RUN/alignment.json, which holds all
    times and partitions.
    """
    summary = summarise_alignment(list(alignment(pipe, labels, seeds, num_steps)))
    setup = {"labels": list(labels), "seeds": list(seeds), "num_steps": num_steps}
    write_json(run / ALIGNMENT, {**setup, "summary": summary})
    means: dict[tuple[int, str], list[float]] = {}
    last_step = min(line["t"] for line in summary if line["t"] > 0)
    for line in summary:
        if line["t"] > last_step and line["partition"] in (SEMANTIC, FLAT, SHIFTED):
            means.setdefault((line["level"], line["partition"]), []).append(line["f_mean"])
    for (level, partition), values in means.items():
        yield f"alignment_{level}_{partition}", sum(values) / len(values)
