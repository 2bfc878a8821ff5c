"""``reft-export export``: a Hugging Face decoder and its adapters to a bundle.

Order: eager results are recorded, the graph is exported, edits are folded in, the base is quantized, and the finished bundle is
held against the recorded results before it takes its place. Nothing is left behind when any of it fails.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from calibration.quantize import quantize_graph
from calibration.settings import QuantizationSettings, settings_for
from calibration.weights import WeightError
from graph_passes.external import write_graph
from graph_passes.fold import LEVELS, fold_graph, fuse
from graph_passes.head import expose_head, head_defaults
from reft_export.base.classifiers import check_classifier, head_parameters, is_classifier
from reft_export.base.dequantized import expert_matrices
from reft_export.base.load import DTYPES, Base, load_base, load_without_weights
from reft_export.base.model_folder import read_config
from reft_export.bundling.files import (
    BundleParts,
    Report,
    check_fit,
    copy_tokenizer,
    finish_bundle,
    head_tensors,
    load_adapters,
    union_nodes,
    write_adapter,
)
from reft_export.bundling.model_record import model_record
from reft_export.bundling.result import ExportResult, quantization_record
from reft_export.eager.steering import steered
from reft_export.exporting.builder import check_builder, check_builder_base, export_builder
from reft_export.exporting.dynamo import cache_shapes, export_dynamo
from reft_export.exporting.dynamo_classifier import export_classifier
from reft_export.exporting.exported_graph import ExportedGraph
from reft_export.exporting.optimum import check_optimum, export_optimum
from reft_export.exporting.transformers import check_transformers, export_transformers
from reft_export.parity.gate import check_structure, gate
from reft_export.parity.golden import fp32_logits, inputs_of, record_golden, record_quantized
from runtimes.artifacts.bundle import Manifest
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION, TEXT_GENERATION
from runtimes.edits.adapter import Adapter
from runtimes.edits.edit import Site
from runtimes.edits.op import EditNode
from runtimes.errors import ExportError, InputError
from runtimes.files.folders import atomic_folder, check_destination
from runtimes.precision import TORCH_DTYPES

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
EXPORTERS = ("dynamo", "builder", "optimum", "transformers")
SCRATCH = ".exporter"
"""An exporter's own files inside the unfinished bundle, on the disk that has to hold the graph anyway; gone when it is finished."""
DEFAULT_OPSET = 20


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """``precision`` int4 and int8 are weight-only over a float32 graph; ``block_size`` and ``accuracy_level`` are theirs."""

    precision: str = "fp32"
    exporter: str = "dynamo"
    fuse: str = "none"
    slots: str = "graph"
    logits: str = "all"
    opset: int = DEFAULT_OPSET
    sites: tuple[Site, ...] = ()
    block_size: int = 32
    accuracy_level: int = 4

    def __post_init__(self) -> None:
        for name, value, known in (
            ("precision", self.precision, PRECISIONS),
            ("exporter", self.exporter, EXPORTERS),
            ("fuse", self.fuse, LEVELS),
            ("slots", self.slots, ("graph", "input")),
            ("logits", self.logits, ("all", "last")),
        ):
            if value not in known:
                raise InputError(f"{name} {value!r} is unknown; known: {', '.join(known)}")
        if not 18 <= self.opset <= 23:
            raise InputError(f"opset {self.opset} is not supported; 20 is the default, 18 to 23 can be asked for")
        if self.exporter == "builder" and self.opset != DEFAULT_OPSET:
            raise InputError("onnxruntime-genai's builder chooses the opset itself; leave out --opset, or use --exporter dynamo")
        if self.exporter == "builder" and self.precision == "bf16":
            raise InputError(
                "bf16 is exported by dynamo only: no CPU runs the builder's bfloat16 graph, so nothing here could show it right"
            )
        if self.exporter == "optimum" and (self.float_type != "fp32" or self.logits != "all"):
            raise InputError(
                "optimum's exporter makes float32 graphs with all logits here; use -p fp32, int8 or int4, or --exporter dynamo"
            )

    @property
    def weight_only(self) -> QuantizationSettings | None:
        if self.precision not in ("int8", "int4"):
            return None
        bits = int(self.precision[3:])
        return settings_for("weight-only", bits=bits, block_size=self.block_size, accuracy_level=self.accuracy_level)

    @property
    def float_type(self) -> str:
        return self.precision if self.precision in TORCH_DTYPES else "fp32"


