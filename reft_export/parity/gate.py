"""The gate that nothing wrong passes: a finished bundle against its golden arrays, before it takes its place."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from runtimes.artifacts.bundle import Bundle, open_bundle
from runtimes.artifacts.manifest import write_manifest
from runtimes.errors import ExportError, ParityError
from runtimes.files.placed import place
from runtimes.golden import check_golden
from runtimes.parity.figures import ParityReport, Rung, budget_for


def gate(
    folder: Path,
    output: Path,
    *,
    proof: Path | None = None,
    stepped: Sequence[Rung] = (),
    names: Collection[str] | None = None,
    remedy: str = "",
    settles: bool = False,
) -> ParityReport:
    """Runs the finished bundle against its golden arrays; a miss writes <output>.parity.json and raises ParityError.

    ``proof``: arrays recorded with float activations and a float cache, which a bundle that quantizes either is held to first, its graph
    without that; an empty folder where it quantizes none. ``stepped``: rungs that were taken already. ``names``: of base and adapters
    those to hold; None is all. ``remedy``: what to try where a budget is missed; "" is the quantization's own advice. ``settles``: where
    accuracy level 4 costs too much, the bundle gets level 1, and the report says so.
    """
    bundle = open_bundle(folder)
    rungs = [*stepped, *_proven(bundle, proof, names)]
    shipped = _shipped(bundle, names)
    notes = shipped.notes
    if settles and _rounds_inside(bundle) and (costly := [each for each in shipped.quality if each.rounded_away]):
        multiply_in_float(bundle)
        shipped = _shipped(open_bundle(folder), names)
        worst = max(costly, key=lambda each: each.here - each.exact)
        notes = (*notes, f"accuracy level 1: level 4 costs {worst.name} {worst.here - worst.exact:.3f} nats a token more")
    report = ParityReport(rungs=(*rungs, *shipped.rungs), notes=notes, quality=shipped.quality)
    figures = output.with_name(f"{output.name}.parity.json")
    if not report.passed:
        place(figures, f"{report.to_json()}\n".encode())
        try:
            report.require()
        except ParityError as e:
            remedy = "; ".join(filter(None, (lost_adapters(report, bundle.adapter_names), remedy)))
            raise ParityError(f"{e}; no bundle was written, the figures are in {figures}{remedy and '; '}{remedy}", report) from None
    figures.unlink(missing_ok=True)  # of an earlier attempt
    return report


def _rounds_inside(bundle: Bundle) -> bool:
    """Whether there is an accuracy level to settle."""
    return bundle.manifest.quantization is not None and bundle.manifest.quantization.rounds_inside


def _proven(bundle: Bundle, proof: Path | None, names: Collection[str] | None) -> list[Rung]:
    """The bundle without its quantization of activations and of its cache, where it has one; what MatMulNBits rounds inside was recorded
    without it."""
    from reft_export.parity.int8_ladder import int8_rungs
    from reft_export.parity.ladder import check, exact_label, float_label, with_float_activations

    q, rungs = bundle.manifest.quantization, []
    if q is None:
        return []
    rungs += int8_rungs(bundle)
    if proof is not None and any(proof.iterdir()):
        with with_float_activations(bundle, cache=True) as changed:
            rungs += check(changed, proof, exact_label(q), names=names)
    if q.rounds_inside:
        with with_float_activations(bundle) as changed:
            rungs += check(changed, bundle.folder / "golden", float_label(q), names=names)
    return rungs


def _shipped(bundle: Bundle, names: Collection[str] | None) -> ParityReport:
    from runtimes.open import ort_session

    report = check_golden(bundle, ort_session(bundle), names=names)
    if (q := bundle.manifest.quantization) is None:
        return report
    return replace(report, rungs=tuple(replace(rung, name=f"{q.label}, {rung.name}") for rung in report.rungs))


def multiply_in_float(bundle: Bundle) -> None:
    """The bundle in ``bundle.folder``, which is being made, at accuracy level 1."""
    import onnx_ir as ir

    from calibration.products import float_activations
    from graph_passes.external import load_graph

    graph = load_graph(bundle.graph_path)
    float_activations(graph)
    ir.save(graph, bundle.graph_path)  # the weights' file stays as it is
    m = bundle.manifest
    if m.quantization is None:
        raise ValueError(f"{bundle.folder} is a float bundle")
    m = replace(m, quantization=replace(m.quantization, accuracy_level=1), parity_budget={})
    write_manifest(bundle.folder, replace(m, parity_budget=budget_for(m).stated))


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
