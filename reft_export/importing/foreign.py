"""What every reader of a foreign format gives, and what the user has to say where the format is silent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from reft_export.training.edits import parse_layers
from runtimes.edits.edit import Site
from runtimes.edits.methods import METHODS
from runtimes.edits.positions import PositionRule
from runtimes.errors import AdapterError, InputError

if TYPE_CHECKING:  # torch takes seconds, and what is no adapter at all is refused without it
    from reft_export.base.load import Outline

Report = Callable[[str], None]
"""Told what is being done; the CLI shows it."""

ACTIVATION_NAMES = {
    "": "",
    "none": "",
    "linear": "",
    "identity": "",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}
"""transformers' names (ACT2FN), which pyreft and AdapterHub use, and ours: one function can have several names."""

ACTIVATION_CHOICES = "none, relu, gelu, gelu_tanh, silu, tanh, sigmoid"
POSITION_CHOICES = "f2+l2, f3, l1, prompt, all"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user says of the adapter; None where nothing was said."""

    positions: str | None = None
    tied: bool | None = None
    activation: str | None = None
    method: str | None = None
    layers: str | None = None
    scale: float | None = None
    stream: str | None = None
    subspace: str | None = None

    def refuse(self, format: str, reasons: Mapping[str, str]) -> None:
        """Raises InputError for the first option given that has no meaning for ``format``."""
        for name, reason in reasons.items():
            if getattr(self, name) is not None:
                raise InputError(f"--{name} does not apply to {format}: {reason}")


@dataclass(frozen=True, kw_only=True, eq=False)
class ForeignEdit:
    """One intervention as its library applies it: one of ``runtimes.edits.methods.METHODS`` with its parameters in float32.

    Their shapes are ``Method.shapes``, each with a rank of its own. ``name`` is what the foreign file calls it.
    """

    name: str
    method: str
    parameters: Mapping[str, np.ndarray]

    @classmethod
    def of_roles(cls, name: str, method: str, **values: np.ndarray) -> ForeignEdit:
        """``values``: the parameters by their role in the method (``Parameter.role``); those that it does not have are left out."""
        parameters = {parameter.name: values[parameter.role] for parameter in METHODS[method].parameters}
        return cls(name=name, method=method, parameters=parameters)


@dataclass(frozen=True, kw_only=True, eq=False)
class ForeignAdapter:
    """Everything read from a foreign adapter. ``edits``: per site, what acts at each slot, in the order in which it acts."""

    format: str
    edits: Mapping[Site, tuple[tuple[ForeignEdit, ...], ...]]
    """One tuple of edits when tied, else one for the prefix and one for the suffix; an empty one edits nothing."""
    positions: PositionRule
    tied: bool
    activation: str = ""
    dropout: float = 0.0
    dtype: str = "float32"
    record: Mapping[str, Any] = field(default_factory=dict)
    """Where it came from, kept in the adapter."""
    notes: tuple[str, ...] = ()
    """What the user should know and could not see."""
    head: Mapping[str, np.ndarray] = field(default_factory=dict)
    """A classifier's, saved with the adapter, by the base's parameter names."""


T = TypeVar("T")


def of_chosen_layers(path: Path, stored: Mapping[Site, T], request: Request, outline: Outline, *, what: str, made: str) -> dict[Site, T]:
    """What the file holds for the layers that --layers names, or all of it; raises for layers that the base, or the file, does not have.

    ``what`` it holds for a layer, and ``made``: what of it belongs to the base, both for messages.
    """
    count = outline.info.num_hidden_layers
    if outside := [site.layer for site in stored if site.layer >= count]:
        raise AdapterError(
            f"{path}: layer {max(outside)} does not exist in {outline.info.name} ({count} layers, 0 to {count - 1}); pass the base that "
            f"{made}"
        )
    if request.layers is None:
        return dict(stored)
    chosen = set(parse_layers(request.layers, count))
    if absent := chosen - {site.layer for site in stored}:
        raise InputError(f"--layers {request.layers}: the file has no {what} for layer {listed(sorted(absent))}")
    return {site: value for site, value in stored.items() if site.layer in chosen}


def not_recorded(format: str, missing: Mapping[str, str]) -> InputError:
    """The refusal that names everything the format is silent about and the flags that say it."""
    return InputError(f"{format} does not record {_and(missing)}, and nothing is guessed; pass {_and(missing.values())}")


def _and(parts: Iterable[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


def activation_of(name: str, where: str) -> str:
    """Our name for a foreign activation; raises InputError for one that the op does not have."""
    if name.lower() not in ACTIVATION_NAMES:
        raise InputError(f"{where} {name!r} is unknown; known: {ACTIVATION_CHOICES}")
    return ACTIVATION_NAMES[name.lower()]


def short(value: object, limit: int = 60) -> str:
    """What a file holds where something else is expected, cut to a part of one line."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def listed(names: Iterable[object], limit: int = 4) -> str:
    """``a, b, c, d and 7 more``."""
    all_names = list(map(str, names))
    more = f" and {len(all_names) - limit} more" if len(all_names) > limit else ""
    return ", ".join(all_names[:limit]) + more
