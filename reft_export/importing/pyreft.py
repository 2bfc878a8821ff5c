"""pyreft folders: config.json and one pickled state dict an intervention, ``intkey_<key>.bin`` (pyreft_states).

A trainer's checkpoint (``intervenable_model/``) holds the state dicts alone.

Positions follow pyreft's own rule: with shared weights, or where the positions have no prefix or no suffix, every intervention acts
on all of them; else the first half of the interventions, in the file's order, on the prefix and the second half on the suffix.
Several interventions at one site act one after the other.

Source: pyreft/dataset.py, get_intervention_locations; pyvene/models/intervenable_base.py, save.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from reft_export.base import Outline
from reft_export.importing.foreign import (
    ACTIVATION_CHOICES,
    POSITION_CHOICES,
    ForeignAdapter,
    ForeignEdit,
    Request,
    activation_of,
    listed,
    not_recorded,
)
from reft_export.importing.heads import head_of
from reft_export.importing.pyreft_sites import PEFT_PREFIX, ComponentSites
from reft_export.importing.pyreft_states import CLASSES, has_zero_rows, kind_of, read_state
from reft_export.importing.tensors import read_pickle, stored_dtype
from runtimes.adapter import ACTIVATED_METHODS
from runtimes.edit import Site
from runtimes.errors import AdapterError, InputError
from runtimes.positions import PositionRule
from runtimes.records import parse_json

FORMAT = "pyreft"
CONFIG_FILE = "config.json"
TRAINED_FILE = "pytorch_model.bin"
SIDE_FILE = "reft_export.json"
"""What our own export adds to a pyreft folder: everything that pyreft does not record. pyreft ignores it."""

REPRESENTATION = ("layer", "component", "unit", "max_number_of_units", "low_rank_dimension", "intervention_type", "intervention",
                  "subspace_partition", "group_key", "intervention_link_key", "moe_key", "source_representation",
                  "hidden_source_representation", "latent_dim")  # fmt: skip
"""The fields of a representation, which config.json holds as a list in this order."""

@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One intervention of the folder. ``kind`` is its class, "" where the folder has no config.json (a trainer's checkpoint)."""

    key: str
    kind: str
    site: Site


def read_pyreft(folder: Path, request: Request, outline: Outline) -> ForeignAdapter:
    """Raises InputError for what pyreft does not record and ``request`` does not say, AdapterError for what cannot be imported."""
    reasons = {"layers": "the files say which layers are edited", "stream": "the files say which streams are edited"}
    request.refuse("pyreft", {**reasons, "scale": "an intervention has no strength to scale"})
    request = _with_side_file(folder, request)
    if not outline.info.labels:
        _refuse_trained_base(folder)
    sites = ComponentSites(outline.model)
    entries = _configured(folder, sites) if (folder / CONFIG_FILE).is_file() else _checkpoint(folder, sites)
    states = [read_pickle(folder / f"intkey_{entry.key}.bin") for entry in entries]
    kinds = [kind_of(entry.key, entry.kind, state, request.method) for entry, state in zip(entries, states, strict=True)]
    positions, tied, activation = _asked(request, {CLASSES[kind] for kind in kinds})
    head = _head(folder, outline)
    edits = [read_state(entry.key, kind, state) for entry, kind, state in zip(entries, kinds, states, strict=True)]
    return ForeignAdapter(
        format=FORMAT,
        edits=_placed([entry.site for entry in entries], edits, tied),
        positions=positions,
        tied=tied,
        activation=activation,
        dtype=_dtype(states),
        record={
            "imported_from": FORMAT,
            "source": folder.resolve().name,
            "class": ", ".join(sorted(set(kinds))),
            "interventions": len(edits),
        },
        notes=_notes(request, positions, edits) + _head_notes(outline, head),
        head=head,
    )


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


# --- which interventions there are ----------------------------------------------------------------


def _configured(folder: Path, sites: ComponentSites) -> list[_Entry]:
    config = _json(folder / CONFIG_FILE)
    representations, types = config.get("representations"), config.get("intervention_types")
    if not isinstance(representations, list) or not isinstance(types, list) or len(types) != len(representations) or not types:
        raise AdapterError(f"{folder / CONFIG_FILE}: representations and intervention_types are not two lists of one length")
    if config.get("mode", "parallel") != "parallel":
        raise AdapterError(f"{folder / CONFIG_FILE}: mode {config['mode']!r} runs sources one after the other; only parallel is known")
    entries, seen = [], Counter()
    for item, kind in zip(representations, types, strict=True):
        fields = _representation(item, folder)
        stems = _key_stems(fields)
        keys = [f"{stem}#{seen[stems]}" for stem in stems]
        key = next((k for k in keys if (folder / f"intkey_{k}.bin").exists()), keys[0])
        site = sites.of_component(fields["component"], fields["layer"])
        entries.append(_Entry(key=key, kind=_class_name(kind, folder), site=site))
        seen[stems] += 1
    return entries


