"""Contact sheets: what the builder made of a sample of images, on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from hierarchy_builder.canvases.gallery import Code, Facts, Gallery, Page, Section, Table
from hierarchy_builder.canvases.views import HierarchyView, hierarchy_viewers, shared_palette

GALLERY_TEXT = (
    "From object and background to single tokens. Region colours are each image's own: children share the hues of "
    "their parent, and a region that is not divided keeps its colour; the background is grey and is counted apart. "
    "Latent colours are the three main directions of all features shown here, so equal colours mean similar "
    "features on every card; each region has the mean of its tokens."
)


def hierarchy_page(
    samples: Sequence[HierarchyView],
    facts: Mapping[str, Any],
    stages: Sequence[Mapping[str, Any]] = (),
    config: Mapping[str, Any] | None = None,
    *,
    title: str = "Teacher hierarchies",
) -> Page:
    """The report of a build: facts, a gallery of hierarchies, what the stages did, and the configuration.

    facts: name → value. stages: one mapping per stage, column → value. config: plain data, shown as YAML.
    Empty parts are left out. Write it with `canvases.gallery.write_page`.
    """
    palette = shared_palette(view.tokens() for view in samples)
    gallery = Gallery(viewers=hierarchy_viewers(samples, palette), start=1)
    configuration = yaml.safe_dump(dict(config or {}), sort_keys=False, allow_unicode=True)
    candidates = [
        (facts, Section(title="Summary", blocks=[Facts(entries=facts)])),
        (samples, Section(title="Hierarchies", text=GALLERY_TEXT, blocks=[gallery])),
        (stages, Section(title="Stages", blocks=[Table(rows=stages)])),
        (
            config,
            Section(
                title="Configuration", blocks=[Code(summary="Resolved configuration", text=configuration)]
            ),
        ),
    ]
    return Page(
        title=title,
        intro="Images as nested regions, coarse → fine, and the level canvases a model learns to draw.",
        sections=[section for content, section in candidates if content],
    )
