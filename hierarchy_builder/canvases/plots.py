"""Line plots as inline SVG without a plotting library or script; the style sheet of the page sets the colours.

A long series is drawn as the means of equal runs of points, with a band from their minimum to their maximum, so that a
plot of a million steps is small and still shows spikes. On a logarithmic axis the logarithms are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 38
MAX_POINTS = 240


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line: a name and its points, and an interval around each point if low and high are given.

    Points that are not finite are omitted; an interval with a bound that is not finite ends at its point.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """One pair of axes; with `log_y` points at or below 0 are omitted. Without `y_label` the title names the values."""

    title: str
    x_label: str
    series: Sequence[Series]
    y_label: str = ""
    log_y: bool = False


@dataclass(frozen=True, slots=True)
class _Curve:
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray


def draw(plot: Plot) -> Markup:
    """Return the plot as an `<svg>` element; its series have the classes s0, s1, … in order."""
    curves = [_curve(series, plot.log_y) for series in plot.series]
    drawn = [curve for curve in curves if len(curve.x)]
    if not drawn:
        return Markup('<p class="empty">No finite points.</p>')
    x_range = _span([curve.x for curve in drawn])
    y_range = _span([curve.low for curve in drawn] + [curve.high for curve in drawn], margin=0.04)
    parts = [_axes(plot, x_range, y_range)]
    for i, curve in enumerate(curves):
        if len(curve.x):
            parts.append(_line(curve, i % 8, x_range, y_range))
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, describe(plot), Markup("").join(parts)
    )


def describe(plot: Plot) -> str:
    """Describe the plot for screen readers: its axes, and the first and last value of each series."""
    ends = []
    for series in plot.series:
        curve = _curve(series, log_y=False)
        if len(curve.x):
            ends.append(f"{series.name} from {curve.y[0]:.4g} to {curve.y[-1]:.4g}")
    scale = " on a logarithmic scale" if plot.log_y else ""
    return f"{plot.title}: {plot.y_label or plot.title}{scale} over {plot.x_label}. {'; '.join(ends)}"


def short_number(value: float, digits: int = 4) -> str:
    """Format a number for an axis with `digits` significant digits: 1.5M, 20k, 0.05, 1e-06."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.{digits}g}{letter}"
    return f"{value:.{digits}g}"


def _curve(series: Series, log_y: bool) -> _Curve:
    x, y = np.asarray(series.x, dtype=np.float64), np.asarray(series.y, dtype=np.float64)
    low, high = (y if side is None else np.asarray(side, np.float64) for side in (series.low, series.high))
    kept = np.isfinite(x) & np.isfinite(y) & ((y > 0) | (not log_y))
    x, y, low, high = x[kept], y[kept], low[kept], high[kept]
    sides = [np.where(np.isfinite(side) & ((side > 0) | (not log_y)), side, y) for side in (low, high)]
    y, low, high = (np.log10(values) if log_y else values for values in (y, *sides))
    runs = [
        run
        for run in zip(*(np.array_split(v, MAX_POINTS) for v in (x, y, low, high)), strict=True)
        if len(run[0])
    ]
    columns = [(a.mean(), b.mean(), c.min(), d.max()) for a, b, c, d in runs]
    return _Curve(*np.array(columns, dtype=np.float64).reshape(-1, 4).T)


def _span(values: list[np.ndarray], margin: float = 0.0) -> tuple[float, float]:
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    if low == high:
        pad = abs(low) * 0.05 or 0.5
        return low - pad, high + pad
    pad = margin * (high - low)
    return low - pad, high + pad


def _axes(plot: Plot, x_range: tuple[float, float], y_range: tuple[float, float]) -> Markup:
    parts = []
    for value, text in _log_ticks(*y_range) if plot.log_y else _linear_ticks(*y_range, count=4):
        y = _to_y(value, y_range)
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, WIDTH - RIGHT, y, y)
        )
        parts.append(Markup('<text class="tick end" x="{}" y="{}">{}</text>').format(LEFT - 6, y + 4, text))
    xs = [x for series in plot.series for x in series.x]
    are_whole = all(float(x).is_integer() for x in xs if math.isfinite(x))
    for value, text in _linear_ticks(*x_range, count=4, are_whole=are_whole):
        x = _to_x(value, x_range)
        parts.append(
            Markup('<text class="tick middle" x="{}" y="{}">{}</text>').format(x, HEIGHT - BOTTOM + 16, text)
        )
    parts.append(
        Markup('<text class="label end" x="{}" y="{}">{}</text>').format(
            WIDTH - RIGHT, HEIGHT - 5, plot.x_label
        )
    )
    return Markup("").join(parts)


def _line(curve: _Curve, index: int, x_range: tuple[float, float], y_range: tuple[float, float]) -> Markup:
    xs = [_to_x(x, x_range) for x in curve.x]
    ys, low, high = ([_to_y(y, y_range) for y in side] for side in (curve.y, curve.low, curve.high))
    if len(xs) == 1:
        return Markup('<circle class="dot s{}" cx="{}" cy="{}" r="3"/>').format(index, xs[0], ys[0])
    line = Markup('<path class="line s{}" d="{}"/>').format(index, _path(xs, ys))
    if low == high:
        return line
    outline = _path(xs + xs[::-1], high + low[::-1]) + "Z"
    return Markup('<path class="band s{}" d="{}"/>').format(index, outline) + line


def _path(xs: list[float], ys: list[float]) -> str:
    return "M" + "L".join(f"{x:g},{y:g}" for x, y in zip(xs, ys, strict=True))


def _to_x(value: float, x_range: tuple[float, float]) -> float:
    return round(LEFT + (WIDTH - LEFT - RIGHT) * (value - x_range[0]) / (x_range[1] - x_range[0]), 1)


def _to_y(value: float, y_range: tuple[float, float]) -> float:
    return round(TOP + (HEIGHT - TOP - BOTTOM) * (y_range[1] - value) / (y_range[1] - y_range[0]), 1)


def _linear_ticks(low: float, high: float, count: int, are_whole: bool = False) -> list[tuple[float, str]]:
    """About `count` round values in the range, at least count − 1, or fewer if they have to be whole numbers."""
    least = max(0.6 * (high - low) / count, 1.0 if are_whole else 0.0)
    power = 10.0 ** math.floor(math.log10(least))
    steps = (m * power for m in (1, 2, 2.5, 5, 10))
    step = next(each for each in steps if each >= least and (each.is_integer() or not are_whole))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Enough digits to distinguish two ticks, even if a loss only changes in its fifth digit.
    digits = max(4, math.ceil(math.log10(max(abs(low), abs(high)) / step)) + 1)
    return [(i * step, short_number(i * step, digits)) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten; only some if there are many, with multiples of 2 and 5 if there are few. The range is in log10."""
    decades = list(range(math.ceil(low), math.floor(high) + 1))
    if len(decades) >= 3:
        return [
            (float(d), f"{10.0**d:.0e}" if abs(d) > 3 else f"{10.0**d:g}")
            for d in decades[:: len(decades) // 5 + 1]
        ]
    values = [m * 10.0**d for d in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    ticks = [(math.log10(v), short_number(v)) for v in values if low <= math.log10(v) <= high]
    if len(ticks) >= 2:
        return ticks
    return [(math.log10(v), text) for v, text in _linear_ticks(10.0**low, 10.0**high, count=3)]
