"""How close decoded pictures are to the originals.

N pictures, h×w pixels
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def reconstruction(decoded: np.ndarray, pictures: np.ndarray) -> Iterator[tuple[str, float]]:
    """(name, value): mean absolute error and mean PSNR in dB of pixel values from 0 to 1; also for flat pictures.

    decoded, pictures: uint8 [N, h, w, 3]. A flat picture has the mean colour of the original, which is a baseline
    for decoders that ignore the layout of tokens.
    """
    truth = pictures.astype(np.float32) / 255
    flat = np.broadcast_to(truth.mean(axis=(1, 2), keepdims=True), truth.shape)
    for prefix, made in (("", decoded.astype(np.float32) / 255), ("flat_", flat)):
        difference = made - truth
        squares = np.square(difference).mean(axis=(1, 2, 3), dtype=np.float64)
        yield f"{prefix}l1", float(np.abs(difference).mean(dtype=np.float64))
        yield f"{prefix}psnr", float(-10 * np.log10(np.maximum(squares, 1e-10)).mean())
