"""The host's parity ladder: every rung from the formula to the shipped graph, each against eager PyTorch or the float64 oracle.

oracle -> numpy -> function          one edit at a time, on random rows: is the arithmetic of the op the formula?
eager -> exported -> folded          the float graph without and with its edits
eager, dequantized -> quantized      the same weights on both sides, activations in float (MatMulNBits at accuracy level 1)
eager, fake-quantized -> shipped     where the bundle quantizes activations too: free-running, and step by step
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from calibration.products import float_activations, stored_activations, unpack_int8
from graph_passes.external import load_graph
from graph_passes.stored_cache import float_cache, stored_cache
from graph_passes.unfold import unfold_graph
from reft_export.base.dequantized import activations_quantized, load_dequantized
from reft_export.base.load import Base, Outline, load_base, outline_base, set_precision
from reft_export.base.origin import described
from reft_export.base.token_rules import context_of
from reft_export.bundling.recorded import check_recorded
from reft_export.eager.banks import bank_edits, bank_steerer
from reft_export.eager.steering import Steerer
from reft_export.eager.stored_cache import rounded_cache
from reft_export.parity.activation_ladder import step_rungs
from reft_export.parity.changed_bundle import quantization_of, variant
from reft_export.parity.edit_ladder import edit_rungs
from reft_export.parity.golden import Arrays, InputsByName, fp32_answers, record_golden
from reft_export.parity.int8_ladder import int8_rungs
from reft_export.tasks.task import TASKS, Inputs
from runtimes.artifacts.bundle import Bundle
from runtimes.artifacts.golden_schema import BASE_GOLDEN
from runtimes.artifacts.manifest import Quantization
from runtimes.edits.same_base import Named, require_same
from runtimes.files.claims import temporary_folder
from runtimes.golden import check_golden
from runtimes.parity.figures import ParityReport, Rung

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class RecordedBundle(Bundle):
    """A bundle with golden arrays from another folder: recorded just now rather than when it was made."""

    recorded: Path

    @property
    def golden_names(self) -> tuple[str, ...]:
        return tuple(n for n in (BASE_GOLDEN, *self.adapter_names) if (self.recorded / f"{n}.npz").is_file())

    def golden_file(self, name: str) -> Path:
        return self.recorded / f"{name}.npz"


def host_ladder(
    bundle: Bundle, model: str, *, provider: str = "cpu", kernel: str | None = None, accept_base: bool = False, report: Report = print
) -> ParityReport:
    """Every rung that exists for ``bundle``, with eager PyTorch run again now on the base ``model``.

    Raises AdapterError when ``model`` is not the base that the bundle was made from; with ``accept_base`` one of equal weights will do.
    """
    report(f"loading {described(model)}")
    base = load_base(model)
    check_same_base(bundle, base, model, accept_base=accept_base)
    bundle = _within_context(bundle, base)
    rungs: list[Rung] = []
    for name in bundle.adapter_names:
        report(f"edit by edit: {name}")
        rungs += edit_rungs(bundle, name, bank_edits(bundle, name), kernel=kernel)
    steerers = {name: bank_steerer(bundle, name) for name in bundle.adapter_names}
    inputs = known_inputs(bundle, base)
    quantized = bundle.manifest.quantization is not None
    fp32 = fp32_answers(base.model, inputs, steerers) if quantized or bundle.manifest.precision != "fp32" else {}
    for name in bundle.golden_names:
        if name != BASE_GOLDEN and quantized and bundle.adapter_record(name).trained_on is not None:
            # Trained on quantized weights: what it does to the float model is not what it is for. The bundle knows what was aimed at.
            fp32[name] = {key: value for key, value in bundle.golden(name).items() if key.startswith("fp32_")}
    if quantized:
        rungs += quantized_rungs(bundle, base, inputs, steerers, fp32, provider=provider, kernel=kernel, report=report)
        return ParityReport(rungs=tuple(rungs))
    rungs += _float_rungs(bundle, base, inputs, steerers, fp32, provider=provider, kernel=kernel, report=report)
    return ParityReport(rungs=tuple(rungs))


def _within_context(bundle: Bundle, base: Base) -> Bundle:
    """One that was folded without its base, and maybe without a config.json that says how many tokens fit, has the base's context."""
    record = bundle.manifest.model
    if record.fingerprint:
        return bundle
    context = min(record.context_length, context_of(base))
    return replace(bundle, manifest=replace(bundle.manifest, model=replace(record, context_length=context)))


