"""The options of the builder's verbs in groups, and the configurations that they make."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hierarchy_builder.config import (
    ExtractConfig,
    HierarchyRecipe,
    ShardConfig,
    VocabularyConfig,
    read_sections,
)
from hierarchy_builder.errors import UsageError
from hierarchy_builder.fields import from_mapping, to_mapping
from hierarchy_builder.files.paths import a_place
from hierarchy_builder.flags import (
    FILES,
    PATH,
    PLACE,
    REQUIRED,
    Parameter,
    argument,
    flags,
    grouped,
    option,
    switch,
)
from hierarchy_builder.flags import FOLDER as PLACE_OF_BUILD

FOLDER = argument("Folder or URL of the build.", **PLACE_OF_BUILD | {"metavar": "DIR"})
FOLDERS = argument(
    "Folder or URL of the build; several at once, such as those of all partitions.",
    **PLACE_OF_BUILD | {"kind": list[Path], "metavar": "DIR"},
)
BUILDS_AND_SETS = argument(
    "Folder or URL of a build, or of a finished or published shard set; several at once.",
    **PLACE | {"kind": list[str], "metavar": "DIR"},
)
BUILD: dict[str, Parameter] = {
    "source": argument(
        "Folder of class folders, a tar, a CSV or parquet listing, or an fsspec URL of one.",
        **PLACE | {"metavar": "IMAGES"},
    ),
    "out": option(
        "Folder or URL of the build; the same command resumes there.", default=REQUIRED, **PLACE_OF_BUILD
    ),
}
ENCODING = grouped(
    "Images and encoder",
    **flags(ExtractConfig, "encoder", "weights", "split", "partition"),
    class_map=option(
        "JSON file of class name → id; without it ids follow the sorted names of the classes.",
        **PLACE | {"metavar": "PATH"},
    ),
    **flags(ExtractConfig, "precision", "batch_size", "block_rows", "order", "max_bad_fraction"),
)
ENCODER_AT = grouped(
    "Images and encoder",
    encoder=option("The encoder of the build, if its file lies elsewhere now: onnx:FILE, onnx:FILE:OUTPUT."),
    weights=option("Its weight file, if that lies elsewhere now.", **PLACE | {"metavar": "PATH"}),
)
RECIPE = grouped(
    "Regions",
    recipe=option(
        "Recipe to start from; further options change its fields. Default: paper.", metavar="paper|stable"
    ),
    **flags(HierarchyRecipe, "cuts", "spatial_weight", "start", "seed", "object_choice"),
    **flags(
        HierarchyRecipe,
        connected="--connected/--scattered",
        divide_background="--divide-background/--whole-background",
    ),
    **flags(HierarchyRecipe, "min_spread", "masks", "masks_level"),
)
VOCABULARY = grouped(
    "Prototypes",
    vocabulary=option(
        "Also fit prototypes of the whole data set and link every part to one: 256, or nested 64,512,4096."
    ),
    **flags(VocabularyConfig, "backend"),
)
SHARDS = grouped(
    "Shards",
    **flags(ShardConfig, "samples_per_shard", "shard_bytes", "feature_dtype", images="--images/--no-images"),
    **flags(ShardConfig, "image_px", "canvases", "covariance", "licence"),
)
PUBLISH = grouped(
    "Shards",
    publish=option("Also copy the shards to this fsspec URL, for example s3://bucket/set.", **PLACE),
)
WORKERS = grouped(
    "Workers",
    workers=option(
        "Worker processes; 0 works in this process. Default: one for each CPU, started by Ray; a set of at most "
        "2,048 images begins in this process, and Ray starts where that saves time.",
        kind=int,
        envvar="HIERARCHY_BUILDER_WORKERS",
    ),
    address=option(
        "Ray cluster to join, HOST:PORT or auto; without it a local Ray starts.", envvar="RAY_ADDRESS"
    ),
)
TRUST = grouped(
    "Images and encoder",
    trust_encoder=switch(
        "Load the encoder that the build names even if it is a function (module:function), which runs its code.",
        "--trust-encoder",
    ),
)
RUN = {
    **WORKERS,
    **grouped(
        "Configuration",
        config=option(
            "YAML with sections extract, hierarchy, vocabulary, shard; docs/configuration.md lists their fields. "
            "Options override it.",
            **PATH,
            envvar="HIERARCHY_BUILDER_CONFIG",
        ),
    ),
    **grouped(
        "Going on and starting over",
        fresh=switch("Start over: first remove what this stage and all later stages have made.", "--fresh"),
        yes=switch("Let --fresh remove finished shards without asking.", "--yes", "-y"),
    ),
}
ONCE = grouped(
    "Going on and starting over",
    retry_failed=switch(
        "Try images again that could not be used, and add those that can be used now.", "--retry-failed"
    ),
    accept_new_files=switch(
        "Append images that were added to the source since the build began.", "--accept-new-files"
    ),
    force=switch("Start even if the disk seems to have too little space.", "--force"),
)

RECIPES = {"paper": HierarchyRecipe.paper, "stable": HierarchyRecipe.stable}


def resolve(
    cls: type[Any], section: str, given: Mapping[str, Any], stored: Mapping[str, Any] | None = None
) -> Any:
    """Flag > environment > config file > `stored` (a build that is taken up again) > default.

    given: the arguments of a command. Those with the name of a field of `cls` are its flags, None where one was not
    given; `config` is the file. Raises UsageError for what does not fit `cls`.
    """
    in_file = {
        name: a_place(value) if name in FILES and isinstance(value, str) else value
        for name, value in (_in_file(given).get(section) or {}).items()
    }
    fields = {field.name for field in dataclasses.fields(cls)}
    asked = {name: value for name, value in given.items() if name in fields and value is not None}
    return from_mapping(cls, {**(stored or {}), **in_file, **asked}, section)


def _in_file(given: Mapping[str, Any]) -> dict[str, Any]:
    return read_sections(given["config"]) if given["config"] is not None else {}


def resolve_recipe(given: Mapping[str, Any], stored: Mapping[str, Any] | None = None) -> HierarchyRecipe:
    """The recipe of a command's arguments; `recipe` among them names what everything else changes."""
    named = given["recipe"]
    if named not in (None, *RECIPES):
        raise UsageError(f"--recipe is {named!r}, expected {' or '.join(RECIPES)}")
    base = stored if named is None else to_mapping(RECIPES[named]())
    asked = {**given, "cuts": numbers(given["cuts"])}
    recipe: HierarchyRecipe = resolve(HierarchyRecipe, "hierarchy", asked, base)
    if recipe.masks is None and (recipe.masks_level or given["masks_level"] is not None):
        raise UsageError(
            f"--masks-level is {recipe.masks_level}, the level that label maps give, and no --masks FOLDER names any"
        )
    return recipe


def resolve_vocabulary(
    given: Mapping[str, Any], stored: Mapping[str, Any] | None = None
) -> VocabularyConfig | None:
    """The vocabulary's configuration, or None when neither flag, file nor the stored build asks for one."""
    sizes, backend = given["vocabulary"], given["backend"]
    if sizes is None and not stored and "vocabulary" not in _in_file(given):
        if backend is not None:
            raise UsageError("--backend chooses the engine of --vocabulary, which is not given")
        return None
    asked = {"sizes": numbers(sizes, "--vocabulary", "256 or 64,512,4096", int), "backend": backend}
    return resolve(VocabularyConfig, "vocabulary", {**asked, "config": given["config"]}, stored)


def numbers(
    text: str | None, flag: str = "--cuts", example: str = "0.65,0.35", kind: Callable[[str], Any] = float
) -> list[Any] | None:
    """Numbers of a comma separated list; None stays None."""
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        what = "numbers" if kind is float else "sizes"
        raise UsageError(f"{flag} is {text!r}, expected {what} such as {example}") from None
