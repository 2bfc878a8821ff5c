"""``reft-export export --format pyreft``: an adapter as the folder that pyreft's ``ReftModel.save`` writes.

The classes, names and tensors are those of the table in pyreft_states. Untied adapters become two interventions a
site: all prefixes, then all suffixes, as pyreft's train script orders them. ``reft_export.json`` holds what pyreft's format has no
place for (positions, truncate, share_weights, act_fn, dropout, add_bias); pyreft ignores it, and the import reads it. ``truncate``:
whether the positions of a short prompt are cut, as pyreft itself always does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reft_export.base.load import outline_base
from reft_export.importing.foreign import Report
from reft_export.importing.pyreft.entries import CONFIG_FILE
from reft_export.importing.pyreft.read import FORMAT, SIDE_FILE
from reft_export.importing.pyreft.states import CLASSES
from runtimes.edits.adapter import Adapter, load_adapter
from runtimes.edits.edit import Site
from runtimes.edits.methods import METHODS, Values
from runtimes.edits.same_base import require_same
from runtimes.errors import AdapterError, InputError
from runtimes.files.folders import atomic_folder, claimed, name_of

ORTHONORMAL = 1e-4
"""How far rows kept orthonormal in float32 may be from it: |R R^T - I|, largest entry."""

NOT_LOADED = ("NoreftIntervention", "NodireftIntervention")
"""Classes that want an add_bias, which ``ReftModel.load`` does not give them."""


@dataclass(frozen=True, kw_only=True)
class PyreftExport:
    interventions: int
    kinds: tuple[str, ...]
    """The classes, each once."""
    notes: tuple[str, ...]
    """What pyreft must be told, or cannot do."""


def export_to_pyreft(
    model: str, folder: Path, output: Path, *, accept_base: bool = False, force: bool = False, report: Report = print
) -> PyreftExport:
    """Writes ``output``, atomically; the adapter's base is checked against ``model``, as every export does."""
    with claimed(output, force=force, inputs=[Path(model), folder]):
        adapter = load_adapter(folder)
        report(f"reading {model}")
        outline = outline_base(model)
        require_same(
            f"adapter {name_of(folder)} was trained on",
            adapter.base,
            "this base is",
            outline.info,
            "pass the base it was trained on",
            former=outline.former_fingerprint,
            accept=accept_base,
        )
        base = outline.info
        if base.labels:
            raise InputError(
                f"{base.name} is an encoder, and pyvene knows no layer components of encoders, which the pyreft format writes; only "
                "adapters of decoders are exported to it"
            )
        if adapter.rules:
            raise AdapterError(f"pyreft has one rule of positions, and this adapter has {adapter.where}; it cannot be exported to pyreft")
        classes = {site: _class_of(adapter, site) for site in adapter.sites}
        activation = _activation(adapter)
        keys = [(site, group) for group in adapter.groups for site in adapter.sites]
        places = [f"layer_{site.layer}_comp_{site.stream}_unit_pos_nunit_1#{adapter.groups.index(group)}" for site, group in keys]
        with atomic_folder(output, force=force) as work:
            for (site, group), place in zip(keys, places, strict=True):
                method = adapter.form(site).method
                state = _state(classes[site], method, adapter.parameters(site, group), add_bias=_add_bias(adapter))
                torch.save(state, work / f"intkey_{place}.bin")
            config = {
                "intervention_constant_sources": [True] * len(keys),
                "intervention_dimensions": [adapter.base.hidden_size] * len(keys),
                "intervention_types": [f"<class 'pyreft.interventions.{classes[site]}'>" for site, _ in keys],
                "mode": "parallel",
                "representations": [[site.layer, site.stream, "pos", 1, adapter.form(site).rank, *[None] * 9] for site, _ in keys],
                "sorted_keys": places,
            }
            for name, content in ((CONFIG_FILE, config), (SIDE_FILE, _side(adapter, activation))):
                (work / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        kinds = tuple(dict.fromkeys(classes.values()))
        return PyreftExport(interventions=len(keys), kinds=kinds, notes=_notes(adapter, activation, kinds))


def _side(adapter: Adapter, activation: str) -> dict[str, object]:
    """What pyreft does not record."""
    return {
        "positions": str(adapter.positions),
        "truncate": adapter.positions.truncate,
        "share_weights": adapter.tied,
        "act_fn": activation or "none",
        "dropout": adapter.dropout,
        "add_bias": _add_bias(adapter),
    }


def _class_of(adapter: Adapter, site: Site) -> str:
    """The class an import came from; for DiReFT of our own, Nodireft: its W2 is free, as ours is. pyreft has none for RED."""
    method = adapter.form(site).method
    if method not in CLASSES.values():
        trained = " and ".join(METHODS[method].names)
        raise AdapterError(f"pyreft has no intervention for {method} ({trained}) at {site}; it cannot be exported to pyreft")
    recorded = adapter.training.get("class") if adapter.training.get("imported_from") == FORMAT else None
    kinds = [kind for kind, of in CLASSES.items() if of == method]
    kind = recorded if recorded in kinds else kinds[-1]
    projection = METHODS[method].role("projection")
    orthonormal = all(_orthonormal(adapter.parameters(site, group)[projection.name]) for group in adapter.groups)
    if kind == "DireftIntervention" and not orthonormal:
        return "NodireftIntervention"  # refitted since: its class would keep W2 orthonormal
    if projection.initial == "orthonormal" and not orthonormal:
        raise AdapterError(
            f"{projection.name} of this {method} is not orthonormal, as pyreft's {kind} keeps it; it cannot be exported to pyreft"
        )
    return kind


def _activation(adapter: Adapter) -> str:
    """pyreft has one act_fn for all interventions that have any; raises AdapterError where sites differ."""
    found = {form.activation for form in adapter.site_forms.values() if METHODS[form.method].activated}
    if len(found) > 1:
        names = " and ".join(name or "none" for name in sorted(found))
        raise AdapterError(f"pyreft has one act_fn, and sites of this adapter have {names}; it cannot be exported to pyreft")
    return next(iter(found), "")


def _orthonormal(R: np.ndarray) -> bool:
    wide = R.astype(np.float64)
    return bool(np.abs(wide @ wide.T - np.eye(len(R))).max() <= ORTHONORMAL)


def _add_bias(adapter: Adapter) -> bool | None:
    """Whether NoReFT's projection has a bias; None for classes that have no such choice."""
    methods = {form.method for form in adapter.site_forms.values()}
    if "noreft" in methods:
        return any(bias.any() for name, bias in adapter.tensors.items() if name.endswith(".p"))
    return False if "direft" in methods else None


def _state(kind: str, method: str, parameters: Values, *, add_bias: bool | None) -> dict[str, Tensor]:
    """One intervention's state dict, under the names and in the layouts that its class saves."""
    x = {p.role: torch.from_numpy(parameters[p.name].copy()) for p in METHODS[method].parameters}
    if kind == "LoreftIntervention":
        return {"weight": x["source"], "bias": x["bias"], "rotate_layer": x["projection"].T.contiguous()}
    width = torch.tensor(x["projection"].shape[1])
    state = {"embed_dim": width, "interchange_dim": width.clone()}
    if kind in ("NoreftIntervention", "NodireftIntervention"):
        state["proj_layer.weight"] = x["projection"]
        if add_bias:
            state["proj_layer.bias"] = x.get("offset", torch.zeros(len(x["projection"])))  # beside a NoReFT that has one
    if METHODS[method].role("source").axes == ("r",):
        state["learned_source"] = x["source"]
    else:
        state |= {"learned_source.weight": x["source"], "learned_source.bias": x["bias"]}
    if kind in ("DireftIntervention", "ConsreftIntervention", "LobireftIntervention"):
        original, base = _raw(x["projection"])
        state |= {"rotate_layer.parametrizations.weight.original": original, "rotate_layer.parametrizations.weight.0.base": base}
    return state


def _raw(R: Tensor) -> tuple[Tensor, Tensor]:
    """original [d, r] and base [d, d] of torch's orthogonal parametrization, with base @ H(original) = R^T to the bit.

    As torch makes them: original is -I, so that H(original) is the first r columns of I, and base is R^T completed to an orthonormal
    basis of all d dimensions. A square weight is base @ expm(0).
    """
    rank, width = R.shape
    basis = torch.linalg.qr(R.T.double(), mode="complete")[0].float()
    base = torch.cat([R.T, basis[:, rank:]], dim=1).contiguous()
    original = torch.zeros(width, rank)
    original.fill_diagonal_(-1.0)
    return original, base


def _notes(adapter: Adapter, activation: str, kinds: Sequence[str]) -> tuple[str, ...]:
    say = [
        f"tell pyreft what its format does not record: get_intervention_locations(positions={str(adapter.positions)!r}, "
        f"share_weights={adapter.tied}, num_interventions={len(adapter.sites) * len(adapter.groups)}, ...)"
        + (f", act_fn={activation!r}" if activation else "")
        + (f", add_bias={_add_bias(adapter)}" if _add_bias(adapter) is not None else "")
    ]
    if adapter.positions.prompt or adapter.positions.everywhere or adapter.positions.explicit:
        say.append(f"pyreft has no name for positions {adapter.positions}: pass the locations yourself")
    elif not adapter.positions.truncate:
        say.append("pyreft cuts first and last positions to half of a short prompt; this adapter was not trained so")
    if unbuilt := [kind for kind in kinds if kind in NOT_LOADED]:
        say.append(f"ReftModel.load of pyreft 0.1.0 cannot build a {unbuilt[0]}: build it with get_reft_model, and load the intkey files")
    else:
        say.append("ReftModel.load of pyreft 0.1.0 rounds learned sources to bfloat16: make them float(), and load the intkey files")
    return tuple(say)
