"""The report of a build: photos of some images with their regions and decoded levels on one page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from hierarchy_builder.canvases import level_canvases
from hierarchy_builder.canvases.dct import DctBasis
from hierarchy_builder.canvases.gallery import Code, Facts, Gallery, Page, Section, Table, write_page
from hierarchy_builder.canvases.views import HierarchyView, hierarchy_viewers, shared_palette
from hierarchy_builder.errors import BuilderError, ImageError, UsageError
from hierarchy_builder.images.decoding import crop_square, decode_image
from hierarchy_builder.images.sources import open_reader
from hierarchy_builder.images.table import ImageTable
from hierarchy_builder.quality.scores import flag_names
from hierarchy_builder.records import ImageRecord
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import read_images, read_index
from hierarchy_builder.store.ledger import read_manifest, stage_entry
from hierarchy_builder.store.stored import Stored
from hierarchy_builder.store.units import finished_stage, progress_of, stored_source, usable_rows

GALLERY_TEXT = (
    "Levels run from object and background to single tokens. Every image has its own region colours: children share "
    "the hues of their parent, and a region that is not divided keeps its colour; the background is grey and is "
    "counted separately. Latent colours show the three principal components of all features on this page, so equal "
    "colours mean similar features on every card; each region has the mean of its tokens."
)


def write_report(
    folder: BuildFolder, path: Path, *, limit: int = 48, keys: Sequence[str] | None = None
) -> Path:
    """Write the report of a clustered build to `path` and return it.

    limit: images shown, taken from all classes in turn. keys: show these images instead.
    Raises UsageError for a key that is not in the build.
    """
    clustered = finished_stage(folder, "cluster")
    records = read_images(folder.index)
    rows = choose_rows(folder, records, limit, keys)
    stages = read_manifest(folder)["stages"]
    encoder = stages["extract"]["inputs"]["encoder"]
    views = hierarchy_views(folder, records, rows)
    facts = {
        "images": f"{len(usable_rows(folder)):,} of {len(records):,} usable",
        "classes": stages["extract"]["inputs"]["num_classes"],
        "encoder": f"{encoder['name']}, {encoder['grid'][0]}×{encoder['grid'][1]} tokens × {encoder['width']} channels",
        "levels": len(clustered["inputs"]["config"]["cuts"]) + 2,
        "shown": len(views),
    }
    config = {stage: entry["inputs"]["config"] for stage, entry in stages.items()}
    title = f"Teacher hierarchies: {folder.root.resolve().name}"
    write_page(hierarchy_page(views, facts, progress_of(folder), config, title=title), path)
    return path


def hierarchy_page(
    samples: Sequence[HierarchyView],
    facts: Mapping[str, Any],
    stages: Sequence[Mapping[str, Any]] = (),
    config: Mapping[str, Any] | None = None,
    *,
    title: str = "Teacher hierarchies",
) -> Page:
    """Lay out a report: facts, a gallery of hierarchies, a table of the stages and the configuration.

    facts: name → value. stages: one mapping per stage, column → value. config: plain data, shown as YAML.
    Empty sections are left out.
    """
    gallery = Gallery(
        viewers=hierarchy_viewers(samples, shared_palette(view.tokens() for view in samples)), start=1
    )
    configuration = yaml.safe_dump(dict(config or {}), sort_keys=False, allow_unicode=True)
    code = Code(summary="Resolved configuration", text=configuration)
    candidates = [
        (facts, Section(title="Summary", blocks=[Facts(entries=facts)])),
        (samples, Section(title="Hierarchies", text=GALLERY_TEXT, blocks=[gallery])),
        (stages, Section(title="Stages", blocks=[Table(rows=stages)])),
        (config, Section(title="Configuration", blocks=[code])),
    ]
    return Page(
        title=title,
        intro=(
            "This page shows photographs as nested regions, from coarse to fine, and the canvases of the levels, "
            "which a model learns to generate."
        ),
        sections=[section for content, section in candidates if content],
    )


def hierarchy_views(
    folder: BuildFolder, records: Sequence[ImageRecord], rows: Sequence[int]
) -> list[HierarchyView]:
    """Return what a page shows of the given rows; a photo is None where it cannot be read any more."""
    stored, decoder = Stored(folder), stage_entry(folder, "extract")["inputs"]["encoder"]["decoder"]
    basis = DctBasis.from_spec(decoder) if decoder else None
    read_photo, views = photo_reader(folder), []
    for row in rows:
        one = slice(row, row + 1)
        tokens, ids = stored.rows("features", one), stored.rows("regions", one)
        flags = flag_names(int(stored.rows("flags", one)[0]))
        views.append(
            HierarchyView(
                key=records[row].key,
                class_name=records[row].class_name,
                regions=ids[0],
                features=tokens[0],
                photo=read_photo(records[row]),
                decoded=None if basis is None else _decode(basis, level_canvases(tokens, ids)[0]),
                notes={"flags": ", ".join(flags)} if flags else {},
            )
        )
    return views


def rows_by_key(folder: BuildFolder) -> dict[str, int]:
    """The images that a page can show: their rows, rising, by key."""
    rows = usable_rows(folder)
    keys = read_index(folder.index, ["key"]).column("key").take(rows).to_pylist()
    return dict(zip(keys, rows.tolist(), strict=True))


def choose_rows(
    folder: BuildFolder, records: ImageTable, limit: int, keys: Sequence[str] | None = None
) -> list[int]:
    """Return the usable rows of `keys`; without keys the first of every class, the second of every class, … to `limit`.

    Raises UsageError for a key that is not in the build.
    """
    usable = usable_rows(folder).tolist()
    if keys:
        by_key = dict(zip(records.take(np.array(usable, int)).values("key"), usable, strict=True))
        if missing := [key for key in keys if key not in by_key]:
            raise UsageError(
                f"{folder.root} has no usable image {', '.join(missing)}; {folder.index.name} lists the keys"
            )
        return [by_key[key] for key in keys]
    by_class: dict[str, list[int]] = {}
    names = records.column("class_name").to_pylist()
    for row in usable:
        by_class.setdefault(names[row], []).append(row)
    turns = zip_longest(*(by_class[name] for name in sorted(by_class)))
    return [row for row in chain.from_iterable(turns) if row is not None][:limit]


def photo_reader(folder: BuildFolder) -> Callable[[ImageRecord], np.ndarray | None]:
    """Return what reads the crop of an image that was encoded, uint8 [S, S, 3]; it gives None where that is gone."""
    size_px = stage_entry(folder, "extract")["inputs"]["encoder"]["image_size_px"]
    try:
        reader = open_reader(stored_source(folder))
    except (BuilderError, OSError):
        return lambda record: None

    def read(record: ImageRecord) -> np.ndarray | None:
        try:
            return crop_square(decode_image(reader.read(record.path))[0], size_px)
        except (ImageError, OSError):
            return None

    return read


def _decode(basis: DctBasis, canvases: np.ndarray) -> np.ndarray:
    """Decode level canvases [L,H,W,C] to pictures uint8 [L,h,w,3]."""
    with torch.inference_mode():
        pictures = basis.inverse(torch.from_numpy(canvases.astype(np.float32)))
    return (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()
