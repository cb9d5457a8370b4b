"""Low DCT frequencies of Oklab patches: an encoder without weights together with its decoder.

A patch of P×P pixels becomes C numbers: selected coefficients of the orthonormal 2-D DCT of its Oklab planes, each
times a scale, plus an offset. Encoding and decoding are linear in Oklab, so a mean of tokens decodes to the mean of
their patches, and a canvas decodes like an image.

Lightness is encoded twice, as L and as 1 − L. Cosine distance compares directions only: with L alone all greys would
have one direction, and with L minus its mean middle grey would have none.

    B images, [B, 3, h, w] RGB in [0, 1]    features [B, H, W, C] float32, h = H·P, w = W·P
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Ottosson (2020), "A perceptual color space for image processing": linear sRGB → LMS → Oklab.
RGB_TO_LMS = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
LMS_TO_LAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)

PATCH_PX = 16
KEPT_LIGHTNESS = 35
KEPT_CHROMA = 6
# Scales of patch means: with 4 for L, and 8 times that for the narrow range of a and b, each spread is near 1. Higher
# frequencies are multiplied by √radius against the falling spectrum of images, and by a half for chroma. Scaling all
# frequencies to equal spread would let fine texture dominate the cosine distance.
LIGHTNESS_SCALE = 4.0
CHROMA_SCALE = 32.0
CHROMA_DETAIL = 0.5


class DctBasis(nn.Module):
    """Converts images to features and back. `channels` lists (plane, row, column, scale, offset) for each channel."""

    analysis: Tensor
    synthesis: Tensor
    offset: Tensor
    rgb_to_lms: Tensor
    lms_to_rgb: Tensor
    lms_to_lab: Tensor
    lab_to_lms: Tensor

    def __init__(self, patch_px: int, channels: list[tuple[int, int, int, float, float]]) -> None:
        super().__init__()
        self.patch_px = patch_px
        self.channels = channels
        images = torch.stack([_basis_image(patch_px, *channel[:3]) for channel in channels])
        scale_C = torch.tensor([channel[3] for channel in channels], dtype=torch.float64)
        # Channels of the same coefficient are combined by least squares, that is weighted by their scales.
        energy: dict[tuple[int, int, int], float] = {}
        for channel in channels:
            energy[channel[:3]] = energy.get(channel[:3], 0.0) + channel[3] ** 2
        energy_C = torch.tensor([energy[channel[:3]] for channel in channels], dtype=torch.float64)
        to_lms, to_lab = (torch.tensor(rows, dtype=torch.float64) for rows in (RGB_TO_LMS, LMS_TO_LAB))
        constants = {
            "analysis": images * scale_C[:, None, None, None],
            "synthesis": images * (scale_C / energy_C)[:, None, None, None],
            "offset": torch.tensor([channel[4] for channel in channels]),
            "rgb_to_lms": to_lms,
            "lms_to_rgb": to_lms.inverse(),
            "lms_to_lab": to_lab,
            "lab_to_lms": to_lab.inverse(),
        }
        for name, value in constants.items():
            self.register_buffer(name, value.float(), persistent=False)

    @classmethod
    def default(cls) -> DctBasis:
        """Patches of 16 px and 48 channels: 1 − L, then 35 frequencies of L, 6 of a and 6 of b, each lowest first."""
        unit = 1 / PATCH_PX  # the lowest coefficient of an orthonormal DCT is PATCH_PX times the mean
        channels = [(0, 0, 0, -LIGHTNESS_SCALE * unit, LIGHTNESS_SCALE)]
        for plane, kept, scale, detail in (
            (0, KEPT_LIGHTNESS, LIGHTNESS_SCALE, 1.0),
            (1, KEPT_CHROMA, CHROMA_SCALE, CHROMA_DETAIL),
            (2, KEPT_CHROMA, CHROMA_SCALE, CHROMA_DETAIL),
        ):
            for row, column in _lowest_frequencies(PATCH_PX, kept):
                gain = detail * math.hypot(row, column) ** 0.5 if row or column else 1.0
                channels.append((plane, row, column, scale * gain * unit, 0.0))
        return cls(PATCH_PX, channels)

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> DctBasis:
        """Rebuild a basis from `spec()`, as stored in the index of a shard set. Raises ValueError."""
        try:
            if (spec["kind"], spec["color"]) != ("dct", "oklab"):
                raise ValueError(f"found {spec['kind']!r} in {spec['color']!r}")
            rows = [
                (int(p), int(i), int(j), float(scale), float(offset))
                for p, i, j, scale, offset in spec["channels"]
            ]
            return cls(int(spec["patch_px"]), rows)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(
                "not a description of a DCT basis, expected kind 'dct', color 'oklab', patch_px and channels "
                f"[[plane, row, column, scale, offset], …]: {error}"
            ) from None

    def spec(self) -> dict[str, Any]:
        """All numbers needed to decode, as JSON for `from_spec`."""
        return {
            "kind": "dct",
            "color": "oklab",
            "patch_px": self.patch_px,
            "channels": [list(channel) for channel in self.channels],
        }

    @property
    def width(self) -> int:
        """C, the number of channels of a token."""
        return len(self.channels)

    def forward(self, images: Tensor) -> Tensor:
        """RGB [B, 3, h, w] in [0, 1], h and w multiples of the patch → features [B, H, W, C]."""
        lab = self.to_oklab(images)
        return F.conv2d(lab, self.analysis, self.offset, stride=self.patch_px).permute(0, 2, 3, 1)

    def inverse(self, features: Tensor) -> Tensor:
        """Features [B, H, W, C] → RGB [B, 3, h, w], clamped to [0, 1]; frequencies without a channel are 0."""
        coefficients = (features.to(self.offset.dtype) - self.offset).permute(0, 3, 1, 2)
        return self.to_rgb(F.conv_transpose2d(coefficients, self.synthesis, stride=self.patch_px))

    def to_oklab(self, images: Tensor) -> Tensor:
        """sRGB [B, 3, h, w] in [0, 1] → Oklab, L in [0, 1], a and b about ±0.3."""
        linear = torch.where(images <= 0.04045, images / 12.92, ((images + 0.055) / 1.055) ** 2.4)
        lms = _mix(self.rgb_to_lms, linear).clamp_min(0) ** (1 / 3)
        return _mix(self.lms_to_lab, lms)

    def to_rgb(self, lab: Tensor) -> Tensor:
        """Oklab [B, 3, h, w] → sRGB clamped to [0, 1]."""
        linear = _mix(self.lms_to_rgb, _mix(self.lab_to_lms, lab) ** 3).clamp(0, 1)
        # The floor keeps the gradient of the power finite at black.
        gamma = 1.055 * linear.clamp_min(0.0031308) ** (1 / 2.4) - 0.055
        return torch.where(linear <= 0.0031308, linear * 12.92, gamma).clamp(0, 1)


def _mix(matrix: Tensor, images: Tensor) -> Tensor:
    return F.conv2d(images, matrix[:, :, None, None])


def _basis_image(patch_px: int, plane: int, row: int, column: int) -> Tensor:
    """An orthonormal DCT-II basis image, float64 [3, P, P], nonzero in `plane` only."""
    if not (0 <= plane < 3 and 0 <= row < patch_px and 0 <= column < patch_px):
        raise ValueError(
            f"frequency ({plane}, {row}, {column}) lies outside 3 planes of {patch_px}×{patch_px}"
        )
    image = torch.zeros(3, patch_px, patch_px, dtype=torch.float64)
    image[plane] = torch.outer(_cosine(patch_px, row), _cosine(patch_px, column))
    return image


def _cosine(length: int, frequency: int) -> Tensor:
    position = torch.arange(length, dtype=torch.float64) + 0.5
    wave = torch.cos(math.pi * frequency * position / length)
    return wave * math.sqrt((1 if frequency == 0 else 2) / length)


def _lowest_frequencies(patch_px: int, count: int) -> list[tuple[int, int]]:
    pairs = [(row, column) for row in range(patch_px) for column in range(patch_px)]
    return sorted(pairs, key=lambda pair: (pair[0] ** 2 + pair[1] ** 2, pair[0]))[:count]
