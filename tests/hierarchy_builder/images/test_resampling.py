"""The crop of a resized picture has Pillow's pixels, whatever the sizes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hierarchy_builder.images.decoding import crop_square, decode_image
from hierarchy_builder.images.resampling import resize_centre


def with_pillow(pixels: np.ndarray, size: tuple[int, int], side: int) -> np.ndarray:
    resized = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return np.asarray(resized.crop((left, top, left + side, top + side)))


@settings(max_examples=150, deadline=None)
@given(
    short=st.integers(1, 300),
    aspect=st.floats(1, 4),
    lies=st.booleans(),
    side=st.sampled_from([1, 7, 32, 224]),
    kind=st.sampled_from(["noise", "extremes", "ramp"]),
)
def test_resized_crop_equals_pillow(short: int, aspect: float, lies: bool, side: int, kind: str) -> None:
    long = int(short * aspect)
    height, width = (short, long) if lies else (long, short)
    random = np.random.default_rng(short)
    pixels = {
        "noise": lambda: random.integers(0, 256, (height, width, 3), dtype=np.uint8),
        "extremes": lambda: random.integers(0, 2, (height, width, 3), dtype=np.uint8) * np.uint8(255),
        "ramp": lambda: (np.arange(height * width * 3) % 256).astype(np.uint8).reshape(height, width, 3),
    }[kind]()
    size = (side * width // short, side * height // short)
    found = resize_centre(pixels, size, side)
    assert np.array_equal(found, with_pillow(pixels, size, side))
    assert found.flags.c_contiguous


def test_resized_photographs_equal_pillow(shared) -> None:
    photos = sorted((shared / "data" / "caltech101").rglob("*.jpg"))[::40]
    if not photos:
        pytest.skip("no photographs there")
    for photo in photos:
        image, _ = decode_image(photo.read_bytes())
        short = min(image.size)
        size = (224 * image.width // short, 224 * image.height // short)
        assert np.array_equal(crop_square(image, 224), with_pillow(np.asarray(image), size, 224)), photo.name
