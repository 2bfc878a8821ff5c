"""Logits at K positions as golden arrays hold them: a sample of their columns, their likeliest tokens, and the log of their sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from runtimes.errors import InputError
from runtimes.parity.figures import TIE, Figures

LEAST = 1e-9
"""A share of probability below this is rounding: what is left of 1 behind all the tokens that are stored."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledLogits:
    """Of K positions; a position that was not given is NaN throughout.

    ``columns`` [K, C] of the vocabulary and their ``logits``; ``tokens`` [K, M], the reference's likeliest, the best first, and their
    logits ``at_tokens``; ``logsumexp`` [K] over the whole vocabulary; ``best`` [K], the likeliest token, whether stored or not.
    """

    columns: np.ndarray
    logits: np.ndarray
    tokens: np.ndarray
    at_tokens: np.ndarray
    logsumexp: np.ndarray
    best: np.ndarray

    @classmethod
    def like(cls, reference: SampledLogits) -> SampledLogits:
        """As many positions of the same columns and tokens, none of them given."""
        return replace(
            reference,
            logits=np.full_like(reference.logits, np.nan),
            at_tokens=np.full_like(reference.at_tokens, np.nan),
            logsumexp=np.full_like(reference.logsumexp, np.nan),
            best=np.full_like(reference.best, -1),
        )

    def put(self, position: int, logits: np.ndarray) -> None:
        """All of a position's logits [V]."""
        row = np.asarray(logits, np.float64)
        self.logits[position] = logits[self.columns[position]]
        self.at_tokens[position] = logits[self.tokens[position]]
        self.logsumexp[position] = logsumexp(row)
        self.best[position] = row.argmax()

    @property
    def given(self) -> np.ndarray:
        """[K], whether a position was."""
        return self.best >= 0

    def at(self, positions: Sequence[int]) -> SampledLogits:
        chosen = list(positions)
        return SampledLogits(**{name: value[chosen] for name, value in vars(self).items()})

    @property
    def scale(self) -> float:
        """The largest |logit| that is known."""
        return float(max(np.abs(self.logits).max(), np.abs(self.at_tokens).max()))


def compare_sampled(candidate: SampledLogits, reference: SampledLogits) -> Figures:
    """``figures.compare``'s figures from samples, in float64: the largest error of all that is stored (the sampled columns, the reference's
    likeliest tokens, and the logsumexp, which is never off by more than the worst logit); KL with all other tokens as one.

    Top-1 agreement is exact: the candidate's likeliest token, if it is not stored, is none of the reference's.
    """
    if not len(reference.best) or len(candidate.best) != len(reference.best):
        raise InputError(f"positions to compare are as many and not none; got {len(candidate.best)} and {len(reference.best)}")
    x, y = (
        [np.asarray(each, np.float64) for each in (said.logits, said.at_tokens, said.logsumexp[:, None])] for said in (candidate, reference)
    )
    if not all(np.isfinite(each).all() for each in y):
        raise InputError("the reference logits are not finite; record them again")
    if not all(np.isfinite(each).all() for each in x):
        return Figures(compared=len(reference.best), max_abs=np.inf, max_relative=np.inf, kl=np.inf, top1=0.0)
    scale = reference.scale
    max_abs = max(float(np.abs(a - b).max()) for a, b in zip(x, y, strict=True))
    return Figures(
        compared=len(reference.best),
        max_abs=max_abs,
        max_relative=max_abs / scale if scale else (np.inf if max_abs else 0.0),
        kl=float(np.mean([_divergence(k, x, y, reference) for k in range(len(reference.best))])),
        top1=float((_at_best(candidate.best, reference) >= reference.at_tokens[:, 0] - TIE * scale).mean()),
    )


def _at_best(best: np.ndarray, reference: SampledLogits) -> np.ndarray:
    """The reference's logits [K] of the tokens ``best``; -inf where they are not stored."""
    found = np.full(len(best), -np.inf)
    for stored, logits in ((reference.columns, reference.logits), (reference.tokens, reference.at_tokens)):
        rows, places = np.nonzero(stored == best[:, None])
        found[rows] = logits[rows, places]
    return found


def _divergence(k: int, x: Sequence[np.ndarray], y: Sequence[np.ndarray], reference: SampledLogits) -> float:
    """KL(reference || candidate) at position k, all tokens that are not stored taken as one."""
    sampled = ~np.isin(reference.columns[k], reference.tokens[k])
    log_p, log_q = (np.concatenate([said[1][k], said[0][k][sampled]]) - said[2][k] for said in (y, x))
    p, q = np.exp(log_p), np.exp(log_q)
    rest_p, rest_q = 1 - p.sum(), 1 - q.sum()
    stored = float((p * (log_p - log_q)).sum())
    if rest_p > LEAST:
        stored += rest_p * math.log(rest_p / max(rest_q, LEAST))
    return max(0.0, stored)


def logsumexp(row: np.ndarray) -> float:
    """log of sum exp over a row [V] in float64; NaN where it is not finite."""
    largest = row.max()
    if not np.isfinite(largest):
        return float("nan")
    return float(largest + math.log(np.exp(row - largest).sum()))
