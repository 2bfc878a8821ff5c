"""Classifiers: graphs from ``input_ids`` and ``attention_mask`` to one row of ``logits`` a text, without a KV cache.

There is no ``present.<layer>.key`` to tell the layers by. Every layer has one attention, and every attention normalises its scores
once: the Softmax (or the fused operator that holds it) of layer i takes the key's place. What block i reads is the nearest value upstream
of it that all of logits depends on, and the branch that it feeds is the attention's. Where a decoder classifies, every token has a row of
logits, of which the last token's is picked by ``input_ids``: those rows are what depends on the stream alone.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.accessors import input_of
from graph_passes.find.dominators import Dominators
from runtimes.errors import SiteNotFound

ATTENTIONS = frozenset({"Softmax", "Attention", "MultiHeadAttention"})
"""Operators of which an encoder layer has exactly one: the plain one, ONNX's from opset 23 on, and onnxruntime's fused ones."""


def is_classifier(graph: ir.Graph) -> bool:
    """Whether the graph maps token ids to logits of rank 2, [batch, labels], and has no cache inputs or outputs."""
    inputs = {value.name for value in graph.inputs}
    logits = next((value for value in graph.outputs if value.name == "logits"), None)
    cached = any(str(value.name).startswith(("past", "present")) for value in (*graph.inputs, *graph.outputs))
    return "input_ids" in inputs and not cached and logits is not None and logits.shape is not None and len(logits.shape) == 2


def row_of_every_token(logits: ir.Value) -> ir.Value:
    """What ``logits`` [batch, labels] are picked from, [batch, sequence, labels]; logits themselves where they are not picked."""
    node = logits.producer()
    while node is not None and node.op_type in ("Cast", "Identity"):
        node = input_of(node, 0).producer()
    return input_of(node, 0) if node is not None and node.op_type in ("GatherND", "GatherElements", "Gather") else logits


def attention_anchors(graph: ir.Graph, root: ir.Value) -> tuple[ir.Value, ...]:
    """One value per layer, in layer order: what its attention operator computes. Raises SiteNotFound where there is none."""
    dominators = Dominators(graph, root)
    found = tuple(node.outputs[0] for node in graph if node.op_type in ATTENTIONS and node in dominators)
    if not found:
        raise SiteNotFound(
            f"the graph has no attention that depends on the tokens ({', '.join(sorted(ATTENTIONS))}), by which the layers of an encoder "
            "are told; export it without fusions that hide it"
        )
    return found
