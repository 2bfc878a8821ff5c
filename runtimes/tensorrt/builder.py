"""``python -m runtimes.tensorrt.builder SPEC.json``: parses a graph and builds an engine, in a process of its own.

A graph that TensorRT does not like can end it in SIGSEGV or SIGABRT: only a process survives that. On stdout it writes one JSON object
a line, {"step": text} while it works and at the end {"result": BuildResult} or {"error": text}; TensorRT's own log goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.artifacts.engine import Profile
from runtimes.artifacts.manifest import TensorRecord
from runtimes.errors import BuildError, ReftError
from runtimes.files.records import from_json, to_json
from runtimes.precision import onnx_name
from runtimes.tensorrt.library import load_plugin, load_tensorrt, tensorrt_version

REPORT_EVERY = 0.2
"""Seconds between two steps that are reported; TensorRT takes thousands of them."""


@dataclass(frozen=True, kw_only=True)
class BuildSpec:
    target: str
    graph: str
    plan: str
    """Where the serialized engine is written."""
    plugin: str | None
    plugin_layers: int
    """How many plugin layers the parsed network must have."""
    inputs: tuple[TensorRecord, ...]
    """Exactly the inputs that the parsed network must have."""
    outputs: tuple[TensorRecord, ...]
    profiles: tuple[Profile, ...]
    compute_capabilities: tuple[str, ...]
    """The GPUs to build for; empty: the one that is here."""
    weight_streaming: bool
    workspace: int | None
    """MiB that a layer may take for scratch; None: TensorRT's own bound."""
    timing_cache: str | None


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    tensorrt_version: str
    seconds: float
    """From the start of the parser to the serialized engine."""
    peak_memory: int
    """Bytes that the process had resident at most; 0 where the system does not say."""


def compute_capability_names(trt: Any) -> list[str]:
    """The GPUs that this TensorRT builds for without having one ("8.6"); none where it builds for the present GPU only."""
    members = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    return [f"{name[2:-1]}.{name[-1]}" for name in members if name.startswith("SM")]


def build(spec: BuildSpec, report: Callable[[str], None]) -> BuildResult:
    """Builds and writes the engine; raises BuildError where the parser or the builder refuses, or the network is not the expected one."""
    trt = load_tensorrt(spec.target)
    started = time.monotonic()
    logger = _logger(trt)
    if spec.plugin is not None:
        load_plugin(trt, Path(spec.plugin))
    builder = trt.Builder(logger)
    strong = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    # From TensorRT 11 on every network is strongly typed, and the flag is gone.
    network = builder.create_network(0 if strong is None else 1 << int(strong))
    parser = trt.OnnxParser(network, logger)
    report("parsing the graph")
    if not parser.parse_from_file(spec.graph):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = "; ".join(f"{e.node_operator() or 'graph'} {e.node_name()}: {e.desc()}" for e in errors[:3])
        raise BuildError(f"{spec.target} {tensorrt_version(trt)} does not parse the graph: {reasons or 'no reason given'}")
    check_network(trt, network, spec)

    config = configure(trt, builder, spec)
    config.progress_monitor = _monitor(trt, report)
    cache, stored = None, None if spec.timing_cache is None else Path(spec.timing_cache)
    if stored is not None:
        cache = config.create_timing_cache(stored.read_bytes() if stored.is_file() else b"")
        if cache is None or not config.set_timing_cache(cache, False):
            raise BuildError(f"timing cache {stored} is not one of this TensorRT and GPU; remove it or name another file")
    for wanted in spec.profiles:
        profile = builder.create_optimization_profile()
        for name, shapes in wanted.shapes.items():
            profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"{spec.target} refuses the profile {wanted.name}: {logger.last()}")
    report("building the engine")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(f"{spec.target} {tensorrt_version(trt)} does not build the engine: {logger.last()}")
    with open(spec.plan, "wb") as f:
        f.write(plan)
    if cache is not None and stored is not None:
        # Another build may read the file while this one writes it.
        partial = Path(f"{stored}.{os.getpid()}")
        partial.write_bytes(bytes(memoryview(cache.serialize())))
        os.replace(partial, stored)
    return BuildResult(tensorrt_version=tensorrt_version(trt), seconds=time.monotonic() - started, peak_memory=_peak_memory())


