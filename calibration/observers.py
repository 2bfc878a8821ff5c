"""From what an activation was seen to be, to the range that is quantized.

minmax      all of it
percentile  all but (100 - p) / 2 percent on either side
entropy     the symmetric threshold of the least KL divergence (Migacz, GTC 2017), by onnxruntime's code
mse         the share of the range of the least mean squared error under the scheme's own grid
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calibration.activations import FLOAT8, LEVELS, FixedKind
from calibration.histogram import Histogram, mixed
from runtimes.errors import CalibrationError

OBSERVERS = ("minmax", "percentile", "entropy", "mse")
ENTROPY_BINS = 1024
"""onnxruntime's search is quadratic in the bins: 0.5 s a tensor here."""
QUANTIZED_BINS = 128
TRIALS = 80
"""Shares of the range that mse tries, from 1 / TRIALS to 1."""


@dataclass(frozen=True, kw_only=True)
class Observer:
    name: str = "minmax"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if self.name not in OBSERVERS:
            raise CalibrationError(f"--observer {self.name!r} is unknown; known: {', '.join(OBSERVERS)}")
        if not 50 < self.percentile <= 100:
            raise CalibrationError(f"--percentile {self.percentile:g}: expected above 50, at most 100")

    def __str__(self) -> str:
        return f"percentile {self.percentile:g}" if self.name == "percentile" else self.name

    def range(self, parts: list[tuple[float, Histogram]], kind: FixedKind) -> tuple[float, float]:
        """(lowest, highest) for weighted histograms; ``kind`` of ``ActivationQuantization``, whose grid mse needs."""
        shares, middles, low, high = mixed(parts)
        if self.name == "minmax" or low == high:
            return low, high
        if self.name == "percentile":
            return _percentile(shares, middles, low, high, (100 - self.percentile) / 200)
        if self.name == "entropy":
            return _entropy(shares, middles, low, high)
        return _mse(shares, middles, low, high, kind)


def _percentile(shares: np.ndarray, middles: np.ndarray, low: float, high: float, cut: float) -> tuple[float, float]:
    half = (middles[1] - middles[0]) / 2
    below = np.cumsum(shares)
    first = int(np.searchsorted(below, cut, side="right"))
    last = int(np.searchsorted(below, (1 - cut) * below[-1]))
    bottom = middles[min(first, len(middles) - 1)] - half
    top = middles[min(last, len(middles) - 1)] + half
    return max(low, float(bottom)), min(high, float(top))


def _entropy(shares: np.ndarray, middles: np.ndarray, low: float, high: float) -> tuple[float, float]:
    from onnxruntime.quantization.calibrate import HistogramCollector

    per_bin = len(shares) // ENTROPY_BINS
    counts = np.round(shares.reshape(ENTROPY_BINS, per_bin).sum(1) * 1e9).astype(np.int64)
    limit = np.float32(middles[-1] + middles[1] - middles[0])
    edges = np.linspace(-limit, limit, ENTROPY_BINS + 1, dtype=np.float32)
    collector = HistogramCollector("entropy", True, ENTROPY_BINS, QUANTIZED_BINS, 99.9, "same")
    bottom, top = collector.get_entropy_threshold((counts, edges, np.float32(low), np.float32(high)), QUANTIZED_BINS)
    return float(bottom), float(top)


def _mse(shares: np.ndarray, middles: np.ndarray, low: float, high: float, kind: FixedKind) -> tuple[float, float]:
    seen = shares > 0
    weights, values = shares[seen], middles[seen]
    trials = [(share * low, share * high) for share in np.arange(TRIALS, 0, -1) / TRIALS]
    errors = [float((weights * (values - _on_grid(values, bottom, top, kind)) ** 2).sum()) for bottom, top in trials]
    bottom, top = trials[int(np.argmin(errors))]
    return float(bottom), float(top)


def _on_grid(values: np.ndarray, low: float, high: float, kind: FixedKind) -> np.ndarray:
    """values as the scheme would quantize them, for the range [low, high]."""
    first, last = LEVELS[kind]
    low, high = min(low, 0.0), max(high, 0.0)
    if kind == "uint8":
        scale = (high - low) / last
        point = np.round(-low / scale)
        return (np.clip(np.round(values / scale) + point, first, last) - point) * scale
    scale = max(-low, high) / last
    scaled = np.clip(values / scale, first, last)
    return (scaled.astype(FLOAT8).astype(np.float64) if kind == "fp8" else np.round(scaled)) * scale
