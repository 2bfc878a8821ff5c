"""Logits of a step's last columns only: the hidden states are cut before the head multiplies them by the vocabulary.

    logits[:, 0] .. are those of column reft.first_logit and of all behind it; by default, [0], of every column

A prompt of 512 tokens needs one column of logits. The other 511 are 100 MB at a vocabulary of 49,152; without them its prefill takes 0.82
(float32) or 0.87 (int4) of the processor time, and the last column is the same to the bit (SmolLM2-135M, onnxruntime, one thread).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graph_passes.accessors import input_of
from graph_passes.slots.rule import add_overridable
from runtimes.edits.op import FIRST_LOGIT

COLUMNS = "logits_columns"
"""The dimension of the logits' columns, which may be fewer than the tokens."""
_UNARY = ("Cast", "Identity", "Tanh")
_BINARY = ("Add", "Div", "Mul", "Sub")
_PRODUCTS = ("FusedMatMul", "MatMul", "MatMulNBits")
_CUTS = ("Gather", "GatherElements", "GatherND", "Slice")
"""What stands before the head of a graph that gives the last logits only."""
_TO_THE_END = np.iinfo(np.int64).max


def add_first_logit(graph: ir.Graph) -> bool:
    """Adds ``reft.first_logit`` and a Slice of the hidden states [B, S, D] by it, in place; returns whether the graph shows where.

    The head is found from ``logits`` back, over what acts on every logit alone (a soft cap, a scale, a bias, a cast), to the product of
    the hidden states and a weight. A graph of another form, one that gives the last logits only, and a classifier stay as they are.
    """
    found = _head(graph)
    if found is None:
        return False
    head, behind = found
    hidden = input_of(head, 0)
    first = add_overridable(graph, FIRST_LOGIT, [1], np.array([0], np.int64))
    end, axis = (ir.node("Constant", [], {"value": ir.tensor(np.array([number], np.int64))}) for number in (_TO_THE_END, 1))
    cut = ir.node("Slice", [hidden, first, end.outputs[0], axis.outputs[0]])
    for node, name in ((end, "end"), (axis, "axis"), (cut, "hidden")):
        node.name = node.outputs[0].name = f"{FIRST_LOGIT}.{name}"
    cut.outputs[0].type = hidden.type
    cut.outputs[0].shape = None if hidden.shape is None else hidden.shape.copy()
    graph.insert_before(head, [end, axis, cut])
    head.replace_input_with(0, cut.outputs[0])
    for value in (cut.outputs[0], *behind):
        if value.shape is not None:
            value.shape = ir.Shape([COLUMNS if axis == 1 else dim for axis, dim in enumerate(value.shape)])
    return True


def remove_first_logit(graph: ir.Graph) -> None:
    """The inverse, in place: what read the cut hidden states reads all of them."""
    for node in [node for node in graph if node.name == f"{FIRST_LOGIT}.hidden"]:
        ir.convenience.replace_all_uses_with(node.outputs[0], input_of(node, 0))
        graph.remove(node, safe=True)


def _head(graph: ir.Graph) -> tuple[ir.Node, list[ir.Value]] | None:
    """The product that gives the logits [B, S, V], and the values from its output to the logits."""
    logits = next((value for value in graph.outputs if value.name == "logits"), None)
    if logits is None or logits.shape is None or len(logits.shape) != 3 or logits.shape[1] == 1:
        return None
    value, behind = logits, []
    while (node := value.producer()) is not None:
        behind.append(value)
        if node.op_type in _PRODUCTS:
            hidden = input_of(node, 0)
            cut = (producer := hidden.producer()) is not None and producer.op_type in _CUTS
            return (node, behind) if not cut and _is_weight(input_of(node, 1)) and not _is_weight(hidden) else None
        varying = [each for each in node.inputs if each is not None and not _is_weight(each)]
        alone = all(_acts_alone(each) for each in node.inputs if each is not None and each not in varying)
        if node.op_type not in (*_UNARY, *_BINARY) or len(varying) != 1 or not alone:
            return None
        value = varying[0]
    return None


def _is_weight(value: ir.Value) -> bool:
    """Whether ``value`` follows from initializers and constants alone."""
    seen, pending = {value}, [value]
    while pending:
        each = pending.pop()
        node = each.producer()
        if node is None and not each.is_initializer():
            return False
        behind = {each for each in (() if node is None else node.inputs) if each is not None} - seen
        seen |= behind
        pending += behind
    return True


def _acts_alone(value: ir.Value) -> bool:
    """Whether a constant does the same to every column: a number, or one for every token of the vocabulary."""
    tensor = value.const_value
    if (node := value.producer()) is not None and node.op_type == "Constant":
        tensor = ir.convenience.get_const_tensor(value)
    shape = value.shape if tensor is None else tensor.shape
    return shape is not None and len(shape) <= 3 and all(dim == 1 for dim in list(shape)[:-1])
