"""``reft-export build``: a bundle to a TensorRT engine.

Order: everything that can be refused is refused, TensorRT's graph is derived from the bundle's, a process builds the engine, and the
folder takes its place when it is complete. Weights are read where they lie; nothing is left behind when any of it fails.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graph_passes.external import load_graph
from graph_passes.insert import is_edit
from graph_passes.tensorrt_graph import EngineGraph, derive_tensorrt_graph
from reft_export.building.engine_profiles import EngineLimits, engine_profiles
from runtimes.artifacts.bundle import (
    BASE_GOLDEN,
    DATA_FILE,
    GRAPH_FILE,
    MANIFEST_FILE,
    TEMPLATE_FOLDER,
    TOKENIZER_FILES,
    Bundle,
    open_bundle,
)
from runtimes.artifacts.engine import PLAN_FILE, EngineManifest, PluginRecord, Profile, is_engine, open_engine, write_engine_manifest
from runtimes.artifacts.engine_adapter import write_engine_adapter
from runtimes.artifacts.ort_adapter_file import read_onnx_adapter
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION
from runtimes.errors import BackendUnavailable, EngineError, InputError
from runtimes.files.folders import atomic_folder, check_destination
from runtimes.files.hashes import sha256_of
from runtimes.files.records import to_json
from runtimes.native_library import find_plugin_library, plugin_details
from runtimes.tensorrt.builder import BuildResult, BuildSpec, compute_capability_names
from runtimes.tensorrt.builder_process import run_builder, run_trtexec
from runtimes.tensorrt.library import is_installed, load_tensorrt, module_name, present_compute_capability, tensorrt_version
from runtimes.version import VERSION

Report = Callable[[str], None]
"""Told what is being done; the CLI shows it."""

RTX_DEFAULT = ("8.6", "8.9", "12.0")
"""GPUs that TensorRT-RTX builds for where none is here and none is named: the GeForce and RTX generations since Ampere."""
MAX_CONTEXT, MAX_SEQUENCE, MAX_BATCH = 4096, 1024, 4
"""Defaults that the model's own context bounds further: an engine reserves memory for its largest shapes. A batch of four admits every
golden array in one call."""
MAX_SLOTS, MAX_RANK = 64, 64
SELF_REGISTERING = ("libreft_trt_autoload", "libreft_trt_edgellm")
"""The plugin's libraries that are none without their neighbour."""
MAX_RANK_OF_FUNCTION = 8
"""Without the plugin every token gathers matrices of its own, [batch, sequence, r, D] in float32: ranks cost memory there."""
BUILDER_MEMORY = 0.4e9
"""What a builder takes for a model of no size."""
ENGINE_CODE = 15e6
"""What kernels take in a plan, as measured: 13 to 17 MB for a model of 3 MB."""
MEMORY_PER_WEIGHT_BYTE = 3.0
"""As measured: 268 MB of weights were built with 1.2 GB."""


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """``None`` leaves a choice to the bundle and the machine; see ``plan_build``."""

    target: str
    compute_capabilities: tuple[str, ...] = ()
    freeze: str | None = None
    plugin: Path | None = None
    use_plugin: bool = True
    max_batch: int | None = None
    max_sequence: int | None = None
    context: int | None = None
    max_slots: int | None = None
    max_rank: int | None = None
    weight_streaming: bool = False
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        module_name(self.target)
        if self.plugin is not None and not self.use_plugin:
            raise InputError("--plugin and --no-plugin exclude each other; give one of them")
        bank = "--max-slots" if self.max_slots is not None else "--max-rank" if self.max_rank is not None else None
        if self.freeze is not None and bank is not None:
            raise InputError(f"{bank} bounds the adapters that swap, and with --freeze none does; leave one of the two out")
        if self.timing_cache is not None and self.target == "tensorrt-rtx":
            raise InputError(
                "--timing-cache has no use with tensorrt-rtx, which times nothing while it builds: it compiles kernels on the device, at "
                "the first run; leave it out"
            )
        if self.timing_cache is not None and not self.timing_cache.absolute().parent.is_dir():
            raise InputError(f"--timing-cache {self.timing_cache}: its folder does not exist; make it first")
        if self.timing_cache is not None and self.timing_cache.is_dir():
            raise InputError(f"--timing-cache {self.timing_cache} is a folder; name the file that holds the timings, new or not")

    def command(self, source: Path, output: Path) -> str:
        """The command line that builds this engine again."""
        words = ["reft-export", "build", str(source), "--target", self.target]
        if self.target == "tensorrt-rtx":  # the other one builds for the GPU that is there
            words += [word for name in self.compute_capabilities for word in ("--sm", name.replace(".", ""))]
        for option, value in (
            ("--freeze", self.freeze),
            ("--plugin", self.plugin),
            ("--max-batch", self.max_batch),
            ("--max-sequence", self.max_sequence),
            ("--context", self.context),
            ("--max-slots", self.max_slots),
            ("--max-rank", self.max_rank),
            ("--timing-cache", self.timing_cache),
        ):
            words += [] if value is None else [option, str(value)]
        words += [] if self.use_plugin else ["--no-plugin"]
        words += ["--weight-streaming"] if self.weight_streaming else []
        return shlex.join([*words, "-o", str(output), "--force"])


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
    steps: tuple[str, ...]
    notes: tuple[str, ...]
    memory: float
    disk: float


