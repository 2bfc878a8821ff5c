"""The export itself, after every check that needs no torch: from a plan to a finished bundle, not yet held against its golden arrays."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from calibration.mixed import outweighed_by_table
from calibration.settings import QuantizationSettings
from calibration.weights import WeightError
from graph_passes.external import write_graph
from graph_passes.fold import fold_graph
from graph_passes.head import expose_head
from graph_passes.tied_head import tie_head, untie_head
from reft_export.base.adapters import check_fit, check_layers, union_nodes
from reft_export.base.classifiers import head_parameters
from reft_export.base.load import Base, load_base, load_without_weights
from reft_export.base.memory import share_weights
from reft_export.base.model_record import model_record
from reft_export.bundling.files import BundleParts, Report, stored_how, write_bundle
from reft_export.bundling.result import quantization_record
from reft_export.bundling.tokenizer_files import without_indentation
from reft_export.eager.steering import steerers_of
from reft_export.exporting.dynamo import cache_shapes
from reft_export.exporting.exported_graph import ExportedGraph
from reft_export.exporting.plan import ExportPlan, count_parameters
from reft_export.exporting.routes import ROUTES
from reft_export.exporting.settings import ExportSettings
from reft_export.parity.golden import InputsByName, Recorded, inputs_of, record_base, record_quantized
from reft_export.parity.quality import Attempt, QualityGate
from reft_export.quantizing.given import Given, given_blocks
from reft_export.quantizing.importance import Squares, input_watcher
from reft_export.quantizing.sensitivity import MixedPrecision
from reft_export.quantizing.weights import Chosen, EagerModel, Material, choose_weights, measurable
from reft_export.tasks.task import TASKS
from runtimes.artifacts.listed_files import TOKENIZER_FILES
from runtimes.artifacts.manifest import Manifest, Quantization
from runtimes.edits.adapter import Adapter
from runtimes.edits.op import EditNode
from runtimes.edits.positions import needs_slots
from runtimes.errors import ExportError

NODE_BYTES, GOLDEN_BYTES = 300, 2_000_000
"""Of a node of the graph, and of the golden arrays of base and adapters: what a budget leaves for them."""
SCRATCH = ".exporter"
"""An exporter's own files inside the unfinished bundle, on the disk that has to hold the graph anyway; gone when it is finished."""


def check_model(plan: ExportPlan, settings: ExportSettings, *, accept_base: bool = False) -> ExportPlan:
    """The rest of ``plan_export``'s refusals, which the base's model on torch's meta device shows; the plan, settled."""
    checkpoint = plan.checkpoint
    base = load_without_weights(checkpoint.folder, name=checkpoint.name)
    for name, adapter in plan.adapters.items():
        check_fit(name, adapter, base, accept_base=accept_base)
    check_layers(_nodes(plan, base, settings), base.info.name, base.info.num_hidden_layers)
    if TASKS[base.task].decodes:
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


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """``note``: of the exported graph and of what was chosen; ``tried``: as ``choose_weights`` gives it."""

    manifest: Manifest
    errors: tuple[WeightError, ...]
    note: str
    tried: tuple[Attempt, ...]


def assemble(work: Path, proof: Path, plan: ExportPlan, settings: ExportSettings, quality: QualityGate, report: Report) -> Assembled:
    """Everything of the bundle into ``work``; where it quantizes activations, arrays recorded without that into ``proof``."""
    base = load_base(plan.checkpoint.folder, name=plan.checkpoint.name)
    task = TASKS[base.task]
    nodes, model = _nodes(plan, base, settings), model_record(base)
    if task.decodes:
        cache_shapes(base.model)  # refused before any work, whatever the route
    report("recording what the eager model says")
    inputs = inputs_of(base, plan.adapters)
    seen: dict[str, Squares] = {}
    recorded = record_base(
        work / "golden",
        base,
        inputs,
        steerers_of(plan.adapters),
        settings.float_type,
        quantized=settings.weight_only is not None,
        around=input_watcher(seen, base.model, settings.weight_only, settings.float_type),
    )

    report("exporting the graph")
    shared = replace(base, model=share_weights(base.model))  # exporters rearrange modules in place
    exported = ROUTES[base.task, settings.exporter](shared, work / SCRATCH, settings)
    del shared
    graph = exported.model
    report(f"folding {len(nodes)} edit nodes")
    fold_graph(graph, nodes)
    head = expose_head(graph, exported.weights, head_parameters(base.model) if task.swaps_head else ())
    weights = {name: source for name, source in exported.weights.items() if name in graph.graph.initializers}
    chosen = None
    if settings.weight_only is not None:
        of = replace(_material(plan, exported, base, inputs, recorded, settings, quality), seen=seen)
        chosen = choose_weights(of, settings.weight_only, quality, report)
        graph = chosen.graph
    stored = _stored(exported, chosen, settings)
    report("writing the graph")
    write_graph(graph, work)
    if chosen is not None:
        report("recording what the eager model says with the quantized weights")
        record_quantized(
            *(work / "golden", proof, chosen.model, graph, weights, recorded.inputs, recorded.steerers, recorded.fp32),
            loaded=True,
            known=chosen.said,
        )
    shutil.rmtree(work / SCRATCH, ignore_errors=True)
    parts = BundleParts(
        model=model,
        task=base.task,
        precision=settings.float_type,
        quantization=stored.record,
        embeddings=stored.embeddings,
        exporter=settings.exporter,
        logits=settings.logits,
        nodes=nodes,
        adapters=tuple(plan.adapters),
        weights=weights,
        labels=base.info.labels,
        head=head,
    )
    manifest = write_bundle(work, graph, parts, plan.adapters, base)
    # onnxscript's rewrite rules, which live as long as the process, still point at the graph: without this the weights do too.
    for value in (*graph.graph.initializers.values(), *exported.model.graph.initializers.values()):
        value.const_value = None
    notes = (
        exported.note,
        chosen.note if chosen else "",
        stored.note,
        not_in_engines(plan.adapters) if settings.target == "tensorrt" else "",
    )
    return Assembled(manifest=manifest, errors=stored.errors, note="; ".join(filter(None, notes)), tried=chosen.tried if chosen else ())


