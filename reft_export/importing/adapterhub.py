"""AdapterHub ``adapters`` folders: adapter_config.json and pytorch_adapter.bin or adapter.safetensors.

    y = h + P^T (act(W h + b) - P h)       W = learned_source.weight [r, d], b = .bias [r], P = projection.weight [r, d]

P is stored raw where it is kept orthonormal (tensors.orthogonal): LoReFT; else as it is: NoReFT, and DiReFT, which leaves out
"- P h" and saves the same config: the library does not write subtract_projection, but reads it. Units: one when weights are tied, else
one for the prefix and one for the suffix.

The first ``prefix_positions`` and last ``suffix_positions`` tokens are edited, both from the original h, and the suffix wins where
they overlap: PositionRule with truncate off. AdapterHub counts them in whatever sequence it is given, this project in the prompt.

Source: adapters/methods/reft.py; adapters/configuration/adapter_config.py, ReftConfig.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reft_export.base.load import Outline
from reft_export.base.model_folder import weight_files
from reft_export.importing.foreign import ForeignAdapter, ForeignEdit, Request, activation_of, listed, not_recorded, short
from reft_export.importing.heads import HEAD_CONFIG_FILE, check_labels, head_of, read_head_config
from reft_export.importing.tensors import as_float32, orthogonal, read_pickle, read_safetensors, stored_dtype
from runtimes.edits.edit import Site
from runtimes.edits.positions import PositionRule
from runtimes.errors import AdapterError, InputError
from runtimes.files.folders import name_of
from runtimes.files.records import read_json_object

FORMAT = "adapterhub"
CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD_FILES = ("model_head.safetensors", "pytorch_model_head.bin")

UNIT = re.compile(r"(?:.+\.)?(\d{1,40})\.reft_layer\.refts\.([^.]+)\.units\.([01])\.(.+)")
KNOWN = {"layers", "prefix_positions", "suffix_positions", "r", "orthogonality", "tied_weights", "subtract_projection", "dropout",
         "non_linearity", "architecture", "output_reft", "dtype", "init_weights_seed", "version"}  # fmt: skip
"""Keys of ReftConfig in adapters 1.0 to 1.3. output_reft is read by none of them, dtype and init_weights_seed where weights are made."""

RAW = "projection.parametrizations.weight"


def read_adapterhub(folder: Path, request: Request, outline: Outline) -> ForeignAdapter:
    """Raises InputError for flags that contradict the config, AdapterError for what cannot be imported."""
    reasons = {"layers": "the files say which layers are edited", "stream": "its edits act on the block's output"}
    request.refuse("AdapterHub", {**reasons, "scale": "an edit has no strength to scale"})
    top, config = _read_config(folder, outline)
    tied = config["tied_weights"] or not (config["prefix_positions"] and config["suffix_positions"])
    rule = _positions(config, folder)
    activation = activation_of(config["non_linearity"] or "", f"{folder / CONFIG_FILE}: non_linearity")
    _check_flags(request, rule, tied, activation)
    method = _method(request.method, config["orthogonality"], config.get("subtract_projection"))
    units, name = _units(folder)
    if top.get("name") not in (None, name):
        raise AdapterError(
            f"{folder / CONFIG_FILE}: name is {short(top['name'])}, expected {name!r}, which the tensors bear; AdapterHub would load none "
            "of them: save the adapter again, or correct the name"
        )
    _check_units(units, config, folder)
    # An untied adapter keeps two units even where one of them has no positions.
    wanted = (0, 1) if not tied else (0,) if config["tied_weights"] or config["prefix_positions"] else (1,)
    layers = _layers(units, config["layers"], outline)
    edits = {Site(layer=layer): tuple((_edit(units, layer, unit, method, config["orthogonality"]),) for unit in wanted) for layer in layers}
    head = _head(folder, outline, name)
    return ForeignAdapter(
        format=FORMAT,
        edits=edits,
        positions=rule,
        tied=tied,
        activation=activation,
        dropout=config["dropout"],
        dtype=stored_dtype(next(iter(units.values()))["learned_source.weight"]),
        record={"imported_from": FORMAT, "source": name_of(folder), "name": name, "version": str(top.get("version", "unknown"))},
        notes=_notes(outline, config["suffix_positions"], head),
        head=head,
    )


def _notes(outline: Outline, last: int, head: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    if outline.info.labels:
        return () if head else (f"no prediction head lies beside the adapter: it is used with {outline.info.name}'s own",)
    if not last:
        return ()
    return (
        f"AdapterHub edits the last {last} of all tokens it is given, generated ones too; here the last {last} of the prompt are edited: "
        "a prompt's logits agree, text generated from it may not",
    )


def _read_config(folder: Path, outline: Outline) -> tuple[dict[str, Any], dict[str, Any]]:
    """The file, and its ReFT part with every key of the right type."""
    path = folder / CONFIG_FILE
    top = read_json_object(path)
    config = top.get("config")
    if "peft_type" in top:
        raise AdapterError(f"{path} is PEFT's ({top['peft_type']}); it is not a ReFT: merge it into the base with merge_and_unload()")
    if not isinstance(config, dict) or config.get("architecture") != "reft":
        kind = config.get("architecture") if isinstance(config, dict) else config
        raise AdapterError(f"{path}: architecture {kind!r} is not reft; only ReFT adapters can be imported")
    if unknown := sorted(set(config) - KNOWN):
        raise AdapterError(f"{path}: {listed(unknown)} is none of the keys of a ReftConfig, so what it changes is unknown")
    _check_types(path, config)
    _check_base(top, path, outline)
    return top, config | {"dropout": float(config.get("dropout", 0.0)), "non_linearity": config.get("non_linearity")}


def _check_types(path: Path, config: Mapping[str, Any]) -> None:
    types = {"prefix_positions": int, "suffix_positions": int, "r": int, "orthogonality": bool, "tied_weights": bool}
    for name, kind in types.items():
        value = config.get(name)
        if not isinstance(value, int) or not isinstance(value, kind) or (kind is int and isinstance(value, bool)) or value < 0:
            raise AdapterError(f"{path}: {name} is {value!r}, expected {kind.__name__}")
    if "subtract_projection" in config and not isinstance(config["subtract_projection"], bool):
        raise AdapterError(f"{path}: subtract_projection is {short(config['subtract_projection'])}, expected bool")
    layers, dropout, function = config.get("layers"), config.get("dropout", 0.0), config.get("non_linearity")
    if layers != "all" and not (isinstance(layers, list) and layers and all(type(n) is int for n in layers)):
        raise AdapterError(f'{path}: layers is {layers!r}, expected "all" or a list of numbers')
    if not isinstance(dropout, (int, float)) or isinstance(dropout, bool) or not (function is None or isinstance(function, str)):
        raise AdapterError(f"{path}: dropout is {dropout!r} and non_linearity {function!r}; a number and a name or null are expected")


def _check_base(recorded: Mapping[str, Any], path: Path, outline: Outline) -> None:
    """Raises AdapterError where the file records a base of another width or model type."""
    if recorded.get("hidden_size", outline.info.hidden_size) != outline.info.hidden_size:
        raise AdapterError(
            f"{path}: the adapter was trained on {recorded.get('model_name')} of width {recorded['hidden_size']}, {outline.info.name} has "
            f"width {outline.info.hidden_size}; pass the base it was trained on"
        )
    if recorded.get("model_type", outline.model.config.model_type) != outline.model.config.model_type:
        raise AdapterError(
            f"{path}: the adapter was trained on {recorded.get('model_name')}, a {recorded['model_type']}; {outline.info.name} is a "
            f"{outline.model.config.model_type}; pass the base it was trained on"
        )


def _positions(config: Mapping[str, Any], folder: Path) -> PositionRule:
    if not config["prefix_positions"] and not config["suffix_positions"]:
        raise AdapterError(f"{folder / CONFIG_FILE}: no prefix and no suffix positions; this adapter edits nothing")
    return PositionRule(first=config["prefix_positions"], last=config["suffix_positions"], truncate=False)


def _check_flags(request: Request, rule: PositionRule, tied: bool, activation: str) -> None:
    """AdapterHub records these; a flag may repeat what it says."""
    if request.positions is not None and str(PositionRule.parse(request.positions)) != str(rule):
        raise InputError(f"--positions {request.positions} contradicts the adapter, which records {rule}")
    if request.tied is not None and request.tied != tied and rule.first and rule.last:
        raise InputError(f"--{'tied' if request.tied else 'untied'} contradicts the adapter, which records tied_weights {tied}")
    if request.activation is not None and activation_of(request.activation, "--activation") != activation:
        raise InputError(f"--activation {request.activation} contradicts the adapter, which records {activation or 'none'}")


def _method(asked: str | None, orthonormal: bool, subtracts: bool | None) -> str:
    """LoReFT is told by its orthonormal projection; NoReFT and DiReFT save the same config, where it lacks subtract_projection."""
    known = ("loreft" if orthonormal else "noreft", "direft")
    says = f"orthogonality {orthonormal}"
    if subtracts is not None:
        known, says = (known[:1] if subtracts else known[1:]), f"{says} and subtract_projection {subtracts}"
    if asked is not None and asked not in known:
        raise InputError(f"--method {asked} contradicts the adapter, which records {says}: {' or '.join(known)}")
    if len(known) == 1:
        return known[0]
    if asked is None and not orthonormal:
        raise not_recorded("AdapterHub", {"whether the projection is subtracted": "--method noreft (it is) or --method direft (it is not)"})
    return asked or "loreft"


def _units(folder: Path) -> tuple[dict[tuple[int, int], dict[str, Tensor]], str]:
    """The tensors of every (layer, unit), and the adapter's name; other kinds of adapter are refused."""
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), folder / WEIGHT_FILES[1])
    state = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    units: dict[tuple[int, int], dict[str, Tensor]] = {}
    names = set()
    for key, value in state.items():
        match = UNIT.fullmatch(key)
        if not match:
            raise AdapterError(f"{path} holds {key}, which is no part of a ReFT")
        units.setdefault((int(match[1]), int(match[3])), {})[match[4]] = value
        names.add(match[2])
    if len(names) != 1:
        raise AdapterError(f"{path} holds {len(names)} adapters ({', '.join(sorted(names)) or 'none'}); one is expected")
    return units, names.pop()