@dataclass(frozen=True, kw_only=True, eq=False)
class ExportPlan:
    """An export that was checked before any work."""

    base: Base
    """Without weights: its model lies on torch's meta device."""
    adapters: Mapping[str, Adapter]
    nodes: tuple[EditNode, ...]


def plan_export(
    model: str,
    adapter_folders: list[Path],
    output: Path,
    settings: ExportSettings,
    *,
    accept_base: bool = False,
    force: bool = False,
) -> ExportPlan:
    """Every refusal that needs no weights; writes nothing. ``export_bundle`` and its dry run both begin here.

    ``accept_base``: adapters of a base that differs from ``model`` in its config alone will do.
    """
    check_destination(output, force=force, inputs=[Path(model), *adapter_folders])
    if Path(model).is_dir():
        _check_task(Path(model), settings)
    check_exporter(settings.exporter)
    _ = settings.weight_only  # refuses a block size or an accuracy level that is none
    adapters = load_adapters(adapter_folders)
    base = load_without_weights(model)
    if base.task == TEXT_CLASSIFICATION:
        check_classifier_settings(base.info.name, settings)
    for name, adapter in adapters.items():
        check_fit(name, adapter, base, accept_base=accept_base)
    nodes = union_nodes(list(adapters.values()), settings.sites, base.info.num_hidden_layers)
    _check_layers(nodes, base)
    if base.task == TEXT_GENERATION:
        _check_cache(base)
    if settings.exporter == "builder":
        check_builder_base(base.folder)
    return ExportPlan(base=base, adapters=adapters, nodes=nodes)


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


def export_bundle(
    model: str,
    adapter_folders: list[Path],
    output: Path,
    settings: ExportSettings,
    *,
    accept_base: bool = False,
    force: bool = False,
    report: Report = print,
) -> ExportResult:
    """Writes a bundle to ``output``, atomically. Refusals come before any work; a missed parity budget leaves no bundle.

    ``model``: the base's folder or hub id: it is read again where exporting has rearranged the weights, so one in memory will not do.
    ``accept_base``: as for ``plan_export``. ``report`` is told each stage.
    The bundle's graph takes input_ids [B, S], attention_mask [B, past + S] and the KV cache, and answers logits [B, S, V].

    Raises InputError for settings, a base or an ``output`` that cannot be used, AdapterError for adapters of another base,
    BackendUnavailable for an exporter that is not installed, ExportError and GraphError where a graph cannot be exported or a stream not
    found in it, ParityError for a missed budget.

    Example::

        result = export_bundle("base", [Path("pirate")], Path("pirate-bundle"), ExportSettings(precision="int8"))
        print(result.manifest.adapters, result.parity.passed)
    """
    plan = plan_export(model, adapter_folders, output, settings, accept_base=accept_base, force=force)
    report(f"loading {model}")
    base = load_base(model)
    with atomic_folder(output, force=force) as work, tempfile.TemporaryDirectory() as proof:
        manifest, errors = _assemble(work, Path(proof), model, base, plan.adapters, plan.nodes, settings, report)
        if settings.float_type == "bf16":
            return ExportResult(manifest=manifest, parity=None, weight_errors=errors, note=check_structure(work))
        # The runtime is about to load the weights: the eager model's must not stay in memory beside them.
        del base
        gc.collect()
        report("holding the bundle against the eager model")
        parity = gate(work, output, exact=Path(proof) if any(Path(proof).iterdir()) else None)
        return ExportResult(manifest=manifest, parity=parity, weight_errors=errors)


