"""What quantization left of an adapter, and of the base: the likelihood of completions, on the adapter's own probes.

    retention = (NLL(base, float32) - NLL(steered, here)) / (NLL(base, float32) - NLL(steered, float32))

NLL is the mean over the completions' tokens of -log p(token | all before it), in nats. It is the float32 base that both are held against: a
base that quantization damaged must not raise the share. 1 is all of it, 0 what the base says unsteered; below 0 quantization costs more
than the edit gives. Where the float32 edit gains LEAST_GAIN or less (an ablation, a steering vector), a share of it says nothing, and the
cosine of its delta is held to ``least_cosine`` instead.

A mean over all tokens does not see that one token of every answer fell, if it is the one that decides the answer's form. So tokens are
counted, too, that float32 gives more than even odds (they are what greedy decoding says), and this device does not; and those where it is
the other way round. Quantization moves as many up as down, unless it took something.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from runtimes.artifacts.golden_schema import BASE_GOLDEN
from runtimes.artifacts.manifest import WEIGHT_ONLY_SCHEMES, Quantization

LEAST_GAIN = 0.05
"""Nats a token."""
MOST_ROUNDING = math.log(1.01)
"""What rounding inside MatMulNBits (accuracy level 4) may cost against level 1, in nats a token: 1 % of the perplexity."""
EVEN = math.log(0.5)
LEAST_CHANCE = 0.01
"""More tokens fell than rose: how seldom chance may show as much."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """NLL of the base or of one adapter, in nats a token over ``tokens`` tokens of completions."""

    name: str
    tokens: int
    float_base: float
    """The float32 base's."""
    float_own: float
    """Of this name in float32."""
    exact: float
    """Of this name with the weights that ship and float activations: the eager model's."""
    here: float
    """Of this name as it ships, on this device."""
    here_error: float
    """Standard error of ``here - exact``, as the tokens are a sample."""
    fell: int = 0
    """Tokens with more than even odds in float32, and not here."""
    rose: int = 0
    """Tokens with more than even odds here, and not in float32."""

    @property
    def gain(self) -> float:
        """What the edit is worth in float32."""
        return self.float_base - self.float_own

    @property
    def retention(self) -> float | None:
        """The module's formula; None for the base, and where the edit gains too little to take a share of."""
        return (self.float_base - self.here) / self.gain if self.gain > LEAST_GAIN else None

    @property
    def loss(self) -> float:
        """What quantization cost."""
        return self.here - self.float_own

    @property
    def perplexity_change(self) -> float:
        """Of what ships over float32, less one."""
        return math.expm1(self.loss)

    @property
    def rounded_away(self) -> bool:
        """Whether rounding inside the products costs more than MOST_ROUNDING, by more than chance would show (two standard errors)."""
        return self.here - self.exact > MOST_ROUNDING + 2 * self.here_error

    @property
    def lopsided(self) -> bool:
        """Whether more tokens fell than rose, by more than chance would show (sign test, one-sided, LEAST_CHANCE)."""
        moved = self.fell + self.rose
        return sum(math.comb(moved, n) for n in range(self.rose + 1)) < LEAST_CHANCE * 2**moved

    @property
    def turned(self) -> str:
        """What fell and rose, in words."""
        return f"{self.fell} of {self.tokens} tokens lost their even odds, and {self.rose} gained them"

    def __str__(self) -> str:
        if self.name == BASE_GOLDEN:
            return f"base: perplexity {self.perplexity_change:+.1%} of float32's, over {self.tokens} tokens"
        kept = "not measurable" if self.retention is None else f"{self.retention:.2f}"
        figures = f"NLL {self.float_base:.2f} to {self.float_own:.2f} in float32, {self.here:.2f} here"
        advice = "count how often your task succeeds; `reft-export quantize --refit` trains the adapter on these weights"
        lost = f"; {self.turned}: {advice}" if self.lopsided else ""
        return f"{self.name}: retention {kept} ({figures}, over {self.tokens} tokens){lost}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorded:
    """log p [N] of the tokens of all completions, in nats, as eager PyTorch gave them: with the weights that ship, and in float32."""

    exact: np.ndarray
    float_own: np.ndarray
    float_base: np.ndarray


def recorded(name: str, arrays: Mapping[str, np.ndarray]) -> Recorded | None:
    """Those of golden arrays; None where there are none."""
    if "log_probabilities" not in arrays:
        return None
    exact = arrays["log_probabilities"]
    own = arrays.get("fp32_log_probabilities", exact)
    base = own if name == BASE_GOLDEN else arrays.get("fp32_base_log_probabilities", arrays["base_log_probabilities"])
    return Recorded(exact=exact, float_own=own, float_base=base)


def quality(name: str, here: np.ndarray, of: Recorded) -> Quality:
    """``here``: log p [N] of the same tokens on this device. Where one is not finite the NLL is infinite."""
    lost = np.asarray(of.exact, np.float64) - here
    error = float(lost.std() / math.sqrt(len(lost))) if np.isfinite(lost).all() else 0.0
    before, after = np.asarray(of.float_own) > EVEN, np.asarray(here) > EVEN
    return Quality(
        name=name,
        tokens=len(here),
        float_base=-float(np.mean(of.float_base)),
        float_own=-float(np.mean(of.float_own)),
        exact=-float(np.mean(of.exact)),
        here=-float(np.mean(here)) if np.isfinite(here).all() else math.inf,
        here_error=error,
        fell=int((before & ~after).sum()),
        rose=int((after & ~before).sum()),
    )


def least_cosine(q: Quantization) -> float:
    """Lowest cosine of (steered - base) against float32's, where there is no retention to judge by."""
    return 0.99 if q.bits == 8 and q.scheme in WEIGHT_ONLY_SCHEMES else 0.90


def shortfall(of: Quality | None, cosine: float | None, q: Quantization, least: float) -> str:
    """Why an adapter's steering is not enough: its retention below ``least``, or without one its delta's cosine; "" where it is."""
    if of is not None and of.retention is not None:
        return f"retention {of.retention:.2f}, expected {least:g}" if of.retention < least else ""
    if cosine is None or cosine >= least_cosine(q):
        return ""
    why = "without probes" if of is None else f"its edit is worth {of.gain:.3f} nats a token, too little to measure its retention"
    return f"delta cosine {cosine:.3f}, expected {least_cosine(q):g} ({why})"
