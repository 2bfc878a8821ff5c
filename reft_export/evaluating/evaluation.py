"""The table's figures: shares with their intervals, likelihoods, differences from the first row, and what is left of the steering."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reft_export.evaluating.held_out import HeldOut
from reft_export.evaluating.intervals import Interval, bootstrap, wilson
from reft_export.evaluating.measure import Measured
from reft_export.evaluating.subjects import EAGER, Who
from runtimes.artifacts.bundle import BASE_GOLDEN
from runtimes.parity.retention import Recorded, quality


@dataclass(frozen=True, kw_only=True)
class Share:
    """Of lines that one metric finds right."""

    right: int
    interval: Interval
    difference: Interval | None
    """Of the share, less that of the first row, which has none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    who: Who
    shares: Mapping[str, Share]
    loss: Interval
    """-log p, in nats a token of the data's own answers."""
    loss_difference: Interval | None
    retention: float | None
    """runtimes/parity/retention.py's, against the float32 base and adapter of this name in the table; None where they are not both in
    it, and where the edit gains too little to take a share of."""
    new_tokens: int
    seconds: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss.value)


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """``rows`` stand beside ``measured``, the same models' line by line."""

    held_out: HeldOut
    rows: tuple[Row, ...]
    measured: tuple[Measured, ...]

    @property
    def scored_tokens(self) -> int:
        return sum(len(question.answer) for question in self.held_out.questions)

    @property
    def repeats(self) -> bool:
        """Whether some adapter, or the base, is in the table more than once: in several artifacts."""
        return len({each.who.adapter for each in self.measured}) < len(self.measured)

    @property
    def differing(self) -> list[int]:
        """Lines that one adapter, or the base, answers otherwise in one artifact than in another, those first of which a metric says
        otherwise, too; where nothing repeats, those that any two rows answer otherwise."""
        groups: dict[str | None, list[Measured]] = {}
        for each in self.measured:
            groups.setdefault(each.who.adapter if self.repeats else None, []).append(each)

        def kinds(line: int, said: Callable[[Measured, int], object]) -> bool:
            return any(len({said(each, line) for each in group}) > 1 for group in groups.values())

        found = [line for line in range(len(self.held_out.questions)) if kinds(line, _answer)]
        return sorted(found, key=lambda line: not kinds(line, _verdicts))


def _answer(measured: Measured, line: int) -> object:
    return measured.answers[line : line + 1], measured.chosen[line : line + 1]


def _verdicts(measured: Measured, line: int) -> object:
    return tuple(bool(right[line]) for right in measured.right.values())


def evaluation_of(held_out: HeldOut, measured: Sequence[Measured]) -> Evaluation:
    """Every row beside the first."""
    rows = tuple(_row(each, None if each is measured[0] else measured[0], measured) for each in measured)
    return Evaluation(held_out=held_out, rows=rows, measured=tuple(measured))


def _row(own: Measured, first: Measured | None, table: Sequence[Measured]) -> Row:
    tokens = np.array([len(each) for each in own.likelihoods])
    return Row(
        who=own.who,
        shares={
            name: Share(
                right=int(right.sum()),
                interval=wilson(int(right.sum()), len(right)),
                difference=None if first is None else bootstrap(right.astype(np.float64) - first.right[name]),
            )
            for name, right in own.right.items()
        },
        loss=bootstrap(own.losses, tokens),
        loss_difference=None if first is None else bootstrap(own.losses - first.losses, tokens),
        retention=_retention(own, table),
        new_tokens=own.new_tokens,
        seconds=own.seconds,
    )


def _retention(own: Measured, table: Sequence[Measured]) -> float | None:
    """What counts as float32 is the first of its name: eager PyTorch, where it is in the table."""
    if own.who.adapter is None or own.who.artifact == EAGER:
        return None

    def exact(adapter: str | None) -> np.ndarray | None:
        found = (each for each in table if each.who.exact and each.who.model == own.who.model and each.who.adapter == adapter)
        return next((np.concatenate(each.likelihoods) for each in found), None)

    base, steered = exact(None), exact(own.who.adapter)
    if base is None or steered is None:
        return None
    of = Recorded(exact=steered, float_own=steered, float_base=base)
    return quality(own.who.adapter or BASE_GOLDEN, np.concatenate(own.likelihoods), of).retention
