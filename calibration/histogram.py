"""A histogram of bounded size that any order of the same values fills alike, so that collecting can stop and go on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runtimes.errors import CalibrationError

BINS = 8192
START = 2.0**-100
"""The first limit, below any activation that matters."""


@dataclass(kw_only=True, eq=False)
class Histogram:
    """``counts[i]`` values in [-limit + i w, -limit + (i + 1) w), w = 2 limit / BINS; ``limit`` is a power of two above every |value|.

    When a larger value comes, the limit doubles and neighbouring bins are added up. All edges are dyadic, so nothing is ever moved to
    a wrong bin, and the order of the values leaves no trace. 64 KB whatever is added.
    """

    counts: np.ndarray
    limit: float = START
    low: float = np.inf
    high: float = -np.inf

    @classmethod
    def empty(cls) -> Histogram:
        return cls(counts=np.zeros(BINS, np.int64))

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def middles(self) -> np.ndarray:
        """The middle of each bin, float64 [BINS]."""
        return (np.arange(BINS) + 0.5 - BINS / 2) * (2 * self.limit / BINS)

    def add(self, values: np.ndarray, where: str) -> None:
        """Raises CalibrationError, naming ``where``, for values that are not finite."""
        values = np.asarray(values, np.float32).reshape(-1)
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise CalibrationError(f"{where} holds values that are not finite; check the bundle with `reft-export parity`")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.grow(max(-low, high))
        # In float64, so that a subnormal stays on its side of 0.
        index = np.floor(values.astype(np.float64) * (BINS / 2 / self.limit)).astype(np.int64) + BINS // 2
        self.counts += np.bincount(index, minlength=BINS)

    def grow(self, peak: float) -> None:
        """Doubles ``limit`` until it is above ``peak``."""
        while self.limit <= peak:
            counts = np.zeros_like(self.counts)
            counts[BINS // 4 : 3 * BINS // 4] = self.counts.reshape(-1, 2).sum(1)
            self.counts, self.limit = counts, 2 * self.limit


def mixed(parts: list[tuple[float, Histogram]]) -> tuple[np.ndarray, np.ndarray, float, float]:
    """(share of each bin float64 [BINS], the bins' middles, lowest, highest) of a mixture: every part counts by its weight, however many
    values it has."""
    limit = max(part.limit for _, part in parts)
    whole = sum(weight for weight, _ in parts)
    shares = np.zeros(BINS)
    for weight, part in parts:
        wide = Histogram(counts=part.counts, limit=part.limit)
        wide.grow(limit / 2)
        shares += weight / whole * wide.counts / max(wide.total, 1)
    middles = Histogram(counts=np.zeros(0), limit=limit).middles
    return shares, middles, min(part.low for _, part in parts), max(part.high for _, part in parts)
