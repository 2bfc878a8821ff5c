"""What a sweep searches, and the grammar of its candidates."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, TypeVar

from reft_export.training.settings import LOSS, TrainSettings, parse_layers
from runtimes.edits.methods import METHODS
from runtimes.errors import BackendUnavailable, InputError

T = TypeVar("T")

AUTO, EACH = "auto", "each"
"""Of layers: candidates that the first pass proposes; every layer alone."""
RANGE = ".."
"""Between the ends of a range of learning rates."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one trial trains with, of what is searched. ``rank`` is 0 where the method has none to choose."""

    method: str
    layers: str
    rank: int
    positions: str
    lr: float

    def applied(self, training: TrainSettings) -> TrainSettings:
        """``training`` with this point's choices, and without samples; raises InputError for values that it refuses."""
        rank = {} if METHODS[self.method].full_rank else {"rank": self.rank}
        mine = {"method": self.method, "layers": self.layers, "positions": self.positions, "lr": self.lr, **rank}
        return replace(training, samples=0, **mine)

    def __str__(self) -> str:
        rank = f"rank {self.rank}, " if self.rank else ""
        return f"{self.method}, {rank}layers {self.layers}, positions {self.positions}, lr {self.lr:.2g}"


@dataclass(frozen=True, kw_only=True)
class Space:
    """The candidates of each choice. ``rates``: the values, or where ``log`` the two ends of a range that is sampled on a log scale."""

    methods: tuple[str, ...]
    layers: tuple[str, ...]
    """As training's ``layers`` each; (AUTO,) and (EACH,) until the base is known (``of_depth``)."""
    ranks: tuple[int, ...]
    positions: tuple[str, ...]
    rates: tuple[float, ...]
    log: bool

    def of_depth(self, layers: int) -> Space:
        """With EACH written out; raises InputError for layers that a base of so many does not have."""
        if self.layers == (EACH,):
            return replace(self, layers=tuple(map(str, range(layers))))
        for each in self.layers:
            if each != AUTO:
                parse_layers(each, layers)
        return self


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """Raises InputError for candidates that cannot be understood, and for a training without held-out examples' settings."""

    methods: str = "loreft"
    """Separated by commas, as everything here."""
    layers: str = AUTO
    """Candidates as training writes layers, but with ``;`` inside one: ``4,10,4;10;18,8-16,all``. Or ``each``: every layer alone; or
    ``auto``: what the first pass proposes, beside layers spread evenly."""
    ranks: str = "1,2,4,8"
    positions: str = "f7+l7,prompt,l1"
    learning_rates: str = "1e-4..4e-3"
    """Values, or a range of which rates are drawn on a log scale."""
    trials: int = 20
    """So many in all, those of earlier runs of the sweep among them."""
    training: TrainSettings = field(default_factory=lambda: TrainSettings(eval_fraction=0.2))
    """What all trials have in common; what is searched stands above it."""

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise InputError(f"trials is {self.trials}; it must be at least 1")
        space = self.space
        for method in space.methods:
            for rank in space.ranks:
                Point(method=method, layers="all", rank=rank, positions=space.positions[0], lr=space.rates[0]).applied(self.training)
        for positions in space.positions:
            if replace(self.training, positions=positions).marks:
                raise InputError("a sweep compares positions that every prompt has, and marked is not one; train it with reft-export train")

    @property
    def space(self) -> Space:
        rates, log = _rates(self.learning_rates)
        return Space(
            methods=_listed("methods", self.methods, _method),
            layers=_listed("layers", self.layers, _layers),
            ranks=_listed("ranks", self.ranks, _rank),
            positions=_listed("positions", self.positions, str),
            rates=rates,
            log=log,
        )

    @property
    def maximized(self) -> bool:
        """A metric is a share of what is right; the held-out loss is in nats."""
        return self.training.metric != LOSS

    def record(self) -> Mapping[str, Any]:
        """What decides what the trials are, as the study keeps it; the number of trials may grow."""
        searched = ("method", "rank", "layers", "positions", "lr")
        training = {name: value for name, value in self.training.record().items() if name not in searched}
        asked = {name: getattr(self, name) for name in ("methods", "layers", "ranks", "positions", "learning_rates")}
        return {**{name: asked[name] for name in asked}, "training": training}


def check_optuna() -> None:
    """Raises BackendUnavailable where it is not installed: trials need it, the first pass does not."""
    if find_spec("optuna") is None:
        raise BackendUnavailable("trials need optuna; pip install 'reft-export[sweep]'")


def _listed(name: str, text: str, read: Callable[[str], T]) -> tuple[T, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise InputError(f"{name} {text!r}: a candidate is empty; separate them by one comma each")
    found = tuple(read(part) for part in parts)
    if len(set(found)) != len(found):
        raise InputError(f"{name} {text!r}: a candidate is given twice")
    if len(found) > 1 and {AUTO, EACH} & set(map(str, found)):
        raise InputError(f"{name} {text!r}: {AUTO} and {EACH} stand alone")
    return found


def _method(text: str) -> str:
    if text not in METHODS:
        raise InputError(f"method {text!r} is unknown; known: {', '.join(METHODS)}")
    return text


def _layers(text: str) -> str:
    if text not in (AUTO, EACH, "all") and not re.fullmatch(r"\d{1,9}(-\d{1,9})?(;\d{1,9}(-\d{1,9})?)*", text):
        raise InputError(
            f"layers {text!r} are not understood; candidates are separated by commas, the layers of one by ;: 4,10,4;10;18,all"
        )
    return text


def _rank(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise InputError(f"rank {text!r} is not understood; expected whole numbers from 1 on: 1,2,4,8")
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"learning rate {text!r} is not understood; expected numbers above 0 (1e-3,2e-3), or a range (1e-4..4e-3)")
    return value


def _rates(text: str) -> tuple[tuple[float, ...], bool]:
    """(values or both ends, whether it is a range)."""
    if RANGE not in text:
        return _listed("learning_rates", text, _rate), False
    low, high = (_rate(part.strip()) for part in text.split(RANGE, 1))
    if not low < high:
        raise InputError(f"learning_rates {text!r}: the range runs backwards, or is none; the lower end comes first")
    return (low, high), True
