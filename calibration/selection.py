"""Which matrix products of a decoder are quantized, and which stay in float."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir

from graph_passes.accessors import input_of, name_of, optional_input, shape_of
from runtimes.errors import CalibrationError

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_LAYERS = re.compile(r"(\d+)(?:-(\d+))?")
_ALIASES = ("Reshape", "Cast", "Unsqueeze", "Squeeze", "Identity")


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    products: tuple[ir.Node, ...]
    float_weights: tuple[str, ...]
    """Names of the weights that stay in float by choice."""


def weight_products(graph: ir.Graph) -> list[ir.Node]:
    """Every MatMul with a constant 2-D weight, in graph order.

    The edit's own products are not among them: they stand in the model-local function, and their banks are graph inputs.
    """
    return [
        node for node in graph if node.domain == "" and node.op_type == "MatMul" and constant_matrix(optional_input(node, 1)) is not None
    ]


def weight_name(product: ir.Node) -> str:
    return name_of(input_of(product, 1))


def quantized_weights(graph: ir.Graph) -> list[tuple[ir.Node, ir.Value]]:
    """(first node that reads it, initializer) of every weight that is stored in 8 bits a value or fewer, in graph order."""
    found: dict[ir.Value, ir.Node] = {}
    for node in graph:
        for value in node.inputs:
            if value is None or not value.is_initializer():
                continue
            stored = value.const_value
            # Constants of rank 0 and 1 are zero points, and truth values of a mask.
            if stored is not None and len(stored.shape) > 1 and stored.dtype.bitwidth <= 8 and stored.dtype != ir.DataType.BOOL:
                found.setdefault(value, node)
    return [(node, value) for value, node in found.items()]


def constant_matrix(value: ir.Value | None) -> ir.TensorProtocol | None:
    if value is None or not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return None
    return value.const_value if len(value.const_value.shape) == 2 else None


def select(graph: ir.Graph, keep_high: Sequence[str], *, lm_head: bool, float_weights: Collection[str] = ()) -> Selection:
    """The products to quantize; ``float_weights`` stay in float beside those that ``keep_high`` fits.

    Raises CalibrationError for a pattern that fits no weight, and where nothing is left to quantize.
    """
    products = weight_products(graph)
    if not products:
        raise CalibrationError("the graph has no MatMul with a constant weight; it is quantized already, or is not a decoder")
    head_node = head_product(graph, products)
    head = None if head_node is None else weight_name(head_node)
    names = [weight_name(node) for node in products]
    high = set(float_weights) if lm_head or head is None else {head, *float_weights}
    for pattern in keep_high:
        fits = _matcher(pattern, head)
        found = {name for name in names if fits(name)}
        if not found:
            shown = ", ".join(names[:3])
            raise CalibrationError(f"--keep-high {pattern!r} fits none of the {len(names)} weights; they are called {shown}, ..")
        high |= found
    chosen = tuple(node for node in products if weight_name(node) not in high)
    if not chosen:
        raise CalibrationError("every weight is kept in float: nothing is left to quantize; name fewer with --keep-high")
    return Selection(products=chosen, float_weights=tuple(name for name in dict.fromkeys(names) if name in high))


def head_product(graph: ir.Graph, products: Sequence[ir.Node]) -> ir.Node | None:
    """The product with as many columns as there are logits: the last one, where several have."""
    logits = next((v for v in graph.outputs if v.name == "logits"), None)
    vocabulary = None if logits is None or logits.shape is None else logits.shape[-1]
    return next((node for node in reversed(products) if shape_of(input_of(node, 1))[1] == vocabulary), None)


def token_embedding(graph: ir.Graph) -> ir.Node:
    """The lookup of token ids in a table [V, D]: the Gather whose indices are input_ids themselves, reshaped at most."""
    for node in graph:
        if node.domain == "" and node.op_type == "Gather" and constant_matrix(node.inputs[0]) is not None:
            indices = node.inputs[1]
            while indices is not None and (producer := indices.producer()) is not None and producer.op_type in _ALIASES:
                indices = producer.inputs[0]
            if indices is not None and indices.name == "input_ids":
                return node
    raise CalibrationError("the graph looks token ids up in no constant table [V, D]; leave out --embeddings")


def layer_of(name: str) -> int | None:
    """The layer that a weight belongs to, by its parameter's name."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def _matcher(pattern: str, head: str | None) -> Callable[[str], bool]:
    if match := _LAYERS.fullmatch(pattern):
        first, last = int(match[1]), int(match[2] or match[1])
        return lambda name: (layer := layer_of(name)) is not None and first <= layer <= last
    if pattern == "lm_head":
        return lambda name: name == head
    return lambda name: fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)
