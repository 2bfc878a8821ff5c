"""Which matrix products of a decoder are quantized, and which stay in float."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir

from graph_passes.find.weights import find_token_embedding, head_product, weight_name, weight_products
from runtimes.errors import CalibrationError

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_LAYERS = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    products: tuple[ir.Node, ...]
    float_weights: tuple[str, ...]
    """Names of the weights that stay in float by choice."""


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


def select(
    graph: ir.Graph, keep_high: Sequence[str], *, lm_head: bool, float_weights: Collection[str] = (), apart: str | None = None
) -> Selection:
    """The products to quantize; ``float_weights`` stay in float beside those that ``keep_high`` fits, and ``apart`` is in neither list.

    Raises CalibrationError for a pattern that fits no weight, and where nothing is left to quantize.
    """
    products = weight_products(graph)
    if not products:
        raise CalibrationError("the graph has no MatMul with a constant weight; it is quantized already, or is not a decoder")
    head_node = head_product(graph, products)
    head = None if head_node is None else weight_name(head_node)
    names = [weight_name(node) for node in products]
    high = set(float_weights) if lm_head or head is None else {head, *float_weights}
    high |= matching(keep_high, names, head, "--keep-high")
    high.discard(apart or "")
    chosen = tuple(node for node in products if weight_name(node) not in high and weight_name(node) != apart)
    if not chosen:
        raise CalibrationError("every weight is kept in float: nothing is left to quantize; name fewer with --keep-high")
    return Selection(products=chosen, float_weights=tuple(name for name in dict.fromkeys(names) if name in high))


def token_embedding(graph: ir.Graph) -> ir.Node:
    """The lookup of token ids in a table [V, D]; raises CalibrationError where the graph has none."""
    found = find_token_embedding(graph)
    if found is None:
        raise CalibrationError("the graph looks token ids up in no constant table [V, D]; leave out --embeddings")
    return found


def matching(patterns: Sequence[str], names: Sequence[str], head: str | None, option: str) -> set[str]:
    """Those of ``names`` that a pattern of ``option`` fits; ``lm_head`` is ``head``. Raises CalibrationError for one that fits none."""
    matched: set[str] = set()
    for pattern in patterns:
        fits = _matcher(pattern, head)
        found = {name for name in names if fits(name)}
        if not found:
            shown = ", ".join(names[:3])
            raise CalibrationError(f"{option} {pattern!r} fits none of the {len(names)} weights; they are called {shown}, ..")
        matched |= found
    return matched


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
