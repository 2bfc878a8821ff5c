"""``.onnx_adapter``: onnxruntime's own adapter container, which stock onnxruntime and onnxruntime-genai hot-swap."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    import onnxruntime as ort

BFLOAT16 = 16
"""ONNX TensorProto.BFLOAT16."""


def write_onnx_adapter(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes ``tensors`` (float32, float16, bfloat16 or int64, rank >= 1) to ``path``."""
    import onnxruntime as ort

    # AdapterFormat keeps pointers, not copies: arrays freed before export_adapter become garbage in the file.
    alive = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    values = {}
    for name, array in alive.items():
        if array.dtype.name == "bfloat16":
            values[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), BFLOAT16)
        else:
            values[name] = ort.OrtValue.ortvalue_from_numpy(array)
    container = ort.AdapterFormat()
    container.set_adapter_version(1)
    container.set_model_version(1)
    container.set_parameters(values)
    container.export_adapter(str(path))
    del values, alive


def read_onnx_adapter(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a ``.onnx_adapter`` file by name; bfloat16 as ml_dtypes.bfloat16."""
    import onnxruntime as ort

    container = ort.AdapterFormat.read_adapter(str(path))
    tensors = {}
    for name, value in container.get_parameters().items():
        tensors[name] = _bfloat16(value) if value.data_type() == "tensor(bfloat16)" else value.numpy().copy()
    return tensors


def _bfloat16(value: ort.OrtValue) -> np.ndarray:
    """numpy() refuses bfloat16: the two-byte words are read where they lie."""
    shape = value.shape()
    words = (ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr())
    return np.frombuffer(words, np.uint16).reshape(shape).copy().view(ml_dtypes.bfloat16)
