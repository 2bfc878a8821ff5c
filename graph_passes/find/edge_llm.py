"""What TensorRT-Edge-LLM's exporter writes, and what of it can be folded.

One graph serves prefill and decode. Its attention is a plugin (AttentionPlugin) that updates the cache in place; there is no attention
mask. Its runtime binds every engine input by name and refuses an engine with an input that it does not know. Two layouts, by version:

    padded (to 0.10)   inputs_embeds [B, S, D] (input_ids [B, S] to 0.4), context_lengths [B], kvcache_start_index [B], or [0] where
                       the cache is empty: rows are padded on the right to the longest
    tokens (from 0.11) inputs_embeds [T, D], query_start_offsets [B + 1], query_lengths, past_lengths [B],
                       context_sequence_count_carrier [B] in a prefill and [0] in a decode step: the rows one after the other

    outputs: logits, present_key_values_<layer> (keys and values in one tensor)

Source: tensorrt_edgellm 0.4 to 0.11 (onnx_export/llm_export.py, later onnx/export.py), cpp/runtime of 0.4 to 0.10.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from graph_passes.accessors import name_of
from runtimes.errors import GraphError

ATTENTION = "AttentionPlugin"
_PRESENT = re.compile(r"present_key_values[._](\d{1,40})")
_PAST = re.compile(r"past_key_values[._](\d{1,40})")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,40})(\.|$)")
_SCOPES = "pkg.torch.onnx.name_scopes"

LENGTHS = {
    "padded": ("context_lengths", "kvcache_start_index"),
    "tokens": ("query_start_offsets", "query_lengths", "past_lengths", "context_sequence_count_carrier"),
}
"""The inputs that tell where a token stands in its prompt."""

_REFUSED_INPUTS = {
    "attention_pos_id": "it is an export for speculative decoding, whose steps hold trees of tokens",
    "attention_position_ids": "it is an export for speculative decoding, whose steps hold trees of tokens",
    "hidden_states_input": "it is the draft model of speculative decoding; fold into the base",
    "hidden_states_from_draft": "it is the draft model of speculative decoding; fold into the base",
    "phase_is_encoder": "it is a diffusion model, which rewrites its tokens",
    "deepstack_embeds": "vision features are added between its blocks",
    "conv_state": "it has layers without attention, so that the present outputs do not count its blocks",
    "recurrent_state": "it has layers without attention, so that the present outputs do not count its blocks",
    "ssm_state": "it has layers without attention, so that the present outputs do not count its blocks",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class EdgeLLMContract:
    """The graph inputs and outputs that the passes read."""

    stream: ir.Value
    """inputs_embeds, which is the residual stream itself, or input_ids."""
    logits: ir.Value
    presents: tuple[ir.Value, ...]
    """``present_key_values_<layer>`` in layer order."""
    layout: str
    """"padded" or "tokens"."""
    lengths: Mapping[str, ir.Value]
    """Those of the layout, in the order of ``LENGTHS``."""


def is_edge_llm(graph: ir.Graph) -> bool:
    """Whether TensorRT-Edge-LLM's attention computes this graph."""
    return any(node.op_type == ATTENTION for node in graph)


def read_edge_llm_contract(graph: ir.Graph) -> EdgeLLMContract:
    """The graph's inputs and outputs by name.

    Raises GraphError naming everything that is missing, and for exports whose steps or blocks the slot rule or the site finder
    would misread: speculative decoding, diffusion, layers without attention, vision features between the blocks.
    """
    inputs = {value.name or "": value for value in graph.inputs}
    outputs = {value.name or "": value for value in graph.outputs}
    for name in inputs:
        if reason := next((why for prefix, why in _REFUSED_INPUTS.items() if name.startswith(prefix)), None):
            raise GraphError(f"this TensorRT-Edge-LLM graph has the input {name!r}: {reason}; only plain decoders can be folded")
    stream = inputs.get("inputs_embeds", inputs.get("input_ids"))
    found = ((_PRESENT.fullmatch(name), value) for name, value in outputs.items())
    presents = {int(match[1]): value for match, value in found if match}
    flat = stream is not None and stream.name == "inputs_embeds" and stream.shape is not None and len(stream.shape) == 2
    layout = "tokens" if flat else "padded"
    missing = [f"input {name!r}" for name in LENGTHS[layout] if name not in inputs]
    missing += ["input 'inputs_embeds'"] if stream is None else []
    missing += ["output 'logits'"] if "logits" not in outputs else []
    layers = range(min(max(presents, default=0), len(presents)) + 1)
    missing += [f"output 'present_key_values_{layer}'" for layer in layers if layer not in presents]
    # A layer without its past would decode without history.
    missing += [f"input {name_of(presents[i]).replace('present', 'past')!r}" for i in sorted(set(presents) - _layers(inputs))]
    missing += [f"output 'present_key_values_{i}'" for i in sorted(_layers(inputs) - set(presents)) if i not in layers]
    if missing or stream is None:
        raise GraphError(
            f"this graph with {ATTENTION} nodes is not one that TensorRT-Edge-LLM exports: {', '.join(missing)} missing; export it "
            "again with tensorrt-edgellm-export (0.4 to 0.11 are known)"
        )
    return EdgeLLMContract(
        stream=stream,
        logits=outputs["logits"],
        presents=tuple(presents[layer] for layer in range(len(presents))),
        layout=layout,
        lengths={name: inputs[name] for name in LENGTHS[layout]},
    )


def _layers(inputs: Iterable[str]) -> set[int]:
    """Whose cache comes in."""
    return {int(match[1]) for name in inputs if (match := _PAST.fullmatch(name))}


def block_of(node: ir.Node) -> int | None:
    """The layer whose block, and no module inside it, computed ``node``, by the exporter's scopes; None where they do not say."""
    scopes = _scopes(node)
    match = _LAYER.search(scopes[-2]) if len(scopes) > 1 else None
    return int(match[1]) if match and not match[2] else None


def layers_of(node: ir.Node) -> Iterator[int]:
    """The layers that the exporter's scopes of ``node`` name."""
    return (int(match[1]) for scope in _scopes(node) if (match := _LAYER.search(scope)))


def _scopes(node: ir.Node) -> list[str]:
    """``['', '_model.model.layers.0', 'add_63']`` as the dynamo exporter writes it; empty without."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    except (ValueError, SyntaxError):
        return []
    return [scope for scope in scopes if isinstance(scope, str)] if isinstance(scopes, list) else []
