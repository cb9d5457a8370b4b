"""A fingerprint of an encoder as it runs: three drawn pictures in, twelve numbers out, compared with those expected.

The hash of a weight file does not see another resize, layer, norm, precision or library; these numbers do. They
are compared with the table of references where the weights are known, and with the first run of a build always.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from hierarchy_builder.encoders import Encoder, encode, load_encoder
from hierarchy_builder.encoders.references import REFERENCES
from hierarchy_builder.errors import ConfigMismatchError
from hierarchy_builder.images.decoding import crop_square

SIGNIFICANT_DIGITS = 5
PICTURE_SIZE = (500, 375)
"""Width and height of the drawn pictures; most photographs of ImageNet have it, and every encoder must shrink it."""

TOLERANCES = {"float32": 5e-4, "bfloat16": 1e-2}
"""Largest difference by arithmetic: relative of sizes, absolute of shares and cosines, which are at most 1.

float32 differs between machines in the order of sums, by some 1e-6, and the fifth digit is rounded; bfloat16 has
8 bits of mantissa, and depends on the kernels of a device.
"""


def probe_value(encoder: Encoder) -> list[float]:
    """Four summaries of each of three pictures, rounded to 5 significant digits.

    Pictures come from integer arithmetic, are cropped like photographs and encoded one at a time, so no random
    generator and no batch size enters. Per picture: mean |f|; the length of the mean token over the root mean
    square length of tokens; the cosine of the first and the central token; the root mean square of the first
    quarter of the channels.
    """
    values: list[float] = []
    for picture in probe_pictures():
        crop = crop_square(Image.fromarray(picture), encoder.image_size_px)
        values += _summaries(encode(encoder, crop[None])[0].astype(np.float64))
    return [float(f"{value:.{SIGNIFICANT_DIGITS - 1}e}") for value in values]


def check_probe(
    encoder: Encoder, value: Sequence[float], precision: str, recorded: Sequence[float] | None
) -> str:
    """Compare the probe value with the reference of these weights and with what the build recorded.

    recorded: value of the run that began the build, None for a new one.
    Returns `reference` where the weights are in the table and `recorded` or `new` where they are not.
    Raises ConfigMismatchError with both values where one differs by more than the tolerance of `precision`.
    """
    reference = reference_of(encoder.describe())
    for expected, whose in (
        (reference, "the reference of these weights"),
        (recorded, "what this build began with"),
    ):
        if expected is not None and not agrees(value, expected, precision):
            raise ConfigMismatchError(
                f"encoder {encoder.name} (weights {encoder.weights_hash[:12]}…, {precision}) does not see the probe "
                f"pictures as {whose} does:\n  expected {list(expected)}\n  found    {list(value)}\n"
                "another resize, layer, norm, weight file or library is at work: bring back what it was, or build "
                "into another folder"
            )
    if reference is not None:
        return "reference"
    return "new" if recorded is None else "recorded"


def probe_report(name: str, weights: str | None = None) -> dict[str, Any]:
    """An encoder's hash and probe value in float32 on the CPU, as `references.py` holds them, and how they compare.

    verdict: `agrees` or `DIFFERS` with the reference, or `unknown weights`.
    """
    encoder = load_encoder(name, weights=weights, precision="float32", device="cpu")
    description, value = encoder.describe(), probe_value(encoder)
    reference = reference_of(description)
    verdict = "unknown weights"
    if reference is not None:
        verdict = "agrees" if agrees(value, reference, "float32") else "DIFFERS"
    return {
        "name": encoder.name,
        "weights_hash": encoder.weights_hash,
        "output": description.get("output", ""),
        "value": value,
        "verdict": verdict,
    }


def reference_of(description: dict[str, Any]) -> tuple[float, ...] | None:
    """Expected value of an encoder by hash of its weights (and output), None for unknown weights."""
    return REFERENCES.get((description["weights_hash"], description.get("output", "")))


def agrees(value: Sequence[float], expected: Sequence[float], precision: str) -> bool:
    """Whether two probe values differ by no more than the tolerance of `precision`."""
    if len(value) != len(expected):
        return False
    found, wanted = np.array(value).reshape(-1, 4), np.array(expected).reshape(-1, 4)
    # Mean |f| and root mean square have the encoder's own unit; share and cosine have none.
    unit = np.where([True, False, False, True], np.abs(wanted), 1.0)
    return bool((np.abs(found - wanted) <= TOLERANCES[precision] * unit).all())


def probe_pictures() -> list[np.ndarray]:
    """A coloured ramp, a board of squares and fine noise, uint8 [375, 500, 3]."""
    width, height = PICTURE_SIZE
    row, column = np.mgrid[:height, :width]
    ramp = [row * 255 // height, column * 255 // width, (row + column) * 255 // (height + width)]
    square = row * 7 // height * 3 + column * 7 // width * 5
    board = [square * 37 % 256, square * 91 % 256, square * 53 % 256]
    mixed = (row * 2654435761 + column * 2246822519) % 2**32
    mixed = (mixed ^ (mixed >> 15)) * 668265263 % 2**32
    noise = [mixed >> 8 & 255, mixed >> 16 & 255, mixed >> 24 & 255]
    return [np.stack(planes, axis=-1).astype(np.uint8) for planes in (ramp, board, noise)]


def _summaries(features: np.ndarray) -> list[float]:
    tokens = features.reshape(-1, features.shape[-1])
    first, centre = tokens[0], tokens[len(tokens) // 2]
    lengths = np.linalg.norm(first) * np.linalg.norm(centre)
    quarter = tokens[:, : max(1, tokens.shape[1] // 4)]
    return [
        float(np.abs(tokens).mean()),
        float(np.linalg.norm(tokens.mean(axis=0)) / max(np.sqrt((tokens**2).sum(axis=1).mean()), 1e-12)),
        float(first @ centre / max(lengths, 1e-12)),
        float(np.sqrt((quarter**2).mean())),
    ]
