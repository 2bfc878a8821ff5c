"""``reft-export fold``: adapters into an ONNX decoder that another tool exported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from calibration.selection import token_embedding
from graph_passes.cache_shapes import fix_cache_shapes
from graph_passes.domains import check_domains
from graph_passes.edge_llm import is_edge_llm
from graph_passes.encoder import is_classifier
from graph_passes.external import load_graph, write_graph
from graph_passes.fold import fold_graph
from graph_passes.graph_file import graph_file
from graph_passes.head import expose_head, head_defaults, locate_head
from graph_passes.sites import SiteSurvey, locate_sites, survey_sites
from graph_passes.streams import stream_type
from reft_export.bundling import BundleParts, Report, copy_tokenizer, finish_bundle, head_tensors, union_nodes, write_adapter
from reft_export.classifiers import longest_input
from reft_export.export import load_adapters
from reft_export.fold_edge import EdgeFoldResult, fold_edge_folder
from reft_export.genai import CONFIG_FILE, copy_genai_files, genai_decoder
from runtimes.adapter import Adapter
from runtimes.bundle import ModelRecord, WeightSource, check_adapter_name
from runtimes.edit import Site
from runtimes.errors import AdapterError, GraphError, InputError
from runtimes.folders import atomic_folder, check_destination
from runtimes.op import EditNode

PRECISION = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
DEFAULT_CONTEXT = 2048
"""Where no config.json or genai_config.json beside the graph says how long the context is."""


@dataclass(frozen=True, kw_only=True)
class FoldResult:
    """``found``: for every site, the tensor that carries its stream and how it was found."""

    nodes: tuple[EditNode, ...]
    adapters: tuple[str, ...]
    found: dict[str, str]


def fold_bundle(
    graph: Path,
    adapter_folders: list[Path],
    output: Path,
    *,
    slots: str,
    sites: tuple[Site, ...],
    as_lora: bool = False,
    force: bool,
    report: Report,
) -> FoldResult | EdgeFoldResult:
    """Writes a bundle around a foreign graph, without golden arrays; a TensorRT-Edge-LLM folder stays one. Inputs are never written to.

    An ONNX file says nothing of the checkpoint it came from: an adapter's width and depth are checked, its fingerprint cannot be.
    """
    if slots not in ("graph", "input"):
        raise InputError(f"slots {slots!r} is unknown; known: graph, input")
    check_destination(output, force=force, inputs=[graph, *adapter_folders])
    adapters = load_adapters(adapter_folders)
    source = _source(graph)
    report(f"reading {source}")
    model = load_graph(source)
    if is_edge_llm(model.graph):
        if sites or slots != "graph":
            raise InputError("--sites and --slots input add graph inputs, which TensorRT-Edge-LLM's runtime refuses; leave them out")
        return fold_edge_folder(source, adapters, output, as_lora=as_lora, force=force, report=report)
    if as_lora:
        raise InputError(f"{source} is not a TensorRT-Edge-LLM export, whose runtime --as-lora is for; a bundle swaps adapters without it")
    genai_config = _genai_config(source.parent, source.name)
    check_domains(model)
    fix_cache_shapes(model)
    record = foreign_record(model, source, adapters)
    for name, adapter in adapters.items():
        check_adapter_name(name)
        has, needs = (record.num_hidden_layers, record.hidden_size), (adapter.base.num_hidden_layers, adapter.base.hidden_size)
        if has != needs:
            raise AdapterError(
                f"adapter {name} was trained on {adapter.base.name} ({needs[0]} layers, width {needs[1]}); {source} has {has[0]} "
                f"layers, width {has[1]}; pass the graph of the base it was trained on"
            )
    labels = _labels(model, source, adapters)
    nodes = union_nodes(list(adapters.values()), sites, record.num_hidden_layers)
    found = {str(site): f"{where.value.name}, {where.how}" for site, where in sorted(locate_sites(model, {n.site for n in nodes}).items())}
    precision = _precision(model, nodes)
    head_sources = _head_sources(model, adapters)
    report(f"folding {len(nodes)} edit nodes")
    fold_graph(model, nodes, slots=slots)
    head = expose_head(model, head_sources, [source.parameter for source in head_sources.values()])
    with atomic_folder(output, force=force) as work:
        write_graph(model, work)
        for name, adapter in adapters.items():
            own_head = head_tensors(adapter, head, head_defaults(model, head))
            write_adapter(work, name, adapter, nodes, precision=precision, slots=slots, head=own_head)
        copy_tokenizer(source.parent, None, work)
        if genai_config:
            copy_genai_files(source.parent, work, genai_config)
        logits = next(v for v in model.graph.outputs if v.name == "logits")
        parts = BundleParts(
            model=record,
            precision=precision,
            quantization=None,
            exporter="foreign",
            logits="last" if logits.shape is not None and logits.shape[1] == 1 else "all",
            slots=slots,
            nodes=nodes,
            adapters=tuple(adapters),
            weights={},
            genai_config=genai_config,
            labels=labels,
            head=head,
        )
        finish_bundle(work, model, parts)
    return FoldResult(nodes=nodes, adapters=tuple(adapters), found=found)


def _labels(model: ir.Model, source: Path, adapters: dict[str, Adapter]) -> tuple[str, ...]:
    """A classifier's labels, by config.json beside the graph, else by its adapters, else numbered; none of a decoder.

    Raises AdapterError for an adapter of other labels.
    """
    if not is_classifier(model.graph):
        if wrong := [name for name, adapter in adapters.items() if adapter.base.labels]:
            raise AdapterError(f"adapter {wrong[0]} is of a classifier, and {source} is a decoder; pass the graph it was trained on")
        return ()
    count = next(v for v in model.graph.outputs if v.name == "logits").shape[-1]
    named = _read(source.parent / "config.json").get("id2label") or {}
    labels = tuple(str(named[key]) for key in sorted(named, key=int))
    trained = next((adapter.base.labels for adapter in adapters.values()), ())
    labels = labels or trained or tuple(f"LABEL_{i}" for i in range(count))
    for name, adapter in adapters.items():
        if adapter.base.labels != labels or len(labels) != count:
            raise AdapterError(
                f"adapter {name} was trained on {adapter.base.name} with labels {', '.join(adapter.base.labels) or 'none'}; {source} has "
                f"{count}: {', '.join(labels)}; pass the graph of the base it was trained on"
            )
    if len(labels) != count:
        raise GraphError(f"{source.parent / 'config.json'} names {len(labels)} labels, and the graph has {count} logits; correct the file")
    return labels


def _head_sources(model: ir.Model, adapters: dict[str, Adapter]) -> dict[str, WeightSource]:
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
    config = _read(graph / CONFIG_FILE) if graph.is_dir() else {}
    return graph / genai_decoder(config, graph / CONFIG_FILE) if config else graph_file(graph)


def _genai_config(folder: Path, name: str) -> dict[str, Any]:
    """The genai config beside the graph, where it is about this graph."""
    config = _read(folder / CONFIG_FILE)
    return config if config and genai_decoder(config, folder / CONFIG_FILE) == name else {}


def foreign_record(model: ir.Model, source: Path, adapters: dict[str, Adapter]) -> ModelRecord:
    """What the graph, and the configuration files beside it, say of the model."""
    folder, survey = source.parent, survey_sites(model)
    vocabulary = next(v for v in model.graph.outputs if v.name == "logits").shape
    if vocabulary is None or not isinstance(vocabulary[-1], int):
        raise GraphError("the graph does not declare how many logits there are; run onnx.shape_inference over it first")
    config = _read(folder / "config.json") | _read(folder / CONFIG_FILE).get("model", {})
    generation = _read(folder / "generation_config.json")
    width = config.get("hidden_size") or _width(survey, adapters)
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    context = config.get("context_length") or config.get("max_position_embeddings") or config.get("n_positions") or DEFAULT_CONTEXT
    if is_classifier(model.graph):
        context = longest_input(str(config.get("model_type")), int(context), config.get("pad_token_id"))
    return ModelRecord(
        name=folder.resolve().name,
        model_type=str(config.get("model_type") or config.get("type") or "unknown"),
        fingerprint="",
        vocab_size=int(config.get("vocab_size") or token_embedding(model.graph).inputs[0].shape[0])
        if is_classifier(model.graph)
        else vocabulary[-1],
        hidden_size=int(width),
        num_hidden_layers=survey.layers,
        context_length=int(context),
        num_attention_heads=config.get("num_attention_heads") or config.get("n_head"),
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),),
        pad_token_id=config.get("pad_token_id"),
        sliding_window=config.get("sliding_window"),
    )


def _width(survey: SiteSurvey, adapters: dict[str, Adapter]) -> int:
    for where in survey.found.values():
        if where.value.shape is not None and isinstance(where.value.shape[-1], int):
            return where.value.shape[-1]
    if adapters:
        return next(iter(adapters.values())).base.hidden_size
    raise GraphError("the graph does not declare the width of its streams; put config.json beside it, or pass an adapter")


def _precision(model: ir.Model, nodes: tuple[EditNode, ...]) -> str:
    """The float type of the streams that are edited: an adapter file has one."""
    located = locate_sites(model, {node.site for node in nodes})
    kinds = {stream_type(site, where).dtype for site, where in located.items()}
    if len(kinds) != 1 or not kinds <= set(PRECISION):
        raise GraphError(f"the edited streams are of types {sorted(k.name for k in kinds)}; one of float32, float16, bfloat16 is expected")
    return PRECISION[kinds.pop()]


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise InputError(f"{path} is not JSON: {e}") from None
    return value if isinstance(value, dict) else {}
