"""Bicubic resizing of only the crop that is kept, faster than Pillow and equal to its result bit for bit.

Pillow resizes the whole image, of which the crop discards a part. Here only the rows and columns of the crop are
computed, in loops that numba vectorises and that run without the GIL. The arithmetic is that of Pillow
(libImaging/Resample.c): a cubic filter with a = −0.5, widened by the scale for antialiasing; weights normalised in
float64 and rounded to 22 bits; columns first; 8 bits between the two passes.

    h×w image, S×S pixels of the crop, T taps of the filter
"""

from __future__ import annotations

import functools
import math

import numba
import numpy as np

PRECISION_BITS = 22
"""Fraction bits of a weight; with 22 the sums of products with 8-bit values still fit int32."""


def resize_centre(
    pixels: np.ndarray, size: tuple[int, int], side: int, out_px: int | None = None
) -> np.ndarray:
    """Return the centre square of RGB uint8 [h,w,3] after resizing to `size`: contiguous uint8 [S,S,3].

    size: (width, height) of the whole image after resizing, at least S each. The corner of the crop is rounded half
    to even. out_px: side of the result in pixels, if the same region is wanted at another scale.
    """
    out_px = side if out_px is None else out_px
    height, width = pixels.shape[:2]
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    finer = out_px / side
    columns = _weights(width, width / size[0] / finer, left * finer, out_px)
    rows = _weights(height, height / size[1] / finer, top * finer, out_px)
    return _resize(np.ascontiguousarray(pixels), *columns, *rows)


@functools.lru_cache(maxsize=256)
def _weights(old: int, scale: float, start: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """First input pixel int32 [count] and filter weights int32 [count,T] of `count` outputs.

    old: number of input pixels. scale: input pixels per output pixel. start: index of the first output computed.
    """
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    taps = math.ceil(support) * 2 + 1
    first, weights = np.zeros(count, np.int32), np.zeros((count, taps), np.int32)
    for number in range(count):
        centre = (start + number + 0.5) * scale
        low = max(0, int(centre - support + 0.5))
        high = min(old, int(centre + support + 0.5))
        values = [_cubic((x + low - centre + 0.5) * (1.0 / stretch)) for x in range(high - low)]
        total = 0.0
        for value in values:  # summed in the order of Pillow, for equal rounding
            total += value
        inverse = 1.0 / total if total != 0.0 else 1.0
        for x, value in enumerate(values):
            scaled = value * inverse * (1 << PRECISION_BITS)
            weights[number, x] = int(scaled - 0.5) if scaled < 0 else int(scaled + 0.5)
        first[number] = min(low, max(0, old - taps))  # keeps all T taps inside the image
        if first[number] != low:
            weights[number] = np.roll(weights[number], low - first[number])
    return first, weights


def _cubic(x: float) -> float:
    a, x = -0.5, abs(x)
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    if x < 2.0:
        return (((x - 5) * x + 8) * x - 4) * a
    return 0.0


@numba.njit(cache=True, nogil=True)
def _resize(
    pixels: np.ndarray,
    first_column: np.ndarray,
    column_weights: np.ndarray,
    first_row: np.ndarray,
    row_weights: np.ndarray,
) -> np.ndarray:
    height, width, _ = pixels.shape
    side, half = len(first_column), np.int32(1 << (PRECISION_BITS - 1))
    column_taps, row_taps = min(column_weights.shape[1], width), min(row_weights.shape[1], height)
    low, high = first_row[0], min(height, first_row[-1] + row_taps)
    narrow = np.empty((high - low, side * 3), np.uint8)
    for y in range(high - low):
        line = pixels[low + y]
        for x in range(side):
            start = first_column[x]
            red, green, blue = half, half, half
            for tap in range(column_taps):
                weight = column_weights[x, tap]
                red = np.int32(red + np.int32(line[start + tap, 0]) * weight)
                green = np.int32(green + np.int32(line[start + tap, 1]) * weight)
                blue = np.int32(blue + np.int32(line[start + tap, 2]) * weight)
            narrow[y, 3 * x] = min(max(red >> PRECISION_BITS, 0), 255)
            narrow[y, 3 * x + 1] = min(max(green >> PRECISION_BITS, 0), 255)
            narrow[y, 3 * x + 2] = min(max(blue >> PRECISION_BITS, 0), 255)
    crop = np.empty((side, side, 3), np.uint8)
    line_of_sums = np.empty(side * 3, np.int32)
    for y in range(side):
        line_of_sums[:] = half
        for tap in range(row_taps):
            weight = row_weights[y, tap]
            source = narrow[first_row[y] - low + tap]
            for x in range(side * 3):
                line_of_sums[x] = np.int32(line_of_sums[x] + np.int32(source[x]) * weight)
        out = crop[y].reshape(-1)
        for x in range(side * 3):
            out[x] = min(max(line_of_sums[x] >> PRECISION_BITS, 0), 255)
    return crop
