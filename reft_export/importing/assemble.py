"""A ForeignAdapter to ours: at each site the method of its one intervention, else the smallest form that holds all that act there.

A site has one method, rank and activation; pyreft lets every intervention have its own, several of them at one site, and
positions at which only some sites are edited. The forms that hold more, y as in runtimes.edits.adapter:

    noreft    holds exactly what has a NoReFT that does the same (``Method.as_noreft``): loreft, and without an activation consreft
    direft    holds every linear edit (``Method.of_edit``): W2 = U, W1 = A, b of its folded form, folded in float64 and rounded once to
              float32

A method of full rank (RED's scale and bias) mixes with no other.

Shorter ranks are filled with zero rows, and a slot that is not edited is all zeros; both add nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np

from reft_export.importing.foreign import ForeignAdapter, ForeignEdit, listed
from runtimes.edits.adapter import Adapter, BaseModel
from runtimes.edits.edit import in_sequence
from runtimes.edits.form import EditForm, commonest
from runtimes.edits.methods import METHODS, Values, fold_parameters
from runtimes.errors import AdapterError

Slot = tuple[ForeignEdit, ...]


def assemble(foreign: ForeignAdapter, base: BaseModel) -> Adapter:
    """Raises AdapterError for widths and layers that the base does not have, and for mixtures that one site cannot hold."""
    for slots in foreign.edits.values():
        for edit in (edit for slot in slots for edit in slot):
            _check_width(edit, base)
    forms = {site: _form(foreign, slots) for site, slots in sorted(foreign.edits.items())}
    tensors: dict[str, np.ndarray] = {}
    for site, slots in foreign.edits.items():
        for group, slot in zip(("",) if foreign.tied else ("prefix", "suffix"), slots, strict=True):
            for name, value in _parameters(slot, forms[site], base.hidden_size).items():
                tensors[".".join(filter(None, (str(site), group, name)))] = value
    own = commonest(forms)
    return Adapter(
        method=own.method,
        rank=own.rank,
        sites=tuple(forms),
        positions=foreign.positions,
        tied=foreign.tied,
        base=base,
        tensors=tensors,
        activation=own.activation,
        forms=forms,
        dropout=foreign.dropout,
        dtype=foreign.dtype,
        training=dict(foreign.record),
        head=foreign.head,
    )


def _check_width(edit: ForeignEdit, base: BaseModel) -> None:
    width = next(edit.parameters[p.name].shape[-1] for p in METHODS[edit.method].parameters if "D" in p.axes)
    if width != base.hidden_size:
        raise AdapterError(
            f"{edit.name} has width {width}, {base.name} has width {base.hidden_size}; pass the base that the adapter was trained on"
        )


def _form(foreign: ForeignAdapter, slots: Sequence[Slot]) -> EditForm:
    """What holds all the edits of one site; a site that nothing edits at any slot has none."""
    method = _common_method(foreign, slots)
    activation = foreign.activation if METHODS[method].activated else ""
    return EditForm(method=method, rank=max(sum(map(_rank, slot)) for slot in slots), activation=activation)


def _common_method(foreign: ForeignAdapter, slots: Sequence[Slot]) -> str:
    everything = [edit for slot in slots for edit in slot]
    methods = {edit.method for edit in everything}
    uniform = len({_rank(edit) for edit in everything}) == 1 and all(len(slot) == 1 for slot in slots)
    if len(methods) == 1 and uniform:
        return methods.pop()
    if any(METHODS[name].full_rank for name in methods):
        if len(methods) == 1:
            return methods.pop()
        mixed = " and ".join(sorted(methods))
        raise AdapterError(f"a site of this adapter mixes {mixed}, which no one form holds; train them as adapters of one method")
    single = all(len(slot) <= 1 for slot in slots)
    if single and all(METHODS[name].as_noreft and (METHODS[name].activated or not foreign.activation) for name in methods):
        return "noreft"
    if not foreign.activation or (single and methods == {"direft"}):
        return "direft"
    names = listed(sorted({f"{edit.name} ({edit.method})" for edit in everything}))
    raise AdapterError(
        f"this adapter mixes interventions that one site with activation {foreign.activation} cannot hold: {names}; "
        "train them as adapters of one method, with one intervention a site and position group"
    )


def _rank(edit: ForeignEdit) -> int:
    return next((len(edit.parameters[p.name]) for p in METHODS[edit.method].parameters if p.axes[0] == "r"), 0)


def _parameters(slot: Slot, form: EditForm, width: int) -> dict[str, np.ndarray]:
    """The parameters of ``form``, filled up to its rank, that do what the edits of ``slot`` do one after the other."""
    method = form.method
    values = {} if not slot else slot[0].parameters if [e.method for e in slot] == [method] else _converted(slot, method)
    full = {}
    for parameter, shape in zip(METHODS[method].parameters, METHODS[method].shapes(form.rank, width).values(), strict=True):
        full[parameter.name] = np.full(shape, parameter.no_edit, np.float32)
        if parameter.name in values:
            full[parameter.name][: len(values[parameter.name])] = values[parameter.name]
    return full


def _converted(slot: Slot, method: str) -> Values:
    as_noreft = METHODS[slot[0].method].as_noreft
    if method == "noreft" and as_noreft is not None:
        (edit,) = slot
        return as_noreft(edit.parameters)
    of_edit = METHODS[method].of_edit
    if of_edit is None:
        raise AdapterError(f"{listed(edit.name for edit in slot)} act one after the other, which no one {method} does; train them as one")
    folded = reduce(in_sequence, (fold_parameters(edit.method, edit.parameters) for edit in slot))
    return {name: value.astype(np.float32) for name, value in of_edit(folded).items()}
