"""Opens picture files: an explicit list of formats, so that no file makes Pillow start another program.

Pillow would hand a file that holds PostScript to Ghostscript, whatever its name is. The formats here are decoded by
libraries inside this process. HEIC and JPEG XL are among them where their plugins of Pillow are installed.
"""

from __future__ import annotations

import importlib
import io
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

PNG_START = b"\x89PNG\r\n\x1a\n"


class Plugin(NamedTuple):
    """A package that adds a format to Pillow. module: what to import; register: its function to call, if any."""

    package: str
    module: str
    register: str
    format: str
    suffixes: tuple[str, ...]


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
"""Names by which Pillow knows the formats that it decodes itself."""
SUFFIXES = frozenset(
    f".{name}"
    for names in ("jpg jpeg jpe jfif png webp gif bmp dib tif tiff", "ppm pgm pbm pnm jp2 j2k avif tga")
    for name in names.split()
)
PLUGINS = (
    Plugin("pillow-heif", "pillow_heif", "register_heif_opener", "HEIF", (".heic", ".heif", ".hif")),
    Plugin("pillow-jxl-plugin", "pillow_jxl", "", "JXL", (".jxl",)),
)
OTHER_SUFFIXES = frozenset(
    f".{name}"
    for names in (
        "arw bpg cr2 cr3 dcm dng emf eps exr fits hdr ico icns jxr nef orf pcx psd raf raw rw2 svg wmf xcf",
    )
    for name in names.split()
)
"""Extensions of pictures that are not opened; listings count and name them."""


UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, MemoryError, Image.DecompressionBombError)
"""What Pillow raises for a file that is no picture, is damaged, or is too large."""


@cache
def installed_plugins() -> tuple[Plugin, ...]:
    """The plugins that can be imported; they are registered with Pillow."""
    found = []
    for plugin in PLUGINS:
        try:
            module = importlib.import_module(plugin.module)
        except ImportError:
            continue
        if plugin.register:
            getattr(module, plugin.register)()
        found.append(plugin)
    return tuple(found)


@cache
def picture_suffixes() -> frozenset[str]:
    """Extensions of the files that can be opened here, in lower case."""
    return SUFFIXES.union(*(plugin.suffixes for plugin in installed_plugins()))


def missing_plugin(suffix: str) -> str | None:
    """The package to install for files with this extension, if there is one and it is not installed."""
    wanted = (plugin for plugin in PLUGINS if suffix in plugin.suffixes)
    return next((plugin.package for plugin in wanted if plugin not in installed_plugins()), None)


class Chunk(NamedTuple):
    """A part of a PNG. content: all of its bytes, with length, kind and checksum; fewer where the file ends early."""

    start: int
    kind: bytes
    content: bytes
    is_whole: bool
    """Whether its checksum is that of its bytes."""


def png_chunks(data: bytes) -> Iterator[Chunk]:
    """The chunks of a PNG, up to the last one that has room for a length, a kind and a checksum."""
    start = len(PNG_START)
    while start + 12 <= len(data):
        length = int.from_bytes(data[start : start + 4], "big")
        content = data[start : start + 12 + length]
        is_whole = len(content) == 12 + length and zlib.crc32(content[4:-4]) == int.from_bytes(
            content[-4:], "big"
        )
        yield Chunk(start, content[4:8], content, is_whole)
        start += 12 + length


def open_picture(source: bytes | str | Path) -> Image.Image:
    """Open a picture by its bytes or path, as `Image.open` does, if it has one of the formats listed here.

    Raises PIL.UnidentifiedImageError for any other file, and what Pillow raises for damage.
    """
    formats = (*FORMATS, *(plugin.format for plugin in installed_plugins()))
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)