def _check_units(units: Mapping[tuple[int, int], Mapping[str, Tensor]], config: Mapping[str, Any], folder: Path) -> None:
    """Raises AdapterError where the config records another rank than the tensors have, or one unit where there are two."""
    for (layer, unit), state in units.items():
        if unit and config["tied_weights"]:
            raise AdapterError(f"{folder / CONFIG_FILE}: tied_weights is True, but layer {layer} has a second unit; the adapter is damaged")
        shape = list(state["learned_source.weight"].shape) if "learned_source.weight" in state else []
        if len(shape) == 2 and shape[0] != config["r"]:
            raise AdapterError(
                f"{folder / CONFIG_FILE}: r is {config['r']}, expected {shape[0]}, the rank of learned_source.weight {shape} in layer "
                f"{layer}, unit {unit}; the adapter is damaged"
            )


def _layers(units: Mapping[tuple[int, int], object], recorded: str | list[int], outline: Outline) -> list[int]:
    layers = sorted({layer for layer, _ in units})
    count = outline.info.num_hidden_layers
    # AdapterHub asks each block whether it is listed: numbers that no block has, negative ones too, mean nothing to it.
    expected = list(range(count)) if isinstance(recorded, str) else sorted({layer for layer in recorded if 0 <= layer < count})
    if layers[-1] >= count or (recorded == "all" and layers != expected):
        raise AdapterError(
            f"the adapter edits layers {layers[0]} to {layers[-1]}, {outline.info.name} has {count} (0 to {count - 1}); pass the base "
            "it was trained on"
        )
    if layers != expected:
        raise AdapterError(f"the adapter's config names layers {expected}, its tensors {layers}; it is damaged")
    return layers


