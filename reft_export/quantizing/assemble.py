"""A float bundle's quantized one, made and measured. It is held against the eager model before it takes its place."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
from transformers import PreTrainedModel

from calibration.mixed import check_budget, outweighed_by_table, sizes
from calibration.quantize import QuantizedGraph, Ranges
from calibration.settings import QuantizationSettings
from calibration.weight_only import WeightBlocks
from graph_passes.external import load_graph, write_graph
from graph_passes.tied_head import untie_head
from reft_export.base.dequantized import load_dequantized
from reft_export.base.load import base_folder, load_base, set_precision
from reft_export.base.memory import give_back
from reft_export.base.origin import described
from reft_export.base.packed.blocks import check_given
from reft_export.bundling.files import BundleParts, Report, copy_tokenizer, finish_bundle, stored_how
from reft_export.bundling.genai import copy_genai_files, read_genai_config
from reft_export.bundling.recorded import check_recorded
from reft_export.bundling.result import ExportResult, quantization_record
from reft_export.eager.banks import bank_steerer
from reft_export.eager.steering import Steerer
from reft_export.evaluation.quantization_report import Measurements, variant_name
from reft_export.folding.foreign_base import check_weights_known, completed
from reft_export.parity.activation_ladder import step_rungs
from reft_export.parity.gate import check_structure, gate
from reft_export.parity.golden import fp32_answers, record_quantized, with_likelihoods
from reft_export.parity.ladder import check_same_base, known_inputs, made_from, stored_inputs
from reft_export.parity.quality import Attempt, QualityGate, hold_quality
from reft_export.quantizing.adapters import refit_in
from reft_export.quantizing.calibrate import steered_ranges
from reft_export.quantizing.given import given_blocks
from reft_export.quantizing.importance import Squares, input_watcher
from reft_export.quantizing.refit import load_sources, plan_refit
from reft_export.quantizing.remedies import keep_steering
from reft_export.quantizing.sensitivity import MixedPrecision
from reft_export.quantizing.settings import REMEDY, CalibrationRequest, QuantizeRequest, RefitSettings, check_bundle
from reft_export.quantizing.weights import Chosen, EagerModel, Material, choose_weights, measurable
from runtimes.artifacts.bundle import Bundle, open_bundle
from runtimes.artifacts.listed_files import TEMPLATE_FOLDER, TOKENIZER_FILES
from runtimes.artifacts.manifest import DATA_FILE, CalibrationRecord, Manifest
from runtimes.files.claims import temporary_folder
from runtimes.files.folders import atomic_folder, unproven_folder
from runtimes.parity.figures import ParityReport, Rung


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
    mixed: MixedPrecision | None = None
    large_table: bool = False


def make_quantized(opened: Bundle, model: str, output: Path, request: QuantizeRequest, *, force: bool, report: Report) -> ExportResult:
    """``quantize_bundle``'s work, on a bundle that it has checked."""
    if request.accept_base:
        opened = made_from(opened, model)
    with completed(opened, model, report) as bundle:
        refit = plan_refit(bundle, model, request.refit, output, force=force) if request.refit else None
        if request.adapters:
            load_sources(bundle, RefitSettings(data=None, sources=request.adapters))
        plan = planned(bundle, model, output, request.settings, request.calibration, report)
        if request.mixed:
            plan = replace(plan, mixed=_asked(plan, request.budget_mb))
        with atomic_folder(output, force=force) as work, temporary_folder() as proof:
            manifest, quantized, tried = assemble(plan, request.quality, work, proof, report)
            errors = quantized.errors
            if manifest.precision == "bf16":
                note = "; ".join(filter(None, (quantized.note, check_structure(work))))
                return ExportResult(manifest=manifest, parity=None, weight_errors=errors, note=note)
            figures = _measured_before(plan, request, output, report)
            refitted = {}
            if refit:
                report("measuring the quantized bundle before the refit")
                figures.add(variant_name(open_bundle(work)), open_bundle(work))
                refitted, manifest = refit_in(work, model, refit, proof, report)
            parity = _gate(work, output, proof, plan, report, remedy=REMEDY if refit else "")
            mended: dict[str, Path] = {}
            if refit:
                manifest = hold_quality(work, output, parity, request.quality, tried=tried, remedy=REMEDY)
            else:
                manifest, parity, mended = keep_steering(
                    work, output, model, parity, request.quality, request.adapters, proof, report, tried=tried, force=force
                )
            report("measuring the quantized bundle")
            done = open_bundle(work)
            figures.add(f"{variant_name(done)} + refit" if refit else variant_name(done), done)
            saved = refit.save(refitted, force=force) if refit else mended
    told = figures.report(output, weights=errors, refits=tuple(each.figures for each in refitted.values()), parity=parity)
    return ExportResult(manifest=manifest, parity=parity, weight_errors=errors, note=quantized.note, report=told, refitted=saved)


