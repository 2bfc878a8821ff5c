"""Steering vectors: GGUF control vectors, and plain ones in .npz or .safetensors. Each is y = h + scale * v, a rank-1 lobireft.

R = v / |v| and s = scale * |v|, so that R is the orthonormal row which lobireft trains.

What a plain file's arrays mean follows from their names and shapes:

    <n>, layer_<n>, layers.<n>, model.layers.<n>, direction.<n>, each also with .<stream>        [D]: the vector of block n's output
    one array of any other name                                                                  [D]: for every layer of --layers
                                                                                                 [layers, D]: row n for block n

[D] may be [1, D]. The stream is the block's output, or the one that --stream names. Arrays called scale and bias are RED's
(reft_export/importing/red.py); --method lobireft takes an array of such a name for a vector all the same. GGUF's keys, the metadata of
a .safetensors file, and numbers and texts among the arrays say what the vectors are for (reft_export/importing/statements.py).

Source: llama.cpp, common/common.cpp (common_control_vector_load) and src/llama-adapter.cpp (llama_adapter_cvec): ``direction.<n>``
is added to the output of block n, blocks counted from 0 and never block 0, at every token, prompt or generated.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from reft_export.base.gguf import check_lengths, field_value
from reft_export.base.load import Outline
from reft_export.base.model_folder import first_line
from reft_export.importing.foreign import (
    POSITION_CHOICES,
    ForeignAdapter,
    ForeignEdit,
    Request,
    activation_of,
    not_recorded,
    of_chosen_layers,
    short,
)
from reft_export.importing.red import is_red, red_adapter
from reft_export.importing.statements import ADDS, Meaning, Statements, check_statements
from reft_export.importing.tensors import as_float32, read_safetensors, safetensors_metadata, vector_float32
from reft_export.training.edits import parse_layers
from runtimes.edits.edit import STREAMS, Site
from runtimes.edits.positions import PositionRule
from runtimes.errors import AdapterError, InputError
from runtimes.files.folders import name_of

if TYPE_CHECKING:
    pass

CONTROL_VECTOR = "controlvector"
"""general.architecture of llama.cpp's control vectors, and the first word of their own keys."""

DIRECTION = "direction."
"""What the names of a control vector's tensors begin with, before the layer."""

NAMED = re.compile(rf"(?:model\.)?(?:layers?|direction)?[._]?(\d{{1,40}})(?:[._]({'|'.join(STREAMS)}))?")

OF_WEIGHTS = re.compile(
    r"(^|[._])(lora|dora|ia3|oft|loha|lokr)(_\w+)?([._]|$)"
    r"|(^|[._])(rotate_layer|learned_source|projection|lm_head|embed_tokens|wte|wpe)([._]|$)"
)
"""Parts of the names of an adapter's or a model's matrices, which are no vectors to add even where their shape is one's."""

OF_ONE_LAYER = re.compile(r"(?:^|[._])(?:layers?|h|blocks?|blk|direction)[._]?(\d{1,40})(?=[._]|$)")
"""Where a name that is not one of NAMED still says which layer it is of, as modules' names do: transformer.h.1, layers.1.output."""


def read_gguf(path: Path, request: Request, outline: Outline) -> ForeignAdapter:
    """llama.cpp's semantics: every token, unless --positions says otherwise; --layers is its --control-vector-layer-range."""
    request.refuse("GGUF", {"stream": "llama.cpp adds a control vector to the block's output"})
    values, statements = _gguf(path)
    if statements.get("general.architecture") != CONTROL_VECTOR:
        raise AdapterError(
            f"{path}: general.architecture is {short(statements.get('general.architecture', 'missing'))}, expected {CONTROL_VECTOR!r}; "
            "only control vectors are imported from GGUF"
        )
    vectors: dict[Site, tuple[str, np.ndarray]] = {}
    for name, value in values.items():
        _put(path, vectors, Site(layer=int(name.removeprefix(DIRECTION))), name, value)
    positions = PositionRule.parse(request.positions or "all")
    hint = statements.get(f"{CONTROL_VECTOR}.model_hint")
    return _adapter(
        "gguf", path, vectors, positions, request, outline, {} if hint is None else {"model_hint": str(hint)}, statements=statements
    )


