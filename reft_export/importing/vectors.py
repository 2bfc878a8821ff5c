"""Steering vectors: GGUF control vectors, and plain ones in .npz or .safetensors. Each is y = h + scale * v, a rank-1 lobireft.

R = v / |v| and s = scale * |v|, so that R is the orthonormal row which lobireft trains.

What a plain file's arrays mean follows from their names and shapes:

    <n>, layer_<n>, layers.<n>, model.layers.<n>, direction.<n>, each also with .<stream>        [D]: the vector of block n's output
    one array of any other name                                                                  [D]: for every layer of --layers
                                                                                                 [layers, D]: row n for block n

[D] may be [1, D]. The stream is the block's output, or the one that --stream names. Arrays called scale and bias are RED's
(reft_export/importing/red.py); --method lobireft takes an array of such a name for a vector all the same.

Source: llama.cpp, common/common.cpp (common_control_vector_load) and src/llama-adapter.cpp (llama_adapter_cvec): ``direction.<n>``
is added to the output of block n, blocks counted from 0 and never block 0, at every token, prompt or generated.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from reft_export.base import Outline
from reft_export.importing.foreign import POSITION_CHOICES, ForeignAdapter, ForeignEdit, Request, activation_of, listed, not_recorded
from reft_export.importing.red import is_red, red_adapter
from reft_export.importing.tensors import as_float32, read_safetensors, vector_float32
from reft_export.model_folder import first_line
from reft_export.training.settings import parse_layers
from runtimes.edit import STREAMS, Site
from runtimes.errors import AdapterError, InputError
from runtimes.positions import PositionRule

NAMED = re.compile(rf"(?:model\.)?(?:layers?|direction)?[._]?(\d+)(?:[._]({'|'.join(STREAMS)}))?")

OF_ONE_LAYER = re.compile(r"(?:^|[._])(?:layers?|h|blocks?|blk|direction)[._]?(\d+)(?=[._]|$)")
"""Where a name that is not one of NAMED still says which layer it is of, as modules' names do: transformer.h.1, layers.1.output."""


def read_gguf(path: Path, request: Request, outline: Outline) -> ForeignAdapter:
    """llama.cpp's semantics: every token, unless --positions says otherwise; --layers is its --control-vector-layer-range."""
    request.refuse("GGUF", {"stream": "llama.cpp adds a control vector to the block's output"})
    from gguf import GGMLQuantizationType, GGUFReader

    try:
        reader = GGUFReader(path)
        tensors = {tensor.name: (tensor.tensor_type, np.array(tensor.data)) for tensor in reader.tensors}
        hint = reader.get_field("controlvector.model_hint")
        hint = None if hint is None else bytes(hint.parts[-1]).decode(errors="replace")
    except Exception as e:  # the reader raises value, index, key, overflow and memory errors for damaged files
        raise AdapterError(f"{path} is damaged, or not GGUF ({first_line(e)})") from None
    if not tensors:
        raise AdapterError(f"{path} holds no direction.<layer> tensors; it is no control vector")
    vectors: dict[Site, tuple[str, np.ndarray]] = {}
    for name, (kind, value) in tensors.items():
        match = re.fullmatch(r"direction\.(\d+)", name)
        if not match:
            raise AdapterError(f"{path} holds {name}; a control vector holds direction.<layer> tensors and nothing else")
        if int(match[1]) == 0:
            raise AdapterError(f"{path} holds {name}; llama.cpp numbers control vectors from layer 1")
        if kind != GGMLQuantizationType.F32:
            raise AdapterError(f"{path}: {name} is {kind.name}; control vectors are F32")
        _put(path, vectors, Site(layer=int(match[1])), name, value)
    positions = PositionRule.parse(request.positions or "all")
    return _adapter("gguf", path, vectors, positions, request, outline, {} if hint is None else {"model_hint": hint})


def read_vectors(path: Path, request: Request, outline: Outline) -> ForeignAdapter:
    """A .npz or .safetensors file; where the vectors act is the user's to say."""
    format, arrays = _arrays(path)
    if request.method == "red" or (request.method is None and is_red(list(arrays))):
        return red_adapter(format, path, arrays, request, outline)
    named = {name: NAMED.fullmatch(name) for name in arrays}
    if all(named.values()):
        vectors: dict[Site, tuple[str, np.ndarray]] = {}
        for name, match in named.items():
            if match[2] and request.stream not in (None, match[2]):
                raise InputError(f"--stream {request.stream} contradicts {path}, which holds {name}")
            site = Site(layer=int(match[1]), stream=match[2] or _stream(request))
            _put(path, vectors, site, name, arrays[name])
    elif len(arrays) == 1:
        vectors = _one_array(path, *next(iter(arrays.items())), request, outline)
    else:
        name = next(name for name, match in named.items() if not match)
        raise AdapterError(f"{path}: {name!r} does not name a layer; name arrays <n>, layer_<n> or <n>.<stream>, or store one alone")
    if request.positions is None:
        raise not_recorded("a steering vector", {"positions": f"--positions ({POSITION_CHOICES})"})
    return _adapter(format, path, vectors, PositionRule.parse(request.positions), request, outline, {})


def read_red_arrays(path: Path, request: Request, outline: Outline) -> ForeignAdapter:
    """A .npz or .safetensors file that is said to be RED's, whatever its arrays are called."""
    format, arrays = _arrays(path)
    return red_adapter(format, path, arrays, request, outline)


