"""RED, a scale and a bias per channel: the authors' delta_vector.pth, and plain vectors in .npz or .safetensors.

    y = scale * h + bias        scale, bias: [D] or [1, D]

What a file's tensors mean follows from their names:

    <module>.delta_vector.activation_scaling, .activation_bias        the authors' (github.com/mlwu22/RED): <module> is a path in the
                                                                      model, and the edit acts on what that module returns
    <n>.<stream>.scale, .bias                                         that stream of block n
    <n>.scale, .bias                                                  block n, the stream that --stream names
    scale, bias     [D]                                               --stream of every layer of --layers
                    [layers, D]                                       --stream of every layer, row n for block n

<n> may be layer_<n>, layers.<n> or model.layers.<n> too, and scale may be scaling; alone, the two may carry the authors' names
(activation_scaling, activation_bias), with or without delta_vector.

The authors' code edits every token, prompt or generated; a plain file does not say which. Their variants with a scale or a bias alone,
and with a LayerNorm behind the edit, are refused: the first may as well be a file that lost its other half.

Source: model.py there, ActivationLayer.forward and get_save_dict; Wu et al. 2024, "Advancing Parameter Efficiency in Fine-tuning via
Representation Editing".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from reft_export.base.load import Outline
from reft_export.importing.foreign import (
    POSITION_CHOICES,
    ForeignAdapter,
    ForeignEdit,
    Request,
    activation_of,
    not_recorded,
    of_chosen_layers,
)
from reft_export.importing.pyreft.sites import ComponentSites
from reft_export.importing.statements import SCALES_AND_SHIFTS, Meaning, Statements, check_statements
from reft_export.importing.tensors import read_pickle, stored_dtype, vector_float32
from reft_export.training.edits import parse_layers
from runtimes.edits.edit import STREAMS, Site
from runtimes.edits.positions import PositionRule
from runtimes.errors import AdapterError, InputError
from runtimes.files.folders import name_of

FORMAT = "red"
PARAMETER = {"scale": "scale", "scaling": "scale", "activation_scaling": "scale", "bias": "bias", "activation_bias": "bias"}
"""Our name for a tensor's last word."""
OTHER = {"scale": "bias", "bias": "scale"}
ALONE = {prefix + name: parameter for name, parameter in PARAMETER.items() for prefix in ("", "delta_vector.")}
AUTHORS = re.compile(r"(.+)\.delta_vector\.(activation_scaling|activation_bias)")
WRAPPER = "base_model."
"""What the authors' wrapper of the model puts before its paths."""
NAMED = re.compile(rf"(?:(?:model\.)?layers?[._])?(\d{{1,40}})(?:[._]({'|'.join(STREAMS)}))?[._](scale|scaling|bias)")

Value = Tensor | np.ndarray
Pairs = dict[Site, dict[str, tuple[str, Value]]]
"""Per site, by parameter: what the file calls it, and its value."""


def read_red(path: Path, request: Request, outline: Outline) -> ForeignAdapter:
    """The authors' delta_vector.pth, a state dict that ``torch.save`` wrote, under any name."""
    return red_adapter(FORMAT, path, read_pickle(path), request, outline, {})


def is_red(names: list[str]) -> bool:
    """Whether a file with these arrays is RED's, rather than one of steering vectors."""
    return any(name in ALONE or AUTHORS.fullmatch(name) or re.split(r"[._]", name)[-1] in ("scale", "scaling", "bias") for name in names)


def red_adapter(
    format: str, path: Path, tensors: Mapping[str, Value], request: Request, outline: Outline, statements: Statements
) -> ForeignAdapter:
    """``statements``: what the file says beside its tensors.

    Raises InputError for what it does not record and no flag says, AdapterError for what cannot be imported.
    """
    request.refuse("RED", {"scale": "an edit has no strength to scale"})
    if request.method not in (None, "red") or request.tied is False or activation_of(request.activation or "", "--activation"):
        raise InputError("RED is one scale and bias a site: --method, --untied and --activation do not apply to it")
    if not tensors:
        raise AdapterError(f"{path} holds no arrays")
    stored = _pairs(path, tensors, request, outline)
    _check_pairs(path, stored)
    pairs = of_chosen_layers(path, stored, request, outline, what="scale and bias", made="the adapter was trained on")
    positions = PositionRule.parse(request.positions or "all")
    meaning = Meaning(
        does="scales and shifts with a scale and a bias",
        operations=SCALES_AND_SHIFTS,
        sites=frozenset(pairs),
        stored=len(stored),
        positions=positions,
        scale=None,
        scalable=False,
    )
    notes = check_statements(path, statements, meaning, outline)
    first = next(iter(next(iter(pairs.values())).values()))[1]
    return ForeignAdapter(
        format=format,
        edits={site: ((_edit(path, pair),),) for site, pair in pairs.items()},
        positions=positions,
        tied=True,
        dtype=stored_dtype(first) if isinstance(first, Tensor) else "float32",
        record={"imported_from": format, "source": name_of(path), "form": "red"},
        notes=notes,
    )


def _pairs(path: Path, tensors: Mapping[str, Value], request: Request, outline: Outline) -> Pairs:
    """By which of the ways of naming tensors the file follows."""
    if any(AUTHORS.fullmatch(name) for name in tensors):
        pairs = _of_modules(path, tensors, outline)
        if request.stream is not None:
            raise InputError(f"--stream {request.stream} does not apply to {path}, which names the module of every edit")
        return pairs
    return _of_one_pair(path, tensors, request, outline) if set(tensors) <= set(ALONE) else _of_layers(path, tensors, request)


