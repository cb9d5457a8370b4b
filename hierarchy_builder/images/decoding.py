"""Decodes the bytes of one image file to RGB and crops the square that the encoder receives.

An image is rotated upright by its EXIF orientation, transparency is composited on white, the first frame of an
animation is used, 16-bit values are divided by 256, and colour profiles are ignored, as in the published release. A
truncated file is refused, because decoding only part of it would give a different image. Damaged or very large
metadata of a PNG is left out, because its pixels do not depend on it.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from hierarchy_builder.errors import ImageError
from hierarchy_builder.files.untrusted.pictures import PNG_START, open_picture, png_chunks

# decode_image checks sizes against `max_pixels`; Pillow would already warn about ordinary large scans.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", message="Corrupt EXIF data", category=UserWarning)

ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_ASPECT = 4
"""A longer side is cropped to this ratio before resizing, since its ends lie outside the centre square anyway."""
LARGE_PIXELS = 2**25
"""Pixels from which a process decodes one picture at a time, since decoding takes up to 8 bytes for each pixel."""
STRIP_PIXELS = 2**20
"""Pixels that are converted at once, so that no step holds a large picture a third time."""
PNG_TEXT_BYTES = 2**20
"""A text of a PNG longer than this is metadata that Pillow refuses to hold."""
_alone = threading.RLock()


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFacts:
    """Properties of a file: size in pixels after rotation, Pillow mode, number of frames, EXIF orientation (1..8)."""

    width: int
    height: int
    mode: str
    frames: int
    orientation: int


def decode_image(
    data: bytes, max_pixels: int = 178_956_970, turn: contextlib.ExitStack | None = None
) -> tuple[Image.Image, ImageFacts]:
    """Decode the bytes of an image file into an upright RGB image; the file extension plays no role.

    max_pixels: largest width × height that is decoded (Pillow's own limit is 178,956,970).
    turn: threads decode large pictures one after another, and the next waits until this stack is closed; without it
    only until the picture is decoded.
    Raises ImageError with reason `empty`, `not_an_image`, `too_large`, `truncated`, `corrupt` or
    `unsupported_mode`.
    """
    with contextlib.ExitStack() as own:
        try:
            return _decode(data, max_pixels, turn or own)
        except ImageError:
            slim = _without_metadata(data)
            if slim is None:
                raise
        return _decode(slim, max_pixels, turn or own)


def _decode(data: bytes, max_pixels: int, turn: contextlib.ExitStack) -> tuple[Image.Image, ImageFacts]:
    image = _open(data)
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError("too_large", f"{width}×{height} pixels, expected at most {max_pixels}")
    if width * height >= LARGE_PIXELS:
        turn.enter_context(_alone)
    orientation = _orientation(image)
    try:
        image.load()
    except Exception as error:
        raise _damage(error) from None
    mode, frames = image.mode, _count_frames(data)
    # Pillow rotates some formats (TIFF) while loading and then removes the tag, so it is read again here.
    method = UPRIGHT.get(_orientation(image))
    rgb = _to_rgb(image)
    del image  # its memory is needed below
    if method is not None:
        rgb = rgb.transpose(method)
    facts = ImageFacts(width=rgb.width, height=rgb.height, mode=mode, frames=frames, orientation=orientation)
    return rgb, facts


def crop_square(
    image: Image.Image,
    size_px: int,
    resampling: Image.Resampling = Image.Resampling.BICUBIC,
    *,
    out_px: int | None = None,
) -> np.ndarray:
    """Resize the short side to `size_px` (bicubic, antialiased) and take the centre square: uint8 [S, S, 3].

    This is the preprocessing of the published release: the long side is rounded down, and the corner of the crop to
    the nearest pixel.
    resampling: NEAREST crops a label map exactly as its photo; the result is [S, S] and keeps the type of the labels.
    out_px: side in pixels of the returned RGB image, if not `size_px`; the region that `size_px` selects is then
    resampled directly from `image`.
    """
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) > longest:
        left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
        image = image.crop((left, top, left + min(width, longest), top + min(height, longest)))
        width, height = image.size
    short = min(width, height)
    width, height = size_px * width // short, size_px * height // short
    is_resized = image.size != (width, height) or out_px not in (None, size_px)
    if image.mode == "RGB" and resampling == Image.Resampling.BICUBIC and is_resized:
        # loads numba, which a driver does not need
        from hierarchy_builder.images.resampling import resize_centre

        return resize_centre(np.asarray(image), (width, height), size_px, out_px)
    if image.size != (width, height):
        image = image.resize((width, height), resampling)
    left, top = round((width - size_px) / 2), round((height - size_px) / 2)
    return np.array(image.crop((left, top, left + size_px, top + size_px)))


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ImageError("empty", "the file has no bytes")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) < int.from_bytes(data[4:8], "little"):
        # Pillow would say "no decoder object".
        raise ImageError("truncated", "the WebP file is shorter than its header states")
    try:
        return open_picture(data)
    except UnidentifiedImageError:
        raise ImageError(
            "not_an_image", f"none of the formats that are read; the file begins with {data[:8]!r}"
        ) from None
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", str(error)) from None
    except Exception as error:  # each format raises its own exceptions for a damaged header
        raise _damage(error) from None


def _without_metadata(data: bytes) -> bytes | None:
    """The PNG without damaged and large metadata, or None if it has none or is no PNG.

    Transparency, EXIF and animation are kept, and so are short texts, which may hold the orientation.
    """
    if not data.startswith(PNG_START):
        return None
    kept = [PNG_START]
    for chunk in png_chunks(data):
        length, kind = len(chunk.content) - 12, chunk.kind
        is_cut = length < int.from_bytes(chunk.content[:4], "big")
        if is_cut or kind[:1].isupper() or kind in (b"tRNS", b"acTL", b"fcTL", b"fdAT"):
            kept.append(chunk.content)
            continue
        is_text = (
            kind in (b"tEXt", b"iTXt") and length <= PNG_TEXT_BYTES and b"\0\1\0" not in chunk.content[8:100]
        )
        if chunk.is_whole and (is_text or kind not in (b"tEXt", b"iTXt", b"zTXt", b"iCCP")):
            kept.append(chunk.content)
    slim = b"".join(kept)
    return None if len(slim) >= len(data) else slim


def _damage(error: Exception) -> ImageError:
    if isinstance(error, MemoryError | Image.DecompressionBombError):
        return ImageError("too_large", f"decoding it needs more memory than there is: {error}")
    detail = f"{type(error).__name__}: {error}"
    ended = isinstance(error, EOFError) or any(
        word in str(error).lower() for word in ("truncated", "end of file", "incomplete", "not enough")
    )
    return ImageError("truncated" if ended else "corrupt", detail)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # the pixels are usable even if the metadata is damaged
        return 1
    return value if value in UPRIGHT else 1


def _count_frames(data: bytes) -> int:
    """Number of frames, or 1 if a later frame is damaged, since only the first is used."""
    try:
        with open_picture(data) as image:
            return int(getattr(image, "n_frames", 1))
    except Exception:
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _to_grey(image)
    try:
        if image.mode in ("La", "RGBa"):
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        if image.has_transparency_data:
            return _on_white(image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except MemoryError as error:
        raise _damage(error) from None
    except (ValueError, OSError) as error:
        raise ImageError("unsupported_mode", f"{image.mode}: {error}") from None


def _on_white(image: Image.Image) -> Image.Image:
    """Composite a picture with transparency on white."""
    rgb = Image.new("RGB", image.size)
    for rows in _strips(image):
        strip = image.crop((0, rows.start, image.width, rows.stop)).convert("RGBA")
        strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
        rgb.paste(strip.convert("RGB"), (0, rows.start))
    return rgb


def _to_grey(image: Image.Image) -> Image.Image:
    """Convert one plane of more than 8 bits to 8 bits, by a rule that depends on the range of its values.

    Integers from 0 to 65535 count as 16-bit and are divided by 256. Floats in [0, 1] are multiplied by 255; floats in
    [0, 255] are only rounded. Any other range is stretched linearly so that it fills 0 to 255.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ImageError("corrupt", "NaN or infinite pixels")
    grey = np.empty(values.shape, np.uint8)
    for rows in _strips(image):
        strip = values[rows]
        if values.dtype.kind in "iu" and low >= 0 and high <= 65535:
            grey[rows] = strip >> 8
        elif values.dtype.kind == "f" and low >= 0 and high <= 255:
            grey[rows] = np.rint(strip * (255 if high <= 1 else 1))
        else:
            scale = 255 / max(float(high) - float(low), 1e-30)
            grey[rows] = np.rint((strip.astype(np.float64) - low) * scale)
    return Image.fromarray(grey)


def _strips(image: Image.Image) -> Iterator[slice]:
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield slice(top, min(top + rows, image.height))
