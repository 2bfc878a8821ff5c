"""The little of CUDA that an engine's session needs, through NVIDIA's own binding (cuda-python): one device, one stream of its own.

Addresses are ints, sizes bytes. Copies, zeroing and launches are queued on the stream and are done when ``synchronize`` returns; host
arrays that take part are kept alive until then. Every CUDA status is checked: a failure is one line with the call and CUDA's own words.

Not yet run on a GPU: the refusal without one was seen with the real binding, everything else with a double of its functions.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from runtimes.errors import BackendUnavailable, ReftError
from runtimes.machine import this_machine

BINDINGS = ("cuda.bindings.runtime", "cuda.cudart")
"""cuda-python's module by its name since 12.6, and by the one before."""
OUT_OF_MEMORY = 2
"""cudaErrorMemoryAllocation."""
NON_BLOCKING = 1
"""cudaStreamNonBlocking: the stream does not wait for the default one."""


def load_cuda() -> ModuleType:
    """The binding; raises BackendUnavailable where cuda-python is missing or does not load."""
    for name in BINDINGS:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as e:
            if (e.name or "").partition(".")[0] != "cuda":
                raise BackendUnavailable(f"cuda-python does not load: {e.name} is missing; pip install cuda-python again") from None
        except (ImportError, OSError) as e:
            raise BackendUnavailable(f"cuda-python does not load: {' '.join(str(e).split())}; pip install cuda-python again") from None
    raise BackendUnavailable(f"cuda-python is not installed; {this_machine().install_cuda_python()}")


class CudaDevice:
    """Memory and one stream of the first GPU. Everything it allocated is freed by ``close``, or at the end of a ``with``.

    Raises BackendUnavailable where there is no usable GPU.
    """

    def __init__(self) -> None:
        self._cuda = load_cuda()
        if reason := self._no_gpu():
            mend = this_machine().driver_is_too_old() or "check `nvidia-smi`, or run the bundle with onnxruntime on the CPU"
            raise BackendUnavailable(f"no usable CUDA GPU: {reason}; {mend}")
        self._call("cudaSetDevice", 0)
        self._allocations: set[int] = set()
        self._in_flight: list[np.ndarray] = []
        self._stream: Any = self._call("cudaStreamCreateWithFlags", NON_BLOCKING)

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT takes it."""
        return int(self._stream)

    def allocate(self, size: int) -> int:
        """The address of ``size`` bytes, whose content is undefined; raises ReftError where the GPU's memory does not suffice."""
        status, address = self._cuda.cudaMalloc(size)
        if int(status) == OUT_OF_MEMORY:
            free, total = self._call("cudaMemGetInfo")
            raise ReftError(
                f"the GPU's memory does not suffice: {size / 1e6:.1f} MB more are needed, {free / 1e6:.1f} of {total / 1e6:.1f} MB are "
                "free; use fewer rows at once, a shorter context, or an engine of lower precision"
            )
        self._check("cudaMalloc", status)
        self._allocations.add(int(address))
        return int(address)

    def free(self, address: int) -> None:
        """Returns the memory at ``address``; nothing that was queued may still use it."""
        self._allocations.remove(address)
        self._call("cudaFree", address)

    def copy_to_device(self, address: int, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        self._in_flight.append(array)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self._stream)

    def copy_to_host(self, array: np.ndarray, address: int) -> None:
        """Fills the C-contiguous ``array``; it holds the values after ``synchronize``."""
        self._in_flight.append(array)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self._stream)

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Copies ``rows`` rows of ``width`` bytes on the device; a row begins every ``pitch`` bytes. The two do not overlap."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, rows, kind, self._stream)

    def zero(self, address: int, size: int) -> None:
        self._call("cudaMemsetAsync", address, 0, size, self._stream)

    def synchronize(self) -> None:
        """Waits for everything that was queued."""
        self._call("cudaStreamSynchronize", self._stream)
        self._in_flight.clear()

    def capture(self, work: Callable[[], None]) -> Any:
        """A graph of what ``work`` queues, which is recorded and not run. It holds addresses and sizes as they are now."""
        # Thread local: what another thread allocates meanwhile is its own affair.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            # A stream that is left capturing takes no other work; what was recorded is of no use.
            status, graph = self._cuda.cudaStreamEndCapture(self._stream)
            if not int(status):
                self._cuda.cudaGraphDestroy(graph)
            raise
        graph = self._call("cudaStreamEndCapture", self._stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any) -> None:
        self._call("cudaGraphLaunch", graph, self._stream)

    def free_graph(self, graph: Any) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        """Frees everything, once; after an error of the device too, when CUDA refuses every call."""
        if self._stream is None:
            return
        self._cuda.cudaStreamSynchronize(self._stream)
        for address in self._allocations:
            self._cuda.cudaFree(address)
        self._cuda.cudaStreamDestroy(self._stream)
        self._allocations.clear()
        self._in_flight.clear()
        self._stream = None

    def __enter__(self) -> CudaDevice:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _no_gpu(self) -> str:
        """Why there is none; empty where there is one."""
        try:
            status, count = self._cuda.cudaGetDeviceCount()
        except RuntimeError as e:  # cuda-python 12 raises where there is no driver, 13 returns a status
            return " ".join(str(e).split())
        if int(status):
            return self._words(status)
        return "" if count else "none is visible"

    def _call(self, function: str, *arguments: Any) -> Any:
        """What the function returns beside its status: nothing, one value, or several."""
        status, *values = getattr(self._cuda, function)(*arguments)
        self._check(function, status)
        return (values[0] if values else None) if len(values) < 2 else tuple(values)

    def _check(self, function: str, status: Any) -> None:
        if int(status):
            raise ReftError(f"{function} failed on the GPU: {self._words(status)}; check the device with `nvidia-smi`, then run it again")

    def _words(self, status: Any) -> str:
        texts = [self._cuda.cudaGetErrorName(status)[1], self._cuda.cudaGetErrorString(status)[1]]
        return ", ".join(text.decode() if isinstance(text, bytes) else str(text) for text in texts)
