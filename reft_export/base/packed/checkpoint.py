"""A checkpoint that others quantized as a base: its weights, dequantized to float32, are a checkpoint in a cache folder, made once.

Everything else reads that folder, as it does a GGUF file's (``reft_export.base.gguf``): the fingerprint is of the dequantized weights, and
no library of the format is needed. Beside it stand the integers themselves, in MatMulNBits' blocks (PACKED), and what they are (ORIGIN).
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from reft_export.base.kept import MAKING, hold, hold_if_kept, kept_folder, take_away_oldest
from reft_export.base.model_folder import WEIGHT_FILES, read_config, safetensors_parts, weight_files
from reft_export.base.packed.blocks import ORIGIN, PACKED, PARTS
from reft_export.base.packed.layouts import LAYOUTS, STRAY, blocks_of, dequantized, integers_of
from reft_export.base.packed.scheme import PASS_FLOAT, Scheme, scheme_of
from reft_export.base.packed.writer import TensorWriter
from reft_export.console import err, size
from runtimes.errors import InputError
from runtimes.files.claims import remove, scratch_folder
from runtimes.files.folders import name_of
from runtimes.files.hashes import sha256_of
from runtimes.files.records import read_json_object

VERSION = 1
"""Of what is made of a checkpoint: another one makes it again."""
BESIDE = ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*")
"""What of a model folder is not weights."""
OLDER = ("quantize_config.json", "quant_config.json")
"""Where AutoGPTQ and AutoAWQ said it before config.json did."""
NOT_KEPT = ("config.json", *WEIGHT_FILES, *OLDER)
PLACE = struct.Struct("<QQ")
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16, "I64": "<i8", "I32": "<i4", "I8": "i1", "U8": "u1"}


def plain_folder(folder: Path) -> Path:
    """``folder`` where its weights are floats, else the folder of the checkpoint that was made of it; made now where the cache has none.

    Raises InputError, in one line, for a quantization that is not read, and for tensors that are missing, damaged or contradict it.
    """
    scheme = _scheme(folder)
    if scheme is None:
        hold_if_kept(folder)
        return folder
    made = kept_folder("quantized") / _digest(folder)
    while not hold(made) or not _is_whole(made):  # again where another process took it away before it was held
        take_away_oldest()  # before it takes its place, too
        _make(folder, made, scheme)
        if hold(made):
            take_away_oldest()
    return made


def _is_whole(made: Path) -> bool:
    """Nothing half-written is put there, but a cleaner of caches takes single files."""
    return all((made / name).is_file() for name in (ORIGIN, PACKED, WEIGHT_FILES[0], "config.json"))


def described(folder: Path) -> str:
    """Of a folder that holds such a checkpoint how much of it is quantized and how, in brackets; "" of any other."""
    scheme = _scheme(folder)
    if scheme is None:
        return ""
    names = _Names.of(_headers(folder), scheme, folder)
    return f" ({len(names.weights)} of {len(names.weights) + len(names.others)} tensors quantized by {scheme.label})"


def _scheme(folder: Path) -> Scheme | None:
    path = folder / "config.json"
    if not path.is_file():
        return None  # whoever reads the folder says so
    config = read_json_object(path, InputError)
    if config.get("quantization_config") is None and (beside := [name for name in OLDER if (folder / name).is_file()]):
        raise InputError(
            f"{folder}: {beside[0]} says how its weights were quantized, and config.json does not; put what it says there, as "
            "quantization_config with its quant_method (gptq or awq), or remove it where the weights are floats"
        )
    return scheme_of(config, folder)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256(f"{VERSION}".encode())
    for path in sorted({folder / "config.json", *weight_files(folder), *_beside(folder)}):
        digest.update(f"\n{path.relative_to(folder)} {sha256_of(path, remember=True)}".encode())
    return digest.hexdigest()


def _beside(folder: Path) -> list[Path]:
    return sorted(path for pattern in BESIDE for path in folder.glob(pattern) if path.is_file() and path.name not in NOT_KEPT)


class _Stored(NamedTuple):
    """A tensor's place: ``bytes`` of ``path`` from ``begin`` on."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    bytes: int


def _headers(folder: Path) -> dict[str, _Stored]:
    stored = {}
    for path in weight_files(folder):
        if path.suffix != ".safetensors":
            raise InputError(f"{path} is a pickle; such a checkpoint is read from safetensors files alone: save it so, or {PASS_FLOAT}")
        for name, (dtype, shape, place) in safetensors_parts(path, _place).items():
            begin, end = PLACE.unpack(place)
            stored[name] = _Stored(path, dtype, shape, begin, end - begin)
    return stored


def _place(_: str, __: Any, begin: int, end: int) -> bytes:
    return PLACE.pack(begin, end)


