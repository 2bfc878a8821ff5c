"""``reft-export fold``: adapters into an ONNX decoder that another tool exported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from calibration.selection import quantized_weights
from graph_passes.cache_shapes import fix_cache_shapes
from graph_passes.external import load_graph, write_graph
from graph_passes.find.contract import name_cache
from graph_passes.find.domains import check_domains
from graph_passes.find.edge_llm import is_edge_llm
from graph_passes.find.sites import locate_sites, survey_sites
from graph_passes.fold import fold_graph
from graph_passes.graph_file import graph_file
from graph_passes.head import expose_head, head_defaults, locate_head
from graph_passes.slots.add import rule_names
from graph_passes.tied_head import CONTRIB, tie_head, untie_head
from reft_export.base.adapters import check_fit, folders_of, load_adapters, union_nodes
from reft_export.base.classifiers import stated_labels
from reft_export.base.origin import described
from reft_export.base.token_rules import stated_context
from reft_export.bundling.files import (
    BundleParts,
    Report,
    copy_tokenizer,
    finish_bundle,
    head_tensors,
    stored_how,
    write_adapter,
)
from reft_export.bundling.genai import CONFIG_FILE, copy_genai_files, genai_decoder, read_genai_config, stated_json
from reft_export.folding.edge_llm import EdgeLLMFoldResult, fold_edge_llm_folder
from reft_export.folding.family import check_family, check_same_family
from reft_export.folding.graph_record import (
    edited_precision,
    foreign_record,
    logit_count,
    logits_of,
    stated_config,
    task_of,
)
from reft_export.parity.gate import gate
from runtimes.artifacts.adapter_record import check_adapter_name
from runtimes.artifacts.manifest import ModelRecord, WeightSource
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION
from runtimes.edits.adapter import Adapter
from runtimes.edits.edit import Site
from runtimes.edits.op import EditNode
from runtimes.edits.same_base import require_same_size
from runtimes.errors import AdapterError, GraphError, InputError
from runtimes.files.folders import atomic_folder, claimed
from runtimes.first_steps import first_steps
from runtimes.parity.figures import ParityReport

if TYPE_CHECKING:  # without a base, fold runs without torch, whose import takes longer than the fold
    from reft_export.base.load import Base


@dataclass(frozen=True, kw_only=True)
class FoldResult:
    """``found``: for every site, the tensor that carries its stream and how it was found."""

    nodes: tuple[EditNode, ...]
    adapters: tuple[str, ...]
    found: dict[str, str]
    parity: ParityReport | None = None
    """Against the base; None without one, and for bfloat16, which no CPU runs."""
    quantized: int = 0
    """Weights that the tool that made the graph had quantized."""
    not_run: str = ""
    """Why onnxruntime took no step of the bundle here; empty where it did."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ForeignGraph:
    """A graph that was examined, and what is known of it; its cache is named as a bundle's."""

    source: Path
    model: ir.Model
    task: str
    record: ModelRecord
    labels: tuple[str, ...]
    """A classifier's."""
    genai_config: Mapping[str, Any]
    """The one beside the graph, of this graph; empty where there is none."""
    weights: Mapping[str, WeightSource] = field(default_factory=dict)
    """The base's parameter of every weight, where the base is known."""