def _arrays(path: Path) -> tuple[str, Mapping[str, np.ndarray | Tensor]]:
    """The file's format, by its suffix, and its arrays."""
    format = "npz" if path.suffix == ".npz" else "safetensors"
    arrays = _npz(path) if format == "npz" else read_safetensors(path)
    if not arrays:
        raise AdapterError(f"{path} holds no arrays")
    return format, arrays


def _put(path: Path, vectors: dict[Site, tuple[str, np.ndarray]], site: Site, name: str, value: np.ndarray | Tensor) -> None:
    if site in vectors:
        raise AdapterError(f"{path}: {name} and {vectors[site][0]} are both the vector of {site}; keep one")
    vectors[site] = (name, vector_float32(value, "D", f"{path}: {name}"))


def _npz(path: Path) -> dict[str, np.ndarray]:
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.ndarray):
            with file:
                return dict(file)
    except (ValueError, OSError, EOFError, KeyError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error) as e:
        raise AdapterError(f"{path} is damaged, or holds more than numbers ({first_line(e)}); it was not loaded") from None
    raise AdapterError(f"{path} is one array, as np.save writes it, expected an archive of named ones; write it with np.savez")


def _one_array(path: Path, name: str, value: np.ndarray, request: Request, outline: Outline) -> dict[Site, tuple[str, np.ndarray]]:
    layers, width = outline.info.num_hidden_layers, outline.info.hidden_size
    # A row alone is a vector, but in a base of one layer it is that layer's.
    if len(value.shape) == 1 or (len(value.shape) == 2 and value.shape[0] == 1 != layers):
        if request.layers is None:
            raise not_recorded("a single steering vector", {"its layers": f"--layers (0 to {layers - 1}; 3, 8-16 or 3;9)"})
        chosen = parse_layers(request.layers, layers)
        if (number := OF_ONE_LAYER.search(name)) and chosen != (int(number[1]),):
            raise InputError(
                f"--layers {request.layers} contradicts {path}, whose array {name!r} seems to be layer {number[1]}'s; name it vector to "
                "use it there all the same"
            )
        vector = vector_float32(value, width, f"{path}: {name}")
        return {Site(layer=layer, stream=_stream(request)): (name, vector) for layer in chosen}
    if len(value.shape) == 2 and value.shape[0] == layers + 1:
        raise AdapterError(
            f"{path}: {name} has {layers + 1} rows for {layers} layers: with the embedding's row first, as hidden_states have it? leave "
            "that row out, or name the vectors by layer"
        )
    rows = as_float32(value, (layers, width), f"{path}: {name}")
    stream = _stream(request)
    return {Site(layer=layer, stream=stream): (f"{name}[{layer}]", np.ascontiguousarray(row)) for layer, row in enumerate(rows)}


def _stream(request: Request) -> str:
    return request.stream or "block_output"


def _adapter(
    format: str,
    path: Path,
    vectors: Mapping[Site, tuple[str, np.ndarray]],
    positions: PositionRule,
    request: Request,
    outline: Outline,
    record: Mapping[str, str],
) -> ForeignAdapter:
    scale = 1.0 if request.scale is None else request.scale
    if not np.isfinite(scale) or scale == 0:
        raise InputError(f"--scale {scale} is not a strength; use a number other than 0 (negative steers the other way)")
    if request.method not in (None, "lobireft") or request.tied is False or activation_of(request.activation or "", "--activation"):
        raise InputError("a steering vector is added as it is: --method, --untied and --activation do not apply to it")
    count = outline.info.num_hidden_layers
    if outside := [site.layer for site in vectors if site.layer >= count]:
        raise AdapterError(
            f"{path}: layer {max(outside)} does not exist in {outline.info.name} ({count} layers, 0 to {count - 1}); pass the base that "
            "the vectors were made for"
        )
    if request.layers is not None:
        chosen = set(parse_layers(request.layers, count))
        if absent := chosen - {site.layer for site in vectors}:
            raise InputError(f"--layers {request.layers}: the file has no vector for layer {listed(sorted(absent))}")
        vectors = {site: value for site, value in vectors.items() if site.layer in chosen}
    edits = {site: ((_edit(name, vector, scale),),) for site, (name, vector) in vectors.items() if vector.any()}
    if not edits:
        raise AdapterError(f"{path}: every vector is zero; this adapter edits nothing")
    idle = len(vectors) - len(edits)
    return ForeignAdapter(
        format=format,
        edits=edits,
        positions=positions,
        tied=True,
        record={"imported_from": format, "source": path.resolve().name, "scale": scale, **record},
        notes=(f"{idle} vectors are zero and were left out",) if idle else (),
    )


def _edit(name: str, vector: np.ndarray, scale: float) -> ForeignEdit:
    """R [1, D] and s [1] with R^T s = scale * vector, in float64 and rounded once."""
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    R, s = (vector[None].astype(np.float64) / norm).astype(np.float32), np.array([scale * norm], np.float64)
    if abs(s[0]) > np.finfo(np.float32).max:
        raise AdapterError(f"{name} times --scale {scale} exceeds float32")
    return ForeignEdit(name=name, method="lobireft", parameters={"R": R, "s": s.astype(np.float32)})
