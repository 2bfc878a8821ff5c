"""Does the device say what the eager model said? Figures, budgets and the report; runtimes/golden.py takes the figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from runtimes.artifacts.manifest import ACTIVATION_SCHEMES, WEIGHT_ONLY_SCHEMES, Manifest
from runtimes.errors import BundleError, InputError, ParityError
from runtimes.files.records import RecordError, from_json, parse_json, to_json
from runtimes.parity.retention import Quality
from runtimes.precision import FLOAT_TYPES

TIE = 1e-6
"""Two reference logits closer than this, relative to the largest |logit|, are no preference that float32 could keep."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """``max_abs``; ``max_relative`` = max_abs / max |reference|; ``kl`` mean KL(reference || candidate) in nats; ``top1`` agreement.

    ``compared``: rows of logits, or of an edit's values, that the figures are taken over. ``kl`` and ``top1`` are None where those were
    no logits, ``greedy_equal`` where no tokens were generated. A candidate that is not finite has infinite errors, and top1 0.
    """

    compared: int
    max_abs: float
    max_relative: float
    kl: float | None
    top1: float | None
    greedy_equal: bool | None = None


NOTHING = Figures(compared=0, max_abs=np.inf, max_relative=np.inf, kl=None, top1=None)


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What became of the steering: (steered - base) on the device against the reference's, over all compared logits.

    ``moved``: whether it changed any of them, on either side; where it did not, there is nothing to compare.
    """

    cosine: float
    norm_ratio: float
    moved: bool = True


REPORTED = -1.0
"""Of a delta cosine: every one passes. What quantization left of the steering is judged by runtimes/parity/retention.py."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """``logits``: highest max_relative; ``top1``: lowest agreement; ``delta``: lowest delta cosine, REPORTED where no rung is held to it.
    All are inclusive."""

    name: str
    logits: float
    top1: float
    delta: float

    @property
    def stated(self) -> dict[str, float]:
        """As a manifest states it."""
        return {"logits": self.logits, "top1": self.top1, "delta": self.delta}


BUDGETS = {
    b.name: b
    for b in (
        Budget(name="fp32", logits=2e-5, top1=1.0, delta=0.99999),
        Budget(name="fp16", logits=1e-2, top1=0.99, delta=0.999),
        Budget(name="bf16", logits=5e-2, top1=0.97, delta=0.99),
        Budget(name="weight-only int8", logits=1e-4, top1=1.0, delta=REPORTED),
        Budget(name="weight-only int4", logits=1e-4, top1=1.0, delta=REPORTED),
        Budget(name="activation-quantized", logits=2e-2, top1=0.98, delta=REPORTED),
        Budget(name="accuracy level 4", logits=0.25, top1=0.5, delta=REPORTED),
    )
}
"""The design's table. It is changed there first, with a reason, and never to fit a result.

Level 4 of MatMulNBits rounds inside: what a graph is shows at level 1, of the same weights, and what level 4 costs in perplexity
(runtimes/parity/retention.py). Its row refuses what is another model: zeros are off by 100 %, another text agrees on few tokens.
"""

MOST_NOISE = (0.1, 0.8)
"""The reference's recorded noise widens a row by no more than this: (relative error, top-1 agreement).

