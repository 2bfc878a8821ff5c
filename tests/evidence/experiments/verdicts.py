"""What is claimed of ReFT, and whether the rows bear it out: every word is decided by the figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from evidence.experiments.rows import Row
from evidence.experiments.tasks import CHOOSING

HOLDS, DOES_NOT = "holds", "does not hold"
POINT = 0.01
FEWER = 20
"""Times."""
PAPER, PREFT, AXBENCH = (
    "[paper](https://arxiv.org/abs/2404.03592)",
    "[PreFT](https://arxiv.org/abs/2605.14217)",
    "[AxBench](https://arxiv.org/abs/2501.17148)",
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    claim: str
    source: str
    here: str
    word: str


Judge = Callable[["Rows"], Verdict]


class Rows:
    """Raises KeyError where a claim's row is not there yet."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = list(rows)

    def all(self, section: str, name: str) -> list[Row]:
        found = [row for row in self._rows if row.setup.section == section and row.setup.name == name]
        if not found:
            raise KeyError(f"{section}/{name}")
        return found

    def mean(self, section: str, name: str, figure: str) -> float:
        return fmean(row.figures[figure] for row in self.all(section, name))

    def of(self, section: str) -> list[Row]:
        found = [row for row in self._rows if row.setup.section == section]
        if not found:
            raise KeyError(section)
        return found


def _as_good_as_lora(rows: Rows, name: str = "LoReFT r4", rate: str = "at the rate set beforehand") -> Verdict:
    ours, lora = rows.all("sentiment", name), rows.all("sentiment", "LoRA q, v")
    fewer = lora[0].parameters / ours[0].parameters
    points = {kind: rows.mean("sentiment", name, kind) - rows.mean("sentiment", "LoRA q, v", kind) for kind in ("films", "products")}
    told = ", ".join(f"{100 * each:+.1f} points on {kind}" for kind, each in points.items())
    return Verdict(
        claim=f"accuracy within a point of LoRA's, with at most a twentieth of its parameters (the paper: 15 to 65 times fewer); {rate}",
        source=PAPER,
        here=f"{told}; {fewer:.0f} times fewer; {len(ours)} seeds of LoReFT, {len(lora)} of LoRA",
        word=HOLDS if fewer >= FEWER and min(points.values()) >= -POINT else DOES_NOT,
    )


def _as_good_at_the_chosen_rate(rows: Rows) -> Verdict:
    return _as_good_as_lora(rows, "LoReFT r4, chosen", "at the rate chosen on other lines")


def _terms(rows: Rows) -> Verdict:
    mean = {name: rows.mean("terms", name, "films") for name in ("direft", "noreft", "consreft", "lobireft", "red")}
    full = rows.mean("sentiment", "LoReFT r4", "films")
    told = ", ".join(f"{name} {100 * (each - full):+.1f}" for name, each in mean.items())
    return Verdict(
        claim="LoReFT's terms each help; DiReFT loses a little",
        source=PAPER,
        here=f"points against LoReFT on films: {told}",
        word=HOLDS if max(mean.values()) < full else DOES_NOT,
    )


def _prompt_only(rows: Rows) -> Verdict:
    prompt, everywhere = (rows.mean("style", f"LoReFT r4, {positions}", "held loss") for positions in ("prompt", "all"))
    said = [rows.mean("style", f"LoReFT r4, {positions}", "upper") for positions in ("prompt", "all")]
    return Verdict(
        claim="edits of the prompt alone lose somewhat more than edits at all positions, and do the task",
        source=PREFT,
        here=f"held-out loss {prompt:.3f} against {everywhere:.3f}; in upper case {100 * said[0]:.0f} % against {100 * said[1]:.0f} %",
        word=HOLDS if prompt > everywhere and said[0] > said[1] - 0.1 else DOES_NOT,
    )


