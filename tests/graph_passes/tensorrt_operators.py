"""The ONNX operators that TensorRT's parser takes, and of which types, by release: what of its lists our graphs use.

From docs/operators.md of onnx-tensorrt, at 10.1 and 10.15. The list of 10.3, JetPack 6.2's, was not at hand: it is not shorter than 10.1's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx
from onnx import TensorProto, inliner

FLOAT = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
INTEGER = {TensorProto.INT32, TensorProto.INT64}
BOOL = {TensorProto.BOOL}

_BY_TYPES = (
    (
        FLOAT,
        "Clip Cos CumSum Erf Exp Floor Gemm LayerNormalization Log MatMul QuantizeLinear Reciprocal Sigmoid Sin Softmax Softplus Sqrt Tanh",
    ),
    (FLOAT, "Pow Round"),
    (
        FLOAT | INTEGER,
        "Abs Add Div Equal Gelu Greater GreaterOrEqual IsNaN Less LessOrEqual Max Min Mod Mul Neg Pad Range ReduceMax ReduceMean",
    ),
    (FLOAT | INTEGER, "ReduceMin ReduceSum Relu ScatterElements ScatterND Sign Sub Sum TopK"),
    (
        FLOAT | INTEGER | BOOL,
        "Concat Constant ConstantOfShape Expand Flatten Gather GatherElements GatherND Identity Reshape Shape Size Slice",
    ),
    (FLOAT | INTEGER | BOOL, "Split Squeeze Tile Transpose Trilu Unsqueeze Where"),
    (FLOAT | INTEGER | BOOL | {TensorProto.UINT8}, "Cast CastLike"),
    ({TensorProto.INT8, TensorProto.FLOAT8E4M3FN, TensorProto.INT4}, "DequantizeLinear"),
    (BOOL, "And Not Or Xor"),
)
JETPACK_6: Mapping[str, set[int]] = {op: types for types, ops in _BY_TYPES for op in ops.split()}
NEWER: Mapping[str, set[int]] = JETPACK_6 | {"Pow": FLOAT | INTEGER, "RMSNormalization": FLOAT, "RotaryEmbedding": FLOAT}
RELEASES = {"10.1": JETPACK_6, "10.15": NEWER}


def lacking(model: onnx.ModelProto, operators: Mapping[str, set[int]]) -> Iterator[str]:
    """Nodes of the graph, functions expanded, that ``operators`` has not, or not of their first input's type."""
    model = onnx.shape_inference.infer_shapes(inliner.inline_local_functions(model))
    graph = model.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        if node.domain == "ai.reft":
            continue  # the plugin's
        if node.op_type not in operators:
            yield f"{node.op_type} ({node.name})"
            continue
        read = [types.get(name, 0) for name in node.input[:1]] or [types.get(node.output[0], 0)]
        # Of a choice the values count, not the condition.
        read = [types.get(node.input[1], 0)] if node.op_type == "Where" else read
        if unknown := [name for name, type_ in zip(node.input, read, strict=False) if not type_]:
            yield f"{node.op_type} ({node.name}): {unknown[0]} is of no known type"
        elif not set(read) <= operators[node.op_type]:
            yield f"{node.op_type} of {', '.join(TensorProto.DataType.Name(t) for t in read)} ({node.name})"
