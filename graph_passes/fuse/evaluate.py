"""What small parts of a graph compute on given numbers, by onnx's reference evaluator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

MOST_NODES = 200
"""A rotary embedding takes a tenth of that, its positions included."""
_SUBGRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def evaluate(graph: ir.Graph, values: Sequence[ir.Value], given: Mapping[ir.Value, np.ndarray]) -> list[np.ndarray] | None:
    """``values`` where those of ``given`` hold these arrays; None where they depend on more than that and on constants."""
    nodes = _between(graph, values, given)
    if nodes is None:
        return None
    copies = {value: ir.Value(name=f"given.{i}", type=value.type) for i, value in enumerate(given)}
    inputs, constants = list(copies.values()), []

    def copied(value: ir.Value | None) -> ir.Value | None:
        if value is not None and value not in copies:
            copies[value] = ir.Value(name=f"constant.{len(copies)}", type=value.type, const_value=value.const_value)
            constants.append(copies[value])
        return None if value is None else copies[value]

    made = []
    for i, node in enumerate(nodes):
        outputs = [ir.Value(name=f"value.{i}.{j}") for j in range(len(node.outputs))]
        made.append(ir.Node("", node.op_type, [copied(value) for value in node.inputs], node.attributes.values(), outputs=outputs))
        copies.update(zip(node.outputs, outputs, strict=True))
    wanted = [ir.node("Identity", [copied(value)]) for value in values]
    for i, node in enumerate(wanted):
        node.outputs[0].name = f"wanted.{i}"
    outputs = [node.outputs[0] for node in wanted]
    part = ir.Graph(inputs, outputs, nodes=[*made, *wanted], initializers=constants, opset_imports=graph.opset_imports, name="part")
    feeds = {f"given.{i}": array for i, array in enumerate(given.values())}
    return [np.asarray(array) for array in ReferenceEvaluator(ir.to_proto(ir.Model(part, ir_version=10))).run(None, feeds)]


def _between(graph: ir.Graph, values: Sequence[ir.Value], given: Mapping[ir.Value, np.ndarray]) -> list[ir.Node] | None:
    """The nodes from ``given`` to ``values``, in the graph's order."""
    found: set[ir.Node] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if value in given or node in found or value.is_initializer():
            continue
        if node is None or node.domain != "" or any(a.type in _SUBGRAPHS for a in node.attributes.values()) or len(found) == MOST_NODES:
            return None
        found.add(node)
        waiting += [value for value in node.inputs if value is not None]
    return [node for node in graph if node in found]
