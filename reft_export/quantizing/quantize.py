"""``reft-export quantize``: a float bundle to a quantized one, adapters and all, without exporting again."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from transformers import PreTrainedModel

from calibration.quantize import QuantizedGraph, Ranges, quantize_graph
from calibration.settings import QuantizationSettings, check_source
from calibration.weights import WeightError
from graph_passes.external import load_graph, write_graph
from reft_export.base.dequantized import expert_matrices, load_dequantized
from reft_export.base.load import DTYPES, load_base
from reft_export.base.memory import give_back
from reft_export.bundling.files import BundleParts, Report, copy_tokenizer, finish_bundle
from reft_export.bundling.genai import copy_genai_files, read_genai_config
from reft_export.bundling.result import ExportResult, quantization_record
from reft_export.eager.banks import bank_steerer
from reft_export.eager.steering import Steerer
from reft_export.evaluation.quantization_report import Measurements, Yardsticks, variant_name
from reft_export.folding.foreign_base import check_weights_known, completed
from reft_export.parity.activation_ladder import step_rungs
from reft_export.parity.gate import check_structure, gate
from reft_export.parity.golden import fp32_logits, record_quantized
from reft_export.parity.ladder import check_same_base, made_from, stored_inputs
from reft_export.quantizing.calibrate import CalibrationRequest, check_request, steered_ranges
from reft_export.quantizing.refit import REMEDY, RefitSettings, check_task, plan_refit
from reft_export.quantizing.swap import refit_in
from runtimes.artifacts.bundle import TEMPLATE_FOLDER, TOKENIZER_FILES, Bundle, CalibrationRecord, Manifest, open_bundle
from runtimes.errors import CalibrationError
from runtimes.files.folders import atomic_folder, check_destination
from runtimes.parity.figures import Rung
from runtimes.precision import TORCH_DTYPES


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is decided before any work: the bundle, how it is quantized, and the ranges where the scheme fixes them."""

    bundle: Bundle
    model: str
    settings: QuantizationSettings
    ranges: Ranges | None = None
    base_ranges: Ranges | None = None
    """Of the same prompts without any adapter."""
    calibration: CalibrationRecord | None = None


def quantize_bundle(
    source: Path,
    model: str,
    output: Path,
    settings: QuantizationSettings,
    *,
    calibration: CalibrationRequest | None = None,
    refit: RefitSettings | None = None,
    yardsticks: Yardsticks = Yardsticks(),
    compare: bool = False,
    accept_base: bool = False,
    force: bool = False,
    report: Report = print,
) -> ExportResult:
    """Writes the quantized bundle to ``output``, atomically; ``model`` is the base it was made from, for the eager reference.

    ``calibration``: the prompts or the ranges that a scheme with fixed activation ranges needs; what was collected stays beside the
    output. ``compare``: the report also shows what ranges of the base alone would have given. ``refit``: adapters to re-train on the
    quantized weights. ``yardsticks``: what the report measures beyond the golden inputs; with any, the float bundle is measured too.
    ``accept_base``: a base that differs from the bundle's in its config alone will do, and is the new bundle's.

    Raises CalibrationError for a bundle that the scheme cannot start from and for bad calibration data, AdapterError for another base and
    for adapters that are not the bundle's, ParityError for a missed budget.

    Of weights [K, N], ``settings.block_size`` counts the values along K that share a scale; ``settings.bits`` is per weight.

    Example::

        result = quantize_bundle(Path("pirate-bundle"), "base", Path("pirate-int4"), settings_for("weight-only", bits=4))
        print(result.parity.passed)
    """
    check_destination(output, force=force, inputs=[source, Path(model), *(refit.sources if refit else ())])
    opened = open_bundle(source)
    check_task(opened, refit=refit is not None, generates=yardsticks != Yardsticks())
    if compare and settings.kind.activations != "static":
        raise CalibrationError(f"--compare is with ranges of the base alone, and --scheme {settings.scheme} has no ranges; leave it out")
    check_bundle(opened, settings, calibration)
    if accept_base:
        opened = made_from(opened, model)
    with completed(opened, model, report) as bundle:
        return _quantized(bundle, model, output, settings, calibration, refit, yardsticks, compare=compare, force=force, report=report)


