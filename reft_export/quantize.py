"""``reft-export quantize``: a float bundle to a quantized one, adapters and all, without exporting again."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from calibration.weight_only import WeightOnlySettings, quantize_weights
from graph_passes.external import load_graph, write_graph
from reft_export.banks import bank_steerer
from reft_export.base import load_base
from reft_export.bundling import BundleParts, Report, finish_bundle, gate
from reft_export.dequantized import load_dequantized
from reft_export.export import ExportResult, quantization_record, record_at_levels
from reft_export.golden import fp32_logits
from reft_export.parity import check_same_base, stored_inputs
from runtimes.bundle import TOKENIZER_FILES, open_bundle
from runtimes.errors import CalibrationError
from runtimes.folders import atomic_folder, check_destination


def quantize_bundle(
    source: Path, model: str, output: Path, settings: WeightOnlySettings, *, force: bool = False, report: Report = print
) -> ExportResult:
    """Writes the quantized bundle to ``output``, atomically; ``model`` is the base it was made from, for the eager reference.

    Raises CalibrationError for a bundle that is quantized already, AdapterError for another base, ParityError for a missed budget.
    """
    check_destination(output, force=force, inputs=[source, Path(model)])
    bundle = open_bundle(source)
    if bundle.manifest.quantization is not None:
        bits = bundle.manifest.quantization.bits
        raise CalibrationError(f"{source} is quantized already (int{bits}); quantize the float bundle that it was made from")
    if bundle.manifest.precision != "fp32":
        raise CalibrationError(f"{source} is a {bundle.manifest.precision} bundle; weight-only quantization starts from the fp32 one")
    report(f"loading {model}")
    base = load_base(model)
    check_same_base(bundle, base, model)
    steerers = {name: bank_steerer(bundle, name) for name in bundle.adapter_names}
    inputs = stored_inputs(bundle)
    with atomic_folder(output, force=force) as work, tempfile.TemporaryDirectory() as proof:
        exact = fp32_logits(base.model, inputs, steerers)
        graph = load_graph(bundle.graph_path)
        report(f"quantizing weights to int{settings.bits}")
        errors = quantize_weights(graph, settings)
        write_graph(graph, work)
        report("recording what the eager model says with the quantized weights")
        modules = load_dequantized(base.model, graph, bundle.manifest.weights)
        record_at_levels(work / "golden", Path(proof), base.model, modules, inputs, steerers, exact, settings)
        for name in bundle.manifest.files:
            if name in TOKENIZER_FILES or name.startswith(("adapters/", "lib/")):
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle.folder / name, work / name)
        m = bundle.manifest
        parts = BundleParts(
            model=m.model,
            precision=m.precision,
            quantization=quantization_record(settings),
            exporter=m.exporter,
            logits=m.logits,
            slots=m.slots,
            nodes=bundle.nodes,
            adapters=bundle.adapter_names,
            weights=m.weights,
        )
        manifest = finish_bundle(work, graph, parts)
        report("holding the bundle against the eager model")
        return ExportResult(manifest=manifest, parity=gate(work, output, exact=Path(proof)), weight_errors=tuple(errors))
