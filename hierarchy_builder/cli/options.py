"""What a command line of the builder can say, and how it becomes configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from hierarchy_builder.config import HierarchyRecipe, ShardConfig, VocabularyConfig, load_yaml
from hierarchy_builder.errors import UsageError
from hierarchy_builder.fields import from_mapping, to_mapping


def a_path(text: str) -> Path:
    """A path named on the command line; refuses the empty text of an unset variable, which Path takes for `.`."""
    if not text:
        raise typer.BadParameter("it is empty, expected a path; `.` is this folder")
    return Path(text)


PATH: dict[str, Any] = {"parser": a_path, "metavar": "PATH"}
"""What options and arguments of paths to be written have in common."""

Images = Annotated[
    str, typer.Argument(help="Folder of class folders, tar, CSV/parquet listing, or fsspec URL of one.")
]
Folder = Annotated[Path, typer.Argument(parser=a_path, metavar="DIR", help="Folder of the build.")]
Out = Annotated[Path, typer.Option(**PATH, help="Folder of the build; the same command resumes there.")]
Encoder = Annotated[str | None, typer.Option(help="See `hierarchy-builder encoders`.")]
Weights = Annotated[str | None, typer.Option(help="Local weight file of the encoder.")]
Precision = Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")]
BatchSize = Annotated[int | None, typer.Option(help="Images in one evaluation of the encoder.")]
BlockRows = Annotated[int | None, typer.Option(help="Images in a unit of work.")]
Order = Annotated[str | None, typer.Option(help="Order of rows: shuffled or listed.")]
ClassMap = Annotated[
    str | None, typer.Option(help="JSON of class name → id; without it ids follow the names.")
]
MaxBad = Annotated[
    float | None, typer.Option(help="Share of unusable images above which the exit code is 3.")
]
InputSplit = Annotated[str | None, typer.Option("--split", help="Sub-folder of IMAGES to take.")]
Cuts = Annotated[
    str | None, typer.Option(help="Relative merge heights, coarse → fine, for example 0.65,0.35.")
]
SpatialWeight = Annotated[float | None, typer.Option(help="Weight of token distance beside cosine distance.")]
Recipe = Annotated[
    str | None, typer.Option("--recipe", help="What the flags start from: paper (default) or stable.")
]
Recut = Annotated[
    str | None,
    typer.Option(help="Make other levels from the stored trees, for example 0.7,0.5,0.3; reads no features."),
]
Start = Annotated[str | None, typer.Option(help="How tokens fall in two: single, several or cut.")]
ObjectChoice = Annotated[str | None, typer.Option(help="Which half is the object: centre or border.")]
Connected = Annotated[
    bool | None, typer.Option("--connected/--scattered", help="Only clusters that touch merge.")
]
DivideBackground = Annotated[
    bool | None,
    typer.Option("--divide-background/--whole-background", help="Divide the background as the object."),
]
MinSpread = Annotated[
    float | None, typer.Option(help="Contrast of tokens up to which an image is one region on every level.")
]
Masks = Annotated[
    str | None, typer.Option(help="Folder of label maps <stem>.png that give one level; 0 is background.")
]
MasksLevel = Annotated[int | None, typer.Option(help="Level that --masks gives.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the 2-means start.")]
Vocabulary = Annotated[
    str | None,
    typer.Option(help="Also fit dataset-wide prototypes and link every part: 256, or nested 64,512,4096."),
]
Backend = Annotated[str | None, typer.Option(help="k-means engine of the vocabulary: torch, faiss, cuml.")]
Split = Annotated[str | None, typer.Option(help="First part of the shard names.")]
SamplesPerShard = Annotated[int | None, typer.Option(help="Samples in a tar.")]
ShardBytes = Annotated[int | None, typer.Option(help="Bytes a tar aims at, instead of a number of samples.")]
FeatureDtype = Annotated[
    str | None, typer.Option(help="float16, or int8 with one scale per token in half the bytes.")
]
WithImages = Annotated[bool | None, typer.Option("--images/--no-images", help="Store the crop as JPEG too.")]
ImagePx = Annotated[
    int | None,
    typer.Option(
        "--image-px", help="Pixels a side of the stored crop; without it as many as the encoder sees."
    ),
]
WithCanvases = Annotated[
    bool | None, typer.Option("--canvases/--no-canvases", help="Store the canvases too.")
]
WithCovariance = Annotated[
    bool | None,
    typer.Option("--covariance/--no-covariance", help="Covariance of the channels in statistics.npz."),
]
WorkerCount = Annotated[
    int | None,
    typer.Option("--workers", envvar="HIERARCHY_BUILDER_WORKERS", help="Processes; 0 works in this one."),
]
GpusPerWorker = Annotated[
    float | None, typer.Option(help="GPUs that each worker reserves while it encodes, for example 0.5.")
]
Address = Annotated[str | None, typer.Option(envvar="RAY_ADDRESS", help="Ray cluster to join.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", envvar="HIERARCHY_BUILDER_CONFIG", help="YAML of sections of fields."),
]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="Do images again that could not be used and now can.")
]
AcceptNew = Annotated[
    bool, typer.Option("--accept-new-files", help="Append images that came since the build began.")
]
Force = Annotated[bool, typer.Option("--force", help="Begin also where the disk has too little room.")]
Fused = Annotated[
    bool,
    typer.Option("--fused", help="In one pass: no features and regions are stored, the shards are the same."),
]
PublishTo = Annotated[
    str | None,
    typer.Option("--publish", help="Also copy the shards to this fsspec URL, for example s3://bucket/set."),
]
Fresh = Annotated[
    bool,
    typer.Option("--fresh", help="Start over: first remove what this stage and all later stages have made."),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Let --fresh remove finished shards without asking.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no configuration on stderr.")]


RECIPES = {"paper": HierarchyRecipe.paper, "stable": HierarchyRecipe.stable}


def of_config(cls: type[Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of a command that are fields of a config: the flags have the names of the fields."""
    return {field.name: arguments[field.name] for field in dataclasses.fields(cls) if field.name in arguments}