def _quantized(
    bundle: Bundle,
    model: str,
    output: Path,
    settings: QuantizationSettings,
    calibration: CalibrationRequest | None,
    refit: RefitSettings | None,
    yardsticks: Yardsticks,
    *,
    compare: bool,
    force: bool,
    report: Report,
) -> ExportResult:
    refit_plan = plan_refit(bundle, model, refit, output, force=force) if refit else None
    figures = Measurements(yardsticks)
    plan = planned(bundle, model, output, settings, calibration, report)
    with atomic_folder(output, force=force) as work, tempfile.TemporaryDirectory() as proof:
        manifest, errors = assemble(plan, work, Path(proof), report)
        if manifest.precision == "bf16":
            return ExportResult(manifest=manifest, parity=None, weight_errors=errors, note=check_structure(work))
        if figures.wanted:
            report("measuring the float bundle")
            figures.add(variant_name(bundle), bundle)
        if compare:
            report("quantizing with ranges of the base alone, to compare")
            _measure_base_only(plan, output, figures)
        refitted, saved = {}, {}
        if refit_plan:
            report("measuring the quantized bundle before the refit")
            figures.add(variant_name(open_bundle(work)), open_bundle(work))
            refitted, manifest = refit_in(work, model, refit_plan, Path(proof), report)
        report("holding the bundle against the eager model")
        stepped = _stepped(open_bundle(work), model)
        exact = Path(proof) if any(Path(proof).iterdir()) else None
        parity = gate(work, output, exact=exact, stepped=stepped, remedy=REMEDY if refit else "")
        report("measuring the quantized bundle")
        done = open_bundle(work)
        figures.add(f"{variant_name(done)} + refit" if refit_plan else variant_name(done), done)
        if refit_plan:
            saved = refit_plan.save(refitted, force=force)
    told = figures.report(output, weights=errors, refits=tuple(each.figures for each in refitted.values()), parity=parity)
    return ExportResult(manifest=manifest, parity=parity, weight_errors=errors, report=told, refitted=saved)


def assemble(plan: Plan, work: Path, proof: Path, report: Report) -> tuple[Manifest, tuple[WeightError, ...]]:
    """The whole bundle into ``work``, and into ``proof`` what it is held to. No model is in memory when this returns."""
    graph, quantized = _record_and_quantize(plan, work, proof, report)
    _copy_unchanged(plan.bundle, work)
    manifest = _finish(plan, work, graph, quantized)
    del graph
    give_back()  # the runtime is about to load the weights: the eager model's must not stay in memory beside them
    return manifest, quantized.errors


def _measure_base_only(plan: Plan, output: Path, figures: Measurements) -> None:
    """The same bundle with the ranges that a calibration without adapters would have chosen; it is measured and thrown away."""
    with (
        tempfile.TemporaryDirectory(prefix=f".{output.name}.", suffix=".partial", dir=output.absolute().parent) as work,
        tempfile.TemporaryDirectory() as proof,
    ):
        assemble(replace(plan, ranges=plan.base_ranges), Path(work), Path(proof), lambda _: None)
        bundle = open_bundle(work)
        figures.add(f"{variant_name(bundle)}, base-only ranges", bundle)


def check_bundle(bundle: Bundle, settings: QuantizationSettings, request: CalibrationRequest | None) -> None:
    """Everything about bundle and request that can be refused before a model is loaded."""
    m = bundle.manifest
    check_source(
        settings,
        quantized=None if m.quantization is None else m.quantization.bits,
        precision=m.precision,
        opset=m.opset,
        where=str(bundle.folder),
    )
    check_request(request, settings, bundle)


