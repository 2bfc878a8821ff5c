"""The methods: ``METHODS`` holds all that tells one from another. Another method is another entry here.

R and P are [r, D], so R^T of the paper is R.T here. A method of full rank has none to choose: its adapters say rank 0.

Source: Wu et al. 2024, "ReFT: Representation Finetuning for Language Models", equations 2 and 3; pyreft's class names. RED: Wu et al.
2024, "Advancing Parameter Efficiency in Fine-tuning via Representation Editing".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from runtimes.edits.edit import Edit, LowRankEdit, ScaleBiasEdit
from runtimes.errors import AdapterError

Axis = Literal["r", "D"]
Role = Literal["projection", "source", "bias", "offset", "scale"]
Initial = Literal["orthonormal", "linear", "unit", "no edit"]
Values = Mapping[str, np.ndarray]
"""The parameters of one edit by name."""
Array = Any
"""numpy's, or torch's Tensor: a delta is written in operators that both have."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One trained tensor of a method."""

    name: str
    axes: tuple[Axis, ...]
    """"r", the rank, which every adapter chooses; "D", the width of the stream."""
    role: Role
    """What it is in the libraries that adapters are imported from, each of which has names of its own for it. source: what is learned."""
    initial: Initial
    """orthonormal: random orthonormal rows, which training keeps so; linear: uniform in +-1/sqrt(D), as torch's Linear; unit: uniform in
    [0, 1); no edit: ``no_edit``."""
    no_edit: float = 0.0
    """What fills it where a slot is not edited, and the rows of a shorter rank."""

    @property
    def decays(self) -> bool:
        """Whether weight decay acts on it: not on biases and scales, which it would pull away from what edits nothing, nor on
        orthonormal rows, which it could only make slower."""
        return self.role in ("projection", "source") and self.initial != "orthonormal"


