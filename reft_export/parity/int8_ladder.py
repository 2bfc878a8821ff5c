"""onnxruntime's products by weights of 8 bits, one at a time, against float64: are the stored integers read as they were written?"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from calibration.products import int8_products
from calibration.weight_only import CONTRIB, dequantize_nbits
from graph_passes.accessors import array_of, int_of
from graph_passes.external import load_graph
from runtimes.artifacts.bundle import Bundle
from runtimes.parity.figures import BUDGETS, Figures, Rung, judge


def int8_rungs(bundle: Bundle) -> list[Rung]:
    """y = x W of every MatMulNBits of 8 bits at accuracy level 1, x [1, K] normal values: one rung, of the worst; none without any.

    The errors are relative to the largest |y| of a product.
    """
    nodes = int8_products(load_graph(bundle.graph_path).graph)
    generator = np.random.default_rng(0)
    worst = (0.0, 0.0)
    for node in nodes:
        x = generator.standard_normal((1, int_of(node, "K"))).astype(np.float32)
        expected = x.astype(np.float64) @ dequantize_nbits(node)
        error = float(np.abs(_product(node, x) - expected).max())
        worst = max(worst, (error / float(np.abs(expected).max()), error))
    if not nodes:
        return []
    figures = Figures(compared=len(nodes), max_abs=worst[1], max_relative=worst[0], kl=None, top1=None)
    note = f"{len(nodes)} products alone, values of y, not logits"
    return [judge("int8 products", "float64", figures, BUDGETS["weight-only int8"], note=note)]


def _product(node: ir.Node, x: np.ndarray) -> np.ndarray:
    """The operator alone, in onnxruntime, at accuracy level 1."""
    import onnxruntime as ort

    float32 = ir.TensorType(ir.DataType.FLOAT)
    read = ir.Value(name="x", shape=ir.Shape(x.shape), type=float32)
    weights = [None if value is None else _constant(f"stored{i}", array_of(value)) for i, value in enumerate(node.inputs[1:])]
    op = ir.node(node.op_type, [read, *weights], {name: a.value for name, a in node.attributes.items()}, domain=CONTRIB)
    op.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    y = op.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape([1, int_of(node, "N")]), float32
    initializers = [value for value in weights if value is not None]
    graph = ir.Graph([read], [y], nodes=[op], initializers=initializers, opset_imports={"": 20, CONTRIB: 1}, name="product")
    proto = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = ort.InferenceSession(proto, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def _constant(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
