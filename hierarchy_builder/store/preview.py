"""The picture of a shard set that its card shows."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hierarchy_builder.canvases.colours import hierarchy_colours
from hierarchy_builder.records import Sample
from hierarchy_builder.store.folder import MARKS

PREVIEW = "preview.png"
SHOWN_SAMPLES, CELL_PX, GAP_PX = 4, 128, 8
"""Rows of the picture, the side of one of its cells, and the white between them."""


def preview_of(samples: Iterable[Sample]) -> bytes:
    """Draw a PNG of the first samples, one a row: the photograph if it is stored, and the regions of each level."""
    rows = []
    for sample in itertools.islice(samples, SHOWN_SAMPLES):
        layers = [Image.fromarray(np.ascontiguousarray(layer)) for layer in hierarchy_colours(sample.regions)]
        cells = [layer.resize((CELL_PX, CELL_PX), Image.Resampling.NEAREST) for layer in layers]
        if sample.image is not None:
            photo = Image.open(io.BytesIO(sample.image)).convert("RGB")
            cells.insert(0, photo.resize((CELL_PX, CELL_PX), Image.Resampling.LANCZOS))
        rows.append(cells)
    step = CELL_PX + GAP_PX
    sheet = Image.new("RGB", (step * max(map(len, rows)) + GAP_PX, step * len(rows) + GAP_PX), "white")
    for y, cells in enumerate(rows):
        for x, cell in enumerate(cells):
            sheet.paste(cell, (GAP_PX + x * step, GAP_PX + y * step))
    data, text = io.BytesIO(), PngInfo()
    name, _, program = MARKS[PREVIEW].decode().partition("\0")
    text.add_text(name, program)
    sheet.save(data, "PNG", optimize=True, pnginfo=text)
    return data.getvalue()
