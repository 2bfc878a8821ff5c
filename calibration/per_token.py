"""Dynamic int8: every token's input is quantized by its own largest value as it runs, weights per output column.

    s[t] = max |x[t]| / 127;   q[t] = round(127 x[t] / max |x[t]|);   y[t, n] = s[t] scale[n] sum_k q[t, k] q_w[k, n]

onnxruntime's own dynamic quantization (DynamicQuantizeLinear) has one scale for the whole call: what a prompt is answered then depends
on the prompts, the pads and the chunk that share the call with it, and no reference could hold it. A scale per token depends on the
token alone, whatever it is batched with. q is stored as uint8 around 128, which onnxruntime's x86 kernels multiply without saturation.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from calibration.activations import TOKEN_OFFSET
from calibration.qdq import restore_in_graph
from calibration.weight_only import replace_node
from calibration.weights import QuantizedWeight, constant
from graph_passes.accessors import array_of, input_of, producer_of, shape_of

SMALLEST = np.finfo(np.float32).tiny
"""max |x| of a token that is all zeros, in place of 0."""
CONSTANTS = {
    "reft.token.smallest": np.array(SMALLEST, np.float32),
    "reft.token.levels": np.array(127, np.float32),
    "reft.token.offset": np.array(TOKEN_OFFSET, np.float32),
    "reft.token.zero_point": np.array(TOKEN_OFFSET, np.uint8),
    "reft.token.axis": np.array([-1], np.int64),
}


def quantize_tokens(graph: ir.Graph, before: ir.Node, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(q uint8 [.., K], s float32 [.., 1]) of x [.., K], computed in front of ``before``."""
    shared = {name: _shared(graph, name) for name in CONSTANTS}
    smallest, levels, offset, axis = (shared[f"reft.token.{n}"] for n in ("smallest", "levels", "offset", "axis"))

    def add(op: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(op, list(inputs), attributes)
        graph.insert_before(before, node)
        output = node.outputs[0]
        output.name = node.name = f"{x.name}.token.{op.lower()}"
        return output

    largest = add("Max", add("ReduceMax", add("Abs", x), axis, keepdims=1), smallest)
    rounded = add("Round", add("Mul", x, _named(add("Div", levels, largest), "inverse")))
    q = add("Cast", add("Add", rounded, offset), to=int(ir.DataType.UINT8))
    scale = _named(add("Div", largest, levels), "scale")
    q.type, scale.type = ir.TensorType(ir.DataType.UINT8), ir.TensorType(ir.DataType.FLOAT)
    return q, scale


def to_matmul_integer(graph: ir.Graph, node: ir.Node, weight: QuantizedWeight, tokens: tuple[ir.Value, ir.Value]) -> None:
    """MatMul(x, W) becomes MatMulInteger(q, q_w), times the scales of the columns, times those of the tokens."""
    q, scale = tokens
    packed, scales, zero_points = weight.values
    product = ir.node("MatMulInteger", [q, packed, _shared(graph, "reft.token.zero_point"), zero_points], name=f"{node.name}_integer")
    as_float = ir.node("Cast", [product.outputs[0]], {"to": int(ir.DataType.FLOAT)}, name=f"{node.name}_float")
    by_column = ir.node("Mul", [as_float.outputs[0], scales], name=f"{node.name}_columns")
    by_token = ir.node("Mul", [by_column.outputs[0], scale], name=f"{node.name}_tokens")
    for inner in (product, as_float, by_column):
        inner.outputs[0].name = inner.name
    replace_node(graph, node, product, as_float, by_column, by_token)


def integer_products(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in graph:
        if node.domain == "" and node.op_type == "MatMulInteger":
            yield node


def dequantize_integer(node: ir.Node) -> np.ndarray:
    """W' [K, N] float32 of a MatMulInteger written by ``to_matmul_integer``."""
    q, zero_points = (array_of(input_of(node, index)).astype(np.float32) for index in (1, 3))
    return (q - zero_points) * array_of(_column_scales(node))


def tokens_of(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """(q, s) that a MatMulInteger and the product by tokens behind it read."""
    return input_of(node, 0), input_of(_next(_next(_next(node))), 1)


def float_inputs(graph: ir.Graph) -> None:
    """Takes the quantization of tokens out again: every product is MatMul(x, DequantizeLinear(q_w))."""
    for node in list(integer_products(graph)):
        by_column = _next(_next(node))
        last = _next(by_column)
        x = _input_of(node)
        q = input_of(node, 1)
        rows, columns = shape_of(q)
        values = (q, _column_scales(node), input_of(node, 3))
        restored = restore_in_graph(graph, node, QuantizedWeight(values=values, restored=np.empty(0), shape=(rows, columns)), 0)
        product = ir.node("MatMul", [x, restored], name=f"{node.name}_restored")
        replace_node(graph, last, product)


def _input_of(node: ir.Node) -> ir.Value:
    """x of q = Cast(Add(Round(Mul(x, inverse)), 128))."""
    value = input_of(node, 0)
    for _ in ("Cast", "Add", "Round", "Mul"):
        value = input_of(producer_of(value), 0)
    return value


def _column_scales(node: ir.Node) -> ir.Value:
    return input_of(_next(_next(node)), 1)


def _next(node: ir.Node) -> ir.Node:
    return node.outputs[0].consumers()[0]


def _shared(graph: ir.Graph, name: str) -> ir.Value:
    if name not in graph.initializers:
        graph.register_initializer(constant(name, CONSTANTS[name]))
    return graph.initializers[name]


def _named(value: ir.Value, suffix: str) -> ir.Value:
    value.name = producer_of(value).name = f"{value.name}.{suffix}"
    return value
