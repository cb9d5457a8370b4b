"""Pages to look at: galleries swept coarse → fine, facts, tables and plots in one self-contained HTML file.

A page is plain data (`Page`, `Section` and the blocks below); `render` turns it into HTML that needs no network,
opens from file:// and also reads without JavaScript and on paper, where every level is shown side by side.
Pictures are embedded at their own resolution, token grids at one pixel per token.
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
from typing import Any, ClassVar

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from hierarchy_builder.canvases.plots import Plot, draw
from hierarchy_builder.files import write_bytes
from hierarchy_builder.terminal import show_value

LOSSLESS_PIXELS = 64
"""Pictures up to this many pixels a side are token grids: kept exact as PNG and shown with hard pixel edges."""
WEBP_QUALITY = 82


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One way to look at all levels of an image: uint8 [L, h, w, 3], coarse → fine."""

    name: str
    layers: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelViewer:
    """One card: views side by side, swept together by one slider, over a picture that a divider reveals.

    level_names and captions have L entries; a caption follows its level's name. reveal: uint8 [h, w, 3] or None.
    """

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
        """L, the steps of the card's slider."""
        return len(self.level_names)

    @property
    def shows_reveal_apart(self) -> bool:
        """Whether the revealed picture is embedded on its own; not where it is the last view's finest level."""
        return self.reveal is not None and not np.array_equal(self.reveal, self.views[-1].layers[-1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Gallery:
    """Cards below one slider that sweeps them all. `start` is the level shown first, −1 the finest."""

    kind: ClassVar[str] = "gallery"

    viewers: Sequence[LevelViewer]
    start: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Names and values, for what a reader looks up first."""

    kind: ClassVar[str] = "facts"

    entries: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of named cells; the columns are those of the first row, then new ones in order of appearance."""

    kind: ClassVar[str] = "table"

    rows: Sequence[Mapping[str, Any]]
    caption: str = ""

    @property
    def columns(self) -> list[str]:
        """Every name that occurs in a row."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    @property
    def numeric(self) -> set[str]:
        """Columns that hold a number in some row; they are set flush right."""
        return {name for row in self.rows for name, value in row.items() if _is_number(value)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """Preformatted text, folded until it is asked for."""

    kind: ClassVar[str] = "code"

    summary: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plots:
    """Plots in a row as wide as the page allows."""

    kind: ClassVar[str] = "plots"

    plots: Sequence[Plot]


@dataclass(frozen=True, kw_only=True, slots=True)
class Strip:
    """Pictures that belong together, side by side: uint8 [h, w, 3] each, with a caption each."""

    title: str
    pictures: Sequence[np.ndarray]
    captions: Sequence[str]
    subtitle: str = ""

    def __post_init__(self) -> None:
        if len(self.captions) != len(self.pictures):
            raise ValueError(
                f"strip {self.title!r}: {len(self.captions)} captions, expected {len(self.pictures)}, one a picture"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Strips:
    """Strips below one another."""

    kind: ClassVar[str] = "strips"

    strips: Sequence[Strip]


Block = Gallery | Facts | Table | Plots | Code | Strips


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A heading, a sentence on what is seen, and blocks."""

    title: str
    blocks: Sequence[Block]
    text: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """What one HTML file shows."""

    title: str
    sections: Sequence[Section]
    intro: str = ""


def render(page: Page) -> str:
    """The page as one HTML document; the same page always gives the same text."""
    script = _resource("gallery.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template("gallery.html")
        .render(
            page=page, style=Markup(_resource("gallery.css")), script=Markup(script), script_sha256=digest
        )
    )


def write_page(page: Page, path: str | Path) -> None:
    """Render the page to `path` (UTF-8), whole or not at all."""
    write_bytes(Path(path), render(page).encode())


def data_uri(picture: np.ndarray) -> str:
    """Embed uint8 [h, w, 3]: token grids exactly as PNG, larger pictures as WebP of quality WEBP_QUALITY."""
    buffer = io.BytesIO()
    if is_token_grid(picture):
        _indexed(picture).save(buffer, "PNG", optimize=True)
        media = "png"
    else:
        Image.fromarray(np.ascontiguousarray(picture)).save(buffer, "WEBP", quality=WEBP_QUALITY, method=4)
        media = "webp"
    return f"data:image/{media};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def is_token_grid(picture: np.ndarray) -> bool:
    """Whether the picture is small enough to be one pixel per token."""
    return max(picture.shape[:2]) <= LOSSLESS_PIXELS


def _indexed(picture: np.ndarray) -> Image.Image:
    """The same pixels with a colour table where one pays: region maps have few colours."""
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
    environment.filters.update(data_uri=data_uri, show=show_value, draw=draw, anchor=_anchor)
    environment.tests.update(token_grid=is_token_grid)
    return environment


def _resource(name: str) -> str:
    return importlib.resources.files("hierarchy_builder.canvases").joinpath(name).read_text(encoding="utf-8")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _anchor(title: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())