def configure(trt: Any, builder: Any, spec: BuildSpec) -> Any:
    """The builder's configuration but for profiles and cache: the GPUs to build for, scratch memory, and float32 that is float32."""
    config = builder.create_builder_config()
    # On by default, it multiplies float32 with ten bits of mantissa: an error of 1e-3, where an fp32 engine is held to 2e-5.
    config.clear_flag(trt.BuilderFlag.TF32)
    if spec.compute_capabilities:
        config.num_compute_capabilities = len(spec.compute_capabilities)
        for index, name in enumerate(spec.compute_capabilities):
            config.set_compute_capability(trt.ComputeCapability.__members__[f"SM{name.replace('.', '')}"], index)
    if spec.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.workspace << 20)
    if spec.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    return config


def check_network(trt: Any, network: Any, spec: BuildSpec) -> None:
    """Holds the parsed network's inputs (name, dtype, rank, on the device), outputs and plugin layers against ``spec``; raises BuildError.

    The parser drops without a word what it can do without: an initializer that is an input too becomes a constant, and an operator whose
    plugin is not found becomes the function that goes by its name.
    """
    found = [network.get_input(i) for i in range(network.num_inputs)]
    got = {t.name: (onnx_name(t.dtype.name), len(t.shape)) for t in found}
    expected = {t.name: (t.dtype, len(t.shape)) for t in spec.inputs}
    if different := sorted(name for name in {*got, *expected} if got.get(name) != expected.get(name)):
        name = different[0]
        raise BuildError(
            f"the parsed network has not the inputs of the graph: {name} is {_described(got.get(name))}, expected "
            f"{_described(expected.get(name))} ({len(different)} differ); an initializer that is an input too is frozen by the parser"
        )
    if shaping := [t.name for t in found if t.is_shape_tensor]:
        raise BuildError(
            f"TensorRT reads the numbers of {', '.join(shaping)} on the host, to find shapes by them, and engines are fed on the GPU; "
            "export the model with `reft-export export --exporter dynamo --target tensorrt`"
        )
    outputs = {network.get_output(i).name for i in range(network.num_outputs)}
    if different := sorted(outputs ^ {t.name for t in spec.outputs}):
        raise BuildError(f"the parsed network has not the outputs of the graph: {different[0]} ({len(different)} differ)")
    layers = sum(network.get_layer(i).type == trt.LayerType.PLUGIN_V3 for i in range(network.num_layers))
    if layers != spec.plugin_layers:
        raise BuildError(f"the parsed network has {layers} plugin layers, expected {spec.plugin_layers}: edits were lost or expanded")


def _described(tensor: tuple[str, int] | None) -> str:
    return "missing" if tensor is None else f"{tensor[0]} of rank {tensor[1]}"


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):
        """Warnings and errors to stderr; remembers errors, for the one line that the user reads."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))
            if severity in (trt.ILogger.WARNING, trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                sys.stderr.write(f"{message}\n")
                sys.stderr.flush()

        def last(self) -> str:
            return self.errors[0] if self.errors else "no reason given"

    return Logger()


def _monitor(trt: Any, report: Callable[[str], None]) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Says where the builder is; a reader that went away cancels the build."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.reported = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            now = time.monotonic()
            if now - self.reported < REPORT_EVERY:
                return True
            self.reported = now
            try:
                report(f"{phase_name} {step + 1}/{self.steps.get(phase_name, step + 1)}")
            except BrokenPipeError:
                return False
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def _peak_memory() -> int:
    """VmHWM: getrusage would count the process that this one was forked from."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)


def _write(event: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def main() -> int:
    spec = from_json(BuildSpec, json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    try:
        result = build(spec, lambda step: _write({"step": step}))
    except ReftError as e:
        _write({"error": str(e)})
        return e.exit_code
    _write({"result": to_json(result)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
