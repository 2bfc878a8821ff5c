"""Other adapters put into a quantized bundle while it is being made: their files, and the golden arrays that they are held to."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path

from reft_export.adding.files import copy_bundle, held, write_adapters
from reft_export.adding.held import record_adapters
from reft_export.base.adapters import check_fit
from reft_export.base.load import Base, load_base
from reft_export.bundling.files import Report
from reft_export.bundling.result import ExportResult
from reft_export.eager.banks import bank_steerer
from reft_export.eager.steering import steerers_of
from reft_export.evaluation.quantization_report import Measurements, Yardsticks, variant_name
from reft_export.parity.gate import check_structure, gate
from reft_export.parity.golden import Arrays, InputsByName, adapter_inputs, fp32_answers
from reft_export.parity.ladder import check_same_base, known_inputs
from reft_export.parity.quality import QualityGate, hold_quality
from reft_export.quantizing.refit import RefitPlan, Refitted, refit_adapters
from reft_export.quantizing.settings import REMEDY
from runtimes.artifacts.bundle import Bundle, open_bundle
from runtimes.artifacts.golden_schema import BASE_GOLDEN
from runtimes.artifacts.manifest import Manifest, write_manifest
from runtimes.edits.adapter import Adapter
from runtimes.files.claims import temporary_folder
from runtimes.files.folders import atomic_folder


def make_swapped(
    bundle: Bundle,
    model: str,
    output: Path,
    new: RefitPlan | Mapping[str, Adapter],
    yardsticks: Yardsticks,
    quality: QualityGate,
    *,
    accept_base: bool,
    force: bool,
    report: Report,
) -> ExportResult:
    """``swap_bundle``'s work, on a bundle that it has checked; ``new``: the adapters to put in, or how to refit the bundle's own."""
    figures = Measurements(yardsticks, report)
    refitted, saved = {}, {}
    parity, note = None, ""
    with atomic_folder(output, force=force) as work, temporary_folder() as proof:
        copy_bundle(bundle, work)
        write_manifest(work, bundle.manifest)
        runs = bundle.manifest.precision != "bf16"
        if runs:
            report("measuring the bundle as it is")
            figures.add(variant_name(bundle), bundle)
        if isinstance(new, RefitPlan):
            refitted, manifest = refit_in(work, model, new, proof, report)
            how, remedy = "refit", REMEDY
        else:
            manifest = put_in(work, model, new, proof, report, accept_base=accept_base)
            how, remedy = "swap", ""
        if runs:
            report("holding the bundle against the eager model")
            parity = gate(work, output, proof=proof, remedy=remedy)
            manifest = hold_quality(work, output, parity, quality, remedy=remedy)
            figures.add(f"{variant_name(bundle)} + {how}", open_bundle(work))
        else:
            note = check_structure(work)
        if isinstance(new, RefitPlan):
            saved = new.save(refitted, force=force)
    told = figures.report(output, refits=tuple(each.figures for each in refitted.values()), parity=parity)
    return ExportResult(manifest=manifest, parity=parity, weight_errors=(), note=note, report=told, refitted=saved)


def refit_in(work: Path, model: str, plan: RefitPlan, proof: Path, report: Report) -> tuple[dict[str, Refitted], Manifest]:
    """Refits the adapters of the bundle that is being made in ``work``, and puts them into it. Eager models are gone when this returns."""
    bundle = open_bundle(work)
    refitted = refit_adapters(bundle, model, plan, report)
    report("recording what the eager model says with the refitted adapters")
    new, base = {name: each.adapter for name, each in refitted.items() if not each.figures.kept}, load_base(model)
    manifest = replace_adapters(work, base, known_inputs(bundle, base), new, stored_fp32(bundle), proof)
    gc.collect()  # the runtime is about to load the weights
    return refitted, manifest


def put_in(work: Path, model: str, adapters: Mapping[str, Adapter], proof: Path, report: Report, *, accept_base: bool = False) -> Manifest:
    """Puts adapters that were trained elsewhere into the bundle that is being made in ``work``."""
    bundle = open_bundle(work)
    report("recording what the eager model says with the new adapters")
    base = load_base(model)
    check_same_base(bundle, base, model)
    for name, adapter in adapters.items():
        check_fit(name, adapter, base, accept_base=accept_base)
    stored = known_inputs(bundle, base)
    inputs = stored | adapter_inputs(base, adapters, stored[BASE_GOLDEN])
    fp32 = stored_fp32(bundle) | fp32_answers(base.model, inputs, steerers_of(adapters), of_base=False)
    manifest = replace_adapters(work, base, inputs, adapters, fp32, proof)
    gc.collect()
    return manifest


def replace_adapters(
    work: Path, base: Base, inputs: InputsByName, adapters: Mapping[str, Adapter], fp32: Mapping[str, Arrays], proof: Path
) -> Manifest:
    """Puts ``adapters`` into the bundle that is being made in ``work``, those of the same name being replaced.

    ``base``, ``inputs``, ``fp32`` and ``proof``: as of ``record_adapters``, for the base and every adapter, new and old, all of which are
    held again.
    Raises AdapterError for an adapter that needs an edit node which the graph lacks.
    """
    before = open_bundle(work)
    bundle = write_adapters(before, adapters)
    others = {name: bank_steerer(before, name) for name in before.adapter_names if name not in adapters}
    record_adapters(bundle, base, inputs, steerers_of(adapters), fp32, proof, again=others)
    manifest = held(bundle, tuple(adapters)).manifest
    write_manifest(work, manifest)
    return manifest


def stored_fp32(bundle: Bundle) -> dict[str, Arrays]:
    """What the float32 model said when a quantized bundle was made: with every adapter as it was before any refit, and without."""
    golden = {name: bundle.golden(name) for name in {*bundle.adapter_names, *bundle.golden_names}}
    return {name: {key: value for key, value in arrays.items() if key.startswith("fp32_")} for name, arrays in golden.items()}
