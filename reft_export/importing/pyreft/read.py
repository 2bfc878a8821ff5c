"""pyreft folders: config.json and one pickled state dict an intervention, ``intkey_<key>.bin`` (pyreft_states).

A trainer's checkpoint (``intervenable_model/``) holds the state dicts alone.

Positions follow pyreft's own rule: with shared weights, or where the positions have no prefix or no suffix, every intervention acts
on all of them; else the first half of the interventions, in the file's order, on the prefix and the second half on the suffix.
Several interventions at one site act one after the other: PyTorch runs the hooks of one module in the file's order, and those of a
module before those of the one around it.

Source: pyreft/dataset.py, get_intervention_locations; pyvene/models/intervenable_base.py, save.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from reft_export.base.load import Outline
from reft_export.importing.foreign import (
    ACTIVATION_CHOICES,
    POSITION_CHOICES,
    ForeignAdapter,
    ForeignEdit,
    Request,
    activation_of,
    listed,
    not_recorded,
    short,
)
from reft_export.importing.heads import head_of
from reft_export.importing.pyreft.entries import Entry, check_model, check_recorded, read_entries
from reft_export.importing.pyreft.sites import PEFT_PREFIX, ComponentSites, Place
from reft_export.importing.pyreft.states import CLASSES, has_zero_rows, kind_of, read_state
from reft_export.importing.subspaces import chosen_edit
from reft_export.importing.tensors import read_pickle, stored_dtype
from runtimes.edits.edit import Site
from runtimes.edits.methods import activated_methods
from runtimes.edits.positions import PositionRule
from runtimes.errors import AdapterError, InputError
from runtimes.files.folders import name_of
from runtimes.files.records import read_json_object

FORMAT = "pyreft"
TRAINED_FILE = "pytorch_model.bin"
SIDE_FILE = "reft_export.json"
"""What our own export adds to a pyreft folder: everything that pyreft does not record. pyreft ignores it."""


def read_pyreft(folder: Path, request: Request, outline: Outline) -> ForeignAdapter:
    """Raises InputError for what pyreft does not record and ``request`` does not say, AdapterError for what cannot be imported."""
    reasons = {"layers": "the files say which layers are edited", "stream": "the files say which streams are edited"}
    request.refuse("pyreft", {**reasons, "scale": "an intervention has no strength to scale"})
    side = _read_side_file(folder)
    request = _with_side_file(folder, side, request)
    if not outline.info.labels:
        _refuse_trained_base(folder)
    check_model(folder, outline)
    sites = ComponentSites(outline.model)
    entries = read_entries(folder, sites)
    states = [read_pickle(folder / f"intkey_{entry.key}.bin") for entry in entries]
    kinds = [kind_of(entry.key, entry.kind, state, request.method) for entry, state in zip(entries, states, strict=True)]
    positions, tied, activation = _asked(request, {CLASSES[kind] for kind in kinds})
    positions = replace(positions, truncate=side.get("truncate", True))
    head = _head(folder, outline)
    edits = [read_state(entry.key, kind, state) for entry, kind, state in zip(entries, kinds, states, strict=True)]
    check_recorded(folder, entries, edits)
    edits = [_chosen(edit, entry, request.subspace) for edit, entry in zip(edits, entries, strict=True)]
    return ForeignAdapter(
        format=FORMAT,
        edits=_placed([entry.place for entry in entries], edits, tied),
        positions=positions,
        tied=tied,
        activation=activation,
        dropout=float(side.get("dropout", 0.0)),
        dtype=_dtype(states),
        record={
            "imported_from": FORMAT,
            "source": name_of(folder),
            "class": ", ".join(sorted(set(kinds))),
            "interventions": len(edits),
            **({} if request.subspace is None else {"subspace": request.subspace}),
        },
        notes=_notes(request, positions, edits) + _head_notes(outline, head),
        head=head,
    )


def _chosen(edit: ForeignEdit, entry: Entry, subspace: str | None) -> ForeignEdit:
    """Raises InputError where the files leave to each call what is edited, and nobody says it."""
    if subspace is None and (entry.chooses or entry.partition is not None):
        of = "" if entry.partition is None else f" of subspace_partition {short(entry.partition)}"
        raise InputError(f"{edit.name} is edited in subspaces{of}, which every call chooses; pass --subspace 0, 0-3 or all")
    return edit if subspace is None else chosen_edit(edit, subspace, entry.partition)


def _head(folder: Path, outline: Outline) -> dict[str, np.ndarray]:
    """A classifier's head, which pyreft saves among the base's trained parameters (save with include_model)."""
    path = folder / TRAINED_FILE
    if not outline.info.labels or not path.is_file():
        return {}
    return head_of({name.removeprefix(PEFT_PREFIX): value for name, value in read_pickle(path).items()}, outline, path)


def _head_notes(outline: Outline, head: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    if not outline.info.labels or head:
        return ()
    return (
        f"no {TRAINED_FILE} lies beside the interventions: they are used with {outline.info.name}'s own head; pyreft saves a trained one "
        "with include_model=True",
    )


def _notes(request: Request, positions: PositionRule, edits: list[ForeignEdit]) -> tuple[str, ...]:
    notes = []
    if request.tied is False and not (positions.first and positions.last):
        notes.append(f"--untied changes nothing: with positions {positions} pyreft applies every intervention to all of them")
    for edit in edits:
        if has_zero_rows(edit):
            notes.append(f"{edit.name}: R has rows of zeros, which edit nothing (weight decay does that to torch's orthogonal R)")
    return tuple(notes)


def _refuse_trained_base(folder: Path) -> None:
    """pyvene's include_model saves what was trained of the base beside the interventions: of a frozen base, nothing."""
    path = folder / TRAINED_FILE
    if path.is_file() and (trained := read_pickle(path)):
        raise AdapterError(
            f"{path} holds {len(trained)} trained parameters of the base, first {next(iter(trained))}; an adapter edits streams and no "
            "weights: put them into the base's checkpoint, and import with the file left out"
        )


