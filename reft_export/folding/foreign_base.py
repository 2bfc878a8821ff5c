"""The checkpoint behind a graph that another tool made: found by values, and then held against it like an export of our own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import onnx_ir as ir

from calibration.selection import quantized_weights, select
from calibration.settings import QuantizationSettings
from graph_passes.accessors import describe, tensor_of
from graph_passes.external import load_graph
from graph_passes.find.weights import weight_name
from graph_passes.tied_head import untie_head
from reft_export.base.load import Base, load_base
from reft_export.base.memory import give_back
from reft_export.base.model_record import model_record
from reft_export.base.origin import described
from reft_export.bundling.files import Report
from reft_export.bundling.weight_sources import find_weight_sources
from reft_export.eager.banks import bank_steerer
from reft_export.parity.golden import record_base
from reft_export.parity.ladder import RecordedBundle, check, check_same_base, known_inputs
from runtimes.artifacts.bundle import Bundle
from runtimes.artifacts.manifest import ModelRecord, WeightSource
from runtimes.errors import AdapterError, CalibrationError, GraphError
from runtimes.files.claims import temporary_folder
from runtimes.parity.figures import ParityReport


def match_weights(graph: ir.Model, base: Base, where: str) -> dict[str, WeightSource]:
    """The parameter of every weight of ``graph`` that the base holds, by value; ``where`` is the graph in messages.

    Raises GraphError for a graph whose weights another tool quantized: no parameter equals them. Raises AdapterError where no weight at
    all is the base's.
    """
    refuse_quantized(graph, where, "they cannot be told from the checkpoint's")
    sources = find_weight_sources(graph, base.model)
    if not sources:
        raise AdapterError(
            f"no weight of {where} is a parameter of {base.info.name} (fingerprint {base.info.fingerprint[:12]}), whole, transposed, split "
            "or joined; pass the base that the graph was exported from"
        )
    return sources


def refuse_quantized(graph: ir.Model, where: str, consequence: str) -> None:
    """Raises GraphError where the graph holds weights of 8 bits or fewer."""
    if stored := quantized_weights(graph.graph):
        node, weight = stored[0]
        raise GraphError(
            f"{where}: {len(stored)} weights were quantized by the tool that made the graph (first {weight.name}, "
            f"{tensor_of(weight).dtype.name}, of {describe(node)}), so {consequence}; "
            "fold its float graph, and quantize the bundle afterwards"
        )


def known_model(record: ModelRecord, base: Base, *, context: int | None) -> ModelRecord:
    """The base's record with the ``context`` that the graph's files state, if any, and the stop tokens of both; AdapterError where graph
    and base differ in size."""
    full = model_record(base)
    for what, has, needs in (
        ("layers", record.num_hidden_layers, full.num_hidden_layers),
        ("logits", record.vocab_size, full.vocab_size),
        ("wide streams", record.hidden_size, full.hidden_size),
    ):
        if has != needs:
            raise AdapterError(
                f"the graph {record.name} has {has} {what}, {full.name} (fingerprint {full.fingerprint[:12]}) {needs}; pass the base that "
                "the graph was exported from"
            )
    stop = tuple(dict.fromkeys((*record.eos_token_ids, *full.eos_token_ids)))
    return replace(full, context_length=min(context or full.context_length, full.context_length), eos_token_ids=stop)


@contextmanager
def completed(bundle: Bundle, model: str, report: Report) -> Iterator[Bundle]:
    """The bundle with everything that ours have: a fingerprint, every weight's parameter, golden arrays. Its folder stays as it is.

    One that was made with its base passes through. For one that was folded without, the base is loaded, its weights are found in the
    graph, and the float graph must answer as eager PyTorch does: what is quantized after that was right before.

    Raises GraphError and AdapterError as ``match_weights`` does, AdapterError for a base that the adapters were not trained on,
    ParityError where the graph is not the base's.
    """
    if bundle.golden_names and bundle.manifest.weights:
        yield bundle
        return
    graph = load_graph(bundle.graph_path)
    untie_head(graph.graph)
    refuse_quantized(graph, str(bundle.folder), "nothing is left that could be quantized against the base")
    report(f"loading {described(model)}")
    base = load_base(model)
    check_same_base(bundle, base, model)
    made_from = known_model(bundle.manifest.model, base, context=bundle.manifest.model.context_length)
    report("finding the base's weights in the graph")
    matched = match_weights(graph, base, str(bundle.folder))
    sources = {name: source for name, source in matched.items() if name not in bundle.manifest.head}  # inputs, which adapters bring
    del graph
    with temporary_folder() as folder:
        report("recording what the eager model says")
        steerers = {name: bank_steerer(bundle, name) for name in bundle.adapter_names}
        record_base(folder, base, known_inputs(bundle, base), steerers, bundle.manifest.precision)
        del base
        give_back()
        full = RecordedBundle(folder=bundle.folder, manifest=replace(bundle.manifest, model=made_from, weights=sources), recorded=folder)
        if bundle.manifest.precision != "bf16":  # which no CPU runs
            report("holding the float graph against the eager model")
            ParityReport(rungs=tuple(check(full, folder, "folded"))).require()
            give_back()
        yield full


def check_weights_known(graph: ir.Model, sources: Mapping[str, WeightSource], settings: QuantizationSettings, where: str) -> None:
    """Raises CalibrationError for a weight that would be quantized and is no parameter of the base: nothing could show it right."""
    chosen = select(graph.graph, settings.keep_high, lm_head=settings.quantizes_head).products
    unknown = [name for name in dict.fromkeys(map(weight_name, chosen)) if name not in sources]
    if unknown:
        raise CalibrationError(
            f"{where}: {len(unknown)} weights to quantize are no parameters of the base: the exporter changed their values; leave each in "
            f"float with --keep-high: {', '.join(unknown[:5])}{', ..' if len(unknown) > 5 else ''}"
        )
