"""Colours with one meaning per page: a shared PCA palette for features, and colours of regions by their ancestry.

    H×W grid of tokens, C channels, L levels (coarse → fine)

Region colours are chosen in OKLCH (Ottosson 2020, "A perceptual color space for image processing"), where equal steps
of hue and lightness look equal; evenly spaced HSV hues would look alike among greens and have hardly any yellow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

GREYS = (0.18, 0.54)
"""Range of lightness for the regions of a divided background; an undivided background has the middle, 0.36."""
GREY_CHROMA_AND_HUE = (0.006, 280.0)
"""Nearly neutral, to differ from all colours of the object."""

PERCENTILES = (1.0, 99.0)
"""Of the tokens on each axis, which become black and full colour."""
FIT_TOKENS = 16_384
"""Number of tokens for the PCA; more tokens change no colour visibly."""

CHROMA = 0.125
LIGHTNESSES = (0.74, 0.62, 0.84)
FIRST_HUE = 40.0
TOKEN_STEP = 0.028


@dataclass(frozen=True, kw_only=True, slots=True)
class Palette:
    """Three axes of feature space, and for each the range of values that maps to black up to full colour.

    mean: float32 [C]. axes: float32 [C, 3], orthonormal columns. low, high: float32 [3].
    """

    mean: np.ndarray
    axes: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def apply(self, features: np.ndarray) -> np.ndarray:
        """Map features [..., C] of any float dtype to colours uint8 [..., 3]; tokens that are not finite become black.

        Raises ValueError if the palette was fitted on another number of channels.
        """
        features = np.asarray(features, dtype=np.float32)
        if features.shape[-1] != len(self.mean):
            raise ValueError(
                f"features have {features.shape[-1]} channels, the palette was fitted on {len(self.mean)}: "
                "fit a palette on features of the same encoder"
            )
        finite = np.isfinite(features).all(axis=-1, keepdims=True)
        projected = (np.where(finite, features, 0.0) - self.mean) @ self.axes
        span = self.high - self.low
        unit = np.where(span > 0, (projected - self.low) / np.where(span > 0, span, 1.0), 0.5)
        return np.where(finite, _to_bytes(unit), np.uint8(0))


def fit_palette(features: np.ndarray) -> Palette:
    """Fit a palette: the first three PCA axes become red, green and blue, and PERCENTILES set their ranges.

    features: [..., C], any float dtype, of which `finite_tokens` takes FIT_TOKENS. The largest loading of each axis is
    made positive, so that equal features give equal colours.
    Raises ValueError if no finite token is left.
    """
    tokens_MC = finite_tokens(features, FIT_TOKENS)
    if not len(tokens_MC):
        raise ValueError("no finite token to fit a palette on: pass finite features of at least one image")
    mean = tokens_MC.mean(axis=0, dtype=np.float64).astype(np.float32)
    axes = _principal_axes(tokens_MC - mean)
    low, high = np.percentile((tokens_MC - mean) @ axes, PERCENTILES, axis=0).astype(np.float32)
    return Palette(mean=mean, axes=axes, low=low, high=high)


def finite_tokens(features: np.ndarray, limit: int, seed: int = 0) -> np.ndarray:
    """At most `limit` tokens of features [..., C], spread over all, without any not finite: float32 [M, C]."""
    tokens_MC = np.asarray(features).reshape(-1, np.shape(features)[-1])
    tokens_MC = tokens_MC[spread_rows(len(tokens_MC), limit, seed)].astype(np.float32)
    return tokens_MC[np.isfinite(tokens_MC).all(axis=1)]


def spread_rows(num_rows: int, limit: int, seed: int = 0) -> np.ndarray:
    """Indices of at most `limit` of `num_rows` rows, one random row from each of `limit` equal runs; int64, ascending.

    Rows are drawn at random because a fixed stride that divides the grid would select only one column of tokens.
    """
    if num_rows <= limit:
        return np.arange(num_rows, dtype=np.int64)
    drawn = (np.arange(limit) + np.random.default_rng(seed).random(limit)) * (num_rows / limit)
    return np.minimum(drawn.astype(np.int64), num_rows - 1)


def hierarchy_colours(regions: np.ndarray) -> np.ndarray:
    """Colour all levels of one image so that children resemble their parent.

    regions: uint8 [L−1, H, W], nested; 0 is the background on level 0. Returns uint8 [L, H, W, 3]; on the last level
    each token has a shade of its finest region. A region of the object has an arc of the hue circle, a region of the
    background a range of greys, and its children divide it among them. A region that is not divided keeps its colour.
    """
    regions = np.asarray(regions)
    spans = {0: _Span(*GREYS), 1: _Span(FIRST_HUE, FIRST_HUE + 360.0, LIGHTNESSES[0])}
    parents = regions[0] > 0
    painted = []
    for level_HW in regions:
        spans = _divide_spans(level_HW, parents, spans)
        painted.append(np.empty((*level_HW.shape, 3)))
        for region, span in spans.items():
            painted[-1][level_HW == region] = span.colour()
        parents = level_HW
    rows, columns = np.indices(parents.shape)
    painted.append(painted[-1].copy())
    # Five shades in a pattern in which none of the eight neighbours of a token has the same shade.
    painted[-1][..., 0] += TOKEN_STEP * ((2 * rows + columns) % 5 - 2)
    return np.stack([_to_srgb(lch) for lch in painted])


def _principal_axes(centred_MC: np.ndarray) -> np.ndarray:
    channels = centred_MC.shape[1]
    covariance = (centred_MC.T @ centred_MC).astype(np.float64) / len(centred_MC)
    axes = np.zeros((channels, 3), dtype=np.float32)
    leading = np.linalg.eigh(covariance)[1][:, ::-1][:, :3]
    signs = np.sign(leading[np.abs(leading).argmax(axis=0), np.arange(leading.shape[1])])
    axes[:, : leading.shape[1]] = leading * signs
    return axes


class _Span(NamedTuple):
    """Range that a region divides among its children: hues at one lightness, or greys if `lightness` is None."""

    start: float
    stop: float
    lightness: float | None = None

    def divide(self, count: int) -> list[_Span]:
        """Spans of `count` children in order, chosen so that neighbours look different even if there are many."""
        width = (self.stop - self.start) / count
        spans = []
        for i in range(count):
            # Neighbouring greys lie half the range apart; neighbouring hues also differ in lightness.
            slot = i if self.lightness else i // 2 + (i % 2) * ((count + 1) // 2)
            own = self.lightness if count == 1 or not self.lightness else LIGHTNESSES[i % len(LIGHTNESSES)]
            spans.append(_Span(self.start + slot * width, self.start + (slot + 1) * width, own))
        return spans

    def colour(self) -> tuple[float, float, float]:
        """Lightness, chroma and hue of the region itself."""
        middle = (self.start + self.stop) / 2
        return (self.lightness, CHROMA, middle) if self.lightness else (middle, *GREY_CHROMA_AND_HUE)


def _divide_spans(
    level_HW: np.ndarray, parents_HW: np.ndarray, spans: Mapping[int, _Span]
) -> dict[int, _Span]:
    """Span of each region, taken from the span of its parent (the region at its first token one level up)."""
    children: dict[int, list[int]] = {}
    for region in np.unique(level_HW):
        parent = int(parents_HW[level_HW == region][0])
        children.setdefault(parent, []).append(int(region))
    return {
        region: span
        for parent, regions in children.items()
        for region, span in zip(regions, spans[parent].divide(len(regions)), strict=True)
    }


def _to_srgb(lch: np.ndarray) -> np.ndarray:
    """OKLCH (lightness 0..1, chroma, hue in degrees) → sRGB uint8, clipped to the gamut. Source: Ottosson 2020."""
    lightness, chroma, hue = np.moveaxis(np.asarray(lch, dtype=np.float64), -1, 0)
    a, b = chroma * np.cos(np.deg2rad(hue)), chroma * np.sin(np.deg2rad(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = np.stack(
        [
            4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
        ],
        axis=-1,
    ).clip(0.0, 1.0)
    return _to_bytes(np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055))


def _to_bytes(unit: np.ndarray) -> np.ndarray:
    return np.rint(255 * np.clip(unit, 0.0, 1.0)).astype(np.uint8)
