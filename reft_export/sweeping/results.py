"""Trials as they ended, whatever kept them, and the front of those that nothing beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from reft_export.sweeping.settings import Point

Ended = Literal["complete", "pruned", "failed"]


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One trial. ``quality``: the held-out loss in nats, or the metric, of the step that is kept; of a pruned one, of the last that was
    taken."""

    number: int
    """From 1."""
    point: Point
    ended: Ended
    quality: float | None
    parameters: int
    cost: float
    """Multiply-adds that the edits add to an example (reft_export/sweeping/costs.py)."""
    proposed: bool = False
    """The first pass named it."""
    said: str = ""
    """Why it failed."""

    @property
    def value(self) -> float:
        """The quality of one that has it."""
        assert self.quality is not None, f"trial {self.number} has {self.ended} without a quality"
        return self.quality


def complete(trials: Sequence[TrialResult]) -> list[TrialResult]:
    return [each for each in trials if each.ended == "complete"]


def ranked(trials: Sequence[TrialResult], *, maximized: bool) -> list[TrialResult]:
    """The complete ones, best first; of equals the one of fewer parameters, then of less cost, then the earlier."""
    return sorted(complete(trials), key=lambda each: (_loss(each, maximized), each.parameters, each.cost, each.number))


def front(trials: Sequence[TrialResult], *, maximized: bool) -> list[TrialResult]:
    """The complete trials that no other is at least as good as in quality, parameters and cost, and better in one, or equal and earlier;
    best quality first."""
    candidates = ranked(trials, maximized=maximized)
    values = {each.number: (_loss(each, maximized), each.parameters, each.cost) for each in candidates}

    def beaten(each: TrialResult) -> bool:
        mine = values[each.number]
        return any(
            all(a <= b for a, b in zip(values[other.number], mine, strict=True))
            and (values[other.number] != mine or other.number < each.number)
            for other in candidates
        )

    return [each for each in candidates if not beaten(each)]


def _loss(trial: TrialResult, maximized: bool) -> float:
    return -trial.value if maximized else trial.value
