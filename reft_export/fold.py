"""``reft-export fold``: adapters into an ONNX decoder that another tool exported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graph_passes.cache_shapes import fix_cache_shapes
from graph_passes.domains import check_domains
from graph_passes.edge_llm import is_edge_llm
from graph_passes.external import load_graph, write_graph
from graph_passes.fold import fold_graph
from graph_passes.graph_file import graph_file
from graph_passes.sites import SiteSurvey, locate_sites, survey_sites
from graph_passes.streams import stream_type
from reft_export.bundling import BundleParts, Report, copy_tokenizer, finish_bundle, union_nodes, write_adapter
from reft_export.export import load_adapters
from reft_export.fold_edge import EdgeFoldResult, fold_edge_folder
from reft_export.genai import CONFIG_FILE, copy_genai_files, genai_decoder
from runtimes.adapter import Adapter
from runtimes.bundle import ModelRecord, check_adapter_name
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
    nodes = union_nodes(list(adapters.values()), sites, record.num_hidden_layers)
    found = {str(site): f"{where.value.name}, {where.how}" for site, where in sorted(locate_sites(model, {n.site for n in nodes}).items())}
    precision = _precision(model, nodes)
    report(f"folding {len(nodes)} edit nodes")
    fold_graph(model, nodes, slots=slots)
    with atomic_folder(output, force=force) as work:
        write_graph(model, work)
        for name, adapter in adapters.items():
            write_adapter(work, name, adapter, nodes, precision=precision, slots=slots)
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
        )
        finish_bundle(work, model, parts)
    return FoldResult(nodes=nodes, adapters=tuple(adapters), found=found)


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
    return ModelRecord(
        name=folder.resolve().name,
        model_type=str(config.get("model_type") or config.get("type") or "unknown"),
        fingerprint="",
        vocab_size=vocabulary[-1],
        hidden_size=int(width),
        num_hidden_layers=survey.layers,
        context_length=int(
            config.get("context_length") or config.get("max_position_embeddings") or config.get("n_positions") or DEFAULT_CONTEXT
        ),
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
