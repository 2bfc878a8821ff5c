"""How sure a figure is, as the lines are a sample: 95 % intervals.

a share        Wilson's score interval: (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)    [Wilson 1927]
a mean, and    the percentile bootstrap over lines: RESAMPLES times as many lines are drawn with replacement as there are, by a
a difference   generator of the fixed SEED; of a difference a line is drawn with both models' figures, so that it is paired.
                                                                                                   [Efron, Tibshirani 1993]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054
"""Of a normal distribution's middle 95 %."""
RESAMPLES = 2000
SEED = 0
DRAWN = 2**22
"""Line numbers in memory at once."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    value: float
    low: float
    high: float


def wilson(right: int, of: int) -> Interval:
    """Of a share; ``of`` 1 at least."""
    share, z2 = right / of, Z * Z / of
    middle, half = share + z2 / 2, Z * math.sqrt(share * (1 - share) / of + z2 / (4 * of))
    # At a share of 0 or 1 the bound is the share itself, which rounding may miss.
    low, high = (middle - half) / (1 + z2), (middle + half) / (1 + z2)
    return Interval(value=share, low=min(max(low, 0.0), share), high=max(min(high, 1.0), share))


def bootstrap(sums: np.ndarray, counts: np.ndarray | None = None) -> Interval:
    """Of sum(sums) / sum(counts) over lines, both [lines]; without ``counts`` of the mean of ``sums``.

    For a paired difference ``sums`` are the lines' differences.
    """
    weights = np.ones(len(sums)) if counts is None else np.asarray(counts, np.float64)
    sums = np.asarray(sums, np.float64)
    generator, found = np.random.default_rng(SEED), list[np.ndarray]()
    left = RESAMPLES
    while left:
        rows = min(left, max(1, DRAWN // len(sums)))
        lines = generator.integers(0, len(sums), (rows, len(sums)))
        found.append(sums[lines].sum(1) / weights[lines].sum(1))
        left -= rows
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return Interval(value=float(sums.sum() / weights.sum()), low=float(low), high=float(high))
