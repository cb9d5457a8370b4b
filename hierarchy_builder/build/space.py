"""Check that a build fits on its disk before anything is encoded, from the shapes of its arrays.

    N images, H×W grid, C channels, L levels, T = H·W tokens

Arrays are counted without compression, so these are upper bounds. They are a few per cent too high if features make up
most of a build. `plan.py` builds some images instead, which takes seconds.
"""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hierarchy_builder.build.session import BuildPlan
from hierarchy_builder.config import VocabularyConfig
from hierarchy_builder.errors import BuilderError
from hierarchy_builder.files.remote import is_remote
from hierarchy_builder.files.whole import size_on_disk
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.shards import sample_bytes

LISTED_BYTES = 400
"""Upper bound of a row of index.parquet or of the ledger."""


def extract_bytes(num_images: int, encoder: Mapping[str, Any], block_rows: int) -> dict[str, int]:
    """Upper bound of what `extract` writes, by name in the build folder; `encoder` is its description."""
    layout = stores.stage_layout("extract", num_images, block_rows, encoder)
    return {"index.parquet": num_images * LISTED_BYTES, "features.zarr": stores.layout_bytes(layout)}


def later_bytes(plan: BuildPlan, num_images: int, encoder: Mapping[str, Any]) -> dict[str, int]:
    """Upper bound of what the later stages of `build` write, by name in the build folder."""
    tokens, width = math.prod(encoder["grid"]), encoder["width"]
    layout = stores.stage_layout("cluster", num_images, num_images, encoder, plan.hierarchy.num_levels)
    if plan.vocabulary is not None:
        layout |= stores.stage_layout("link", num_images, num_images, encoder)
    needed = {"regions.zarr": stores.layout_bytes(layout), "vocabulary.npz": 0, "vocabulary": 0}
    if plan.vocabulary is not None:
        needed["vocabulary.npz"] = sum(plan.vocabulary.sizes) * (width * 4 + 16)
        needed["vocabulary"] = fitting_bytes(plan.vocabulary, num_images * tokens, width)
    size = sample_bytes(plan.shard, encoder, plan.hierarchy.num_levels)
    return {**needed, "shards": num_images * size}


def fitting_bytes(config: VocabularyConfig, num_tokens: int, width: int) -> int:
    """Bytes of temporary files while a vocabulary is fitted: sampled tokens in float16, and the prototypes."""
    drawn = min(config.sampled_tokens or num_tokens, num_tokens)
    return drawn * width * 2 + config.num_prototypes * width * 4


def free_bytes(root: Path) -> int:
    """Free bytes on the disk of the folder `root`, which may not exist yet; at a URL there is no end."""
    if is_remote(root):
        return sys.maxsize
    return shutil.disk_usage(nearest_folder(root)).free


def nearest_folder(path: Path) -> Path:
    """`path`, or its nearest parent that exists; for a URL the temporary folder."""
    if is_remote(path):
        return Path(tempfile.gettempdir())
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def check_space(folder: BuildFolder, needed: Mapping[str, int], *, force: bool) -> None:
    """Raise BuilderError if `needed` exceeds the free space; existing files of the same names count as free.

    needed: bytes by name in the build folder. force: never raise.
    """
    free, total = free_bytes(folder.root), sum(needed.values())
    if force or total <= free:
        return
    there = sum(size_on_disk(folder.root / name) for name in needed)
    if total > free + there:
        parts = ", ".join(f"{name} {size:,}" for name, size in needed.items() if size)
        raise BuilderError(
            f"{folder.root} needs up to {total:,} bytes ({parts}), {free:,} are free there and {there:,} in what it "
            "holds: make room, choose another --out, or go on with --force; `hierarchy-builder plan` measures what "
            "compression saves"
        )