@dataclass(frozen=True, kw_only=True)
class BuildOutcome:
    engine: EngineManifest
    result: BuildResult
    size: int
    """Bytes of the plan."""
    notes: tuple[str, ...]


def plan_build(source: Path, settings: BuildSettings) -> BuildPlan:
    """Opens the bundle, derives TensorRT's graph in memory and makes every choice; writes nothing, starts nothing.

    Raises EngineError or BackendUnavailable for a bundle, GPU or TensorRT that does not go together, InputError and BundleError for what
    the user named and is not there.
    """
    if is_engine(source):
        raise InputError(f"{source} is an engine already; build from the bundle that it was made of")
    bundle = open_bundle(source)
    if bundle.manifest.task == TEXT_CLASSIFICATION:
        raise InputError(f"{source} is a classifier, and engines are built of decoders only; run the bundle itself, in onnxruntime")
    notes: list[str] = []
    tensors = {name: read_onnx_adapter(bundle.adapter(name).file) for name in bundle.adapter_names}
    if settings.freeze not in (None, BASE_GOLDEN):
        bundle.adapter_record(settings.freeze)  # refuses a name that the bundle does not have
    plugin = None if settings.freeze == BASE_GOLDEN else _plugin(settings, notes)
    frozen = {None: None, BASE_GOLDEN: {}}.get(settings.freeze, tensors.get(settings.freeze))
    graph = derive_tensorrt_graph(load_graph(bundle.graph_path), plugin=plugin is not None, freeze=frozen)
    builder, capabilities = _builder(settings, notes)
    if plugin is not None:
        _check_kernels(plugin, capabilities)
        _check_ops(plugin, graph)
    limits = _limits(bundle, settings, tensors, graph, plugin=plugin is not None)
    profiles = engine_profiles(graph.inputs, {name for node in bundle.nodes for name in node.bank_names}, limits)
    if settings.freeze is not None:
        tensors = {name: {} for name in tensors if name == settings.freeze}
    weights = sum(path.stat().st_size for path in (bundle.graph_path, bundle.folder / DATA_FILE) if path.is_file())
    how = "the plugin " + plugin.name if plugin is not None else "the function, in TensorRT's own layers"
    return BuildPlan(
        bundle=bundle,
        graph=graph,
        adapters=tensors,
        builder=builder,
        compute_capabilities=capabilities,
        plugin=plugin,
        limits=limits,
        profiles=profiles,
        steps=(
            f"derive TensorRT's graph: {graph.edit_nodes} edit nodes as {how}, "
            + ("banks and rules as inputs" if settings.freeze is None else f"{settings.freeze} frozen into it"),
            f"build for {settings.target} ({builder}), compute capability {', '.join(capabilities)}: batch 1 to {limits.max_batch}, "
            f"sequence 1 to {limits.max_sequence}, context {limits.context}"
            + ("" if settings.freeze is not None else f", slots 1 to {limits.max_slots}, rank 1 to {limits.max_rank}"),
            f"write the engine with adapters: {', '.join(tensors) or 'none'}",
        ),
        notes=tuple(notes),
        memory=BUILDER_MEMORY + MEMORY_PER_WEIGHT_BYTE * weights,
        disk=ENGINE_CODE + 1.1 * weights,
    )


