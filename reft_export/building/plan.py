"""Every choice of a build, made before any work: the plugin, the builder, the GPUs, the largest shapes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graph_passes.cache_shapes import ATTENTION
from graph_passes.external import load_graph
from graph_passes.tensorrt_graph import EngineGraph, derive_tensorrt_graph
from reft_export.building.engine_profiles import EngineLimits, engine_profiles
from reft_export.building.plugin import check_kernels, check_ops, choose_plugin
from reft_export.building.settings import BuildSettings
from reft_export.bundling.recorded import check_recorded
from runtimes.artifacts.bundle import Bundle, open_bundle
from runtimes.artifacts.engine import Profile, is_engine
from runtimes.artifacts.golden_schema import BASE_GOLDEN
from runtimes.artifacts.manifest import DATA_FILE
from runtimes.artifacts.ort_adapter_file import read_onnx_adapter
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION
from runtimes.edits.positions import needs_slots
from runtimes.errors import BackendUnavailable, EngineError, InputError
from runtimes.tensorrt.builder import compute_capability_names
from runtimes.tensorrt.library import install_line, is_installed, load_tensorrt, module_name, present_compute_capability, tensorrt_version

RTX_DEFAULT = ("8.6", "8.9", "12.0")
"""GPUs that TensorRT-RTX builds for where none is here and none is named: the GeForce and RTX generations since Ampere."""
MAX_CONTEXT, MAX_SEQUENCE, MAX_BATCH = 4096, 1024, 4
"""Defaults that the model's own context bounds further: an engine reserves memory for its largest shapes. A batch of four admits every
golden array in one call."""
MAX_SLOTS, MAX_RANK = 64, 64
MAX_RANK_OF_FUNCTION = 8
"""Without the plugin every token gathers matrices of its own, [batch, sequence, r, D] in float32: ranks cost memory there."""
BUILDER_MEMORY = 0.4e9
"""What a builder takes for a model of no size."""
ENGINE_CODE = 15e6
"""What kernels take in a plan, as measured: 13 to 17 MB for a model of 3 MB."""
MEMORY_PER_WEIGHT_BYTE = 3.0
"""As measured: 268 MB of weights were built with 1.2 GB."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BuildPlan:
    """What a build will do, with every choice made."""

    bundle: Bundle
    graph: EngineGraph
    adapters: Mapping[str, Mapping[str, np.ndarray]]
    """Those that the engine answers to; a frozen one has no tensors left to bind."""
    builder: str
    """"python", or "trtexec" where TensorRT came without its Python package."""
    compute_capabilities: tuple[str, ...]
    plugin: Path | None
    limits: EngineLimits
    profiles: tuple[Profile, Profile]
    frozen: str | None
    target: str
    notes: tuple[str, ...]
    memory: float
    disk: float

    @property
    def steps(self) -> tuple[str, ...]:
        """What will be done, a line each."""
        how = "the plugin " + self.plugin.name if self.plugin is not None else "the function, in TensorRT's own layers"
        banks, bounds, limits = "banks and rules as inputs", "", self.limits
        if self.frozen is not None:
            banks = f"{self.frozen} frozen into it"
        else:
            bounds = f", slots 1 to {limits.max_slots}, rank 1 to {limits.max_rank}"
        return (
            f"derive TensorRT's graph: {self.graph.edit_nodes} edit nodes as {how}, {banks}",
            f"build for {self.target} ({self.builder}), compute capability {', '.join(self.compute_capabilities)}: batch 1 to "
            f"{limits.max_batch}, sequence 1 to {limits.max_sequence}, context {limits.context}{bounds}",
            f"write the engine with adapters: {', '.join(self.adapters) or 'none'}",
        )


def plan_build(source: Path, settings: BuildSettings) -> BuildPlan:
    """Opens the bundle, derives TensorRT's graph in memory and makes every choice; writes nothing, starts nothing.

    Raises EngineError or BackendUnavailable for a bundle, GPU or TensorRT that does not go together, InputError and BundleError for what
    the user named and is not there.
    """
    bundle = _open_decoder(source)
    notes: list[str] = []
    stored = {name: bundle.adapter(name) for name in bundle.adapter_names}
    if explicit := [each for each in stored.values() if needs_slots(each.positions)]:
        raise EngineError(
            f"adapter {explicit[0].name} edits at {explicit[0].positions}, which no engine computes; take it out first: reft-export add "
            f"{source} --remove {explicit[0].name}"
        )
    tensors = {name: read_onnx_adapter(each.file) for name, each in stored.items()}
    if settings.freeze not in (None, BASE_GOLDEN):
        bundle.adapter_record(settings.freeze)  # refuses a name that the bundle does not have
    plugin = None if settings.freeze == BASE_GOLDEN else choose_plugin(settings, notes)
    banks = None if settings.freeze is None else {BASE_GOLDEN: {}, **tensors}[settings.freeze]
    model = load_graph(bundle.graph_path)
    _refuse_in_place(bundle, model)
    check_recorded(bundle, model)
    graph = derive_tensorrt_graph(model, plugin=plugin is not None, freeze=banks, new_columns=_takes_pads_between(bundle))
    builder, capabilities = _builder(settings, notes)
    if plugin is not None:
        check_kernels(plugin, capabilities)
        check_ops(plugin, graph)
    limits = _limits(bundle, settings, tensors, plugin=plugin is not None)
    profiles = engine_profiles(graph.inputs, {name for node in bundle.nodes for name in node.bank_names}, limits)
    if settings.freeze is not None:
        tensors = {name: {} for name in tensors if name == settings.freeze}
    weights = sum(path.stat().st_size for path in (bundle.graph_path, bundle.folder / DATA_FILE) if path.is_file())
    return BuildPlan(
        bundle=bundle,
        graph=graph,
        adapters=tensors,
        builder=builder,
        compute_capabilities=capabilities,
        plugin=plugin,
        limits=limits,
        profiles=profiles,
        frozen=settings.freeze,
        target=settings.target,
        notes=tuple(notes),
        memory=BUILDER_MEMORY + MEMORY_PER_WEIGHT_BYTE * weights,
        disk=ENGINE_CODE + 1.1 * weights,
    )


