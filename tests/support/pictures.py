"""Drawn photographs for tests: a coloured shape on a textured ground, one folder per class."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("circle", "square", "stripes")
NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray | Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    """The bytes of a file of that format."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def draw_picture(class_name: str, seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """An RGB picture (width, height) that depends on its arguments only."""
    random = np.random.default_rng([CLASSES.index(class_name), seed])
    width, height = size
    ground = random.integers(0, 120, 3) + random.integers(0, 40, (height, width, 3))
    picture = Image.fromarray(ground.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    colour = tuple(int(value) for value in random.integers(130, 255, 3))
    side = min(size) // 2
    left, top = int(random.integers(0, width - side)), int(random.integers(0, height - side))
    if class_name == "circle":
        draw.ellipse((left, top, left + side, top + side), fill=colour)
    elif class_name == "square":
        draw.rectangle((left, top, left + side, top + side), fill=colour)
    else:
        for offset in range(0, width, 12):
            draw.line((offset, 0, offset, height), fill=colour, width=4)
    return picture


def write_tree(folder: Path, per_class: int = 4) -> Path:
    """An ImageFolder tree of `per_class` drawn pictures in each of three classes."""
    for class_name in CLASSES:
        (folder / class_name).mkdir(parents=True, exist_ok=True)
        for seed in range(per_class):
            draw_picture(class_name, seed).save(folder / class_name / f"{seed:03d}.png")
    return folder
