"""The KV cache of a graph: its heads and head width as integers, which a session that makes one reads off the graph's inputs, and whether
a step can write it in place."""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.accessors import describe, input_of, int_of, name_of
from graph_passes.find.streams import value_width
from runtimes.errors import GraphError

ATTENTION = "GroupQueryAttention"
PAST_KEY = 3
"""Index of its input past_key_values.<layer>.key; the values' cache is the next one."""
_QUERY, _VALUE = 0, 2
_DOMAIN = "com.microsoft"
_CACHES = "past_key_values."


def fix_cache_shapes(model: ir.Model) -> None:
    """Writes [batch, heads, past, width] with integer heads and width on every cache tensor that a GroupQueryAttention reads or writes.

    onnxruntime-genai's builder leaves the width symbolic. With n query heads, k heads of keys and values, and q, k, v in one tensor of
    W columns, the width is W / (n + 2 k); in tensors of their own it is W_v / k. A graph without that operator is left as it is.
    Raises GraphError where the columns are not known or do not divide.
    """
    for node in model.graph:
        if node.op_type != ATTENTION:
            continue
        heads, width = _heads(node)
        for value in node.inputs[PAST_KEY : PAST_KEY + 2]:
            _write(value, heads, width, "past")
        for value in node.outputs[1:3]:
            _write(value, heads, width, "total")


def writes_in_place(graph: ir.Graph) -> bool:
    """Whether every cache past_key_values.* goes into a GroupQueryAttention and nowhere else, whose present.* the graph returns.

    That operator writes the new keys and values alone where its past and its present are one buffer.
    """
    caches = {name_of(value): value for value in graph.inputs if name_of(value).startswith(_CACHES)}
    return bool(caches) and all(_one_buffer(graph, name, value) for name, value in caches.items())


def _one_buffer(graph: ir.Graph, name: str, past: ir.Value) -> bool:
    uses = list(past.uses())
    if len(uses) != 1:
        return False
    node, index = uses[0]
    attends = node.op_type == ATTENTION and node.domain == _DOMAIN and index in (PAST_KEY, PAST_KEY + 1)
    if not attends or len(node.outputs) <= index - PAST_KEY + 1:
        return False
    present = node.outputs[index - PAST_KEY + 1]
    return present.name == name.replace(_CACHES, "present.", 1) and any(present is value for value in graph.outputs)


def _heads(node: ir.Node) -> tuple[int, int]:
    heads, queries = int_of(node, "kv_num_heads"), int_of(node, "num_heads")
    separate = node.inputs[_VALUE] is not None
    parts = heads if separate else queries + 2 * heads
    columns = value_width(input_of(node, _VALUE if separate else _QUERY))
    if columns is None or columns % parts:
        raise GraphError(
            f"the head width of {describe(node)} cannot be told: {columns} columns for {parts} heads; run ONNX shape inference over the "
            "graph first"
        )
    return heads, columns // parts


def _write(value: ir.Value | None, heads: int, width: int, length: str) -> None:
    if value is None:
        return
    old = value.shape if value.shape is not None and len(value.shape) == 4 else ["batch_size", None, f"{length}_sequence_length", None]
    value.shape = ir.Shape([old[0], heads, old[2], width])