def _open_decoder(source: Path) -> Bundle:
    if is_engine(source):
        raise InputError(f"{source} is an engine already; build from the bundle that it was made of")
    bundle = open_bundle(source)
    if bundle.manifest.task == TEXT_CLASSIFICATION:
        raise InputError(f"{source} is a classifier, and engines are built of decoders only; run the bundle itself, in onnxruntime")
    return bundle


def _refuse_in_place(bundle: Bundle, model: ir.Model) -> None:
    """The graph that onnxruntime likes best has no counterpart in TensorRT."""
    if count := sum(node.op_type == ATTENTION for node in model.graph):
        adapters = "".join(f" -a {name}" for name in bundle.adapter_names)
        raise EngineError(
            f"{bundle.folder} was exported for onnxruntime ({count} {ATTENTION} nodes, which TensorRT does not have); export it for "
            f"TensorRT: `reft-export export -m {bundle.manifest.model.name}{adapters} -o OUT --target tensorrt`"
        )


def _takes_pads_between(bundle: Bundle) -> bool:
    """Whether pads may stand between a row's past and its new tokens, as in a KV cache that is wider than what is in it.

    The gate held the graph to that, padded on the right, where it tells positions apart by what it is given; a window counts columns.
    """
    manifest = bundle.manifest
    told = any(record.name == "position_ids" for record in manifest.inputs)
    return told and manifest.padding == "left" and manifest.model.sliding_window is None


def _builder(settings: BuildSettings, notes: list[str]) -> tuple[str, tuple[str, ...]]:
    """Which builder there is, and for which GPUs it builds."""
    if not is_installed(settings.target):
        if settings.target != "tensorrt" or shutil.which("trtexec") is None:
            tool = ", or put its trtexec on PATH" if settings.target == "tensorrt" else ""
            raise BackendUnavailable(f"{module_name(settings.target)} is not installed; {install_line(settings.target)}{tool}")
        return "trtexec", _present(settings)
    trt = load_tensorrt(settings.target)
    if settings.target == "tensorrt":
        return "python", _present(settings)
    known = compute_capability_names(trt)
    if refused := [name for name in settings.compute_capabilities if name not in known]:
        raise EngineError(
            f"TensorRT-RTX {tensorrt_version(trt)} does not build for compute capability {', '.join(refused)}; it builds for "
            f"{', '.join(known)}; for other GPUs (Jetson, data center) use --target tensorrt on the device"
        )
    if settings.compute_capabilities:
        return "python", tuple(dict.fromkeys(settings.compute_capabilities))
    here = present_compute_capability()
    if here in known:
        return "python", (here,)
    notes.append(f"no GPU here that TensorRT-RTX builds for: building for {', '.join(RTX_DEFAULT)}; --sm names others")
    return "python", RTX_DEFAULT


def _present(settings: BuildSettings) -> tuple[str, ...]:
    """TensorRT times its kernels on the GPU it builds for."""
    here = present_compute_capability()
    if here is None:
        raise BackendUnavailable("tensorrt builds on the GPU that it builds for, and there is none here; build on the device")
    if other := [name for name in settings.compute_capabilities if name != here]:
        raise EngineError(f"tensorrt builds for the GPU here ({here}) only, not for {', '.join(other)}; build on that device")
    return (here,)


def _limits(bundle: Bundle, settings: BuildSettings, tensors: Mapping[str, Mapping[str, np.ndarray]], *, plugin: bool) -> EngineLimits:
    """What the user set, else defaults within the model's context and never below what the bundle's adapters need."""
    axes = {name: ("N", *bank.axes) for node in bundle.nodes for name, bank in zip(node.bank_names, node.spec.banks, strict=True)}
    sizes = [
        (axis, size)
        for adapter in tensors.values()
        for name, array in adapter.items()
        for axis, size in zip(axes.get(name, ()), array.shape, strict=False)
    ]
    slots, rank = (max((size for axis, size in sizes if axis == wanted), default=1) for wanted in ("N", "r"))
    if settings.freeze is not None:
        slots = rank = 1
    model = bundle.manifest.model.context_length
    context = _or(settings.context, min(model, MAX_CONTEXT))
    if context > model:
        raise InputError(f"--context {context} is more than {bundle.manifest.model.name} was made for, which is {model}")
    return EngineLimits(
        max_batch=_or(settings.max_batch, MAX_BATCH),
        max_sequence=_or(settings.max_sequence, min(context, MAX_SEQUENCE)),
        context=context,
        max_slots=_or(settings.max_slots, max(MAX_SLOTS, slots)),
        max_rank=_or(settings.max_rank, max(MAX_RANK if plugin else MAX_RANK_OF_FUNCTION, rank)),
        tuned_slots=slots,
        tuned_rank=rank,
    )


def _or(given: int | None, default: int) -> int:
    """Zero is given too, and refused."""
    return default if given is None else given