def _gguf(path: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """(the vectors by name, the keys); AdapterError for a damaged file, and for tensors that are not those of a control vector."""
    from gguf import GGUFReader

    try:
        check_lengths(path)
        reader = GGUFReader(path)
        kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    except Exception as e:  # the reader raises value, index, key, overflow and memory errors for damaged files
        raise _no_gguf(path, e) from None
    if not kinds:
        raise AdapterError(f"{path} holds no {DIRECTION}<layer> tensors; it is no control vector")
    for name, kind in kinds.items():
        layer = name.removeprefix(DIRECTION)
        if layer == name or not re.fullmatch(r"\d{1,40}", layer):
            if any(each.startswith(("token_embd.", "blk.")) for each in kinds):
                raise AdapterError(f"{path} is a GGUF model, not an adapter: a base goes to -m")
            raise AdapterError(f"{path} holds {name}; a control vector holds {DIRECTION}<layer> tensors and nothing else")
        if int(layer) == 0:
            raise AdapterError(f"{path} holds {name}; llama.cpp numbers control vectors from layer 1")
        if kind != "F32":
            raise AdapterError(f"{path}: {name} is {kind}; control vectors are F32")
    try:
        statements = {name: field_value(field) for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        return {tensor.name: np.array(tensor.data) for tensor in reader.tensors}, statements
    except Exception as e:  # as above
        raise _no_gguf(path, e) from None


def _no_gguf(path: Path, error: Exception) -> AdapterError:
    return AdapterError(f"{path} is damaged, or not GGUF ({first_line(error)})")


def read_vectors(path: Path, request: Request, outline: Outline) -> ForeignAdapter:
    """A .npz or .safetensors file; where the vectors act is the user's to say."""
    format, arrays, statements = _arrays(path)
    if request.method == "red" or (request.method is None and is_red(list(arrays))):
        return red_adapter(format, path, arrays, request, outline, statements)
    named = {name: match for name in arrays if (match := NAMED.fullmatch(name))}
    if len(named) == len(arrays):
        vectors: dict[Site, tuple[str, np.ndarray]] = {}
        for name, match in named.items():
            if match[2] and request.stream not in (None, match[2]):
                raise InputError(f"--stream {request.stream} contradicts {path}, which holds {name}")
            site = Site(layer=int(match[1]), stream=match[2] or _stream(request))
            _put(path, vectors, site, name, arrays[name])
    elif len(arrays) == 1:
        vectors = _one_array(path, *next(iter(arrays.items())), request, outline)
    else:
        name = next(name for name in arrays if name not in named)
        raise AdapterError(f"{path}: {name[:60]!r} does not name a layer; name arrays <n>, layer_<n> or <n>.<stream>, or store one alone")
    if request.positions is None:
        raise not_recorded("a steering vector", {"positions": f"--positions ({POSITION_CHOICES})"})
    alone = next(iter(arrays)) if len(arrays) == 1 and not named else None
    rule = PositionRule.parse(request.positions)
    return _adapter(format, path, vectors, rule, request, outline, {}, statements=statements, array=alone)


def read_red_arrays(path: Path, request: Request, outline: Outline) -> ForeignAdapter:
    """A .npz or .safetensors file that is said to be RED's, whatever its arrays are called."""
    format, arrays, statements = _arrays(path)
    return red_adapter(format, path, arrays, request, outline, statements)


def _arrays(path: Path) -> tuple[str, Mapping[str, np.ndarray | Tensor], Statements]:
    """The file's format, by its suffix, its arrays, and what it says beside them."""
    format = "npz" if path.suffix == ".npz" else "safetensors"
    stored = _npz(path) if format == "npz" else read_safetensors(path)
    said = {name: value.tolist() for name, value in stored.items() if _is_statement(name, value)}
    arrays = {name: value for name, value in stored.items() if name not in said}
    if not arrays:
        raise AdapterError(f"{path} holds no arrays")
    return format, arrays, said | (safetensors_metadata(path) if format == "safetensors" else {})


def _is_statement(name: str, value: np.ndarray | Tensor) -> bool:
    """Single values, whole numbers and texts are no vectors; under a vector's name they are a mistake, which is refused as one.

    A file of vectors may say its strength as ``scale``, where RED has an array.
    """
    if NAMED.fullmatch(name) or (is_red([name]) and (name != "scale" or len(value.shape))):
        return False
    floats = value.is_floating_point() if isinstance(value, Tensor) else value.dtype.kind not in "biuUS"
    return len(value.shape) == 0 or (len(value.shape) == 1 and not floats)


def _put(path: Path, vectors: dict[Site, tuple[str, np.ndarray]], site: Site, name: str, value: np.ndarray | Tensor) -> None:
    if site in vectors:
        raise AdapterError(f"{path}: {name} and {vectors[site][0]} are both the vector of {site}; keep one")
    vectors[site] = (name, vector_float32(value, "D", f"{path}: {name}"))


def _npz(path: Path) -> dict[str, np.ndarray]:
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.ndarray):
            with file:
                arrays = dict(file)
            if odd := [name for name, value in arrays.items() if not isinstance(value, np.ndarray)]:
                raise ValueError(f"{odd[0]!r} is no array")
            return arrays
    except (ValueError, OSError, EOFError, KeyError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error) as e:
        raise AdapterError(f"{path} is damaged, or holds more than numbers ({first_line(e)}); it was not loaded") from None
    raise AdapterError(f"{path} is one array, as np.save writes it, expected an archive of named ones; write it with np.savez")


def _one_array(path: Path, name: str, value: np.ndarray | Tensor, request: Request, outline: Outline) -> dict[Site, tuple[str, np.ndarray]]:
    layers, width = outline.info.num_hidden_layers, outline.info.hidden_size
    if OF_WEIGHTS.search(name):
        raise AdapterError(
            f"{path}: {name!r} names a matrix of an adapter or a model, which is not added; name it vector to add it all the same"
        )
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
    stored: Mapping[Site, tuple[str, np.ndarray]],
    positions: PositionRule,
    request: Request,
    outline: Outline,
    record: Mapping[str, str],
    *,
    statements: Statements,
    array: str | None = None,
) -> ForeignAdapter:
    scale = 1.0 if request.scale is None else request.scale
    if not np.isfinite(scale) or scale == 0:
        raise InputError(f"--scale {scale} is not a strength; use a number other than 0 (negative steers the other way)")
    if request.method not in (None, "lobireft") or request.tied is False or activation_of(request.activation or "", "--activation"):
        raise InputError("a steering vector is added as it is: --method, --untied and --activation do not apply to it")
    vectors = of_chosen_layers(path, stored, request, outline, what="vector", made="the vectors were made for")
    meaning = Meaning(
        does="adds vectors",
        operations=ADDS,
        sites=frozenset(vectors),
        stored=len(stored),
        positions=positions,
        scale=request.scale,
        array=array,
    )
    notes = check_statements(path, statements, meaning, outline)
    edits = {site: ((_edit(name, vector, scale),),) for site, (name, vector) in vectors.items() if vector.any()}
    if not edits:
        raise AdapterError(f"{path}: every vector is zero; this adapter edits nothing")
    idle = len(vectors) - len(edits)
    return ForeignAdapter(
        format=format,
        edits=edits,
        positions=positions,
        tied=True,
        record={"imported_from": format, "source": name_of(path), "scale": scale, **record},
        notes=(*notes, *([f"{idle} vectors are zero and were left out"] if idle else ())),
    )


def _edit(name: str, vector: np.ndarray, scale: float) -> ForeignEdit:
    """R [1, D] and s [1] with R^T s = scale * vector, in float64 and rounded once."""
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    R, s = (vector[None].astype(np.float64) / norm).astype(np.float32), np.array([scale * norm], np.float64)
    if abs(s[0]) > np.finfo(np.float32).max:
        raise AdapterError(f"{name} times --scale {scale} exceeds float32")
    return ForeignEdit(name=name, method="lobireft", parameters={"R": R, "s": s.astype(np.float32)})