def planned(
    bundle: Bundle, model: str, output: Path, settings: QuantizationSettings, request: CalibrationRequest | None, report: Report
) -> Plan:
    check_bundle(bundle, settings, request)
    check_given(base_folder(model), settings)
    graph = load_graph(bundle.graph_path)
    check_recorded(bundle, graph)
    untie_head(graph.graph)
    check_weights_known(graph, bundle.manifest.weights, settings, str(bundle.folder))
    if settings.kind.activations != "static":
        large_table = outweighed_by_table(graph.graph, settings, bundle.manifest.weights)
        return Plan(bundle=bundle, model=model, settings=settings, large_table=large_table)
    request = request or CalibrationRequest()  # the probes
    ranges, base_ranges, record = steered_ranges(bundle, settings, model, output, request, report)
    return Plan(bundle=bundle, model=model, settings=settings, ranges=ranges, base_ranges=base_ranges, calibration=record)


def _asked(plan: Plan, budget_mb: float | None) -> MixedPrecision:
    """What mixed precision is asked for; CalibrationError for a budget below the smallest bundle, before any model is loaded."""
    if budget_mb is None:
        return MixedPrecision()
    graph = load_graph(plan.bundle.graph_path)
    untie_head(graph.graph)
    rest = sum(record.size for name, record in plan.bundle.manifest.files.items() if name != DATA_FILE)
    asked = MixedPrecision(budget=int(budget_mb * 1e6) - rest)
    sources = plan.bundle.manifest.weights
    given = given_blocks(base_folder(plan.model), sources, plan.settings)
    check_budget(sizes(graph.graph, plan.settings, (), sources, WeightBlocks(given=given.blocks)), asked.budget)
    return asked


def assemble(
    plan: Plan, quality: QualityGate, work: Path, proof: Path, report: Report
) -> tuple[Manifest, QuantizedGraph, tuple[Attempt, ...]]:
    """The whole bundle into ``work``, and into ``proof`` what it is held to; what was tried. No model is in memory when this returns."""
    chosen = _record_and_quantize(plan, quality, work, proof, report)
    _copy_unchanged(plan.bundle, work)
    quantized, tried = chosen.quantized, chosen.tried
    manifest = _finish(replace(plan, settings=chosen.settings), work, chosen.graph, quantized)
    del chosen
    give_back()  # the runtime is about to load the weights: the eager model's must not stay in memory beside them
    return manifest, quantized, tried


def _measured_before(plan: Plan, request: QuantizeRequest, output: Path, report: Report) -> Measurements:
    """What the quantized bundle is compared with, measured, as far as it is asked for."""
    figures = Measurements(request.yardsticks, report)
    if figures.wanted:
        report("measuring the float bundle")
        figures.add(variant_name(plan.bundle), plan.bundle)
    if request.compare:
        _measure_base_only(plan, output, figures, lambda stage: report(f"with ranges of the base alone, to compare: {stage}"))
    return figures


