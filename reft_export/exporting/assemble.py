"""The export itself, after every check that needs no torch: from a plan to a finished bundle, not yet held against its golden arrays."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from calibration.quantize import quantize_graph
from calibration.weights import WeightError
from graph_passes.external import write_graph
from graph_passes.fold import fold_graph
from graph_passes.head import expose_head
from reft_export.base.adapters import check_fit, check_layers, union_nodes
from reft_export.base.classifiers import head_parameters
from reft_export.base.dequantized import expert_matrices
from reft_export.base.load import Base, load_base, load_without_weights, set_precision
from reft_export.base.model_record import model_record
from reft_export.bundling.files import BundleParts, Report, write_bundle
from reft_export.bundling.result import quantization_record
from reft_export.eager.steering import Steerer, steered
from reft_export.exporting.dynamo import cache_shapes
from reft_export.exporting.exported_graph import ExportedGraph
from reft_export.exporting.plan import ExportPlan, count_parameters
from reft_export.exporting.routes import ROUTES
from reft_export.exporting.settings import ExportSettings
from reft_export.parity.golden import fp32_logits, inputs_of, record_golden, record_quantized
from reft_export.tasks.task import Inputs
from runtimes.artifacts.bundle import Manifest
from runtimes.artifacts.task_names import TEXT_GENERATION
from runtimes.edits.adapter import Adapter
from runtimes.edits.op import EditNode
from runtimes.errors import ExportError

SCRATCH = ".exporter"
"""An exporter's own files inside the unfinished bundle, on the disk that has to hold the graph anyway; gone when it is finished."""


def check_model(plan: ExportPlan, settings: ExportSettings, *, accept_base: bool = False) -> ExportPlan:
    """The rest of ``plan_export``'s refusals, which the base's model on torch's meta device shows; the plan, settled."""
    checkpoint = plan.checkpoint
    base = load_without_weights(checkpoint.folder, name=checkpoint.name)
    for name, adapter in plan.adapters.items():
        check_fit(name, adapter, base, accept_base=accept_base)
    check_layers(_nodes(plan, base, settings), base.info.name, base.info.num_hidden_layers)
    if base.task == TEXT_GENERATION:
        _check_cache(base)
    counts = count_parameters((name, tuple(parameter.shape)) for name, parameter in base.model.named_parameters())
    return replace(plan, parameters=counts, settled=True)


def _check_cache(base: Base) -> None:
    """``cache_shapes`` without weights. Of layers that no meta device runs (grouped products of experts, operations that ask for a value)
    only the loaded model shows the cache."""
    try:
        cache_shapes(base.model)
    except ExportError as e:
        if not isinstance(e.__cause__, NotImplementedError):
            raise
    except RuntimeError:
        return


def _nodes(plan: ExportPlan, base: Base, settings: ExportSettings) -> tuple[EditNode, ...]:
    return union_nodes(list(plan.adapters.values()), settings.sites, base.info.num_hidden_layers)


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorded:
    """What the eager model is recorded on and said, carried from its recording to that of the quantized weights."""

    inputs: Inputs
    steerers: Mapping[str, Steerer]
    fp32: Mapping[str, np.ndarray] | None
    """Logits by name of the float32 model; None of a bundle that is that."""


def assemble(
    work: Path, proof: Path, plan: ExportPlan, settings: ExportSettings, report: Report
) -> tuple[Manifest, tuple[WeightError, ...]]:
    """Everything of the bundle into ``work``; where it quantizes activations, arrays recorded without that into ``proof``."""
    base = load_base(plan.checkpoint.folder, name=plan.checkpoint.name)
    nodes = _nodes(plan, base, settings)
    if base.task == TEXT_GENERATION:
        cache_shapes(base.model)  # refused before any work, whatever the route
    report("recording what the eager model says")
    recorded = _record(work / "golden", base, plan.adapters, settings)
    model = model_record(base)  # before the export rearranges the base

    report("exporting the graph")
    exported = ROUTES[base.task, settings.exporter](base, work / SCRATCH, settings)
    graph = exported.model
    report(f"folding {len(nodes)} edit nodes")
    fold_graph(graph, nodes, slots=settings.slots)
    head = expose_head(graph, exported.weights, head_parameters(base.model) if base.info.labels else ())
    weights = {name: source for name, source in exported.weights.items() if name in graph.graph.initializers}
    errors = _quantize_and_write(work, exported, settings, report)
    if settings.weight_only is not None:
        report("recording what the eager model says with the quantized weights")
        fresh = load_base(plan.checkpoint.folder, checked=True)  # exporting rearranged the first one's weights
        said = (recorded.inputs, recorded.steerers, recorded.fp32 or {})
        record_quantized(work / "golden", proof, fresh.model, graph, weights, *said)
    parts = BundleParts(
        model=model,
        task=base.task,
        precision=settings.float_type,
        quantization=None if settings.weight_only is None else quantization_record(settings.weight_only),
        exporter=settings.exporter,
        logits=settings.logits,
        slots=settings.slots,
        nodes=nodes,
        adapters=tuple(plan.adapters),
        weights=weights,
        labels=base.info.labels,
        head=head,
    )
    shutil.rmtree(work / SCRATCH, ignore_errors=True)
    manifest = write_bundle(work, graph, parts, plan.adapters, base)
    # onnxscript's rewrite rules, which live as long as the process, still point at the graph: without this the weights do too.
    for value in graph.graph.initializers.values():
        value.const_value = None
    return manifest, errors


def _record(golden: Path, base: Base, adapters: Mapping[str, Adapter], settings: ExportSettings) -> Recorded:
    """Leaves the base in the bundle's float type. Of weights that will be quantized, the golden arrays are written when they are."""
    inputs = inputs_of(base)
    steerers = {name: partial(steered, adapter=adapter) for name, adapter in adapters.items()}
    fp32 = None if settings.precision == "fp32" else fp32_logits(base.model, inputs, steerers)
    set_precision(base.model, settings.float_type)
    if settings.weight_only is None:
        record_golden(golden, base.model, inputs, steerers, fp32=fp32)
    return Recorded(inputs=inputs, steerers=steerers, fp32=fp32)


def _quantize_and_write(work: Path, exported: ExportedGraph, settings: ExportSettings, report: Report) -> tuple[WeightError, ...]:
    errors: tuple[WeightError, ...] = ()
    if settings.weight_only is not None:
        report(f"quantizing weights to {settings.precision}")
        errors = quantize_graph(exported.model, settings.weight_only, float_inputs=expert_matrices(exported.weights)).errors
    report("writing the graph")
    write_graph(exported.model, work)
    return errors
