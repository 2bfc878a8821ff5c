"""A head that is tied to the embedding reads the embedding's own table, so that a graph stores it once.

    y = x T^T     x [B, S, D], T [V, D] the table that token ids are looked up in, y [B, S, V]

    fused        FusedMatMul(x, T, transB = 1)      of onnxruntime, which is named after the weight that it stands for
    transposed   MatMul(x, Transpose(T))            of ONNX alone; the Transpose's output has the weight's name

Of SmolLM2 in float32 (one thread, onnxruntime 1.31): either form and a head of its own take 549 MB of memory that is the process's own; the
fused one keeps another 108 MB of the file mapped. Without onnxruntime's optimizer the Transpose is computed at every step, and a step takes
117 ms in place of 42. Gemm with two Reshapes is as fast as the fused form and more nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graph_passes.accessors import array_of, input_of, name_of, tensor_of
from graph_passes.external import unmap
from graph_passes.find.weights import constant_matrix, find_token_embedding, head_product, weight_name, weight_products

CONTRIB = "com.microsoft"
_COMPARED_AT_ONCE = 8192
"""Rows of the table, so that comparing takes little memory."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TiedHead:
    """``node``: the product; ``table``: the initializer [V, D] that it shares with the lookup; ``name``: the weight's [D, V] of its own."""

    node: ir.Node
    table: ir.Value
    name: str


def tied_head(graph: ir.Graph) -> TiedHead | None:
    """The head that reads the embedding's table, in either form; None where the graph has none."""
    lookup = find_token_embedding(graph)
    if lookup is None:
        return None
    table = input_of(lookup, 0)
    for use in table.uses():
        node = use.node
        if use.idx == 1 and node.op_type == "FusedMatMul" and node.domain == CONTRIB and _is_plain(node):
            return TiedHead(node=node, table=table, name=node.name or f"{table.name}.transposed")
        if node.op_type == "Transpose" and node.domain == "" and list(node.attributes.get_ints("perm", [1, 0])) == [1, 0]:
            readers = [each for each in node.outputs[0].uses() if each.idx == 1 and each.node.op_type == "MatMul"]
            if len(readers) == 1 and len(node.outputs[0].uses()) == 1:
                return TiedHead(node=readers[0].node, table=table, name=name_of(node.outputs[0]))
    return None


def _is_plain(node: ir.Node) -> bool:
    """Whether a FusedMatMul multiplies by the transposed weight and does nothing else."""
    others = ("transA", "transBatchA", "transBatchB")
    scaled = (alpha := node.attributes.get("alpha")) is not None and alpha.as_float() != 1.0
    return node.attributes.get_int("transB", 0) == 1 and not scaled and not any(node.attributes.get_int(name, 0) for name in others)


def tie_head(model: ir.Model, *, fused: bool) -> str | None:
    """Lets a head whose weight [D, V] is the embedding's table [V, D], value by value, read that; in place.

    Returns the name of the weight, which is stored no more; None where the graph has no such head, and stays as it is.
    """
    graph = model.graph
    lookup, head = find_token_embedding(graph), head_product(graph, weight_products(graph))
    if lookup is None or head is None or not same_table(input_of(lookup, 0), input_of(head, 1)):
        return None
    table, weight, name = input_of(lookup, 0), input_of(head, 1), weight_name(head)
    del graph.initializers[name]
    if fused:
        node = ir.node("FusedMatMul", [input_of(head, 0), table], {"transB": 1}, domain=CONTRIB, name=name)
        _replace(graph, head, node)
        model.opset_imports.setdefault(CONTRIB, 1)
    else:
        transposed = ir.node("Transpose", [table], {"perm": [1, 0]}, name=f"{name}.transpose")
        _name_output(transposed, name, weight)
        graph.insert_before(head, transposed)
        head.replace_input_with(1, transposed.outputs[0])
    return name


def untie_head(graph: ir.Graph) -> str | None:
    """The inverse, in place: the head is a MatMul by an initializer [D, V] again, which is made of the table when it is read.

    Returns its name; None of a graph whose head is not tied.
    """
    found = tied_head(graph)
    if found is None:
        return None
    node, table = found.node, found.table
    stored = tensor_of(table)
    rows, columns = (int(size) for size in stored.shape.numpy())
    transpose = input_of(node, 1).producer()
    tensor = ir.LazyTensor(
        lambda: ir.tensor(array_of(table).T, dtype=stored.dtype), dtype=stored.dtype, shape=ir.Shape([columns, rows]), name=found.name
    )
    weight = ir.Value(name=found.name, const_value=tensor, shape=ir.Shape([columns, rows]), type=ir.TensorType(stored.dtype))
    product = ir.node("MatMul", [input_of(node, 0), weight], name=f"{found.name}.product" if transpose is None else node.name)
    _replace(graph, node, product)
    if transpose is not None:
        graph.remove(transpose, safe=True)
    graph.register_initializer(weight)
    return found.name


def write_out(graph: ir.Graph) -> None:
    """Takes a tied head from the fused form to ONNX's own operators, in place."""
    found = tied_head(graph)
    if found is None or found.node.op_type != "FusedMatMul":
        return
    rows, columns = (int(size) for size in tensor_of(found.table).shape.numpy())
    transposed = ir.node("Transpose", [found.table], {"perm": [1, 0]}, name=f"{found.name}.transpose")
    output = transposed.outputs[0]
    output.name, output.shape = found.name, ir.Shape([columns, rows])
    output.type = ir.TensorType(tensor_of(found.table).dtype)
    _replace(graph, found.node, transposed, ir.node("MatMul", [input_of(found.node, 0), output], name=f"{found.name}.product"))


def same_table(table: ir.Value, weight: ir.Value) -> bool:
    """Whether ``weight`` [D, V] is ``table`` [V, D] transposed, value by value, and read by one product alone."""
    if constant_matrix(table) is None or constant_matrix(weight) is None or len(weight.uses()) != 1:
        return False
    one, other = tensor_of(table), tensor_of(weight)
    if one.dtype != other.dtype or tuple(one.shape.numpy()) != tuple(reversed(other.shape.numpy())):
        return False
    equal = _equal(array_of(table), array_of(weight).T)
    unmap(table)
    unmap(weight)
    return equal


def _equal(rows: np.ndarray, columns: np.ndarray) -> bool:
    step = _COMPARED_AT_ONCE
    return all(np.array_equal(rows[start : start + step], columns[start : start + step]) for start in range(0, len(rows), step))


def _replace(graph: ir.Graph, node: ir.Node, *new: ir.Node) -> None:
    """Puts ``new`` in the node's place; the last one's output takes the name, type and shape of the node's."""
    old, output = node.outputs[0], new[-1].outputs[0]
    output.name, output.type, output.shape = old.name, old.type, old.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], list(new), [old], [output])


def _name_output(node: ir.Node, name: str, like: ir.Value) -> None:
    output = node.outputs[0]
    output.name, output.type, output.shape = name, ir.TensorType(tensor_of(like).dtype), ir.Shape(tensor_of(like).shape.numpy())