def _edit(units: Mapping[tuple[int, int], Mapping[str, Tensor]], layer: int, unit: int, method: str, orthonormal: bool) -> ForeignEdit:
    where = f"layer {layer}, unit {unit}"
    state = units.get((layer, unit), {})
    names = {"learned_source.weight", "learned_source.bias"}
    names |= {f"{RAW}.original", f"{RAW}.0.base"} if orthonormal else {"projection.weight"}
    if set(state) != names:
        raise AdapterError(f"{where} holds {sorted(state)}, expected {sorted(names)}; the adapter is damaged")
    W = as_float32(state["learned_source.weight"], ("r", "D"), f"{where}: learned_source.weight")
    rank, width = W.shape
    b = as_float32(state["learned_source.bias"], (rank,), f"{where}: learned_source.bias")
    if orthonormal:
        original = as_float32(state[f"{RAW}.original"], (rank, width), f"{where}: {RAW}.original")
        base = as_float32(state[f"{RAW}.0.base"], (width, width), f"{where}: {RAW}.0.base")
        P = orthogonal(original, base)
    else:
        P = as_float32(state["projection.weight"], (rank, width), f"{where}: projection.weight")
    return ForeignEdit.of_roles(where, method, projection=P, source=W, bias=b, offset=np.zeros_like(b))


