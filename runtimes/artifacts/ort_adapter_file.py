"""``.onnx_adapter``: onnxruntime's own adapter container, which stock onnxruntime and onnxruntime-genai hot-swap."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from runtimes.errors import BundleError
from runtimes.precision import BFLOAT16, ELEMENT_TYPES

if TYPE_CHECKING:
    import onnxruntime as ort


class Tensor(Protocol):
    """What is read of a tensor that onnxruntime holds (OrtValue)."""

    def data_type(self) -> str: ...

    def shape(self) -> Sequence[int]: ...

    def data_ptr(self) -> int: ...

    def numpy(self) -> np.ndarray: ...


def write_onnx_adapter(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes ``tensors`` (float32, float16, bfloat16 or int64, rank >= 1) to ``path``."""
    import onnxruntime as ort

    # AdapterFormat keeps pointers, not copies: arrays freed before export_adapter become garbage in the file.
    alive = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    values = {name: ort_value(array) for name, array in alive.items()}
    container = ort.AdapterFormat()
    container.set_adapter_version(1)
    container.set_model_version(1)
    container.set_parameters(values)
    container.export_adapter(str(path))  # pyright: ignore[reportArgumentType]  # annotated as PathLike, takes str alone
    del values, alive


def ort_value(array: np.ndarray) -> ort.OrtValue:
    """A contiguous array as onnxruntime takes it, in host memory and not copied (seen from 1.18 to 1.31); it keeps the array alive."""
    import onnxruntime as ort

    if array.dtype.name == "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


def read_onnx_adapter(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a ``.onnx_adapter`` file by name; bfloat16 as ml_dtypes.bfloat16."""
    return {name: host_array(value).copy() for name, value in open_onnx_adapter(path).get_parameters().items()}


def open_onnx_adapter(path: Path) -> ort.AdapterFormat:
    """The container, whose tensors are read where they lie while it lives.

    Raises BundleError where its tensors claim another type than an adapter has, or more bytes than the file: onnxruntime takes both at
    their word.
    """
    import onnxruntime as ort

    read = ort.AdapterFormat.read_adapter(str(path))  # pyright: ignore[reportArgumentType]  # annotated as PathLike, takes str alone
    room = path.stat().st_size
    for name, value in read.get_parameters().items():
        element = ELEMENT_TYPES.get(value.data_type().removeprefix("tensor(").removesuffix(")"))
        if element is None:
            raise BundleError(f"{path} holds {name!r} as {value.data_type()}, which no adapter has; export the bundle again")
        shape = value.shape()
        room -= math.prod(shape) * element.dtype.itemsize
        if min(shape, default=0) < 0 or room < 0:
            raise BundleError(f"{path}: its tensors claim more bytes than the file has, {name!r} is {list(shape)}; export the bundle again")
    return read


def host_array(value: Tensor) -> np.ndarray:
    """A tensor in host memory; bfloat16, which numpy() refuses, is a view of the two-byte words and lives as long as ``value``."""
    return host_view(value) if value.data_type() == "tensor(bfloat16)" else value.numpy()


def host_view(value: Tensor) -> np.ndarray:
    """A tensor in host memory where it lies, without a copy: it lives as long as ``value``."""
    element = ELEMENT_TYPES[value.data_type().removeprefix("tensor(").removesuffix(")")]
    shape = value.shape()
    words = (ctypes.c_uint8 * (math.prod(shape) * element.dtype.itemsize)).from_address(value.data_ptr())
    return np.ctypeslib.as_array(words).view(element.dtype).reshape(shape)