def build_engine(
    source: Path,
    output: Path,
    settings: BuildSettings,
    *,
    force: bool = False,
    report: Report = print,
    update: Report = lambda _: None,
) -> BuildOutcome:
    """Writes the engine to ``output``, atomically. Refusals come before any work; ``update`` is told where the builder is.

    Of ``settings``, max_batch counts rows B of a call, max_sequence columns S of a prompt per call, context columns of past and current
    tokens, max_slots and max_rank what a bank of a swapped adapter may have. Times are in seconds, sizes in bytes.

    Raises what ``plan_build`` raises, and BuildError where TensorRT does not build the graph, or dies over it.

    Example::

        settings = BuildSettings(target="tensorrt-rtx", compute_capabilities=("8.6",), context=2048)
        outcome = build_engine(Path("pirate-bundle"), Path("pirate-engine"), settings)
        print(outcome.engine.tensorrt_version, outcome.size)
    """
    check_destination(output, force=force, inputs=[source])
    report("deriving TensorRT's graph")
    plan = plan_build(source, settings)
    with atomic_folder(output, force=force) as work, tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        spec, digest = _specification(plan, settings, work, scratch)
        report(f"building the engine for {settings.target}")
        run = run_builder if plan.builder == "python" else run_trtexec
        result = run(spec, scratch, update=update)
        report("writing the engine folder")
        _copy_bundle(plan, settings, work)
        engine = EngineManifest(
            created_by=f"reft-export {VERSION}",
            target=settings.target,
            tensorrt_version=result.tensorrt_version,
            compute_capabilities=plan.compute_capabilities,
            plugin=None if plan.plugin is None else PluginRecord(file=plan.plugin.name, sha256=sha256_of(plan.plugin)),
            bundle_digest=plan.bundle.digest,
            graph_digest=digest,
            frozen=settings.freeze,
            inputs=plan.graph.inputs,
            outputs=plan.graph.outputs,
            profiles=spec.profiles,
            weight_streaming=settings.weight_streaming,
            build_seconds=result.seconds,
            rebuild=settings.command(source, output),
        )
        engine = write_engine_manifest(work, engine)
        open_engine(work)
        return BuildOutcome(engine=engine, result=result, size=(work / PLAN_FILE).stat().st_size, notes=plan.notes)


def parse_compute_capability(text: str) -> str:
    """ "8.6" of 86, 8.6, sm86 or sm_86; raises InputError."""
    digits = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", text.strip().lower())
    if not digits:
        raise InputError(f"--sm {text!r} is not a compute capability; give it like 86 or 8.6")
    return f"{digits[1]}.{digits[2]}"


def _plugin(settings: BuildSettings, notes: list[str]) -> Path | None:
    if not settings.use_plugin:
        notes.append("no plugin: the edit is expanded into TensorRT's own layers, which cost more than one small kernel per edit")
        return None
    if settings.plugin is not None:
        if not settings.plugin.is_file():
            raise InputError(f"--plugin {settings.plugin} is not a file; name the plugin library libreft_trt.so")
        if settings.plugin.name.startswith(SELF_REGISTERING):
            raise InputError(
                f"--plugin {settings.plugin} is for hosts that only open a library, and needs libreft_trt.so beside it, while an engine "
                "carries one library; name libreft_trt.so itself"
            )
        return settings.plugin.absolute()
    found = find_plugin_library()
    if found is None:
        notes.append(
            "the plugin library was not found: the edit is expanded into TensorRT's own layers, which cost more than one small kernel "
            "per edit; `reft-export doctor` says how to build it"
        )
    return found


def _check_kernels(plugin: Path, capabilities: tuple[str, ...]) -> None:
    """Raises EngineError for a GPU that the plugin has no kernel for: the engine would build, and fail at its first step."""
    try:
        _, architectures = plugin_details(plugin)
    except OSError:
        return  # the builder says why it does not load
    compiled = [divmod(int(name), 10) for name in architectures if name.isdigit()]
    for capability in capabilities:
        gpu = tuple(map(int, capability.split(".")))
        # A kernel runs on later GPUs of its major version; the newest is there as PTX too, which every later GPU compiles.
        if compiled and gpu < compiled[-1] and not any(gpu[0] == major and gpu[1] >= minor for major, minor in compiled):
            raise EngineError(
                f"the plugin {plugin} has kernels for sm {', '.join(architectures)}, and none for compute capability {capability}; build "
                f"it with -DREFT_CUDA_ARCHITECTURES={capability.replace('.', '')} (`reft-export doctor` has the line), or pass --no-plugin"
            )