@dataclass(frozen=True, kw_only=True)
class Method:
    """What tells one method from another. Functions take the parameters by name."""

    formula: str
    parameters: tuple[Parameter, ...]
    delta: Callable[[Mapping[str, Array], Array, Callable[[Array], Array]], Array]
    """(parameters, h [.., D], act) -> y - h: what is trained."""
    fold: Callable[[Values, str], Edit]
    """(float64 parameters, activation) -> the edit they mean, in one of the ops' forms: what is shipped."""
    activated: bool = False
    """It has a learned source for an activation to act on."""
    as_noreft: Callable[[Values], Values] | None = None
    """The parameters of the NoReFT that does the same; where the method is not ``activated``, without an activation."""
    of_edit: Callable[[Edit], Values] | None = None
    """The parameters of any edit without an activation that has the form of ``fold``'s: the method holds edits of other methods."""
    no_edit_start: Callable[[Mapping[str, Array]], Mapping[str, Array]] | None = None
    """(initial parameters) -> what some of them become so that training starts from y = h, with a gradient. None: it has no such start."""
    no_edit_activated: bool = False
    """That start edits nothing with an activation, too."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(parameter.name for parameter in self.parameters)

    @property
    def full_rank(self) -> bool:
        return not any("r" in parameter.axes for parameter in self.parameters)

    def role(self, role: Role) -> Parameter:
        """The parameter of that role; raises KeyError where the method has none."""
        return {parameter.role: parameter for parameter in self.parameters}[role]

    def shapes(self, rank: int, width: int) -> dict[str, tuple[int, ...]]:
        size = {"r": rank, "D": width}
        return {parameter.name: tuple(size[axis] for axis in parameter.axes) for parameter in self.parameters}


def _rows(name: str, role: Role, initial: Initial = "linear") -> Parameter:
    return Parameter(name=name, axes=("r", "D"), role=role, initial=initial)


def _coordinates(name: str, role: Role, initial: Initial = "linear") -> Parameter:
    return Parameter(name=name, axes=("r",), role=role, initial=initial)


def _channels(name: str, role: Role, no_edit: float) -> Parameter:
    return Parameter(name=name, axes=("D",), role=role, initial="no edit", no_edit=no_edit)


def _loreft_as_noreft(x: Values) -> Values:
    return {"P": x["R"], "W": x["W"], "b": x["b"], "p": np.zeros_like(x["b"])}


def _consreft_as_noreft(x: Values) -> Values:
    return {"P": x["R"], "W": np.zeros_like(x["R"]), "b": x["s"], "p": np.zeros_like(x["s"])}


def _fold_noreft(x: Values, activation: str) -> LowRankEdit:
    """With an activation the subtraction gets rows of its own (``activated="first_half"``)."""
    if not activation:
        return LowRankEdit(U=x["P"], A=x["W"] - x["P"], b=x["b"] - x["p"])
    return LowRankEdit(
        U=np.vstack([x["P"], x["P"]]),
        A=np.vstack([x["W"], -x["P"]]),
        b=np.concatenate([x["b"], -x["p"]]),
        activation=activation,
        activated="first_half",
    )


def _direft_of(edit: Edit) -> Values:
    if not isinstance(edit, LowRankEdit):
        raise AdapterError("a scale and bias (RED) does not fit direft, whose edits are of low rank")
    return {"W2": edit.U, "W1": edit.A, "b": edit.b}


def _red_of(edit: Edit) -> Values:
    if not isinstance(edit, ScaleBiasEdit):
        raise AdapterError("an edit of low rank does not fit red, a scale and a bias per channel")
    return {"scale": edit.scale, "bias": edit.bias}


METHODS: Mapping[str, Method] = {
    "loreft": Method(
        formula="y = h + R^T (act(W h + b) - R h)",
        parameters=(_rows("R", "projection", "orthonormal"), _rows("W", "source"), _coordinates("b", "bias")),
        delta=lambda x, h, act: (act(h @ x["W"].T + x["b"]) - h @ x["R"].T) @ x["R"],
        fold=lambda x, activation: _fold_noreft(_loreft_as_noreft(x), activation),
        activated=True,
        as_noreft=_loreft_as_noreft,
        no_edit_start=lambda x: {"W": x["R"], "b": 0 * x["b"]},
    ),
    "noreft": Method(
        formula="y = h + P^T (act(W h + b) - (P h + p))",
        parameters=(_rows("P", "projection"), _rows("W", "source"), _coordinates("b", "bias"), _coordinates("p", "offset")),
        delta=lambda x, h, act: (act(h @ x["W"].T + x["b"]) - (h @ x["P"].T + x["p"])) @ x["P"],
        fold=_fold_noreft,
        activated=True,
        as_noreft=dict,
        no_edit_start=lambda x: {"W": x["P"], "b": x["p"]},
    ),
    "direft": Method(
        formula="y = h + W2^T act(W1 h + b)",
        parameters=(_rows("W2", "projection"), _rows("W1", "source"), _coordinates("b", "bias")),
        delta=lambda x, h, act: act(h @ x["W1"].T + x["b"]) @ x["W2"],
        fold=lambda x, activation: LowRankEdit(U=x["W2"], A=x["W1"], b=x["b"], activation=activation),
        activated=True,
        of_edit=_direft_of,
        no_edit_start=lambda x: {"W2": 0 * x["W2"]},
        no_edit_activated=True,
    ),
    "consreft": Method(
        formula="y = h + R^T (s - R h)",
        parameters=(_rows("R", "projection", "orthonormal"), _coordinates("s", "source", "unit")),
        delta=lambda x, h, act: (x["s"] - h @ x["R"].T) @ x["R"],
        fold=lambda x, activation: LowRankEdit(U=x["R"], A=-x["R"], b=x["s"]),
        as_noreft=_consreft_as_noreft,
    ),
    "lobireft": Method(
        formula="y = h + R^T s",
        parameters=(_rows("R", "projection", "orthonormal"), _coordinates("s", "source", "unit")),
        delta=lambda x, h, act: x["s"] @ x["R"],
        fold=lambda x, activation: LowRankEdit(U=x["R"], A=np.zeros_like(x["R"]), b=x["s"]),
        no_edit_start=lambda x: {"s": 0 * x["s"]},
    ),
    "red": Method(
        formula="y = scale * h + bias",
        parameters=(_channels("scale", "scale", 1.0), _channels("bias", "bias", 0.0)),
        delta=lambda x, h, act: (x["scale"] - 1) * h + x["bias"],
        fold=lambda x, activation: ScaleBiasEdit(scale=x["scale"], bias=x["bias"]),
        of_edit=_red_of,
        no_edit_start=lambda x: {},
    ),
}
"""By name. pyreft calls this direft Nodireft; its own Direft keeps W2 orthonormal."""


def activated_methods() -> tuple[str, ...]:
    """Those that have a learned source for an activation to act on."""
    return tuple(name for name, method in METHODS.items() if method.activated)


def form_of(method: str, rank: int) -> str:
    """``loreft, rank 4``; ``red`` where there is no rank to speak of."""
    return method if METHODS[method].full_rank else f"{method}, rank {rank}"


def fold_parameters(method: str, parameters: Values, activation: str = "") -> Edit:
    """The method's formula in float64 from the given parameters: y = h + U^T act(A h + b), or RED's own form."""
    if method not in METHODS:
        raise AdapterError(f"method {method!r} is unknown; known: {', '.join(METHODS)}")
    return METHODS[method].fold({name: np.asarray(value, np.float64) for name, value in parameters.items()}, activation)
