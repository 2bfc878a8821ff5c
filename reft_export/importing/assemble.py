"""A ForeignAdapter to ours: the same method where all sites share one, else the smallest form that holds them all.

An adapter has one method, rank and activation; pyreft lets every intervention have its own, several of them at one site, and
positions at which only some sites are edited. The forms that hold more, y as in runtimes.edits.adapter:

    noreft    holds loreft (P = R, p = 0) exactly, and without an activation consreft (P = R, W = 0, b = s, p = 0)
    direft    holds every linear edit: W2 = U, W1 = A, b of its folded form, folded in float64 and rounded once to float32

RED's scale and bias mix with none of them.

Shorter ranks are filled with zero rows, and a slot that is not edited is all zeros; both add nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np

from reft_export.importing.foreign import ForeignAdapter, ForeignEdit, listed
from runtimes.edits.adapter import Adapter, BaseModel
from runtimes.edits.edit import in_sequence
from runtimes.edits.methods import ACTIVATED_METHODS, FULL_RANK_METHODS, PARAMETERS, fold_parameters, parameter_shape
from runtimes.errors import AdapterError

Slot = tuple[ForeignEdit, ...]


def assemble(foreign: ForeignAdapter, base: BaseModel) -> Adapter:
    """Raises AdapterError for widths and layers that the base does not have, and for mixtures that one adapter cannot hold."""
    everything = [edit for slots in foreign.edits.values() for slot in slots for edit in slot]
    for edit in everything:
        _check_width(edit, base)
    method = _common_method(foreign, everything)
    rank = max(sum(map(_rank, slot)) for slots in foreign.edits.values() for slot in slots)
    tensors: dict[str, np.ndarray] = {}
    for site, slots in foreign.edits.items():
        for group, slot in zip(("",) if foreign.tied else ("prefix", "suffix"), slots, strict=True):
            for name, value in _parameters(slot, method, rank, base.hidden_size).items():
                tensors[".".join(filter(None, (str(site), group, name)))] = value
    return Adapter(
        method=method,
        rank=rank,
        sites=tuple(sorted(foreign.edits)),
        positions=foreign.positions,
        tied=foreign.tied,
        base=base,
        tensors=tensors,
        activation=foreign.activation if method in ACTIVATED_METHODS else "",
        dropout=foreign.dropout,
        dtype=foreign.dtype,
        training=dict(foreign.record),
        head=foreign.head,
    )


def _check_width(edit: ForeignEdit, base: BaseModel) -> None:
    width = next(value.shape[-1] for value in edit.parameters.values() if value.ndim == 2 or edit.method in FULL_RANK_METHODS)
    if width != base.hidden_size:
        raise AdapterError(
            f"{edit.name} has width {width}, {base.name} has width {base.hidden_size}; pass the base that the adapter was trained on"
        )


def _common_method(foreign: ForeignAdapter, everything: Sequence[ForeignEdit]) -> str:
    methods = {edit.method for edit in everything}
    slots = [slot for each in foreign.edits.values() for slot in each]
    uniform = len({_rank(edit) for edit in everything}) == 1 and all(len(slot) == 1 for slot in slots)
    if len(methods) == 1 and uniform:
        return methods.pop()
    if methods & set(FULL_RANK_METHODS):
        if len(methods) == 1:
            return methods.pop()
        mixed = " and ".join(sorted(methods))
        raise AdapterError(f"this adapter mixes {mixed}, which no one form holds; train them as adapters of one method")
    single = all(len(slot) <= 1 for slot in slots)
    if single and methods <= {"loreft", "noreft"} | (set() if foreign.activation else {"consreft"}):
        return "noreft"
    if not foreign.activation or (single and methods == {"direft"}):
        return "direft"
    names = listed(sorted({f"{edit.name} ({edit.method})" for edit in everything}))
    raise AdapterError(
        f"this adapter mixes interventions that one adapter with activation {foreign.activation} cannot hold: {names}; "
        "train them as adapters of one method, with one intervention a site and position group"
    )


def _rank(edit: ForeignEdit) -> int:
    return 0 if edit.method in FULL_RANK_METHODS else len(next(iter(edit.parameters.values())))


def _parameters(slot: Slot, method: str, rank: int, width: int) -> dict[str, np.ndarray]:
    """The parameters of ``method``, filled up to ``rank`` rows, that do what the edits of ``slot`` do one after the other."""
    values = {} if not slot else dict(slot[0].parameters) if [e.method for e in slot] == [method] else _converted(slot, method)
    return {name: _filled(values.get(name), name, parameter_shape(method, name, rank, width)) for name in PARAMETERS[method]}


def _converted(slot: Slot, method: str) -> Mapping[str, np.ndarray]:
    if method == "noreft":
        (edit,) = slot
        x = edit.parameters
        zeros = np.zeros_like(x["R"][:, 0])
        if edit.method == "loreft":
            return {"P": x["R"], "W": x["W"], "b": x["b"], "p": zeros}
        return {"P": x["R"], "W": np.zeros_like(x["R"]), "b": x["s"], "p": zeros}
    folded = reduce(in_sequence, (fold_parameters(edit.method, edit.parameters) for edit in slot))
    if method == "red":
        return {name: getattr(folded, name).astype(np.float32) for name in PARAMETERS[method]}
    return {name: value.astype(np.float32) for name, value in (("W2", folded.U), ("W1", folded.A), ("b", folded.b))}


def _filled(value: np.ndarray | None, name: str, shape: tuple[int, ...]) -> np.ndarray:
    full = np.full(shape, 1.0 if name == "scale" else 0.0, np.float32)
    if value is not None:
        full[: len(value)] = value
    return full
