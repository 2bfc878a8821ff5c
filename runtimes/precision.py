"""The types of a tensor's elements, by every name that they go by: in manifests, in engines and in adapter files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np


@dataclass(frozen=True, kw_only=True)
class ElementType:
    name: str
    """ONNX's, as the records of inputs and outputs state it; onnxruntime says tensor(<name>)."""
    tensorrt: str
    dtype: np.dtype
    safetensors: str | None = None
    """None for a type that no input of a session has."""


ELEMENT_TYPES: Mapping[str, ElementType] = {
    e.name: e
    for e in (
        ElementType(name="float", tensorrt="FLOAT", dtype=np.dtype(np.float32), safetensors="F32"),
        ElementType(name="float16", tensorrt="HALF", dtype=np.dtype(np.float16), safetensors="F16"),
        ElementType(name="bfloat16", tensorrt="BF16", dtype=np.dtype(ml_dtypes.bfloat16), safetensors="BF16"),
        ElementType(name="int64", tensorrt="INT64", dtype=np.dtype(np.int64), safetensors="I64"),
        ElementType(name="int32", tensorrt="INT32", dtype=np.dtype(np.int32), safetensors="I32"),
        ElementType(name="int8", tensorrt="INT8", dtype=np.dtype(np.int8)),
        ElementType(name="uint8", tensorrt="UINT8", dtype=np.dtype(np.uint8)),
        ElementType(name="bool", tensorrt="BOOL", dtype=np.dtype(np.bool_)),
    )
}
BFLOAT16 = 16
"""ONNX TensorProto.BFLOAT16: numpy has no such type, so onnxruntime takes the element type by number."""

FLOAT_TYPES: Mapping[str, ElementType] = {
    "fp32": ELEMENT_TYPES["float"],
    "fp16": ELEMENT_TYPES["float16"],
    "bf16": ELEMENT_TYPES["bfloat16"],
}
"""By a bundle's precision, as its manifest states it."""
NUMPY_DTYPES: Mapping[str, np.dtype] = {precision: e.dtype for precision, e in FLOAT_TYPES.items()}
TORCH_DTYPES: Mapping[str, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def onnx_name(tensorrt: str) -> str:
    """ONNX's name of an element type by TensorRT's; TensorRT's own where ONNX has none."""
    return next((e.name for e in ELEMENT_TYPES.values() if e.tensorrt == tensorrt), tensorrt)
