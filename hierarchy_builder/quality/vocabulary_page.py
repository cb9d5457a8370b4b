"""A page that shows what the prototypes of a vocabulary mean: each with the image parts nearest to it.

N images, P parts of all images, K prototypes of the finest level, H×W grid, S pixels a side of a photo
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from hierarchy_builder.canvases.gallery import Facts, Page, Plots, Section, Strip, Strips, write_page
from hierarchy_builder.canvases.plots import Plot, Series
from hierarchy_builder.errors import BuilderError
from hierarchy_builder.machine.process import num_cpus
from hierarchy_builder.quality.report import photo_reader
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import read_images
from hierarchy_builder.store.ledger import read_manifest
from hierarchy_builder.store.stored import Stored, fitted_vocabulary
from hierarchy_builder.store.units import finished_stage, refuse_fused, stage_units
from hierarchy_builder.terminal import counted
from hierarchy_builder.vocabulary.prototypes import NO_REGION, Vocabulary, load_vocabulary

PICTURE_PX = 144
MARGIN_TOKENS = 1
MIN_TOKENS = 6
"""Smallest side of a picture in tokens, since a smaller part of a photo is hard to recognise."""
GROUP_ROWS = 8
"""Fewest prototypes that the page shows of each group, if the limit allows."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Parts:
    """All parts of a build: int64 rows of the index, region ids, prototypes and squared distances to them, [P] each."""

    rows: np.ndarray
    regions: np.ndarray
    prototypes: np.ndarray
    distances: np.ndarray

    @classmethod
    def read(cls, folder: BuildFolder) -> Parts:
        """Read regions.zarr, one block at a time."""
        found, stored = [], Stored(folder)
        for block in stage_units(folder, "link"):
            prototypes = stored.block("prototypes", block)
            distances = stored.block("prototype_distances", block)
            rows, regions = np.nonzero(prototypes != NO_REGION)
            found.append((rows + block.start, regions, prototypes[rows, regions], distances[rows, regions]))
        rows, regions, prototypes, distances = (np.concatenate(some) for some in zip(*found, strict=True))
        return cls(rows=rows, regions=regions, prototypes=prototypes, distances=distances)

    def nearest(self, prototype: int, count: int) -> np.ndarray:
        """Return the `count` nearest of the parts that have this prototype, at most one of each image: int64."""
        mine = np.flatnonzero(self.prototypes == prototype)
        mine = mine[np.argsort(self.distances[mine], kind="stable")]
        _, first = np.unique(self.rows[mine], return_index=True)
        return mine[np.sort(first)][:count]


def write_vocabulary_page(folder: BuildFolder, path: Path, *, limit: int = 64, examples: int = 8) -> Path:
    """Write the page of a linked build to `path` and return it.

    limit: number of prototypes shown, the most used ones; if there are several levels, the most used of each group of
    the coarsest. examples: number of parts shown of each.
    Raises BuilderError when parts are not linked yet.
    """
    refuse_fused(folder, "cluster")
    if "link" not in read_manifest(folder)["stages"]:
        raise BuilderError(
            f"{folder.root} has no parts linked to prototypes: run `hierarchy-builder cluster {folder.root} "
            "--vocabulary 256` first"
        )
    linked = finished_stage(folder, "link")
    vocabulary, config, _ = load_vocabulary(fitted_vocabulary(folder))
    parts = Parts.read(folder)
    uses = np.bincount(parts.prototypes, minlength=config.num_prototypes)
    groups = choose_prototypes(vocabulary, uses, limit)
    nearest = {k: parts.nearest(k, examples) for members in groups.values() for k in members}
    needed = np.concatenate(list(nearest.values()))
    pictures = _pictures(folder, linked["inputs"]["config"]["level"], parts, needed)
    strips = {
        k: Strip(
            title=" › ".join(map(str, _lineage(vocabulary, k))),
            subtitle=counted(int(uses[k]), "part"),
            pictures=[pictures[part][1] for part in found.tolist()],
            captions=[pictures[part][0] for part in found.tolist()],
        )
        for k, found in nearest.items()
    }
    num_tokens = int(vocabulary.counts[-1].sum())
    facts = {
        "prototypes": " → ".join(f"{size:,}" for size in vocabulary.sizes),
        "used by a part": f"{np.count_nonzero(uses):,} of {config.num_prototypes:,}",
        "parts": len(parts.rows),
        "tokens fitted": num_tokens,
        "engine": config.backend,
        "prototypes shown": sum(map(len, groups.values())),
    }
    curve = Series(
        name="inertia",
        x=list(range(len(vocabulary.inertia))),
        y=[value / max(num_tokens, 1) for value in vocabulary.inertia],
    )
    plot = Plot(
        title="Mean squared distance of a token to its prototype", x_label="iteration", series=[curve]
    )
    summary = Section(title="Summary", blocks=[Facts(entries=facts), Plots(plots=[plot])])
    page = Page(
        title=f"Vocabulary: {folder.root.resolve().name}",
        intro="Prototypes of the whole data set, and the image parts nearest to each: the region is outlined, and the "
        "rest of the photo is dimmed.",
        sections=[summary, *_sections(vocabulary, uses, groups, strips)],
    )
    write_page(page, path)
    return path