def _memory(rows: Rows) -> Verdict:
    found = {int(row.figures["tokens"]): int(row.figures["recalled"]) for row in rows.of("memory")}
    whole = [length for length, right in found.items() if right == length]
    return Verdict(
        claim="one edit of rank 1 at one token can hold a text",
        source=PAPER,
        here="recalled " + ", ".join(f"{right} of {length}" for length, right in sorted(found.items())) + " tokens",
        word=HOLDS + (f", up to {max(whole)} tokens" if len(whole) < len(found) else "") if whole else DOES_NOT,
    )


def _few(rows: Rows) -> Verdict:
    upper = rows.mean("few", "LoReFT r4, f5+l5, 5 examples", "upper")
    full = rows.mean("style", "LoReFT r4, f5+l5", "upper")
    return Verdict(
        claim="a handful of examples is enough for a style",
        source="pyreft's README, ten examples",
        here=f"in upper case {100 * upper:.0f} % from 5 examples, {100 * full:.0f} % from 48",
        word=HOLDS if upper >= 0.8 else DOES_NOT,
    )


def _strength(rows: Rows) -> Verdict:
    found = sorted(rows.of("strength"), key=lambda row: row.setup.strength)
    effects, losses = ([row.figures[name] for row in found] for name in ("upper", "base loss"))
    told = ", ".join(f"{row.setup.strength:g}: {100 * row.figures['upper']:.0f} % and {row.figures['base loss']:.1f}" for row in found)
    repeated = f"; at the highest {100 * found[-1].figures['distinct words']:.0f} % of an answer's words are different ones"
    return Verdict(
        claim="more strength is more effect and less fluency",
        source=AXBENCH,
        here=f"in upper case, and the base's loss on what is said, by strength: {told}{repeated}",
        word=HOLDS if effects == sorted(effects) and min(losses[1:]) > losses[0] else DOES_NOT,
    )


def _rates(rows: Rows) -> Verdict:
    found = {row.setup.lr: row.figures for row in (*rows.of("rate"), *rows.all("sentiment", "LoReFT r4")) if row.setup.method == "loreft"}
    guide = max(found[rate]["choosing"] for rate in (5e-4, 1e-3))
    higher = max(figures["choosing"] for rate, figures in found.items() if rate > 1e-3)
    error = math.sqrt(2 * higher * (1 - higher) / CHOOSING)
    return Verdict(
        claim="rates of 5e-4 to 1e-3 are as good as higher ones",
        source="the guide",
        here=f"best accuracy on {CHOOSING} reviews {100 * guide:.1f} % there, {100 * higher:.1f} % at a higher rate, in 60 steps; "
        f"the standard error of such a difference is {100 * error:.0f} points",
        word=HOLDS if guide >= higher - POINT else "not told apart" if guide >= higher - 2 * error else DOES_NOT,
    )


def _forgetting(rows: Rows) -> Verdict:
    base, lora = (rows.mean("sentiment", name, "off task loss") for name in ("base", "LoRA q, v"))
    ours = {name: rows.mean("sentiment", name, "off task loss") for name in ("LoReFT r4", "LoReFT r4, chosen")}
    rates = {name: rows.all("sentiment", name)[0].setup.lr for name in ours}
    told = ", ".join(f"LoReFT {each:.2f} (rate {rates[name]:g})" for name, each in ours.items())
    return Verdict(
        claim="an edit of activations leaves more of the model as it was than LoRA does",
        source="often said",
        here=f"loss on answers to other questions: base {base:.2f}, {told}, LoRA {lora:.2f} nats",
        word=HOLDS + (", barely at the higher rate" if max(ours.values()) > (base + 3 * lora) / 4 else "")
        if max(ours.values()) <= lora
        else DOES_NOT,
    )


JUDGES: tuple[Judge, ...] = (
    _as_good_as_lora,
    _as_good_at_the_chosen_rate,
    _terms,
    _prompt_only,
    _memory,
    _few,
    _strength,
    _rates,
    _forgetting,
)


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Of the claims whose rows are there."""
    found, all_rows = [], Rows(rows)
    for judge in JUDGES:
        try:
            found.append(judge(all_rows))
        except KeyError:
            continue
    return found
