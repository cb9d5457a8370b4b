"""Arguments and options that several commands share, and how lists of seeds are written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from hierarchy_builder.errors import UsageError
from hierarchy_builder.flags import a_path
from trainer.methods.normalizing_trajectory.config import Ending

PATH: dict[str, Any] = {"parser": a_path, "metavar": "PATH"}
"""What options and arguments of paths to be written have in common."""


def reads(what: str, metavar: str = "PATH") -> dict[str, Any]:
    """What options and arguments of paths to be read have in common: something lies there; else exit code 2.

    what: what is expected there, for the message.
    """

    def existing(text: str) -> Path:
        path = a_path(text)
        if not path.exists():
            raise typer.BadParameter(f"{text} does not exist, expected {what}")
        return path

    return {"parser": existing, "metavar": metavar}


A_RUN = "a run folder of `trainer train`, or one of its checkpoints"
A_TRAJECTORY = "a file that `trainer sample` or `trainer edit` wrote"
Run = Annotated[
    Path,
    typer.Argument(**reads(A_RUN, "RUN"), help="Run folder of `trainer train`, or one of its checkpoints."),
]
Ema = Annotated[
    str, typer.Option(help="Half-life in kimg of the weight average; auto: the first; raw: none.")
]
DecoderFolder = Annotated[
    Path | None,
    typer.Option("--decoder", **reads("the folder of an RAE decoder"), help="Folder of an RAE decoder."),
]
PixelStageRun = Annotated[
    Path | None,
    typer.Option("--pixel-stage", **reads(A_RUN), help="Run of Latent Forcing that draws the pixels."),
]
Steps = Annotated[
    int,
    typer.Option(
        min=1, help="Network evaluations per level. Latent Forcing: steps per stage; left at 1 it takes 25."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
GuidanceScale = Annotated[
    float | None, typer.Option("--guidance", help="Guidance scale, for models trained with it.")
]
Weak = Annotated[
    Path | None,
    typer.Option("--weak", **reads(A_RUN), help="Autoguidance: run or checkpoint to move away from."),
]
VocabularyFile = Annotated[
    Path | None,
    typer.Option(
        "--vocabulary",
        **reads("a vocabulary that `hierarchy-builder cluster --vocabulary` wrote"),
        help="vocabulary.npz of a build, whose prototypes then are sources of edits.",
    ),
]
WeakScale = Annotated[
    float | None, typer.Option(help="Strength of autoguidance. Default: 1 with --weak, else 0.")
]
EndingName = Annotated[
    str | None,
    typer.Option("--ending", help="Normalizing Trajectory Models: inverse, score or denoiser."),
]
ShiftedBy = Annotated[
    float | None,
    typer.Option(
        "--shift",
        help="Latent Forcing, schedules shifted and independent: how far latents are ahead of pixels; 1 draws both "
        "together, below 1 pixels come first. Default: as trained.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no configuration on stderr.")]


def parse_ending(text: str | None) -> Ending | None:
    """The ending called `text`. Raises UsageError naming those there are."""
    known: dict[str, Ending] = {name: name for name in get_args(Ending)}
    if text is not None and text not in known:
        raise UsageError(f"ending {text!r}, expected one of {', '.join(known)}")
    return known[text] if text is not None else None


OF_SAMPLES = (
    "samples_per_class",
    "guidance",
    "weak",
    "weak_scale",
    "ending",
    "shift",
    "decoder",
    "pixel_stage",
    "inception",
    "reference",
    "space",
    "edits",
    "alignment",
)
"""Options of `evaluate` that say how samples are drawn, or what is measured of them."""


def refuse_beside_likelihood(context: typer.Context) -> None:
    """Raise UsageError where `evaluate --likelihood`, which draws no samples, is asked for with options of samples."""
    sources = {name: context.get_parameter_source(name) for name in OF_SAMPLES}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if context.params["likelihood"] and given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(
            f"--likelihood does not go with {flags}: it is of real images and draws no samples; leave out the one or "
            "the other"
        )


ConfigFile = Annotated[
    Path | None, typer.Option(envvar="TRAINER_CONFIG", help="YAML of fields, over the preset or size.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="One field by dotted name, for example optim.lr=0.005.")
]
TotalImages = Annotated[int | None, typer.Option(help="Images seen until the run ends.")]
BatchSize = Annotated[int | None, typer.Option(help="Images in one optimiser step, over all ranks.")]
MaxSeconds = Annotated[
    float | None, typer.Option(help="Wall clock after which a checkpoint is written; exit code 75.")
]
Resume = Annotated[str, typer.Option(help="auto, never, or a run or checkpoint folder.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check the command and print the resolved configuration, no more.")
]
