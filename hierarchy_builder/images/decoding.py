"""Decodes the bytes of one image file to RGB and crops the square that the encoder receives.

An image is rotated upright by its EXIF orientation, transparency is composited on white, the first frame of an
animation is used, 16-bit values are divided by 256, and colour profiles are ignored, as in the published release. A
truncated file is refused, because decoding only part of it would give a different image.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from hierarchy_builder.errors import ImageError
from hierarchy_builder.images.resampling import resize_centre

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


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFacts:
    """Properties of a file: size in pixels after rotation, Pillow mode, number of frames, EXIF orientation (1..8)."""

    width: int
    height: int
    mode: str
    frames: int
    orientation: int


def decode_image(data: bytes, max_pixels: int = 178_956_970) -> tuple[Image.Image, ImageFacts]:
    """Decode the bytes of an image file into an upright RGB image; the file extension plays no role.

    max_pixels: largest width × height that is decoded (Pillow's own limit is 178,956,970).
    Raises ImageError with reason `empty`, `not_an_image`, `too_large`, `truncated`, `corrupt` or
    `unsupported_mode`.
    """
    image = _open(data)
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError("too_large", f"{width}×{height} pixels, expected at most {max_pixels}")
    orientation = _orientation(image)
    try:
        image.load()
    except Exception as error:
        raise _damage(error) from None
    mode, frames = image.mode, _count_frames(data)
    # Pillow rotates some formats (TIFF) while loading and then removes the tag, so it is read again here.
    turn = UPRIGHT.get(_orientation(image))
    rgb = _to_rgb(image)
    if turn is not None:
        rgb = rgb.transpose(turn)
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
        return resize_centre(np.asarray(image), (width, height), size_px, out_px)
    if image.size != (width, height):
        image = image.resize((width, height), resampling)
    left, top = round((width - size_px) / 2), round((height - size_px) / 2)
    return np.array(image.crop((left, top, left + size_px, top + size_px)))


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ImageError("empty", "the file has no bytes")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) < int.from_bytes(data[4:8], "little"):
        raise ImageError(
            "truncated", "the WebP file is shorter than its header states"
        )  # Pillow: "no decoder object"
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ImageError("not_an_image", f"unknown format, the file begins with {data[:8]!r}") from None
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", str(error)) from None
    except Exception as error:  # each format raises its own exceptions for a damaged header
        raise _damage(error) from None


def _damage(error: Exception) -> ImageError:
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
        with Image.open(io.BytesIO(data)) as image:
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
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except (ValueError, OSError) as error:
        raise ImageError("unsupported_mode", f"{image.mode}: {error}") from None


def _to_grey(image: Image.Image) -> Image.Image:
    """Convert one plane of more than 8 bits to 8 bits, by a rule that depends on the range of its values.

    Integers from 0 to 65535 count as 16-bit and are divided by 256. Floats in [0, 1] are multiplied by 255; floats in
    [0, 255] are only rounded. Any other range is stretched linearly so that it fills 0 to 255.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ImageError("corrupt", "NaN or infinite pixels")
    if values.dtype.kind in "iu" and low >= 0 and high <= 65535:
        grey = values >> 8
    elif values.dtype.kind == "f" and low >= 0 and high <= 255:
        grey = np.rint(values * (255 if high <= 1 else 1))
    else:
        grey = np.rint((values.astype(np.float64) - low) * (255 / max(float(high) - float(low), 1e-30)))
    return Image.fromarray(grey.astype(np.uint8))
