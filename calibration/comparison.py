"""What steering does to activation ranges: those of the mixture against those of the base alone, activation by activation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from calibration.activations import FixedKind
from calibration.collected import Collected
from calibration.histogram import Histogram
from calibration.observers import Observer
from runtimes.artifacts.golden_schema import BASE_GOLDEN


@dataclass(frozen=True, kw_only=True)
class RangeRow:
    """``base``, ``steered`` (lowest, highest) as the observer chooses them from the base alone and from the mixture.

    ``widening`` = largest |steered| / largest |base|. Of the worst adapter: ``clipped_values``, the share of its values that base-only
    ranges would clip, and ``clipped_energy`` = sum of (|x| - bound)^2 over those / sum of x^2 over all.
    """

    name: str
    base: tuple[float, float]
    steered: tuple[float, float]
    widening: float
    worst_adapter: str
    clipped_values: float
    clipped_energy: float


def compare_with_base(
    collected: Collected, mixture: Mapping[str, float], observer: Observer, kind: FixedKind, ranges: Mapping[str, tuple[float, float]]
) -> list[RangeRow]:
    """One row per activation, in graph order. ``ranges``: those of the mixture."""
    rows = []
    for name in collected.header.tensors:
        base = observer.range([(1.0, collected.histograms[BASE_GOLDEN][name])], kind)
        steered = ranges[name]
        clipped = {
            source: clipping(collected.histograms[source][name], *base, symmetric=kind != "uint8")
            for source in mixture
            if source != BASE_GOLDEN
        }
        worst = max(clipped, key=lambda source: clipped[source][1], default="")
        largest = max(map(abs, base))
        rows.append(
            RangeRow(
                name=name,
                base=base,
                steered=steered,
                widening=max(map(abs, steered)) / largest if largest else 1.0,
                worst_adapter=worst,
                clipped_values=clipped[worst][0] if worst else 0.0,
                clipped_energy=clipped[worst][1] if worst else 0.0,
            )
        )
    return rows


def clipping(histogram: Histogram, low: float, high: float, *, symmetric: bool) -> tuple[float, float]:
    """(share of the values, share of their energy) that the range [low, high] cuts off; by bins, of which the one that a bound divides
    counts as inside."""
    if symmetric:
        low, high = -max(abs(low), abs(high)), max(abs(low), abs(high))
    low, high = min(low, 0.0), max(high, 0.0)
    half = histogram.limit / len(histogram.counts)
    middles, counts = histogram.middles, histogram.counts
    beyond = np.where(middles - half >= high, middles - high, np.where(middles + half <= low, low - middles, 0.0))
    energy = float((counts * middles**2).sum())
    return float(counts[beyond > 0].sum() / max(histogram.total, 1)), float((counts * beyond**2).sum() / energy) if energy else 0.0
