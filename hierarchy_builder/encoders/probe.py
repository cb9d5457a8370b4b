"""A fingerprint of a running encoder: twelve numbers that summarise its features of three synthetic images.

The numbers change with the resize, layer, norm, precision and library, which the hash of a weight file does not cover.
Every run of a build compares them with those of its first run and, if the weights are in REFERENCES, with that table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from hierarchy_builder.encoders import Encoder, encode, load_encoder
from hierarchy_builder.errors import BuilderError, ConfigMismatchError
from hierarchy_builder.images.decoding import crop_square

SIGNIFICANT_DIGITS = 5
PICTURE_SIZE = (500, 375)
"""Width and height of the synthetic images: the usual size in ImageNet, which every encoder has to reduce."""

TOLERANCES = {"float32": 5e-4, "bfloat16": 1e-2}
"""Largest accepted difference by precision: relative for magnitudes, absolute for ratios and cosines.

Machines add float32 numbers in different orders, which changes results by some 1e-6, and the fifth digit is rounded;
bfloat16 has 8 bits of mantissa, and its results depend on the kernels of the device.
"""
REFERENCES: dict[tuple[str, str], tuple[float, ...]] = {
    ("434b247383948414a28a1a0019812889c23f25c2a447b44a3bc45497a01777c8", ""): (  # dct, 256 px, 16×16×48
        *(0.15975, 0.63668, 0.15426, 0.87288),
        *(0.24754, 0.52159, 0.16954, 0.882),
        *(0.13785, 0.98349, 0.97629, 0.83722),
    )
}
"""Probe values of known encoders by (hash of the weights, output of an ONNX model or ""), in float32 on a CPU.

`hierarchy-builder encoders --probe NAME [--weights FILE] --json` computes them. Only `dct` is listed, since no value of
trained weights has been computed yet; for unlisted weights the manifest of the first run serves as the reference.
"""


def probe_value(encoder: Encoder) -> list[float]:
    """Compute four summaries of each of three images, rounded to 5 significant digits.

    Integer arithmetic draws the images; they are cropped like photos and encoded one at a time, so that neither a
    random generator nor a batch size plays a role. The summaries are the mean of |f|, the norm of the mean token over
    the root mean square norm of tokens, the cosine of the first and the central token, and the root mean square of
    the first quarter of the channels.
    """
    values: list[float] = []
    for picture in probe_pictures():
        # Each channel by itself is resized by Pillow, to the same bits as a photo, and numba need not be loaded.
        channels = Image.fromarray(picture).split()
        crop = np.stack([crop_square(channel, encoder.image_size_px) for channel in channels], axis=2)
        values += _summaries(encode(encoder, crop[None])[0].astype(np.float64))
    return [float(f"{value:.{SIGNIFICANT_DIGITS - 1}e}") for value in values]


def check_probe(
    encoder: Encoder, value: Sequence[float], precision: str, recorded: Sequence[float] | None
) -> str:
    """Compare the probe value with the reference of these weights and with the value the build recorded.

    recorded: probe value of the first run of the build, None for a new build.
    Returns `reference` if the weights are in REFERENCES, otherwise `recorded` or `new`.
    Raises ConfigMismatchError with both values if they differ by more than the tolerance of `precision`, and
    BuilderError if the value is no number.
    """
    if not np.isfinite(value).all():
        raise BuilderError(
            f"encoder {encoder.name} (weights {encoder.weights_hash[:12]}…, {precision}) gives features of the probe "
            "images that are no numbers (NaN or infinite): check its weights and its code"
        )
    reference = reference_of(encoder.describe())
    for expected, source in (
        (reference, "the reference of these weights"),
        (recorded, "the first run of this build"),
    ):
        if expected is not None and not agrees(value, expected, precision):
            raise ConfigMismatchError(
                f"encoder {encoder.name} (weights {encoder.weights_hash[:12]}…, {precision}) gives other features of "
                f"the probe images than {source}:\n  expected {list(expected)}\n  found    {list(value)}\n"
                "its resize, layer, norm, weight file or a library has changed: restore the former one, or build into "
                "another folder"
            )
    if reference is not None:
        return "reference"
    return "new" if recorded is None else "recorded"


def probe_report(name: str, weights: str | None = None) -> dict[str, Any]:
    """Return the hash and the probe value of an encoder in float32 on the CPU, as REFERENCES lists them, and a verdict.

    verdict: `agrees`, `DIFFERS` (both compared with REFERENCES) or `unknown weights`.
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
    """The reference value for the weights (and ONNX output) of an encoder, or None for unknown weights."""
    return REFERENCES.get((description["weights_hash"], description.get("output", "")))


def agrees(value: Sequence[float], expected: Sequence[float], precision: str) -> bool:
    """Whether two probe values differ by no more than the tolerance of `precision`."""
    if len(value) != len(expected):
        return False
    found, wanted = np.array(value).reshape(-1, 4), np.array(expected).reshape(-1, 4)
    # Mean |f| and root mean square scale with the features; the ratio and the cosine do not.
    unit = np.where([True, False, False, True], np.abs(wanted), 1.0)
    return bool((np.abs(found - wanted) <= TOLERANCES[precision] * unit).all())


def probe_pictures() -> list[np.ndarray]:
    """A colour gradient, a board of squares and fine noise, each uint8 [375, 500, 3]."""
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
