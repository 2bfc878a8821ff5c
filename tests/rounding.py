"""How far two right float32 results may be apart, on any processor: bounds derived from epsilon, width and depth.

Processors differ in the order in which they add. A sum of n float32 products is off by u sqrt(n) of the magnitudes that it adds, u = 2^-24,
as rounding errors of either sign go a random walk (Higham and Mary, 2019, "A new approach to probabilistic rounding error analysis"), and
the errors of products in a chain walk in the same way. ``DEVIATIONS`` standard deviations of that are allowed; the bounds of single edits
and of whole decoders that were measured here, on AVX-512, AVX2 and SSE alike, stay within one.

All are relative to the largest value compared, and hold for one side against the exact result: two float32 results may be twice as far
from each other.
"""

from __future__ import annotations

import math

import numpy as np

UNIT = 2.0**-24
"""Half of float32's epsilon: the relative error of one rounding."""
DEVIATIONS = 2

PRODUCTS = 7
"""Matrix products that one layer's stream goes through: q k, scores, values, o, and gate, up and down; a norm's sum is shorter than any."""


def sums(terms: int, chain: int = 1) -> float:
    """DEVIATIONS u sqrt(terms chain): a chain of products of ``terms`` terms each."""
    return DEVIATIONS * UNIT * math.sqrt(max(terms, 1) * max(chain, 1))


def edit(width: int, rank: int, *, in_sequence: int = 1) -> float:
    """y = h + U^T (A h + b), or several in sequence: sums over D and over r."""
    return sums(max(width, rank), 2 * in_sequence)


def logits(width: int, layers: int) -> float:
    """A transformer's logits; ``width`` is the longest sum, an MLP's as a rule."""
    return sums(width, PRODUCTS * layers + 1)


def logits_of(config: object) -> float:
    """``logits`` for a transformers config, or a model that has one."""
    config = getattr(config, "config", config)
    width = max(value for name in ("hidden_size", "intermediate_size", "ffn_dim", "n_inner") if (value := getattr(config, name, None)))
    return logits(width, config.num_hidden_layers)


def distance(got: np.ndarray, want: np.ndarray) -> float:
    """max |got - want| / max |want|; infinite where either is not finite."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape or not (np.isfinite(got).all() and np.isfinite(want).all()):
        return math.inf
    return float(np.abs(got - want).max(initial=0.0) / (np.abs(want).max(initial=0.0) or 1.0))


def check(got: np.ndarray, want: np.ndarray, bound: float, what: str = "") -> None:
    """Fails where ``distance`` is beyond ``bound``, and says by how much."""
    found = distance(got, want)
    assert found <= bound, f"{what or 'the results'} differ by {found:.1e} of the largest value; float32 explains {bound:.1e}"
