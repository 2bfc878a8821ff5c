"""The gate that nothing wrong passes: a finished bundle against its golden arrays, before it takes its place."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from runtimes.artifacts.bundle import WEIGHT_ONLY_SCHEMES, Quantization, open_bundle
from runtimes.errors import ExportError, ParityError
from runtimes.golden import check_golden
from runtimes.parity.figures import ParityReport, Rung


def gate(
    folder: Path,
    output: Path,
    *,
    proof: Path | None = None,
    stepped: Sequence[Rung] = (),
    names: Collection[str] | None = None,
    remedy: str = "",
) -> ParityReport:
    """Runs the finished bundle against its golden arrays; a miss writes <output>.parity.json and raises ParityError.

    ``proof``: arrays recorded with float activations, which a bundle that quantizes activations is held to first, its graph without
    their quantization; an empty folder where it quantizes none. ``stepped``: rungs that were taken already. ``names``: of base and adapters
    those to hold; None is all. ``remedy``: what to try where a budget is missed; "" is the quantization's own advice.
    """
    from reft_export.parity.changed_bundle import quantization_of
    from reft_export.parity.ladder import check, float_label, with_float_activations
    from runtimes.open import ort_session

    bundle = open_bundle(folder)
    rungs: list[Rung] = list(stepped)
    if proof is not None and any(proof.iterdir()):
        with with_float_activations(bundle) as changed:
            rungs += check(changed, proof, float_label(quantization_of(bundle)), names=names)
    shipped = check_golden(bundle, ort_session(bundle), names=names).rungs
    if bundle.manifest.quantization is not None:
        shipped = tuple(replace(rung, name=f"{bundle.manifest.quantization.label}, {rung.name}") for rung in shipped)
    rungs += shipped
    report = ParityReport(rungs=tuple(rungs))
    figures = output.with_name(f"{output.name}.parity.json")
    if not report.passed:
        figures.write_text(report.to_json() + "\n", encoding="utf-8")
        try:
            report.require()
        except ParityError as e:
            if not remedy and bundle.manifest.quantization is not None:
                remedy = _remedy(bundle.manifest.quantization)
            remedy = "; ".join(filter(None, (lost_adapters(report, bundle.adapter_names), remedy)))
            raise ParityError(f"{e}; no bundle was written, the figures are in {figures}{remedy and '; '}{remedy}", report) from None
    figures.unlink(missing_ok=True)  # of an earlier attempt
    return report


def lost_adapters(report: ParityReport, adapters: Sequence[str]) -> str:
    """Which adapters miss nothing but the gate of their delta, and what to do about them; "" where none does.

    An edit that is barely trained moves the logits by less than the rounding of the weights does.
    """
    missed = [(rung, rung.name.partition(": ")[0].rpartition(", ")[2]) for rung in report.rungs if not rung.passed]
    lost = [name for name in adapters if {rung.lost_steering for rung, of in missed if of == name} == {True}]
    if not lost:
        return ""
    it = "it" if len(lost) == 1 else "them"
    return f"only the delta is missed by {', '.join(lost)}, as by a barely trained edit: train {it} further, or export without {it}"


def _remedy(q: Quantization) -> str:
    if q.scheme in WEIGHT_ONLY_SCHEMES:
        return "try -p int8, a smaller --block-size or --accuracy-level 1"
    return "keep the worst layers in float (--keep-high), try --observer minmax, or --scheme weight-only"


def check_structure(folder: Path) -> str:
    """What can be shown of a graph that no CPU runs: ONNX's own checker with full shape inference accepts it.

    Raises ExportError where it does not: some operators take no bfloat16 in the opsets that devices run.
    """
    import onnx

    from reft_export.base.model_folder import first_reason

    try:
        onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
        raise ExportError(f"ONNX's checker refuses the bfloat16 graph: {first_reason(e)}; use another --precision") from e
    return (
        "onnxruntime's CPU provider cannot run bfloat16 (MatMul, Add, Softmax are missing): the graph was checked structurally "
        "only; run `reft-export parity` on a GPU"
    )