def _dtype(states: list[dict[str, Tensor]]) -> str:
    """That of the learned source, which pyreft keeps in the base's: R stays in float32."""
    names = [name for name in states[0] if name.endswith("weight") and "rotate" not in name]
    return stored_dtype(states[0][names[0]]) if names else "float32"


# --- what the files do not say ------------------------------------------------------------------------


def _asked(request: Request, methods: set[str]) -> tuple[PositionRule, bool, str]:
    """(positions, tied, activation) from the flags; raises InputError that names all of those that are missing."""
    missing = {}
    positions = None if request.positions is None else PositionRule.parse(request.positions)
    both = positions is not None and positions.first > 0 and positions.last > 0
    if positions is None:
        missing["positions"] = f"--positions ({POSITION_CHOICES})"
    if request.tied is None and (both or positions is None):
        missing["share_weights"] = "--tied or --untied"
    activated = methods & set(activated_methods())
    if request.activation is None and activated:
        missing["act_fn"] = f"--activation ({ACTIVATION_CHOICES})"
    if missing or positions is None:
        raise not_recorded("pyreft", missing)
    activation = activation_of(request.activation or "", "--activation")
    if activation and activated != methods:
        raise InputError(f"--activation {activation} does not apply: {listed(sorted(methods - activated))} has no learned source")
    return positions, not both or bool(request.tied), activation


def _placed(places: list[Place], edits: list[ForeignEdit], tied: bool) -> dict[Site, tuple[tuple[ForeignEdit, ...], ...]]:
    """The edits of each site by slot. Untied: the first half of all interventions is the prefix's, the second half the suffix's."""
    if not tied and len(edits) % 2:
        raise InputError(f"--untied needs as many prefix as suffix interventions; the adapter has {len(edits)}; is it --tied?")
    placed: dict[Site, tuple[list[ForeignEdit], ...]] = {}
    halves = [0 if tied else 2 * i // len(edits) for i in range(len(edits))]
    hooks = sorted(zip(places, halves, edits, strict=True), key=lambda hook: not hook[0].inner)
    for place, half, edit in hooks:
        placed.setdefault(place.site, ([],) if tied else ([], []))[half].append(edit)
    return {site: tuple(map(tuple, slots)) for site, slots in placed.items()}


def _read_side_file(folder: Path) -> dict[str, Any]:
    """What the file that our own export adds holds, each key of the right type; empty where there is none."""
    path = folder / SIDE_FILE
    if not path.is_file():
        return {}
    recorded = read_json_object(path)
    for key, kind in {"positions": str, "truncate": bool, "share_weights": bool, "act_fn": str}.items():
        if key in recorded and not isinstance(recorded[key], kind):
            raise AdapterError(f"{path}: {key} is {short(recorded[key])}, expected {kind.__name__}")
    dropout = recorded.get("dropout", 0.0)
    if not isinstance(dropout, int | float) or isinstance(dropout, bool) or not 0 <= dropout <= 1:
        raise AdapterError(f"{path}: dropout is {short(dropout)}, expected a number from 0 to 1")
    return recorded


def _with_side_file(folder: Path, recorded: Mapping[str, Any], request: Request) -> Request:
    """``request`` filled from ``recorded``, what the side file holds; a flag that contradicts it is refused."""
    for name, key in {"positions": "positions", "tied": "share_weights", "activation": "act_fn"}.items():
        if key not in recorded:
            continue
        said, value = getattr(request, name), recorded[key]
        if said not in (None, value):
            raise InputError(f"--{name} {said} contradicts {folder / SIDE_FILE}, which says {key} {value}")
        request = replace(request, **{name: said if said is not None else value})
    return request
