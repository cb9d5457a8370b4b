"""A whole build in one call of Python, for notebooks and scripts.

from hierarchy_builder import build_shards

shards = build_shards("photos", "out", encoder="dct", images=True)
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from hierarchy_builder.build import pipeline
from hierarchy_builder.build.session import Session
from hierarchy_builder.build.workers import Workers
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig
from hierarchy_builder.errors import UsageError
from hierarchy_builder.fields import from_mapping, nearest
from hierarchy_builder.files.paths import a_folder
from hierarchy_builder.progress import Reporter
from hierarchy_builder.store.folder import BuildFolder


def build_shards(
    photos: str | Path,
    out: str | Path,
    encoder: str = "dinov2-reg-base",
    *,
    recipe: HierarchyRecipe | None = None,
    split: str | None = None,
    workers: int | None = None,
    quiet: bool = True,
    fresh: bool = False,
    **fields: Any,
) -> Path:
    """Build the shards of a folder of photographs, as `hierarchy-builder build` does, and return their folder.

    photos: folder of class folders, tar, listing or URL. out: folder of the build; the same call resumes it. encoder:
    as in `hierarchy-builder encoders`. recipe: how regions are found; `HierarchyRecipe.paper()` by default. split:
    names the shards, and a sub-folder of `photos` where there is one. workers: 0 works in this process, None decides
    by the number of images. quiet: without progress on stderr. fresh: discard an earlier build in `out`. fields: those
    of `ExtractConfig` and `ShardConfig`, for example images=True. Raises UsageError for an unknown field, and the
    errors of a build.
    """
    configs: dict[type, dict[str, Any]] = {ExtractConfig: {"encoder": encoder}, ShardConfig: {}}
    if split is not None:
        configs[ShardConfig]["split"] = split
        if os.path.isdir(os.path.join(photos, split)):
            configs[ExtractConfig]["split"] = split
    known = {field.name: kind for kind in configs for field in dataclasses.fields(kind)}
    for name, value in fields.items():
        if name not in known:
            raise UsageError(f"unknown field {name!r}, {nearest(name, sorted(known))}")
        configs[known[name]][name] = os.fspath(value) if isinstance(value, os.PathLike) else value
    plan = pipeline.BuildPlan(
        extract=from_mapping(ExtractConfig, configs[ExtractConfig], "extract"),
        hierarchy=recipe or HierarchyRecipe.paper(),
        shard=from_mapping(ShardConfig, configs[ShardConfig], "shard"),
    )
    session = Session(workers=Workers(count=workers), reporter=Reporter(quiet=quiet), fresh=fresh)
    folder = BuildFolder(a_folder(str(out)))
    with folder.locked():
        pipeline.build(folder, str(photos), plan, session)
    return folder.shards