def choose_prototypes(vocabulary: Vocabulary, uses: np.ndarray, limit: int) -> dict[int, list[int]]:
    """Choose the finest prototypes to show, by prototype of the coarsest level, the most used first.

    uses: int64 [K]. With one level all are in group 0. Prototypes that no part has are left out.
    """
    used = [k for k in np.argsort(-uses, kind="stable").tolist() if uses[k]]
    if len(vocabulary.sizes) == 1:
        return {0: used[:limit]}
    ancestors = vocabulary.climb(np.arange(len(uses)), 0)
    totals = np.bincount(ancestors, uses, vocabulary.sizes[0])
    share = max(GROUP_ROWS, limit // vocabulary.sizes[0])
    groups: dict[int, list[int]] = {}
    for group in np.argsort(-totals, kind="stable").tolist():
        left = limit - sum(map(len, groups.values()))
        if members := [k for k in used if ancestors[k] == group][: min(share, left)]:
            groups[group] = members
    return groups


def part_picture(photo: np.ndarray | None, mask: np.ndarray) -> np.ndarray:
    """Cut a square around a region, outline the region and dim the rest: uint8 [PICTURE_PX, PICTURE_PX, 3].

    photo: uint8 [S, S, 3], or None to show the region on grey. mask: bool [H, W].
    """
    left, top, extent = _window(mask)
    steps = (np.arange(PICTURE_PX) + 0.5) / PICTURE_PX * extent
    rows, columns = ((corner + steps) * size for corner, size in zip((top, left), mask.shape, strict=True))
    inside = mask[rows.astype(int)[:, None], columns.astype(int)]
    if photo is None:
        return _highlight(np.full((PICTURE_PX, PICTURE_PX, 3), 150, np.uint8), inside)
    left_px, top_px, extent_px = (edge * len(photo) for edge in (left, top, extent))
    picture = Image.fromarray(photo).resize(
        (PICTURE_PX, PICTURE_PX),
        Image.Resampling.LANCZOS,
        box=(left_px, top_px, left_px + extent_px, top_px + extent_px),
    )
    return _highlight(np.asarray(picture), inside)


def _window(mask: np.ndarray) -> tuple[float, float, float]:
    """Return left, top and side of the square around a region, as shares of the side of the photo."""
    spans = [np.flatnonzero(mask.any(axis=axis)) for axis in (0, 1)]  # columns, rows
    sizes = mask.shape[::-1]
    extent = max(
        max(np.ptp(span) + 1 + 2 * MARGIN_TOKENS, MIN_TOKENS) / size
        for span, size in zip(spans, sizes, strict=True)
    )
    extent = min(1.0, extent)
    left, top = (
        min(max((span[0] + span[-1] + 1) / (2 * size) - extent / 2, 0.0), 1 - extent)
        for span, size in zip(spans, sizes, strict=True)
    )
    return left, top, extent


def _highlight(picture: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Dim what is not `inside` (bool [P, P]) and draw its border two pixels wide, but not along the picture's edge."""
    dimmed = 0.45 * picture.mean(axis=-1, keepdims=True) + 20
    padded = np.pad(inside, 2, mode="edge")
    kept = inside.copy()
    for down, right in ((0, 2), (4, 2), (2, 0), (2, 4)):
        kept &= padded[down : down + len(inside), right : right + len(inside)]
    shown = np.where(inside[..., None], picture, dimmed)
    return np.where((inside & ~kept)[..., None], 255, shown).astype(np.uint8)


def _pictures(
    folder: BuildFolder, level: int, parts: Parts, needed: np.ndarray
) -> dict[int, tuple[str, np.ndarray]]:
    """Return the key of the image and the picture of each needed part; threads decode every photo once."""
    records, read_photo = read_images(folder.index), photo_reader(folder)
    rows = np.unique(parts.rows[needed])
    regions = Stored(folder).rows("regions", rows)[:, level]

    def draw(row: int, ids: np.ndarray) -> dict[int, tuple[str, np.ndarray]]:
        record, mine = records[row], needed[parts.rows[needed] == row]
        photo = read_photo(record)
        return {part: (record.key, part_picture(photo, ids == parts.regions[part])) for part in mine.tolist()}

    with ThreadPoolExecutor(num_cpus()) as pool:
        drawn = pool.map(draw, rows.tolist(), regions)
        return {part: picture for some in drawn for part, picture in some.items()}


def _lineage(vocabulary: Vocabulary, prototype: int) -> tuple[int, ...]:
    """Return the ids of the ancestors of a finest prototype and its own, coarse → fine."""
    finest = np.array([prototype])
    return tuple(int(vocabulary.climb(finest, level)[0]) for level in range(len(vocabulary.sizes)))


def _sections(
    vocabulary: Vocabulary, uses: np.ndarray, groups: dict[int, list[int]], strips: dict[int, Strip]
) -> Iterator[Section]:
    """Yield one section for each group of the coarsest level, or a single one if there is only one level."""
    if len(vocabulary.sizes) == 1:
        text = "The most used prototype comes first; the number is its id."
        yield Section(title="Prototypes", text=text, blocks=[Strips(strips=list(strips.values()))])
        return
    ancestors = vocabulary.climb(np.arange(len(uses)), 0)
    for group, members in groups.items():
        rows = [strips[k] for k in sorted(members, key=lambda k: _lineage(vocabulary, k)[:-1])]
        mine = uses[ancestors == group]
        text = (
            f"{counted(int(mine.sum()), 'part')} of images belong to the {counted(int((mine > 0).sum()), 'prototype')} "
            f"below prototype {group} of the coarsest level. {len(rows)} of these prototypes are shown; the number "
            "after the last › is the prototype's own, those before it are the prototypes that it belongs to."
        )
        yield Section(title=f"Group {group}", text=text, blocks=[Strips(strips=rows)])
