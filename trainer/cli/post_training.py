"""The verb `post-train`: a trained run, moved towards the statistics of real images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hierarchy_builder.fields import to_mapping
from hierarchy_builder.flags import PLACE, REQUIRED, option, switch, takes
from hierarchy_builder.terminal import print_result
from trainer.cli import judging
from trainer.cli import options as opt
from trainer.cli.training import asked_fields, commands_for, run_and_print


@takes(
    run=opt.RUN,
    shards=option(
        "Shards whose statistics are the target: a finished folder, its build, or an fsspec URL; may be given "
        "several times.",
        default=REQUIRED,
        **PLACE | {"kind": list[str]},
    ),
    out=option("Run folder or URL; the same command resumes there.", default=REQUIRED, **opt.NEW_RUN),
    per_level=switch(
        "Train each level by its own distances alone: no gradient passes to the coarser levels it was drawn from.",
        "--per-level",
    ),
    balanced=switch(
        "Scale the gradients that arrive at each level to equal norms before they are added.", "--balanced"
    ),
    no_levels=switch("Compare no canvases; only the judges count.", "--no-levels"),
    judge=option(
        "Network that compares decoded pictures: siglip, mae, inception, or sim for all three; convnext, dinov2, clip; "
        "an encoder that `hierarchy-builder encoders` lists and gradients can pass; or module:function. May be given "
        "several times.",
        kind=list[str],
        metavar="NAME[=WEIGHT]",
    ),
    **judging.FILES,
    ema=opt.EMA,
    decoder=opt.DECODER,
    **opt.TRAINING,
)
def post_train(run: Path, shards: list[str], out: Path, **given: Any) -> None:
    """Move the samples of a trained run, level by level, towards the statistics of real images."""
    switches = {"per_level": True, "balanced": True, "no_levels": False}
    flags = {
        ("levels" if name == "no_levels" else name): value for name, value in switches.items() if given[name]
    }
    flags |= {"judges": given["judge"]} if given["judge"] else {}
    asked = {**asked_fields(given, opt.FIELDS), **flags, **judging.files_of(given)}
    from trainer.data.shards import open_index
    from trainer.post_training import run as room  # loads torch, which no refusal above needs
    from trainer.training.mirror import named

    start, index = room.Start.of(run, given["ema"]), open_index(shards)
    resolved = room.resolved(start, index, asked)
    resume, quiet = given["resume"], given["quiet"]
    if given["dry_run"]:
        from trainer.training.run_folder import check_same_run, find_origin

        check_same_run(out, find_origin(out, resume), resolved, index)
        print_result(to_mapping(resolved), given["as_json"])
        return
    run_and_print(
        lambda: room.post_train(start, resolved, index, out, given["decoder"], resume, quiet),
        resolved,
        given,
        commands_for(named(out)),
    )
