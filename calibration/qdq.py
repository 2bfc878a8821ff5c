"""Explicit QuantizeLinear / DequantizeLinear pairs around matrix products: onnxruntime's static int8, and what TensorRT reads.

    static     x uint8 with a zero point,  W uint8 with zero point 128, one scale per output column
    qdq-int8   x int8,  W int8, one scale per output column, every zero point 0
    fp8        x E4M3,  W E4M3, one scale per output column
    qdq-int4   x float, W int4 in blocks along K (DequantizeLinear of opset 21)

Weights are symmetric: W' = scale q, scale[n] = max |W[:, n]| / 127 (448 for E4M3). onnxruntime multiplies uint8 by int8 with instructions
that saturate on x86 processors before VNNI, uint8 by uint8 never: hence 128 + q there, at 2.4 times the prefill and the same decode time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from calibration.activations import FLOAT8, LEVELS, STORED, ActivationQuantization, FixedKind, from_range
from calibration.weight_only import Blocks, unpack
from calibration.weights import QuantizedWeight, constant
from graph_passes.accessors import array_of, dtype_of, input_of, name_of, optional_input, producer_of
from runtimes.errors import CalibrationError

COLUMNS = 1
"""The axis of W [K, N] that has one scale per entry."""


def column_weight(name: str, array: np.ndarray, original: np.ndarray, kind: FixedKind) -> QuantizedWeight:
    """q, scales [N] and zero points [N] of W [K, N]; ``kind`` uint8, int8 or fp8."""
    top = LEVELS["fp8" if kind == "fp8" else "int8"][1]
    scales = np.abs(original).max(axis=0) / top
    scales = np.where(scales > 0, scales, 1.0).astype(array.dtype)
    scaled = original / scales.astype(np.float32)
    if kind == "fp8":
        q = np.clip(scaled, -top, top).astype(FLOAT8)
        restored = q.astype(np.float32)
    else:
        restored = np.clip(np.round(scaled), -top, top)
        q = (restored + 128).astype(np.uint8) if kind == "uint8" else restored.astype(np.int8)
    zero = np.full(scales.shape, 128 if kind == "uint8" else 0).astype(STORED[kind])
    suffix = "F8" if kind == "fp8" else "Q8"
    values = (constant(f"{name}_{suffix}", q), constant(f"{name}_scales", scales), constant(f"{name}_zero_points", zero))
    return QuantizedWeight(values=values, restored=restored * scales.astype(np.float32), shape=original.shape)


def block_weight(name: str, array: np.ndarray, block_size: int, blocks: Blocks) -> QuantizedWeight:
    """q int4 [K, N] and scales [K / block_size, N] of W [K, N], as MatMulNBits would have them."""
    rows, columns = array.shape
    if rows % block_size:
        raise CalibrationError(f"{name} has {rows} rows, no multiple of block size {block_size}, which TensorRT needs; use a smaller one")
    q = unpack(blocks.packed, 4).reshape(columns, rows).T.astype(np.int8) - 8
    scales = np.ascontiguousarray(blocks.scales.T).astype(array.dtype)
    restored = (q.reshape(-1, block_size, columns) * scales[:, None].astype(np.float32)).reshape(rows, columns)
    values = (constant(f"{name}_Q4", np.ascontiguousarray(q), ir.DataType.INT4), constant(f"{name}_scales", scales))
    return QuantizedWeight(values=values, restored=restored, shape=(rows, columns))


def restore_in_graph(graph: ir.Graph, before: ir.Node, weight: QuantizedWeight, block_size: int) -> ir.Value:
    """DequantizeLinear(q, scales[, zero points]) in front of ``before``; its output is W'."""
    attributes = {"axis": 0, "block_size": block_size} if block_size else {"axis": COLUMNS}
    name = weight.values[0].name
    node = ir.node("DequantizeLinear", list(weight.values), attributes, name=f"{name}_dequantize")
    _name_output(node, f"{name}_dequantized", dtype_of(weight.values[1]), ir.Shape(weight.shape))
    graph.insert_before(before, node)
    return node.outputs[0]


def quantize_in_graph(
    graph: ir.Graph, before: ir.Node, x: ir.Value, kind: FixedKind, bounds: tuple[float, float], dtype: ir.DataType
) -> ir.Value:
    """DequantizeLinear(QuantizeLinear(x)) in front of ``before``, with the scale that covers ``bounds``; its output is x'."""
    how = from_range(kind, *bounds, dtype.numpy(), name_of(x))
    zero = np.array(how.zero_point).astype(STORED[kind])
    scale = constant(f"{x.name}_scale", np.array(how.scale, np.float32).astype(dtype.numpy()))
    point = constant(f"{x.name}_zero_point", zero)
    for value in (scale, point):
        graph.register_initializer(value)
    down = ir.node("QuantizeLinear", [x, scale, point], name=f"{x.name}_quantize")
    _name_output(down, f"{x.name}_quantized", dtype_of(point), x.shape)
    up = ir.node("DequantizeLinear", [down.outputs[0], scale, point], name=f"{x.name}_dequantize")
    _name_output(up, f"{x.name}_dequantized", dtype, x.shape)
    graph.insert_before(before, [down, up])
    return up.outputs[0]


def _name_output(node: ir.Node, name: str, dtype: ir.DataType, shape: ir.Shape | None) -> None:
    output = node.outputs[0]
    output.name, output.type, output.shape = name, ir.TensorType(dtype), shape


def dequantize_node(node: ir.Node) -> np.ndarray:
    """W' [K, N] float32 of a DequantizeLinear with constant inputs."""
    q, scales = (array_of(input_of(node, index)).astype(np.float32) for index in (0, 1))
    if (zero_points := optional_input(node, 2)) is not None:
        q = q - array_of(zero_points).astype(np.float32)
    block_size = node.attributes.get_int("block_size", 0)
    if not block_size:
        return q * scales
    return (q.reshape(-1, block_size, q.shape[1]) * scales[:, None]).reshape(q.shape)


def activation_of(node: ir.Node) -> ActivationQuantization | None:
    """How the left operand of a MatMul is quantized; None where it is float."""
    up = input_of(node, 0).producer()
    if up is None or up.op_type != "DequantizeLinear" or (down := input_of(up, 0).producer()) is None:
        return None
    scale, point = (array_of(input_of(down, index)) for index in (1, 2))
    kind: FixedKind = next(name for name, dtype in STORED.items() if dtype == point.dtype)
    return ActivationQuantization(kind=kind, scale=float(scale), zero_point=int(point.astype(np.float32)))


def stored_input(node: ir.Node) -> ir.Value:
    """The quantized left operand of a MatMul: its integers, or for E4M3, which numpy cannot be handed, what they mean."""
    restored = input_of(node, 0)
    stored = input_of(producer_of(restored), 0)
    return restored if stored.dtype == ir.DataType.FLOAT8E4M3FN else stored


def weight_nodes(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node]]:
    """(MatMul, DequantizeLinear of its weight) in graph order."""
    for node in graph:
        if node.domain == "" and node.op_type == "MatMul":
            up = input_of(node, 1).producer()
            if up is not None and up.op_type == "DequantizeLinear" and input_of(up, 0).is_initializer():
                yield node, up


def float_inputs(graph: ir.Graph) -> None:
    """Takes the fixed quantization of activations out again: every product reads x in place of x'."""
    for up in [node for node in graph if node.op_type == "DequantizeLinear"]:
        down = input_of(up, 0).producer()
        if down is not None and down.op_type == "QuantizeLinear":
            up.outputs[0].replace_all_uses_with(input_of(down, 0))
