"""What a sweep gives back, beside what lies in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reft_export.sweeping.first_pass import FirstPass
from reft_export.sweeping.judgement import Judgement
from reft_export.sweeping.results import TrialResult
from reft_export.sweeping.settings import Space
from reft_export.training.objective import Sample


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepResult:
    """``trials`` that have ended, by their numbers; ``front``: those that nothing beats, best quality first."""

    trials: tuple[TrialResult, ...]
    front: tuple[TrialResult, ...]
    best: TrialResult | None
    """Of the best quality; None where none was complete yet."""
    first_pass: FirstPass
    space: Space
    judgement: Judgement
    left: int
    """Trials that other workers are still training."""
    samples_before: tuple[Sample, ...] = ()
    samples_after: tuple[Sample, ...] = ()
    """What the base answers to held-out prompts, and with the best adapter; of a worker that ends a sweep."""
    importances: Mapping[str, float]
    """Of the choices, for the quality, summing to 1; empty of few trials."""
