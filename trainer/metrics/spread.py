"""Mean, standard deviation and confidence interval of a few measurements."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


class Spread(NamedTuple):
    """Statistics of the measurements that are not NaN; a statistic is NaN if there are too few of them."""

    n: int
    mean: float
    std: float
    """Standard deviation of the population, with divisor n − 1."""
    low: float
    high: float
    """95 % confidence interval of the mean, by Student's t."""


def spread(values: Iterable[float]) -> Spread:
    """Summarise measurements of independent units, such as seeds; NaN means no measurement and is left out."""
    given = np.array([value for value in values if not math.isnan(value)], dtype=np.float64)
    if not len(given):
        return Spread(0, math.nan, math.nan, math.nan, math.nan)
    mean = float(given.mean())
    if len(given) == 1:
        return Spread(1, mean, math.nan, math.nan, math.nan)
    std = float(given.std(ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(given) - 1)) * std / math.sqrt(len(given))
    return Spread(len(given), mean, std, mean - half, mean + half)
