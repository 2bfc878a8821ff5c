"""Inputs of a graph whose numbers, not only whose shapes, decide the shapes of what it computes.

TensorRT wants the numbers of such an input on the host, before the step; a session binds the device's memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from graph_passes.accessors import name_of

SHAPING = {
    **dict.fromkeys(("Reshape", "Expand", "Tile", "Unsqueeze", "Squeeze", "TopK", "Split"), (1,)),
    "ConstantOfShape": (0,),
    "Range": (0, 1, 2),
    "Slice": (1, 2, 3, 4),
    "Pad": (1, 3),
    "Resize": (1, 2, 3),
    "OneHot": (1,),
}
"""Inputs of operators, by position, whose numbers decide the output's shape."""
SHAPE_ONLY = ("Shape", "Size")
"""Of what they are given these read the shape alone."""


@dataclass(frozen=True, kw_only=True)
class ShapeInput:
    name: str
    node: ir.Node
    """The operator whose output's shape it decides."""


def shape_inputs(graph: ir.Graph) -> list[ShapeInput]:
    """Each input that reaches a shape by its numbers, with the first operator that it reaches."""
    found: dict[str, ShapeInput] = {}
    inputs = set(graph.inputs)
    for node in graph.all_nodes():
        for position in SHAPING.get(node.op_type, ()):
            value = node.inputs[position] if position < len(node.inputs) else None
            for source in _read_from(value, inputs):
                found.setdefault(name_of(source), ShapeInput(name=name_of(source), node=node))
    return list(found.values())


def _read_from(value: ir.Value | None, inputs: set[ir.Value]) -> Iterator[ir.Value]:
    """The graph inputs whose numbers ``value`` is computed from."""
    todo, seen = [value], set()
    while todo:
        value = todo.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        if value in inputs and not value.is_initializer():
            yield value
        node = value.producer()
        if node is not None and node.op_type not in SHAPE_ONLY:
            todo += node.inputs
