"""The little of CUDA that the benchmark needs, through torch or CuPy: memory, copies, and the time of launches in a CUDA graph.

Launches go into a graph, since queueing them one by one from Python would take longer than the short ones run.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np

Queue = Callable[[int], None]
"""Queues launches on the stream with this handle (a cudaStream_t)."""
WARM, TIMED = 3, 10
"""Replays of a graph before it is timed, and those that are timed."""


class Device(Protocol):
    name: str
    """The package, and its version."""

    def put(self, array: np.ndarray) -> Any:
        """A copy of the array's bytes in device memory, which lives as long as what is returned."""
        ...

    def address(self, memory: Any) -> int: ...

    def copy(self, target: Any, source: Any, stream: int) -> None:
        """Queues a copy of all of ``source``: cudaMemcpyAsync from device to device."""
        ...

    def times(self, queue: Queue) -> list[float]:
        """Milliseconds of each of TIMED replays of what ``queue`` queues, between two CUDA events."""
        ...


class TorchDevice:
    def __init__(self) -> None:
        import torch

        self._torch = torch
        self.name = f"torch {torch.__version__}"

    def put(self, array: np.ndarray) -> Any:
        return self._torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).reshape(-1)).cuda()

    def address(self, memory: Any) -> int:
        return memory.data_ptr()

    def copy(self, target: Any, source: Any, stream: int) -> None:
        target.copy_(source)  # on the current stream, which is the one that is captured

    def times(self, queue: Queue) -> list[float]:
        cuda = self._torch.cuda
        queue(cuda.current_stream().cuda_stream)  # what is loaded at the first launch cannot be loaded in a capture
        cuda.synchronize()
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            queue(cuda.current_stream().cuda_stream)
        for _ in range(WARM):
            graph.replay()
        pairs = [(cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)) for _ in range(TIMED)]
        for start, end in pairs:
            start.record()
            graph.replay()
            end.record()
        cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]


class CupyDevice:
    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self.name = f"CuPy {cupy.__version__}"
        self._stream = cupy.cuda.Stream(non_blocking=True)

    def put(self, array: np.ndarray) -> Any:
        memory = self._cupy.asarray(np.ascontiguousarray(array).view(np.uint8).reshape(-1))
        self._cupy.cuda.Device().synchronize()  # the copy is on another stream than the launches
        return memory

    def address(self, memory: Any) -> int:
        return memory.data.ptr

    def copy(self, target: Any, source: Any, stream: int) -> None:
        runtime = self._cupy.cuda.runtime
        runtime.memcpyAsync(target.data.ptr, source.data.ptr, source.nbytes, runtime.memcpyDeviceToDevice, stream)

    def times(self, queue: Queue) -> list[float]:
        cuda, stream = self._cupy.cuda, self._stream
        queue(stream.ptr)
        stream.synchronize()
        with stream:
            stream.begin_capture()
            queue(stream.ptr)
            graph = stream.end_capture()
        for _ in range(WARM):
            graph.launch(stream)
        pairs = [(cuda.Event(), cuda.Event()) for _ in range(TIMED)]
        for start, end in pairs:
            start.record(stream)
            graph.launch(stream)
            end.record(stream)
        stream.synchronize()
        return [cuda.get_elapsed_time(start, end) for start, end in pairs]


class HostDevice:
    """The dry form's: inputs are made and addressed, nothing is launched and nothing is timed."""

    name = "none: dry"

    def put(self, array: np.ndarray) -> Any:
        return np.ascontiguousarray(array)

    def address(self, memory: Any) -> int:
        return memory.ctypes.data

    def copy(self, target: Any, source: Any, stream: int) -> None:
        raise RuntimeError("the dry form copies nothing on a device")

    def times(self, queue: Queue) -> list[float]:
        return []


def open_device() -> Device:
    """torch where it has CUDA, else CuPy; raises ModuleNotFoundError where neither is there."""
    if find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            return TorchDevice()
    return CupyDevice()
