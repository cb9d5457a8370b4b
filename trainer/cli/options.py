"""Arguments and options that several verbs of `trainer` share, and what they open."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import typer

from hierarchy_builder.errors import UsageError
from hierarchy_builder.files.paths import a_path
from hierarchy_builder.files.whole import guard
from hierarchy_builder.flags import (
    OUTPUT,
    PATH,
    PLACE,
    Parameter,
    argument,
    checked,
    flag,
    grouped,
    option,
    switch,
)
from hierarchy_builder.progress import Follow, shown, unseen
from hierarchy_builder.terminal import say
from trainer.methods.normalizing_trajectory.config import Ending
from trainer.training.config import RunConfig

if TYPE_CHECKING:
    from trainer.trajectories.pipeline import SamplingArguments, TrajectoryPipeline


def reads(what: str, metavar: str = "PATH", is_run: bool = False) -> dict[str, Any]:
    """Settings of arguments and options whose value is a path to be read: a missing file ends with exit code 2.

    what: what is expected there, for the message. is_run: whether it is a run, which may also lie at a URL.
    """

    def existing(text: str) -> Path:
        if "://" in text and is_run:
            from trainer.training.mirror import a_run  # loads torch

            return checked(a_run)(text)
        path = checked(a_path)(text)
        if not path.exists():
            raise typer.BadParameter(f"{text} does not exist, expected {what}")
        if is_run:
            guard(path)
        return path

    return {"kind": Path, "parser": existing, "metavar": metavar}


def a_new_run(text: str) -> Path:
    """Read the path or URL of a run that may be new: the folder where this machine trains it."""
    if "://" not in text:
        return checked(a_path)(text)
    from trainer.training.mirror import a_run  # loads torch

    return checked(partial(a_run, is_new=True))(text)


NEW_RUN: dict[str, Any] = {"kind": Path, "parser": a_new_run, "metavar": "PATH|URL"}
A_RUN = "a run folder of `trainer train`, or one of its checkpoints"
A_TRAJECTORY = "a file that `trainer sample` or `trainer edit` wrote"

RUN = argument(
    "Run folder or URL of `trainer train`, or one of its checkpoints.", **reads(A_RUN, "RUN", is_run=True)
)
SEEDS = option("Seeds such as 0-7 or 0,3,9; each is used for every label.", default="0-3")
STEPS = option(
    "Network evaluations per level. For Latent Forcing: steps per stage, and 1 stands for its default of 25.",
    kind=int,
    default=1,
    min=1,
)
EMA = option(
    "Which weights to use: a weight average by its half-life in thousands of images, `auto` (the first average) or "
    "`raw` (no average).",
    default="auto",
)
DECODER = option(
    "Folder or file of an RAE decoder, which turns features into pixels.",
    **reads("the folder or file of an RAE decoder"),
)
PIXEL_STAGE = option(
    "Run of Latent Forcing that draws the pixels instead of a decoder.", **reads(A_RUN, is_run=True)
)
TEMPERATURE = option(
    "Factor of the noise that samples start from. Below 1 they are cleaner and more alike; 0 draws one for each class.",
    kind=float,
    default=1.0,
    min=0,
)
grouped(
    "How it is drawn",
    steps=STEPS,
    temperature=TEMPERATURE,
    ema=EMA,
    decoder=DECODER,
    pixel_stage=PIXEL_STAGE,
)
GUIDED = grouped(
    "Guidance",
    guidance=option(
        "Guidance, for models that were trained with it: a scale, of which 1 is none; for Normalizing Trajectory "
        "Models a weight, of which 0 is none.",
        kind=float,
    ),
    weak=option(
        "Autoguidance: run or checkpoint of a weaker model to move away from.", **reads(A_RUN, is_run=True)
    ),
    weak_scale=option("Strength of autoguidance. Default: 1 with --weak, else 0.", kind=float),
)
OF_METHODS = grouped(
    "Options of single methods",
    ending=option(
        "Normalizing Trajectory Models: how final states become canvases. Default: denoiser if the run has trained "
        "one, else score.",
        metavar="|".join(get_args(Ending)),
    ),
    shift=option(
        "Latent Forcing, schedules `shifted` and `independent`: how far latents are ahead of pixels; 1 draws both "
        "together, below 1 the pixels come first. Default: as trained.",
        kind=float,
    ),
)
VOCABULARY = option(
    "vocabulary.npz of a build, whose prototypes can then be sources of edits.",
    **reads("a vocabulary that `hierarchy-builder cluster --vocabulary` wrote"),
)

TOKENS = option('Tokens as "ROW,COLUMN ROW,COLUMN …".')
MASK = option(
    "Picture laid over the grid; selects tokens of which at least half is neither black nor transparent.",
    **reads("a picture"),
)
SELECTION = grouped(
    "Which tokens",
    region=option(
        "Region to edit; a second --region is that of the source. --list prints the regions.", kind=list[int]
    ),
    tokens=TOKENS,
    near=option("ROW,COLUMN: select that token and those whose features resemble its features."),
    cosine=option("With --near: smallest cosine similarity of a selected token.", kind=float, default=0.9),
    connected=switch("With --near: select only tokens connected to that token.", "--connected"),
    mask=MASK,
    invert=switch("Select all other tokens instead.", "--invert"),
)
SOURCE = grouped(
    "Which features they take",
    donor=option(
        "Trajectory that the features come from. Default: the edited one.", "--from", **reads(A_TRAJECTORY)
    ),
    from_level=option("Level of the source. Default: --level.", kind=int),
    from_region=option("Region of the source. Default: the tokens at the same places.", kind=int),
    prototype=option("Prototype of --vocabulary to take as the source.", kind=int),
)
SHAPE = grouped(
    "Or which region they join",
    to_region=option("Change of shape: the tokens join this region.", kind=int),
    to_neighbours=switch("Change of shape: each token joins the region next to it.", "--to-neighbours"),
    grow=option(
        "Change of shape: the region of the selection grows by this many tokens.", kind=int, default=0, min=0
    ),
    shrink=option(
        "Change of shape: the region of the selection shrinks by this many tokens.",
        kind=int,
        default=0,
        min=0,
    ),
)

FIELDS = {
    name: flag(RunConfig, name, default="that of the preset or of the stored run")
    for name in ("total_images", "batch_size", "seed", "max_seconds")
}
"""Fields of every training that are options of their own; `--set` reaches the others."""
TRAINING = {
    **grouped(
        "Configuration",
        config=option(
            "YAML file of fields, which docs/configuration.md lists; it overrides the preset, options override it.",
            **PATH,
            envvar="TRAINER_CONFIG",
        ),
        settings=option(
            "Set one field by its dotted name, for example optim.lr=0.005; docs/configuration.md lists all. "
            "May be given several times.",
            "--set",
            kind=list[str],
        ),
        **FIELDS,
    ),
    **grouped(
        "Going on and starting over",
        resume=option(
            "`auto` resumes the run in the folder if there is one, `never` starts a new one; or a run or "
            "checkpoint folder to start from.",
            default="auto",
            **PLACE | {"metavar": "TEXT"},
        ),
        dry_run=switch("Check the command, print the resolved configuration and stop.", "--dry-run"),
    ),
    **OUTPUT,
}


def names_given(parameters: Mapping[str, Parameter], given: Mapping[str, Any]) -> list[str]:
    """Names of those parameters whose values differ from their defaults."""
    return [name for name, each in parameters.items() if given[name] not in (each.default, [])]


def open_run(run: Path, given: Mapping[str, Any]) -> TrajectoryPipeline:
    """Load the pipeline of a run with those options of a verb that concern it, and say if it has no decoder.

    Raises UsageError for an unknown ending.
    """
    from trainer.decode.rae_files import PUBLISHED
    from trainer.trajectories.pipeline import TrajectoryPipeline

    ending, known = given.get("ending"), get_args(Ending)
    if ending is not None and ending not in known:
        raise UsageError(f"ending {ending!r}, expected one of {', '.join(known)}")
    names = ("ema", "decoder", "weak", "pixel_stage", "ending", "shift")
    pipe = TrajectoryPipeline.from_pretrained(run, **{name: given[name] for name in names if name in given})
    if pipe.decoder is None and not pipe.draws_pixels:
        say(
            f"note: no decoder for features of {pipe.encoder.get('name', 'unknown')} was found, so there are no "
            f"pictures, and pages show features as colours. --decoder FOLDER takes one, and "
            f"`trainer train-decoder SHARDS --out {run}/decoder` trains one; {PUBLISHED}",
            given.get("quiet", False),
        )
    return pipe


def sampling_of(given: Mapping[str, Any], num_steps: int = 1) -> SamplingArguments:
    """How a verb was told to draw; autoguidance has strength 1 where --weak was given and --weak-scale was not."""
    scale = float(given["weak"] is not None) if given["weak_scale"] is None else given["weak_scale"]
    return {
        "num_steps": num_steps,
        "guidance": given["guidance"],
        "weak_scale": scale,
        "temperature": given["temperature"],
    }


def follow_for(given: Mapping[str, Any]) -> Follow:
    """Progress bars on stderr, or none with --quiet or --json."""
    return unseen if given["quiet"] or given["as_json"] else shown
