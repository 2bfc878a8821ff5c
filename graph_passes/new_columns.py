"""A KV cache of which a step gives out what is new: ``present.<i>.key|value`` [B, heads, S, dim] in place of all of it.

Inside, keys and values behind ``past_key_values`` are joined to the past as before, and attention reads the whole; but the whole is no
output, so that nobody has to copy it back. Whoever runs the graph writes the S new columns behind its past.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.accessors import dtype_of, name_of

PAST, PRESENT = "past_key_values.", "present."
COLUMNS = 2
"""The axis of columns, of [B, heads, columns, dim]."""


def give_new_columns(graph: ir.Graph) -> bool:
    """Whether every ``present.*`` is its past and new columns, joined by a Concat; where one is not, the graph stays as it is."""
    pasts = {name_of(value).removeprefix(PAST): value for value in graph.inputs if name_of(value).startswith(PAST)}
    found = {name: _joined(graph, name, past) for name, past in pasts.items()}
    tokens = next((value.shape for value in graph.inputs if value.name == "input_ids"), None)
    if not found or tokens is None or not all(found.values()):
        return False
    for name, new in found.items():
        if new is not None:
            _put(graph, name, new, pasts[name], tokens)
    return True


def _joined(graph: ir.Graph, name: str, past: ir.Value) -> ir.Value | None:
    """The new columns of ``present.<name>``; None where it is anything but Concat(past, new)."""
    present = next((value for value in graph.outputs if value.name == PRESENT + name), None)
    node = None if present is None else present.producer()
    if node is None or node.op_type != "Concat" or node.domain or past.shape is None or len(past.shape) != 4:
        return None
    axis = node.attributes["axis"].as_int()
    if len(node.inputs) != 2 or node.inputs[0] is not past or axis not in (COLUMNS, COLUMNS - 4):
        return None
    new = node.inputs[1]
    # A value has one place among the outputs, and one that comes in, or is a constant, is no new column.
    return None if new is None or new.producer() is None or new in graph.outputs else new


def _put(graph: ir.Graph, name: str, new: ir.Value, past: ir.Value, tokens: ir.Shape) -> None:
    """``new`` becomes the output ``present.<name>``."""
    index = next(i for i, value in enumerate(graph.outputs) if value.name == PRESENT + name)
    whole, shape = graph.outputs[index], past.shape
    assert shape is not None
    graph.outputs[index] = new
    whole.name = f"{PRESENT}{name}.joined"
    new.name = PRESENT + name
    new.dtype = dtype_of(past)
    new.shape = ir.Shape([tokens[0], shape[1], tokens[1], shape[3]])