def _float_rungs(
    bundle: Bundle,
    base: Base,
    inputs: InputsByName,
    steerers: Mapping[str, Steerer],
    fp32: Mapping[str, Arrays],
    *,
    provider: str,
    kernel: str | None,
    report: Report,
) -> list[Rung]:
    """The graph without its edits, and with them."""
    set_precision(base.model, bundle.manifest.precision)
    rungs: list[Rung] = []
    with temporary_folder() as folder:
        report("recording what the eager model says")
        record_golden(folder, base.model, inputs, steerers, fp32=fp32 or None)
        report("running the exported graph, without edits")
        with variant(bundle, unfold_graph) as exported:
            rungs += check(exported, folder, "exported", names=(BASE_GOLDEN,), provider=provider)
        report("running the folded graph")
        rungs += check(bundle, folder, "folded", provider=provider, kernel=kernel)
    return rungs


def check_same_base(bundle: Bundle, base: Base | Outline, model: str, *, accept_base: bool = False) -> None:
    """Raises AdapterError, naming both models and in what they differ, for a base that the bundle was not made from.

    A bundle folded from a foreign graph has no fingerprint of its own: there the adapters' count. ``accept_base``: a base of equal weights
    will do.
    """
    recorded: dict[str, Named] = {f"{bundle.folder} was made from": bundle.manifest.model}
    if not bundle.manifest.model.fingerprint:
        recorded = {f"adapter {name} was trained on": bundle.adapter_record(name).base for name in bundle.adapter_names}
    for claim, one in recorded.items():
        remedy = "pass the base it was made from"
        require_same(claim, one, f"{model} is", base.info, remedy, former=base.former_fingerprint, accept=accept_base)


def made_from(bundle: Bundle, model: str) -> Bundle:
    """The bundle as one that was made from ``model``, whose weights are its base's, whatever else of their configs differs.

    Raises AdapterError as ``check_same_base`` does.
    """
    base = outline_base(model)
    check_same_base(bundle, base, model, accept_base=True)
    record = replace(bundle.manifest.model, fingerprint=base.info.fingerprint, parts=base.info.parts)
    return replace(bundle, manifest=replace(bundle.manifest, model=record))


def quantized_rungs(
    bundle: Bundle,
    base: Base,
    inputs: InputsByName,
    steerers: Mapping[str, Steerer],
    fp32: Mapping[str, Arrays],
    *,
    provider: str = "cpu",
    kernel: str | None = None,
    report: Report = print,
) -> list[Rung]:
    """Float activations against the dequantized weights, then the graph as it ships against its fake quantization.

    ``base`` must be fresh from disk, in float32; its weights are replaced by the dequantized ones, in the bundle's float type.
    """
    quantization, sources = quantization_of(bundle), bundle.manifest.weights
    graph = load_graph(bundle.graph_path)
    check_recorded(bundle, graph)
    set_precision(base.model, bundle.manifest.precision)
    load_dequantized(base.model, graph, sources)
    rungs: list[Rung] = []
    with temporary_folder() as folder:
        report("holding the quantized weights against the eager model")
        record_golden(folder, base.model, inputs, steerers, fp32=fp32)
        rungs += int8_rungs(bundle)
        with with_float_activations(bundle, cache=True) as changed:
            rungs += check(changed, folder, exact_label(quantization), provider=provider, kernel=kernel)
        if quantization.rounds_inside and quantization.cache == "float":
            rungs += check(bundle, folder, quantization.label, provider=provider, kernel=kernel)
    activations = bool(stored_activations(graph))
    if not activations and quantization.cache == "float":
        return rungs
    with temporary_folder() as folder:
        report("holding the bundle against the eager model's fake quantization")
        rounded = activations_quantized(base.model, graph, sources) if activations else nullcontext()
        with rounded, rounded_cache(base.model, stored_cache(graph.graph)):
            record_golden(folder, base.model, inputs, steerers, fp32=fp32, noisy=True)
        if quantization.rounds_inside:
            with with_float_activations(bundle) as changed:
                rungs += check(changed, folder, float_label(quantization), provider=provider, kernel=kernel)
        rungs += check(bundle, folder, quantization.label, provider=provider, kernel=kernel)
    if not activations:
        return rungs
    return rungs + step_rungs(bundle, lambda: base.model, inputs, steerers, provider=provider, kernel=kernel)