def _head(folder: Path, outline: Outline, adapter: str) -> dict[str, np.ndarray]:
    """AdapterHub saves the prediction head beside the adapter: a classifier's goes into ours. A decoder's that was trained is a part of
    the base we would not have."""
    path = next((folder / name for name in HEAD_FILES if (folder / name).is_file()), None)
    if path is None:
        return {}
    head = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    if outline.info.labels:
        config = read_head_config(folder)
        _check_base(config, folder / HEAD_CONFIG_FILE, outline)
        check_labels(config, outline, folder)
        return head_of(head, outline, path, config, adapter)
    stored = {name: _stored_names(outline, name) for name in head}
    base: dict[str, Tensor] = {}
    for file in weight_files(outline.folder):
        base |= _load_named(file, {known for names in stored.values() for known in names})
    for name, value in head.items():
        own = next((base[known] for known in stored[name] if known in base), None)
        if own is None or not _equal(value, own):
            raise AdapterError(
                f"{path}: {name} differs from the head of {outline.info.name}; the adapter was trained together with its own: put that "
                "into the base, or remove the file to do without it"
            )
    return {}


def _stored_names(outline: Outline, name: str) -> list[str]:
    """What the base's files may call the parameter ``name`` of a decoder's head: it may be tied to the embedding, and held under that
    name alone, without the model's prefix where the checkpoint has no head. AdapterHub's flexible head, heads.<name>, is a copy of the
    output embedding unless it was trained."""
    parameters = dict(outline.model.named_parameters(remove_duplicate=False))
    output = outline.model.get_output_embeddings()
    own = parameters.get(name, output.weight if output is not None and name.startswith("heads.") else None)
    names = [name, *(other for other, parameter in parameters.items() if parameter is own)]
    return names + [other.removeprefix(f"{outline.model.base_model_prefix}.") for other in names]


def _equal(value: Tensor, other: Tensor) -> bool:
    dense = value.layout == torch.strided and value.is_floating_point() and not value.is_meta
    return dense and value.shape == other.shape and bool((value.float() == other.float()).all())


def _load_named(file: Path, names: set[str]) -> dict[str, Tensor]:
    if file.suffix != ".safetensors":
        return {name: value for name, value in read_pickle(file).items() if name in names}
    from safetensors import safe_open

    with safe_open(file, "pt") as f:
        return {name: f.get_tensor(name) for name in names & set(f.keys())}
