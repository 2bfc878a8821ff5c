"""onnxruntime-genai's model builder: a decoder of fused operators (GroupQueryAttention, skip norms), the fastest to decode.

Its graph takes no position_ids: GroupQueryAttention counts a row's tokens by attention_mask.
"""

from __future__ import annotations

import re
from pathlib import Path

import onnx_ir as ir
from transformers import PretrainedConfig

from graph_passes.accessors import describe, input_of, name_of
from graph_passes.cache_shapes import ATTENTION, PAST_KEY, fix_cache_shapes
from graph_passes.external import load_graph
from reft_export.base.load import Base
from reft_export.bundling.weight_sources import find_weight_sources
from reft_export.exporting.exported_graph import ExportedGraph
from reft_export.exporting.installed import check_builder
from reft_export.exporting.process import folder_of, run_exporter
from runtimes.errors import GraphError

PROVIDER = {"fp32": "cpu", "fp16": "cuda"}
"""The builder ties float16 to its CUDA graphs; they hold the same operators and run on the CPU provider too."""

OPTIONS = (
    "hf_token=false",
    "fuse_qkv=false",  # one parameter per weight; fused, int4 decode is 3 to 6 % faster
    "shared_embeddings=false",  # shared, the head is the embedding transposed and cannot be quantized
    "windowed_kv_cache=false",  # a cache of its own length per layer, which only onnxruntime-genai knows how to feed
)


def export_builder(base: Base, scratch: Path, *, precision: str = "fp32", last_logits: bool = False) -> ExportedGraph:
    """The graph of ``base``'s folder at ``precision`` (fp32, fp16). Its weights stay in files under ``scratch`` until it is written.

    The folder has a tokenizer, which the builder reads. Raises BackendUnavailable where the builder is not installed, ExportError with the
    builder's own reason for a family it does not know. That a family is known does not make the graph right: parity has to show it.
    """
    check_builder()
    options = [*OPTIONS, f"prune_lm_head={str(last_logits).lower()}"]
    arguments = ["-m", folder_of(base).resolve(), "-o", "graph", "-c", "cache", "-p", precision, "-e", PROVIDER[precision]]
    family = base.model.config.model_type
    what = f"onnxruntime-genai's builder could not export {family}"
    run_exporter("onnxruntime_genai.models.builder", [*arguments, "--extra_options", *options], scratch, what=what)
    graph = load_graph(scratch / "graph" / "model.onnx")
    fix_cache_shapes(graph)
    _write_windows(graph, base.model.config.get_text_config())
    return ExportedGraph(model=graph, weights=find_weight_sources(graph, base.model))


def _write_windows(graph: ir.Model, config: PretrainedConfig) -> None:
    """Gives every attention the sliding window of its layer; the builder leaves Mistral's out, which no prompt within the window shows."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    for node in graph.graph:
        if node.op_type == ATTENTION:
            slides = kinds is None or kinds[_layer(node)] == "sliding_attention"
            node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", window if window is not None and slides else -1)


def _layer(attention: ir.Node) -> int:
    """By the name of its cache, ``past_key_values.<i>.key``."""
    found = re.search(r"\d+", name_of(input_of(attention, PAST_KEY)))
    if found is None:
        raise GraphError(f"{describe(attention)} reads a cache whose name has no layer's number; use --exporter dynamo")
    return int(found[0])