def check(
    bundle: Bundle,
    recorded: Path,
    rung: str,
    *,
    names: Collection[str] | None = None,
    provider: str = "cpu",
    kernel: str | None = None,
) -> list[Rung]:
    """``check_golden`` against arrays recorded just now, under the rung's name: of ``names``, whatever was recorded when it was made."""
    from runtimes.open import ort_session

    adapters = bundle.adapter_names if names is None else tuple(name for name in bundle.adapter_names if name in names)
    live = RecordedBundle(folder=bundle.folder, manifest=replace(bundle.manifest, adapters=adapters, not_held=()), recorded=recorded)
    session = ort_session(live, provider=provider, kernel=kernel)
    return [replace(r, name=f"{rung}, {r.name}") for r in check_golden(live, session, names=names, with_quality=False).rungs]


@contextmanager
def with_float_activations(bundle: Bundle, *, cache: bool = False) -> Iterator[Bundle]:
    """The quantized bundle with the same weights and float activations, and a manifest that says so: its budget is weight-only.

    ``cache``: its KV cache is float, too. Weights of 8 bits are float32 matrices of the same values, where they are not too many: what
    onnxruntime makes of the stored ones is held by ``int8_rungs``, product by product.
    """

    def change(graph: ir.Model) -> None:
        float_activations(graph)
        if cache:
            float_cache(graph)
        unpack_int8(graph)

    with variant(bundle, change) as changed:
        quantization = replace(quantization_of(bundle), scheme="weight-only", accuracy_level=1)
        quantization = replace(quantization, cache="float") if cache else quantization
        yield replace(changed, manifest=replace(changed.manifest, quantization=quantization, parity_budget={}))


def stored_inputs(bundle: Bundle) -> dict[str, Inputs]:
    """The inputs of the bundle's own golden arrays, by name."""
    task = TASKS[bundle.manifest.task]
    return {name: task.stored_inputs(bundle.golden(name)) for name in bundle.golden_names}


def known_inputs(bundle: Bundle, base: Base) -> dict[str, Inputs]:
    """``stored_inputs`` of all names: the base's made anew where the bundle has none, and those of adapters without golden arrays."""
    found = stored_inputs(bundle)
    of_base = found.get(BASE_GOLDEN) or TASKS[bundle.manifest.task].inputs(base)
    shared = of_base.for_adapters(base.model)
    return {BASE_GOLDEN: of_base, **{name: found.get(name, shared) for name in bundle.adapter_names}}


def float_label(q: Quantization) -> str:
    """What a parity rung calls the bundle without the quantization of its activations."""
    return replace(q, accuracy_level=1).label if q.scheme == "weight-only" else f"{q.scheme}, float activations"


def exact_label(q: Quantization) -> str:
    """The same without the rounding of its KV cache either."""
    return float_label(replace(q, cache="float"))