def _of_modules(path: Path, tensors: Mapping[str, Value], outline: Outline) -> Pairs:
    sites, pairs = ComponentSites(outline.model), Pairs()
    for name, value in tensors.items():
        if "activation_ln" in name:
            raise AdapterError(f"{path}: {name} belongs to a LayerNorm behind the edit, which is no scale and bias; train without it")
        match = AUTHORS.fullmatch(name)
        if not match:
            raise AdapterError(f"{path}: {name} is none of RED's tensors, which end in delta_vector.activation_scaling or .activation_bias")
        try:
            site = _site(sites, re.sub(r"\.(\d{1,40})(?=\.|$)", r"[\1]", match[1]) + ".output")
        except AdapterError as e:
            raise AdapterError(f"{path}: {name} in {outline.info.name}: {e}") from None
        _put(path, pairs, site, PARAMETER[match[2]], name, value)
    return pairs


def _site(sites: ComponentSites, component: str) -> Site:
    """PEFT's prefix, base_model.model., begins with the one of the authors' wrapper: the whole path is tried first."""
    try:
        return sites.of_component(component, None).site
    except AdapterError:
        return sites.of_component(component.removeprefix(WRAPPER), None).site


def _of_layers(path: Path, tensors: Mapping[str, Value], request: Request) -> Pairs:
    pairs, named = Pairs(), {name: match for name in tensors if (match := NAMED.fullmatch(name))}
    if strange := [name for name in tensors if name not in named]:
        raise AdapterError(f"{path}: {strange[0]!r} is no scale or bias of a layer; name them <n>.<stream>.scale and <n>.<stream>.bias")
    stream = _ask(request, stream=not all(match[2] for match in named.values()))
    for name, match in named.items():
        if match[2] and request.stream not in (None, match[2]):
            raise InputError(f"--stream {request.stream} contradicts {path}, which holds {name}")
        site = Site(layer=int(match[1]), stream=match[2] or stream)
        _put(path, pairs, site, PARAMETER[match[3]], name, tensors[name])
    return pairs


def _of_one_pair(path: Path, tensors: Mapping[str, Value], request: Request, outline: Outline) -> Pairs:
    """One scale and one bias: of all layers in rows, or of one layer, for those of --layers."""
    layers, pairs = outline.info.num_hidden_layers, Pairs()
    rows = any(len(value.shape) == 2 and value.shape[0] != 1 for value in tensors.values())
    stream = _ask(request, stream=True, layers=None if rows else layers)
    for name, value in tensors.items():
        if rows and (len(value.shape) != 2 or value.shape[0] != layers):
            got = list(value.shape)
            raise AdapterError(f"{path}: {name} has shape {got}, expected a row for each of {outline.info.name}'s {layers} layers")
        for layer in range(layers) if rows else parse_layers(request.layers or "", layers):
            site = Site(layer=layer, stream=stream)
            _put(path, pairs, site, ALONE[name], f"{name}[{layer}]" if rows else name, value[layer] if rows else value)
    return pairs


def _ask(request: Request, *, stream: bool, layers: int | None = None) -> str:
    """The stream that --stream names, "" where none has to be; ``layers``: how many there are, where the file names none.

    Raises InputError naming all that the file does not record and no flag says.
    """
    missing = {"positions": f"--positions ({POSITION_CHOICES})"} if request.positions is None else {}
    if stream and request.stream is None:
        missing["the stream"] = f"--stream ({', '.join(STREAMS)})"
    if layers is not None and request.layers is None:
        missing["its layers"] = f"--layers (0 to {layers - 1}; 3, 8-16 or 3;9)"
    if missing:
        raise not_recorded("a file of scales and biases", missing)
    return request.stream or ""


def _put(path: Path, pairs: Pairs, site: Site, parameter: str, name: str, value: Value) -> None:
    pair = pairs.setdefault(site, {})
    if parameter in pair:
        raise AdapterError(f"{path}: {name} and {pair[parameter][0]} are both the {parameter} of {site}")
    pair[parameter] = (name, value)


def _check_pairs(path: Path, pairs: Pairs) -> None:
    for site, pair in pairs.items():
        if len(pair) == 1:
            (has,) = pair
            lacks, neutral = OTHER[has], "ones" if OTHER[has] == "scale" else "zeros"
            raise AdapterError(
                f"{path}: {pair[has][0]} has no {lacks} beside it ({site}); where the edit is a {has} alone, store {neutral} as its {lacks}"
            )


def _edit(path: Path, pair: Mapping[str, tuple[str, Value]]) -> ForeignEdit:
    """Both vectors as [D]; the authors store [1, D]."""
    parameters = {}
    for parameter, (name, value) in pair.items():
        parameters[parameter] = vector_float32(value, "D", f"{path}: {name}")
    if parameters["scale"].shape != parameters["bias"].shape:
        sizes = ", ".join(f"{name} {list(parameters[parameter].shape)}" for parameter, (name, _) in pair.items())
        raise AdapterError(f"{path}: {sizes}; a scale and its bias are of one length")
    return ForeignEdit(name=pair["scale"][0], method="red", parameters=parameters)
