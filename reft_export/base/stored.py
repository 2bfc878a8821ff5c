"""The tensors that a checkpoint stores: their shapes, and a digest of sampled values of each. safetensors files are read without torch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np

from reft_export.base.model_folder import not_finite, safetensors_parts, unpickled, weight_files
from runtimes.errors import InputError

if TYPE_CHECKING:
    import torch

SAMPLES, SAMPLE_VALUES = 32, 16
"""Of every tensor this many evenly spaced blocks of this many values are compared, with both ends."""

FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}
"""By safetensors' names of types; all others are compared byte by byte."""

TORCH_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip

NOT_WEIGHTS = re.compile(r"(rotary_emb\.inv_freq|\.masked_bias|embeddings\.position_ids)$")
"""Tables that older releases stored, and that newer ones compute."""

CAUSAL_MASK = re.compile(r"\.(attn|attention)\.bias$")
"""GPT-2's stored mask, [1, 1, T, T]; of other families such a name is a bias [D]."""


class Tensor(NamedTuple):
    shape: tuple[int, ...]
    digest: str


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """By name, read from a few pages each; a .bin checkpoint is unpickled (weights only). InputError for damaged files."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            for name, (dtype, shape, sample) in safetensors_parts(path, _values).items():
                if dtype in FLOATS and np.isnan(np.frombuffer(sample, "<f8")).any():
                    # Said before the base is compared with an adapter's: it is damaged, not another one.
                    raise InputError(not_finite(folder, name))
                tensors[name] = Tensor(shape, _digest(shape, sample))
        else:
            tensors |= {name: of_torch(tensor) for name, tensor in unpickled(path).items()}
    return tensors


def without_tables(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what older releases stored, and newer ones compute."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not NOT_WEIGHTS.search(name) and not (CAUSAL_MASK.search(name) and len(tensor.shape) == 4)
    }


def _digest(shape: tuple[int, ...], sample: bytes) -> str:
    return hashlib.sha256(f"{list(shape)} ".encode() + sample).hexdigest()


def _values(dtype: str, data: Any, begin: int, end: int) -> bytes:
    """The sampled values of ``data[begin:end]``, floats as float64 whatever they are stored in."""
    size = ITEM_BYTES.get(dtype, 1)
    count, block = (end - begin) // size, SAMPLE_VALUES
    if count <= SAMPLES * block:
        sample = bytes(data[begin:end])
    else:
        starts = (begin + size * ((count - block) * i // (SAMPLES - 1)) for i in range(SAMPLES))
        sample = b"".join(bytes(data[start : start + size * block]) for start in starts)
    if dtype not in FLOATS:
        return dtype.encode() + sample
    return (np.frombuffer(sample, np.dtype(FLOATS[dtype]).newbyteorder("<")).astype("<f8") + 0.0).tobytes()


def of_torch(tensor: torch.Tensor) -> Tensor:
    import torch

    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    name = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    return Tensor(shape, _digest(shape, _values(TORCH_NAMES.get(name, name), data, 0, data.size)))