class _Names(NamedTuple):
    """``weights``: by parameter, the names of its tensors by their end; ``others``: tensors that stay as they are."""

    weights: dict[str, dict[str, str]]
    others: tuple[str, ...]

    @classmethod
    def of(cls, stored: Mapping[str, _Stored], scheme: Scheme, folder: Path) -> _Names:
        layout = LAYOUTS[scheme.method]
        weights, taken = {}, set()
        for name in stored:
            module, _, end = name.rpartition(".")
            if end != layout.integers:
                continue
            parts = {part: f"{module}.{part}" for part in (*layout.needed, *layout.optional) if f"{module}.{part}" in stored}
            if missing := [part for part in layout.needed if part not in parts]:
                raise InputError(f"{folder}: {name} has no {missing[0]} beside it; download it again")
            weights[f"{module}.weight"] = parts
            taken |= set(parts.values())
        others = tuple(name for name in stored if name not in taken)
        if stray := [name for name in others if name.rpartition(".")[2] in STRAY or name in weights]:
            raise InputError(f"{folder}: {stray[0]} is no part of a weight of {scheme.label}, and would be left out; {PASS_FLOAT}")
        if not weights:
            raise InputError(f"{folder}: config.json says {scheme.label}, and no tensor is called *.{layout.integers}; {PASS_FLOAT}")
        return cls(weights, others)


def _make(folder: Path, made: Path, scheme: Scheme) -> None:
    stored = _headers(folder)
    names = _Names.of(stored, scheme, folder)
    made.parent.mkdir(parents=True, exist_ok=True)
    needed, free = _needed(stored, names, LAYOUTS[scheme.method].integers), shutil.disk_usage(made.parent).free
    if needed > free:
        raise InputError(
            f"{folder} takes {size(needed)} in float32, and {made.parent} has {size(free)} left; free some, or set XDG_CACHE_HOME to a "
            "folder of another disk"
        )
    err.print(f"dequantizing {name_of(folder)} to {size(needed)} in {made.parent}, once", markup=False)
    with scratch_folder(made, MAKING) as scratch:
        whole = scratch / "checkpoint"
        whole.mkdir()
        config = read_json_object(folder / "config.json", InputError)
        del config["quantization_config"]
        (whole / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        try:
            read_config(whole)  # refuses what else of it is not read, before the work
        except InputError as e:
            raise InputError(str(e).replace(str(whole), str(folder))) from None
        for path in _beside(folder):
            (whole / path.relative_to(folder)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, whole / path.relative_to(folder))
        origin = _write(whole, folder, stored, names, scheme)
        (whole / ORIGIN).write_text(json.dumps(origin), encoding="utf-8")
        try:
            whole.replace(made)
        except OSError:
            if not _is_whole(made):  # else another process made the same one meanwhile
                remove(made)
                whole.replace(made)


def _needed(stored: Mapping[str, _Stored], names: _Names, integers: str) -> int:
    """Bytes of what is made, about: 36 of each int32, which holds 8 weights, and the other tensors as they are."""
    words = sum(math.prod(stored[parts[integers]].shape) for parts in names.weights.values())
    return 36 * words + sum(stored[name].bytes for name in names.others)


def _write(whole: Path, folder: Path, stored: Mapping[str, _Stored], names: _Names, scheme: Scheme) -> dict[str, Any]:
    """Both files, a weight in memory at a time; what ORIGIN says."""
    floats = TensorWriter(whole / WEIGHT_FILES[0], [*names.weights, *names.others])
    blocks = TensorWriter(whole / PACKED, [f"{name}.{part}" for name in names.weights for part in PARTS])
    formats, without = {}, []
    try:
        for name, parts in names.weights.items():
            weight = integers_of(f"{folder}: {name}", {end: _read(stored[each], each) for end, each in parts.items()}, scheme)
            floats.append(name, "F32", weight.q.shape, dequantized(weight))
            if (made := blocks_of(weight)) is None:
                without.append(name)
                continue
            formats[name] = {"block_size": made[1].block_size, "symmetric": made[1].symmetric}
            arrays = (made[0].packed, made[0].scales, made[0].zero_points)
            for part, array in zip(PARTS, arrays, strict=True):
                if array is not None:
                    blocks.append(f"{name}.{part}", "F32" if part == "scales" else "U8", array.shape, array)
        for name in names.others:
            floats.append(name, stored[name].dtype, stored[name].shape, _bytes(stored[name], name))
    finally:
        floats.close()
        blocks.close()
    return {"label": scheme.label, "weights": formats, "without": without}


def _read(stored: _Stored, name: str) -> np.ndarray:
    dtype = DTYPES.get(stored.dtype)
    if dtype is None:
        raise InputError(f"{stored.path}: {name} is of type {stored.dtype}, which no quantized weight has; download it again")
    return _bytes(stored, name).view(dtype).reshape(stored.shape)


def _bytes(stored: _Stored, name: str) -> np.ndarray:
    """Of a tensor whose place its file's header told."""
    with stored.path.open("rb") as file:
        file.seek(stored.begin)
        data = file.read(stored.bytes)
    if len(data) != stored.bytes:
        raise InputError(f"{stored.path} is damaged or cut short ({name} ends behind the file's end); download it again")
    return np.frombuffer(data, np.uint8)
