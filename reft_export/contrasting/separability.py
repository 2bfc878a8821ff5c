"""How well one direction tells the two sides apart, site by site: what a layer is chosen by.

The direction of a site is the difference of the two sides' means, d = mean(h+) - mean(h-). It is judged on lines that it was not measured
on: of every fold of lines d comes from the others, and a line is told by the side of the midpoint on which it lies,

    x = (h - (mean(h+) + mean(h-)) / 2) . d / |d|
    accuracy = (share of positive lines with x > 0 + share of negative lines with x < 0) / 2
    margin   = (mean(x+) - mean(x-)) / sqrt((var(x+) + var(x-)) / 2)              the sensitivity index d'

Line i of both sides is in the same fold, so that a pair is held out together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reft_export.contrasting.activations import Activations
from runtimes.edits.edit import Site

FOLDS = 5
EARLIEST, LATEST = 0.2, 0.8
"""Shares of the depth between which a layer is chosen. Before, the tokens themselves tell the sides apart; behind, what is added has few
layers left to act in."""
HALF = 0.5
"""Of the best margin: accuracy alone is perfect long before the contrast is whole, where lines are alike."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Separation:
    """Of one site."""

    site: Site
    difference: np.ndarray
    """float64 [D]: the mean of the positive lines minus that of the negative."""
    accuracy: float
    margin: float
    lines: int
    """Of both sides."""
    residual_norm: float
    """The mean norm of h at the tokens that were read."""

    @property
    def norm(self) -> float:
        return float(np.linalg.norm(self.difference))

    @property
    def share(self) -> float:
        """|difference| over the stream's norm."""
        return self.norm / self.residual_norm if self.residual_norm else 0.0


def separations(read: Mapping[Site, Activations], positives: int) -> tuple[Separation, ...]:
    """Of every site whose first ``positives`` rows are the positive lines'."""
    found = []
    for site, each in read.items():
        values = each.values.astype(np.float64)
        found.append(_separation(site, values[:positives], values[positives:], each.norm))
    return tuple(found)


def _separation(site: Site, positive: np.ndarray, negative: np.ndarray, norm: float) -> Separation:
    above, below = _held_out(positive, negative)
    spread = np.sqrt((above.var() + below.var()) / 2)
    gap = above.mean() - below.mean()
    return Separation(
        site=site,
        difference=positive.mean(0) - negative.mean(0),
        accuracy=float(((above > 0).mean() + (below < 0).mean()) / 2),
        margin=float(gap / spread) if spread > 0 else 0.0,
        lines=len(positive) + len(negative),
        residual_norm=norm,
    )


def _held_out(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(x of the positive lines, of the negative), each by a direction of the other folds."""
    folds = min(FOLDS, len(positive), len(negative))
    scores = np.zeros(len(positive)), np.zeros(len(negative))
    for fold in range(folds):
        held = [np.arange(len(side)) % folds == fold for side in (positive, negative)]
        up, down = (side[~out].mean(0) for side, out in zip((positive, negative), held, strict=True))
        direction = up - down
        length = np.linalg.norm(direction)
        for values, side, out in zip(scores, (positive, negative), held, strict=True):
            values[out] = (side[out] - (up + down) / 2) @ direction / length if length else 0.0
    return scores


def chosen_layer(found: Sequence[Separation], layers: int) -> int:
    """The earliest layer between EARLIEST and LATEST of the base's depth that tells the sides apart nearly as well as the best there does:
    its accuracy within one standard error, its margin at least HALF."""
    between = [each for each in found if EARLIEST * layers <= each.site.layer < LATEST * layers] or list(found)
    best = max(each.accuracy for each in between)
    accurate = [each for each in between if each.accuracy >= best - math.sqrt(best * (1 - best) / each.lines)]
    widest = max(each.margin for each in accurate)
    return min(each.site.layer for each in accurate if each.margin >= HALF * widest)