def planned(
    bundle: Bundle, model: str, output: Path, settings: QuantizationSettings, request: CalibrationRequest | None, report: Report
) -> Plan:
    check_bundle(bundle, settings, request)
    check_weights_known(load_graph(bundle.graph_path), bundle.manifest.weights, settings, str(bundle.folder))
    if request is None:
        return Plan(bundle=bundle, model=model, settings=settings)
    ranges, base_ranges, record = steered_ranges(bundle, settings, model, output, request, report)
    return Plan(bundle=bundle, model=model, settings=settings, ranges=ranges, base_ranges=base_ranges, calibration=record)


def _record_and_quantize(plan: Plan, work: Path, proof: Path, report: Report) -> tuple[ir.Model, QuantizedGraph]:
    """Graph and golden arrays into ``work``.

    Eager model and float graph take turns: each is as large as the other, and together they would be more than the 1.5 times a model
    that this may take. The model is loaded again for its second turn; no model is left when this returns.
    """
    bundle, settings = plan.bundle, plan.settings
    steerers, inputs = _steerers(bundle), stored_inputs(bundle)
    report(f"loading {plan.model}")
    base = load_base(plan.model)
    check_same_base(bundle, base, plan.model)
    if "tokenizer.json" not in bundle.manifest.files:  # folded without the base, from a folder that had none
        copy_tokenizer(base.folder, base.tokenizer, work)
    exact = fp32_logits(base.model, inputs, steerers)
    del base
    give_back()
    report(f"quantizing weights to {'E4M3' if settings.scheme == 'fp8' else f'int{settings.bits}'}")
    graph = load_graph(bundle.graph_path)
    quantized = quantize_graph(graph, settings, plan.ranges, float_inputs=expert_matrices(bundle.manifest.weights))
    write_graph(graph, work)
    give_back()
    report("recording what the eager model says with the quantized weights")
    again = load_base(plan.model, checked=True).model.to(DTYPES[TORCH_DTYPES[bundle.manifest.precision]])
    record_quantized(work / "golden", proof, again, graph, bundle.manifest.weights, inputs, steerers, exact)
    return graph, quantized


def _stepped(bundle: Bundle, model: str) -> list[Rung]:
    """Every quantized activation against the formula, with the finished bundle and its own adapters."""

    def dequantized() -> PreTrainedModel:
        loaded = load_base(model, checked=True).model.to(DTYPES[TORCH_DTYPES[bundle.manifest.precision]])
        load_dequantized(loaded, load_graph(bundle.graph_path), bundle.manifest.weights)
        return loaded

    rungs = step_rungs(bundle, dequantized, stored_inputs(bundle), _steerers(bundle))
    give_back()
    return rungs


def _steerers(bundle: Bundle) -> dict[str, Steerer]:
    return {name: bank_steerer(bundle, name) for name in bundle.adapter_names}


def _copy_unchanged(bundle: Bundle, work: Path) -> None:
    """Adapters, library, tokenizer, and of a folded genai folder what else onnxruntime-genai reads."""
    for name in bundle.manifest.files:
        if name in TOKENIZER_FILES or name.startswith(("adapters/", "lib/", f"{TEMPLATE_FOLDER}/")):
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.folder / name, work / name)
    if config := _own_config(bundle):
        copy_genai_files(bundle.folder, work, config)


def _own_config(bundle: Bundle) -> dict[str, Any]:
    """The genai_config.json that a foreign folder brought along, which is kept; a bundle of ours gets one written anew."""
    foreign = bundle.manifest.exporter == "foreign" and bundle.manifest.genai == "supported"
    return read_genai_config(bundle.folder) if foreign else {}


def _finish(plan: Plan, work: Path, graph: ir.Model, quantized: QuantizedGraph) -> Manifest:
    m = plan.bundle.manifest
    parts = BundleParts(
        model=m.model,
        precision=m.precision,
        quantization=quantization_record(plan.settings, kept=quantized.float_weights, calibration=plan.calibration),
        exporter=m.exporter,
        logits=m.logits,
        slots=m.slots,
        nodes=plan.bundle.nodes,
        adapters=plan.bundle.adapter_names,
        weights=m.weights,
        genai_config=_own_config(plan.bundle),
        task=m.task,
        labels=m.labels,
        head=m.head,
    )
    return finish_bundle(work, graph, parts)
