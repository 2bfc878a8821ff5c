"""A plan in memory: opened, held against its manifest, and run through execution contexts that are bound by name.

Not yet run on a GPU.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from runtimes.artifacts.engine import Engine, Profile
from runtimes.artifacts.manifest import TensorRecord
from runtimes.edits.op import OPS
from runtimes.errors import BackendUnavailable, BundleError, InputError, ReftError
from runtimes.precision import ELEMENT_TYPES, onnx_name
from runtimes.tensorrt.cuda_device import CudaDevice
from runtimes.tensorrt.library import load_plugin, tensorrt_version

BOUND = tuple(e.name for e in ELEMENT_TYPES.values() if e.safetensors is not None)
"""Types that inputs and outputs of an engine have here, by the manifest's name."""
BANK_SUFFIXES = tuple(f".{bank.name}" for op in OPS.values() for bank in op.banks)


class LoadedEngine:
    """The deserialized plan of an engine folder, whose inputs, outputs and profiles are what its manifest says.

    ``plugin`` replaces the engine's own plugin library. Raises BackendUnavailable where plan or plugin do not load here, BundleError
    where the plan is not the one of the manifest.
    """

    def __init__(self, engine: Engine, tensorrt: ModuleType, plugin: Path | None = None) -> None:
        self.manifest = engine.engine
        self.folder = engine.folder
        self.tensorrt = tensorrt
        self.inputs = {record.name: record for record in self.manifest.inputs}
        self.outputs = {record.name: record for record in self.manifest.outputs}
        self.log: list[str] = []
        library = engine.plugin_path if plugin is None else plugin
        if library is not None:
            load_plugin(tensorrt, library)
        runtime = tensorrt.Runtime(_logger(tensorrt, self.log))
        self._runtime: object | None = runtime  # which an engine does not outlive
        self._cuda_engine: Any | None = _deserialized(runtime, engine.plan_path)
        if self._cuda_engine is None:
            raise BackendUnavailable(
                f"{engine.plan_path} does not load in {self.manifest.target} {tensorrt_version(tensorrt)}: {self.last_words()}; "
                f"build it again: {self.manifest.rebuild}"
            )
        self._check_tensors()
        self._check_profiles()
        if self.manifest.weight_streaming:
            # Without a budget every weight stays on the device, which such an engine was built to avoid.
            self.cuda_engine.weight_streaming_budget_v2 = self.cuda_engine.get_weight_streaming_automatic_budget()

    def last_words(self) -> str:
        return " ".join(self.log[-1].split()) if self.log else "TensorRT gave no reason"

    def close(self) -> None:
        self._cuda_engine = self._runtime = None

    @property
    def cuda_engine(self) -> Any:
        """TensorRT's ICudaEngine, whose package states no types."""
        if self._cuda_engine is None:
            raise ReftError(f"the engine of {self.folder} is closed; open it again")
        return self._cuda_engine

    def profile(self, name: str) -> Profile:
        return self.manifest.profiles[self._profile_index(name)]

    def _profile_index(self, name: str) -> int:
        return [profile.name for profile in self.manifest.profiles].index(name)

    def context(self, profile: str, device: CudaDevice, *, runtime_graphs: bool = False) -> BoundContext:
        """An execution context on a profile. ``runtime_graphs``: TensorRT-RTX captures and replays CUDA graphs by itself: it knows when
        the kernels that it compiles for a shape are ready, which nobody outside does."""
        strategy = self.tensorrt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE  # memory for this profile, not for the largest
        if self.manifest.target == "tensorrt-rtx":
            config = self.cuda_engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            graphs = self.tensorrt.CudaGraphStrategy
            config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if runtime_graphs else graphs.DISABLED
            context = self.cuda_engine.create_execution_context(config)
        else:
            context = self.cuda_engine.create_execution_context(strategy)
        if context is None or not context.set_optimization_profile_async(self._profile_index(profile), device.stream):
            raise ReftError(f"{self.folder}: no execution context for its {profile} profile: {self.last_words()}; free some GPU memory")
        device.synchronize()
        return BoundContext(self, context, device)

    def check_shapes(self, profile: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises InputError, with the build option that raises the limit, for a shape outside the profile."""
        ranges = self.profile(profile).shapes
        for name, shape in shapes.items():
            if name not in ranges:
                continue
            for axis, (low, got, high) in enumerate(zip(ranges[name].min, shape, ranges[name].max, strict=True)):
                if not low <= got <= high:
                    what, remedy = _dimension(name, axis, got)
                    raise InputError(
                        f"{what} do not fit {self.folder}, which was built for {low} to {high} (profile {profile}, {name}); {remedy}: "
                        f"{self.manifest.rebuild}"
                    )

    def _check_tensors(self) -> None:
        engine, tensorrt = self.cuda_engine, self.tensorrt
        found: dict[str, tuple[str, str, tuple[int, ...]]] = {}
        for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
            kind = "input" if engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT else "output"
            dtype = engine.get_tensor_dtype(name).name
            found[name] = kind, onnx_name(dtype), tuple(engine.get_tensor_shape(name))
            if engine.get_tensor_location(name) != tensorrt.TensorLocation.DEVICE:
                raise self._other_plan(f"{kind} {name} is read on the host")
        stated = {r.name: (kind, r) for kind, records in (("input", self.inputs), ("output", self.outputs)) for r in records.values()}
        if different := sorted(set(found) ^ set(stated)):
            raise self._other_plan(f"{different[0]} is in {'the plan' if different[0] in found else 'the manifest'} only")
        for name, (kind, record) in stated.items():
            if record.dtype not in BOUND or found[name][:2] != (kind, record.dtype) or not _same_shape(record, found[name][2]):
                raise self._other_plan(
                    f"{name} is {' '.join(map(str, found[name]))} in the plan, {kind} {record.dtype} {list(record.shape)} in the manifest"
                )

    def _check_profiles(self) -> None:
        profiles = self.manifest.profiles
        names = [profile.name for profile in profiles]
        if missing := {"prefill", "decode"} - set(names):
            raise self._other_plan(f"it has profiles {names}, and no {sorted(missing)[0]}")
        if self.cuda_engine.num_optimization_profiles != len(profiles):
            raise self._other_plan(f"{self.cuda_engine.num_optimization_profiles} profiles in the plan, {len(profiles)} in the manifest")
        for index, profile in enumerate(profiles):
            for name, stated in profile.shapes.items():
                if name not in self.inputs:
                    raise self._other_plan(f"profile {profile.name} has shapes for {name}, which is no input")
                found = [tuple(shape) for shape in self.cuda_engine.get_tensor_profile_shape(name, index)]
                if found != [tuple(stated.min), tuple(stated.opt), tuple(stated.max)]:
                    raise self._other_plan(f"profile {profile.name} takes {name} from {found[0]} to {found[-1]} in the plan")

    def _other_plan(self, difference: str) -> BundleError:
        return BundleError(f"{self.folder}: its plan is not the one of its manifest: {difference}; build it again: {self.manifest.rebuild}")


@dataclass(frozen=True, kw_only=True)
class Binding:
    """What one run reads and writes. ``inputs`` and ``outputs``: shapes by name; ``addresses``: of all of them."""

    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    outputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: Mapping[str, int] = field(default_factory=dict)


class BoundContext:
    """An execution context, and what it was last given."""

    def __init__(self, loaded: LoadedEngine, context: Any, device: CudaDevice) -> None:
        self._loaded = loaded
        self._context: Any | None = context
        self._device = device
        self._bound = Binding()

    def has(self, binding: Binding) -> bool:
        """Whether this is what the context was last given."""
        return self._bound == binding

    def bind(self, binding: Binding) -> None:
        """Sets what changed. Raises ReftError where TensorRT refuses it, or would write other shapes than memory was reserved for."""
        before, self._bound = self._bound, Binding()
        for name, shape in binding.inputs.items():
            if before.inputs.get(name) != shape and not self._open.set_input_shape(name, shape):
                raise self._failed(f"refuses shape {list(shape)} for {name}")
        for name, address in binding.addresses.items():
            if before.addresses.get(name) != address and not self._open.set_tensor_address(name, address):
                raise self._failed(f"refuses an address for {name}")
        try:
            unknown = self._open.infer_shapes()
        except RuntimeError as e:  # shapes that a layer refuses: TensorRT's own words are in the log
            raise self._failed(f"refuses these shapes ({' '.join(str(e).split())})") from None
        if unknown:
            raise self._failed(f"lacks a shape or address for {unknown[0]}")
        for name, shape in binding.outputs.items():
            if (found := tuple(self._open.get_tensor_shape(name))) != shape:
                raise self._failed(f"writes {name} as {list(found)}, expected {list(shape)}")
        self._bound = binding

    def enqueue(self) -> None:
        if not self._open.execute_async_v3(self._device.stream):
            raise self._failed("did not run")

    def close(self) -> None:
        self._context = None

    @property
    def _open(self) -> Any:
        if self._context is None:
            raise self._failed("has no context any more")
        return self._context

    def _failed(self, what: str) -> ReftError:
        return ReftError(f"{self._loaded.folder}: TensorRT {what}: {self._loaded.last_words()}")


def _deserialized(runtime: Any, plan: Path) -> Any | None:
    """The plan as TensorRT reads it: out of the file's own pages, which the system may take back, not out of a copy in memory. A device
    whose memory the GPU shares would hold the weights twice, for as long as this takes."""
    with open(plan, "rb") as f:
        if os.fstat(f.fileno()).st_size == 0:
            return runtime.deserialize_cuda_engine(b"")  # nothing to map
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return runtime.deserialize_cuda_engine(mapped)


def host_dtype(record: TensorRecord) -> np.dtype:
    return ELEMENT_TYPES[record.dtype].dtype


def size_of(shape: tuple[int, ...], record: TensorRecord) -> int:
    """Bytes of a tensor of that shape and the record's dtype."""
    return math.prod(shape) * host_dtype(record).itemsize


def _same_shape(record: TensorRecord, found: tuple[int, ...]) -> bool:
    """A dimension that the manifest names (rather than numbers) may be fixed in the plan, and -1 is free."""
    return len(record.shape) == len(found) and all(
        got in (-1, want) or not isinstance(want, int) for want, got in zip(record.shape, found, strict=True)
    )


def _dimension(name: str, axis: int, got: int) -> tuple[str, str]:
    """What a dimension of an input counts, and how to get an engine that takes ``got``."""
    if name.startswith("reft.") and name.endswith(BANK_SUFFIXES):
        if axis == 0:
            return f"{got} position groups of the adapter", f"build it again with --max-slots {got}"
        return f"rank {got} and the like", f"build it again with --max-rank {got}"
    if axis == 0:
        return f"{got} rows at once", f"run fewer together (--batch-size), or build it again with --max-batch {got}"
    if name.startswith("past_key_values.") or name == "attention_mask":
        return f"{got} columns of the KV cache", f"use shorter prompts and answers, or build it again with --context {got + 1}"
    return f"{got} new tokens in one call", f"feed them in pieces (--prefill-chunk), or build it again with --max-sequence {got}"


def _logger(tensorrt: ModuleType, lines: list[str]) -> Any:
    """A logger that keeps TensorRT's errors for our own messages and drops the rest."""

    class Log(tensorrt.ILogger):
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (tensorrt.ILogger.Severity.ERROR, tensorrt.ILogger.Severity.INTERNAL_ERROR):
                lines.append(message)

    return Log()