def not_in_engines(adapters: Mapping[str, Adapter]) -> str:
    """A line on the adapters that ``build`` will refuse; "" where it takes them all."""
    names = [name for name, adapter in adapters.items() if needs_slots(adapter.where)]
    which = f"{', '.join(names)}, and build refuses a bundle with {'it' if len(names) == 1 else 'them'}"
    return f"no engine computes the positions of {which}" if names else ""


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """How the weights were written."""

    errors: tuple[WeightError, ...] = ()
    record: Quantization | None = None
    embeddings: str | None = None
    note: str = ""


def _beside_weights(plan: ExportPlan, graph: ir.Model) -> int:
    """Bytes of a bundle beside its weights, about: tokenizer and graph, and for each name its golden arrays."""
    files = (plan.checkpoint.folder / name for name in TOKENIZER_FILES)
    tokenizer = sum(len(without_indentation(file.read_bytes())) for file in files if file.is_file())
    return tokenizer + NODE_BYTES * len(graph.graph) + GOLDEN_BYTES * (1 + len(plan.adapters))


def _material(
    plan: ExportPlan,
    exported: ExportedGraph,
    base: Base,
    inputs: InputsByName,
    recorded: Recorded,
    settings: ExportSettings,
    quality: QualityGate,
) -> Material:
    """The graph is copied for a second try where one may come: its weights stay in memory until the first is measured."""
    asked = None
    if settings.mixed or settings.budget_mb is not None:
        beside = _beside_weights(plan, exported.model)
        asked = MixedPrecision(budget=None if settings.budget_mb is None else int(settings.budget_mb * 1e6) - beside)
    again = settings.precision == "int4" and measurable(recorded.fp32) and not quality.accept_loss
    large_table = settings.weight_only is not None and _outweighed(exported, settings.weight_only)
    copied = again or large_table or asked is not None
    return Material(
        graph=exported.model.clone if copied else lambda: exported.model,
        model=EagerModel(base.model),  # the graph reads the same memory, so that putting it away would free nothing
        sources=exported.weights,
        inputs=inputs,
        steerers=recorded.steerers,
        fp32=recorded.fp32,
        again=again,
        large_table=large_table,
        mixed=asked,
        given=Given() if settings.weight_only is None else given_blocks(base.folder, exported.weights, settings.weight_only),
    )


def _outweighed(exported: ExportedGraph, settings: QuantizationSettings) -> bool:
    graph = exported.model.clone()
    untie_head(graph.graph)
    return outweighed_by_table(graph.graph, settings, exported.weights)


def _stored(exported: ExportedGraph, chosen: Chosen | None, settings: ExportSettings) -> _Stored:
    if chosen is not None:
        done, graph = chosen.quantized, chosen.graph.graph
        record = quantization_record(chosen.settings, done)
        return _Stored(errors=done.errors, record=record, embeddings=stored_how(graph, tied=done.tied), note=done.note)
    # bfloat16 is checked by ONNX's checker, which knows no operators of onnxruntime's.
    tied = tie_head(exported.model, fused=settings.target == "onnxruntime" and settings.float_type != "bf16") is not None
    return _Stored(embeddings=stored_how(exported.model.graph, tied=tied))
