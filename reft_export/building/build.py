"""``reft-export build``: a bundle to a TensorRT engine.

Order: everything that can be refused is refused, TensorRT's graph is derived from the bundle's, a process builds the engine, and the
folder takes its place when it is complete. Weights are read where they lie; nothing is left behind when any of it fails.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from reft_export.building.plan import BuildPlan, plan_build
from reft_export.building.settings import BuildSettings
from runtimes.artifacts.adapter_record import renew_records
from runtimes.artifacts.engine import PLAN_FILE, EngineManifest, PluginRecord, open_engine, write_engine_manifest
from runtimes.artifacts.engine_adapter import write_engine_adapter
from runtimes.artifacts.golden_schema import BASE_GOLDEN
from runtimes.artifacts.listed_files import TEMPLATE_FOLDER, TOKENIZER_FILES
from runtimes.artifacts.manifest import DATA_FILE, GRAPH_FILE, MANIFEST_FILE, write_manifest_file
from runtimes.artifacts.values import Target, known
from runtimes.files.claims import temporary_folder
from runtimes.files.folders import atomic_folder, claimed
from runtimes.files.hashes import sha256_of
from runtimes.tensorrt.builder import BuildResult, BuildSpec
from runtimes.tensorrt.builder_process import run_builder, run_trtexec
from runtimes.version import VERSION

Report = Callable[[str], None]
"""Told what is being done; the CLI shows it."""


@dataclass(frozen=True, kw_only=True)
class BuildOutcome:
    engine: EngineManifest
    result: BuildResult
    size: int
    """Bytes of the plan."""
    notes: tuple[str, ...]


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
    with claimed(output, force=force, inputs=[source]):
        report("deriving TensorRT's graph")
        plan = plan_build(source, settings)
        with atomic_folder(output, force=force) as work, temporary_folder() as scratch:
            spec, digest = _specification(plan, settings, work, scratch)
            report(f"building the engine for {settings.target}")
            run = run_builder if plan.builder == "python" else run_trtexec
            result = run(spec, scratch, update=update)
            report("writing the engine folder")
            _copy_bundle(plan, settings, work)
            engine = write_engine_manifest(work, _manifest(plan, settings, result, digest, rebuild=settings.command(source, output)))
            open_engine(work)
            return BuildOutcome(engine=engine, result=result, size=(work / PLAN_FILE).stat().st_size, notes=plan.notes)


def _manifest(plan: BuildPlan, settings: BuildSettings, result: BuildResult, graph_digest: str, *, rebuild: str) -> EngineManifest:
    return EngineManifest(
        created_by=f"reft-export {VERSION}",
        target=known(Target, settings.target, "target"),
        tensorrt_version=result.tensorrt_version,
        compute_capabilities=plan.compute_capabilities,
        plugin=None if plan.plugin is None else PluginRecord(file=plan.plugin.name, sha256=sha256_of(plan.plugin)),
        bundle_digest=plan.bundle.digest,
        graph_digest=graph_digest,
        frozen=settings.freeze,
        inputs=plan.graph.inputs,
        outputs=plan.graph.outputs,
        cache=plan.graph.cache,
        profiles=plan.profiles,
        weight_streaming=settings.weight_streaming,
        build_seconds=result.seconds,
        rebuild=rebuild,
    )


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
        workspace=settings.workspace,
        timing_cache=None if settings.timing_cache is None else str(settings.timing_cache.absolute()),
    )
    return spec, hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _copy_bundle(plan: BuildPlan, settings: BuildSettings, work: Path) -> None:
    """Everything of the bundle that the engine keeps: what it can answer for, and nothing else."""
    bundle = plan.bundle
    answers = {*plan.adapters, *([BASE_GOLDEN] if settings.freeze in (None, BASE_GOLDEN) else [])}
    files = [f"adapters/{name}.json" for name in plan.adapters]
    files += [f"golden/{name}.npz" for name in bundle.golden_names if name in answers]
    files += [name for name in bundle.manifest.files if name in TOKENIZER_FILES or name.startswith(f"{TEMPLATE_FOLDER}/")]
    for name in files:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.folder / name, work / name)
    renew_records(work, tuple(plan.adapters))
    for name, tensors in plan.adapters.items():
        write_engine_adapter(work / "adapters" / f"{name}.safetensors", tensors)
    if plan.plugin is not None:
        (work / "lib").mkdir()
        shutil.copyfile(plan.plugin, work / "lib" / plan.plugin.name)
    write_manifest_file(work / MANIFEST_FILE, replace(bundle.manifest, adapters=tuple(plan.adapters), files={}))
