"""The constant matrices of a decoder: what it multiplies by, what it looks tokens up in, and which of the products is its head."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graph_passes.accessors import input_of, name_of, optional_input, shape_of

_ALIASES = ("Reshape", "Cast", "Unsqueeze", "Squeeze", "Identity")


def weight_products(graph: ir.Graph) -> list[ir.Node]:
    """Every MatMul with a constant 2-D weight, in graph order.

    The edit's own products are not among them: they stand in the model-local function, and their banks are graph inputs. Nor is a head
    that reads the embedding's table (``graph_passes.tied_head``).
    """
    return [
        node for node in graph if node.domain == "" and node.op_type == "MatMul" and constant_matrix(optional_input(node, 1)) is not None
    ]


def weight_name(product: ir.Node) -> str:
    return name_of(input_of(product, 1))


def constant_matrix(value: ir.Value | None) -> ir.TensorProtocol | None:
    if value is None or not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return None
    return value.const_value if len(value.const_value.shape) == 2 else None


def head_product(graph: ir.Graph, products: Sequence[ir.Node]) -> ir.Node | None:
    """The product with as many columns as there are logits: the last one, where several have."""
    logits = next((v for v in graph.outputs if v.name == "logits"), None)
    vocabulary = None if logits is None or logits.shape is None else logits.shape[-1]
    return next((node for node in reversed(products) if shape_of(input_of(node, 1))[1] == vocabulary), None)


def find_token_embedding(graph: ir.Graph) -> ir.Node | None:
    """The lookup of token ids in a table [V, D]: the Gather whose indices are input_ids themselves, reshaped at most."""
    for node in graph:
        if node.domain == "" and node.op_type == "Gather" and constant_matrix(node.inputs[0]) is not None:
            indices = node.inputs[1]
            while indices is not None and (producer := indices.producer()) is not None and producer.op_type in _ALIASES:
                indices = producer.inputs[0]
            if indices is not None and indices.name == "input_ids":
                return node
    return None