def _assemble(
    work: Path,
    proof: Path,
    model: str,
    base: Base,
    adapters: Mapping[str, Adapter],
    nodes: tuple[EditNode, ...],
    settings: ExportSettings,
    report: Report,
) -> tuple[Manifest, tuple[WeightError, ...]]:
    """Everything of the bundle into ``work``; where it quantizes activations, arrays recorded without that into ``proof``."""
    steerers = {name: partial(steered, adapter=adapter) for name, adapter in adapters.items()}
    quantization = settings.weight_only
    if base.task == TEXT_GENERATION:
        cache_shapes(base.model)  # refused before any work, whatever the route
    report("recording what the eager model says")
    inputs = inputs_of(base)
    exact = None if settings.precision == "fp32" else fp32_logits(base.model, inputs, steerers)
    base.model.to(DTYPES[TORCH_DTYPES[settings.float_type]])
    if quantization is None:
        record_golden(work / "golden", base.model, inputs, steerers, fp32=exact)
    record = model_record(base)

    report("exporting the graph")
    exported = _export_graph(base, work / SCRATCH, settings)
    fuse(exported.model, level=settings.fuse)
    report(f"folding {len(nodes)} edit nodes")
    fold_graph(exported.model, nodes, slots=settings.slots)
    head = expose_head(exported.model, exported.weights, head_parameters(base.model) if base.info.labels else ())
    weights = {name: source for name, source in exported.weights.items() if name in exported.model.graph.initializers}
    errors: tuple[WeightError, ...] = ()
    if quantization is not None:
        report(f"quantizing weights to {settings.precision}")
        errors = quantize_graph(exported.model, quantization, float_inputs=expert_matrices(exported.weights)).errors
    report("writing the graph")
    write_graph(exported.model, work)
    if quantization is not None:
        report("recording what the eager model says with the quantized weights")
        fresh = load_base(model, checked=True)  # exporting rearranged the first one's weights
        record_quantized(work / "golden", proof, fresh.model, exported.model, weights, inputs, steerers, exact)

    for name, adapter in adapters.items():
        own_head = head_tensors(adapter, head, head_defaults(exported.model, head))
        write_adapter(work, name, adapter, nodes, precision=settings.float_type, slots=settings.slots, head=own_head)
    copy_tokenizer(base.folder, base.tokenizer, work)
    parts = BundleParts(
        model=record,
        precision=settings.float_type,
        quantization=None if quantization is None else quantization_record(quantization),
        exporter=settings.exporter,
        logits=settings.logits,
        slots=settings.slots,
        nodes=nodes,
        adapters=tuple(adapters),
        weights=weights,
        labels=base.info.labels,
        head=head,
    )
    shutil.rmtree(work / SCRATCH, ignore_errors=True)
    manifest = finish_bundle(work, exported.model, parts)
    # onnxscript's rewrite rules, which live as long as the process, still point at the graph: without this the weights do too.
    for value in exported.model.graph.initializers.values():
        value.const_value = None
    return manifest, errors


def check_exporter(exporter: str) -> None:
    """Raises BackendUnavailable for an exporter that is not installed."""
    if exporter == "builder":
        check_builder()
    if exporter == "optimum":
        check_optimum()
    if exporter == "transformers":
        check_transformers()


def _check_task(folder: Path, settings: ExportSettings) -> None:
    """By config.json alone: who asks for an exporter that a classifier has no use for is not to install it first."""
    config = read_config(folder)
    if is_classifier(config):
        check_classifier(config, folder)
        check_classifier_settings(folder.resolve().name, settings)


def check_classifier_settings(name: str, settings: ExportSettings) -> None:
    """Raises InputError for what the classifier ``name`` has no use for."""
    if (settings.exporter, settings.logits) != ("dynamo", "all"):
        what = "--logits last" if settings.logits != "all" else f"--exporter {settings.exporter}"
        raise InputError(f"{name} is a classifier, which {what} is not for; leave it out (dynamo, one row of logits a text)")


def _export_graph(base: Base, scratch: Path, settings: ExportSettings) -> ExportedGraph:
    last = settings.logits == "last"
    if base.task == TEXT_CLASSIFICATION:
        return export_classifier(base.model, opset=settings.opset)
    if settings.exporter == "builder":
        return export_builder(base, scratch, precision=settings.float_type, last_logits=last)
    if settings.exporter == "optimum":
        return export_optimum(base, scratch, opset=settings.opset)
    if settings.exporter == "transformers":
        return export_transformers(base.model, opset=settings.opset, last_logits=last)
    return export_dynamo(base.model, opset=settings.opset, last_logits=last)


def _check_layers(nodes: tuple[EditNode, ...], base: Base) -> None:
    for node in nodes:
        if node.site.layer >= base.info.num_hidden_layers:
            raise InputError(
                f"site {node.site}: layer {node.site.layer} does not exist in {base.info.name} "
                f"({base.info.num_hidden_layers} layers, 0 to {base.info.num_hidden_layers - 1})"
            )