Seen were 5 % of the largest logit and 2 % of the tokens. Logits of zeros are off by 100 %, those of another text by more.
"""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One comparison: ``name`` against ``against``. ``delta`` where steering was compared too."""

    name: str
    against: str
    figures: Figures
    delta: Delta | None
    budget: Budget
    passed: bool
    note: str = ""

    @property
    def lost_steering(self) -> bool:
        """Whether the delta alone misses its budget: the logits are right, and little of the edit is left in them."""
        return self.delta is not None and self.delta.cosine < self.budget.delta and _answers(self.figures, self.budget)


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    rungs: tuple[Rung, ...]
    notes: tuple[str, ...] = ()
    """What was not compared, and why."""
    quality: tuple[Quality, ...] = ()
    """What quantization left of base and adapters; no rung is held to it."""

    HEADER = ("rung", "against", "max abs", "relative", "KL", "top-1", "greedy", "delta cos", "delta norm", "budget", "result", "note")

    @property
    def passed(self) -> bool:
        """A report without a single comparison proves nothing and does not pass."""
        return bool(self.rungs) and all(rung.passed for rung in self.rungs)

    def require(self) -> None:
        """Raises ParityError, which carries the report, when a budget was missed."""
        missed = [rung for rung in self.rungs if not rung.passed]
        if not self.passed:
            first = f"{missed[0].name} against {missed[0].against}: {_shortfall(missed[0])}" if missed else "nothing was compared"
            raise ParityError(f"{len(missed)} of {len(self.rungs)} comparisons miss their budget; {first}", self)

    def rows(self) -> list[tuple[str, ...]]:
        """One row of texts per rung, under ``HEADER``."""
        return [_table_row(rung) for rung in self.rungs]

    def to_json(self) -> str:
        more = {name: _encode(to_json(value)) for name in ("notes", "quality") if (value := getattr(self, name))}
        return json.dumps({"passed": self.passed, "rungs": _encode(to_json(self.rungs)), **more}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> ParityReport:
        """Raises InputError for a text that ``to_json`` did not write."""
        try:
            content = parse_json(text)
            return cls(
                rungs=from_json(tuple[Rung, ...], _decode(content["rungs"]), "rungs"),
                notes=from_json(tuple[str, ...], content.get("notes", []), "notes"),
                quality=from_json(tuple[Quality, ...], _decode(content.get("quality", [])), "quality"),
            )
        except (ValueError, KeyError, TypeError, RecordError) as e:
            raise InputError(f"not a parity report: {e}") from None


def compare(candidate: np.ndarray, reference: np.ndarray) -> Figures:
    """Figures of candidate logits [K, V] against reference logits [K, V], in float64.

    A row agrees on top-1 when the candidate's likeliest token is one of the reference's: its reference logit is the best one, or
    within TIE of it. The candidate gets no such grace of its own: only the reference's indifference excuses another choice.
    """
    if candidate.shape != reference.shape or reference.ndim != 2 or not reference.size:
        raise InputError(f"logits to compare are [K, V] alike and not empty; got {list(candidate.shape)} and {list(reference.shape)}")
    x, y = np.asarray(candidate, np.float64), np.asarray(reference, np.float64)
    if not np.isfinite(y).all():
        raise InputError("the reference logits are not finite; record them again")
    if not np.isfinite(x).all():
        return Figures(compared=len(y), max_abs=np.inf, max_relative=np.inf, kl=np.inf, top1=0.0)
    scale = float(np.abs(y).max())
    max_abs = float(np.abs(x - y).max())
    log_p, log_q = _log_softmax(y), _log_softmax(x)
    chosen = y[np.arange(len(y)), x.argmax(1)]
    return Figures(
        compared=len(y),
        max_abs=max_abs,
        max_relative=max_abs / scale if scale else (np.inf if max_abs else 0.0),
        kl=max(0.0, float((np.exp(log_p) * (log_p - log_q)).sum(1).mean())),
        top1=float((chosen >= y.max(1) - TIE * scale).mean()),
    )


def compare_deltas(steered: np.ndarray, base: np.ndarray, reference_steered: np.ndarray, reference_base: np.ndarray) -> Delta:
    """cosine and norm ratio of d = steered - base against the reference's, over all [K, V] values as one vector, in float64.

    Where neither moves anything, that is what both say (1, 1, not moved); where only one does, the cosine is 0.
    """
    d = (np.asarray(steered, np.float64) - base).ravel()
    r = (np.asarray(reference_steered, np.float64) - reference_base).ravel()
    if d.shape != r.shape or not d.size or not np.isfinite(r).all():
        raise InputError(f"steering to compare is finite, alike and not empty; got {d.size} and {r.size} values; record it again")
    if not np.isfinite(d).all():
        return Delta(cosine=0.0, norm_ratio=np.inf)
    norm_d, norm_r = float(np.linalg.norm(d)), float(np.linalg.norm(r))
    if not norm_d and not norm_r:
        return Delta(cosine=1.0, norm_ratio=1.0, moved=False)
    if not norm_d or not norm_r:
        return Delta(cosine=0.0, norm_ratio=np.inf if norm_d else 0.0)
    return Delta(cosine=float(d @ r / (norm_d * norm_r)), norm_ratio=norm_d / norm_r)


def budget_for(manifest: Manifest) -> Budget:
    """The row of the table that a bundle is held to on a device.

    Accuracy level 4 quantizes activations inside MatMulNBits and has a row of its own. Where a half-precision graph holds
    quantized weights, both rows apply and the wider bound of each figure counts. The manifest's own ``parity_budget`` may be tighter.

    Raises BundleError for a manifest that no row is for, or whose own budget is no budget, or wider than the row.
    """
    return _tightened(_row_for(manifest), manifest.parity_budget)


def _row_for(manifest: Manifest) -> Budget:
    q = manifest.quantization
    if manifest.precision not in FLOAT_TYPES:
        known = ", ".join(FLOAT_TYPES)
        raise BundleError(f"manifest.json: precision {manifest.precision!r} is unknown; known: {known}; export the bundle again")
    if q is None:
        return BUDGETS[manifest.precision]
    if q.scheme not in (*WEIGHT_ONLY_SCHEMES, *ACTIVATION_SCHEMES) or q.bits not in (4, 8):
        raise BundleError(f"manifest.json: quantization {q.scheme!r} of {q.bits} bits is unknown; quantize the bundle again")
    if q.rounds_inside:
        row = BUDGETS["accuracy level 4"]
    else:
        row = BUDGETS["activation-quantized" if q.rounds else f"weight-only int{q.bits}"]
    return row if manifest.precision == "fp32" else _wider(row, BUDGETS[manifest.precision])


def _tightened(row: Budget, stated: Mapping[str, float]) -> Budget:
    for name, value in stated.items():
        if name not in ("logits", "top1", "delta"):
            raise BundleError(f"manifest.json: parity_budget has {name!r}; known: logits, top1, delta; export the bundle again")
        bound = getattr(row, name)
        lowest, highest = (0, bound) if name == "logits" else (bound, 1)
        if not lowest <= value <= highest:
            raise BundleError(
                f"manifest.json: parity_budget.{name} is {value:g}, expected {lowest:g} to {highest:g}: a manifest may only tighten the "
                f"budget of {row.name}; export the bundle again"
            )
    return replace(row, **stated)


def judge(name: str, against: str, figures: Figures, budget: Budget, *, delta: Delta | None = None, note: str = "") -> Rung:
    """A rung and whether it passed. Greedy tokens are held equal only where the budget leaves top-1 no freedom.

    What compared nothing, logits or steering, does not pass, and its note says so.
    """
    nothing = "nothing was compared" if not figures.compared else "its steering changes no logit" if delta and not delta.moved else ""
    passed = not nothing and _answers(figures, budget) and (delta is None or delta.cosine >= budget.delta)
    note = "; ".join(filter(None, (nothing, note)))
    return Rung(name=name, against=against, figures=figures, delta=delta, budget=budget, passed=passed, note=note)


def _answers(figures: Figures, budget: Budget) -> bool:
    """Every figure but the delta's."""
    return (
        figures.max_relative <= budget.logits
        and (figures.top1 is None or figures.top1 >= budget.top1)
        and (figures.greedy_equal is not False or budget.top1 < 1)
    )


def _wider(a: Budget, b: Budget) -> Budget:
    return Budget(name=f"{a.name}, {b.name}", logits=max(a.logits, b.logits), top1=min(a.top1, b.top1), delta=min(a.delta, b.delta))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def _shortfall(rung: Rung) -> str:
    f, b = rung.figures, rung.budget
    if not f.compared:
        return rung.note
    if f.max_relative > b.logits:
        why = f": {rung.note}" if rung.note and f.max_relative == np.inf else ""
        return f"relative logit error {f.max_relative:.2g}, budget {b.logits:g} ({b.name}){why}"
    if f.top1 is not None and f.top1 < b.top1:
        return f"top-1 agreement {f.top1:.4f}, budget {b.top1:g} ({b.name})"
    if rung.delta is not None and rung.delta.cosine < b.delta:
        return f"delta cosine {rung.delta.cosine:.5f}, budget {b.delta:g} ({b.name})"
    return rung.note


def _table_row(rung: Rung) -> tuple[str, ...]:
    f, d = rung.figures, rung.delta
    return (
        rung.name,
        rung.against,
        f"{f.max_abs:.1e}",
        f"{f.max_relative:.1e}",
        "" if f.kl is None else f"{f.kl:.1e}",
        "" if f.top1 is None else f"{f.top1:.4f}",
        "" if f.greedy_equal is None else "equal" if f.greedy_equal else "differ",
        "" if d is None else f"{d.cosine:.6f}",
        "" if d is None else f"{d.norm_ratio:.4f}",
        rung.budget.name,
        "pass" if rung.passed else "FAIL",
        rung.note,
    )


def _encode(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {k: _encode(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_encode(v) for v in value]
    return "inf" if value == np.inf else value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _decode(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_decode(v) for v in value]
    return np.inf if value == "inf" else value
