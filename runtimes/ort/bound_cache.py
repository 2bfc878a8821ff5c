"""A KV cache's buffers, on the CPU or a GPU, bound to an onnxruntime session as its past and its present at once."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

from runtimes.errors import BackendUnavailable
from runtimes.kv_cache import HostMemory, KvCache, Memory
from runtimes.precision import BFLOAT16, ElementType


class BoundCache:
    """Rows of a cache in an IOBinding. They stay bound while neither the rows nor the buffers change, which saves a call for every tensor
    of every step."""

    def __init__(self, binding: ort.IOBinding, device: str) -> None:
        self.binding = binding
        self._device = device
        self._bound: tuple[KvCache, int, range] | None = None

    def bind(self, cache: KvCache, rows: range) -> None:
        wanted = (cache, cache.capacity, rows)
        if wanted == self._bound:
            return
        for tensor, address in zip(cache.tensors, cache.addresses, strict=True):
            shape = [len(rows), tensor.heads, cache.capacity, tensor.dim]
            first = address + tensor.size(rows.start, cache.capacity)
            element = _numbered(tensor.element)
            self.binding.bind_input(tensor.name, self._device, 0, element, shape, first)
            self.binding.bind_output(tensor.output, self._device, 0, element, shape, first)
        self._bound = wanted


def _numbered(element: ElementType) -> type | np.dtype | int:
    return BFLOAT16 if element.name == "bfloat16" else element.dtype.type


class DeviceBuffer:
    """Memory of a GPU, not run on one yet: widened through the host, once for every doubling of the capacity."""

    def __init__(self, value: ort.OrtValue, device: str, element: ElementType) -> None:
        self._value, self._device, self._element = value, device, element

    @property
    def address(self) -> int:
        return self._value.data_ptr()

    def widened(self, shape: tuple[int, int, int, int]) -> DeviceBuffer:
        old = self._value.numpy()
        wider = np.zeros(shape, old.dtype)
        wider[:, :, : old.shape[2]] = old
        return DeviceBuffer(ort.OrtValue.ortvalue_from_numpy(wider, self._device, 0), self._device, self._element)

    def read_row(self, row: int, columns: int) -> np.ndarray:
        raise _stays()

    def write_row(self, row: int, columns: np.ndarray) -> None:
        raise _stays()

    def copy_row(self, source: int, target: int, columns: int) -> None:
        raise _stays()


def _stays() -> BackendUnavailable:
    return BackendUnavailable("rows of a KV cache on a GPU do not change places here; batch requests with --provider cpu")


class DeviceMemory:
    def __init__(self, device: str) -> None:
        self._device = device

    def buffer(self, shape: tuple[int, int, int, int], element: ElementType) -> DeviceBuffer:
        if element.name == "bfloat16":  # numpy has no such type, and a buffer of words is one of bfloat16 as well
            value = ort.OrtValue.ortvalue_from_shape_and_type(shape, BFLOAT16, self._device, 0)
        else:
            value = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, element.dtype), self._device, 0)
        return DeviceBuffer(value, self._device, element)

    def available(self) -> int | None:
        return None


def memory_of(device: str) -> Memory:
    return HostMemory() if device == "cpu" else DeviceMemory(device)
