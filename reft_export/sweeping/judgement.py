"""How good the first pass's guess was, by what the trials found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reft_export.sweeping.first_pass import FirstPass
from reft_export.sweeping.results import TrialResult, ranked

LEAST = 4
"""Trials of a correlation."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Of ranks and places 1 is the best."""

    ranks: tuple[tuple[int, int | None], ...]
    """Of every proposed trial that has ended, its number and its rank among the complete ones by quality; None: pruned or failed."""
    ended: int
    """Trials, complete or not."""
    complete: int
    correlation: float | None
    """Spearman's, of score and quality over the complete trials: 1 where the scores order them rightly. None of fewer than LEAST trials,
    or where one of both does not vary."""
    best_layers: int | None
    """The place of the best trial's layers among the candidates by score."""
    searched: int
    """Candidates for layers."""


def judged(found: FirstPass, trials: Sequence[TrialResult], layers: Sequence[str], *, maximized: bool) -> Judgement:
    """``layers``: the candidates."""
    order = ranked(trials, maximized=maximized)
    places = {each.number: rank for rank, each in enumerate(order, 1)}
    best_layers = None
    if order:
        by_score = sorted(layers, key=lambda each: -found.score(each, order[0].point.positions))
        best_layers = by_score.index(order[0].point.layers) + 1
    scores = [found.score(each.point.layers, each.point.positions) for each in order]
    qualities = [each.value for each in order]
    return Judgement(
        ranks=tuple((each.number, places.get(each.number)) for each in trials if each.proposed),
        ended=len(trials),
        complete=len(order),
        correlation=spearman(scores, qualities if maximized else [-each for each in qualities]),
        best_layers=best_layers,
        searched=len(layers),
    )


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """The correlation of both sides' ranks, equals sharing theirs."""
    ranks = [_ranks(np.asarray(each, float)) for each in (one, other)]
    if len(one) < LEAST or any(each.std() == 0 for each in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    return np.array([(values < each).sum() + (values == each).sum() / 2 for each in values])
