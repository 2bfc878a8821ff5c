"""ONNX Runtime's fused residual Add + norm, and how to take it apart again."""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.accessors import describe
from runtimes.errors import GraphError

SKIP_NORMS = {"SkipSimplifiedLayerNormalization": "SimplifiedLayerNormalization", "SkipLayerNormalization": "LayerNormalization"}
"""The fused ops, and the norm that is left of each when its Add is taken out."""
SKIP_NORM_SUM = 3
"""The output that carries input + skip + bias; output 0 is the norm of it, 1 and 2 are statistics for training."""
SKIP_NORM_BIAS = {"SkipSimplifiedLayerNormalization": 3, "SkipLayerNormalization": 4}
"""Index of the optional bias input."""
_BETA = 3
_DEFAULT_EPSILON = 1e-12  # of both fused ops, not 1e-5 as in ONNX's own LayerNormalization


def written_sum(node: ir.Node) -> ir.Value:
    """Output 3 of a fused node; where the node leaves it out, it gets one, named after output 0."""
    if len(node.outputs) <= SKIP_NORM_SUM:
        node.resize_outputs(SKIP_NORM_SUM + 1)
    for value in node.outputs:
        # An optional output that is left out has the empty name; onnx-ir cannot write out None.
        value.name = value.name or ""
    total = node.outputs[SKIP_NORM_SUM]
    if not total.name:
        total.name = f"{node.outputs[0].name}.sum"
        total.type, total.shape = node.outputs[0].type, node.outputs[0].shape
    return total


def split_skip_norm(node: ir.Node) -> ir.Value:
    """Replaces the fused node by Add [+ Add of the bias] -> norm, in its place, and returns the sum.

        (norm(x + skip + bias), .., x + skip + bias) = Skip*LayerNormalization(x, skip, gamma, [beta], [bias])

    Names of the fused node's outputs stay with the values that replace them. In float16 the fused op norms the float32 sum and the
    split norms the rounded one; the difference is one rounding of the sum.
    """
    graph = node.graph
    assert graph is not None
    inputs = [*node.inputs, *[None] * (5 - len(node.inputs))]
    bias = inputs[SKIP_NORM_BIAS[node.op_type]]
    beta = inputs[_BETA] if node.op_type == "SkipLayerNormalization" else None
    normed = node.outputs[0]
    old_sum = node.outputs[SKIP_NORM_SUM] if len(node.outputs) > SKIP_NORM_SUM else None
    prefix = node.name or normed.name

    adds = [ir.node("Add", [inputs[0], inputs[1]], name=f"{prefix}.add")]
    if bias is not None:
        adds.append(ir.node("Add", [adds[0].outputs[0], bias], name=f"{prefix}.add_bias"))
    total = adds[-1].outputs[0]
    epsilon = node.attributes.get_float("epsilon", _DEFAULT_EPSILON)
    attributes: dict[str, int | float] = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
    norm = ir.node(SKIP_NORMS[node.op_type], [total, inputs[2], *([beta] if beta is not None else [])], attributes, name=f"{prefix}.norm")
    for add in adds:
        add.outputs[0].name = f"{add.name}.sum"
    for value in (*(add.outputs[0] for add in adds), norm.outputs[0]):
        value.type = normed.type
        value.shape = normed.shape

    graph.insert_before(node, [*adds, norm])
    _take_over(normed, norm.outputs[0])
    if old_sum is not None:
        _take_over(old_sum, total)
    graph.remove(node, safe=True)
    return total


def refuse_training_norm(node: ir.Node) -> None:
    """Raises GraphError where training statistics (outputs 1, 2) are read, which ``split_skip_norm`` does not compute."""
    for value in node.outputs[1:SKIP_NORM_SUM]:
        if value.uses() or value.is_graph_output():
            raise GraphError(
                f"{describe(node)} also computes training statistics that the graph reads ({value.name!r}); export the model for inference"
            )


def _take_over(old: ir.Value, new: ir.Value) -> None:
    name = old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name = None
    if name:
        new.name = name
