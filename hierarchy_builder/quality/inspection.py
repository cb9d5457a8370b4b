"""From the stores of a build to its report: which images to show, their photographs, regions and decoded levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hierarchy_builder.canvases import level_canvases
from hierarchy_builder.canvases.dct import DctBasis
from hierarchy_builder.canvases.gallery import write_page
from hierarchy_builder.canvases.views import HierarchyView
from hierarchy_builder.errors import BuilderError, ImageError, UsageError
from hierarchy_builder.hierarchy.recipe import Flag
from hierarchy_builder.images.decoding import crop_square, decode_image
from hierarchy_builder.images.sources import Reader, open_reader
from hierarchy_builder.quality.report import hierarchy_page
from hierarchy_builder.records import ImageRecord
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import read_index, records_of
from hierarchy_builder.store.ledger import read_manifest
from hierarchy_builder.store.units import finished_stage, progress_of, stored_source, usable_rows


def write_report(
    folder: BuildFolder, path: Path, *, limit: int = 48, keys: Sequence[str] | None = None
) -> Path:
    """Write the contact sheet of a clustered build to `path` and return it.

    limit: images shown, taken in turn from every class. keys: these images instead.
    Raises UsageError for a key that is not in the build.
    """
    entry = finished_stage(folder, "cluster")
    records = records_of(read_index(folder.index))
    rows = choose_rows(folder, records, limit, keys)
    stages = read_manifest(folder)["stages"]
    encoder = stages["extract"]["inputs"]["encoder"]
    views = hierarchy_views(folder, records, rows, encoder)
    usable, total = len(usable_rows(folder)), len(records)
    facts = {
        "images": f"{usable:,} of {total:,} usable",
        "classes": stages["extract"]["inputs"]["num_classes"],
        "encoder": f"{encoder['name']}, {encoder['grid'][0]}×{encoder['grid'][1]} tokens × {encoder['width']} channels",
        "levels": len(entry["inputs"]["config"]["cuts"]) + 2,
        "shown": len(views),
    }
    config = {stage: content["inputs"]["config"] for stage, content in stages.items()}
    page = hierarchy_page(
        views, facts, progress_of(folder), config, title=f"Teacher hierarchies: {_name(folder)}"
    )
    write_page(page, path)
    return path


def hierarchy_views(
    folder: BuildFolder, records: Sequence[ImageRecord], rows: Sequence[int], encoder: Mapping[str, Any]
) -> list[HierarchyView]:
    """What a report shows of the given rows; photographs that cannot be read any more are left out."""
    features, regions = stores.open_store(folder.features), stores.open_store(folder.regions)
    basis = DctBasis.from_spec(encoder["decoder"]) if encoder["decoder"] else None
    reader = photo_reader(folder)
    views = []
    for row in rows:
        one = slice(row, row + 1)
        tokens = stores.read_rows(features, "features", one)
        ids = stores.read_rows(regions, "regions", one)
        flags = Flag(int(stores.read_rows(regions, "flags", one)[0]))
        views.append(
            HierarchyView(
                key=records[row].key,
                class_name=records[row].class_name,
                regions=ids[0],
                features=tokens[0],
                photo=read_photo(reader, records[row], encoder["image_size_px"]),
                decoded=None if basis is None else _decode(basis, level_canvases(tokens, ids)[0]),
                notes={"flags": ", ".join(flag.name.lower() for flag in flags if flag.name)} if flags else {},
            )
        )
    return views


def choose_rows(
    folder: BuildFolder, records: Sequence[ImageRecord], limit: int, keys: Sequence[str] | None = None
) -> list[int]:
    """Up to `limit` usable rows, taken in turn from every class; or those of `keys`.

    Raises UsageError for a key that is not in the build.
    """
    return _rows_of_keys(folder, records, keys) if keys else _rows_over_classes(folder, records, limit)


def _rows_over_classes(folder: BuildFolder, records: Sequence[ImageRecord], limit: int) -> list[int]:
    """The first usable row of each class, then the second of each, … up to `limit`."""
    by_class: dict[str, list[int]] = {}
    for row in usable_rows(folder).tolist():
        by_class.setdefault(records[row].class_name, []).append(row)
    turns = zip_longest(*(by_class[name] for name in sorted(by_class)))
    return [row for row in chain.from_iterable(turns) if row is not None][:limit]


def _rows_of_keys(folder: BuildFolder, records: Sequence[ImageRecord], keys: Sequence[str]) -> list[int]:
    rows = {records[row].key: row for row in usable_rows(folder).tolist()}
    missing = [key for key in keys if key not in rows]
    if missing:
        raise UsageError(
            f"{folder.root} has no usable image {', '.join(missing)}; {folder.index.name} lists the keys"
        )
    return [rows[key] for key in keys]


def photo_reader(folder: BuildFolder) -> Reader | None:
    """Where the photographs of a build are read, or None where they are gone."""
    try:
        return open_reader(stored_source(folder))
    except (BuilderError, OSError):
        return None


def read_photo(reader: Reader | None, record: ImageRecord, size_px: int) -> np.ndarray | None:
    """The crop the features came from, uint8 [S, S, 3], or None where it cannot be read any more."""
    if reader is None:
        return None
    try:
        return crop_square(decode_image(reader.read(record.path))[0], size_px)
    except (ImageError, OSError):
        return None


def _decode(basis: DctBasis, canvases: np.ndarray) -> np.ndarray:
    """Level canvases [L,H,W,C] → pictures uint8 [L,h,w,3]."""
    with torch.inference_mode():
        pictures = basis.inverse(torch.from_numpy(canvases.astype(np.float32)))
    return (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()


def _name(folder: BuildFolder) -> str:
    return folder.root.resolve().name
