"""Compare two builds of the same images: how far their regions differ, by level, and on which images most.

N images in both, L levels (coarse → fine), H×W grid
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hierarchy_builder.canvases.colours import hierarchy_colours
from hierarchy_builder.canvases.gallery import (
    Gallery,
    LevelViewer,
    Page,
    Section,
    Table,
    View,
    write_page,
)
from hierarchy_builder.canvases.glossary import Glossary
from hierarchy_builder.canvases.views import HierarchyView, level_names
from hierarchy_builder.errors import ConfigMismatchError, UsageError
from hierarchy_builder.hierarchy.agreement import variation_of_information
from hierarchy_builder.quality.report import hierarchy_views
from hierarchy_builder.quality.scores import count_regions, stability
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import read_images, read_index
from hierarchy_builder.store.ledger import stage_entry
from hierarchy_builder.store.stored import Stored
from hierarchy_builder.store.units import finished_stage, usable_rows

ROWS_AT_ONCE = 1024
IMAGES_SHOWN = 24
SCORES = Glossary.read("hierarchy_builder.quality", "agreement.yaml")
IN_BOTH = "Levels in both"
MOST_CHANGED = "Most changed images (adjusted Rand index)"
TEXTS = {
    "Summary": (
        "Images are matched by key, and levels by number, starting with the coarsest. Settings of the recipe are shown "
        "where they differ."
    ),
    IN_BOTH: "Means over the images in both builds.",
    MOST_CHANGED: (
        "The image with the smallest mean adjusted Rand index comes first; the number next to a level is the index "
        "of that level. Each build has its own colours, so equal colours do not mean equal regions."
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Comparison:
    """The result of `compare_builds`; level l of A is compared with level l of B, as far as both have it.

    keys: images in both builds. rows_a, rows_b: their rows, int64 [N]. adjusted_rand, variation_of_information (nats):
    float64 [N, l]. counts_a, counts_b: number of regions, int64 [N, l]. only_a, only_b: number of usable images in
    one build only. num_levels: L of each build.
    """

    keys: list[str]
    rows_a: np.ndarray
    rows_b: np.ndarray
    adjusted_rand: np.ndarray
    variation_of_information: np.ndarray
    counts_a: np.ndarray
    counts_b: np.ndarray
    only_a: int
    only_b: int
    num_levels: tuple[int, int]

    def by_level(self) -> list[dict[str, float]]:
        """Return means over the images, one mapping per common level."""
        shift = self.counts_b - self.counts_a
        columns = {
            "adjusted_rand": self.adjusted_rand.mean(axis=0),
            "variation_of_information": self.variation_of_information.mean(axis=0),
            "identical": (self.adjusted_rand == 1).mean(axis=0),
            "regions_a": self.counts_a.mean(axis=0),
            "regions_b": self.counts_b.mean(axis=0),
            "count_shift": shift.mean(axis=0),
            "count_changed": (shift != 0).mean(axis=0),
        }
        return [
            {name: round(float(values[level]), 6) for name, values in columns.items()}
            for level in range(self.adjusted_rand.shape[1])
        ]

    def most_changed(self) -> np.ndarray:
        """Return the images that differ, int64, in rising order of their mean adjusted Rand index."""
        mean = self.adjusted_rand.mean(axis=1)
        order = np.argsort(mean, kind="stable")
        return order[mean[order] < 1]

    def as_json(self) -> dict[str, Any]:
        """Return plain data: counts, means per level, and the most changed images with their indices per level."""
        return {
            "num_images": len(self.keys),
            "only_a": self.only_a,
            "only_b": self.only_b,
            "num_levels": list(self.num_levels),
            "levels": self.by_level(),
            "changed": len(self.most_changed()),
            "most_changed": [
                {"key": self.keys[n], "adjusted_rand": self.adjusted_rand[n].round(6).tolist()}
                for n in self.most_changed()[:IMAGES_SHOWN]
            ],
        }


def compare_builds(a: BuildFolder, b: BuildFolder) -> Comparison:
    """Compare the regions of two clustered builds for each image; images are matched by key.

    Raises ConfigMismatchError when the token grids differ, UsageError when no image is in both, BuilderError when
    a build is not clustered yet.
    """
    rows_a, rows_b = _rows_by_key(a), _rows_by_key(b)
    _check_grids(a, b)
    keys = [key for key in rows_a if key in rows_b]
    if not keys:
        raise UsageError(
            f"{a.root} and {b.root} have no image in common: {len(rows_a)} keys such as {next(iter(rows_a), None)!r} "
            f"in the first, {len(rows_b)} such as {next(iter(rows_b), None)!r} in the second; expected builds of the "
            "same images"
        )
    in_a, in_b = np.array([rows_a[key] for key in keys]), np.array([rows_b[key] for key in keys])
    stored = Stored(a), Stored(b)
    num_levels = [len(stage_entry(folder, "cluster")["inputs"]["config"]["cuts"]) + 1 for folder in (a, b)]
    parts = []
    for start in range(0, len(keys), ROWS_AT_ONCE):
        some = slice(start, start + ROWS_AT_ONCE)
        both = (_read(build, rows[some]) for build, rows in zip(stored, (in_a, in_b), strict=True))
        parts.append(_compare(*(regions[:, : min(num_levels)] for regions in both)))
    indices, information, counts_a, counts_b = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Comparison(
        keys=keys,
        rows_a=in_a,
        rows_b=in_b,
        adjusted_rand=indices,
        variation_of_information=information,
        counts_a=counts_a,
        counts_b=counts_b,
        only_a=len(rows_a) - len(keys),
        only_b=len(rows_b) - len(keys),
        num_levels=(num_levels[0] + 1, num_levels[1] + 1),
    )


def names_of(a: BuildFolder, b: BuildFolder) -> tuple[str, str]:
    """What two builds are called: the ends of their paths, as long as it takes to tell them apart."""
    paths = [str(folder.root).rstrip("/").split("/") for folder in (a, b)]
    for length in range(1, 1 + max(map(len, paths))):
        first, second = ("/".join(parts[-length:]) for parts in paths)
        if first != second:
            return first, second
    return f"{first} (first)", f"{second} (second)"


def comparison_tables(a: BuildFolder, b: BuildFolder, found: Comparison) -> dict[str, list[dict[str, Any]]]:
    """Return the tables of the terminal and the page: title → rows."""
    builds = names_of(a, b)
    both = len(found.keys)
    facts = {
        "folder": (str(a.root), str(b.root)),
        **_differing_settings(a, b),
        "levels": found.num_levels,
        "images in both builds": (both, both),
        "images in this build alone": (found.only_a, found.only_b),
        "images whose regions differ": (len(found.most_changed()),) * 2,
    }
    levels = found.by_level()
    names = level_names(len(levels) + 1)
    worst = found.most_changed()[:IMAGES_SHOWN]
    tables = {
        "Summary": [
            {"of each build": name, **dict(zip(builds, row, strict=True))} for name, row in facts.items()
        ],
        IN_BOTH: [
            {
                "score": figure.words,
                **dict(zip(names, (round(level[figure.names], 3) for level in levels), strict=False)),
            }
            for figure in SCORES.with_names(*builds).figures
        ],
        MOST_CHANGED: [
            {"key": found.keys[n], **dict(zip(names, found.adjusted_rand[n].round(3).tolist(), strict=False))}
            for n in worst
        ],
    }
    return {title: rows for title, rows in tables.items() if rows}


def write_comparison(a: BuildFolder, b: BuildFolder, found: Comparison, path: Path) -> Path:
    """Write a page that shows both hierarchies of the most changed images to `path` and return it."""
    tables = comparison_tables(a, b, found)
    scores = SCORES.with_names(*names_of(a, b))
    sections = [
        Section(title=title, text=TEXTS[title], blocks=[Table(rows=rows)])
        for title, rows in (tables | {IN_BOTH: scores.in_words(tables[IN_BOTH])}).items()
    ]
    if MOST_CHANGED in tables:
        shown = found.most_changed()[:IMAGES_SHOWN]
        sections[-1] = Section(
            title=MOST_CHANGED,
            text=TEXTS[MOST_CHANGED],
            blocks=[Gallery(viewers=_viewers(a, b, found, shown), start=-1)],
        )
    text = "The arrow points to where the two builds are more alike: ↑ higher, ↓ lower."
    sections += scores.meanings(sections, "What the scores mean", text)
    write_page(Page(title="Two builds of the same images", sections=sections), path)
    return path


def _differing_settings(a: BuildFolder, b: BuildFolder) -> dict[str, tuple[Any, Any]]:
    """Return the fields of the recipe that differ, and the encoders if they do: name → values of both."""
    recipes = [stage_entry(folder, "cluster")["inputs"]["config"] for folder in (a, b)]
    encoders = [stage_entry(folder, "extract")["inputs"]["encoder"]["name"] for folder in (a, b)]
    settings = [{"encoder": name, **recipe} for name, recipe in zip(encoders, recipes, strict=True)]
    fields = dict.fromkeys(name for each in settings for name in each)
    pairs = {name: (settings[0].get(name), settings[1].get(name)) for name in fields}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _rows_by_key(folder: BuildFolder) -> dict[str, int]:
    """Return the rows of the usable images by key, in rising order."""
    finished_stage(folder, "cluster")
    rows = usable_rows(folder)
    keys = read_index(folder.index, ["key"]).column("key").take(rows).to_pylist()
    return dict(zip(keys, rows.tolist(), strict=True))


def _check_grids(a: BuildFolder, b: BuildFolder) -> None:
    grids = [stage_entry(folder, "extract")["inputs"]["encoder"]["grid"] for folder in (a, b)]
    if grids[0] != grids[1]:
        shown = ["×".join(map(str, grid)) for grid in grids]
        raise ConfigMismatchError(
            f"{a.root} has {shown[0]} tokens, {b.root} has {shown[1]}: regions can only be compared on one grid, "
            "build both with encoders of the same grid"
        )


def _read(stored: Stored, rows: np.ndarray) -> np.ndarray:
    """Read the regions of rows that need not rise."""
    order = np.argsort(rows)
    return stored.rows("regions", rows[order])[np.argsort(order)]


def _compare(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Compare regions uint8 [n, l, H, W]; returns adjusted Rand index, variation of information and counts, [n, l]."""
    levels = zip(a.swapaxes(0, 1), b.swapaxes(0, 1), strict=True)
    information = np.stack([variation_of_information(*level) for level in levels], axis=1)
    return stability(a, b), information, count_regions(a), count_regions(b)


def _viewers(a: BuildFolder, b: BuildFolder, found: Comparison, shown: np.ndarray) -> list[LevelViewer]:
    encoder = stage_entry(a, "extract")["inputs"]["encoder"]
    views = hierarchy_views(a, read_images(a.index), found.rows_a[shown].tolist(), encoder)
    others = _read(Stored(b), found.rows_b[shown])
    return [
        _viewer(view, other, found, n, names_of(a, b))
        for view, other, n in zip(views, others, shown.tolist(), strict=True)
    ]


def _viewer(
    view: HierarchyView, other: np.ndarray, found: Comparison, n: int, names: tuple[str, str]
) -> LevelViewer:
    num_levels = found.adjusted_rand.shape[1]
    levels = zip(found.adjusted_rand[n], found.counts_a[n], found.counts_b[n], strict=True)
    return LevelViewer(
        title=view.class_name,
        subtitle=view.key,
        level_names=level_names(num_levels + 1)[:-1],
        captions=[f"{index:.2f}: {first} and {second} regions" for index, first, second in levels],
        views=[
            View(name=name, layers=hierarchy_colours(regions[:num_levels])[:-1])
            for name, regions in zip(names, (view.regions, other), strict=True)
        ],
        reveal=view.photo,
    )
