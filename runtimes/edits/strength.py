"""How strongly an adapter steers: s of y = h + s (edit(h) - h). 1 is the adapter itself, 0 the base.

    low rank        U' = s U                                whatever the activation; A and b stay
    scale and bias  scale' = 1 + s (scale - 1), bias' = s bias

``Bank.scales`` of the op's table says which parameters it moves: p' = p0 + s (p - p0), p0 the value that edits nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from runtimes.edits.edit import Edit, Site
from runtimes.edits.op import OPS, Bank, EditNode, node_of
from runtimes.errors import InputError


@dataclass(frozen=True)
class Scaled:
    """An adapter by name, at another strength than its own. Raises InputError for a strength that is not finite."""

    adapter: str
    strength: float

    def __post_init__(self) -> None:
        check_strength(self.strength, self.adapter)

    def __str__(self) -> str:
        return f"{self.adapter} at strength {self.strength:g}"


Steering = str | Scaled
"""What steers a row: an adapter by name, or at a strength."""


def at_strength(adapter: str, strength: float) -> Steering:
    """The name alone at strength 1. Raises InputError for a strength that is not finite."""
    return adapter if strength == 1 else Scaled(adapter, strength)


def parts_of(steering: Steering) -> tuple[str, float]:
    """The adapter's name, and its strength."""
    return (steering, 1.0) if isinstance(steering, str) else (steering.adapter, steering.strength)


def check_strength(strength: float, adapter: str) -> float:
    """Raises InputError where it is not finite."""
    if not math.isfinite(strength):
        raise InputError(f"the strength of {adapter} is {strength}, expected a finite number: 1 is the adapter itself, 0 the base")
    return strength


def scaled(edit: Edit, strength: float) -> Edit:
    """y = h + s (edit(h) - h), as an edit of the same form, in float64; ``edit`` itself for s = 1."""
    if strength == 1:
        return edit
    banks = [bank for bank in node_of(Site(layer=0), edit).spec.banks if bank.scales]
    return replace(edit, **{bank.name: _scaled(np.asarray(getattr(edit, bank.name), np.float64), bank, strength) for bank in banks})


def scaled_banks(node: EditNode, arrays: Sequence[np.ndarray], strength: float, adapter: str) -> tuple[np.ndarray, ...]:
    """The parameters of a node's edits at a strength, computed in float64 and rounded to their own type.

    Raises InputError where a value does not survive that: ``adapter``'s strength is too large.
    """
    if strength == 1:
        return tuple(arrays)
    with np.errstate(over="ignore"):
        banks = tuple(
            _scaled(array.astype(np.float64), bank, strength).astype(array.dtype) if bank.scales else array
            for bank, array in zip(OPS[node.op].banks, arrays, strict=True)
        )
    if not all(np.isfinite(array.astype(np.float32)).all() for array in banks):
        raise InputError(f"strength {strength:g} takes {adapter} beyond {arrays[0].dtype} at {node.site}; lower it")
    return banks


def _scaled(values: np.ndarray, bank: Bank, strength: float) -> np.ndarray:
    return bank.no_edit + strength * (values - bank.no_edit)