def fold_bundle(
    graph: Path,
    adapter_folders: list[Path],
    output: Path,
    *,
    sites: tuple[Site, ...] = (),
    as_lora: bool = False,
    model: str | None = None,
    accept_base: bool = False,
    force: bool = False,
    report: Report = print,
) -> FoldResult | EdgeLLMFoldResult:
    """Writes a bundle around a foreign graph; a TensorRT-Edge-LLM folder stays one. Inputs are never written to.

    An ONNX file says nothing of the checkpoint it came from. Without ``model`` an adapter's width and depth are checked, and its family
    where a config.json beside the graph names one; its fingerprint cannot be, and there are no golden arrays; the bundle takes its first
    steps in onnxruntime. With the base's folder or hub id, the bundle is what an export makes: fingerprints are checked, every weight's
    parameter is found by its values, and the graph must answer as eager PyTorch does, or ParityError is raised.

    ``graph``: the .onnx file or its folder, with or without external data. ``sites``: sites to fold beyond the adapters' own, for adapters
    to come. ``as_lora``: of TensorRT-Edge-LLM, an adapter as a LoRA that its runtime swaps. Edits act on streams [B, S, D], in the graph's
    own float type. Which tokens they edit, the graph computes from its attention_mask; one without it takes reft.slots int32 [B, S].

    Raises InputError for options that do not go together, GraphError for a graph without the contract of a decoder and for a stream that
    is not found in it, AdapterError for adapters of another width, depth, family or base, ParityError for a missed budget.

    Example::

        result = fold_bundle(Path("genai-model"), [Path("pirate")], Path("pirate-bundle"), model="base")
        print(result.found)
    """
    with claimed(output, force=force, inputs=[graph, *folders_of(adapter_folders), *([] if model is None else [Path(model)])]):
        adapters = load_adapters(adapter_folders)
        source = _source(graph)
        report(f"reading {source}")
        read = load_graph(source)
        if is_edge_llm(read.graph):
            if model is not None:
                raise InputError("--model is for bundles; TensorRT-Edge-LLM's graphs run in its own runtime only, so leave it out")
            if sites:
                raise InputError("--sites adds graph inputs, which TensorRT-Edge-LLM's runtime refuses; leave it out")
            return fold_edge_llm_folder(source, adapters, output, as_lora=as_lora, force=force, report=report)
        if as_lora:
            raise InputError(
                f"{source} is not a TensorRT-Edge-LLM export, whose runtime --as-lora is for; a bundle swaps adapters without it"
            )
        foreign = _examined(read, source, adapters, family_by_files=model is None)
        nodes = union_nodes(list(adapters.values()), sites, foreign.record.num_hidden_layers)
        located = locate_sites(read, {node.site for node in nodes})
        found = {str(site): f"{where.value.name}, {where.how}" for site, where in sorted(located.items())}
        precision = edited_precision(read, nodes, foreign.record.hidden_size, source)
        base = None
        if model is not None:
            base, foreign = _with_base(model, foreign, adapters, report, accept_base=accept_base)
        parts = _fold(foreign, adapters, nodes, precision, report)
        with atomic_folder(output, force=force) as work:
            _write(work, foreign, adapters, parts, report)
            if base is not None:
                _record_reference(work, base, adapters, precision, report)
                base = None  # the runtime is about to load the weights: the eager model's must not stay in memory beside them
            finish_bundle(work, foreign.model, parts)
            parity, not_run = None, ""
            if model is not None and precision != "bf16":
                report("holding the bundle against the eager model")
                parity = gate(work, output, remedy="the graph is not what the base computes: was it exported from another checkpoint?")
            else:
                report("taking its first steps in onnxruntime")
                not_run = first_steps(work, output)
        quantized = len(quantized_weights(foreign.model.graph))
        return FoldResult(nodes=nodes, adapters=tuple(adapters), found=found, parity=parity, quantized=quantized, not_run=not_run)


def _examined(model: ir.Model, source: Path, adapters: Mapping[str, Adapter], *, family_by_files: bool) -> ForeignGraph:
    """The graph with its cache named as ours, and what it and its files say. ``family_by_files``: they tell the family, as no base does.

    Raises GraphError for a graph that no bundle can hold, AdapterError for an adapter that does not fit it.
    """
    genai_config = _genai_config(source.parent, source.name)
    check_domains(model)
    fix_cache_shapes(model)
    untie_head(model.graph)
    task = task_of(model.graph)
    if task != TEXT_CLASSIFICATION and name_cache(model.graph) and genai_config:
        genai_config = _with_our_cache(genai_config)
    record = foreign_record(model, source, task)
    for name, adapter in adapters.items():
        check_adapter_name(name)
        claim, remedy = f"adapter {name} was trained on", "pass the graph of the base it was trained on"
        require_same_size(claim, adapter.base, str(source), record.num_hidden_layers, record.hidden_size, remedy)
    check_same_family(adapters)
    if family_by_files:
        check_family(adapters, source)
    if task == TEXT_CLASSIFICATION:
        labels = _labels(model, source, adapters, record.vocab_size)
    else:
        _refuse_of_classifier(adapters, source)
        labels = ()
    return ForeignGraph(source=source, model=model, task=task, record=record, labels=labels, genai_config=genai_config)