def _representation(item: object, folder: Path) -> dict[str, Any]:
    if isinstance(item, list) and len(item) <= len(REPRESENTATION):
        item = dict(zip(REPRESENTATION, item, strict=False))
    if not isinstance(item, dict) or not isinstance(item.get("component"), str):
        raise AdapterError(f"{folder / CONFIG_FILE}: representation {item!r} is not understood")
    fields = {"layer": 0, "unit": "pos", "max_number_of_units": 1} | item
    unusual = [n for n in REPRESENTATION[7:13] if n in item and item[n] is not None and n != "group_key"]
    if fields["unit"] != "pos" or fields["max_number_of_units"] != 1 or unusual:
        what = f"{unusual[0]} {item[unusual[0]]!r}" if unusual else f"unit {fields['unit']!r} x {fields['max_number_of_units']!r}"
        raise AdapterError(f"{folder / CONFIG_FILE}: {fields['component']} with {what} cannot be imported; only single positions can")
    return fields


def _key_stems(fields: Mapping[str, Any]) -> tuple[str, str]:
    """pyvene's file names for a representation, of 0.1.7 on and of before, without the counter that tells those of one name apart."""
    component = fields["component"]
    parts = ["comp", component] if "." in component else ["layer", str(fields["layer"]), "comp", component]
    dotted = ".".join([*parts, "unit", "pos", "nunit", "1"])
    return dotted.replace(".", "_"), dotted


def _refuse_trained_base(folder: Path) -> None:
    """pyvene's include_model saves what was trained of the base beside the interventions: of a frozen base, nothing."""
    path = folder / TRAINED_FILE
    if path.is_file() and (trained := read_pickle(path)):
        raise AdapterError(
            f"{path} holds {len(trained)} trained parameters of the base, first {next(iter(trained))}; an adapter edits streams and no "
            "weights: put them into the base's checkpoint, and import with the file left out"
        )


def _class_name(text: object, folder: Path) -> str:
    match = re.fullmatch(r"<class '([\w.]+)\.(\w+)'>", str(text))
    module, name = match.groups() if match else ("", str(text))
    if module.partition(".")[0] != "pyreft" or name not in CLASSES:
        known = ", ".join(CLASSES)
        if re.match(r"red(?!ft)", name.lower()):
            raise AdapterError(
                f"{folder / CONFIG_FILE}: {name} is RED, which pyreft itself does not have; store its vectors as <layer>.<stream>.scale and"
                " .bias in an .npz, which the import reads"
            )
        raise AdapterError(f"{folder / CONFIG_FILE}: intervention {module}.{name} is not one of pyreft's own: {known}")
    return name


def _checkpoint(folder: Path, sites: ComponentSites) -> list[_Entry]:
    """A folder that pyreft's trainer saved: weights alone. The counters in the names give the order: all prefixes, then all suffixes."""
    found = []
    for path in folder.glob("intkey_*.bin"):
        match = re.fullmatch(r"intkey_(.+)#(\d+)", path.stem)
        if not match:
            raise AdapterError(f"{path} is not named as pyreft names interventions, intkey_<place>#<number>.bin")
        found.append((int(match[2]), sites.of_key(match[1]), path.stem.removeprefix("intkey_")))
    return [_Entry(key=key, kind="", site=site) for _, site, key in sorted(found)]


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
    activated = methods & set(ACTIVATED_METHODS)
    if request.activation is None and activated:
        missing["act_fn"] = f"--activation ({ACTIVATION_CHOICES})"
    if missing:
        raise not_recorded("pyreft", missing)
    activation = activation_of(request.activation or "", "--activation")
    if activation and activated != methods:
        raise InputError(f"--activation {activation} does not apply: {listed(sorted(methods - activated))} has no learned source")
    return positions, not both or bool(request.tied), activation


def _placed(sites: list[Site], edits: list[ForeignEdit], tied: bool) -> dict[Site, tuple[tuple[ForeignEdit, ...], ...]]:
    """The edits of each site by slot. Untied: the first half of all interventions is the prefix's, the second half the suffix's."""
    if not tied and len(edits) % 2:
        raise InputError(f"--untied needs as many prefix as suffix interventions; the adapter has {len(edits)}; is it --tied?")
    placed: dict[Site, tuple[list[ForeignEdit], ...]] = {}
    for i, (site, edit) in enumerate(zip(sites, edits, strict=True)):
        slots = placed.setdefault(site, ([],) if tied else ([], []))
        slots[0 if tied else 2 * i // len(edits)].append(edit)
    return {site: tuple(map(tuple, slots)) for site, slots in placed.items()}


def _with_side_file(folder: Path, request: Request) -> Request:
    """``request`` filled from the file that our own export adds; a flag that contradicts it is refused."""
    recorded = _json(folder / SIDE_FILE, missing={})
    names = {"positions": "positions", "tied": "share_weights", "activation": "act_fn"}
    for name, key in names.items():
        said, value = getattr(request, name), recorded.get(key)
        if value is not None and said not in (None, value):
            raise InputError(f"--{name} {said} contradicts {folder / SIDE_FILE}, which says {key} {value}")
        request = replace(request, **{name: said if said is not None else value})
    return request


def _json(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    if missing is not None and not path.is_file():
        return missing
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise AdapterError(f"{path} is not JSON: {e}") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{path} does not hold a JSON object")
    return value
