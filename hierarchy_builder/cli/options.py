"""What a command line of the builder can say, and how it becomes configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from hierarchy_builder.config import (
    ExtractConfig,
    HierarchyRecipe,
    ShardConfig,
    VocabularyConfig,
    load_yaml,
)
from hierarchy_builder.errors import UsageError
from hierarchy_builder.fields import from_mapping, sentences, to_mapping


def a_path(text: str) -> Path:
    """A path named on the command line; refuses the empty text of an unset variable, which Path takes for `.`."""
    if not text:
        raise typer.BadParameter("it is empty, expected a path; `.` is this folder")
    return Path(text)


PATH: dict[str, Any] = {"parser": a_path, "metavar": "PATH"}
"""What options and arguments of paths to be written have in common."""


def flag(kind: type, name: str, *declarations: str) -> Any:
    """The option of a configuration field: its type, its sentence as help, its choices and its default.

    The value of an option that is not given is None, so that a config file or a stored build can decide. Lists are
    text, numbers separated by commas.
    """
    (field,) = (field for field in dataclasses.fields(kind) if field.name == name)
    hint = get_type_hints(kind)[name]
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    inner = get_args(hint)[0] if NoneType in get_args(hint) else hint
    single = inner if inner in (int, float, bool) else str
    text = sentences(kind)[name]
    if field.default is not None and single is not bool:
        default = field.default if isinstance(field.default, tuple) else (field.default,)
        text = f"{text} Default: {','.join(map(str, default))}."
    return Annotated[
        single | None,
        typer.Option(*declarations, help=text, metavar="|".join(choices) or None),
    ]


Images = Annotated[
    str,
    typer.Argument(help="Folder of class folders, a tar, a CSV or parquet listing, or an fsspec URL of one."),
]
Folder = Annotated[Path, typer.Argument(parser=a_path, metavar="DIR", help="Folder of the build.")]
Out = Annotated[Path, typer.Option(help="Folder of the build; the same command resumes there.", **PATH)]
Encoder = flag(ExtractConfig, "encoder")
Weights = flag(ExtractConfig, "weights")
Precision = flag(ExtractConfig, "precision")
BatchSize = flag(ExtractConfig, "batch_size")
BlockRows = flag(ExtractConfig, "block_rows")
Order = flag(ExtractConfig, "order")
MaxBad = flag(ExtractConfig, "max_bad_fraction")
InputSplit = flag(ExtractConfig, "split")
ClassMap = Annotated[
    str | None,
    typer.Option(help="JSON file of class name → id; without it ids follow the sorted names of the classes."),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="Recipe to start from; further options change its fields. Default: paper.",
        metavar="paper|stable",
    ),
]
Cuts = flag(HierarchyRecipe, "cuts")
SpatialWeight = flag(HierarchyRecipe, "spatial_weight")
Start = flag(HierarchyRecipe, "start")
ObjectChoice = flag(HierarchyRecipe, "object_choice")
Connected = flag(HierarchyRecipe, "connected", "--connected/--scattered")
DivideBackground = flag(HierarchyRecipe, "divide_background", "--divide-background/--whole-background")
MinSpread = flag(HierarchyRecipe, "min_spread")
Masks = flag(HierarchyRecipe, "masks")
MasksLevel = flag(HierarchyRecipe, "masks_level")
Seed = flag(HierarchyRecipe, "seed")
Recut = Annotated[
    str | None,
    typer.Option(
        help="Cut the stored merge trees at other heights, for example 0.7,0.5,0.3; reads no features."
    ),
]
Vocabulary = Annotated[
    str | None,
    typer.Option(
        help="Also fit prototypes of the whole data set and link every part to one: 256, or nested 64,512,4096."
    ),
]
Backend = flag(VocabularyConfig, "backend")
Split = flag(ShardConfig, "split")
SamplesPerShard = flag(ShardConfig, "samples_per_shard")
ShardBytes = flag(ShardConfig, "shard_bytes")
FeatureDtype = flag(ShardConfig, "feature_dtype")
WithImages = flag(ShardConfig, "images", "--images/--no-images")
ImagePx = flag(ShardConfig, "image_px", "--image-px")
WithCanvases = flag(ShardConfig, "canvases", "--canvases/--no-canvases")
WithCovariance = flag(ShardConfig, "covariance", "--covariance/--no-covariance")
PublishTo = Annotated[
    str | None,
    typer.Option("--publish", help="Also copy the shards to this fsspec URL, for example s3://bucket/set."),
]
WorkerCount = Annotated[
    int | None,
    typer.Option(
        "--workers",
        help="Worker processes; 0 works in this process. Default: one for each CPU.",
        envvar="HIERARCHY_BUILDER_WORKERS",
    ),
]
GpusPerWorker = Annotated[
    float | None, typer.Option(help="GPUs that each worker reserves while it encodes, for example 0.5.")
]
Address = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster to join, HOST:PORT or auto; without it a local Ray starts.", envvar="RAY_ADDRESS"
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML with sections extract, hierarchy, vocabulary, shard; options override it.",
        envvar="HIERARCHY_BUILDER_CONFIG",
    ),
]
RetryFailed = Annotated[
    bool,
    typer.Option(
        "--retry-failed", help="Try images again that could not be used, and add those that can be used now."
    ),
]
AcceptNew = Annotated[
    bool,
    typer.Option(
        "--accept-new-files", help="Append images that were added to the source since the build began."
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Start even if the disk seems to have too little space.")
]
Fused = Annotated[
    bool,
    typer.Option(
        "--fused", help="Build in one pass, without storing features and regions; the shards are the same."
    ),
]
Fresh = Annotated[
    bool,
    typer.Option("--fresh", help="Start over: first remove what this stage and all later stages have made."),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Let --fresh remove finished shards without asking.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print no progress and no configuration on stderr.")
]


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
