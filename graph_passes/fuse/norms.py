"""RMS norms as one operator each.

    y = x / sqrt(mean(x^2, -1) + eps) * w

    Pow(x, 2) | Mul(x, x) -> ReduceMean(-1) -> Add eps -> Sqrt -> Reciprocal -> Mul x | Div(x, .) [-> Mul w]
    becomes    SimplifiedLayerNormalization(x, w or ones)

Only float32 is fused whole: in float16 transformers squares in float32 and rounds before it multiplies by w, which the operator does not;
there the Casts and the product with w stay around the norm.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graph_passes.accessors import input_of
from graph_passes.find.axes import constant_tensor

NORM = "SimplifiedLayerNormalization"
_ONES = "reft_fused.ones"


class FuseRmsNorms(ir.passes.InPlacePass):
    """See the module. A norm that is written out in another way stays as it is."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        fused = [_fuse(graph, node) for node in list(graph) if node.op_type == "ReduceMean"]
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=any(fused))


def _fuse(graph: ir.Graph, mean: ir.Node) -> bool:
    """Replaces the norm around ``mean``; False where it is none."""
    x = _squared(input_of(mean, 0).producer())
    width = None if x is None or x.shape is None else x.shape[-1]
    if x is None or x.dtype != ir.DataType.FLOAT or not isinstance(width, int) or not _over_last_axis(mean, x):
        return False
    shifted = _only_reader(mean.outputs[0], "Add")
    epsilon = None if shifted is None else _scalar(_other(shifted, mean.outputs[0]))
    root = None if shifted is None else _only_reader(shifted.outputs[0], "Sqrt")
    if epsilon is None or root is None:
        return False
    last = _normalized(x, root)
    if last is None:
        return False
    weight, scaled = _weight(last.outputs[0], width)
    if weight is None:
        weight = _ones(graph, width)
    else:
        last = scaled
    old = last.outputs[0]
    norm = ir.node(NORM, [x, weight], {"axis": -1, "epsilon": epsilon, "stash_type": 1}, name=f"{old.name}.norm")
    graph.insert_before(last, norm)
    _take_over(graph, old, norm.outputs[0])
    return True


def _squared(node: ir.Node | None) -> ir.Value | None:
    """x, where the node is x^2."""
    if node is None or node.op_type not in ("Pow", "Mul"):
        return None
    x, other = input_of(node, 0), input_of(node, 1)
    if node.op_type == "Mul":
        return x if x is other else None
    return x if _scalar(other) == 2 else None


def _over_last_axis(mean: ir.Node, x: ir.Value) -> bool:
    axes = constant_tensor(mean.inputs[1]) if len(mean.inputs) > 1 and mean.inputs[1] is not None else None
    rank = 0 if x.shape is None else len(x.shape)
    return axes is not None and axes.numpy().reshape(-1).tolist() in ([-1], [rank - 1]) and mean.attributes.get_int("keepdims", 1) == 1


def _normalized(x: ir.Value, root: ir.Node) -> ir.Node | None:
    """The node of x / root."""
    if (divided := _only_reader(root.outputs[0], "Div")) is not None:
        return divided if divided.inputs[0] is x and divided.inputs[1] is root.outputs[0] else None
    inverse = _only_reader(root.outputs[0], "Reciprocal")
    product = None if inverse is None else _only_reader(inverse.outputs[0], "Mul")
    if inverse is None or product is None:
        return None
    return product if _other(product, inverse.outputs[0]) is x else None


def _weight(normalized: ir.Value, width: int) -> tuple[ir.Value | None, ir.Node]:
    """(w [width], the node that multiplies by it); None where no such node is the only reader."""
    product = _only_reader(normalized, "Mul")
    weight = None if product is None else _other(product, normalized)
    node = normalized.producer()
    assert node is not None
    if product is None or weight is None or weight.dtype != ir.DataType.FLOAT or weight.shape is None or tuple(weight.shape) != (width,):
        return None, node
    return weight, product


def _ones(graph: ir.Graph, width: int) -> ir.Value:
    name = f"{_ONES}.{width}"
    if name not in graph.initializers:
        graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(np.ones(width, np.float32), name=name)))
    return graph.initializers[name]


def _only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    readers = {use.node for use in value.uses()}
    node = readers.pop() if len(readers) == 1 and not value.is_graph_output() else None
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The operand of a binary node beside ``value``."""
    first, second = node.inputs
    return second if first is value else first if second is value else None


def _scalar(value: ir.Value | None) -> float | None:
    tensor = None if value is None else constant_tensor(value)
    return float(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None


def _take_over(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """``new`` stands wherever ``old`` did, under its name, type and shape."""
    new.type, new.shape = old.type, old.shape
    name, old.name = old.name, f"{old.name}.unfused"
    new.name = name
    for node, index in list(old.uses()):
        node.replace_input_with(index, new)
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = new
