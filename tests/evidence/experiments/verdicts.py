"""What is claimed of ReFT, and whether the rows bear it out: every word is decided by the figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from evidence.experiments.rows import Row
from evidence.experiments.tasks import CHOOSING, HELD_OUT, PROMPTS

HOLDS, DOES_NOT, OPEN = "holds", "does not hold", "not told apart"
POINT = 0.01
ENOUGH = 0.8
"""Of answers in upper case."""
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


def _error(accuracy: float, lines: int) -> float:
    """The standard error of the difference of two accuracies."""
    return math.sqrt(2 * accuracy * (1 - accuracy) / lines)


def _word(difference: float, error: float) -> str:
    """For "as good, within a point"."""
    return HOLDS if difference >= -POINT else OPEN if difference >= -2 * error else DOES_NOT


def _as_good_as_lora(rows: Rows, name: str = "LoReFT r4", rate: str = "at the rate set beforehand") -> Verdict:
    ours, lora = rows.all("sentiment", name), rows.all("sentiment", "LoRA q, v")
    fewer = lora[0].parameters / ours[0].parameters
    points = {kind: rows.mean("sentiment", name, kind) - rows.mean("sentiment", "LoRA q, v", kind) for kind in ("films", "products")}
    told = ", ".join(f"{100 * each:+.1f} points on {kind}" for kind, each in points.items())
    behind = {kind: sum(o.figures[kind] < theirs.figures[kind] for o, theirs in zip(ours, lora, strict=False)) for kind in points}
    # Seeds share the lines: of them no more are had by more seeds.
    error = _error(rows.mean("sentiment", "LoRA q, v", min(points, key=lambda kind: points[kind])), HELD_OUT)
    return Verdict(
        claim=f"accuracy within a point of LoRA's, with at most a twentieth of its parameters (the paper: 15 to 65 times fewer); {rate}",
        source=PAPER,
        here=f"{told}; {fewer:.0f} times fewer; {len(ours)} seeds of LoReFT, {len(lora)} of LoRA, "
        f"behind it with {behind['films']} of them on films and {behind['products']} on products; the "
        f"standard error of such a difference is {100 * error:.0f} points",
        word=DOES_NOT if fewer < FEWER else _word(min(points.values()), error),
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
        here=f"in upper case {100 * upper:.0f} % from 5 examples, {100 * full:.0f} % from 48, of {PROMPTS} answers; "
        f"enough would be {100 * ENOUGH:.0f} %",
        word=HOLDS if upper >= ENOUGH else DOES_NOT,
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
        word=HOLDS + ("" if losses == sorted(losses) else ", but for fluency not from each strength to the next")
        if effects == sorted(effects) and min(losses[1:]) > losses[0]
        else DOES_NOT,
    )


def _rates(rows: Rows) -> Verdict:
    found = {row.setup.lr: row.figures for row in (*rows.of("rate"), *rows.all("sentiment", "LoReFT r4")) if row.setup.method == "loreft"}
    guide = max(found[rate]["choosing"] for rate in (5e-4, 1e-3))
    higher = max(figures["choosing"] for rate, figures in found.items() if rate > 1e-3)
    error = _error(higher, CHOOSING)
    return Verdict(
        claim="rates of 5e-4 to 1e-3 are as good as higher ones",
        source="the guide",
        here=f"best accuracy on {CHOOSING} reviews {100 * guide:.1f} % there, {100 * higher:.1f} % at a higher rate, in 60 steps; "
        f"the standard error of such a difference is {100 * error:.0f} points",
        word=_word(guide - higher, error),
    )


def _forgetting(rows: Rows) -> Verdict:
    lora, ours = rows.all("sentiment", "LoRA q, v"), [rows.all("sentiment", name) for name in ("LoReFT r4", "LoReFT r4, chosen")]
    told = [f"LoReFT {_off_task(each)} (rate {each[0].setup.lr:g})" for each in ours]
    less = [each for each in ours if _clearly_below(each, lora)]
    rates = ", ".join(f"{each[0].setup.lr:g}" for each in less)
    return Verdict(
        claim="an edit of activations leaves more of the model as it was than LoRA does",
        source="often said",
        here=f"loss on answers to other questions, seed by seed: base {_off_task(rows.all('sentiment', 'base'))}, {', '.join(told)}, "
        f"LoRA {_off_task(lora)} nats",
        word=HOLDS if len(less) == len(ours) else f"{HOLDS} at rate {rates}, {OPEN} at the other" if less else OPEN,
    )


def _off_task(seeds: Sequence[Row]) -> str:
    return " ".join(f"{row.figures['off task loss']:.2f}" for row in seeds)


def _clearly_below(ours: Sequence[Row], theirs: Sequence[Row]) -> bool:
    """By twice the standard error of the difference of their means over seeds; of single seeds nothing is clear."""
    a, b = ([row.figures["off task loss"] for row in seeds] for seeds in (ours, theirs))
    return min(len(a), len(b)) > 1 and fmean(b) - fmean(a) > 2 * math.sqrt(variance(a) / len(a) + variance(b) / len(b))


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
