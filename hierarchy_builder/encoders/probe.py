"""A fingerprint of an encoder as it runs: two drawn pictures in, eight numbers out.

The hash of a weight file does not see a changed library, resampling or precision; these numbers do. They are
recorded in the manifest, for a person or a later run to compare (to about 1 % across precisions).
"""

from __future__ import annotations

import numpy as np

from hierarchy_builder.encoders import Encoder, encode

SIGNIFICANT_DIGITS = 5


def probe_value(encoder: Encoder) -> list[float]:
    """Four summaries of each of two pictures, rounded to 5 significant digits.

    Pictures come from integer arithmetic and are encoded one at a time, so no random generator and no batch
    size enters. Per picture: mean |f|, the length of the mean token, the cosine of the first and the central
    token, and the root mean square of the first quarter of the channels.
    """
    values: list[float] = []
    for picture in probe_pictures(encoder.image_size_px):
        values += _summaries(encode(encoder, picture[None])[0].astype(np.float64))
    return [float(f"{value:.{SIGNIFICANT_DIGITS - 1}e}") for value in values]


def probe_pictures(size_px: int) -> list[np.ndarray]:
    """A coloured ramp and a coloured board of squares, uint8 [S, S, 3]."""
    row, column = np.mgrid[:size_px, :size_px]
    ramp = np.stack([row * 255 // size_px, column * 255 // size_px, (row + column) * 127 // size_px], axis=-1)
    square = row * 7 // size_px * 3 + column * 7 // size_px * 5
    board = np.stack([square * 37 % 256, square * 91 % 256, square * 53 % 256], axis=-1)
    return [ramp.astype(np.uint8), board.astype(np.uint8)]


def _summaries(features: np.ndarray) -> list[float]:
    tokens = features.reshape(-1, features.shape[-1])
    first, centre = tokens[0], tokens[len(tokens) // 2]
    lengths = np.linalg.norm(first) * np.linalg.norm(centre)
    quarter = tokens[:, : max(1, tokens.shape[1] // 4)]
    return [
        float(np.abs(tokens).mean()),
        float(np.linalg.norm(tokens.mean(axis=0))),
        float(first @ centre / max(lengths, 1e-12)),
        float(np.sqrt((quarter**2).mean())),
    ]
