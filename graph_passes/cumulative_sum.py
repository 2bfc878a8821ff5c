"""Cumulative sums of whole numbers as products with a triangle of ones.

    CumSum(x)[.., j] = sum_i x[.., i] (i <= j)

TensorRT's own layer for it came with 10.8, and no release lists it for INT64: before, its parser makes a loop of floating-point sums.
The product is in float32, exact up to 2^24, and costs [S, S] values once a step.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graph_passes.accessors import input_of


def replace_cumulative_sums(graph: ir.Graph) -> None:
    """Replaces, in place, every inclusive CumSum of whole numbers along the last axis; others stay as they are."""
    for node in [node for node in graph if node.op_type == "CumSum" and _is_plain(node)]:
        nodes = _Product(node).nodes
        graph.insert_before(node, nodes)
        node.outputs[0].replace_all_uses_with(nodes[-1].outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _is_plain(node: ir.Node) -> bool:
    x, axis = input_of(node, 0), ir.convenience.get_const_tensor(input_of(node, 1))
    if x.dtype is not None and not x.dtype.is_integer():
        return False
    if node.attributes.get_int("exclusive", 0) or node.attributes.get_int("reverse", 0) or axis is None:
        return False
    rank = 2 if x.shape is None else len(x.shape)
    return int(axis.numpy().reshape(())) in (-1, rank - 1)


class _Product:
    def __init__(self, node: ir.Node) -> None:
        self.nodes: list[ir.Node] = []
        self._prefix = node.name or node.outputs[0].name or "cumsum"
        x = input_of(node, 0)
        dtype = ir.DataType.INT32 if x.dtype == ir.DataType.INT32 else ir.DataType.INT64
        zero, one = self._constant(0), self._constant(1)
        count = self._add("Squeeze", self._add("Shape", x, start=-1), self._constant([0]))
        places = self._add("Range", zero, count, one)
        ones = self._add(
            "LessOrEqual", self._add("Unsqueeze", places, self._constant([1])), self._add("Unsqueeze", places, self._constant([0]))
        )
        sums = self._add("MatMul", self._float32(x), self._float32(ones))
        self._add("Cast", sums, to=int(dtype))

    def _float32(self, value: ir.Value) -> ir.Value:
        return self._add("Cast", value, to=int(ir.DataType.FLOAT))

    def _constant(self, value: int | list[int]) -> ir.Value:
        return self._add("Constant", value=ir.tensor(np.array(value, np.int64)))

    def _add(self, op: str, *inputs: ir.Value, **attributes: int | ir.TensorProtocol) -> ir.Value:
        node = ir.node(op, list(inputs), attributes, name=f"{self._prefix}.{op.lower()}_{len(self.nodes)}")
        node.outputs[0].name = node.name
        self.nodes.append(node)
        return node.outputs[0]