def _fold(
    foreign: ForeignGraph, adapters: Mapping[str, Adapter], nodes: tuple[EditNode, ...], precision: str, report: Report
) -> BundleParts:
    """Edits and, of adapters with a head, the head's inputs into the graph, in place; what the bundle's manifest says of it."""
    model = foreign.model
    head_sources = _head_sources(model, adapters)
    report(f"folding {len(nodes)} edit nodes")
    fold_graph(model, nodes)
    head = expose_head(model, head_sources, [source.parameter for source in head_sources.values()])
    logits = logits_of(model.graph)
    weights = {name: source for name, source in foreign.weights.items() if name in model.graph.initializers}
    # A graph of ONNX's own operators stays one.
    tied = tie_head(model, fused=CONTRIB in model.opset_imports) is not None
    return BundleParts(
        model=foreign.record,
        precision=precision,
        quantization=None,
        exporter="foreign",
        logits="last" if logits.shape is not None and logits.shape[1] == 1 else "all",
        nodes=nodes,
        adapters=tuple(adapters),
        weights=weights,
        embeddings=stored_how(model.graph, tied=tied),
        genai_config=foreign.genai_config,
        task=foreign.task,
        labels=foreign.labels,
        head=head,
    )


def _write(work: Path, foreign: ForeignGraph, adapters: Mapping[str, Adapter], parts: BundleParts, report: Report) -> None:
    """Everything of the bundle but its golden arrays and its manifest."""
    report("writing the graph")
    write_graph(foreign.model, work)
    rules = rule_names(foreign.model.graph)
    for name, adapter in adapters.items():
        head = head_tensors(adapter, parts.head, head_defaults(foreign.model, parts.head))
        write_adapter(work, name, adapter, parts.nodes, precision=parts.precision, rules=rules, head=head)
    copy_tokenizer(foreign.source.parent, None, work)
    if parts.genai_config:
        copy_genai_files(foreign.source.parent, work, parts.genai_config)


def _with_base(
    model: str, foreign: ForeignGraph, adapters: Mapping[str, Adapter], report: Report, *, accept_base: bool
) -> tuple[Base, ForeignGraph]:
    """The base that the graph is said to be of, and what it tells of the graph: its record, its labels, its weights' parameters."""
    from reft_export.base.load import load_base
    from reft_export.folding.foreign_base import known_model, match_weights, refuse_quantized

    source = foreign.source
    refuse_quantized(foreign.model, str(source), "there is nothing to hold against the base: leave --model out")
    report(f"loading {described(model)}")
    base = load_base(model)
    for name, adapter in adapters.items():
        check_fit(name, adapter, base, accept_base=accept_base)
    record = known_model(foreign.record, base, context=stated_context(stated_config(source.parent), "context_length"))
    report("finding the base's weights in the graph")
    weights = match_weights(foreign.model, base, str(source))
    return base, replace(foreign, record=record, weights=weights, labels=_labels_of_base(base, foreign.labels, source))


def _record_reference(work: Path, base: Base, adapters: Mapping[str, Adapter], precision: str, report: Report) -> None:
    from reft_export.base.memory import give_back
    from reft_export.eager.steering import steerers_of
    from reft_export.parity.golden import inputs_of, record_base

    report("recording what the eager model says")
    copy_tokenizer(None if (work / "tokenizer.json").is_file() else base.folder, base.tokenizer, work)
    record_base(work / "golden", base, inputs_of(base, adapters), steerers_of(adapters), precision)
    give_back()


