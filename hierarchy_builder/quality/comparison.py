"""Compare two builds of the same images: how far their regions differ, by level, and on which images most.

N images in both, L levels (coarse → fine), l levels that both have, H×W grid
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hierarchy_builder.canvases.colours import hierarchy_colours
from hierarchy_builder.canvases.gallery import (
    Block,
    Gallery,
    LevelViewer,
    Page,
    Section,
    Table,
    View,
    write_page,
)
from hierarchy_builder.canvases.glossary import Glossary
from hierarchy_builder.canvases.views import level_names
from hierarchy_builder.errors import ConfigMismatchError, UsageError
from hierarchy_builder.hierarchy.agreement import variation_of_information
from hierarchy_builder.quality.report import hierarchy_views, rows_by_key
from hierarchy_builder.quality.scores import count_regions, stability
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import read_images
from hierarchy_builder.store.ledger import stage_entry
from hierarchy_builder.store.stored import Stored
from hierarchy_builder.store.units import finished_stage

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
    """The result of `compare_builds`; level l of the first build is compared with level l of the second.

    builds: the two. keys: images in both. rows: their rows in each build, int64 [2, N]. adjusted_rand,
    variation_of_information (nats): float64 [N, l]. counts: number of regions in each build, int64 [2, N, l].
    only: number of usable images in each build alone. num_levels: L of each build.
    """

    builds: tuple[BuildFolder, BuildFolder]
    keys: list[str]
    rows: np.ndarray
    adjusted_rand: np.ndarray
    variation_of_information: np.ndarray
    counts: np.ndarray
    only: tuple[int, int]
    num_levels: tuple[int, int]

    def by_level(self) -> list[dict[str, float]]:
        """Return means over the images, one mapping per common level."""
        first, second = self.counts
        columns = {
            "adjusted_rand": self.adjusted_rand,
            "variation_of_information": self.variation_of_information,
            "identical": self.adjusted_rand == 1,
            "regions_a": first,
            "regions_b": second,
            "count_shift": second - first,
            "count_changed": second != first,
        }
        means = {name: values.mean(axis=0) for name, values in columns.items()}
        return [
            {name: round(float(values[level]), 6) for name, values in means.items()}
            for level in range(self.adjusted_rand.shape[1])
        ]

    def most_changed(self) -> np.ndarray:
        """Return the images that differ, int64, in rising order of their mean adjusted Rand index."""
        mean = self.adjusted_rand.mean(axis=1)
        order = np.argsort(mean, kind="stable")
        return order[mean[order] < 1]

    @property
    def level_names(self) -> tuple[str, ...]:
        """Names of the common levels, which all have regions."""
        return level_names(self.adjusted_rand.shape[1] + 1)[:-1]

    @property
    def build_names(self) -> tuple[str, str]:
        """What the builds are called: the ends of their paths, as long as it takes to tell them apart."""
        paths = [str(folder.root).rstrip("/").split("/") for folder in self.builds]
        for length in range(1, 1 + max(map(len, paths))):
            first, second = ("/".join(parts[-length:]) for parts in paths)
            if first != second:
                return first, second
        return f"{first} (first)", f"{second} (second)"

    def as_json(self) -> dict[str, Any]:
        """Return plain data: counts, means per level, and the most changed images with their indices per level."""
        changed = self.most_changed()
        return {
            "num_images": len(self.keys),
            "only_a": self.only[0],
            "only_b": self.only[1],
            "num_levels": list(self.num_levels),
            "levels": self.by_level(),
            "changed": len(changed),
            "most_changed": [
                {"key": self.keys[n], "adjusted_rand": self.adjusted_rand[n].round(6).tolist()}
                for n in changed[:IMAGES_SHOWN]
            ],
        }


def compare_builds(a: BuildFolder, b: BuildFolder) -> Comparison:
    """Compare the regions of two clustered builds for each image; images are matched by key.

    Raises ConfigMismatchError when the token grids differ, UsageError when no image is in both, BuilderError when
    a build is not clustered yet.
    """
    clustered = [finished_stage(folder, "cluster") for folder in (a, b)]
    rows_a, rows_b = rows_by_key(a), rows_by_key(b)
    grids = ["×".join(map(str, encoder["grid"])) for encoder in _encoders(a, b)]
    if grids[0] != grids[1]:
        raise ConfigMismatchError(
            f"{a.root} has {grids[0]} tokens, {b.root} has {grids[1]}: regions can only be compared on one grid, "
            "build both with encoders of the same grid"
        )
    keys = [key for key in rows_a if key in rows_b]
    if not keys:
        raise UsageError(
            f"{a.root} and {b.root} have no image in common: {len(rows_a)} keys such as {next(iter(rows_a), None)!r} "
            f"in the first, {len(rows_b)} such as {next(iter(rows_b), None)!r} in the second; expected builds of the "
            "same images"
        )
    rows = np.array([[found[key] for key in keys] for found in (rows_a, rows_b)])
    first, second = (len(entry["inputs"]["config"]["cuts"]) + 2 for entry in clustered)
    levels, stored, parts = range(min(first, second) - 1), (Stored(a), Stored(b)), []
    for start in range(0, len(keys), ROWS_AT_ONCE):
        some = rows[:, start : start + ROWS_AT_ONCE]
        ours, theirs = (_regions(*each)[:, : len(levels)] for each in zip(stored, some, strict=True))
        information = [variation_of_information(ours[:, level], theirs[:, level]) for level in levels]
        counts = np.stack([count_regions(ours), count_regions(theirs)])
        parts.append((stability(ours, theirs), np.stack(information, axis=1), counts))
    indices, distances, numbers = zip(*parts, strict=True)
    return Comparison(
        builds=(a, b),
        keys=keys,
        rows=rows,
        adjusted_rand=np.concatenate(indices),
        variation_of_information=np.concatenate(distances),
        counts=np.concatenate(numbers, axis=1),
        only=(len(rows_a) - len(keys), len(rows_b) - len(keys)),
        num_levels=(first, second),
    )


def comparison_tables(found: Comparison) -> dict[str, list[dict[str, Any]]]:
    """Return the tables of the terminal and the page: title → rows."""
    builds, both, changed = found.build_names, len(found.keys), found.most_changed()
    facts: dict[str, Sequence[Any]] = {
        "folder": [str(folder.root) for folder in found.builds],
        **_differing_settings(*found.builds),
        "levels": found.num_levels,
        "images in both builds": (both, both),
        "images in this build alone": found.only,
        "images whose regions differ": (len(changed), len(changed)),
    }

    def by_level(values: Iterable[float]) -> dict[str, float]:
        return dict(zip(found.level_names, values, strict=True))

    levels = found.by_level()
    tables = {
        "Summary": [
            {"of each build": name, **dict(zip(builds, row, strict=True))} for name, row in facts.items()
        ],
        IN_BOTH: [
            {"score": figure.words, **by_level(round(level[figure.names], 3) for level in levels)}
            for figure in SCORES.with_names(*builds).figures
        ],
        MOST_CHANGED: [
            {"key": found.keys[n], **by_level(found.adjusted_rand[n].round(3).tolist())}
            for n in changed[:IMAGES_SHOWN]
        ],
    }
    return {title: rows for title, rows in tables.items() if rows}


def write_comparison(found: Comparison, path: Path) -> Path:
    """Write a page that shows both hierarchies of the most changed images to `path` and return it."""
    scores = SCORES.with_names(*found.build_names)
    sections = []
    for title, rows in comparison_tables(found).items():
        block: Block = Table(rows=scores.in_words(rows) if title == IN_BOTH else rows)
        if title == MOST_CHANGED:
            block = Gallery(viewers=_viewers(found), start=-1)
        sections.append(Section(title=title, text=TEXTS[title], blocks=[block]))
    text = "The arrow points to where the two builds are more alike: ↑ higher, ↓ lower."
    sections += scores.meanings(sections, "What the scores mean", text)
    write_page(Page(title="Two builds of the same images", sections=sections), path)
    return path


def _encoders(*builds: BuildFolder) -> list[dict[str, Any]]:
    return [stage_entry(folder, "extract")["inputs"]["encoder"] for folder in builds]


def _differing_settings(*builds: BuildFolder) -> dict[str, tuple[Any, Any]]:
    """Return the fields of the recipe that differ, and the encoders if they do: name → values of both."""
    recipes = [stage_entry(folder, "cluster")["inputs"]["config"] for folder in builds]
    encoders = [{"encoder": encoder["name"]} for encoder in _encoders(*builds)]
    first, second = (encoder | recipe for encoder, recipe in zip(encoders, recipes, strict=True))
    pairs = {name: (first.get(name), second.get(name)) for name in first | second}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _regions(stored: Stored, rows: np.ndarray) -> np.ndarray:
    """Read the regions of rows that need not rise."""
    order = np.argsort(rows)
    return stored.rows("regions", rows[order])[np.argsort(order)]


def _viewers(found: Comparison) -> list[LevelViewer]:
    """One card for each of the most changed images, with its regions in both builds."""
    (a, b), shown = found.builds, found.most_changed()[:IMAGES_SHOWN]
    views = hierarchy_views(a, read_images(a.index), found.rows[0, shown].tolist())
    others = _regions(Stored(b), found.rows[1, shown])
    viewers = []
    for n, view, other in zip(shown.tolist(), views, others, strict=True):
        levels = zip(found.adjusted_rand[n], *found.counts[:, n], strict=True)
        both = zip(found.build_names, (view.regions, other), strict=True)
        viewers.append(
            LevelViewer(
                title=view.class_name,
                subtitle=view.key,
                level_names=found.level_names,
                captions=[f"{index:.2f}: {first} and {second} regions" for index, first, second in levels],
                views=[
                    View(name=name, layers=hierarchy_colours(regions[: len(found.level_names)])[:-1])
                    for name, regions in both
                ],
                reveal=view.photo,
            )
        )
    return viewers
