"""The verbs `encode`, `edit`, `compare` and `sweep`: parse, call, print."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated

import typer

from hierarchy_builder.errors import UsageError
from hierarchy_builder.files import whole_file, write_json
from hierarchy_builder.progress import shown_on, unseen
from hierarchy_builder.terminal import print_result, stderr
from trainer.cli.options import (
    A_RUN,
    A_TRAJECTORY,
    PATH,
    AsJson,
    DecoderFolder,
    Ema,
    Quiet,
    Run,
    Steps,
    VocabularyFile,
    Weak,
    reads,
)
from trainer.seeds import parse_seeds

TrajectoryFile = Annotated[
    Path,
    typer.Argument(**reads(A_TRAJECTORY, "FILE"), help="Trajectory file, as `trainer sample` writes them."),
]
RunFolder = Annotated[
    Path | None,
    typer.Option(
        "--run", **reads(A_RUN), help="Run or checkpoint that drew it. Default: where the file says."
    ),
]
Near = Annotated[
    str | None, typer.Option(help="ROW,COLUMN: that token and those whose features resemble its own.")
]
Painting = Annotated[
    Path | None,
    typer.Option(
        "--mask", **reads("a picture"), help="Picture over the grid; what is not black is selected."
    ),
]
Places = Annotated[str | None, typer.Option("--tokens", help='Tokens as "ROW,COLUMN ROW,COLUMN …".')]


def encode(
    run: Run,
    out: Annotated[Path, typer.Option(**PATH, help="Trajectory file to write.")],
    shards: Annotated[str | None, typer.Option(help="Shards that hold the photograph.")] = None,
    sample: Annotated[str, typer.Option(help="Its key, or its number in the shards.")] = "0",
    photo: Annotated[
        Path | None, typer.Option(**reads("a picture"), help="Picture file, instead of --shards.")
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="module:function[:ARGUMENT] that returns the encoder of the model.")
    ] = "hierarchy_builder.encoders.dct:DctEncoder",
    weights: Annotated[
        str | None, typer.Option(help="Weight file of the encoder; without it those of the hub.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Class of a --photo.")] = None,
    seed: Annotated[int, typer.Option(help="Noise of levels drawn later.")] = 0,
    ema: Ema = "auto",
    as_json: AsJson = False,
) -> None:
    """A photograph → a trajectory that starts from its hierarchy, to edit and resume."""
    from trainer.data.shards import open_index
    from trainer.trajectories import photos
    from trainer.trajectories.pipeline import TrajectoryPipeline

    if (shards is None) == (photo is None):
        raise UsageError("a photograph comes from --shards DIR or from --photo FILE: give one of them")
    pipe = TrajectoryPipeline.from_pretrained(run, ema)
    if shards is not None:
        which = int(sample) if sample.isdecimal() else sample
        start = photos.start_from_shards(pipe, open_index(shards), which, seed=seed)
    elif label is None:
        raise UsageError("--photo needs --label, the class that levels drawn later get")
    else:
        own = photos.load_own_encoder(encoder, weights)
        start = photos.start_from_photo(pipe, photo, own, label=label, seed=seed)  # type: ignore[arg-type]
    start.save(out)
    print_result({"file": str(out), "class": start.class_name, "origin": start.origin}, as_json)


def edit(
    trajectory: TrajectoryFile,
    level: Annotated[int | None, typer.Option(help="Level to edit, or to resume from.")] = None,
    region: Annotated[
        list[int] | None,
        typer.Option(help="Region edited; a second one after --from is that of the source. See --list."),
    ] = None,
    tokens: Places = None,
    near: Near = None,
    cosine: Annotated[float, typer.Option(help="Least cosine of the tokens of --near.")] = 0.9,
    connected: Annotated[bool, typer.Option("--connected", help="Of --near, only those in touch.")] = False,
    mask: Painting = None,
    invert: Annotated[bool, typer.Option("--invert", help="All tokens but those.")] = False,
    donor: Annotated[
        Path | None,
        typer.Option(
            "--from", **reads(A_TRAJECTORY), help="Trajectory the features come from. Default: this one."
        ),
    ] = None,
    from_level: Annotated[int | None, typer.Option(help="Level of the source. Default: --level.")] = None,
    from_region: Annotated[
        int | None, typer.Option(help="Region of the source. Default: the tokens at the same places.")
    ] = None,
    by: Annotated[str, typer.Option(help="mean of the source, or tokens one by one.")] = "mean",
    vocabulary: VocabularyFile = None,
    prototype: Annotated[int | None, typer.Option(help="Prototype of the vocabulary as source.")] = None,
    strength: Annotated[float, typer.Option(help="0 changes nothing, 1 takes the source.")] = 1.0,
    to_region: Annotated[int | None, typer.Option(help="Shape: the tokens join this region.")] = None,
    to_neighbours: Annotated[
        bool, typer.Option("--to-neighbours", help="Shape: each token joins the region beside it.")
    ] = False,
    grow: Annotated[int, typer.Option(min=0, help="Shape: the region grows by so many tokens.")] = 0,
    shrink: Annotated[int, typer.Option(min=0, help="Shape: the region shrinks by so many.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Draw the levels after --level again.")] = False,
    seed: Annotated[int | None, typer.Option(help="Other noise for those levels.")] = None,
    undo: Annotated[int, typer.Option(min=0, help="First take back the last so many steps.")] = 0,
    show: Annotated[bool, typer.Option("--list", help="Only print the regions there are.")] = False,
    out: Annotated[
        Path | None, typer.Option(**PATH, help="File to write. Default: <name>-edited beside it.")
    ] = None,
    run: RunFolder = None,
    weak: Weak = None,
    as_json: AsJson = False,
) -> None:
    """Change tokens of one level of a trajectory, and draw the finer levels again.

    Prints how far each level is from the same trajectory without the edit, resumed in the same way.
    """
    from trainer.cli import edits as editing
    from trainer.trajectories.compare import by_measure, edited_tokens
    from trainer.trajectories.compare import compare as measure
    from trainer.trajectories.trajectory import Trajectory

    before = Trajectory.load(trajectory)
    if show:
        if level is not None and not as_json:
            stderr.print(editing.region_map(before, level), highlight=False)
        print_result(editing.region_rows(before, level), as_json)
        return
    targets, sources = _split_regions(region or [], from_region)
    wanted = editing.Tokens(
        regions=targets,
        places=tokens,
        near=near,
        cosine=cosine,
        connected=connected,
        painting=mask,
        invert=invert,
    )
    change = editing.Change(
        donor=donor,
        donor_level=from_level,
        donor_region=sources,
        by=by,
        vocabulary=vocabulary,
        prototype=prototype,
        strength=strength,
        to_region=to_region,
        to_neighbours=to_neighbours,
        grow=grow,
        shrink=shrink,
    )
    after = editing.edited(before, level, wanted, change, undo=undo)
    reference, against = before, f"{trajectory.name} as it is in the file"
    if resume or seed is not None:
        if level is None:
            raise UsageError("--resume needs --level, the last one that is kept")
        pipe, is_edited = editing.model_of(before, run, weak=weak), len(after.history) > len(before.history)
        after = pipe.adopt(after).resume(level, seed)
        if is_edited:  # so that the numbers tell the edit from what drawing again does by itself
            reference = pipe.adopt(before).resume(level, seed)
            against = (
                f"{trajectory.name} without the edit, drawn again after level {level} with the same noise"
            )
    if after is before:
        raise UsageError(
            "nothing to do: select tokens and say what becomes of them, or --resume, or --undo 1"
        )
    target = out or trajectory.with_name(f"{trajectory.stem}-edited.safetensors")
    after.save(target)
    rows = measure(reference, after, edited_tokens(after, before))
    if as_json:
        print_result({"file": str(target), "history": after.history, "levels": rows}, as_json)
    else:
        stderr.print(f"wrote {target}", markup=False, highlight=False)
        print_result(by_measure(rows), as_json, f"Change by level, against {against}")


def compare(
    before: TrajectoryFile,
    after: Annotated[
        Path, typer.Argument(**reads(A_TRAJECTORY, "FILE"), help="Trajectory file to compare with it.")
    ],
    level: Annotated[int | None, typer.Option(help="Level of --mask or --tokens.")] = None,
    tokens: Places = None,
    mask: Painting = None,
    out: Annotated[
        Path | None, typer.Option(**PATH, help="PNG of both, level by level, with the change.")
    ] = None,
    decoder: DecoderFolder = None,
    as_json: AsJson = False,
) -> None:
    """How far two trajectories are apart on every level, inside and outside what was edited."""
    from trainer.cli.edits import Tokens
    from trainer.decode.rae import load_decoder
    from trainer.trajectories import compare as room
    from trainer.trajectories.trajectory import Trajectory

    first, second = Trajectory.load(before), Trajectory.load(after)
    if decoder is not None:
        first.decoder = second.decoder = load_decoder(decoder, first.encoder)
    wanted = Tokens(places=tokens, painting=mask)
    if level is None and (tokens or mask):
        raise UsageError("--tokens and --mask need --level, the one they belong to")
    selection = None if level is None else wanted.of(second, level)
    rows = room.compare(first, second, selection, encode=room.encoder_of(first))
    if out is not None:
        with whole_file(out) as partial:
            room.comparison_png(first, second).save(partial, "PNG")
        stderr.print(f"wrote {out}", markup=False, highlight=False)
    title = f"Change by level, of {after.name} against {before.name}"
    print_result(rows if as_json else room.by_measure(rows), as_json, title)


def sweep(
    run: Run,
    labels: Annotated[
        str | None, typer.Option(help="Class ids or names, separated by commas. Default: up to 12 of them.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds such as 0-7 or 0,3,9; each for every label.")] = "0-3",
    levels: Annotated[str | None, typer.Option(help="Levels edited, such as 0-2. Default: all.")] = None,
    strengths: Annotated[str, typer.Option(help="Strengths, separated by commas.")] = "1",
    kind: Annotated[str, typer.Option(help="features, or shape.")] = "features",
    tokens: Places = None,
    mask: Painting = None,
    steps: Steps = 1,
    out: Annotated[
        Path | None, typer.Option(**PATH, help="JSON file for all rows and their summary.")
    ] = None,
    ema: Ema = "auto",
    decoder: DecoderFolder = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """One edit over classes, seeds, levels and strengths, each beside what happens without it."""
    from trainer.cli.edits import Tokens
    from trainer.evaluation import sweep as room
    from trainer.evaluation.pages import known_classes, shown_labels
    from trainer.trajectories.pipeline import TrajectoryPipeline

    pipe = TrajectoryPipeline.from_pretrained(run, ema, decoder)
    classes = known_classes(run, pipe)
    ids = pipe.label_ids(labels) if labels else shown_labels(classes)
    config = room.SweepConfig(
        labels=tuple(ids),
        seeds=tuple(parse_seeds(seeds)),
        levels=None if levels is None else tuple(parse_seeds(levels, "levels")),
        strengths=_numbers(strengths),
        kind=kind,  # type: ignore[arg-type]  # checked where it is used
        num_steps=steps,
        classes=tuple(classes),
    )
    selection = None
    if tokens or mask:
        selection = Tokens(places=tokens, painting=mask).of(pipe(config.labels[0], 0), 0)
    follow = unseen if quiet or as_json else shown_on(stderr)
    rows = list(room.sweep(pipe, config, selection, follow=follow))
    summary = room.summarise(rows)
    result = {"setup": dataclasses.asdict(config), "rows": rows, "summary": summary}
    if out is not None:
        write_json(out, result, sort_keys=False)
        stderr.print(f"wrote {out}", markup=False, highlight=False)
    title = (
        f"Edits of {config.kind}, mean ± half the 95 % interval over classes × seeds, "
        f"{len(config.labels)} × {len(config.seeds)}"
    )
    print_result(result if as_json else room.summary_table(summary), as_json, title, room.BASELINES)


def _split_regions(regions: list[int], from_region: int | None) -> tuple[tuple[int, ...], int | None]:
    """Regions edited, and that of the source: --from-region, else the last of two --region."""
    if from_region is not None or len(regions) < 2:
        return tuple(regions), from_region
    if len(regions) > 2:
        raise UsageError(
            f"{len(regions)} times --region: the second is that of the source; for several regions edited give the "
            "source's as --from-region"
        )
    return (regions[0],), regions[1]


def _numbers(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        raise UsageError(f"strengths {text!r}, expected numbers separated by commas such as 0.5,1")
    return numbers