def _check_ops(plugin: Path, graph: EngineGraph) -> None:
    """Raises EngineError for an edit that the plugin does not have; the parser would only say that it has no importer for it."""
    try:
        version, _ = plugin_details(plugin)
    except OSError:
        return  # the builder says why it does not load
    has = {part.split()[0] for part in version.split(",")}
    if lacks := sorted({node.op_type for node in graph.model.graph if is_edit(node)} - has):
        raise EngineError(
            f"the plugin {plugin} has {version}, and no {lacks[0]}, which the graph needs; compile it again (`reft-export doctor` has the "
            "line), or pass --no-plugin"
        )


def _builder(settings: BuildSettings, notes: list[str]) -> tuple[str, tuple[str, ...]]:
    """Which builder there is, and for which GPUs it builds."""
    if not is_installed(settings.target):
        if settings.target != "tensorrt" or shutil.which("trtexec") is None:
            tool = ", or put its trtexec on PATH" if settings.target == "tensorrt" else ""
            raise BackendUnavailable(f"{module_name(settings.target)} is not installed; pip install 'reft-export[{settings.target}]'{tool}")
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


def _limits(
    bundle: Bundle, settings: BuildSettings, tensors: Mapping[str, Mapping[str, np.ndarray]], graph: EngineGraph, *, plugin: bool
) -> EngineLimits:
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


def _specification(plan: BuildPlan, settings: BuildSettings, work: Path, scratch: Path) -> tuple[BuildSpec, str]:
    """The derived graph in ``scratch``, over the bundle's own weights; what is to be built of it, and the graph's digest."""
    ir.save(plan.graph.model, scratch / GRAPH_FILE)
    lines = [f"{GRAPH_FILE} {sha256_of(scratch / GRAPH_FILE)}"]
    data = plan.bundle.folder / DATA_FILE
    if data.is_file():
        # External data must lie beside the graph: a link, as weights are not copied for the builder's sake.
        os.symlink(data.resolve(), scratch / DATA_FILE)
        lines.append(f"{DATA_FILE} {plan.bundle.manifest.files[DATA_FILE].sha256}")
    spec = BuildSpec(
        target=settings.target,
        graph=str(scratch / GRAPH_FILE),
        plan=str(work / PLAN_FILE),
        plugin=None if plan.plugin is None else str(plan.plugin),
        plugin_layers=0 if plan.plugin is None else plan.graph.edit_nodes,
        inputs=plan.graph.inputs,
        outputs=plan.graph.outputs,
        profiles=plan.profiles,
        compute_capabilities=plan.compute_capabilities if settings.target == "tensorrt-rtx" else (),
        weight_streaming=settings.weight_streaming,
        timing_cache=None if settings.timing_cache is None else str(settings.timing_cache.absolute()),
    )
    return spec, hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _copy_bundle(plan: BuildPlan, settings: BuildSettings, work: Path) -> None:
    """Everything of the bundle that the engine keeps: what it can answer for, and nothing else."""
    bundle = plan.bundle
    answers = {*plan.adapters, *([BASE_GOLDEN] if settings.freeze in (None, BASE_GOLDEN) else [])}
    kept = [f"adapters/{name}.json" for name in plan.adapters]
    kept += [f"golden/{name}.npz" for name in bundle.golden_names if name in answers]
    kept += [name for name in bundle.manifest.files if name in TOKENIZER_FILES or name.startswith(f"{TEMPLATE_FOLDER}/")]
    for name in kept:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.folder / name, work / name)
    for name, tensors in plan.adapters.items():
        write_engine_adapter(work / "adapters" / f"{name}.safetensors", tensors)
    if plan.plugin is not None:
        (work / "lib").mkdir()
        shutil.copyfile(plan.plugin, work / "lib" / plan.plugin.name)
    manifest = replace(bundle.manifest, adapters=tuple(plan.adapters))
    (work / MANIFEST_FILE).write_text(json.dumps(to_json(manifest), indent=1) + "\n", encoding="utf-8")
