"""An encoder that costs next to nothing, so that a build is bound by everything around it.

    hierarchy-builder build IMAGES --out DIR --encoder benchmarks.builder.pixel_encoder:load

A token is its patch of 14×14 pixels read at 16×16 grid points: 256 points × 3 colours = 768 channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

PATCH_PX, POINTS = 14, 16


class PixelEncoder:
    name, image_size_px, grid, width, weights_hash = "pixels", 224, (16, 16), POINTS**2 * 3, "none"

    def __init__(self) -> None:
        rows, columns = self.grid
        points = np.rint(np.linspace(0, PATCH_PX - 1, POINTS)).astype(np.int64)
        y = (np.arange(rows)[:, None] * PATCH_PX + points)[:, None, :, None]
        x = (np.arange(columns)[:, None] * PATCH_PX + points)[None, :, None, :]
        pixel = y * self.image_size_px + x
        self._where = (pixel[..., None] * 3 + np.arange(3)).reshape(-1)
        self._values = np.linspace(-1, 1, 256, dtype=np.float32)

    def encode(self, images: np.ndarray) -> np.ndarray:
        gathered = np.take(images.reshape(len(images), -1), self._where, axis=1)
        return self._values[gathered].reshape(len(images), *self.grid, self.width)

    def describe(self) -> dict[str, Any]:
        names = ("name", "image_size_px", "grid", "width", "weights_hash")
        return {name: getattr(self, name) for name in names} | {"normalisation": None, "decoder": None}


def load() -> PixelEncoder:
    return PixelEncoder()
