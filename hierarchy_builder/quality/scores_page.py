"""The scores of a build as tables for the terminal and as an HTML page with distributions and the worst images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from hierarchy_builder.canvases.gallery import (
    Facts,
    Gallery,
    Page,
    Plots,
    Section,
    Table,
    write_page,
)
from hierarchy_builder.canvases.glossary import Glossary
from hierarchy_builder.canvases.plots import Plot, Series
from hierarchy_builder.canvases.views import hierarchy_viewers, level_names, shared_palette
from hierarchy_builder.files.whole import write_json
from hierarchy_builder.quality.assessment import Assessment
from hierarchy_builder.quality.report import hierarchy_views
from hierarchy_builder.quality.scores import by_level
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import read_images

WORST_IMAGES = 12
NUM_BINS = 20
BUILD = "build"
SIZES = ("regions", "smallest", "median", "largest")
"""Scores that are not shown for baselines, which have the same number of regions by construction."""
SCORES = Glossary.read("hierarchy_builder.quality", "scores.yaml")
TABLES = {
    "Regions": ("regions", "smallest", "median", "largest", "connected", "within", "between"),
    "Stability": ("flip", "shift", "seed", "float16", "bfloat16"),
    "Agreement with people": ("object_iou", "covering", "precision", "recall", "boundary_f"),
}
"""Title of each table → its scores."""
ARROWS_TEXT = "↑ higher is better, ↓ lower is better; the other scores describe."

TEXTS = {
    "Regions": (
        "Means over images. Connected is the share of regions in one piece. Similarity is the mean cosine between a "
        "token and the mean of its region (within) or between the means of two regions (between). Grid and random are "
        "partitions with as many regions that do not depend on the image."
    ),
    "Stability": (
        "Adjusted Rand index between two hierarchies of one photo, which is 1 where nothing changes: the photo is "
        "mirrored, its crop is shifted by one token, other seeds are used, or features are rounded to 16 bits."
    ),
    "Agreement with people": (
        "Means over images. Label maps are sampled at 4×4 cells per token, and boundaries match within half a token. "
        "Covering is the best overlap of each drawn segment with a region, weighted by area."
    ),
}


def score_tables(found: Assessment) -> dict[str, list[dict[str, Any]]]:
    """Return title → rows: one row per score and partition, one column per level.

    Scores that no image has are left out, and so are tables without scores.
    """
    partitions = {name: by_level(scores) for name, scores in {BUILD: found.scores, **found.baselines}.items()}
    names = level_names(len(partitions[BUILD]) + 1)[:-1]
    tables: dict[str, list[dict[str, Any]]] = {}
    for title, scores in TABLES.items():
        for score, (name, means) in product(scores, partitions.items()):
            values = [level.get(score) for level in means]
            if (name == BUILD or score not in SIZES) and any(value is not None for value in values):
                rounded = [None if value is None else round(value, 3) for value in values]
                row = {
                    "score": SCORES.words(score),
                    "partition": name,
                    **dict(zip(names, rounded, strict=True)),
                }
                tables.setdefault(title, []).append(row)
    return tables


def write_quality(folder: BuildFolder, found: Assessment, path: Path) -> Path:
    """Write quality.json into the build and a self-contained page to `path`; returns `path`."""
    write_json(folder.quality, found.as_json())
    sections = [Section(title="Summary", blocks=[Facts(entries=summary(found))])]
    for title, rows in score_tables(found).items():
        sections.append(Section(title=title, text=TEXTS[title], blocks=[Table(rows=SCORES.in_words(rows))]))
    sections.append(Section(title="Distributions", blocks=[Plots(plots=_plots(found.scores))]))
    for title, text, names in (
        (
            "Least stable",
            "The mean adjusted Rand index of flip, shift and seed is smallest; each card lists it by level.",
            ("flip", "shift", "seed"),
        ),
        ("Furthest from people", "The mean covering of the drawn segments is smallest.", ("covering",)),
    ):
        gallery = _worst(folder, found, names)
        if gallery is not None:
            sections.append(Section(title=title, text=text, blocks=[gallery]))
    sections += SCORES.meanings(sections, "What the scores mean", ARROWS_TEXT)
    name = folder.root.resolve().name
    write_page(Page(title=f"Quality of hierarchies: {name}", sections=sections), path)
    return path


FLAGS = {
    "degenerate": "images that are one single region",
    "nonfinite": "images whose features have NaN",
    "no_mask": "images without a label map",
}
"""What each flag of an image means."""


def summary(found: Assessment) -> dict[str, Any]:
    """Return names and values that say what was scored, and what could not be."""
    facts = found.facts
    entries = {
        "images": f"{facts['num_sampled']:,} of {facts['num_images']:,}",
        "nesting violations": int(found.violations.sum()),
        **{FLAGS.get(name, name): f"{share:.2%}" for name, share in facts["flagged"].items()},
        "photos encoded again": facts["photos"]["read"],
    }
    if facts["photos"]["why_not"]:
        entries["photos not encoded again"] = facts["photos"]["why_not"]
    if facts["photos"]["unreadable"]:
        entries["photos not readable"] = facts["photos"]["unreadable"]
    if facts["masks"]:
        entries["label maps"] = f"{facts['masks']['maps']:,} of {facts['masks']['images']:,} images"
        if facts["masks"]["refused"]:
            refused = facts["masks"]["refused"]
            entries["label maps refused"] = f"{len(refused):,}, the first: {refused[0]}"
    return entries


def _plots(scores: Mapping[str, np.ndarray]) -> list[Plot]:
    candidates = [
        ("regions", "Regions of an image", "regions", None),
        ("connected", "Connected regions", "share in one piece", (0.0, 1.0)),
        ("flip", "Stability: photo mirrored", "adjusted Rand index", (0.0, 1.0)),
        ("shift", "Stability: crop shifted", "adjusted Rand index", (0.0, 1.0)),
        ("covering", "Covering of drawn segments", "covering", (0.0, 1.0)),
        ("boundary_f", "Boundary F", "F", (0.0, 1.0)),
    ]
    plots = []
    for score, title, label, span in candidates:
        if score not in scores or not np.isfinite(scores[score]).any():
            continue
        names = level_names(scores[score].shape[1] + 1)
        columns = zip(names, scores[score].T, strict=False)
        series = [_histogram(name, values, span) for name, values in columns]
        plots.append(Plot(title=title, x_label=label, y_label="share of images", series=series))
    return plots


def _histogram(name: str, values: np.ndarray, span: tuple[float, float] | None) -> Series:
    """Return the share of images in each bin as the outline of bars; without `span` every whole number has a bin."""
    values = values[np.isfinite(values)]
    if span is None:
        edges = np.arange(0, values.max(initial=0) + 2) + 0.5
    else:
        edges = np.linspace(*span, NUM_BINS + 1)
        values = values.clip(*span)
    shares = np.histogram(values, edges)[0] / max(len(values), 1)
    return Series(name=name, x=edges.repeat(2)[1:-1].tolist(), y=shares.repeat(2).tolist())


def _worst(folder: BuildFolder, found: Assessment, names: Sequence[str]) -> Gallery | None:
    """Return cards of the images with the smallest mean of the named scores, or None if no mean is below 1."""
    scores = {name: found.scores[name] for name in names if name in found.scores}
    if not scores:
        return None
    means = np.ma.masked_invalid(np.stack(list(scores.values()))).mean(axis=(0, 2)).filled(1.0)
    worst = [n for n in np.argsort(means, kind="stable")[:WORST_IMAGES].tolist() if means[n] < 1]
    if not worst:
        return None
    views = hierarchy_views(folder, read_images(folder.index), [found.rows[n] for n in worst])
    noted = [
        replace(view, notes={**view.notes, **{name: _short(values[n]) for name, values in scores.items()}})
        for view, n in zip(views, worst, strict=True)
    ]
    return Gallery(viewers=hierarchy_viewers(noted, shared_palette(view.tokens() for view in noted)), start=1)


def _short(values: np.ndarray) -> str:
    return ", ".join("–" if np.isnan(value) else f"{value:.2f}" for value in values)
