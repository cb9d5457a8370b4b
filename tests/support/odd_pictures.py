"""One file of every odd kind, each with the outcome a build must record for it.

Everything is drawn here; what Pillow cannot write (16-bit colour, a bomb) is put together byte by byte.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pictures import NOISE, encoded
from PIL import Image

HEIGHT, WIDTH, _ = NOISE.shape
PICTURE = Image.fromarray(NOISE)
ORIENTATION_TAG = 0x0112


@dataclass(frozen=True, kw_only=True)
class Odd:
    """A file, and what index.parquet must say of it: `reason` is the word before the colon, "" for ok."""

    data: bytes
    reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    name: str = "picture.png"


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG of raw rows, each led by its filter byte. colour: 0 grey, 6 RGBA. depth: bits of a sample."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def blank_png(side: int) -> bytes:
    """A black PNG of side² pixels, one bit each: small on disk, large in memory."""
    return png(side, side, 1, 0, (b"\0" + bytes(-(-side // 8))) * side)


def deep_colour_png() -> bytes:
    rows = NOISE[..., [0, 1, 2, 0]].astype(">u2") * 256
    rows[..., 3] = 65535
    return png(WIDTH, HEIGHT, 16, 6, b"".join(b"\0" + row.tobytes() for row in rows))


def turned(orientation: int) -> Odd:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    size = (WIDTH, HEIGHT) if orientation < 5 else (HEIGHT, WIDTH)
    return Odd(
        data=encoded(PICTURE, "JPEG", exif=exif),
        name=f"turned-{orientation}.jpg",
        facts={"orientation": orientation, "width": size[0], "height": size[1]},
    )


def animation(image_format: str) -> Odd:
    others = [Image.new("RGB", PICTURE.size, colour) for colour in ("red", "blue")]
    data = encoded(PICTURE, image_format, save_all=True, append_images=others)
    return Odd(data=data, facts={"frames": 3}, name=f"animated.{image_format.lower()}")


def odd_pictures() -> dict[str, Odd]:
    """By what is odd about them."""
    grey = PICTURE.convert("L")
    deep = Image.fromarray(np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 27)
    floats = Image.fromarray(np.linspace(0, 1, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH))
    whole = encoded(PICTURE)
    return {
        "truncated": Odd(data=encoded(PICTURE, "JPEG")[:900], reason="truncated", name="cut.jpg"),
        "truncated png": Odd(data=whole[: len(whole) // 2], reason="truncated", name="cut.png"),
        "empty": Odd(data=b"", reason="empty", name="empty.png"),
        "not an image": Odd(data=b"<html>moved</html>", reason="not_an_image", name="page.jpg"),
        "png named jpeg": Odd(data=whole, name="really-a-png.JPEG", facts={"mode": "RGB"}),
        "cmyk": Odd(data=encoded(PICTURE.convert("CMYK"), "JPEG"), name="cmyk.jpg", facts={"mode": "CMYK"}),
        "palette": Odd(data=encoded(PICTURE.convert("P")), name="palette.png", facts={"mode": "P"}),
        "grey": Odd(data=encoded(grey), name="grey.png", facts={"mode": "L"}),
        "grey and alpha": Odd(data=encoded(grey.convert("LA")), name="grey-alpha.png", facts={"mode": "LA"}),
        "rgba": Odd(data=encoded(PICTURE.convert("RGBA")), name="rgba.png", facts={"mode": "RGBA"}),
        "16-bit grey": Odd(data=encoded(deep), name="deep.png", facts={"mode": "I;16"}),
        "16-bit rgba": Odd(data=deep_colour_png(), name="deep-colour.png", facts={"mode": "RGBA"}),
        "float tiff": Odd(data=encoded(floats, "TIFF"), name="float.tif", facts={"mode": "F"}),
        "animated gif": animation("GIF"),
        "animated webp": animation("WEBP"),
        **{f"orientation {number}": turned(number) for number in range(1, 9)},
        "one pixel": Odd(
            data=encoded(Image.new("RGB", (1, 1), "red")), name="dot.png", facts={"width": 1, "height": 1}
        ),
        "strip": Odd(
            data=encoded(Image.new("RGB", (20_000, 3), "red")), name="strip.png", facts={"width": 20_000}
        ),
        "bomb": Odd(data=blank_png(20_000), reason="too_large", name="bomb.png"),
        "huge but legal": Odd(data=blank_png(6_000), name="huge.png", facts={"width": 6_000, "mode": "1"}),
        "non-ascii": Odd(data=whole, name="Übergrößenträger 漢字.png"),
        "spaces": Odd(data=whole, name=" two  spaces .png"),
        "dots": Odd(data=whole, name="v1.2..final.png"),
        "long name": Odd(data=whole, name=f"{'long' * 49}.png"),
        "same key": Odd(data=whole, name="same.png"),
        "same key again": Odd(data=encoded(PICTURE, "JPEG"), name="same.jpg"),
    }


def write_odd_tree(root: Path) -> dict[str, Odd]:
    """Class folders `odd` (one file each), `empty` and `loop`; returns what was written by path in the tree."""
    odd = {f"odd/{each.name}": each for each in odd_pictures().values()}
    (root / "odd").mkdir(parents=True)
    for path, each in odd.items():
        (root / path).write_bytes(each.data)
    (root / "empty").mkdir()
    (root / "loop").symlink_to(root, target_is_directory=True)
    (root / "odd" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "odd" / "itself.png").symlink_to(root / "odd" / "itself.png")
    lost = {f"odd/{name}.png": Odd(data=b"", reason="missing") for name in ("gone", "itself")}
    return {**odd, **lost}