def resolve(
    cls: type[Any],
    section: str,
    flags: Mapping[str, Any],
    file: Path | None,
    stored: Mapping[str, Any] | None = None,
) -> Any:
    """Flag > environment > config file > `stored` (a build that is taken up again) > default.

    Flags that were not given are None. Raises UsageError for what does not fit `cls`.
    """
    in_file = load_yaml(str(file)).get(section) if file is not None else None
    given = {name: value for name, value in flags.items() if value is not None}
    return from_mapping(cls, {**(stored or {}), **(in_file or {}), **given}, section)


def resolve_shard(
    flags: Mapping[str, Any], file: Path | None, stored: Mapping[str, Any] | None = None
) -> ShardConfig:
    """The shards a command asks for; the size of pictures that `--no-images` leaves out is forgotten with them."""
    if flags["images"] is False and stored is not None:
        stored = {name: value for name, value in stored.items() if name != "image_px"}
    return resolve(ShardConfig, "shard", flags, file, stored)


def resolve_recipe(
    arguments: Mapping[str, Any], file: Path | None, stored: Mapping[str, Any] | None = None
) -> HierarchyRecipe:
    """The recipe of a command's arguments; `recipe` among them names what everything else changes."""
    named = arguments["recipe"]
    if named not in (None, *RECIPES):
        raise UsageError(f"--recipe is {named!r}, expected {' or '.join(RECIPES)}")
    flags = {**of_config(HierarchyRecipe, arguments), "cuts": numbers(arguments["cuts"])}
    base = stored if named is None else to_mapping(RECIPES[named]())
    recipe: HierarchyRecipe = resolve(HierarchyRecipe, "hierarchy", flags, file, base)
    if recipe.masks is None and (recipe.masks_level or flags.get("masks_level") is not None):
        raise UsageError(
            f"--masks-level is {recipe.masks_level}, the level that label maps give, and no --masks FOLDER names any"
        )
    return recipe


def resolve_vocabulary(
    sizes: str | None, backend: str | None, file: Path | None, stored: Mapping[str, Any] | None = None
) -> VocabularyConfig | None:
    """The vocabulary's configuration, or None when neither flag, file nor the stored build asks for one."""
    asked = sizes is not None or bool(stored) or (file is not None and "vocabulary" in load_yaml(str(file)))
    if not asked:
        if backend is not None:
            raise UsageError("--backend chooses the engine of --vocabulary, which is not given")
        return None
    flags = {"sizes": whole_numbers(sizes), "backend": backend}
    return resolve(VocabularyConfig, "vocabulary", flags, file, stored)


def numbers(text: str | None, flag: str = "--cuts") -> list[float] | None:
    """Numbers of a comma separated list; None stays None."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"{flag} is {text!r}, expected numbers such as 0.65,0.35") from None


def whole_numbers(text: str | None) -> list[int] | None:
    """Whole numbers of a comma separated list; None stays None."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"--vocabulary is {text!r}, expected sizes such as 256 or 64,512,4096") from None
