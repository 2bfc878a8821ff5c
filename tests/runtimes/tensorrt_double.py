"""Doubles of the CUDA runtime binding and of TensorRT, for a machine without a GPU. They prove the session's bookkeeping, and nothing
about a GPU, TensorRT's numbers or its speed.

"Device" memory is host memory at real addresses. What is queued runs when the stream is synchronized, at last: whatever is read before
holds poison (0xFF, NaN in every float type), as do fresh and freed memory. Every access must lie within one live allocation. A captured
graph keeps the addresses and shapes of its capture, and refuses to run after its context was changed. An engine runs its plan's graph in
onnxruntime on the CPU, on the tensors bound by address.
"""

from __future__ import annotations

import ctypes
import json
import mmap
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort

from runtimes.artifacts.engine import Profile
from runtimes.artifacts.manifest import TensorRecord
from runtimes.files.records import from_json, to_json

POISON = 0xFF
DTYPES = {"float": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "int64": np.int64, "int32": np.int32}
TENSORRT_NAMES = {"float": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32"}
CAPTURE_UNSUPPORTED, OUT_OF_MEMORY, NO_DEVICE = 900, 2, 100


class DeviceFault(AssertionError):
    """What would be an illegal address, a data race or undefined behaviour on a GPU."""


class CudaDouble:
    """The functions of cuda.bindings.runtime that runtimes/tensorrt/cuda_device.py calls, each returning (status, values...)."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, *, devices: int = 1, capacity: int = 1 << 30) -> None:
        self.devices = devices
        self.capacity = capacity
        self.live: dict[int, np.ndarray] = {}
        self.freed: list[np.ndarray] = []
        self.recording: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.queues: dict[int, list[Callable[[], None]]] = {}
        """By stream."""
        self.counts = {"streams": 0, "malloc": 0, "captures": 0, "launches": 0, "enqueues": 0, "synchronizations": 0}
        self.capture_fails = False

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return (0, self.devices) if self.devices else (NO_DEVICE, 0)

    def cudaSetDevice(self, device: int) -> tuple[int]:
        return (0,)

    def cudaGetErrorName(self, error: int) -> tuple[int, bytes]:
        return 0, {CAPTURE_UNSUPPORTED: b"cudaErrorStreamCaptureUnsupported", NO_DEVICE: b"cudaErrorNoDevice"}.get(error, b"cudaError")

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, b"as the double says"

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return 0, self.capacity - self.used, self.capacity

    @property
    def used(self) -> int:
        return sum(block.nbytes for block in self.live.values())

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        if self.recording is not None:
            return CAPTURE_UNSUPPORTED, 0
        if self.used + size > self.capacity:
            return OUT_OF_MEMORY, 0
        block = np.full(size, POISON, np.uint8)
        self.live[block.ctypes.data] = block
        self.counts["malloc"] += 1
        return 0, block.ctypes.data

    def cudaFree(self, devPtr: int) -> tuple[int]:
        if any(self.queues.values()):
            raise DeviceFault("memory is freed while work that may use it is queued")
        block = self.live.pop(devPtr)
        block[:] = POISON
        self.freed.append(block)  # never given out again, so that a stale address stays one
        return (0,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        stream = 1000 + self.counts["streams"]
        self.counts["streams"] += 1
        self.queues[stream] = []
        return 0, stream

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        del self.queues[stream]
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        if self.recording is not None:
            return (CAPTURE_UNSUPPORTED,)
        self.counts["synchronizations"] += 1
        queue, self.queues[stream] = self.queues[stream], []
        for work in queue:
            work()
        return (0,)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: int, stream: int) -> tuple[int]:
        kinds = self.cudaMemcpyKind
        if kind == kinds.cudaMemcpyDeviceToHost:
            ctypes.memset(dst, POISON, count)

        def copy() -> None:
            if kind != kinds.cudaMemcpyDeviceToHost:
                self.check(dst, count)
            if kind != kinds.cudaMemcpyHostToDevice:
                self.check(src, count)
            ctypes.memmove(dst, src, count)

        self.add(stream, copy)
        return (0,)

    def cudaMemcpy2DAsync(
        self, dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: int, stream: int
    ) -> tuple[int]:
        if kind != self.cudaMemcpyKind.cudaMemcpyDeviceToDevice or width > min(dpitch, spitch):
            return (1,)

        def copy() -> None:
            for row in range(height):
                self.check(dst + row * dpitch, width)
                self.check(src + row * spitch, width)
                ctypes.memmove(dst + row * dpitch, src + row * spitch, width)

        self.add(stream, copy)
        return (0,)

    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: int) -> tuple[int]:
        def fill() -> None:
            self.check(devPtr, count)
            ctypes.memset(devPtr, value, count)

        self.add(stream, fill)
        return (0,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        if self.capture_fails:
            return (CAPTURE_UNSUPPORTED,)
        self.recording = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, int]:
        self.counts["captures"] += 1
        graph, self.recording = self.recording, None
        self.graphs[id(graph)] = graph
        return 0, id(graph)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int]:
        executable = list(self.graphs[graph])
        self.graphs[id(executable)] = executable
        return 0, id(executable)

    def cudaGraphDestroy(self, graph: int) -> tuple[int]:
        del self.graphs[graph]
        return (0,)

    def cudaGraphExecDestroy(self, graphExec: int) -> tuple[int]:
        del self.graphs[graphExec]
        return (0,)

    def cudaGraphLaunch(self, graphExec: int, stream: int) -> tuple[int]:
        self.counts["launches"] += 1
        self.queues[stream] += self.graphs[graphExec]
        return (0,)

    def add(self, stream: int, work: Callable[[], None]) -> None:
        if stream not in self.queues:
            raise DeviceFault("work on a stream that is not there")
        (self.queues[stream] if self.recording is None else self.recording).append(work)

    def check(self, address: int, size: int) -> None:
        if not any(start <= address and address + size <= start + block.nbytes for start, block in self.live.items()):
            raise DeviceFault(f"illegal address: {size} bytes at {address:#x}")

    @property
    def is_empty(self) -> bool:
        """Nothing is allocated, queued or left."""
        return not (self.live or self.graphs or self.queues)


def write_plan(model: bytes, inputs: tuple[TensorRecord, ...], outputs: tuple[TensorRecord, ...], profiles: tuple[Profile, ...]) -> bytes:
    """A "plan": what an engine states of itself in one line of JSON, and the ONNX graph that it runs.

    The graph may be of float32 where the records say bfloat16, which onnxruntime's CPU kernels lack: values are rounded on the way.
    """
    return json.dumps({"inputs": to_json(inputs), "outputs": to_json(outputs), "profiles": to_json(profiles)}).encode() + b"\n" + model


class TensorRTDouble:
    """The module ``tensorrt`` ("tensorrt") or ``tensorrt_rtx`` ("tensorrt-rtx"), as far as the session uses it."""

    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    TensorLocation = SimpleNamespace(DEVICE="device", HOST="host")
    ExecutionContextAllocationStrategy = SimpleNamespace(STATIC=0, ON_PROFILE_CHANGE=1)
    CudaGraphStrategy = SimpleNamespace(DISABLED=0, WHOLE_GRAPH_CAPTURE=1)

    class ILogger:
        Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)

        def __init__(self) -> None:
            pass

    def __init__(self, cuda: CudaDouble, target: str = "tensorrt", version: str = "10.3.0") -> None:
        self.__name__ = target.replace("-", "_")
        self.__version__ = version
        self.cuda = cuda
        self.target = target
        self.plugins: list[str] = []
        self.configs: list[SimpleNamespace] = []
        self.engines: list[EngineDouble] = []
        self.mapped: mmap.mmap | None = None

    def Runtime(self, logger: Any) -> SimpleNamespace:
        def deserialize_cuda_engine(mapped: mmap.mmap) -> EngineDouble | None:
            self.mapped = mapped
            plan = bytes(mapped)
            if not plan.startswith(b'{"inputs"'):
                logger.log(self.ILogger.Severity.ERROR, "the plan has no\nmagic tag")
                return None
            self.engines.append(EngineDouble(self, plan, logger))
            return self.engines[-1]

        return SimpleNamespace(deserialize_cuda_engine=deserialize_cuda_engine)

    def get_plugin_registry(self) -> SimpleNamespace:
        return SimpleNamespace(load_library=lambda path: self.plugins.append(path) or "handle")


class EngineDouble:
    def __init__(self, module: TensorRTDouble, plan: bytes, logger: Any) -> None:
        header, _, model = plan.partition(b"\n")
        content = json.loads(header)
        self.module = module
        self.logger = logger
        self.inputs = {r.name: r for r in from_json(tuple[TensorRecord, ...], content["inputs"])}
        self.outputs = {r.name: r for r in from_json(tuple[TensorRecord, ...], content["outputs"])}
        self.profiles = from_json(tuple[Profile, ...], content["profiles"])
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.names = [*self.inputs, *self.outputs]
        self.weight_streaming_budget_v2 = 0
        self.contexts: list[ContextDouble] = []

    num_io_tensors = property(lambda self: len(self.names))
    num_optimization_profiles = property(lambda self: len(self.profiles))

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self.inputs else "output"

    def get_tensor_location(self, name: str) -> str:
        return "device"

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=TENSORRT_NAMES[self.record(name).dtype])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else -1 for d in self.record(name).shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        shapes = self.profiles[profile_index].shapes[name]
        return [tuple(shapes.min), tuple(shapes.opt), tuple(shapes.max)]

    def get_weight_streaming_automatic_budget(self) -> int:
        return 12345

    def record(self, name: str) -> TensorRecord:
        return self.inputs.get(name) or self.outputs[name]

    def create_runtime_config(self) -> SimpleNamespace:
        assert self.module.target == "tensorrt-rtx", "TensorRT 10.3 has no runtime configuration"
        config = SimpleNamespace(cuda_graph_strategy=0)
        config.set_execution_context_allocation_strategy = lambda strategy: setattr(config, "strategy", strategy)
        self.module.configs.append(config)
        return config

    def create_execution_context(self, how: object) -> ContextDouble:
        assert isinstance(how, SimpleNamespace) == (self.module.target == "tensorrt-rtx")
        self.contexts.append(ContextDouble(self))
        return self.contexts[-1]


class ContextDouble:
    def __init__(self, engine: EngineDouble) -> None:
        self.engine = engine
        self.cuda = engine.module.cuda
        self.profile: Profile | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.version = 0
        """Of everything that was set; a graph is good for the version that it was captured from."""
        self.flushed = False
        """Whether it ran since a shape was last changed."""

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.profile = self.engine.profiles[profile_index]
        self.shapes, self.flushed = {}, False
        self.version += 1
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        fixed = self.engine.inputs[name].shape
        limits = self.profile.shapes.get(name)
        low, high = (limits.min, limits.max) if limits else (fixed, fixed)
        if len(shape) != len(fixed) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            self.engine.logger.log(1, f"{name} {shape} is outside the profile, {low} to {high}")
            return False
        self.shapes[name] = tuple(shape)
        self.version += 1
        self.flushed = False
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert name in self.engine.names and memory
        self.addresses[name] = memory
        self.version += 1
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.engine.inputs:
            return self.shapes[name]
        record, (batch, added) = self.engine.outputs[name], self.shapes["input_ids"]
        if name == "logits":
            return (batch, record.shape[1] if isinstance(record.shape[1], int) else added, record.shape[2])
        past = self.shapes[name.replace("present.", "past_key_values.", 1)]
        new_alone = record.shape[2] == self.engine.inputs["input_ids"].shape[1]
        return (batch, past[1], added if new_alone else past[2] + added, past[3])

    def execute_async_v3(self, stream_handle: int) -> bool:
        missing = sorted(set(self.engine.names) - set(self.addresses)) + self.infer_shapes()
        if missing:
            self.engine.logger.log(1, f"{missing[0]} has no address or shape")
            return False
        if self.cuda.recording is not None and not self.flushed:
            raise DeviceFault("captured right after a shape was changed: the deferred updates would be part of the graph")
        self.flushed = True
        self.cuda.counts["enqueues"] += 1
        captured = self.version if self.cuda.recording is not None else None
        shapes = {name: self.get_tensor_shape(name) for name in self.engine.names}
        addresses = dict(self.addresses)

        def run() -> None:
            if captured not in (None, self.version):
                raise DeviceFault("a graph is launched after its context was changed")
            self._run(shapes, addresses)

        self.cuda.add(stream_handle, run)
        return True

    def _run(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        feeds = {}
        kinds = {i.name: np.float32 if i.type == "tensor(float)" else None for i in self.engine.session.get_inputs()}
        for name in self.engine.inputs:
            value = self._memory(name, shapes[name], addresses[name])
            feeds[name] = value.astype(kinds[name]) if kinds[name] else value.copy()
        names = list(self.engine.outputs)
        for name, value in zip(names, self.engine.session.run(names, feeds), strict=True):
            assert value.shape == shapes[name], f"{name} is {value.shape}, inferred as {shapes[name]}"
            memory = self._memory(name, shapes[name], addresses[name])
            memory[...] = value.astype(memory.dtype)

    def _memory(self, name: str, shape: tuple[int, ...], address: int) -> np.ndarray:
        dtype = np.dtype(DTYPES[self.engine.record(name).dtype])
        size = int(np.prod(shape)) * dtype.itemsize
        if not size:
            return np.zeros(shape, dtype)
        self.cuda.check(address, size)
        return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)