def _measure_base_only(plan: Plan, output: Path, figures: Measurements, report: Report) -> None:
    """The same bundle with the ranges that a calibration without adapters would have chosen; it is measured and thrown away."""
    with (
        unproven_folder(output.absolute()) as work,
        temporary_folder() as proof,
    ):
        assemble(replace(plan, ranges=plan.base_ranges), QualityGate(), work, proof, report)
        report("measuring it")
        bundle = open_bundle(work)
        figures.add(f"{variant_name(bundle)}, base-only ranges", bundle)


def _record_and_quantize(plan: Plan, quality: QualityGate, work: Path, proof: Path, report: Report) -> Chosen:
    """Graph and golden arrays into ``work``.

    Eager model and float graph take turns: each is as large as the other, and together they would be more than the 1.5 times a model
    that this may take.
    """
    bundle = plan.bundle
    steerers = _steerers(bundle)
    report(f"loading {described(plan.model)}")
    base = load_base(plan.model)
    check_same_base(bundle, base, plan.model)
    if "tokenizer.json" not in bundle.manifest.files:  # folded without the base, from a folder that had none
        copy_tokenizer(base.folder, base.tokenizer, work)
    report("recording what the float32 model says")
    known = known_inputs(bundle, base)
    inputs = with_likelihoods(base, known)
    seen: dict[str, Squares] = {}
    around = input_watcher(seen, base.model, plan.settings, bundle.manifest.precision)
    fp32 = fp32_answers(base.model, inputs, steerers, around=around)
    del around
    set_precision(base.model, bundle.manifest.precision)
    material = Material(
        graph=lambda: load_graph(bundle.graph_path),
        model=EagerModel(base.model, partial(_float_model, plan)),
        sources=bundle.manifest.weights,
        inputs=known,
        steerers=steerers,
        fp32=fp32,
        again=measurable(fp32),
        turns=True,
        ranges=plan.ranges,
        mixed=plan.mixed,
        large_table=plan.large_table,
        given=given_blocks(base.folder, bundle.manifest.weights, plan.settings),
        seen=seen,
    )
    del base
    chosen = choose_weights(material, plan.settings, quality, report)
    write_graph(chosen.graph, work)
    give_back()
    report("recording what the eager model says with the quantized weights")
    record_quantized(
        *(work / "golden", proof, chosen.model, chosen.graph, bundle.manifest.weights, inputs, steerers, fp32),
        loaded=True,
        known=chosen.said,
    )
    note = "; ".join(filter(None, (chosen.note, chosen.quantized.note)))
    return replace(chosen, quantized=replace(chosen.quantized, note=note))


def _float_model(plan: Plan) -> PreTrainedModel:
    model = load_base(plan.model, checked=True).model
    set_precision(model, plan.bundle.manifest.precision)
    return model


def _gate(work: Path, output: Path, proof: Path, plan: Plan, report: Report, *, remedy: str) -> ParityReport:
    if plan.settings.kind.activations:
        report("holding each quantized activation against the formula")
    stepped = _stepped(open_bundle(work), plan.model)
    report("holding the bundle against the eager model")
    return gate(work, output, proof=proof, stepped=stepped, remedy=remedy, settles=True)


def _stepped(bundle: Bundle, model: str) -> list[Rung]:
    """Every quantized activation against the formula, with the finished bundle and its own adapters."""

    def dequantized() -> PreTrainedModel:
        loaded = load_base(model, checked=True).model
        set_precision(loaded, bundle.manifest.precision)
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
        quantization=quantization_record(plan.settings, quantized, calibration=plan.calibration),
        embeddings=stored_how(graph.graph, tied=quantized.tied),
        exporter=m.exporter,
        logits=m.logits,
        nodes=plan.bundle.nodes,
        adapters=plan.bundle.adapter_names,
        weights=m.weights,
        genai_config=_own_config(plan.bundle),
        task=m.task,
        labels=m.labels,
        head=m.head,
    )
    return finish_bundle(work, graph, parts)
