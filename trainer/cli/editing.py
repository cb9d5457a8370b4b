"""The verbs `encode`, `edit`, `compare` and `sweep`: parse, call, print."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hierarchy_builder.errors import UsageError
from hierarchy_builder.files.whole import whole_file, write_sealed_json
from hierarchy_builder.flags import OUTPUT, PATH, PLACE, REQUIRED, argument, grouped, option, switch, takes
from hierarchy_builder.terminal import print_result, say_next, stderr, stdout
from trainer.cli import options as opt
from trainer.cli.options import A_RUN, A_TRAJECTORY, reads
from trainer.seeds import parse_seeds

TRAJECTORY = argument(
    "Trajectory file that `trainer sample` or `trainer edit` wrote.", **reads(A_TRAJECTORY, "FILE")
)


@takes(
    run=opt.RUN,
    out=option("Trajectory file to write.", default=REQUIRED, **PATH),
    shards=option("Shards that hold the photograph.", **PLACE),
    sample=option("With --shards: key of the photograph, or its number in the shards.", default="0"),
    photo=option("Picture file of the photograph, instead of --shards.", **reads("a picture")),
    encoder=option(
        "With --photo: the encoder of the model, by its name or as module:function[:ARGUMENT]. Default: the name that "
        "RUN holds."
    ),
    weights=option("With --photo: weight file of the encoder; without it those of the hub.", **PLACE),
    label=option("With --photo: class of the photograph."),
    seed=option("Seed of the noise of levels that are drawn later.", kind=int, default=0),
    ema=opt.EMA,
    **OUTPUT,
)
def encode(run: Path, out: Path, shards: str | None, photo: Path | None, **given: Any) -> None:
    """Turn a photograph into a trajectory that starts from its hierarchy, to edit and resume."""
    from trainer.data.shards import open_index
    from trainer.trajectories import photos

    if (shards is None) == (photo is None):
        raise UsageError("a photograph comes from --shards DIR or from --photo FILE: give one of them")
    pipe, label, seed = opt.open_run(run, given), given["label"], given["seed"]
    if shards is not None:
        which = int(given["sample"]) if given["sample"].isdecimal() else given["sample"]
        start = photos.start_from_shards(pipe, open_index(shards), which, seed=seed)
    elif label is None:
        raise UsageError("--photo needs --label, the class that levels drawn later get")
    else:
        own = photos.load_own_encoder(given["encoder"] or photos.encoder_name(pipe), given["weights"])
        start = photos.start_from_photo(pipe, photo, own, label=label, seed=seed)  # type: ignore[arg-type]
    start.save(out)
    facts = {"file": str(out), "class": start.class_name, "origin": start.origin}
    print_result(facts, given["as_json"])
    say_next(f"wrote {out}", [("trainer", "edit", out, "--list")], given["quiet"])


@takes(
    trajectory=TRAJECTORY,
    level=option("Level to edit, or to resume from; 0 is the coarsest.", kind=int),
    **(opt.SELECTION | opt.SOURCE),
    **grouped(
        "Which features they take",
        by=option(
            "`mean`: each token takes the mean of the source; `tokens`: one token of the source each.",
            default="mean",
            metavar="mean|tokens",
        ),
        vocabulary=opt.VOCABULARY,
        strength=option("0 keeps the features, 1 takes those of the source.", kind=float, default=1.0),
    ),
    **opt.SHAPE,
    **grouped(
        "What is drawn again",
        resume=switch("Draw the levels after --level again.", "--resume"),
        seed=option("Draw the levels after --level again, with the noise of this seed.", kind=int),
    ),
    **grouped(
        "What was done before",
        undo=option(
            "First take back this many edits, each with what was drawn again after it.",
            kind=int,
            default=0,
            min=0,
        ),
        steps=switch("Print what was done to the trajectory so far, oldest first, and stop.", "--history"),
    ),
    show=switch("Print the regions and stop.", "--list"),
    out=option("File to write. Default: NAME-edited.safetensors next to FILE.", **PATH),
    run=option(
        "Run or checkpoint that drew FILE. Default: the folder that FILE names.", **reads(A_RUN, is_run=True)
    ),
    weak=opt.GUIDED["weak"],
    **OUTPUT,
)
def edit(trajectory: Path, level: int | None, seed: int | None, as_json: bool, **given: Any) -> None:
    """Change tokens of one level of a trajectory, and draw the finer levels again.

    Prints how far each level is from the same trajectory without the edit, resumed in the same way.
    """
    from trainer.cli import edits
    from trainer.trajectories.compare import by_measure, edited_tokens
    from trainer.trajectories.compare import compare as measure
    from trainer.trajectories.trajectory import Trajectory

    before = Trajectory.load(trajectory)
    if given["steps"]:
        rows = edits.history_rows(before)
        if not rows and not as_json:
            stdout.print("nothing: the trajectory is as it was first made")
        else:
            print_result(rows, as_json)
        return
    if given["show"]:
        if level is not None and not as_json:
            stderr.print(edits.region_map(before, level), highlight=False)
        print_result(edits.region_rows(before, level), as_json)
        return
    if len(regions := given["region"] or []) > 1 and given["from_region"] is None:
        if len(regions) > 2:
            raise UsageError(
                f"{len(regions)} times --region: the second is that of the source; for several regions edited give the "
                "source's as --from-region"
            )
        given |= {"region": regions[:1], "from_region": regions[1]}
    after = edits.edited(before, level, given)
    reference, against = before, f"{trajectory.name} as it is in the file"
    if given["resume"] or seed is not None:
        if level is None:
            raise UsageError("--resume needs --level, the last one that is kept")
        pipe = edits.model_of(before, given["run"], weak=given["weak"])
        is_edited = len(after.history) > len(before.history)
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
    target = given["out"] or trajectory.with_name(f"{trajectory.stem}-edited.safetensors")
    after.save(target)
    rows = measure(reference, after, edited_tokens(after, before))
    if as_json:
        print_result({"file": str(target), "history": after.history, "levels": rows}, as_json)
    else:
        print_result(by_measure(rows), as_json, f"Change by level, against {against}")
    picture = ("--out", target.with_suffix(".png"))
    say_next(f"wrote {target}", [("trainer", "compare", trajectory, target, *picture)], given["quiet"])


@takes(
    before=TRAJECTORY,
    after=argument("Trajectory file to compare with it.", **reads(A_TRAJECTORY, "FILE")),
    level=option("Level of --mask or --tokens.", kind=int),
    tokens=opt.TOKENS,
    mask=opt.MASK,
    out=option("PNG of both trajectories, level by level, with the change.", **PATH),
    decoder=opt.DECODER,
    **OUTPUT,
)
def compare(before: Path, after: Path, level: int | None, out: Path | None, **given: Any) -> None:
    """Measure how far two trajectories are apart on every level, inside and outside what was edited."""
    from trainer.cli.edits import select
    from trainer.decode.rae import load_decoder
    from trainer.trajectories import compare as comparing
    from trainer.trajectories.trajectory import Trajectory

    first, second = Trajectory.load(before), Trajectory.load(after)
    if given["decoder"] is not None:
        first.decoder = second.decoder = load_decoder(given["decoder"], first.encoder)
    if level is None and (given["tokens"] or given["mask"]):
        raise UsageError("--tokens and --mask need --level, the one they belong to")
    selection = None if level is None else select(second, level, given)
    rows = comparing.compare(first, second, selection, encode=comparing.encoder_of(first))
    if out is not None:
        with whole_file(out) as partial:
            comparing.comparison_png(first, second).save(partial, "PNG")
        say_next(f"wrote {out}", [], given["quiet"])
    title = f"Change by level, of {after.name} against {before.name}"
    as_json = given["as_json"]
    print_result(rows if as_json else comparing.by_measure(rows), as_json, title)


@takes(
    run=opt.RUN,
    labels=option("Class ids or names, separated by commas. Default: up to 12 of them."),
    seeds=opt.SEEDS,
    levels=option("Levels to edit, such as 0-2. Default: all."),
    strengths=option("Strengths of the edit, separated by commas.", default="1"),
    kind=option("What the edit changes.", default="features", metavar="features|shape"),
    tokens=opt.TOKENS,
    mask=opt.MASK,
    steps=opt.STEPS,
    out=option("JSON file for all rows and their summary.", **PATH),
    ema=opt.EMA,
    decoder=opt.DECODER,
    **OUTPUT,
)
def sweep(run: Path, labels: str | None, levels: str | None, out: Path | None, **given: Any) -> None:
    """Repeat one edit over classes, seeds, levels and strengths, and compare each with the same draw without it."""
    from trainer.cli.edits import select
    from trainer.evaluation import sweep as sweeping
    from trainer.evaluation.pages import known_classes, shown_labels
    from trainer.training.mirror import named

    pipe = opt.open_run(run, given)
    classes = known_classes(run, pipe)
    config = sweeping.SweepConfig(
        labels=tuple(pipe.label_ids(labels) if labels else shown_labels(classes)),
        seeds=tuple(parse_seeds(given["seeds"])),
        levels=None if levels is None else tuple(parse_seeds(levels, "levels")),
        strengths=sweeping.parse_strengths(given["strengths"]),
        kind=given["kind"],  # checked where it is used
        num_steps=given["steps"],
        classes=tuple(classes),
    )
    selection = None
    if given["tokens"] or given["mask"]:
        selection = select(pipe(config.labels[0], 0), 0, given)
    rows = list(sweeping.sweep(pipe, config, selection, follow=opt.follow_for(given)))
    summary = sweeping.summarise(rows)
    result = {"setup": dataclasses.asdict(config), "rows": rows, "summary": summary}
    if out is not None:
        write_sealed_json(out, result, sort_keys=False)
        say_next(f"wrote {out}", [("trainer", "report", named(run), "--sweep", out)], given["quiet"])
    title = (
        f"Edits of {config.kind}, mean ± half the 95 % interval over classes × seeds, "
        f"{len(config.labels)} × {len(config.seeds)}"
    )
    table, as_json = sweeping.summary_table(summary), given["as_json"]
    print_result(result if as_json else table, as_json, title, sweeping.BASELINES)
