"""What a quantized graph multiplies by, read back from the graph itself: the reference for parity, and what a refit trains on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from calibration import per_token, qdq
from calibration.activations import ActivationQuantization
from calibration.tables import dequantize_embedding
from calibration.weight_only import CONTRIB, dequantize_nbits
from graph_passes.accessors import input_of, int_of, name_of
from graph_passes.external import unmap

MOST_UNPACKED = 2**29
"""Bytes of float32 matrices that ``unpack_int8`` puts into a graph: they are stored in its file, which may have 2 GiB."""
_SUFFIXES = ("_Q4", "_Q8", "_F8", "_G4", "_G8")


def dequantized_weights(model: ir.Model) -> Iterator[tuple[str, np.ndarray]]:
    """(name of the initializer that was quantized, its dequantized float32 value), one at a time; products [K, N], lookups [V, D]."""
    seen = set()
    for node, stored in _quantized_nodes(model.graph):
        if stored.name in seen:
            continue
        seen.add(stored.name)
        restored = _RESTORE[node.op_type](node)
        for value in node.inputs:
            unmap(value)
        yield _original_name(stored), restored


def activation_quantization(model: ir.Model) -> dict[str, ActivationQuantization]:
    """How the input of every product is quantized, by the name of its weight; products with float inputs are not listed."""
    found: dict[str, ActivationQuantization] = {}
    for node in model.graph:
        if node.domain == CONTRIB and node.op_type == "MatMulNBits" and node.attributes.get_int("accuracy_level", 0) == 4:
            block = ActivationQuantization(kind="block", block_size=int_of(node, "block_size"))
            found[_original_name(input_of(node, 1))] = block
    for node in per_token.integer_products(model.graph):
        found[_original_name(input_of(node, 1))] = ActivationQuantization(kind="token")
    for node, up in qdq.weight_nodes(model.graph):
        if (how := qdq.activation_of(node)) is not None:
            found[_original_name(input_of(up, 0))] = how
    return found


def stored_activations(model: ir.Model) -> dict[str, ActivationQuantization]:
    """Of ``activation_quantization`` those whose integers are values of the graph; what MatMulNBits rounds inside is not seen."""
    return {name: how for name, how in activation_quantization(model).items() if how.kind != "block"}


def quantized_inputs(model: ir.Model) -> dict[str, tuple[str, ...]]:
    """By the name of the weight, the values from which ``ActivationQuantization.restore`` makes x'; MatMulNBits keeps its own inside."""
    return {name: tuple(map(name_of, values)) for name, values in _stored_inputs(model.graph)}


def expose_quantized_inputs(model: ir.Model) -> None:
    """Makes every such value a graph output, in place; what MatMulNBits would round inside, it reads as it is."""
    _float_inside(model)
    exposed = {value.name for value in model.graph.outputs}
    for value in [value for _, values in _stored_inputs(model.graph) for value in values]:
        if value.name not in exposed:
            exposed.add(value.name)
            model.graph.outputs.append(value)


def _stored_inputs(graph: ir.Graph) -> Iterator[tuple[str, tuple[ir.Value, ...]]]:
    for node in per_token.integer_products(graph):
        yield _original_name(input_of(node, 1)), per_token.tokens_of(node)
    for node, up in qdq.weight_nodes(graph):
        if qdq.activation_of(node) is not None:
            yield _original_name(input_of(up, 0)), (qdq.stored_input(node),)


def float_activations(model: ir.Model) -> None:
    """Takes every quantization of activations out of the graph, in place; the weights stay as they ship."""
    _float_inside(model)
    per_token.float_inputs(model.graph)
    qdq.float_inputs(model.graph)
    RemoveUnusedNodesPass()(model)


def int8_products(graph: ir.Graph) -> list[ir.Node]:
    """Every MatMulNBits with weights of 8 bits."""
    return [n for n in graph if n.domain == CONTRIB and n.op_type == "MatMulNBits" and n.attributes.get_int("bits", 4) == 8]


def unpack_int8(model: ir.Model, most: int = MOST_UNPACKED) -> bool:
    """Multiplies by the float32 matrices that the weights of ``int8_products`` are, in place; not where those are more than ``most`` bytes.

    onnxruntime 1.31 has no kernel for float32 by int8: at accuracy level 1 every call unpacks all of a weight, by one value at a time (the
    head of SmolLM2 takes 0.2 to 0.5 s), and what is held against the eager model at that level takes minutes.
    """
    nodes = int8_products(model.graph)
    if 4 * sum(int_of(node, "K") * int_of(node, "N") for node in nodes) > most:
        return False
    for node in nodes:
        weight = ir.tensor(dequantize_nbits(node), name=f"{name_of(input_of(node, 1))}.float32")
        value = ir.Value(name=weight.name, const_value=weight, type=ir.TensorType(weight.dtype), shape=ir.Shape(weight.shape.numpy()))
        model.graph.register_initializer(value)
        product = ir.node("MatMul", [input_of(node, 0), value], name=node.name)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [product], node.outputs, product.outputs)
    for name in [name for name, value in model.graph.initializers.items() if not value.uses() and not value.is_graph_input()]:
        del model.graph.initializers[name]
    return True


def _float_inside(model: ir.Model) -> None:
    for node in model.graph:
        if node.domain == CONTRIB and node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)


def _quantized_nodes(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value]]:
    """(node that holds a quantized weight, the initializer with its integers)"""
    for node in graph:
        if node.domain == CONTRIB and node.op_type == "MatMulNBits":
            yield node, input_of(node, 1)
        elif node.domain == CONTRIB and node.op_type == "GatherBlockQuantized":
            yield node, input_of(node, 0)
    for node in per_token.integer_products(graph):
        yield node, input_of(node, 1)
    for _, up in qdq.weight_nodes(graph):
        yield up, input_of(up, 0)


_RESTORE = {
    "MatMulNBits": dequantize_nbits,
    "GatherBlockQuantized": dequantize_embedding,
    "MatMulInteger": per_token.dequantize_integer,
    "DequantizeLinear": qdq.dequantize_node,
}


def _original_name(stored: ir.Value) -> str:
    name = name_of(stored)
    return next((name.removesuffix(s) for s in _SUFFIXES if name.endswith(s)), name)
