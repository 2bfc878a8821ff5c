"""The table's figures: shares with their intervals, likelihoods, differences from the first row, and what is left of the steering."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from reft_export.evaluating.intervals import Interval, bootstrap, wilson
from reft_export.evaluating.measure import Measured
from reft_export.evaluating.subjects import EAGER, Who
from reft_export.training.data import DataFile
from runtimes.artifacts.golden_schema import BASE_GOLDEN
from runtimes.parity.retention import Recorded, quality


class Lines(Protocol):
    """What every model of a table was asked: HeldOut of decoders, HeldOutTexts of classifiers."""

    @property
    def files(self) -> tuple[DataFile, ...]: ...

    @property
    def metrics(self) -> tuple[str, ...]: ...

    @property
    def gold(self) -> tuple[int, ...] | None:
        """Of a classifier each line's label, by number; else None."""
        ...

    @property
    def truncated(self) -> int: ...

    def __len__(self) -> int: ...

    def choice(self, number: int) -> str:
        """The text of one of ``Measured.chosen``."""
        ...

    def told(self, line: int) -> dict[str, str]:
        """line (file and number), prompt, and expected, for people."""
        ...

    def record(self) -> dict[str, Any]:
        """What evaluation.json says of them beside files and metrics."""
        ...

    def note(self) -> str: ...


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
    macro_f1: float | None
    """Of a classifier: the mean of the F1 of every label that is some text's or is chosen for one."""
    agreement: float | None
    """Of a classifier: the share of texts whose label is the one that the float32 model of this name in the table chooses; None for that
    model itself, and where there is none."""
    new_tokens: int
    seconds: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss.value)


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """``rows`` stand beside ``measured``, the same models' line by line."""

    held_out: Lines
    rows: tuple[Row, ...]
    measured: tuple[Measured, ...]

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

        found = [line for line in range(len(self.held_out)) if kinds(line, _answer)]
        return sorted(found, key=lambda line: not kinds(line, _verdicts))


def _answer(measured: Measured, line: int) -> object:
    return measured.answers[line : line + 1], measured.chosen[line : line + 1]


def _verdicts(measured: Measured, line: int) -> object:
    return tuple(bool(right[line]) for right in measured.right.values())


def evaluation_of(held_out: Lines, measured: Sequence[Measured]) -> Evaluation:
    """Every row beside the first."""
    rows = tuple(_row(each, None if each is measured[0] else measured[0], measured, held_out.gold) for each in measured)
    return Evaluation(held_out=held_out, rows=rows, measured=tuple(measured))


def _row(own: Measured, first: Measured | None, table: Sequence[Measured], gold: Sequence[int] | None) -> Row:
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
        macro_f1=None if gold is None else macro_f1(gold, own.chosen),
        agreement=None if gold is None else _agreement(own, table),
        new_tokens=own.new_tokens,
        seconds=own.seconds,
    )


def _retention(own: Measured, table: Sequence[Measured]) -> float | None:
    """What counts as float32 is the first of its name: eager PyTorch, where it is in the table."""
    if own.who.adapter is None or own.who.artifact == EAGER:
        return None
    exact = (_exact(own.who.model, None, table), _exact(own.who.model, own.who.adapter, table))
    base, steered = (None if each is None else np.concatenate(each.likelihoods) for each in exact)
    if base is None or steered is None:
        return None
    of = Recorded(exact=steered, float_own=steered, float_base=base)
    return quality(own.who.adapter or BASE_GOLDEN, np.concatenate(own.likelihoods), of).retention


def _exact(model: str, adapter: str | None, table: Sequence[Measured]) -> Measured | None:
    """The first row of that name in float32."""
    return next((each for each in table if each.who.exact and each.who.model == model and each.who.adapter == adapter), None)


def macro_f1(gold: Sequence[int], chosen: Sequence[int]) -> float:
    """mean over labels k in gold or chosen of 2 |gold = k and chosen = k| / (|gold = k| + |chosen = k|)."""
    labels, said = np.asarray(gold), np.asarray(chosen)
    each = [2 * ((labels == k) & (said == k)).sum() / ((labels == k).sum() + (said == k).sum()) for k in {*gold, *chosen}]
    return float(np.mean(each))


def _agreement(own: Measured, table: Sequence[Measured]) -> float | None:
    of = _exact(own.who.model, own.who.adapter, table)
    return None if of is None or of is own else float(np.mean(np.asarray(own.chosen) == np.asarray(of.chosen)))