def _refuse_of_classifier(adapters: Mapping[str, Adapter], source: Path) -> None:
    if wrong := [name for name, adapter in adapters.items() if adapter.base.labels]:
        raise AdapterError(f"adapter {wrong[0]} is of a classifier, and {source} is a decoder; pass the graph it was trained on")


def _labels(model: ir.Model, source: Path, adapters: Mapping[str, Adapter], vocabulary: int) -> tuple[str, ...]:
    """A classifier's labels, by config.json beside the graph, else by its adapters, else numbered.

    Raises AdapterError for an adapter of other labels, GraphError for a config.json that names more labels than logits, or fewer, and for
    a decoder whose cache was left out, which looks like a classifier of as many labels as its ``vocabulary`` has tokens.
    """
    count = logit_count(model.graph)
    path = source.parent / "config.json"
    stated = stated_labels(stated_json(path), path)
    if stated and len(stated) != count:
        raise GraphError(f"{path} names {len(stated)} labels, and the graph has {count} logits; correct the file")
    trained = next((adapter.base.labels for adapter in adapters.values()), ())
    if not stated and not trained and count == vocabulary:
        raise GraphError(
            f"{source} has no KV cache and logits [batch, {count}], one for every token of its vocabulary, so it is neither a decoder with "
            "a cache nor a classifier; export the decoder with its cache (text-generation-with-past)"
        )
    labels = stated or trained or tuple(f"LABEL_{i}" for i in range(count))
    for name, adapter in adapters.items():
        if adapter.base.labels != labels or len(labels) != count:
            raise AdapterError(
                f"adapter {name} was trained on {adapter.base.name} with labels {_listed(adapter.base.labels)}; {source} has "
                f"{count}: {_listed(labels)}; pass the graph of the base it was trained on"
            )
    return labels


def _listed(labels: tuple[str, ...], most: int = 8) -> str:
    more = len(labels) - most
    return (", ".join(labels[:most]) or "none") + (f" and {more} more" if more > 0 else "")


def _labels_of_base(base: Base, labels: tuple[str, ...], source: Path) -> tuple[str, ...]:
    """The base's labels, whose order the golden arrays hold the graph to; GraphError where the graph has more logits or fewer."""
    if len(base.info.labels) != len(labels):
        raise GraphError(
            f"{source} has {len(labels) or 'no'} labels, {base.info.name} {len(base.info.labels) or 'none'}; pass the base that the graph "
            "was exported from"
        )
    return base.info.labels


def _head_sources(model: ir.Model, adapters: Mapping[str, Adapter]) -> dict[str, WeightSource]:
    """Where the graph holds the head that adapters bring; empty where none brings one."""
    heads = [{name: value.shape for name, value in adapter.head.items()} for adapter in adapters.values() if adapter.head]
    if not heads:
        return {}
    if any(head != heads[0] for head in heads):
        raise AdapterError("the adapters' heads have parameters of other names or shapes; fold adapters of one base")
    last = Site(layer=survey_sites(model).layers - 1)
    end = locate_sites(model, [last])[last].value
    return locate_head(model, end, heads[0])


def _source(graph: Path) -> Path:
    """The graph that is meant: of a folder that onnxruntime-genai opens, the decoder that its config names."""
    config = read_genai_config(graph) if graph.is_dir() else {}
    return graph / genai_decoder(config, graph / CONFIG_FILE) if config else graph_file(graph)


def _genai_config(folder: Path, name: str) -> dict[str, Any]:
    """The genai config beside the graph, where it is about this graph."""
    config = read_genai_config(folder)
    return config if config and genai_decoder(config, folder / CONFIG_FILE) == name else {}


def _with_our_cache(config: dict[str, Any]) -> dict[str, Any]:
    """The genai config with a bundle's names of the cache."""
    decoder = config["model"]["decoder"]
    ours = {
        way: {**decoder.get(way, {}), **{f"{kind}_{part}_names": f"{name}.%d.{part}" for part in ("key", "value")}}
        for way, kind, name in (("inputs", "past", "past_key_values"), ("outputs", "present", "present"))
    }
    return {**config, "model": {**config["model"], "decoder": {**decoder, **ours}}}
