"""Self-contained HTML pages with galleries (one slider for all levels), facts, tables and plots.

A page is plain data: `Page`, `Section` and the blocks below. `render` makes HTML that needs no network and opens from
file://. Without JavaScript and on paper it shows all levels side by side. Images are embedded at their own
resolution, token grids at one pixel per token.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import io
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image
from PIL.WebPImagePlugin import WebPImageFile  # by a name it does not know, Pillow loads all its formats

from hierarchy_builder.canvases.plots import Plot, draw
from hierarchy_builder.fields import brief
from hierarchy_builder.files.whole import write_bytes
from hierarchy_builder.terminal import show_value

LOSSLESS_PIXELS = 64
"""Images up to this side are treated as token grids: stored losslessly as PNG, shown with hard pixel edges."""
PAGE_MARKS = (b'<meta name="generator" content="hierarchy-builder">', b'<header class="masthead">')
"""What tells a page of this program; the second one those of releases that wrote no generator."""
WEBP_QUALITY = 82


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One kind of display of all levels of an image: uint8 [L, h, w, 3], coarse → fine."""

    __repr__ = brief

    name: str
    layers: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelViewer:
    """One card: views side by side with a common level slider, over an image that the reader can reveal by a divider.

    level_names and captions have L entries each; a caption is shown after its name. reveal: uint8 [h, w, 3] or None.
    """

    __repr__ = brief

    title: str
    level_names: Sequence[str]
    views: Sequence[View]
    subtitle: str = ""
    captions: Sequence[str] = ()
    reveal: np.ndarray | None = None
    reveal_name: str = "photo"
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = [len(view.layers) for view in self.views] + [len(self.captions or self.level_names)]
        if not self.views or set(found) != {len(self.level_names)}:
            raise ValueError(
                f"card {self.title!r}: views and captions have {found} levels, "
                f"expected {len(self.level_names)} as in level_names"
            )

    @property
    def num_levels(self) -> int:
        """L, the number of positions of the slider."""
        return len(self.level_names)

    @property
    def shows_reveal_apart(self) -> bool:
        """Whether `reveal` is embedded as an image of its own: not if it equals the finest level of the last view."""
        return self.reveal is not None and not np.array_equal(self.reveal, self.views[-1].layers[-1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Gallery:
    """Cards that show all levels side by side, or one at a time below a slider for all of them.

    start: the level that is shown first when one is shown; −1 is the finest.
    """

    __repr__ = brief

    viewers: Sequence[LevelViewer]
    start: int = 0


class Term(str):
    """Text of a cell or a heading of a table, which links to the definition of `of` on the same page."""

    of: str

    def __new__(cls, text: str, of: str) -> Term:
        """text: what is shown, such as the defined name with a level and an arrow."""
        term = super().__new__(cls, text)
        term.of = of
        return term


@dataclass(frozen=True, kw_only=True, slots=True)
class Definitions:
    """Names and what they mean; a `Term` anywhere on the page links to its name."""

    entries: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """What the colours of a map mean: a bar of colours (uint8 RGB) from the value `low` to the value `high`."""

    name: str
    low: str
    high: str
    colours: Sequence[Sequence[int]]

    @property
    def gradient(self) -> str:
        """The bar as a CSS image."""
        stops = ", ".join(f"rgb({red} {green} {blue})" for red, green, blue in self.colours)
        return f"linear-gradient(to right, {stops})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Names and values of the most important facts."""

    entries: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of named cells; columns appear in the order in which rows first name them."""

    rows: Sequence[Mapping[str, Any]]
    caption: str = ""

    @property
    def columns(self) -> list[str]:
        """All names that occur in any row."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    @property
    def numeric(self) -> set[str]:
        """Columns with a number in some row; they are right-aligned."""
        return {name for row in self.rows for name, value in row.items() if _is_number(value)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """Preformatted text that is collapsed until the reader opens it."""

    summary: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plots:
    """Plots in a row as wide as the page allows."""

    plots: Sequence[Plot]


@dataclass(frozen=True, kw_only=True, slots=True)
class Strip:
    """Related images side by side, uint8 [h, w, 3] each, with one caption per image."""

    title: str
    pictures: Sequence[np.ndarray]
    captions: Sequence[str]
    subtitle: str = ""

    def __post_init__(self) -> None:
        if len(self.captions) != len(self.pictures):
            raise ValueError(
                f"strip {self.title!r}: {len(self.captions)} captions, expected {len(self.pictures)}, one per image"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Strips:
    """A column of strips."""

    strips: Sequence[Strip]


Block = Gallery | Facts | Table | Plots | Code | Strips | Definitions | Scale


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A heading, a sentence that explains the section, and blocks."""

    __repr__ = brief

    title: str
    blocks: Sequence[Block]
    text: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """The content of one HTML file."""

    __repr__ = brief

    title: str
    sections: Sequence[Section]
    intro: str = ""


def render(page: Page) -> str:
    """Return the page as one HTML document; equal pages give equal text."""
    script = _resource("gallery.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template("gallery.html")
        .render(
            page=page, style=Markup(_resource("gallery.css")), script=Markup(script), script_sha256=digest
        )
    )


def write_page(page: Page, path: Path) -> None:
    """Render the page to `path` (UTF-8), whole or not at all."""
    write_bytes(path, render(page).encode())


def is_page(path: Path) -> bool:
    """Whether a file is a page that `write_page` wrote, in this release or an earlier one."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return any(mark in content for mark in PAGE_MARKS)


def data_uri(picture: np.ndarray) -> str:
    """Encode uint8 [h, w, 3] as a data URI: token grids losslessly as PNG, larger images as WebP."""
    buffer = io.BytesIO()
    if is_token_grid(picture):
        _indexed(picture).save(buffer, "PNG", optimize=True)
        media = "png"
    else:
        image = Image.fromarray(np.ascontiguousarray(picture))
        image.save(buffer, WebPImageFile.format, quality=WEBP_QUALITY, method=4)
        media = "webp"
    return f"data:image/{media};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def is_token_grid(picture: np.ndarray) -> bool:
    """Whether an image is small enough to be a token grid."""
    return max(picture.shape[:2]) <= LOSSLESS_PIXELS


def _indexed(picture: np.ndarray) -> Image.Image:
    """The same pixels, with a colour table if there are few colours, as in region maps."""
    height, width = picture.shape[:2]
    colours, indices = np.unique(picture.reshape(-1, 3), axis=0, return_inverse=True)
    if len(colours) > 64:
        return Image.fromarray(np.ascontiguousarray(picture))
    image = Image.fromarray(indices.astype(np.uint8).reshape(height, width), mode="P")
    image.putpalette(colours.astype(np.uint8).tobytes())
    return image


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FunctionLoader(_resource),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        data_uri=data_uri, show=show_value, draw=draw, anchor=_anchor, kind=lambda block: type(block).__name__
    )
    environment.tests.update(token_grid=is_token_grid, term=lambda value: isinstance(value, Term))
    return environment


def _resource(name: str) -> str:
    return importlib.resources.files("hierarchy_builder.canvases").joinpath(name).read_text(encoding="utf-8")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _anchor(title: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())
